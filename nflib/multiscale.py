"""Images at several scales: trade pixels for channels, and finish part of the image early.

Dinh et al. 2016 (RealNVP), section 3.6, https://arxiv.org/abs/1605.08803.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nflib.arguments import ImageShape, Size, checked
from nflib.core import (
    Bijection,
    EventShape,
    Layer,
    Shape,
    ShapeError,
    describe,
    fits,
    is_known,
    require_bijection,
    zeros_log_det,
)
from nflib.core.compose import common_context


class Squeeze(Bijection):
    """``(c, H, W) -> (4 c, H / 2, W / 2)``: each 2 x 2 square becomes four channels; log|det| 0.

    The four pixels of a square lie in the order top left, top right, bottom left, bottom right
    within each channel. A reordering: nothing is computed, nothing lost.

    Args:
        factor: side of the square.
    """

    event_shape = (None, None, None)

    @checked
    def __init__(self, factor: Size = 2) -> None:
        super().__init__()
        self.factor = factor

    def output_shape(self, shape: EventShape | None) -> EventShape | None:
        f = self.factor
        if shape is None or ... in shape:
            return self.event_shape
        if len(shape) != 3 or (shape[1] or 0) % f or (shape[2] or 0) % f:
            raise ShapeError(
                f"Squeeze expects images whose height and width are multiples of {f}, "
                f"got {describe(shape)}."
            )
        c, height, width = shape
        return c and c * f * f, height and height // f, width and width // f

    def input_shape(self, shape: EventShape | None) -> EventShape | None:
        f = self.factor
        if shape is None or ... in shape:
            return self.event_shape
        if len(shape) != 3 or (shape[0] or 0) % f**2:
            raise ShapeError(
                f"Squeeze.inverse expects a multiple of {f**2} channels, got {describe(shape)}."
            )
        c, height, width = shape
        return c and c // f**2, height and height * f, width and width * f

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        f, (batch, c, height, width) = self.factor, x.shape
        # Not torch's pixel_unshuffle, which loses the shape of an empty batch.
        squares = x.reshape(batch, c, height // f, f, width // f, f).permute(0, 1, 3, 5, 2, 4)
        return squares.reshape(batch, c * f**2, height // f, width // f), zeros_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        f, (batch, c, height, width) = self.factor, z.shape
        squares = z.reshape(batch, c // f**2, f, f, height, width).permute(0, 1, 4, 2, 5, 3)
        return squares.reshape(batch, c // f**2, height * f, width * f), zeros_log_det(z)

    def extra_repr(self) -> str:
        return f"{self.factor}"


class MultiScale(Bijection):
    """Levels of a flow, of which each hands half of its channels to the latents and goes on.

        h_0 = x,    (h_l, y_l) = f_l(h_{l-1}),    z = (y_1, ..., y_{L-1}, f_L(h_{L-1}))

    A bijection onto one flat vector: every latent comes out, and every latent goes back in. The
    first half of the channels goes on, the second is factored out. A learned prior of y_l given
    h_l, as in Glow, is a coupling at the end of f_l that keeps the first half: it shifts and scales
    y_l by what it sees in h_l. Cost: the sum of the levels'; each later level has half the numbers.

    Shapes: x ``(batch, *shape)``, z ``(batch, D)`` with D the product of shape.

    Args:
        shape: channels, height and width of x.
        levels: bijections f_1 to f_L on images, e.g. `Compose` of a `Squeeze` and flow steps.
    """

    @checked
    def __init__(self, shape: ImageShape, *levels: Layer) -> None:
        super().__init__()
        if not levels:
            raise ShapeError("MultiScale expects at least one level, got none.")
        self.levels = nn.ModuleList(require_bijection("MultiScale", level) for level in levels)
        self.event_shape = shape
        self.context_shape = common_context("MultiScale", levels)
        self.exact_inverse = all(level.exact_inverse for level in levels)
        # The shapes that the levels put out: the way back needs them.
        self.shapes: list[Shape] = []
        here: Shape = shape
        for number, level in enumerate(levels, 1):
            here = self._through(number, level, here)
            self.shapes.append(here)
            if number < len(levels):
                if here[0] % 2:
                    raise ShapeError(
                        "MultiScale expects an even number of channels after each level but the "
                        f"last, got {here[0]} after level {number}."
                    )
                here = (here[0] // 2, *here[1:])
        *early, last = [torch.Size(s).numel() for s in self.shapes]
        # How many latents each level hands over.
        self.sizes = [size // 2 for size in early] + [last]

    def _through(self, number: int, level: Layer, shape: Shape) -> Shape:
        """The shape of the image behind a level."""
        out = level.output_shape(shape) if fits(shape, level.event_shape) else None
        if out is None or not is_known(out) or len(out) != 3:
            raise ShapeError(
                f"MultiScale expects levels that take images to images, got one of "
                f"{describe(level.event_shape)} as level {number}, where {describe(shape)} arrives."
            )
        return out

    def output_shape(self, shape: EventShape | None) -> EventShape | None:
        return (sum(self.sizes),)

    def input_shape(self, shape: EventShape | None) -> EventShape | None:
        return self.event_shape

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det, latents = zeros_log_det(x), []
        for number, level in enumerate(self.levels, 1):
            x, term = level(x, context)
            log_det = log_det + term
            if number < len(self.levels):
                x, out = x.chunk(2, 1)
                latents.append(out.flatten(1))
        return torch.cat([*latents, x.flatten(1)], 1), log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._back(z, context, lambda level, x: None)

    def _back(
        self, z: Tensor, context: Tensor | None, visit: Callable[[Layer, Tensor], None]
    ) -> tuple[Tensor, Tensor]:
        """The inverse, which shows each level what arrives at it."""
        log_det = zeros_log_det(z)
        *early, last = z.split(self.sizes, 1)
        x = last.unflatten(1, self.shapes[-1])
        for number in reversed(range(len(self.levels))):
            if number < len(early):
                c, *sides = self.shapes[number]
                x = torch.cat([x, early[number].unflatten(1, (c // 2, *sides))], 1)
            level: Any = self.levels[number]
            visit(level, x)
            x, term = level.inverse(x, context)
            log_det = log_det + term
        return x, log_det

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        for level, shape in zip(self.levels, self.shapes, strict=True):
            level.initialize(x, context)  # type: ignore[operator]
            x = level(x, context)[0][:, : shape[0] // 2]

    @torch.no_grad()
    def initialize_inverse(self, z: Tensor, context: Tensor | None = None) -> None:
        self._back(z, context, lambda level, x: level.initialize_inverse(x, context))
