"""What stands in a flow: a layer, which is a bijection or a stochastic one.

A layer is its mathematics. It writes ``forward``, ``inverse`` and its shapes; whether an input
fits, and whether two results come back, is checked here for every layer, also for a reader's own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nflib.core.shapes import EventShape, ShapeError, describe, fits, is_known

Result = tuple[Tensor, Tensor]


class OutputError(ValueError):
    """A layer returned something else than its output and one log-det for each row."""


class Layer(nn.Module):
    """A step between data and noise that `Compose` can chain.

    ``forward`` goes from data to noise, ``inverse`` back; batch is dim 0, the rest is the event.
    Both return their output and a log-det (a stochastic layer: a likelihood contribution) of
    shape ``(batch,)``. Calls are checked before and after, without reading a value.

    Attributes:
        event_shape: sizes of the event dims: ``None`` where any size will do, ``...`` for any
            number of further dims, ``None`` as a whole if the layer takes events of any shape.
        context_shape: the same for one row of context; ``None`` as a whole if the layer uses no
            context (it is then accepted and ignored, so that it passes through any composition).
        likelihood: ``"exact"``, ``"lower bound"`` or ``"estimate"``: what a ``log_prob`` through
            this layer is.
        bijective: whether the layer is one to one.
        exact_inverse: whether each direction undoes the other up to rounding: by a formula, and in
            training as well. `nflib.reversible` asks for it.
    """

    event_shape: EventShape | None = None
    context_shape: EventShape | None = None
    likelihood: str = "exact"
    bijective: bool = True
    exact_inverse: bool = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("forward", "inverse"):
            method = cls.__dict__.get(name)
            if inspect.isfunction(method):
                setattr(cls, name, _guarded(method, name == "inverse"))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Result:
        """Data to noise: ``x -> (z, log|det dz/dx|)``, shapes ``(batch, *event)``, ``(batch,)``."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward(x, context).")

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        """Noise to data: ``z -> (x, log|det dx/dz|)``, shapes ``(batch, *event)``, ``(batch,)``."""
        raise NotImplementedError(f"{type(self).__name__} does not define inverse(z, context).")

    def output_shape(self, shape: EventShape | None) -> EventShape | None:
        """The shape of ``forward``'s output for an event of this shape; most layers keep it.

        A layer that changes it writes this and `input_shape`. Raises `ShapeError` for a shape that
        it cannot take.
        """
        return shape

    def input_shape(self, shape: EventShape | None) -> EventShape | None:
        """The shape of ``inverse``'s output for noise of this shape; most layers keep it."""
        return shape

    def shape_after(self, shape: EventShape | None) -> EventShape | None:
        """`output_shape` of a shape with open sizes, too: None where that is not known."""
        return _asked(self.output_shape, shape)

    def shape_before(self, shape: EventShape | None) -> EventShape | None:
        """`input_shape` of a shape with open sizes, too: None where that is not known."""
        kind = type(self)
        changes = kind.output_shape is not Layer.output_shape
        if changes and kind.input_shape is Layer.input_shape:
            return None  # written by somebody who did not think of the way back
        return _asked(self.input_shape, shape)

    @property
    def latent_shape(self) -> EventShape | None:
        """What ``event_shape`` is for data, for the noise that ``forward`` returns."""
        return self.shape_after(self.event_shape)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set data-dependent parameters from a first batch of data; most layers have none.

        `nflib.train.fit` calls it once, before the first step of a fresh run.
        """

    def initialize_inverse(self, z: Tensor, context: Tensor | None = None) -> None:
        """The same for a layer that is read backwards: from a first batch for ``inverse``."""

    def check_data(self, x: Tensor) -> None:
        """Raise a `ValueError` if a data set holds values that this layer cannot take.

        Reads all values, so `nflib.train.fit` and `nflib.metrics.evaluate` call it once for each
        data set and never in a training step. Most layers take any number.
        """

    def check_input(
        self,
        x: Tensor,
        context: Tensor | None = None,
        inverse: bool = False,
        name: str | None = None,
    ) -> None:
        """Raise `ShapeError` in one sentence if x or context cannot be an input of the layer.

        Every call of ``forward`` and ``inverse`` begins with it. Reads shapes, dtypes and devices
        only: nothing waits for the device. ``name`` is what the user called, if not the layer.
        """
        # A compiler checks once, and should not have to watch what is remembered here.
        is_traced = torch.compiler.is_compiling()
        if self.context_shape is None and not is_traced and self._has_seen(x, inverse):
            return
        name = name or type(self).__name__ + ".inverse" * inverse
        if not isinstance(x, Tensor):
            raise ShapeError(f"{name} expects a tensor, got {_kind(x)}; torch.as_tensor makes one.")
        if x.ndim == 0:
            raise ShapeError(f"{name} expects a batch of events, got a single number.")
        if not x.is_floating_point() and (self.bijective or inverse):
            raise ShapeError(f"{name} expects floating-point numbers, got {x.dtype}.")
        if is_traced or not self._has_seen(x, inverse):
            self._check_shape(name, x, inverse)
        like = None if is_traced else _first(self)
        if like is not None:
            _check_like(name, x, like, self.bijective)
        if self.context_shape is not None:
            _check_context(name, x, context, self.context_shape, like)
        if not is_traced:
            self._remember(x, inverse, like)

    def _has_seen(self, x: Tensor, inverse: bool) -> bool:
        """Whether an input like this one fitted before, to a layer as it is now."""
        seen = self.__dict__.get("_inputs_that_fitted")
        known = None if seen is None else seen[inverse]
        if known is None or not isinstance(x, Tensor):
            return False
        shape, dtype, device, own = known
        if x.shape[1:] != shape or x.dtype is not dtype or x.device != device:
            return False
        if own is None:
            return True
        like = _first(self)
        return like is not None and like.dtype is own and like.device == device

    def _remember(self, x: Tensor, inverse: bool, like: Tensor | None) -> None:
        own = None if like is None else like.dtype
        seen = self.__dict__.setdefault("_inputs_that_fitted", [None, None])
        seen[inverse] = x.shape[1:], x.dtype, x.device, own

    def _check_shape(self, name: str, x: Tensor, inverse: bool) -> None:
        shape = tuple(x.shape[1:])
        expected = self.latent_shape if inverse else self.event_shape
        if not fits(shape, expected):
            raise ShapeError(
                f"{name} expects shape {describe(('batch', *(expected or ())))}, "
                f"got {tuple(x.shape)}."
            )
        (self.input_shape if inverse else self.output_shape)(shape)


class Bijection(Layer):
    """An invertible, differentiable map with a tractable log|det|.

    A subclass writes ``forward``, ``inverse`` and, unless it takes any event, ``event_shape``:

        class Scale(Bijection):
            def __init__(self):
                super().__init__()
                self.s = nn.Parameter(torch.zeros(()))

            def forward(self, x, context=None):
                return x * self.s.exp(), (self.s * x[0].numel()).expand(len(x))

            def inverse(self, z, context=None):
                return z * (-self.s).exp(), (-self.s * z[0].numel()).expand(len(z))
    """


class Stochastic(Layer):
    """A layer that draws noise or drops something on its way, so that it is not one to one.

    Where a bijection returns its log-det it returns its contribution to the log-likelihood, so
    that both stand in one `Compose`. ``log_prob`` through it is a lower bound unless it says
    otherwise. Nielsen et al. 2020 (SurVAE Flows), https://arxiv.org/abs/2007.02731.
    """

    likelihood = "lower bound"
    bijective = False
    exact_inverse = False


def _asked(
    function: Callable[[EventShape | None], EventShape | None], shape: EventShape | None
) -> EventShape | None:
    if is_known(shape):
        return function(shape)
    try:
        return function(shape)
    except ShapeError:
        raise
    except (TypeError, ValueError):
        return None  # it computes with sizes, and some are open


def _guarded(method: Callable[..., Any], inverse: bool) -> Callable[..., Any]:
    """``forward`` or ``inverse`` of a layer between the checks of its input and of its output."""
    takes_context = _takes_context(method)

    @functools.wraps(method)
    def run(self: Layer, x: Tensor, context: Tensor | None = None) -> Result:
        self.check_input(x, context, inverse)
        out = method(self, x, context) if takes_context else method(self, x)
        if type(out) is not tuple or len(out) != 2 or not isinstance(out[1], Tensor):
            raise OutputError(_wrong_output(self, method.__name__, out))
        if out[1].shape != x.shape[:1]:
            raise OutputError(
                f"{type(self).__name__}.{method.__name__} expects to return a log_det of shape "
                f"({x.shape[0]},), one number a row, got {tuple(out[1].shape)}."
            )
        return out

    run.takes_context = takes_context  # type: ignore[attr-defined]
    return run


def _takes_context(method: Callable[..., Any]) -> bool:
    parameters = list(inspect.signature(method).parameters.values())
    kinds = {parameter.kind for parameter in parameters}
    return len(parameters) > 2 or inspect.Parameter.VAR_POSITIONAL in kinds


def _wrong_output(layer: Layer, method: str, out: Any) -> str:
    got = f"{len(out)} things" if isinstance(out, tuple) and len(out) != 2 else _kind(out)
    return (
        f"{type(layer).__name__}.{method} expects to return a tuple (output, log_det) of two "
        f"tensors, got {got}."
    )


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _first(module: nn.Module) -> Tensor | None:
    """The parameter (else the buffer) that tells a module's dtype and device.

    Found once; afterwards it is looked up where it stood, for it may be replaced.
    """
    place = module.__dict__.get("_where_first")
    found = None if place is None else place[0].get(place[1])
    if found is not None:
        return found
    for kind in ("_parameters", "_buffers"):
        for inner in module.modules():
            store = getattr(inner, kind)
            for name, tensor in store.items():
                if tensor is not None:
                    module.__dict__["_where_first"] = (store, name)
                    return tensor
    return None


def _check_like(name: str, x: Tensor, like: Tensor, same_dtype: bool) -> None:
    if x.device != like.device:
        raise ShapeError(
            f"{name} expects its input on its own device {like.device}, got {x.device}; "
            "move the input with .to(device), or the model."
        )
    if same_dtype and isinstance(like, nn.Parameter) and x.dtype != like.dtype:
        raise ShapeError(
            f"{name} expects its parameters' dtype {like.dtype}, got {x.dtype}; "
            "convert the input with .to(dtype), or the model."
        )


def _check_context(
    name: str, x: Tensor, context: Tensor | None, shape: EventShape, like: Tensor | None
) -> None:
    wanted = describe(("batch", *shape))
    if context is None:
        raise ShapeError(f"{name} expects a context of shape {wanted}, got none.")
    if not isinstance(context, Tensor):
        raise ShapeError(f"{name} expects the context as a tensor, got {_kind(context)}.")
    if context.ndim == 0 or not fits(context.shape[1:], shape) or context.shape[0] != x.shape[0]:
        raise ShapeError(
            f"{name} expects a context of shape {describe((x.shape[0], *shape))}, "
            f"got {tuple(context.shape)}."
        )
    if like is not None and isinstance(like, nn.Parameter) and context.dtype != like.dtype:
        raise ShapeError(
            f"{name} expects a context of its parameters' dtype {like.dtype}, "
            f"got {context.dtype}; convert it with .to(dtype)."
        )
