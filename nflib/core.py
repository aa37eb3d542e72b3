"""The algebra: a bijection, how bijections combine, and the density they give.

Change of variables: for an invertible, differentiable ``z = f(x)`` and a base density ``p_Z``,

    log p_X(x) = log p_Z(f(x)) + log|det df/dx|.

``forward`` goes from data x to noise z, ``inverse`` from z back to x. Each returns its output and
``log_det``, the log|det| of the map *just applied*, of shape ``(batch,)``. Hence the two log-dets
of one pair (x, z) add to zero, and those of a composition add up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nflib import reversible

Shape = tuple[int, ...]
EventShape = tuple[int | None, ...]


class ShapeError(ValueError):
    """An input whose shape, dtype or context does not fit; the message says what was expected."""


class SingularMatrixError(ValueError):
    """A matrix that should be invertible is not."""


class Bijection(nn.Module):
    """An invertible, differentiable map with a tractable log|det|.

    A subclass sets ``event_shape`` and writes ``forward`` and ``inverse``, each of which starts
    with ``self.check_input(x, context)``. Batch is dim 0; the rest is the event.

    Attributes:
        event_shape: sizes of the event dims, ``None`` where any size will do; ``None`` as a whole
            if the layer takes events of any shape.
        context_shape: shape of one row of context, ``None`` where any size will do, or ``None`` as
            a whole if the layer uses no context (it is then accepted and ignored, so that context
            can be passed through any composition).
        likelihood: ``"exact"``, ``"lower bound"`` or ``"estimate"``: what a ``log_prob`` through
            this layer is.
        exact_inverse: whether each direction undoes the other up to rounding: by a formula, and in
            training as well. It is what ``Compose(..., memory="reversible")`` asks for.
    """

    event_shape: EventShape | None = None
    context_shape: EventShape | None = None
    likelihood: str = "exact"
    exact_inverse: bool = True

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to noise: ``x -> (z, log|det dz/dx|)``, shapes ``(batch, *event)``, ``(batch,)``."""
        raise TypeError(f"{type(self).__name__} does not define forward(x, context).")

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise to data: ``z -> (x, log|det dx/dz|)``, shapes ``(batch, *event)``, ``(batch,)``."""
        raise TypeError(f"{type(self).__name__} does not define inverse(z, context).")

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set data-dependent parameters from a first batch of data; most layers have none.

        `nflib.train.fit` calls it once, before the first step of a fresh run.
        """

    def check_data(self, x: Tensor) -> None:
        """Raise a `ValueError` if a data set holds values that this layer cannot take.

        Reads all values, so `nflib.train.fit` and `nflib.metrics.evaluate` call it once for each
        data set and never in a training step. Most layers take any number.
        """

    def output_shape(self, shape: Shape) -> Shape:
        """The shape of ``forward``'s output for an event of this shape; most layers keep it."""
        return shape

    def parts(self) -> list[Bijection]:
        """The layers that this one applies one after the other; most layers are one."""
        return [self]

    def replay(self, y: Tensor, context: Tensor | None, inverse: bool) -> reversible.Replay:
        """Rebuild the input of which ``forward`` (or ``inverse``) made y, and the graph on it.

        For ``Compose(..., memory="reversible")``. A layer overrides it if both together cost less
        than a pass back and a pass there.
        """
        return reversible.replay(self, y, context, inverse)

    def check_input(self, x: Tensor, context: Tensor | None = None) -> None:
        """Raise `ShapeError` in one sentence if x or context cannot be this layer's input.

        Reads shapes and dtypes only, never values: nothing waits for the device.
        """
        name = self.__class__.__name__
        if self.event_shape is not None and not fits(x.shape[1:], self.event_shape):
            raise ShapeError(
                f"{name} expects shape {describe(('batch', *self.event_shape))}, "
                f"got {tuple(x.shape)}."
            )
        if x.ndim == 0:
            raise ShapeError(f"{name} expects a batch of events, got a single number.")
        if not x.is_floating_point():
            raise ShapeError(f"{name} expects floating-point numbers, got {x.dtype}.")
        for parameter in self._first_parameter():
            if parameter.dtype != x.dtype:
                raise ShapeError(
                    f"{name} expects its parameters' dtype {parameter.dtype}, got {x.dtype}; "
                    "convert the input with .to(dtype), or the model."
                )
        if self.context_shape is not None:
            if context is None:
                raise ShapeError(
                    f"{name} expects a context of shape "
                    f"{describe(('batch', *self.context_shape))}, got none."
                )
            if not fits(context.shape, (x.shape[0], *self.context_shape)):
                raise ShapeError(
                    f"{name} expects a context of shape "
                    f"{describe((x.shape[0], *self.context_shape))}, got {tuple(context.shape)}."
                )

    def _first_parameter(self) -> tuple[nn.Parameter, ...]:
        """The parameter that stands for all in `check_input`, looked up once; often it is none."""
        found: tuple[nn.Parameter, ...] | None = self.__dict__.get("_first")
        if found is None:
            found = tuple(itertools.islice(self.parameters(), 1))
            if not torch.compiler.is_compiling():
                self.__dict__["_first"] = found
        return found

    def _apply(self, *args: Any, **kwargs: Any) -> Bijection:
        self.__dict__.pop("_first", None)  # a move to another dtype or device may replace it
        return super()._apply(*args, **kwargs)


