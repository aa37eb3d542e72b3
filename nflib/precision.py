"""bfloat16 where it pays: which conditioners follow autocast, and which stay in float32.

Casting a matrix of activations costs reading and writing it once more; what it saves is part of the
time of the product. Per number read, a product with a ``d x d`` matrix does d multiplications, so a
wide network gains and a narrow one loses. A GPU that starts every cast as a kernel of its own loses
more: a MixerFlow with networks from 14 numbers by way of 128 to 28 took 34 ms a step in bfloat16
and 23 ms in float32 (one H200, eager). Where the gain begins has not been measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nflib.core import full_precision

# Rows and columns that some matrix of a network has at least, if it is to run in bfloat16.
WIDE = 128


def is_wide(matrices: Iterable[tuple[int, int]]) -> bool:
    """Whether one of these matrices has at least `WIDE` rows and columns."""
    return any(min(sizes) >= WIDE for sizes in matrices)


def matrices_of(network: nn.Module) -> list[tuple[int, int]]:
    """Rows and columns of a network's matrices.

    A convolution counts as the matrix from the numbers under its kernel to its outputs.
    """
    return [(len(p), p[0].numel()) for p in network.parameters() if p.ndim > 1]


def of_network(follows_autocast: bool, x: Tensor) -> AbstractContextManager[Any]:
    """The context to call a network in: as it is, or with autocast turned off."""
    if follows_autocast or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return full_precision(x)
