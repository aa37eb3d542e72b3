"""The `Dataset` that every loader returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