class Compose(Bijection):
    """Bijections one after another: ``f = f_K o ... o f_1``, ``log_det = sum_k log_det_k``.

    Each log-det is taken at the point where its layer is applied. ``inverse`` runs the layers in
    reverse order. Cost: the sum of the layers'. An empty composition is the identity.

    Args:
        bijections: f_1 to f_K.
        memory: ``"plain"``, or ``"reversible"`` to keep no activations for the backward pass but
            to rebuild them from the output, layer by layer, see `nflib.reversible`. Gradients are
            the same up to rounding, the memory does not grow with K. Dequantization, if the
            composition begins with it, runs as it always does.

    Raises:
        NotReversibleError: if the memory is to be reversible and a layer's inverse is not exact.
    """

    def __init__(self, *bijections: Bijection, memory: str = "plain") -> None:
        super().__init__()
        for position, layer in enumerate(bijections):
            if not isinstance(layer, Bijection):
                raise TypeError(
                    f"Compose expects bijections, got {type(layer).__name__} "
                    f"at position {position}."
                )
        self.bijections = nn.ModuleList(bijections)
        self.set_memory(memory)

    def set_memory(self, memory: str) -> None:
        """Keep activations for the backward pass (``"plain"``) or rebuild them, see `Compose`."""
        if memory not in ("plain", "reversible"):
            raise ValueError(f"Compose expects memory 'plain' or 'reversible', got {memory!r}.")
        if memory == "reversible":
            reversible.check_reversible(self._noise_and_rest()[1])
            reversible.let_compiler_trace()
        self.memory = memory

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self._rebuilds():
            return in_turn(self, x, context)
        noise, exact = self._noise_and_rest()
        x, log_det = in_turn(noise, x, context)
        z, term = reversible.run(exact, x, context)
        return z, log_det + term

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self._rebuilds():
            return in_turn(self, z, context, inverse=True)
        noise, exact = self._noise_and_rest()
        x, log_det = reversible.run(exact, z, context, inverse=True)
        x, term = in_turn(noise, x, context, inverse=True)
        return x, log_det + term

    def _rebuilds(self) -> bool:
        return self.memory == "reversible" and torch.is_grad_enabled()

    def parts(self) -> list[Bijection]:
        return [part for layer in self for part in layer.parts()]

    def _noise_and_rest(self) -> tuple[list[Bijection], list[Bijection]]:
        """Dequantization at the start, which draws noise, and all the other layers."""
        layers = self.parts()
        count = 0
        while count < len(layers) and layers[count].likelihood != "exact":
            count += 1
        return layers[:count], layers[count:]

    def check_data(self, x: Tensor) -> None:
        for first in list(self)[:1]:
            first.check_data(x)

    def output_shape(self, shape: Shape) -> Shape:
        for bijection in self:
            shape = bijection.output_shape(shape)
        return shape

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        for bijection in self:
            bijection.initialize(x, context)
            x, _ = bijection(x, context)

    def __iter__(self) -> Iterator[Bijection]:
        return iter(self.bijections)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.bijections)

    def __getitem__(self, index: int | slice) -> Bijection:
        """One layer, or for a slice the `Compose` of those layers, sharing their parameters."""
        layers = list(self)
        return Compose(*layers[index]) if isinstance(index, slice) else layers[index]


