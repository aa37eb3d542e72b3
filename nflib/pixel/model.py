"""What autoregressive models of images share: exact likelihoods, sampling, completion."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nflib.arguments import (
    ArgumentError,
    ContextShape,
    ImageShape,
    Positive,
    checked,
    integer,
    show,
)
from nflib.core import Model, ShapeError, check_levels, check_values, sum_event
from nflib.core.flow import Draws
from nflib.discrete import Head, Softmax, check_integers, rows_for
from nflib.graphs import Replayed
from nflib.nets import vector_context
from nflib.pixel.cursor import Cursor, Features, Line, cursor_for
from nflib.pixel.window import Stepwise, WindowConv


@dataclass
class Drawing:
    """Images that are being drawn, channels in the order in which they are predicted.

    Attributes:
        head: the distribution of a pixel.
        x: the images, ``(batch, C, H, W)``: what is known of them, and zeros.
        u: the uniform random numbers, ``(batch, uniforms, H, W)``.
        known: which pixels stay as they are, ``(H, W)`` on the CPU, or None.
        temperature: of the head.
    """

    head: Head
    x: Tensor
    u: Tensor
    known: Tensor | None
    temperature: float

    def draw(self, cursor: Cursor, step: int, parameters: Tensor) -> Tensor:
        """Write the next channel of the cursor's pixel, or all of them; returns the pixel.

        Of the channels from this step on only the first is right where they are drawn one after
        the other; the next steps replace the others, which they do not look at.
        """

        def drawn() -> Tensor:
            cold = self.temperature != 1
            at = self.head.cooled(parameters, self.temperature) if cold else parameters
            new = self.head.sample(at, cursor.cut(self.u))
            if step:
                new = torch.cat([cursor.cut(self.x)[:, :step], new[:, step:]], 1)
            return new

        pixel = cursor.unless_known(self.x, drawn)
        cursor.put(self.x, pixel)
        return pixel


class PixelModel(Model):
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

    Raises:
        ArgumentError: for arguments that cannot be, or do not fit together.
    """

    order: Tensor

    @checked
    def __init__(
        self,
        shape: ImageShape,
        head: Head,
        context_dim: ContextShape = None,
        order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        name, channels = type(self).__name__, shape[0]
        if head.channels != channels:
            raise ArgumentError(f"{name} expects a head of {channels} channels, got {head}.")
        self.shape, self.head = shape, head
        self.event_shape = shape
        self.context_shape = vector_context(context_dim, name)
        # The steps within a pixel; the features are divided into as many groups.
        self.groups = channels if isinstance(head, Softmax) else 1
        self.entrances: list[WindowConv] = []
        ranks = torch.tensor(_ranks(name, channels, order))
        self.register_buffer("order", ranks, persistent=False)

    def condition(self, context: Tensor | None) -> Any:
        """What the layers need of a context."""
        return context

    def above(self, x: Tensor, condition: Any) -> Features:
        """Features of the rows above each pixel."""
        return []

    def pixels(self, x: Tensor, above: Features, condition: Any) -> Tensor:
        """The head's parameters at each pixel."""
        raise NotImplementedError(
            f"{type(self).__name__} does not define pixels(x, above, condition)."
        )

    def parameters_of(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The head's parameters for every pixel of images x, ``(batch, count, H, W)``."""
        self.check_input(x)
        return self._predict(self._ordered(x), self.rows_of_context(context, x.shape[0]))

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``log P(x)`` in nats, ``(batch,)``, exact; one pass of the network.

        Args:
            x: integers ``(batch, C, H, W)`` of any dtype.
            context: ``(batch, K)``, or one row that serves all.
        """
        self.check_input(x)
        context = self.rows_of_context(context, x.shape[0])
        ordered = self._ordered(x)
        return sum_event(self.head.log_prob(ordered, self._predict(ordered, context)))

    @torch.no_grad()
    @checked
    def sample(
        self,
        n: Draws,
        context: Tensor | None = None,
        *,
        given: Tensor | None = None,
        known: Tensor | None = None,
        cached: bool = True,
        u: Tensor | None = None,
        temperature: Positive = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw images pixel by pixel, or complete given ones, without a graph.

        Args:
            n: how many, ``(n, C, H, W)``; the context has n rows, or is one that serves all. Or a
                shape, ``(k,)`` say, of draws for each of m contexts, ``(k, m, C, H, W)``.
            context: of shape ``(m, K)`` or one alone.
            given: images of which some pixels are kept: one, or as many as are drawn; with a shape
                of draws ``(m, C, H, W)``.
            known: which pixels are kept, a boolean ``(H, W)``. A new pixel is drawn given all
                pixels before it; known pixels after it have no influence on it.
            cached: compute every activation once. Without, each step runs the whole network.
            u: the uniform random numbers behind the draws, ``(n, head.uniforms, H, W)``.
            temperature: of the head, pixel by pixel; below 1 draws are nearer to likely values.
            generator: of the random numbers, instead of torch's own.

        Returns: integer-valued images. Cost: H W steps, which together are about one pass of the
        network with the cache and H W passes without. On a GPU the cached steps are replayed, see
        `nflib.graphs`.
        """
        name = f"{type(self).__name__}.sample"
        shape, context = self._plan("sample", n, context)
        like = next(self.parameters())
        sizes = (self.head.uniforms, *self.shape[1:])
        if u is None:
            u = like.new_empty(shape.numel(), *sizes).uniform_(generator=generator)
        else:
            u = rows_for(name, "u", u, shape, sizes)
        kept = self._kept(given, known)
        x = like.new_zeros(shape.numel(), *self.shape)
        if given is not None and kept is not None:
            given = rows_for(name, "given", given, shape, self.shape)
            x.copy_(torch.where(kept.to(x.device), self._ordered(given.to(x)), x))
        drawing = Drawing(self.head, x, u, kept, temperature)
        with self._evaluating():
            (self._walk_cached if cached else self._walk)(drawing, context)
        return x.index_select(1, self.order.argsort()).reshape(*shape, *self.shape)

    def _walk(self, drawing: Drawing, context: Tensor | None) -> None:
        """Every step of every pixel, with the parameters that the whole network gives there."""
        for cursor, step in self._steps(drawing):
            parameters = self._predict(drawing.x, context)
            drawing.draw(cursor, step, cursor.cut(parameters))

    def _steps(self, drawing: Drawing) -> Iterator[tuple[Cursor, int]]:
        """A cursor at each pixel, and the steps within it."""
        cursor = Cursor(drawing.x, drawing.known)
        for row in range(self.shape[1]):
            for col in range(self.shape[2]):
                cursor.move(row, col)
                for step in range(self.groups):
                    yield cursor, step

    def _walk_cached(self, drawing: Drawing, context: Tensor | None) -> None:
        """The same, with each activation computed once. For each row:

            cursor at the row     above(row)                 the vertical stack, a row
            cursor at pixel 0     pixels(pixel, features)    a step for each group: draw
                                  entrance.write(pixel)      now it counts as seen
            cursor at pixel 1     pixels(pixel, features)    ...

        What the entrances read at a pixel before it is drawn has no influence: their windows or
        masks leave it out. It stands in their buffers until ``write`` replaces it.

        All pixels from which the network halves the image equally often ask for the same
        operations. On a GPU each kind of them is recorded once and replayed.
        """
        x, condition, line = drawing.x, self.condition(context), Line()
        unseen = x.new_zeros(*x.shape[:2], 1, 1)

        def pixel() -> None:
            cursor.arrive()
            features, seen = line.at(cursor), unseen
            for step in range(self.groups):
                parameters = self.pixels(seen, features, condition)
                seen = self.scaled(drawing.draw(cursor, step, parameters))
            for entrance in self.entrances:
                entrance.write(seen)
            cursor.leave()

        with self._stepping(drawing) as cursor:
            coarsest = 2 ** max((layer.scale for layer in self._layers()), default=0)
            kinds: dict[int, Replayed] = defaultdict(lambda: Replayed(pixel, x.device))
            for row in range(self.shape[1]):
                cursor.move(row)
                line.keep(cursor, self.above(self.scaled(cursor.cut(x)), condition))
                for col in range(self.shape[2]):
                    cursor.move(row, col)
                    kinds[math.gcd(row, col, coarsest)]()

    def _layers(self) -> list[Stepwise]:
        return [layer for layer in self.modules() if isinstance(layer, Stepwise)]

    @contextmanager
    def _stepping(self, drawing: Drawing) -> Iterator[Cursor]:
        cursor = cursor_for(drawing.x, drawing.known)
        try:
            for layer in self._layers():
                layer.open(cursor, len(drawing.x))
            yield cursor
        finally:
            for layer in self._layers():
                layer.close()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """In evaluation mode; afterwards every layer is in the mode it was in."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def scaled(self, x: Tensor) -> Tensor:
        """Levels 0 .. k-1 on [-1, 1]."""
        return 2 * x / (self.head.levels - 1) - 1

    def check_data(self, x: Tensor) -> None:
        """Refuse data that are not whole numbers in 0 .. k-1."""
        check_values(x, f"The data of {type(self).__name__}", self.head.levels)

    def check_input(self, x: Tensor) -> None:
        """Raise `ShapeError` in one sentence if x does not fit; reads no values."""
        check_integers(type(self).__name__, x, self.shape, next(self.parameters()))

    def _predict(self, ordered: Tensor, context: Tensor | None) -> Tensor:
        x, condition = self.scaled(ordered), self.condition(context)
        return self.pixels(x, self.above(x, condition), condition)

    def _ordered(self, x: Tensor) -> Tensor:
        """Channels in the order in which they are predicted, in the model's dtype."""
        return x.to(next(self.parameters()).dtype).index_select(1, self.order)

    def _kept(self, given: Tensor | None, known: Tensor | None) -> Tensor | None:
        sides = self.shape[1:]
        if given is None and known is None:
            return None
        if given is None or known is None or known.shape != sides:
            raise ShapeError(
                f"{type(self).__name__}.sample expects images `given` together with a boolean "
                f"`known` of shape {sides}, got "
                f"{'no images' if given is None else 'images'} and "
                f"{'none' if known is None else tuple(known.shape)}."
            )
        known = known.bool()
        there = given[..., known.to(given.device)]
        check_levels(there, f"What {type(self).__name__}.sample is given", self.head.levels)
        return known.cpu()


def _ranks(name: str, channels: int, order: Sequence[int] | None) -> list[int]:
    """The order of the channels as a list."""
    try:
        ranks = list(range(channels) if order is None else map(integer, order))
    except TypeError:
        ranks = []
    if sorted(ranks) != list(range(channels)):
        raise ArgumentError(
            f"{name} expects order to name each channel 0..{channels - 1} once, got {show(order)}."
        )
    return ranks
