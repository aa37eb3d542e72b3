"""The `Dataset` that every loader returns, and the checks on data that training relies on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class DataError(ValueError):
    """A data set that is unknown, missing, damaged or unusable; the message says what to do."""


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """One split of a data set.

    x: the data, first dimension the examples. Images are uint8 (N, C, H, W), tables and 2-D
        points float32 (N, D), waveforms int16 (N, T).
    y: class index (int64) or target (float32) of each example, or None.
    levels: number of grey levels when x counts (x is in 0..levels-1), or None.
    mean, std: for standardised tables, the statistics of the training split, shape (D,);
        the original units are ``x * std + mean``.
    lengths: for waveforms, the number of valid samples of each row; zeros follow them.
    """

    x: Tensor
    y: Tensor | None
    levels: int | None
    name: str
    split: str
    mean: Tensor | None = None
    std: Tensor | None = None
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    def __repr__(self) -> str:
        parts = [f"x {_kind(self.x)}"]
        if self.y is not None:
            parts.append(f"y {_kind(self.y)}")
        if self.levels is not None:
            parts.append(f"{self.levels} levels")
        return f"Dataset({self.name}, {self.split}: {', '.join(parts)})"


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


def check_finite(x: Tensor, name: str = "x") -> Tensor:
    """Return x, or raise DataError that names the first row with a NaN or an infinity."""
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


def check(x: Tensor, name: str = "x", levels: int | None = None) -> Tensor:
    """Return x if a model can be trained on it, else raise DataError in one sentence.

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
        low, high = x.min().item(), x.max().item()
        whole = not x.is_floating_point() or bool((x == x.round()).all())
        if low < 0 or high > levels - 1 or not whole:
            raise DataError(
                f"{name} must hold whole numbers in 0..{levels - 1}, got values from {low:g} to "
                f"{high:g}{'' if whole else ' with fractions'}."
            )
    return x
