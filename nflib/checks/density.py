"""Properties of networks and densities: the autoregressive order, an integral of one."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from nflib.arguments import Count, Positive, Rule, Size, checked, real, show
from nflib.checks.errors import AutoregressiveError, NormalizationError, Report
from nflib.checks.subject import Rows, require_rows
from nflib.checks.tools import Map, jacobian, randomize_parameters


@checked
def check_autoregressive(
    function: Map,
    x: Rows,
    order: Sequence[int] | None = None,
    *,
    strict: bool = True,
    randomize: bool = True,
    seed: Count = 0,
) -> Report:
    """Output i depends on the inputs before i only: autograd's Jacobian is triangular.

    A network whose last layer starts at zero has no derivative at all and would show nothing.
    Therefore the parameters of a module are shaken first, on a copy; any other function is tried
    as it is, and a Jacobian without a single allowed link is refused. The report says how many of
    the allowed links are in use; masks may drop some.

    Args:
        function: maps ``(batch, D)`` to ``(batch, D)`` or ``(batch, D, parameters)``.
        x: where to look, ``(batch, D)``.
        order: position of each dimension in the ordering, by default 0..D-1; of two that share a
            position, neither is before the other.
        strict: output i may not depend on input i either, as in a conditioner; in a flow it may.
        randomize: shake the parameters first, if the function is a module.
        seed: of the random parameters.

    Raises:
        AutoregressiveError: if an output sees a later input, or none sees any.
        ValueError: if x, the order or the function's output has a wrong shape.
    """
    require_rows("check_autoregressive", x, None, least=1)
    dim = x.shape[1]
    if x.ndim != 2:
        raise ValueError(
            f"check_autoregressive expects x of shape (batch, D), got {tuple(x.shape)}."
        )
    rank = _ranks(order, dim)
    if isinstance(function, nn.Module):
        function = copy.deepcopy(function).eval()
        if randomize:
            randomize_parameters(function, seed)
    influence = _influence(function, x)
    later = rank[:, None] <= rank[None, :] if strict else rank[:, None] < rank[None, :]
    leak = torch.where(later, influence, 0.0)
    if bool(leak.any()):
        i, j = divmod(int(leak.argmax()), dim)
        raise AutoregressiveError(
            f"Output {i} depends on input {j}, which is not before it: "
            f"the derivative is {leak[i, j]:.3g}."
        )
    used, allowed = int((~later & (influence > 0)).sum()), int((~later).sum())
    if allowed and not used:
        raise AutoregressiveError(
            f"check_autoregressive cannot judge: 0 of {allowed} links in use, no output depends on "
            "any input, as when the last layer is zero; randomize_parameters(network) shakes it."
        )
    report = Report(f"autoregressive in {dim} dimensions")
    report.add("no output sees a later input", f"{used} of {allowed} links in use")
    return report


def _ranks(order: Sequence[int] | None, dim: int) -> Tensor:
    try:
        rank = torch.arange(dim) if order is None else torch.as_tensor(order).cpu()
    except (TypeError, ValueError, RuntimeError):
        rank = torch.empty(0)
    if rank.shape != (dim,):
        raise ValueError(
            f"check_autoregressive expects order to hold {dim} positions, one for each dimension, "
            f"got {show(order)}."
        )
    return rank


def _influence(function: Map, x: Tensor) -> Tensor:
    """The largest derivative of each output by each input, ``(D, D)``, on the CPU."""
    dim = x.shape[1]
    with torch.no_grad():
        out = function(x)
    if not isinstance(out, Tensor) or out.ndim < 2 or out.shape[:2] != x.shape:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"check_autoregressive expects a function to (batch, D) or (batch, D, parameters), "
            f"here {tuple(x.shape)}, got {got}."
        )
    with torch.enable_grad():
        if not function(x.detach().requires_grad_()).requires_grad:
            return torch.zeros(dim, dim, dtype=x.dtype)
    matrix = jacobian(lambda a: function(a).reshape(len(a), -1), x)
    return matrix.unflatten(1, (dim, -1)).abs().amax(dim=(0, 2)).cpu()


def _density(value: Any) -> Any:
    if isinstance(value, type) or not callable(getattr(value, "log_prob", value)):
        raise TypeError
    return value


def _limits(value: Any) -> tuple[float, float]:
    low, high = map(real, value)
    if not -math.inf < low < high < math.inf:
        raise ValueError
    return low, high


Density = Annotated[Any, Rule("a model with log_prob, or a function", _density)]
Limits = Annotated[tuple[float, float], Rule("two numbers, the lower one first", _limits)]


@checked
def check_normalized(
    model: Density,
    context: Tensor | None = None,
    *,
    limits: Limits = (-10.0, 10.0),
    points: Size = 600,
    dim: Literal[1, 2] = 2,
    tolerance: Positive = 0.01,
) -> Report:
    """The density integrates to one, by the midpoint rule on a grid (1-D or 2-D).

    Args:
        model: anything with ``log_prob(x, context)``, or a callable that returns log-densities.
        context: one row that serves every grid point.
        limits: of the square; it must hold nearly all of the mass.
        points: grid points a side.
        dim: 1 or 2.
    """
    if context is not None and context.shape[:1] != (1,):
        raise ValueError(
            f"check_normalized expects context to be one row, got shape {tuple(context.shape)}."
        )
    low, high = limits
    step = (high - low) / points
    like = torch.zeros(())
    if isinstance(model, nn.Module):
        like = next(model.parameters(), like)
    axis = low + step * (torch.arange(points, dtype=like.dtype, device=like.device) + 0.5)
    grid = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    log_prob: Any = getattr(model, "log_prob", model)
    total = 0.0
    with torch.no_grad():
        for part in grid.split(65536):
            condition = () if context is None else (context.expand(len(part), *context.shape[1:]),)
            values = log_prob(part, *condition)
            total += values.double().exp().sum().item() * step**dim
    if not abs(total - 1) <= tolerance:
        raise NormalizationError(
            f"The density integrates to {total:.4f} over {limits} in {dim} dimensions, "
            f"expected 1 within {tolerance:g}."
        )
    report = Report(f"{type(model).__name__}: a density")
    report.add("integral over the grid", f"1 within {tolerance:g}")
    return report
