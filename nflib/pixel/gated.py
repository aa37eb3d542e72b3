"""Gated PixelCNN: two stacks that together see every pixel before, and gated units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nflib.arguments import ContextShape, ImageShape, Levels, Odd, Share, Size, checked
from nflib.discrete import Head, Softmax
from nflib.pixel.cnn import output_layers, shifts
from nflib.pixel.cursor import Features
from nflib.pixel.model import PixelModel
from nflib.pixel.window import WindowConv, channel_mask, pointwise


def gate(h: Tensor) -> Tensor:
    """``tanh(a) sigmoid(b)``, a and b the two halves of the channels."""
    a, b = h.chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


class GatedLayer(nn.Module):
    """One layer of both stacks.

        vertical:    v' = W_v * v,   v <- gate(v' + V c)
        horizontal:  h <- h + W_r gate(W_h * h + W_l v' + U c)

    The vertical stack sees whole rows above the pixel and feeds the horizontal one, which sees the
    pixels to the left; nothing flows back.
    """

    @checked
    def __init__(
        self, inputs: Size, width: Size, kernel: Odd, groups: Size, first: bool, dropout: Share
    ) -> None:
        super().__init__()
        reach = kernel // 2
        # The first layer reads pixels and must not see the row (column) that the cursor is in.
        rows = (-reach - 1, -1) if first else (-reach, 0)
        self.vertical = WindowConv(inputs, 2 * width, rows, (-reach, reach))
        mask = torch.ones(2 * width, inputs, 1, reach + 1, dtype=torch.bool)
        mask[:, :, 0, -1] = channel_mask(inputs, width, groups, first).repeat(2, 1)
        self.horizontal = WindowConv(inputs, 2 * width, (0, 0), (-reach, 0), mask)
        self.link = WindowConv(2 * width, 2 * width)
        self.residual = pointwise(width, width, groups)
        self.dropout = nn.Dropout(dropout)
        self.is_first = first

    def down(self, v: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next vertical features, and what the horizontal stack gets of them."""
        v = self.vertical(v)
        link = self.link(v)
        return gate(v if shift is None else v + shift), link

    def across(self, h: Tensor, link: Tensor, shift: Tensor | None) -> Tensor:
        """The next horizontal features."""
        inner = self.horizontal(h) + link
        out = self.residual(self.dropout(gate(inner if shift is None else inner + shift)))
        return out if self.is_first else h + out


class GatedPixelCNN(PixelModel):
    """Layers of a vertical and a horizontal stack with gated units; no blind spot.

    The vertical stack convolves ``kernel // 2 + 1`` rows of k columns, which begin above the
    pixel's row in the first layer; the horizontal one the ``kernel // 2`` pixels to the left, and
    itself from the second layer on. See `GatedLayer`.
    van den Oord et al. 2016, https://arxiv.org/abs/1606.05328.

    Args:
        shape: channels, height and width.
        levels: number of grey levels.
        width: channels of the features.
        layers: number of layers, the first included.
        kernel: of the layers, odd.
        first_kernel: of the first layer, odd.
        head: another distribution of a pixel in place of the softmax; it has its own levels.
        context_dim: size of a context vector, e.g. 10 for one-hot classes; it shifts every gate.
        order: of the channels, see `PixelModel`.
        dropout: share of gated values that are dropped in training.
    """

    @checked
    def __init__(
        self,
        shape: ImageShape,
        levels: Levels = 256,
        width: Size = 64,
        layers: Size = 6,
        *,
        kernel: Odd = 3,
        first_kernel: Odd = 7,
        head: Head | None = None,
        context_dim: ContextShape = None,
        order: Sequence[int] | None = None,
        dropout: Share = 0.0,
    ) -> None:
        super().__init__(shape, head or Softmax(levels, shape[0]), context_dim, order)
        make = [
            GatedLayer(
                width if k else shape[0],
                width,
                kernel if k else first_kernel,
                self.groups,
                first=k == 0,
                dropout=dropout,
            )
            for k in range(layers)
        ]
        self.layers = nn.ModuleList(make)
        self.entrances = [make[0].vertical, make[0].horizontal]
        # Vertical and horizontal shifts of all layers.
        self.shifts = shifts(self.context_shape, 2 * width, 2 * layers)
        self.last = output_layers(width, self.head, self.groups)

    def condition(self, context: Tensor | None) -> list[Tensor | None]:
        if not self.shifts:
            return [None] * (2 * len(self.layers))
        return [shift(context)[:, :, None, None] for shift in self.shifts]

    def above(self, x: Tensor, condition: Any) -> Features:
        """For each layer the links, and with them the shift of the horizontal stack."""
        links: Features = []
        v = x
        for layer, down, across in zip(self.layers, condition[::2], condition[1::2], strict=True):
            v, link = layer.down(v, down)  # type: ignore[operator]
            links.append(link if across is None else link + across)
        return links

    def pixels(self, x: Tensor, above: Features, condition: Any) -> Tensor:
        h = x
        for layer, link in zip(self.layers, above, strict=True):
            h = layer.across(h, link, None)  # type: ignore[operator]
        return self.last(h)
