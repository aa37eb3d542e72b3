"""Images at several scales: trade pixels for channels, and finish part of the image early.

Dinh et al. 2016 (RealNVP), section 3.6, https://arxiv.org/abs/1605.08803.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nflib.core import Bijection, Shape, ShapeError, describe, zeros_log_det


class Squeeze(Bijection):
    """``(c, H, W) -> (4 c, H / 2, W / 2)``: each 2 x 2 square becomes four channels; log|det| 0.

    The four pixels of a square lie in the order top left, top right, bottom left, bottom right
    within each channel. A reordering: nothing is computed, nothing lost.

    Args:
        factor: side of the square.
    """

    event_shape = (None, None, None)

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        if factor < 1:
            raise ShapeError(f"Squeeze expects a positive factor, got {factor}.")
        self.factor = factor

    def output_shape(self, shape: Shape) -> Shape:
        f = self.factor
        if len(shape) != 3 or shape[1] % f or shape[2] % f:
            raise ShapeError(
                f"Squeeze expects images whose height and width are multiples of {f}, "
                f"got {describe(shape)}."
            )
        return shape[0] * f * f, shape[1] // f, shape[2] // f

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_input(x, context)
        f, (c, height, width) = self.factor, self.output_shape(tuple(x.shape[1:]))
        # Not torch's pixel_unshuffle, which loses the shape of an empty batch.
        squares = x.reshape(len(x), c // f**2, height, f, width, f).permute(0, 1, 3, 5, 2, 4)
        return squares.reshape(len(x), c, height, width), zeros_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_input(z, context)
        if z.shape[1] % self.factor**2:
            raise ShapeError(
                f"Squeeze.inverse expects a multiple of {self.factor**2} channels, "
                f"got shape {tuple(z.shape)}."
            )
        f, (c, height, width) = self.factor, z.shape[1:]
        squares = z.reshape(len(z), c // f**2, f, f, height, width).permute(0, 1, 4, 2, 5, 3)
        return squares.reshape(len(z), c // f**2, height * f, width * f), zeros_log_det(z)

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

    def __init__(self, shape: Shape, *levels: Bijection) -> None:
        super().__init__()
        if len(shape) != 3 or not levels:
            raise ShapeError(
                "MultiScale expects a shape (channels, height, width) and at least one level, "
                f"got {describe(tuple(shape))} and {len(levels)} levels."
            )
        self.event_shape = tuple(shape)
        self.levels = nn.ModuleList(levels)
        # The shapes that the levels put out: the way back needs them.
        self.shapes: list[Shape] = []
        here: Shape = tuple(shape)
        for number, level in enumerate(levels, 1):
            here = level.output_shape(here)
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

    def output_shape(self, shape: Shape) -> Shape:
        return (sum(self.sizes),)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_input(x, context)
        log_det, latents = zeros_log_det(x), []
        for number, level in enumerate(self.levels, 1):
            x, term = level(x, context)
            log_det = log_det + term
            if number < len(self.levels):
                x, out = x.chunk(2, 1)
                latents.append(out.flatten(1))
        return torch.cat([*latents, x.flatten(1)], 1), log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if z.ndim != 2 or z.shape[1] != sum(self.sizes):
            raise ShapeError(
                f"MultiScale.inverse expects shape (batch, {sum(self.sizes)}), "
                f"got {tuple(z.shape)}."
            )
        log_det = zeros_log_det(z)
        *early, last = z.split(self.sizes, 1)
        x = last.unflatten(1, self.shapes[-1])
        latents: list[Tensor | None] = [*early, None]
        for level, shape, out in reversed(
            list(zip(self.levels, self.shapes, latents, strict=True))
        ):
            if out is not None:
                x = torch.cat([x, out.unflatten(1, (shape[0] // 2, *shape[1:]))], 1)
            x, term = level.inverse(x, context)  # type: ignore[operator]
            log_det = log_det + term
        return x, log_det

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        for level, shape in zip(self.levels, self.shapes, strict=True):
            level.initialize(x, context)  # type: ignore[operator]
            x = level(x, context)[0][:, : shape[0] // 2]
