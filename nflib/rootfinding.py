"""Inverting an increasing function where no formula exists, with exact gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Halvings after which the bracket is as narrow as the format can tell.
_HALVINGS = {torch.float64: 60}


def solve_increasing(
    f: Callable[[Tensor], tuple[Tensor, Tensor]], target: Tensor, lower: Tensor, upper: Tensor
) -> Tensor:
    """The t with ``f(t) = target``, elementwise, for f increasing and lower <= t <= upper.

    Bisection with a fixed number of halvings (32, or 60 in float64), so that no step waits for a
    value, then one Newton step, which also carries the gradient: by the implicit function theorem
    ``dt = (d target - (df/dtheta) dtheta) / f'(t)`` for whatever theta f depends on.

    Args:
        f: returns the function's value and its derivative, both of target's shape.
        target: where f should arrive.
        lower, upper: exact brackets of the solution.

    Cost: 33 (61) evaluations of f.
    """
    with torch.no_grad():
        low, high = lower, upper
        for _ in range(_HALVINGS.get(target.dtype, 32)):
            middle = (low + high) / 2
            below = f(middle)[0] < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        t = (low + high) / 2
    value, slope = f(t)
    return t - (value - target) / slope.detach().clamp_min(torch.finfo(t.dtype).eps)
