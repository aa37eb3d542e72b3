"""Where a part runs: the device, its folders, its time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.clock import Clock
from nflib import data

PATCHES = 8192  # of photographs, as many as the largest batch


@dataclass(frozen=True)
class Place:
    """What every part is given.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        small: whether sizes are for one core of a CPU.
        out: the folder of results.
        runs: the folder of running trainings, for this part alone.
        clock: when to stop.
    """

    device: str
    small: bool
    out: Path
    runs: Path
    clock: Clock

    @property
    def has_graphs(self) -> bool:
        """Whether work can be recorded and replayed."""
        return self.device == "cuda"

    def photographs(self, n: int, split: str = "train", channels: int = 1) -> Tensor:
        """Patches of photographs: grey ones in the size of MNIST, colour ones of 32 x 32."""
        x = _patches(split, channels)
        return x[:n].to(self.device)

    def wait(self) -> None:
        """Until the device has done what was asked; a CPU always has."""
        if self.device == "cuda":
            torch.cuda.synchronize()


@cache
def _patches(split: str, channels: int) -> Tensor:
    x = data.load("photo_patches", split, size=32, channels=channels, n=PATCHES).x
    return x[..., 2:30, 2:30].contiguous() if channels == 1 else x
