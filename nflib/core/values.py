"""Values: checks of data, and a clamp.

The checks read every value, so they run once for a data set, never in a step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


class DataError(ValueError):
    """A data set that is unknown, missing, damaged or unusable; the message says what to do."""


def check_finite(x: Tensor, name: str = "x") -> Tensor:
    """Return x, or raise `DataError` that names the first row with a NaN or an infinity."""
    if not (x.is_floating_point() or x.is_complex()):
        return x
    bad = ~torch.isfinite(x)
    if bad.any():
        row = int(bad.reshape(len(x), -1).any(1).nonzero()[0]) if x.ndim else 0
        raise DataError(
            f"{name} must be finite, but {int(bad.sum())} of its {x.numel()} values are NaN or "
            f"infinite, the first in row {row}."
        )
    return x


def check_values(x: Tensor, name: str = "x", levels: int | None = None) -> Tensor:
    """Return x if a model can be trained on it, else raise `DataError` in one sentence.

    x must be a tensor of at least one example, first dimension the batch, with finite floating
    point or integer values; with `levels`, its values must be whole numbers in 0..levels-1.
    """
    if not isinstance(x, Tensor):
        raise DataError(f"{name} must be a torch.Tensor, got {type(x).__name__}.")
    if x.ndim < 2:
        raise DataError(
            f"{name} must have the examples in dimension 0 and their values in the others, "
            f"got shape {tuple(x.shape)}."
        )
    if x.numel() == 0:
        raise DataError(f"{name} is empty: it has shape {tuple(x.shape)}.")
    if x.dtype == torch.bool or x.is_complex():
        raise DataError(f"{name} must hold floating point or integer numbers, got {x.dtype}.")
    check_finite(x, name)
    if levels is not None:
        check_levels(x, name, levels)
    return x


def check_levels(x: Tensor, name: str, levels: int, lowest: int = 0) -> None:
    """Raise `DataError` unless x holds whole numbers in lowest..levels-1."""
    if x.numel() == 0:
        return
    low, high = x.min().item(), x.max().item()
    is_whole = not x.is_floating_point() or bool((x == x.round()).all())
    if low < lowest or high > levels - 1 or not is_whole:
        raise DataError(
            f"{name} must hold whole numbers in 0..{levels - 1}, got values from {low:g} to "
            f"{high:g}{'' if is_whole else ' with fractions'}."
        )


def within(x: Tensor, limit: float) -> Tensor:
    """x clamped to [-limit, limit]; an infinite limit is none."""
    # The gradient of torch's clamp is five operations, that of its hardtanh one.
    return x if math.isinf(limit) else F.hardtanh(x, -limit, limit)
