"""Densities: a flow is a bijection and a base; every model is asked in the same words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from nflib.arguments import ArgumentError, show
from nflib.core.bases import BaseDensity
from nflib.core.compose import common_context, weakest
from nflib.core.distributions import TorchBase
from nflib.core.layer import Layer
from nflib.core.shapes import (
    EventShape,
    NoCommonShape,
    ShapeError,
    describe,
    fits,
    meet,
)

# How many draws: so many, or a shape of draws for each context.
Draws = int | tuple[int, ...]


class Model(nn.Module):
    """Base of everything with ``log_prob`` and ``sample``; calling a model is ``log_prob``.

    So ``torch.compile`` and data-parallel wrappers wrap the training step.

    Attributes:
        event_shape: sizes of the event dims, as of a `Layer`.
        context_shape: shape of one context, or None if no part of the model uses one.
        likelihood: ``"exact"``, ``"lower bound"`` or ``"estimate"``: what ``log_prob`` is.
    """

    event_shape: EventShape | None = None
    context_shape: EventShape | None = None
    likelihood: str = "exact"

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.log_prob(x, context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-probability (or density) of each row in nats, ``(batch,)``."""
        raise NotImplementedError(f"{type(self).__name__} does not define log_prob(x, context).")

    def rows_of_context(self, context: Tensor | None, rows: int) -> Tensor | None:
        """A context with so many rows: as it is, or one (with or without batch) repeated.

        Raises: ShapeError for another shape or dtype, for none where the model needs one, and for
        one where no part of the model uses it.
        """
        name, shape = type(self).__name__, self.context_shape
        if shape is None:
            if context is not None:
                raise ShapeError(
                    f"{name} expects no context, for no part of it was built with a context_dim, "
                    f"got {show(context)}."
                )
            return None
        if not isinstance(context, Tensor):
            raise ShapeError(
                f"{name} expects a context of shape {describe(('batch', *shape))}, "
                f"got {'none' if context is None else show(context)}."
            )
        if context.ndim == len(shape) and fits(context.shape, shape):
            context = context.unsqueeze(0)
        if not fits(context.shape[1:], shape) or context.shape[0] not in (1, rows):
            raise ShapeError(
                f"{name} expects a context of shape {describe((rows, *shape))}, or one row for "
                f"all, got {tuple(context.shape)}."
            )
        self._check_dtype(context)
        return context if context.shape[0] == rows else context.expand(rows, *context.shape[1:])

    def _check_dtype(self, context: Tensor) -> None:
        like = next(self.parameters(), None)
        if like is not None and context.dtype != like.dtype:
            raise ShapeError(
                f"{type(self).__name__} expects a context of its parameters' dtype {like.dtype}, "
                f"got {context.dtype}; convert it with .to(dtype)."
            )

    def _context(self, context: Tensor | None, rows: int) -> Tensor | None:
        """`rows_of_context`, which a model may loosen."""
        return self.rows_of_context(context, rows)

    def _plan(
        self, method: str, n: Draws, context: Tensor | None
    ) -> tuple[torch.Size, Tensor | None]:
        """The shape of the draws, and one context for each of them, in that order."""
        name = f"{type(self).__name__}.{method}"
        is_shape = isinstance(n, tuple | list)
        wanted: tuple[Any, ...] = tuple(n) if isinstance(n, tuple | list) else (n,)
        if any(isinstance(k, bool) or not hasattr(k, "__index__") or k < 0 for k in wanted):
            raise ArgumentError(
                f"{name} expects a number of draws of at least 0, or a shape of them, got {n!r}."
            )
        shape = torch.Size(int(k) for k in wanted)
        own = len(self.context_shape or ())
        several = isinstance(context, Tensor) and context.ndim > own and context.shape[0] > 1
        if not is_shape and several and self.context_shape and len(context) != shape.numel():  # type: ignore[arg-type]
            raise ShapeError(
                f"{name}({n}, context) expects {n} rows of context, or one row for all, got "
                f"{len(context)}; {method}(({n},), context) makes {n} draws for each row."  # type: ignore[arg-type]
            )
        if not is_shape or not isinstance(context, Tensor) or context.ndim == own:
            return shape, self._context(context, shape.numel())
        rows = self._context(context, context.shape[0])
        assert rows is not None  # there was a context
        every = rows.expand(*shape, *rows.shape).flatten(0, len(shape))
        return shape + rows.shape[:1], every


