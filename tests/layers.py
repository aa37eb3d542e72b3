"""Every bijection of nflib by name: a constructor, its event shape and its context's size.

A new layer joins all generic tests with one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nflib.convolution import CausalConv, EmergingConv, Invertible1x1Conv, PeriodicConv
from nflib.core import Bijection, Compose, Inverse
from nflib.linear import (
    LU,
    BlockDiagonal,
    Dense,
    Diagonal,
    Householder,
    Permutation,
    Triangular,
)
from nflib.planar import Planar, Radial, Sylvester


class Case(NamedTuple):
    make: Callable[[], Bijection]
    event: tuple[int, ...]
    context: int | None = None

    def inputs(self, batch: int = 4) -> tuple[Tensor, Tensor | None]:
        context = None if self.context is None else torch.randn(batch, self.context)
        return torch.randn(batch, *self.event), context


LAYERS: dict[str, Case] = {
    "dense": Case(lambda: Dense(4), (4,)),
    "dense without bias": Case(lambda: Dense(4, bias=False), (4,)),
    "diagonal": Case(lambda: Diagonal(4), (4,)),
    "triangular": Case(lambda: Triangular(4), (4,)),
    "upper triangular": Case(lambda: Triangular(4, upper=True), (4,)),
    "block diagonal": Case(lambda: BlockDiagonal(6, 3), (6,)),
    "lu": Case(lambda: LU(4), (4,)),
    "permutation": Case(lambda: Permutation(4), (4,)),
    "permutation of channels": Case(lambda: Permutation([2, 0, 1]), (3, 2, 2)),
    "householder": Case(lambda: Householder(4), (4,)),
    "householder of 2": Case(lambda: Householder(4, 2), (4,)),
    "planar": Case(lambda: Planar(3), (3,)),
    "planar with context": Case(lambda: Planar(3, context_dim=2), (3,), 2),
    "radial": Case(lambda: Radial(3), (3,)),
    "radial with context": Case(lambda: Radial(3, context_dim=2), (3,), 2),
    "sylvester": Case(lambda: Sylvester(3), (3,)),
    "sylvester of rank 2": Case(lambda: Sylvester(4, 2), (4,)),
    "sylvester with context": Case(lambda: Sylvester(3, 2, context_dim=2), (3,), 2),
    "1x1 lu": Case(lambda: Invertible1x1Conv(3), (3, 2, 3)),
    "1x1 dense": Case(lambda: Invertible1x1Conv(3, "dense", bias=True), (3, 2, 3)),
    "periodic, even width": Case(lambda: PeriodicConv(2), (2, 3, 4)),
    "periodic, odd width": Case(lambda: PeriodicConv(2), (2, 4, 3)),
    "periodic, kernel 1": Case(lambda: PeriodicConv(2, 1), (2, 1, 1)),
    "causal": Case(lambda: CausalConv(2), (2, 3, 4)),
    "causal, reverse": Case(lambda: CausalConv(2, reverse=True), (2, 4, 3)),
    "emerging": Case(lambda: EmergingConv(2), (2, 3, 4)),
    "emerging, kernel 5": Case(lambda: EmergingConv(2, 5), (2, 4, 3)),
    "inverse": Case(lambda: Inverse(Radial(3)), (3,)),
    "compose": Case(lambda: Compose(LU(3), Planar(3), Inverse(Radial(3, context_dim=2))), (3,), 2),
    "identity": Case(lambda: Compose(), (3,)),
}
