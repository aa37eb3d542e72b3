"""What training and use ask of a layer: gradients, state, precision, compilers."""

from __future__ import annotations

import copy
import shutil

import torch
from torch import Tensor, nn

from nflib.arguments import Positive, checked
from nflib.checks.calls import Pair, call
from nflib.checks.errors import (
    CompileError,
    GradientError,
    PrecisionError,
    Report,
    StateError,
    VmapError,
)
from nflib.checks.subject import Subject, require_context, require_layer
from nflib.checks.tools import below, first_line, noise_like, worst
from nflib.core import Layer, zeros_log_det


@checked
def check_gradients(
    model: nn.Module,
    x: Tensor,
    context: Tensor | None = None,
    report: Report | None = None,
) -> Report:
    """Every parameter gets a finite gradient that is not zero.

    For a `Layer` the loss is a random projection of output and log_det, in each direction; for
    any other model the mean of ``log_prob``. In evaluation and in float64 a layer's gradients are
    also compared with a finite difference, which shows a log_det that was detached.
    """
    require_context("check_gradients", x, context)
    report = report or Report(type(model).__name__)
    parameters = {name: p for name, p in model.named_parameters() if p.numel()}
    if isinstance(model, Layer):
        with torch.no_grad():
            z, _ = call(model, "forward", x, context)
        for direction, at in (("forward", x), ("inverse", z)):
            at = at.detach().requires_grad_()
            pair = call(model, direction, at, context)
            gradients = _gradients(_projection(*pair), [*parameters.values(), at])
            _check_each(type(model).__name__, parameters, gradients)
            if x.dtype == torch.float64 and not model.training:
                _check_slope(model, direction, at, context, pair, gradients)
    elif parameters:
        loss = (model(x) if context is None else model(x, context)).mean()
        gradients = _gradients(loss, list(parameters.values()))
        _check_each(type(model).__name__, parameters, gradients)
    count = sum(p.numel() for p in parameters.values())
    report.add("a gradient reaches every parameter", f"numbers: {count}")
    return report


def _gradients(value: Tensor, by: list[Tensor]) -> list[Tensor]:
    """Gradients by some tensors, zero where there is no way to them; the graph is kept."""
    if not value.requires_grad:
        return [torch.zeros_like(tensor) for tensor in by]
    return list(torch.autograd.grad(value, by, retain_graph=True, materialize_grads=True))


def _check_each(name: str, parameters: dict[str, nn.Parameter], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=False):
        if not bool(gradient.any()):
            raise GradientError(f"{name}.{parameter} gets no gradient.")
        if not bool(torch.isfinite(gradient).all()):
            raise GradientError(f"{name}.{parameter} gets a gradient that is not finite.")


def _check_slope(
    layer: Layer,
    direction: str,
    x: Tensor,
    context: Tensor | None,
    pair: Pair,
    gradients: list[Tensor],
    size: float = 1e-6,
) -> None:
    """Autograd's gradients are the slopes of output and log_det, in one random direction.

    A right Jacobian and gradients that are merely there would not show that log_det was detached.
    ``pair`` is the result at x with its graph, ``gradients`` those of its projection.
    """
    moved = copy.deepcopy(layer)
    inputs: list[Tensor] = [*(p for p in layer.parameters() if p.numel()), x]
    places: list[Tensor] = [*(p for p in moved.parameters() if p.numel()), x.detach().clone()]
    steps = [noise_like(place, 2 + k) for k, place in enumerate(places)]
    with torch.no_grad():
        for place, step in zip(places, steps, strict=True):
            place.add_(size * step)
        there = call(moved, direction, places[-1], context)
        slope = (_projection(*there) - _projection(*pair)).item() / size
    if _agree(gradients, steps, slope)[0]:
        return
    for k, what in ((1, "log_det"), (0, "output")):
        weights = noise_like(pair[k], 1)
        slope = (weights * (there[k] - pair[k])).sum().item() / size
        by_part = _gradients((weights * pair[k]).sum(), inputs)
        is_right, found = _agree(by_part, steps, slope)
        if not is_right:
            raise GradientError(
                f"{type(layer).__name__}.{direction}: the gradient of {what} is not its slope "
                f"({found:.4g} by autograd, {slope:.4g} by a finite difference), as when a part "
                "of it is detached or made under torch.no_grad()."
            )


