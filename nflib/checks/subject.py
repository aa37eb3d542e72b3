"""Whether what a check was given can be tried at all: a layer, its input, its own tensors."""

from __future__ import annotations

import copy
import inspect
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from nflib.arguments import Rule, show
from nflib.checks.calls import call, check_result
from nflib.checks.errors import BatchError, CheckError, LayerError, LogDetError, StateError
from nflib.checks.tools import worst
from nflib.core import Layer

# What `require_layer` and `require_rows` judge, in more words than a rule has.
Subject = Annotated[Layer, Rule("a layer", lambda value: value)]
Rows = Annotated[Tensor, Rule("a batch", lambda value: value)]


def require_layer(caller: str, layer: Any, *, bijective: bool = True) -> None:
    """Raise `LayerError` unless this is an object of a `Layer`, and one to one if asked for."""
    kind = type(layer).__name__
    if isinstance(layer, type):
        raise LayerError(
            f"{caller} expects a layer, got the class {layer.__name__} itself: make an object of "
            f"it with {layer.__name__}(...)."
        )
    if isinstance(getattr(layer, "bijection", None), Layer) and not isinstance(layer, Layer):
        raise LayerError(
            f"{caller} expects a layer, got {kind}, which is a whole model: give it the layers "
            "alone, as in flow.bijection."
        )
    if isinstance(layer, nn.Module) and not isinstance(layer, Layer):
        what = "which is a model of its own" if hasattr(layer, "log_prob") else "which is no layer"
        if not hasattr(layer, "log_prob") and not type(layer).__module__.startswith("nflib."):
            what = f"which is a plain nn.Module: write class {kind}(Bijection)"
        raise LayerError(f"{caller} expects a layer, got {kind}, {what}.")
    if not isinstance(layer, Layer):
        raise LayerError(f"{caller} expects a layer, got {show(layer)}.")
    if bijective and not layer.bijective:
        inner = [m for m in layer.modules() if isinstance(m, Layer) and not m.bijective][-1]
        where = "" if inner is layer else f" because of the {type(inner).__name__} in it"
        raise LayerError(
            f"{caller} expects a bijection, got {kind}, which is stochastic{where}: it draws noise "
            "or drops numbers, so there is no log|det J| to compare with."
        )


def require_rows(caller: str, x: Any, context: Any, least: int = 2) -> None:
    """Raise a ValueError unless x is a batch of finite numbers and context has as many rows."""
    for name, value in (("x", x), ("context", context)):
        if not isinstance(value, Tensor) and (name == "x" or value is not None):
            raise ValueError(
                f"{caller} expects {name} to be a tensor, got {type(value).__name__}; "
                f"torch.as_tensor({name}) makes one."
            )
    if x.ndim < 2 or x.shape[0] < least:
        count = {1: "one row", 2: "two rows"}[least]
        raise ValueError(f"{caller} expects at least {count} in x, got shape {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise ValueError(f"{caller} expects floating-point numbers in x, got {x.dtype}.")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{caller} expects finite numbers in x, got an infinite one or NaN.")
    require_context(caller, x, context)


def require_context(caller: str, x: Tensor, context: Tensor | None) -> None:
    """Raise a ValueError unless there is a row of context for each row of x, or no context."""
    if context is not None and (context.ndim < 1 or context.shape[:1] != x.shape[:1]):
        count = len(x) if x.ndim else 0
        raise ValueError(
            f"{caller} expects a row of context for each of the {count} rows of x, "
            f"got shape {tuple(context.shape)}."
        )


def check_methods(layer: Layer) -> None:
    """Both directions are written, and take what they are called with."""
    kind = type(layer)
    for direction, letter in (("forward", "x"), ("inverse", "z")):
        wanted = f"{direction}(self, {letter}, context=None)"
        if getattr(kind, direction) is getattr(Layer, direction):
            raise LayerError(f"{kind.__name__} expects a method {wanted}, got none.")
        method = inspect.unwrap(getattr(kind, direction))
        signature = inspect.signature(method)
        names = list(signature.parameters)
        if names[:1] == [letter] or not _takes(signature, 3):
            raise LayerError(
                f"{kind.__name__}.{direction} expects to be written as {wanted}, "
                f"got {direction}({', '.join(names)})."
            )


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def check_registered(layer: Layer, x: Tensor, context: Tensor | None) -> None:
    """Every tensor and module that the layer holds is one that torch knows of."""
    fault = _find_unregistered(layer)
    if fault is None:
        return
    try:
        with torch.no_grad():
            call(copy.deepcopy(layer), "forward", x.clone(), context)
    except LogDetError:
        raise  # that it does not return what it should comes first
    except Exception:
        pass  # most likely for the same reason
    raise StateError(fault)


