"""PixelCNN: a stack of masked convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nflib.arguments import (
    ArgumentError,
    ContextShape,
    ImageShape,
    Levels,
    Odd,
    Share,
    Size,
    checked,
)
from nflib.core import EventShape
from nflib.discrete import Head, Softmax
from nflib.pixel.cursor import Features
from nflib.pixel.model import PixelModel
from nflib.pixel.window import WindowConv, channel_mask, pointwise


@checked
def masked_conv(
    inputs: Size, outputs: Size, kernel: Odd, groups: Size = 1, strict: bool = False
) -> WindowConv:
    """A square convolution of which only the pixels before the centre, and part of it, are left.

    The mask of PixelCNN: all weights of the rows above and to the left of the centre, at the centre
    those that `channel_mask` allows (mask A if ``strict``, else B), none after it.
    """
    reach = kernel // 2
    mask = torch.ones(outputs, inputs, reach + 1, kernel, dtype=torch.bool)
    mask[:, :, -1, reach] = channel_mask(inputs, outputs, groups, strict)
    mask[:, :, -1, reach + 1 :] = False
    return WindowConv(inputs, outputs, (-reach, 0), (-reach, reach), mask)


class PixelCNN(PixelModel):
    """A masked 7x7 convolution, residual blocks of masked 3x3 convolutions, two 1x1 layers.

        h <- h + W3 a(W2 * a(W1 a(h))),    W1, W3 1x1, W2 3x3 with half the channels, a ReLU

    Its receptive field has a blind spot: pixels above and to the right that no stack of such masks
    reaches, see `GatedPixelCNN`. Cost: one pass for all conditionals.
    van den Oord et al. 2016, https://arxiv.org/abs/1601.06759.

    Args:
        shape: channels, height and width.
        levels: number of grey levels.
        width: channels of the features, at least 2; the blocks have half as many inside.
        blocks: number of residual blocks.
        kernel: of the first convolution, odd; the paper has 7.
        head: another distribution of a pixel in place of the softmax; it has its own levels.
        context_dim, order: see `PixelModel`. A context shifts the features of every block.
        dropout: share of hidden values that are dropped in training.
    """

    @checked
    def __init__(
        self,
        shape: ImageShape,
        levels: Levels = 256,
        width: Size = 64,
        blocks: Size = 6,
        *,
        kernel: Odd = 7,
        head: Head | None = None,
        context_dim: ContextShape = None,
        order: Sequence[int] | None = None,
        dropout: Share = 0.0,
    ) -> None:
        super().__init__(shape, head or Softmax(levels, shape[0]), context_dim, order)
        if width < 2:
            raise ArgumentError(
                "PixelCNN expects a width of at least 2, for its blocks have half as many channels "
                f"inside, got {width}."
            )
        groups = self.groups
        self.first = masked_conv(shape[0], width, kernel, groups, strict=True)
        self.entrances = [self.first]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                pointwise(width, width // 2, groups),
                nn.ReLU(),
                masked_conv(width // 2, width // 2, 3, groups),
                nn.ReLU(),
                nn.Dropout(dropout),
                pointwise(width // 2, width, groups),
            )
            for _ in range(blocks)
        )
        self.shifts = shifts(self.context_shape, width, blocks)
        self.last = output_layers(width, self.head, groups)

    def condition(self, context: Tensor | None) -> list[Tensor]:
        return [shift(context)[:, :, None, None] for shift in self.shifts]

    def pixels(self, x: Tensor, above: Features, condition: Any) -> Tensor:
        h = self.first(x)
        for k, block in enumerate(self.blocks):
            if condition:
                h = h + condition[k]
            h = h + block(h)
        return self.last(h)


def shifts(context_shape: EventShape | None, width: int, layers: int) -> nn.ModuleList:
    """For each layer what a context adds to its features; nothing without a context."""
    if context_shape is None:
        return nn.ModuleList()
    size = context_shape[0]
    return nn.ModuleList(nn.Linear(size, width, bias=False) for _ in range(layers))


def output_layers(width: int, head: Head, groups: int) -> nn.Sequential:
    """ReLU and 1x1 convolutions from features to the head's parameters."""
    return nn.Sequential(
        nn.ReLU(),
        pointwise(width, width, groups),
        nn.ReLU(),
        pointwise(width, head.count, groups),
    )