def in_turn(
    layers: Iterable[Bijection], x: Tensor, context: Tensor | None, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Apply layers one after the other, or their inverses in reverse order."""
    log_det = zeros_log_det(x)
    for layer in reversed(list(layers)) if inverse else layers:
        x, term = layer.inverse(x, context) if inverse else layer(x, context)
        log_det = log_det + term
    return x, log_det


class Inverse(Bijection):
    """A bijection read backwards: its ``forward`` is the other's ``inverse``."""

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection = bijection
        self.event_shape = bijection.event_shape
        self.context_shape = bijection.context_shape

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection(z, context)

    def replay(self, y: Tensor, context: Tensor | None, inverse: bool) -> reversible.Replay:
        return self.bijection.replay(y, context, not inverse)


class Base(nn.Module):
    """A base density over events of a given shape; it follows the model's device and dtype."""

    anchor: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        if not shape or any(not isinstance(size, int) or size < 1 for size in shape):
            raise ShapeError(
                f"{type(self).__name__} expects the event's sizes as positive integers, "
                f"got {shape}."
            )
        self.shape = shape
        self.register_buffer("anchor", torch.zeros(()), persistent=False)

    def check_input(self, z: Tensor) -> None:
        if tuple(z.shape[1:]) != self.shape:
            raise ShapeError(
                f"{type(self).__name__} expects shape {describe(('batch', *self.shape))}, "
                f"got {tuple(z.shape)}."
            )

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.shape))


class StandardNormal(Base):
    """``log p(z) = -1/2 (|z|^2 + D log 2 pi)`` in nats, z ``(batch, *shape)``; cost O(D)."""

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_input(z)
        return -0.5 * sum_event(z.square() + math.log(2 * math.pi))

    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        return torch.randn(n, *self.shape, device=self.anchor.device, dtype=self.anchor.dtype)


class StandardLogistic(Base):
    """Independent logistic coordinates: ``log p(z) = sum_i (-z_i - 2 softplus(-z_i))``; cost O(D).

    The base of NICE (Dinh et al. 2014, https://arxiv.org/abs/1410.8516).
    """

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_input(z)
        # |z| by symmetry: softplus then never sees a large positive argument.
        return -sum_event(z.abs() + 2 * nn.functional.softplus(-z.abs()))

    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        u = torch.rand(n, *self.shape, device=self.anchor.device, dtype=self.anchor.dtype)
        tiny = torch.finfo(u.dtype).tiny
        return u.clamp_min(tiny).log() - (-u).log1p()


class BaseDensity(Protocol):
    """What `Flow` asks of a base: a flow, a mixture or any other model serves as well."""

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor: ...

    def sample(self, n: int, context: Tensor | None = None) -> Tensor: ...


class _TorchBase(nn.Module):
    """A ``torch.distributions.Distribution`` over one event, seen as a base density."""

    def __init__(self, distribution: torch.distributions.Distribution) -> None:
        super().__init__()
        self.distribution = distribution

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.distribution.log_prob(z)

    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        return self.distribution.sample(torch.Size([n]))