def _find_unregistered(layer: nn.Module) -> str | None:
    known = {id(t) for t in (*layer.parameters(), *layer.buffers(), *layer.modules())}
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            if isinstance(value, dict | list | tuple):
                held = list(value.values() if isinstance(value, dict) else value)
            else:
                held = [value]
            if not held or not all(isinstance(one, Tensor | nn.Module) for one in held):
                continue
            if held[0] is not value and isinstance(held[0], Tensor) and not _is_float(held):
                continue  # whole numbers in a list are mostly notes of how the layer was made
            # torch's old weight_norm and spectral_norm keep the finished weight in this way.
            if f"{name}_g" in module._parameters or f"{name}_orig" in module._parameters:
                continue
            if any(id(one) not in known for one in held):
                place = ".".join(part for part in (type(layer).__name__, path, name) if part)
                return _unregistered(place, name, value, held)
    return None


def _is_float(tensors: list[Any]) -> bool:
    return all(isinstance(one, Tensor) and one.is_floating_point() for one in tensors)


def _unregistered(place: str, name: str, value: Any, held: list[Any]) -> str:
    lost = "so torch does not train, move, convert or save"
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        what, one = ("modules", "Module") if isinstance(held[0], nn.Module) else ("tensors", "")
        better = f"nn.{one or 'Parameter'}{'Dict' if kind == 'dict' else 'List'}"
        better += "" if one else " or buffers"
        return f"{place} is a Python {kind} of {what}, {lost} them: use {better}."
    if value.grad_fn is not None:
        return (
            f"{place} is computed from parameters when the layer is made and stays as it was "
            "when they change: compute it in forward and in inverse."
        )
    return (
        f"{place} is a tensor but neither a parameter nor a buffer, {lost} it: write "
        f'nn.Parameter(...) if it is learned, else self.register_buffer("{name}", ...).'
    )


def try_out(
    layer: Layer, direction: str, x: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The results of one direction: of the right kind, the same twice, and x left as it was.

    The second time the batch does not lie contiguous in memory, which should not matter.
    """
    name = f"{type(layer).__name__}.{direction}"
    given = x.clone()
    given_context = None if context is None else context.clone()
    first = call(layer, direction, given, given_context)
    if not torch.equal(given, x):
        raise LayerError(
            f"{name} changes its input in place (with +=, *=, a method that ends in _ or an "
            "assignment to a part of it): make a new tensor."
        )
    if context is not None and given_context is not None:
        if not torch.equal(given_context, context):
            raise LayerError(f"{name} changes its context in place: make a new tensor.")
    check_result(layer, direction, x, first)
    backwards = tuple(reversed(range(x.ndim)))
    strided = x.permute(backwards).contiguous().permute(backwards)
    try:
        second = call(layer, direction, strided, context)
    except CheckError as error:
        call(layer, direction, x, context)  # is it the call or its repetition?
        words = str(error).removeprefix(f"{name} ").rstrip(".")
        raise BatchError(
            f"{name} fails for a batch that is not contiguous: {words} (reshape in place of view "
            "helps)."
        ) from (error.__cause__ or error)
    if not _same(first, second):
        if _same(first, call(layer, direction, x, context)):
            raise BatchError(f"{name} returns something else for a batch that is not contiguous.")
        raise LayerError(
            f"{name} returns something else when it is called again with the same input: it draws "
            "random numbers or changes itself, so it is no bijection."
        )
    return first


def _same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return all(
        a.shape == b.shape and worst(a - b, 1 + a.abs()) <= 1e-8
        for a, b in zip(one, other, strict=True)
    )
