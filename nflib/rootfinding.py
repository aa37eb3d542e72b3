"""Inverting an increasing function where no formula exists, with exact gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor], tuple[Tensor, Tensor]]

# Rounds of the search: enough to reach rounding error for most functions of nflib, see the tests.
_ROUNDS = {torch.float64: 30}


def solve_increasing(
    f: Function, target: Tensor, lower: Tensor, upper: Tensor, rounds: int | None = None
) -> Tensor:
    """The t with ``f(t) = target``, elementwise, for f increasing and lower <= t <= upper.

    Newton's method between brackets: a step that would leave the bracket, or that is not at most
    half as long as the one before, is replaced by halving the bracket. The number of rounds is
    fixed, so that nothing waits for a value. One last Newton step, of length zero, carries the
    gradient: by the implicit function theorem ``dt = (d target - (df/dtheta) dtheta) / f'(t)`` for
    whatever theta f depends on; f' counts as at least the dtype's epsilon there. An entry whose
    target or bracket is not a number gives none, and leaves the others alone.

    Args:
        f: elementwise; returns the function's value and its derivative.
        target: where f should arrive.
        lower, upper: exact brackets of the solution, of target's shape.
        rounds: by default 20, or 30 in float64. Halving alone takes 40 to find a float32 somewhere
            within a bracket that is 10^5 wide.

    Cost: evaluations of f, 3 more than rounds.
    """
    with torch.no_grad():
        tiny = 4 * torch.finfo(target.dtype).eps
        low, high = lower, upper
        t, step = (low + high) / 2, high - low
        best, smallest = t, torch.full_like(t, torch.inf)
        for _ in range(rounds or _ROUNDS.get(target.dtype, 20)):
            value, slope = f(t)
            error = value - target
            closer = error.abs() < smallest
            best, smallest = (
                torch.where(closer, t, best),
                torch.where(closer, error.abs(), smallest),
            )
            low, high = torch.where(error < 0, t, low), torch.where(error < 0, high, t)
            newton = t - error / slope
            length = (newton - t).abs()
            quick = (length <= step / 2) | (length <= tiny * (1 + t.abs()))
            inside = (newton >= low) & (newton <= high)
            new = torch.where(quick & inside, newton, (low + high) / 2)
            t, step = new, (new - t).abs()
        # A solution at the bracket's very end: Newton steps there fall outside and were halved.
        value, slope = f(best)
        last = (best - (value - target) / slope).clamp(lower, upper)
        best = torch.where((f(last)[0] - target).abs() < smallest, last, best)
    value, slope = f(best)
    error = value - target
    # Zero in value: where f is flat a real step on a rounding error would leave the bracket.
    return best - (error - error.detach()) / slope.detach().clamp_min(torch.finfo(best.dtype).eps)
