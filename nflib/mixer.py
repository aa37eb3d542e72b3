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

from nflib.core import Bijection, EventShape, Shape, ShapeError, describe, fits, zeros_log_det
from nflib.reversible import Replay


class Patches(Bijection):
    """``(c, H, W) -> (P, C)``: one row for each h x w patch, its C = c h w numbers; log|det| 0.

    Patches lie in reading order, P = (H / h) (W / w) of them; the numbers of a patch are its
    channels, one after the other, each in reading order. A vector ``(D,)`` is cut into P = D / w
    pieces of C = w numbers. A reordering: nothing is computed, nothing lost.

    Args:
        shape: channels, height and width of the image, or the size of the vector.
        patch: height and width of a patch, or one number for both; each divides the image's.
    """

    def __init__(self, shape: int | Shape, patch: int | tuple[int, int]) -> None:
        super().__init__()
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if len(shape) not in (1, 3) or min(shape) < 1:
            raise ShapeError(
                f"{type(self).__name__} expects the shape (channels, height, width) of an image "
                f"or the size of a vector, got {describe(shape)}."
            )
        self.event_shape: Shape = shape
        c, height, width = (1, 1, *shape) if len(shape) == 1 else shape
        if isinstance(patch, int):
            patch = (1, patch) if len(shape) == 1 else (patch, patch)
        h, w = patch
        if h < 1 or w < 1 or height % h or width % w:
            raise ShapeError(
                f"{type(self).__name__} expects patches that tile the event of shape "
                f"{describe(shape)}, got {h} x {w}."
            )
        # The grid of patches, and the numbers in each of them.
        self.grid, self.block = (height // h, width // w), (c, h, w)
        self.patches, self.channels = height // h * (width // w), c * h * w

    def output_shape(self, shape: Shape) -> Shape:
        return self.patches, self.channels

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_input(x, context)
        (rows, columns), (c, h, w) = self.grid, self.block
        tiles = x.reshape(len(x), c, rows, h, columns, w).permute(0, 2, 4, 1, 3, 5)
        return tiles.reshape(len(x), self.patches, self.channels), zeros_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_matrix(self, z, (self.patches, self.channels))
        tiles = z.unflatten(2, self.block).unflatten(1, self.grid).permute(0, 3, 1, 4, 2, 5)
        return tiles.reshape(len(z), *self.event_shape), zeros_log_det(z)

    def extra_repr(self) -> str:
        return f"{self.patches} patches x {self.channels} channels"


class Bands(Patches):
    """``(c, H, W) -> (P, C)``: stripes of so many rows across the whole image; log|det| 0.

    `Patches` as wide as the image: P = H / rows, C = c rows W.

    Args:
        shape: channels, height and width of the image.
        rows: height of a band; it divides the image's.
    """

    def __init__(self, shape: Shape, rows: int) -> None:
        if isinstance(shape, int) or len(shape) != 3 or not isinstance(rows, int):
            raise ShapeError(
                "Bands expects the shape (channels, height, width) of an image and a number of "
                f"rows, got {shape!r} and {rows!r}."
            )
        super().__init__(shape, (rows, shape[2]))


class Shift(Bijection):
    """Moves the last dims of the event around a ring: patches are cut elsewhere; log|det| 0.

    ``z[..., (i + s_1) mod H, (j + s_2) mod W] = x[..., i, j]``: what leaves at one edge enters at
    the other. Between two mixing layers it lets numbers meet that a fixed grid keeps apart.

    Args:
        steps: s for each of the last dims: one for a vector, two for an image.
    """

    def __init__(self, *steps: int) -> None:
        super().__init__()
        if not steps:
            raise ShapeError("Shift expects how far to move each of the last dims, got nothing.")
        self.steps = steps
        self.dims = tuple(range(-len(steps), 0))

    def check_input(self, x: Tensor, context: Tensor | None = None) -> None:
        super().check_input(x, context)
        if x.ndim <= len(self.steps):
            raise ShapeError(
                f"Shift expects an event of at least {len(self.steps)} dims, got {tuple(x.shape)}."
            )

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_input(x, context)
        return torch.roll(x, self.steps, self.dims), zeros_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_input(z, context)
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

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection = bijection
        size: EventShape = bijection.event_shape or (None,)
        if len(size) != 1:
            raise ShapeError(
                f"{type(self).__name__} expects a bijection of vectors, "
                f"got one of events {describe(size)}."
            )
        self.event_shape = (*size, None) if self.transposed else (None, *size)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_input(x, context)
        return self._gather(x, *self.bijection(*self._rows(x, context)))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_input(z, context)
        return self._gather(z, *self.bijection.inverse(*self._rows(z, context)))

    def parts(self) -> list[Bijection]:
        # Kept, and not as modules of this one: their parameters are those of the bijection.
        if "_parts" not in self.__dict__:
            inner = self.bijection.parts()
            self.__dict__["_parts"] = [type(self)(p) for p in inner] if len(inner) > 1 else None
        return self.__dict__["_parts"] or [self]

    def replay(self, y: Tensor, context: Tensor | None, inverse: bool) -> Replay:
        again = self.bijection.replay(*self._rows(y, context), inverse)
        x = self._matrix(y, again.x)
        outputs = self._gather(y, *again.outputs)

        def join(*gradients: Tensor) -> Tensor:
            return self._matrix(y, again.join(*gradients))

        return Replay(x, outputs, again.leaves, join)

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        self.check_input(x, context)
        self.bijection.initialize(*self._rows(x, context))

    def check_input(self, x: Tensor, context: Tensor | None = None) -> None:
        super().check_input(x, context)
        check_matrix(self, x, (None, None))

    def _rows(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Every row (or column) of the matrices as an event of its own, with its context."""
        rows = x.transpose(1, 2) if self.transposed else x
        if context is not None:
            context = context.repeat_interleave(rows.shape[1], 0)
        return rows.reshape(-1, rows.shape[2]), context

    def _gather(self, x: Tensor, rows: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices of these rows (or columns), shaped as x, and one log-det for each."""
        return self._matrix(x, rows), log_det.unflatten(0, (len(x), self._count(x))).sum(1)

    def _matrix(self, x: Tensor, rows: Tensor) -> Tensor:
        z = rows.unflatten(0, (len(x), self._count(x)))
        return z.transpose(1, 2) if self.transposed else z

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


def check_matrix(layer: Bijection, x: Tensor, shape: EventShape) -> None:
    """Raise `ShapeError` unless x is a batch of matrices of this shape, ``None`` for any size."""
    if not fits(x.shape[1:], shape):
        patches, channels = shape
        expected = ("batch", patches or "patches", channels or "channels")
        raise ShapeError(
            f"{type(layer).__name__} expects matrices of shape {describe(expected)}, "
            f"got {tuple(x.shape)}."
        )