class Flow(nn.Module):
    """A bijection and a base density: a density one can evaluate exactly and sample from.

        log p(x) = log p_Z(f(x)) + log|det df/dx|          (nats)

    Calling the flow is ``log_prob``, so that ``torch.compile`` and data-parallel wrappers wrap the
    training step. ``flow.likelihood`` says what ``log_prob`` is: ``"exact"``, ``"lower bound"``
    (after dequantization, say) or ``"estimate"``.

    Args:
        bijection: maps data to noise.
        base: any object with ``log_prob(z, context)`` and ``sample(n, context)``, or a
            ``torch.distributions.Distribution`` whose batch shape is empty.
    """

    def __init__(
        self, bijection: Bijection, base: BaseDensity | torch.distributions.Distribution
    ) -> None:
        super().__init__()
        if not isinstance(bijection, Bijection):
            raise TypeError(f"Flow expects a bijection first, got {type(bijection).__name__}.")
        self.bijection = bijection
        if isinstance(base, torch.distributions.Distribution):
            if base.batch_shape != torch.Size():
                raise ShapeError(
                    "Flow expects a base with an empty batch shape (wrap it in "
                    f"torch.distributions.Independent), got {tuple(base.batch_shape)}."
                )
            base = _TorchBase(base)
        self.base: Any = base

    @property
    def likelihood(self) -> str:
        """The weakest of the layers' words: an estimate spoils a bound, a bound an exact value."""
        found = {getattr(module, "likelihood", "exact") for module in self.bijection.modules()}
        found.add(getattr(self.base, "likelihood", "exact"))
        return next(word for word in ("estimate", "lower bound", "exact") if word in found)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set the layers' data-dependent parameters from a first batch of data."""
        self.bijection.initialize(x, context)

    def check_data(self, x: Tensor) -> None:
        """Raise a `ValueError` if a data set holds values that the first layer cannot take."""
        self.bijection.check_data(x)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.log_prob(x, context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density of each row in nats, ``(batch,)``: one ``forward`` and the base's cost."""
        z, log_det = self.bijection(x, context)
        return self.base.log_prob(z, context) + log_det

    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        """Draw n events: one ``inverse``. Context has n rows, or one row that serves all n."""
        return self.sample_with_log_prob(n, context)[0]

    def sample_with_log_prob(self, n: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw n events and their log-densities from the same pass, differentiable in both."""
        context = expand_context(context, n)
        z = self.base.sample(n, context)
        x, log_det = self.bijection.inverse(z, context)
        return x, self.base.log_prob(z, context) - log_det

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The noise z that stands for x."""
        return self.bijection(x, context)[0]

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The data x that z stands for."""
        return self.bijection.inverse(z, context)[0]


def sum_event(x: Tensor) -> Tensor:
    """Sum over everything but the batch: ``(batch, *event) -> (batch,)``."""
    return x.sum(tuple(range(1, x.ndim))) if x.ndim > 1 else x


def sum_log_det(terms: Tensor) -> Tensor:
    """Log-derivatives of an elementwise map, summed over the event in at least float32."""
    narrow = terms.dtype in (torch.bfloat16, torch.float16)
    return sum_event(terms.float() if narrow else terms)


def zeros_log_det(x: Tensor) -> Tensor:
    """A zero for each row, in the dtype of x and at least float32."""
    return torch.zeros(x.shape[0], device=x.device, dtype=log_det_dtype(x.dtype))


def log_det_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a log-det: its input's, but never narrower than float32."""
    return torch.promote_types(dtype, torch.float32)


def expand_log_det(log_det: Tensor, x: Tensor) -> Tensor:
    """The scalar log-det of a map that does not depend on x, one copy for each row."""
    return log_det.to(log_det_dtype(x.dtype)).expand(x.shape[0])


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Keeps matrix products out of autocast: only conditioners may run in bfloat16."""
    return torch.autocast(x.device.type, enabled=False)


def expand_context(context: Tensor | None, n: int) -> Tensor | None:
    """Context for n draws: as it is if it has n rows, repeated if it has one."""
    if context is None or context.shape[0] == n:
        return context
    if context.shape[0] != 1:
        raise ShapeError(f"A sample of {n} expects a context of 1 or {n} rows, got {len(context)}.")
    return context.expand(n, *context.shape[1:])


def fits(shape: torch.Size, expected: EventShape) -> bool:
    """Whether a shape agrees with one in which ``None`` means any size."""
    return shape == expected or (
        len(shape) == len(expected)
        and all(want in (None, have) for have, want in zip(shape, expected, strict=True))
    )


def describe(shape: tuple[Any, ...]) -> str:
    """A shape as a person writes it: ``(batch, 3, any, any)``."""
    inner = ", ".join("any" if size is None else str(size) for size in shape)
    return f"({inner})"