def _agree(gradients: list[Tensor], steps: list[Tensor], slope: float) -> tuple[bool, float]:
    """Whether the slope along the steps is the one the gradients say, and which they say."""
    found = sum((g * s).sum().item() for g, s in zip(gradients, steps, strict=True))
    length = sum(g.square().sum().item() for g in gradients) ** 0.5
    return abs(found - slope) <= 1e-3 * (1 + length), found


@checked
def check_state(
    layer: Subject, x: Tensor, context: Tensor | None = None, report: Report | None = None
) -> Report:
    """A second layer that loads this one's state_dict computes exactly the same.

    So does one of another dtype that takes the tensors over (``load_state_dict(assign=True)``).
    """
    require_layer("check_state", layer, bijective=False)
    require_context("check_state", x, context)
    report = report or Report(type(layer).__name__)
    name = type(layer).__name__
    narrow = torch.float32 if x.dtype == torch.float64 else torch.float64
    state = layer.state_dict()
    with torch.no_grad():
        there = call(layer, "forward", x, context)
        z = there[0]
        expected = {"forward": there, "inverse": call(layer, "inverse", z, context)}
    for assign, words in ((False, ""), (True, f" with assign=True into {narrow}")):
        other = _emptied(layer, narrow if assign else None, set(state))
        try:
            other.load_state_dict(state, assign=assign)
        except Exception as error:
            raise StateError(
                f"{name} does not load its state_dict: {first_line(error)}."
            ) from error
        # What is taken over is the same for both directions: the cheaper one will do.
        for direction, at in (("forward", x), ("inverse", z))[: 1 if assign else 2]:
            with torch.no_grad():
                theirs = call(other, direction, at, context)
            mine = expected[direction]
            if not (torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])):
                error_size = worst(mine[0] - theirs[0])
                raise StateError(
                    f"{name}.{direction} changes by {error_size:.3g} when its "
                    f"state_dict is loaded into a second layer{words}."
                )
    report.add("state_dict holds all of it", "exact")
    return report


def _emptied(layer: Layer, dtype: torch.dtype | None, saved: set[str]) -> Layer:
    """A copy that knows nothing but what is fixed when a layer is made."""
    other = copy.deepcopy(layer) if dtype is None else copy.deepcopy(layer).to(dtype)
    for tensor in (*other.parameters(), *other.buffers()):
        # Anything but the right values: what the state_dict leaves out shows in the result.
        tensor.data = torch.zeros_like(tensor)
    for name in {name for name, _ in other.named_buffers()} - saved:
        # Buffers that are not saved are constants of the construction.
        other.get_buffer(name).data = layer.get_buffer(name).data.clone()
    return other


@checked
def check_autocast(
    layer: Subject,
    x: Tensor,
    context: Tensor | None = None,
    report: Report | None = None,
    tolerance: Positive = 0.05,
) -> Report:
    """Under bfloat16 autocast outputs and log_dets stay float32, and log_det hardly moves.

    Only conditioners may run in bfloat16. The tolerance is in nats per dimension.
    """
    require_layer("check_autocast", layer, bijective=False)
    require_context("check_autocast", x, context)
    report = report or Report(type(layer).__name__)
    name = type(layer).__name__
    with torch.no_grad():
        _, expected = call(layer, "forward", x, context)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            z, log_det = call(layer, "forward", x, context)
    if z.dtype != x.dtype or log_det.dtype != expected.dtype:
        raise PrecisionError(
            f"{name} under autocast returns {z.dtype} and a log_det in {log_det.dtype}, "
            f"expected {x.dtype} and {expected.dtype}."
        )
    moved = worst(log_det - expected) / x[0].numel()
    if not moved <= tolerance:
        raise PrecisionError(
            f"{name}: log_det moves by {moved:.3g} nats per dimension under bfloat16 autocast, "
            f"allowed is {tolerance:g}."
        )
    report.add("bfloat16 autocast leaves log_det in float32", f"within {tolerance:g} nats/dim")
    return report


