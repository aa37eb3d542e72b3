"""What autoregressive models of images share: exact likelihoods, sampling, completion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nflib.core import Shape, ShapeError, describe, expand_context, fits, sum_event
from nflib.data import check
from nflib.discrete import Head, Softmax
from nflib.pixel.window import Cursor, Stepwise, WindowConv

Features = list[Tensor | None]


class PixelModel(nn.Module):
    """``log P(x) = sum_i log P(x_i | x_1 .. x_{i-1})`` over the pixels of an image, row by row.

    A subclass is a network whose output at a pixel sees only the pixels before it. It writes

        condition(context)            what the layers need of a context, computed once
        above(x, condition)           features of the rows above each pixel (a vertical stack)
        pixels(x, above, condition)   the head's parameters, ``(batch, count, H, W)``

    for x on [-1, 1], and sets ``entrances``, its layers that read x. While the model samples, the
    same code is run for one row (``above``) or one pixel (``pixels``) at a time, see
    `nflib.pixel.window`.

    Args:
        shape: channels, height and width.
        head: the distribution of a pixel: `nflib.discrete.Softmax`, which predicts the channels
            one after the other, or `nflib.discrete.LogisticMixture`, a whole pixel at once.
        context_dim: size of a context vector, e.g. of the one-hot class.
        order: of the channels within a pixel, by default 0, 1, 2.
    """

    likelihood = "exact"
    order: Tensor

    def __init__(
        self,
        shape: Shape,
        head: Head,
        context_dim: int | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if len(shape) != 3 or min(shape) < 1:
            raise ShapeError(f"{name} expects a shape (channels, height, width), got {shape}.")
        channels = shape[0]
        if head.channels != channels:
            raise ShapeError(f"{name} expects a head of {channels} channels, got {head}.")
        ranks = list(range(channels)) if order is None else list(order)
        if sorted(ranks) != list(range(channels)):
            raise ShapeError(
                f"{name} expects an order that names each channel 0..{channels - 1} once, "
                f"got {order}."
            )
        self.shape, self.head = tuple(shape), head
        # The steps within a pixel; the features are divided into as many groups.
        self.groups = channels if isinstance(head, Softmax) else 1
        self.context_shape = None if context_dim is None else (context_dim,)
        self.entrances: list[WindowConv] = []
        self.register_buffer("order", torch.tensor(ranks), persistent=False)

    def condition(self, context: Tensor | None) -> Any:
        """What the layers need of a context."""
        return context

    def above(self, x: Tensor, condition: Any) -> Features:
        """Features of the rows above each pixel."""
        return []

    def pixels(self, x: Tensor, above: Features, condition: Any) -> Tensor:
        """The head's parameters at each pixel."""
        raise TypeError(f"{type(self).__name__} does not define pixels(x, above, condition).")

    def parameters_of(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The head's parameters for every pixel of images x, ``(batch, count, H, W)``."""
        x = self.scaled(self._ordered(x))
        condition = self.condition(context)
        return self.pixels(x, self.above(x, condition), condition)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.log_prob(x, context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``log P(x)`` in nats, ``(batch,)``, exact; x holds integers. One pass of the network."""
        self.check_input(x, context)
        return sum_event(self.head.log_prob(self._ordered(x), self.parameters_of(x, context)))

    @torch.inference_mode()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        *,
        given: Tensor | None = None,
        known: Tensor | None = None,
        cached: bool = True,
        u: Tensor | None = None,
    ) -> Tensor:
        """Draw n images pixel by pixel, or complete given ones.

        Args:
            n: how many.
            context: n rows, or one row that serves all.
            given: images of which some pixels are kept, ``(n, C, H, W)`` or ``(1, C, H, W)``.
            known: which pixels are kept, a boolean ``(H, W)``. A new pixel is drawn given all
                pixels before it; known pixels after it have no influence on it.
            cached: compute every activation once. Without, each step runs the whole network.
            u: the uniform random numbers behind the draws, ``(n, head.uniforms, H, W)``.

        Returns: integer-valued images ``(n, C, H, W)``. Cost: H W steps, which together are about
        one pass of the network with the cache and H W passes without.
        """
        context = expand_context(context, n)
        height, width = self.shape[1:]
        like = next(self.parameters())
        if u is None:
            u = torch.rand(
                n, self.head.uniforms, height, width, device=like.device, dtype=like.dtype
            )
        x = like.new_zeros(n, *self.shape)
        self.check_input(x, context)
        kept = self._kept(given, known)
        if given is not None:
            x = torch.where(kept.to(x.device), self._ordered(given.to(x)), x)
        was_training = self.training
        self.eval()
        walk = self._walk_cached if cached else self._walk
        try:
            for row, col, step, parameters in walk(x, context):
                if kept[row, col]:
                    continue
                drawn = self.head.sample(parameters, u[:, :, row, col, None, None])[..., 0, 0]
                part = slice(step, step + 1) if self.groups > 1 else slice(None)
                x[:, part, row, col] = drawn[:, part]
        finally:
            self.train(was_training)
        return x.index_select(1, self.order.argsort())

    def _walk(self, x: Tensor, context: Tensor | None) -> Iterator[tuple[int, int, int, Tensor]]:
        """Every step of every pixel, with the parameters that the whole network gives there."""
        condition = self.condition(context)
        for row in range(self.shape[1]):
            for col in range(self.shape[2]):
                for step in range(self.groups):
                    scaled = self.scaled(x)
                    parameters = self.pixels(scaled, self.above(scaled, condition), condition)
                    yield row, col, step, parameters[:, :, row : row + 1, col : col + 1]

    def _walk_cached(
        self, x: Tensor, context: Tensor | None
    ) -> Iterator[tuple[int, int, int, Tensor]]:
        """The same, with each activation computed once."""
        condition = self.condition(context)
        width = self.shape[2]
        with self._stepping(len(x)) as cursor:
            for row in range(self.shape[1]):
                cursor.row, cursor.col = row, None
                line = self.above(self.scaled(x[:, :, row : row + 1]), condition)
                for col in range(width):
                    cursor.col = col
                    over = [a if a is None else _pixel(a, col * a.shape[3] // width) for a in line]
                    pixel = x[:, :, row : row + 1, col : col + 1]  # a view: draws appear in it
                    for step in range(self.groups):
                        yield row, col, step, self.pixels(self.scaled(pixel), over, condition)
                    for entrance in self.entrances:
                        entrance.write(self.scaled(pixel))

    @contextmanager
    def _stepping(self, rows: int) -> Iterator[Cursor]:
        cursor = Cursor()
        layers = [layer for layer in self.modules() if isinstance(layer, Stepwise)]
        try:
            for layer in layers:
                layer.open(cursor, rows, *self.shape[1:])
            yield cursor
        finally:
            for layer in layers:
                layer.close()

    def scaled(self, x: Tensor) -> Tensor:
        """Levels 0 .. k-1 on [-1, 1]."""
        return 2 * x / (self.head.levels - 1) - 1

    def check_data(self, x: Tensor) -> None:
        """Refuse data that are not whole numbers in 0 .. k-1."""
        check(x, f"The data of {type(self).__name__}", self.head.levels)

    def check_input(self, x: Tensor, context: Tensor | None = None) -> None:
        """Raise `ShapeError` in one sentence if x or context do not fit; reads shapes only."""
        name = type(self).__name__
        if not fits(x.shape[1:], self.shape):
            raise ShapeError(
                f"{name} expects shape {describe(('batch', *self.shape))}, got {tuple(x.shape)}."
            )
        if self.context_shape is None:
            return
        wanted = (len(x), *self.context_shape)
        if context is None or tuple(context.shape) != wanted:
            got = "none" if context is None else tuple(context.shape)
            raise ShapeError(f"{name} expects a context of shape {wanted}, got {got}.")

    def _ordered(self, x: Tensor) -> Tensor:
        """Channels in the order in which they are predicted, in the model's dtype."""
        return x.to(next(self.parameters()).dtype).index_select(1, self.order)

    def _kept(self, given: Tensor | None, known: Tensor | None) -> Tensor:
        height, width = self.shape[1:]
        if given is None and known is None:
            return torch.zeros(height, width, dtype=torch.bool)
        if given is None or known is None or known.shape != (height, width):
            raise ShapeError(
                f"{type(self).__name__}.sample expects images `given` together with a boolean "
                f"`known` of shape {(height, width)}, got "
                f"{'no images' if given is None else 'images'} and "
                f"{'none' if known is None else tuple(known.shape)}."
            )
        return known.bool().cpu()


def _pixel(row: Tensor, col: int) -> Tensor:
    return row[..., col : col + 1]
