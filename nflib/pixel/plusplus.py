"""PixelCNN++: whole pixels, a logistic mixture, and shortcuts across several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflib.arguments import (
    ArgumentError,
    ContextShape,
    Count,
    ImageShape,
    Levels,
    Share,
    Size,
    checked,
)
from nflib.discrete import Head, LogisticMixture
from nflib.nets import elu2
from nflib.pixel.cnn import shifts
from nflib.pixel.cursor import Features
from nflib.pixel.model import PixelModel
from nflib.pixel.window import UpConv, WindowConv, pointwise

# Windows of the two streams: rows above and the pixel's own; to the left of the pixel and itself.
DOWN = {"rows": (-1, 0), "cols": (-1, 1)}
DOWN_RIGHT = {"rows": (-1, 0), "cols": (-1, 0)}


class GatedBlock(nn.Module):
    """``h + a sigmoid(b)``, (a, b) two convolutions of h, with what comes from elsewhere between.

        inner = W1 * elu2(h) + W0 elu2(beside)
        a, b = W2 * dropout(elu2(inner)) + U c

    elu2 is ELU of h and of -h side by side. W1 and W2 are over the stream's window, W0 is 1x1.
    """

    @checked
    def __init__(
        self, width: Size, window: dict[str, Any], beside: Count, scale: Count, dropout: Share
    ) -> None:
        super().__init__()
        self.inner = WindowConv(2 * width, width, scale=scale, **window)
        self.beside = pointwise(2 * beside, width, scale=scale) if beside else None
        self.dropout = nn.Dropout(dropout)
        self.outer = WindowConv(2 * width, 2 * width, scale=scale, **window)

    def forward(self, h: Tensor, beside: Tensor | None, shift: Tensor | None) -> Tensor:
        inner = self.inner(elu2(h))
        if self.beside is not None and beside is not None:
            inner = inner + self.beside(elu2(beside))
        out = self.outer(self.dropout(elu2(inner)))
        return h + F.glu(out if shift is None else out + shift, 1)


class Stream(nn.Module):
    """Blocks at full size, at half the size and so on, and back, with shortcuts at equal sizes.

    Every block is given, besides, the features of another stream at the same place (if there is
    one), and on the way up those of the block on the way down. The features of all blocks are one
    list: for each size those of the way down, then those of the way up.
    """

    @checked
    def __init__(
        self,
        width: Size,
        blocks: Size,
        sizes: Size,
        window: dict[str, Any],
        under: bool,
        dropout: Share,
    ) -> None:
        super().__init__()
        beside = width if under else 0

        def stack(beside: int, scale: int) -> nn.ModuleList:
            return nn.ModuleList(
                GatedBlock(width, window, beside, scale, dropout) for _ in range(blocks)
            )

        self.blocks, self.sizes = blocks, sizes
        self.down = nn.ModuleList(stack(beside, scale) for scale in range(sizes))
        self.up = nn.ModuleList(stack(beside + width, scale) for scale in range(sizes))
        self.shrink = nn.ModuleList(
            WindowConv(width, width, stride=2, scale=scale, **window) for scale in range(sizes - 1)
        )
        self.grow = nn.ModuleList(UpConv(width, scale) for scale in range(sizes - 1))

    def forward(self, h: Tensor, others: Features, shifts: Features) -> tuple[Tensor, Features]:
        """The last features and those of all blocks; None where the cursor passes over a size."""
        found: Features = [None] * (2 * self.blocks * self.sizes)
        return self._size(0, h, others, shifts, found), found

    def _size(
        self, scale: int, h: Tensor, others: Features, shifts: Features, found: Features
    ) -> Tensor:
        first = 2 * self.blocks * scale
        ways: list[Any] = [self.down[scale], self.up[scale]]
        shortcuts: list[Tensor] = []
        for k, block in enumerate(ways[0], first):
            h = found[k] = block(h, others[k], shifts[k])
            shortcuts.append(h)
        if scale + 1 < self.sizes:
            low = self.shrink[scale](h)
            if low is not None:
                low = self._size(scale + 1, low, others, shifts, found)
            h = self.grow[scale](low)
        for k, block in enumerate(ways[1], first + self.blocks):
            beside = [part for part in (others[k], shortcuts.pop()) if part is not None]
            h = found[k] = block(h, torch.cat(beside, 1), shifts[k])
        return h


class PixelCNNPP(PixelModel):
    """Two streams over several sizes; each pixel a mixture of discretized logistics.

    One stream sees the rows above, the other also the pixels to the left and, at every block, the
    first. Both go down to ``sizes - 1`` halvings of the image and up again, so that few layers see
    far, with shortcuts that carry the detail. The three channels of a pixel are predicted together.
    Salimans et al. 2017, https://arxiv.org/abs/1701.05517, whose network also has weight
    normalization and a constant channel beside the image.

    Args:
        shape: channels, height and width; both sides multiples of 2^(sizes - 1).
        levels: number of grey levels.
        width: channels of the features (the paper: 160).
        blocks: blocks at each size and way (the paper: 5).
        sizes: number of sizes (the paper: 3).
        components: logistics of the mixture (the paper: 10).
        head: another distribution of a pixel, e.g. a softmax for one channel.
        context_dim: size of a context vector; it shifts every block.
        order: of the channels, see `PixelModel`.
        dropout: inside of the blocks (the paper: 0.5).
    """

    @checked
    def __init__(
        self,
        shape: ImageShape,
        levels: Levels = 256,
        width: Size = 64,
        blocks: Size = 2,
        sizes: Size = 3,
        *,
        components: Size = 5,
        head: Head | None = None,
        context_dim: ContextShape = None,
        order: Sequence[int] | None = None,
        dropout: Share = 0.0,
    ) -> None:
        head = head or LogisticMixture(levels, shape[0], components)
        super().__init__(shape, head, context_dim, order)
        if self.groups > 1:
            raise ArgumentError(
                "PixelCNNPP predicts whole pixels and expects a head that does, such as "
                f"LogisticMixture, got {head}."
            )
        multiple = 2 ** (sizes - 1)
        if shape[1] % multiple or shape[2] % multiple:
            raise ArgumentError(
                f"PixelCNNPP with {sizes} sizes expects sides that are multiples of {multiple}, "
                f"got {shape[1]} x {shape[2]}."
            )
        channels = shape[0]
        self.enter_above = WindowConv(channels, width, (-2, -1), (-1, 1))
        self.enter_over = WindowConv(channels, width, (-1, -1), (-1, 1))
        self.enter_left = WindowConv(channels, width, (-1, 0), (-1, -1))
        self.entrances = [self.enter_above, self.enter_over, self.enter_left]
        self.vertical = Stream(width, blocks, sizes, DOWN, under=False, dropout=dropout)
        self.horizontal = Stream(width, blocks, sizes, DOWN_RIGHT, under=True, dropout=dropout)
        self.shifts = shifts(self.context_shape, 2 * width, 4 * blocks * sizes)
        self.last = pointwise(2 * width, head.count)

    def condition(self, context: Tensor | None) -> tuple[Features, Features]:
        count = 2 * self.vertical.blocks * self.vertical.sizes
        every: Features = [shift(context)[:, :, None, None] for shift in self.shifts]
        every = every or [None] * (2 * count)
        return every[:count], every[count:]

    def above(self, x: Tensor, condition: Any) -> Features:
        nothing: Features = [None] * len(condition[0])
        features = self.vertical(self.enter_above(x), nothing, condition[0])[1]
        return [*features, self.enter_over(x)]

    def pixels(self, x: Tensor, above: Features, condition: Any) -> Tensor:
        *others, over = above
        h = over + self.enter_left(x)
        return self.last(elu2(self.horizontal(h, others, condition[1])[0]))