@checked
def check_compile(
    layer: Subject,
    x: Tensor,
    context: Tensor | None = None,
    report: Report | None = None,
    backend: str = "aot_eager",
) -> Report:
    """``torch.compile(fullgraph=True)``: one graph without a break, equal to eager to 1e-8.

    The default backend traces forward and backward without generating code; ``"inductor"``
    generates and needs a C++ compiler on CPU.
    """
    require_layer("check_compile", layer, bijective=False)
    require_context("check_compile", x, context)
    report = report or Report(type(layer).__name__)
    name = type(layer).__name__
    if backend == "inductor" and x.device.type == "cpu" and not shutil.which("c++"):
        raise ValueError("The inductor backend expects a C++ compiler named c++, found none.")
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        raise ValueError(
            f"check_compile expects backend to be one that torch has, got {backend!r}."
        )
    torch.compiler.reset()
    for direction in ("forward", "inverse"):
        function = getattr(layer, direction)
        with torch.no_grad():
            at = x if direction == "forward" else call(layer, "forward", x, context)[0]
            eager = call(layer, direction, at, context)
            try:
                compiled = torch.compile(function, fullgraph=True, backend=backend)(at, context)
            except Exception as error:
                raise CompileError(f"{name}.{direction} does not compile whole: {error}") from error
        gap = max(worst(a - b, 1 + b.abs()) for a, b in zip(compiled, eager, strict=True))
        if not gap <= 1e-8:
            raise CompileError(f"{name}.{direction} compiled differs from eager by {gap:.3g}.")
    report.add("torch.compile(fullgraph=True) = eager", below(1e-8, x.dtype))
    return report


@checked
def check_vmap(
    layer: Subject, x: Tensor, context: Tensor | None = None, report: Report | None = None
) -> Report:
    """``torch.func.vmap`` over the rows gives what the batch gives.

    The tolerance, relative to 1 + |z|, is 1e-8 in float64 and 1e-4 in float32.
    What it needs: no branch on values, no ``.item()`` and nothing written in place.
    """
    require_layer("check_vmap", layer, bijective=False)
    require_context("check_vmap", x, context)
    report = report or Report(type(layer).__name__)
    name = type(layer).__name__
    limit = 1e-8 if x.dtype == torch.float64 else 1e-4
    at = x
    for direction in ("forward", "inverse"):
        with torch.no_grad():
            whole = call(layer, direction, at, context)
            try:
                mapped = _mapped(layer, direction, at, context)
            except Exception as error:
                raise VmapError(
                    f"{name}.{direction} fails under torch.func.vmap: {first_line(error)}."
                ) from error
        gap = max(worst(a - b, 1 + b.abs()) for a, b in zip(mapped, whole, strict=True))
        if not gap <= limit:
            raise VmapError(f"{name}.{direction} under vmap differs from the batch by {gap:.3g}.")
        at = whole[0]
    report.add("torch.func.vmap over rows = the batch", below(limit, x.dtype))
    return report


def _mapped(layer: Layer, direction: str, x: Tensor, context: Tensor | None) -> Pair:
    function = layer if direction == "forward" else layer.inverse

    def one(row: Tensor, condition: Tensor | None) -> Pair:
        out, log_det = function(row[None], None if condition is None else condition[None])
        return out[0], log_det[0]

    mapped: Pair = torch.func.vmap(one, in_dims=(0, None if context is None else 0))(x, context)
    return mapped


def _projection(out: Tensor, log_det: Tensor) -> Tensor:
    return (noise_like(out, 1) * out).sum() + (log_det * zeros_log_det(out).add(1.3)).sum()
