"""PixelRNN: Row LSTM and Diagonal BiLSTM, whose receptive fields reach any pixel before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflib.arguments import ContextShape, ImageShape, Levels, Odd, Share, Size, checked
from nflib.discrete import Head, Softmax
from nflib.pixel.cnn import masked_conv, output_layers, shifts
from nflib.pixel.cursor import Features
from nflib.pixel.model import Drawing, PixelModel
from nflib.pixel.window import WindowConv, channel_mask, pointwise


def skew(x: Tensor) -> Tensor:
    """Row r moved r columns to the right: ``(batch, C, H, W) -> (batch, C, H, W + H - 1)``.

    A column of the result is a diagonal of the image; new places are zero.
    """
    height, width = x.shape[2:]
    return F.pad(x, (0, height)).flatten(2)[:, :, :-height].unflatten(2, (height, -1))


def unskew(x: Tensor) -> Tensor:
    """The image whose `skew` x is."""
    height = x.shape[2]
    width = x.shape[3] - height + 1
    return F.pad(x.flatten(2), (0, height)).unflatten(2, (height, -1))[..., :width]


def lstm_cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """``c <- f c + i g,  h = o tanh(c)`` from the gates (o, f, i, g), side by side."""
    width = c.shape[-1]
    squashed, g = gates.split([3 * width, width], -1)
    o, f, i = torch.sigmoid(squashed).chunk(3, -1)
    c = f * c + i * torch.tanh(g)
    return o * torch.tanh(c), c


class RowLSTM(nn.Module):
    """An LSTM that goes down the rows, all pixels of a row at once.

        gates = W_is * x (the pixel, its left neighbour) + W_ss * h (three pixels of the row above)

    What a pixel sees is a triangle above it. ``(batch, inputs, H, W) -> (batch, width, H, W)``,
    H steps one after the other.
    """

    @checked
    def __init__(self, inputs: Size, width: Size, groups: Size) -> None:
        super().__init__()
        self.width = width
        mask = torch.ones(4 * width, inputs, 1, 2, dtype=torch.bool)
        mask[:, :, 0, 1] = channel_mask(inputs, width, groups, strict=False).repeat(4, 1)
        self.input = WindowConv(inputs, 4 * width, (0, 0), (-1, 0), mask)
        bound = (3 * width) ** -0.5
        # From the states of three pixels of the row above to the four gates.
        self.state = nn.Parameter(torch.empty(3 * width, 4 * width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        batch, width = len(x), x.shape[3]
        rows = self.input(x).permute(2, 0, 3, 1).flatten(1, 2)  # (H, batch * W, 4 width)
        h = c = rows.new_zeros(batch * width, self.width)
        found = []
        for k, gates in enumerate(rows):
            if k:
                line = F.pad(h.view(batch, width, self.width), (0, 0, 1, 1))
                near = torch.cat([line[:, :-2], line[:, 1:-1], line[:, 2:]], 2).flatten(0, 1)
                gates = torch.addmm(gates, near, self.state)
            h, c = lstm_cell(gates, c)
            found.append(h)
        return torch.stack(found).unflatten(1, (batch, width)).permute(1, 3, 0, 2)


class DiagonalBiLSTM(nn.Module):
    """Two LSTMs that go over the diagonals, from both upper corners.

    On the skewed image a column is a diagonal, and the state reaches a pixel from its left and
    upper neighbours: ``gates = W_is x + W_ss (h_left, h_above)``. The second LSTM works on the
    mirrored image and its result moves down by one row, so that it too sees only what is before.
    Together they see the features of every pixel before. (In a `PixelRNN`, whose features have seen
    only what is before their own pixel, the last pixel of the row above can stay out of reach.)
    ``(batch, inputs, H, W) -> (batch, width, H, W)``, H + W - 1 steps one after the other.
    """

    @checked
    def __init__(self, inputs: Size, width: Size, groups: Size) -> None:
        super().__init__()
        self.width = width
        self.inputs = nn.ModuleList(
            pointwise(inputs, 4 * width, groups, copies=4) for _ in range(2)
        )
        bound = (2 * width) ** -0.5
        # From (h_left, h_above) to the four gates, one matrix for each direction.
        self.state = nn.Parameter(torch.empty(2, 2 * width, 4 * width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        batch, height = len(x), x.shape[2]
        # Diagonals first: (W + H - 1, direction, batch * H, 4 width); one product serves both.
        both = torch.stack([skew(self.inputs[0](x)), skew(self.inputs[1](x.flip(3)))])
        gates = both.permute(4, 0, 1, 3, 2).flatten(2, 3)
        h = c = x.new_zeros(2, batch * height, self.width)
        found = []
        for k, column in enumerate(gates):
            if k:
                # One row down is one entry on in a batch's block of H rows.
                over = F.pad(h.view(2, batch, height, self.width)[:, :, :-1], (0, 0, 1, 0)).flatten(
                    1, 2
                )
                column = torch.baddbmm(column, torch.cat([h, over], 2), self.state)
            h, c = lstm_cell(column, c)
            found.append(h)
        states = torch.stack(found, 3).unflatten(1, (batch, height)).transpose(2, 3)
        left, right = (unskew(state) for state in states)
        return left + F.pad(right.flip(3)[:, :, :-1], (0, 0, 1, 0))


class PixelRNN(PixelModel):
    """A masked 7x7 convolution, residual LSTM layers over the image, two 1x1 layers.

    ``kind="row"`` has `RowLSTM` layers, ``"diagonal"`` `DiagonalBiLSTM` layers. Cost of log_prob:
    one pass, whose steps along rows or diagonals wait for each other. Sampling runs the network
    over the rows so far for every pixel; ``cached`` makes no difference to it.
    van den Oord et al. 2016, https://arxiv.org/abs/1601.06759.

    Args:
        shape: channels, height and width.
        levels: number of grey levels.
        kind: ``"row"`` or ``"diagonal"``.
        width: channels of an LSTM's state; the features between the layers have twice as many.
        layers: number of LSTM layers.
        kernel: of the first convolution, odd.
        head, context_dim, order: see `PixelModel`.
        dropout: share of each LSTM's output that is dropped in training.
    """

    @checked
    def __init__(
        self,
        shape: ImageShape,
        levels: Levels = 256,
        kind: Literal["row", "diagonal"] = "diagonal",
        width: Size = 32,
        layers: Size = 3,
        *,
        kernel: Odd = 7,
        head: Head | None = None,
        context_dim: ContextShape = None,
        order: Sequence[int] | None = None,
        dropout: Share = 0.0,
    ) -> None:
        super().__init__(shape, head or Softmax(levels, shape[0]), context_dim, order)
        lstm = RowLSTM if kind == "row" else DiagonalBiLSTM
        groups = self.groups
        self.first = masked_conv(shape[0], 2 * width, kernel, groups, strict=True)
        self.entrances = [self.first]
        self.layers = nn.ModuleList(lstm(2 * width, width, groups) for _ in range(layers))
        self.widen = nn.ModuleList(pointwise(width, 2 * width, groups) for _ in range(layers))
        self.shifts = shifts(self.context_shape, 2 * width, layers)
        self.dropout = nn.Dropout(dropout)
        self.last = output_layers(2 * width, self.head, groups)

    def condition(self, context: Tensor | None) -> list[Tensor]:
        return [shift(context)[:, :, None, None] for shift in self.shifts]

    def pixels(self, x: Tensor, above: Features, condition: Any) -> Tensor:
        h = self.first(x)
        for k, (layer, widen) in enumerate(zip(self.layers, self.widen, strict=True)):
            if condition:
                h = h + condition[k]
            h = h + widen(self.dropout(layer(h)))
        return self.last(h)

    def _walk(self, drawing: Drawing, context: Tensor | None) -> None:
        """Every step, by the network over the rows so far: the states begin at the top."""
        condition = self.condition(context)
        for cursor, step in self._steps(drawing):
            rows = self.scaled(drawing.x[:, :, : cursor.row + 1])
            drawing.draw(cursor, step, cursor.cut(self.pixels(rows, [], condition)))

    _walk_cached = _walk
