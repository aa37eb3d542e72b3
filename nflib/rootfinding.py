"""Inverting an increasing function where no formula exists, with exact gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Each round cuts the bracket into 16 parts and keeps one: four binary digits for one call of f.
_PARTS = 16
_ROUNDS = {torch.float64: 15}


def solve_increasing(
    f: Callable[[Tensor], tuple[Tensor, Tensor]], target: Tensor, lower: Tensor, upper: Tensor
) -> Tensor:
    """The t with ``f(t) = target``, elementwise, for f increasing and lower <= t <= upper.

    Section search with a fixed number of rounds (7, or 15 in float64), so that no step waits for a
    value, then one Newton step, which also carries the gradient: by the implicit function theorem
    ``dt = (d target - (df/dtheta) dtheta) / f'(t)`` for whatever theta f depends on.

    Args:
        f: elementwise, with any number of leading dims; returns the function's value and its
            derivative.
        target: where f should arrive.
        lower, upper: exact brackets of the solution, of target's shape.

    Cost: 8 (16) evaluations of f, all but the last at 15 points at a time.
    """
    with torch.no_grad():
        low, step = lower, (upper - lower) / _PARTS
        cuts = torch.arange(1, _PARTS, device=target.device).view(-1, *[1] * target.ndim)
        for _ in range(_ROUNDS.get(target.dtype, 7)):
            below = (f(low + step * cuts)[0] < target).sum(0)
            low, step = low + step * below, step / _PARTS
        t = low + step * (_PARTS / 2)
    value, slope = f(t)
    return t - (value - target) / slope.detach().clamp_min(torch.finfo(t.dtype).eps)