class Flow(Model):
    """A bijection and a base density: a density one can evaluate exactly and sample from.

        log p(x) = log p_Z(f(x)) + log|det df/dx|          (nats)

    Args:
        bijection: maps data to noise; stochastic layers among it make ``log_prob`` a bound.
        base: any object with ``log_prob(z, context)`` and ``sample(n, context)``, or a
            ``torch.distributions.Distribution`` whose batch shape is empty.

    Raises:
        ArgumentError: for another kind of part.
        ShapeError: if the base has events of another shape than the bijection's noise.
    """

    def __init__(self, bijection: Layer, base: BaseDensity | Distribution) -> None:
        super().__init__()
        if not isinstance(bijection, Layer):
            raise ArgumentError(f"Flow expects a bijection first, got {show(bijection)}.")
        if isinstance(base, Distribution):
            base = TorchBase(base)
        if not callable(getattr(base, "log_prob", None)) or isinstance(base, type):
            raise ArgumentError(
                f"Flow expects a base with log_prob and sample second, got {show(base)}."
            )
        self.bijection = bijection
        self.base: Any = base
        try:
            meet(bijection.latent_shape, getattr(base, "event_shape", None))
        except NoCommonShape:
            raise ShapeError(
                "Flow expects a base over the noise that its bijection returns, "
                f"{describe(bijection.latent_shape)}, got {self._base_name()} over "
                f"{describe(base.event_shape)}."  # type: ignore[attr-defined]
            ) from None
        # Where sizes are open in the bijection, the base may know them.
        known = bijection.shape_before(getattr(base, "event_shape", None))
        self.event_shape = meet(bijection.event_shape, known)
        self.context_shape = common_context("Flow", [bijection, base])

    @property
    def likelihood(self) -> str:  # type: ignore[override]
        """The weakest of the layers' words: an estimate spoils a bound, a bound an exact value."""
        base = [self.base] if isinstance(self.base, nn.Module) else []
        return weakest(self.bijection, *base)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set the layers' data-dependent parameters from a first batch of data."""
        context = self._context(context, x.shape[0])
        self.bijection.initialize(x, context)
        initialize = getattr(self.base, "initialize", None)
        if initialize is not None:
            with torch.no_grad():
                initialize(self.bijection(x, context)[0], context)

    def check_data(self, x: Tensor) -> None:
        """Raise a `ValueError` if a data set holds values that the first layer cannot take."""
        self.bijection.check_data(x)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density of each row in nats, ``(batch,)``: one ``forward`` and the base's cost.

        Context has as many rows, or is one that serves all. Draws of ``sample((k,), context)`` for
        m contexts, ``(k, m, *event)``, are taken as well, and give ``(k, m)``.
        """
        extra = self._extra_dims(x)
        if extra:
            return self._log_prob_of_draws(x, context, extra)
        context = self._context(context, x.shape[0])
        self.bijection.check_input(x, context, name=type(self).__name__)
        z, log_det = self.bijection(x, context)
        return self.base.log_prob(z, context) + log_det

    def sample(
        self,
        n: Draws,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw events without a graph: one ``inverse``.

        Args:
            n: how many, ``(n, *event)``; the context has n rows, or is one that serves all. Or a
                shape, ``(k,)`` say, of draws for each of m contexts, ``(k, m, *event)``.
            context: of shape ``(m, *context_shape)`` or one alone.
            temperature: of the base; below 1 draws are nearer to its centre.
            generator: of the random numbers, instead of torch's own.
        """
        with torch.no_grad():
            return self._draw("sample", n, context, temperature, generator)[0]

    def rsample(self, n: Draws, context: Tensor | None = None, **options: Any) -> Tensor:
        """`sample`, reparameterised: gradients reach the bijection, the base and the context."""
        return self.rsample_with_log_prob(n, context, **options)[0]

    def rsample_with_log_prob(
        self,
        n: Draws,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw events and their log-densities from the same pass, differentiable in both.

        Log-densities are those of the flow, at temperature 1. Raises ArgumentError for a flow with
        stochastic layers, whose samples have no such density.
        """
        if not self.bijection.bijective:
            raise ArgumentError(
                f"{type(self).__name__}.rsample expects a flow of bijections, got one with a "
                "stochastic layer, whose samples have no gradient; use sample."
            )
        return self._draw("rsample", n, context, temperature, generator)

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The noise z that stands for x."""
        return self._through(x, context, inverse=False)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The data x that z stands for."""
        return self._through(z, context, inverse=True)

    def _through(self, x: Tensor, context: Tensor | None, inverse: bool) -> Tensor:
        name = f"{type(self).__name__}.{'decode' if inverse else 'encode'}"
        if not isinstance(x, Tensor) or x.ndim == 0:
            raise ShapeError(f"{name} expects a batch of events as a tensor, got {show(x)}.")
        context = self._context(context, x.shape[0])
        self.bijection.check_input(x, context, inverse, name)
        return (self.bijection.inverse if inverse else self.bijection)(x, context)[0]

    def _draw(
        self,
        method: str,
        n: Draws,
        context: Tensor | None,
        temperature: float,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        shape, context = self._plan(method, n, context)
        count = shape.numel()
        options: dict[str, Any] = {} if temperature == 1 else {"temperature": temperature}
        options |= {} if generator is None else {"generator": generator}
        draw = getattr(self.base, method, None)
        if draw is None:
            raise ArgumentError(
                f"{type(self).__name__}.{method} expects a base with {method}, "
                f"got {self._base_name()}."
            )
        try:
            z = draw(count, context, **options) if options else draw(count, context)
        except TypeError as error:
            if not options:
                raise
            raise ArgumentError(
                f"{type(self).__name__}.{method} expects a base that takes "
                f"{' and '.join(options)}, got {self._base_name()}."
            ) from error
        x, log_det = self.bijection.inverse(z, context)
        log_prob = log_det if method == "sample" else self.base.log_prob(z, context) - log_det
        return x.reshape(*shape, *x.shape[1:]), log_prob.reshape(shape)

    def _context(self, context: Tensor | None, rows: int) -> Tensor | None:
        if context is not None and self.context_shape is None and self._hides_context():
            return context
        return self.rows_of_context(context, rows)

    def _base_name(self) -> str:
        """What the user gave as the base."""
        is_torch = isinstance(self.base, TorchBase)
        return self.base.parts.kind.__name__ if is_torch else type(self.base).__name__

    def _hides_context(self) -> bool:
        """Whether a base that is none of nflib's may use a context without saying so."""
        return not hasattr(self.base, "context_shape")

    def _extra_dims(self, x: Tensor) -> int:
        """How many dims x has in front of its batch; checks that it is an input at all."""
        shape = self.event_shape
        if not isinstance(x, Tensor):
            raise ShapeError(
                f"{type(self).__name__} expects a tensor, got {show(x)}; torch.as_tensor makes one."
            )
        if shape is None or ... in shape:
            return 0
        extra = x.ndim - 1 - len(shape)
        if extra < 0 or not fits(x.shape[1 + max(extra, 0) :], shape):
            raise ShapeError(
                f"{type(self).__name__} expects shape {describe(('batch', *shape))}, "
                f"got {tuple(x.shape)}."
            )
        return extra

    def _log_prob_of_draws(self, x: Tensor, context: Tensor | None, extra: int) -> Tensor:
        shape = x.shape[: extra + 1]
        if isinstance(context, Tensor) and context.ndim > len(self.context_shape or ()):
            rows = self._context(context, shape[-1])
            assert rows is not None  # there was a context
            context = rows.expand(*shape[:-1], *rows.shape).flatten(0, extra)
        return self.log_prob(x.flatten(0, extra), context).reshape(shape)
