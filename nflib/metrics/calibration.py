"""How good the predicted distributions of a number are: PIT values, coverage and CRPS.

All three compare draws of a conditional model, ``model.sample((k,), context)``, with what came:

    draws = flow.sample((500,), context)    # (500, rows, 1)
    crps(draws, y).mean()                   # in the unit of y
    u = pit(draws, y)                       # uniform on [0, 1] if the model is calibrated
    coverage(u, torch.linspace(0, 1, 21))   # close to the levels, if it is

A log-likelihood judges the density where y lies; these judge where the mass lies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nflib.arguments import ArgumentError, checked
from nflib.core import check_finite


@checked
def crps(draws: Tensor, y: Tensor) -> Tensor:
    """The continuous ranked probability score of each entry of y, of y's shape; lower is better.

        CRPS(F, y) = E|X - y| - 1/2 E|X - X'| = int (F(x) - 1[x >= y])^2 dx,    X, X' ~ F

    In the unit of y; of a prediction that is a single number it is the absolute error. For a
    normal distribution of deviation s it is about 0.23 s at its centre. Both means are taken over
    the draws, the second over pairs of different ones, so the score of k draws has no bias. Cost:
    a sort of the draws, O(k log k). Gneiting & Raftery 2007, https://doi.org/10.1198/016214506000001437;
    without bias: Ferro 2014, https://doi.org/10.1002/qj.2270.

    Args:
        draws: k >= 2 draws from each prediction, ``(k, *y.shape)``.
        y: what came.
    """
    k = _draws("crps", draws, y, 2)
    error = (draws - y).abs().mean(0)
    # The i-th of the sorted draws is the larger one of i pairs and the smaller one of k - 1 - i.
    rank = torch.arange(k, dtype=draws.dtype, device=draws.device)
    weights = (2 * rank - (k - 1)) / (k * (k - 1))
    return error - torch.tensordot(weights, (draws - y).sort(0).values, 1)


@checked
def pit(draws: Tensor, y: Tensor) -> Tensor:
    """The predicted probability of less than y for each entry of y, of y's shape, within (0, 1).

        PIT = F(y), estimated from k draws by (number of draws below y + 1/2) / (k + 1)

    The probability integral transform. If y comes from F, each number of draws below y from 0 to k
    is equally likely, so that the values are uniform (on k + 1 places): their histogram is flat. It
    is a bowl if the predictions are too narrow, a hill if they are too wide. Draws equal to y count
    half. Gneiting, Balabdaoui & Raftery 2007, https://doi.org/10.1111/j.1467-9868.2007.00587.x.

    Args:
        draws: k draws from each prediction, ``(k, *y.shape)``.
        y: what came.
    """
    k = _draws("pit", draws, y, 1)
    below = (draws < y).to(draws.dtype).sum(0) + (draws == y).to(draws.dtype).sum(0) / 2
    return (below + 0.5) / (k + 1)


@checked
def coverage(pit: Tensor, levels: Tensor) -> Tensor:
    """The share of y that lies in the central interval of each level, of the shape of levels.

    The interval of level 0.9 goes from the 5 % quantile of the prediction to the 95 % quantile.
    Drawn over the levels, the shares lie on the diagonal if the model is calibrated, and below it
    if its intervals are too narrow. With n values the standard error is ``sqrt(p (1 - p) / n)``.

    Args:
        pit: the values that the function `pit` gives, or exact ones, of any shape.
        levels: within [0, 1].
    """
    for name, values in (("pit", pit), ("levels", levels)):
        inside = values.is_floating_point() and bool(((values >= 0) & (values <= 1)).all())
        if not inside or values.numel() == 0:
            raise ArgumentError(f"coverage expects {name} to be numbers within [0, 1].")
    # Twice the distance from the middle: the level whose interval ends at y.
    needed = (2 * pit.flatten() - 1).abs()
    return (needed <= levels.unsqueeze(-1)).to(levels.dtype).mean(-1)


def _draws(name: str, draws: Tensor, y: Tensor, least: int) -> int:
    """The number of draws, if they are of y."""
    if not draws.is_floating_point() or draws.ndim < 1 or draws.shape[1:] != y.shape:
        raise ArgumentError(
            f"{name} expects draws to be floating-point numbers of shape (k, *y.shape), so many "
            f"draws for each entry of y {tuple(y.shape)}, got {draws.dtype} {tuple(draws.shape)}."
        )
    if len(draws) < least:
        raise ArgumentError(f"{name} expects at least {least} draws for each y, got {len(draws)}.")
    check_finite(draws, "draws")
    check_finite(y, "y")
    return len(draws)
