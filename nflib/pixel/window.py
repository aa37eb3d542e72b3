"""Convolutions that look at a window of pixels before their own, on whole images or step by step.

A window is a range of rows and of columns around a pixel, ``rows=(-1, 0), cols=(-1, 1)`` say. One
that holds only pixels earlier in raster order (row by row, left to right) keeps a network
autoregressive. On a whole image a `WindowConv` is an ordinary padded convolution. While a sampler
walks over the image, every activation is computed once, by the same code of the network: all its
layers share a cursor (`nflib.pixel.cursor`), and each is given, and returns, only what lies there.

    given: x at the cursor (1 x 1)        the layer's buffer: what it was given so far
                                            . . . . . . .      padding, one row above
           x  ---- write ---->              0 a b c d e 0
                                            0 f[g h i]. 0      the window of the cursor's pixel h:
           y  <--- product ---                                 rows -1..0, cols -1..1
    returned: y at the cursor (1 x 1)

What lies behind the cursor is still zero, as a mask would make it. A row at a time works alike. A
layer of stride 2 returns None at the pixels that it passes over, and `UpConv` then answers from
the block that it computed before.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflib.arguments import ArgumentError, Count, Size, checked, show
from nflib.pixel.cursor import Cursor

Range = tuple[int, int]


class Stepwise(nn.Module):
    """A layer that can also be run step by step along a cursor.

    Args:
        scale: how often the image was halved before this layer; the cursor counts full-size pixels.
    """

    @checked
    def __init__(self, scale: Count = 0) -> None:
        super().__init__()
        self.scale = scale
        self.cursor: Cursor | None = None

    def open(self, cursor: Cursor, rows: int) -> None:
        """Begin to follow the cursor over ``rows`` images."""
        self.cursor = cursor

    def close(self) -> None:
        """Back to whole images."""
        self.cursor = None


@checked
def channel_mask(inputs: Size, outputs: Size, groups: Size, strict: bool) -> Tensor:
    """Which outputs may see which inputs of the same pixel, ``(outputs, inputs)``.

    Both are divided into as many groups as there are steps within a pixel, in order (red, green,
    blue). An output sees the inputs of its own group and of earlier ones, or only the earlier ones
    if ``strict``: the masks B and A of PixelRNN (van den Oord et al. 2016).
    """
    into = torch.arange(outputs) * groups // outputs
    out_of = torch.arange(inputs) * groups // inputs
    return out_of[None, :] < into[:, None] if strict else out_of[None, :] <= into[:, None]


class WindowConv(Stepwise):
    """A convolution over a window of rows and columns relative to each pixel; zeros outside.

    ``(batch, inputs, H, W) -> (batch, outputs, H, W)``, or half of each side with ``stride=2``.
    Cost O(inputs * outputs * window) a pixel.

    Args:
        inputs, outputs: channels.
        rows, cols: first and last row and column of the window, relative to the pixel: the pixel
            itself is ``(0, 0)``, rows above are negative.
        mask: which weights exist, ``(outputs, inputs, rows, cols)`` or None for all; only these
            are stored.
        stride: 1 or 2.
        scale: see `Stepwise`; for ``stride=2`` that of the input.
    """

    @checked
    def __init__(
        self,
        inputs: Size,
        outputs: Size,
        rows: Range = (0, 0),
        cols: Range = (0, 0),
        mask: Tensor | None = None,
        stride: Literal[1, 2] = 1,
        scale: Count = 0,
    ) -> None:
        super().__init__(scale)
        for name, ends in (("rows", rows), ("cols", cols)):
            if not _is_range(ends):
                raise ArgumentError(
                    f"WindowConv expects {name} to be the first and last of them, got {show(ends)}."
                )
        self.inputs, self.outputs, self.stride = inputs, outputs, stride
        self.kernel = (rows[1] - rows[0] + 1, cols[1] - cols[0] + 1)
        # Left, right, top, bottom; a negative padding cuts rows off that no window reaches.
        self.padding = (-cols[0], cols[1], -rows[0], rows[1])
        shape = (outputs, inputs, *self.kernel)
        if mask is not None and tuple(mask.shape) != shape:
            raise ArgumentError(
                f"WindowConv expects a mask of shape {shape}, got {tuple(mask.shape)}."
            )
        used = math.prod(shape) if mask is None else int(mask.sum())
        bound = (outputs / max(used, 1)) ** 0.5
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))
        start = torch.empty(used).uniform_(-bound, bound)
        if used == math.prod(shape):
            self.weight_ = nn.Parameter(start.view(shape))
            self.index: Tensor | None = None
        else:
            assert mask is not None
            self.weight_ = nn.Parameter(start)
            self.register_buffer("index", mask.flatten().nonzero()[:, 0], persistent=False)
        self.shape = shape
        self._alone = self.kernel == (1, 1) and self.padding == (0, 0, 0, 0)
        self._buffer: Tensor | None = None
        self._flat: Tensor | None = None

    def weight(self) -> Tensor:
        """The kernel, ``(outputs, inputs, rows, cols)``, zero where the mask is."""
        if self.index is None:
            return self.weight_
        empty = self.weight_.new_zeros(math.prod(self.shape))
        return empty.index_copy(0, self.index, self.weight_).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """On a whole image, or at the cursor; then None where a stride passes over it."""
        if self.cursor is None:
            return F.conv2d(F.pad(x, self.padding), self.weight(), self.bias, self.stride)
        return self._step(x)

    def open(self, cursor: Cursor, rows: int) -> None:
        super().open(cursor, rows)
        left, right, top, _ = self.padding
        height, width = cursor.height >> self.scale, cursor.width >> self.scale
        weight = self.weight().detach()
        tall = max(top, 0) + height
        self._buffer = weight.new_zeros(rows, self.inputs, tall, left + width + max(right, 0))
        self._flat = weight.flatten(1).T.contiguous()

    def close(self) -> None:
        super().close()
        self._buffer = self._flat = None

    def write(self, x: Tensor) -> None:
        """Take in what lies at the cursor: one pixel or one row."""
        assert self.cursor is not None
        assert self._buffer is not None
        left, _, top, _ = self.padding
        self.cursor.put(self._buffer, x, self.scale, top, left)

    def _step(self, x: Tensor) -> Tensor:
        assert self.cursor is not None
        is_row = self.cursor.col is None
        if self._alone and not is_row:
            return self._product(x)
        self.write(x)
        if self.stride > 1 and self.cursor.passes(self.scale + 1):
            return None  # type: ignore[return-value]
        assert self._buffer is not None
        window = self.cursor.cut(self._buffer, self.scale, self.kernel)
        if is_row:
            return F.conv2d(window, self.weight(), self.bias, self.stride)
        return self._product(window)

    def _product(self, window: Tensor) -> Tensor:
        """One pixel, ``(batch, outputs, 1, 1)``."""
        assert self._flat is not None
        out = torch.addmm(self.bias, window.flatten(1), self._flat)
        return out.view(*out.shape, 1, 1)

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.outputs}, window={self.kernel}, stride={self.stride}"


def _is_range(ends: Range) -> bool:
    is_pair = isinstance(ends, tuple) and len(ends) == 2
    return is_pair and all(isinstance(end, int) for end in ends) and ends[0] <= ends[1]


@checked
def pointwise(
    inputs: Size, outputs: Size, groups: Size = 1, scale: Count = 0, copies: Size = 1
) -> WindowConv:
    """A 1x1 convolution that keeps the order of the channels within a pixel.

    ``copies`` repeats the order over the outputs, for layers that return several sets of features.
    """
    mask = channel_mask(inputs, outputs // copies, groups, strict=False).repeat(copies, 1)
    return WindowConv(inputs, outputs, mask=mask[:, :, None, None], scale=scale)


class UpConv(Stepwise):
    """Twice the size: a 1x1 convolution to 4 sets of features, one for each pixel of a 2x2 block.

    ``(batch, width, H, W) -> (batch, width, 2 H, 2 W)``; a transposed convolution of kernel and
    stride 2.

    Args:
        width: channels.
        scale: of the output, see `Stepwise`.
    """

    @checked
    def __init__(self, width: Size, scale: Count = 0) -> None:
        super().__init__(scale)
        self.conv = nn.Conv2d(width, 4 * width, 1)
        self._buffer: Tensor | None = None

    def forward(self, low: Tensor | None) -> Tensor:
        """``low`` is None where the cursor is at a pixel whose block was reached before."""
        if self.cursor is None:
            assert low is not None
            return F.pixel_shuffle(self.conv(low), 2)
        assert self._buffer is not None
        if low is not None:
            self.cursor.put(self._buffer, F.pixel_shuffle(self.conv(low), 2), self.scale)
        return self.cursor.cut(self._buffer, self.scale)

    def open(self, cursor: Cursor, rows: int) -> None:
        super().open(cursor, rows)
        # The two rows of a block.
        size = (rows, self.conv.in_channels, 2, cursor.width >> self.scale)
        self._buffer = self.conv.weight.new_zeros(size)

    def close(self) -> None:
        super().close()
        self._buffer = None
