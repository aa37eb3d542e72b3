"""Mixing flows: an image as a matrix of patches x channels, and flows along either side of it.

MLP-Mixer reads an image as a matrix X of P patches with C numbers each, and mixes the numbers of
every patch with one network and the patches of every channel with another. The same with flows:

    AlongChannels(f):  X_p. <- f(X_p.) for every patch p,      log|det| = sum_p log|det f'(X_p.)|
    AlongPatches(g):   X_.c <- g(X_.c) for every channel c,    log|det| = sum_c log|det g'(X_.c)|

One f serves all patches and one g all channels, so the parameters of f do not depend on P, nor
those of g on C. `Patches` and `Bands` cut the image, `Shift` moves where they cut. All of them
reorder numbers and have log|det| 0. ``models.mixerflow`` puts them together.
English, Kirchler and Lippert 2023, https://arxiv.org/abs/2310.16777; MLP-Mixer: Tolstikhin et al.
2021, https://arxiv.org/abs/2105.01601.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nflib.arguments import ArgumentError, EventSizes, ImageShape, Size, Whole, checked
from nflib.core import (
    Bijection,
    EventShape,
    Layer,
    Shape,
    ShapeError,
    describe,
    require_bijection,
    zeros_log_det,
)
from nflib.core.shapes import NoCommonShape, meet


class Patches(Bijection):
    """``(c, H, W) -> (P, C)``: one row for each h x w patch, its C = c h w numbers; log|det| 0.

    Patches lie in reading order, P = (H / h) (W / w) of them; the numbers of a patch are its
    channels, one after the other, each in reading order. A vector ``(D,)`` is cut into P = D / w
    pieces of C = w numbers. A reordering: nothing is computed, nothing lost.

    Args:
        shape: channels, height and width of the image, or the size of the vector.
        patch: height and width of a patch, or one number for both; each divides the image's.
    """

    @checked
    def __init__(self, shape: EventSizes, patch: EventSizes) -> None:
        super().__init__()
        assert isinstance(shape, tuple)  # which `checked` makes of it
        assert isinstance(patch, tuple)
        if len(shape) not in (1, 3) or len(patch) > 2:
            raise ShapeError(
                f"{type(self).__name__} expects the shape (channels, height, width) of an image "
                "or the size of a vector, and a patch of at most two sides, "
                f"got {describe(shape)} and {describe(patch)}."
            )
        self.event_shape: Shape = shape
        c, height, width = (1, 1, *shape) if len(shape) == 1 else shape
        h, w = patch if len(patch) == 2 else (1 if len(shape) == 1 else patch[0], patch[0])
        if height % h or width % w:
            raise ShapeError(
                f"{type(self).__name__} expects patches that tile the event of shape "
                f"{describe(shape)}, got {h} x {w}."
            )
        # The grid of patches, and the numbers in each of them.
        self.grid, self.block = (height // h, width // w), (c, h, w)
        self.patches, self.channels = height // h * (width // w), c * h * w

    def output_shape(self, shape: EventShape | None) -> EventShape | None:
        return self.patches, self.channels

    def input_shape(self, shape: EventShape | None) -> EventShape | None:
        return self.event_shape

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (rows, columns), (c, h, w) = self.grid, self.block
        tiles = x.reshape(x.shape[0], c, rows, h, columns, w).permute(0, 2, 4, 1, 3, 5)
        return tiles.reshape(x.shape[0], self.patches, self.channels), zeros_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        tiles = z.unflatten(2, self.block).unflatten(1, self.grid).permute(0, 3, 1, 4, 2, 5)
        return tiles.reshape(z.shape[0], *self.event_shape), zeros_log_det(z)

    def extra_repr(self) -> str:
        return f"{self.patches} patches x {self.channels} channels"


class Bands(Patches):
    """``(c, H, W) -> (P, C)``: stripes of so many rows across the whole image; log|det| 0.

    `Patches` as wide as the image: P = H / rows, C = c rows W.

    Args:
        shape: channels, height and width of the image.
        rows: height of a band; it divides the image's.
    """

    @checked
    def __init__(self, shape: ImageShape, rows: Size) -> None:
        if shape[1] % rows:
            raise ShapeError(f"Bands expects rows to divide the height {shape[1]}, got {rows}.")
        super().__init__(shape, (rows, shape[2]))


class Shift(Bijection):
    """Moves the last dims of the event around a ring: patches are cut elsewhere; log|det| 0.

    ``z[..., (i + s_1) mod H, (j + s_2) mod W] = x[..., i, j]``: what leaves at one edge enters at
    the other. Between two mixing layers it lets numbers meet that a fixed grid keeps apart.

    Args:
        steps: s for each of the last dims: one for a vector, two for an image.
    """

    @checked
    def __init__(self, *steps: Whole) -> None:
        super().__init__()
        if not steps:
            raise ArgumentError(
                "Shift expects steps, how far to move each of the last dims, got nothing."
            )
        self.steps = steps
        self.dims = tuple(range(-len(steps), 0))
        self.event_shape = (..., *[None] * len(steps))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.roll(x, self.steps, self.dims), zeros_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.roll(z, tuple(-s for s in self.steps), self.dims), zeros_log_det(z)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.steps))


class AlongChannels(Bijection):
    """One bijection of vectors, the same for every patch: it mixes the channels of X ``(P, C)``.

        Z_p. = f(X_p.),    log|det| = sum_p log|det f'(X_p.)|

    Any f on vectors of size C: a coupling, a MAF, a linear or a normalization layer, or a `Compose`
    of them. A context ``(batch, K)`` reaches f at every patch. Cost: that of f on ``batch * P``
    rows; its parameters do not depend on P.

    Args:
        bijection: f, on events of shape ``(C,)``.
    """

    transposed = False

    def __init__(self, bijection: Layer) -> None:
        super().__init__()
        self.bijection = require_bijection(type(self).__name__, bijection)
        try:
            size = meet(bijection.event_shape, (None,))
            meet(bijection.latent_shape, size)
        except NoCommonShape:
            raise ShapeError(
                f"{type(self).__name__} expects a bijection from vectors to vectors of one size, "
                f"got one of events {describe(bijection.event_shape)}."
            ) from None
        assert size is not None  # for one of the two was given
        self.event_shape = (*size, None) if self.transposed else (None, *size)
        self.context_shape = bijection.context_shape
        self.exact_inverse = bijection.exact_inverse

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.gather(x, *self.bijection(*self.rows(x, context)))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.gather(z, *self.bijection.inverse(*self.rows(z, context)))

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        self.bijection.initialize(*self.rows(x, context))

    @torch.no_grad()
    def initialize_inverse(self, z: Tensor, context: Tensor | None = None) -> None:
        self.check_input(z, context, inverse=True)
        self.bijection.initialize_inverse(*self.rows(z, context))

    def rows(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Every row (or column) of the matrices as an event of its own, with its context."""
        rows = x.transpose(1, 2) if self.transposed else x
        if context is not None and self.context_shape is not None:
            context = context.repeat_interleave(rows.shape[1], 0)
        return rows.reshape(-1, rows.shape[2]), context

    def gather(self, x: Tensor, rows: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices of these rows (or columns), shaped as x, and one log-det for each."""
        log_det = log_det.unflatten(0, (x.shape[0], self._count(x))).sum(1)
        return self.matrix(x, rows), log_det

    def matrix(self, x: Tensor, rows: Tensor) -> Tensor:
        z = rows.unflatten(0, (x.shape[0], self._count(x)))
        return z.transpose(1, 2).contiguous() if self.transposed else z

    def _count(self, x: Tensor) -> int:
        """How many rows (or columns) of a matrix share the bijection."""
        return x.shape[2] if self.transposed else x.shape[1]


class AlongPatches(AlongChannels):
    """One bijection of vectors, the same for every channel: it mixes the patches of X ``(P, C)``.

        Z_.c = g(X_.c),    log|det| = sum_c log|det g'(X_.c)|

    `AlongChannels` of the transposed matrix: cost is that of g on ``batch * C`` rows, parameters do
    not depend on C.

    Args:
        bijection: g, on events of shape ``(P,)``.
    """

    transposed = True
