"""Every bijection of nflib by name: a constructor, its event shape and its context's size.

A new layer joins all generic tests with one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nflib.autoregressive import MaskedAutoregressive
from nflib.conditioning import Conditioned
from nflib.convolution import CausalConv, EmergingConv, Invertible1x1Conv, PeriodicConv
from nflib.core import Bijection, Compose, Inverse
from nflib.coupling import Coupling, Injector, alternating, channels, checkerboard, halves
from nflib.dequantization import Logit
from nflib.elementwise import (
    Additive,
    Affine,
    LogisticMixtureCDF,
    MonotoneNet,
    Pointwise,
    RationalQuadraticSpline,
)
from nflib.kernels import KernelConditioner, Matern52
from nflib.linear import (
    LU,
    BlockDiagonal,
    Dense,
    Diagonal,
    Householder,
    Permutation,
    Triangular,
)
from nflib.multiscale import MultiScale, Squeeze
from nflib.nets import MLP, ConvNet, GatedConvNet, ResidualConvNet
from nflib.normalization import ActNorm, BatchNorm
from nflib.planar import Planar, Radial, Sylvester
from nflib.residual import LipschitzConvNet, LipschitzMLP, ResidualBlock


class Case(NamedTuple):
    """A layer's constructor, its event and context, and what draws its inputs."""

    make: Callable[[], Bijection]
    event: tuple[int, ...]
    context: int | None = None
    draw: Callable[..., Tensor] = torch.randn

    def inputs(self, batch: int = 4) -> tuple[Tensor, Tensor | None]:
        context = None if self.context is None else torch.randn(batch, self.context)
        return self.draw(batch, *self.event), context


affine, spline = Affine(), RationalQuadraticSpline(4)
mixture, monotone = LogisticMixtureCDF(3), MonotoneNet(3, 2)

# Small networks, and the same with a context of 2 numbers.
mlp, conv = partial(MLP, hidden=(8,)), partial(ConvNet, hidden=6)
residual = partial(ResidualConvNet, hidden=(6,))
gated = partial(GatedConvNet, hidden=4, blocks=1, heads=2)
mlp2, conv2, residual2, gated2 = (partial(n, context_dim=2) for n in (mlp, conv, residual, gated))

# Kernel machines; of the second the outputs share their length scales.
kernel = partial(KernelConditioner, points=6, groups=2)
kernel2 = partial(KernelConditioner, points=6, kernel=Matern52, context_dim=2)

# Masks of images: odd and even sizes, none of them square.
board, board2 = checkerboard(1, 3, 5), checkerboard(2, 3, 2, flip=True)
three, four = channels(3), channels(4, flip=True)


# Autoregressive layers with two hidden layers of odd widths.
maf = partial(MaskedAutoregressive, hidden=(9, 7))


def two_scales(context: int | None = None) -> MultiScale:
    """One channel, then 2 of 4: a coupling that splits channels, and one on a checkerboard."""
    net = partial(conv, context_dim=context)
    first = Compose(ActNorm(1), Squeeze(), Coupling(channels(4), affine, net))
    return MultiScale((1, 4, 6), first, Coupling(checkerboard(2, 2, 3), affine, net))


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
    "additive coupling": Case(lambda: Coupling(halves(5), Additive(), mlp), (5,)),
    "additive coupling, context": Case(lambda: Coupling(halves(5), Additive(), mlp2), (5,), 2),
    "affine coupling": Case(lambda: Coupling(halves(5, flip=True), affine, mlp), (5,)),
    "affine coupling, context": Case(lambda: Coupling(halves(5, flip=True), affine, mlp2), (5,), 2),
    "spline coupling": Case(lambda: Coupling(alternating(5), spline, mlp), (5,)),
    "spline coupling, context": Case(lambda: Coupling(alternating(4, True), spline, mlp2), (4,), 2),
    "mixture coupling": Case(lambda: Coupling(halves(3), mixture, mlp), (3,)),
    "mixture coupling, context": Case(lambda: Coupling(halves(3), mixture, mlp2), (3,), 2),
    "monotone coupling": Case(lambda: Coupling(halves(3), monotone, mlp), (3,)),
    "monotone coupling, context": Case(lambda: Coupling(halves(3), monotone, mlp2), (3,), 2),
    "kernel coupling": Case(lambda: Coupling(halves(5), affine, kernel), (5,)),
    "kernel coupling, context": Case(lambda: Coupling(alternating(4), spline, kernel2), (4,), 2),
    "board, conv": Case(lambda: Coupling(board, affine, conv), (1, 3, 5)),
    "board, conv, context": Case(lambda: Coupling(board2, affine, conv2), (2, 3, 2), 2),
    "board, residual": Case(lambda: Coupling(board2, spline, residual), (2, 3, 2)),
    "board, residual, context": Case(lambda: Coupling(board, spline, residual2), (1, 3, 5), 2),
    "board, gated": Case(lambda: Coupling(board, mixture, gated), (1, 3, 5)),
    "board, gated, context": Case(lambda: Coupling(board2, mixture, gated2), (2, 3, 2), 2),
    "channels, conv": Case(lambda: Coupling(three, affine, conv), (3, 2, 3)),
    "channels, conv, context": Case(lambda: Coupling(four, affine, conv2), (4, 3, 2), 2),
    "channels, residual": Case(lambda: Coupling(four, spline, residual), (4, 3, 2)),
    "channels, residual, context": Case(lambda: Coupling(three, spline, residual2), (3, 2, 3), 2),
    "channels, gated": Case(lambda: Coupling(three, mixture, gated), (3, 2, 3)),
    "channels, gated, context": Case(lambda: Coupling(four, mixture, gated2), (4, 3, 2), 2),
    "conditioned": Case(
        lambda: Conditioned(nn.Linear(3, 2), Coupling(halves(4), affine, mlp2), 3), (4,), 3
    ),
    "affine injector": Case(lambda: Injector(4, affine, mlp, 2), (4,), 2),
    "mixture injector": Case(lambda: Injector(3, mixture, mlp, 2), (3,), 2),
    "residual block": Case(lambda: ResidualBlock(LipschitzMLP(3, 6)), (3,)),
    "residual block, newton, context": Case(
        lambda: ResidualBlock(LipschitzMLP(3, 6, context_dim=2), solver="newton"), (3,), 2
    ),
    "residual block of an image": Case(
        lambda: ResidualBlock(LipschitzConvNet((2, 3, 2), 4)), (2, 3, 2)
    ),
    "affine maf": Case(lambda: maf(5, affine), (5,)),
    "affine maf, context": Case(lambda: maf(4, affine, context_dim=2), (4,), 2),
    "spline maf, random order": Case(lambda: maf(5, spline, order="random"), (5,)),
    "mixture maf": Case(lambda: maf(3, mixture), (3,)),
    "monotone maf, context": Case(lambda: maf(3, monotone, context_dim=2), (3,), 2),
    "residual maf": Case(
        lambda: maf(5, spline, hidden=(8,), order=[4, 2, 0, 1, 3], residual=True), (5,)
    ),
    "residual maf, context": Case(
        lambda: maf(4, affine, hidden=(8, 8), context_dim=2, residual=True), (4,), 2
    ),
    "jacobi maf": Case(lambda: maf(5, affine, order="random", solver="jacobi"), (5,)),
    "jacobi maf, context": Case(lambda: maf(4, spline, context_dim=2, solver="jacobi"), (4,), 2),
    "more dimensions than units": Case(lambda: maf(11, affine, hidden=(8, 6)), (11,)),
    "iaf": Case(lambda: Inverse(maf(5, affine)), (5,)),
    "iaf, context": Case(lambda: Inverse(maf(4, spline, context_dim=2)), (4,), 2),
    "pointwise spline": Case(lambda: Pointwise(spline, 3), (3,)),
    "pointwise affine of an image": Case(lambda: Pointwise(affine, (2, 2, 3)), (2, 2, 3)),
    "actnorm": Case(lambda: ActNorm(3), (3,)),
    "actnorm of an image": Case(lambda: ActNorm(2), (2, 3, 2)),
    "batchnorm": Case(lambda: BatchNorm(3), (3,)),
    "batchnorm of an image": Case(lambda: BatchNorm(2), (2, 3, 2)),
    "squeeze": Case(lambda: Squeeze(), (2, 4, 2)),
    "squeeze by 3": Case(lambda: Squeeze(3), (1, 3, 6)),
    "multi-scale": Case(lambda: two_scales(), (1, 4, 6)),
    "multi-scale with context": Case(lambda: two_scales(2), (1, 4, 6), 2),
    "logit": Case(lambda: Logit(), (3,), draw=torch.rand),
    "logit of an image": Case(lambda: Logit(0.05), (1, 2, 3), draw=torch.rand),
    "inverse": Case(lambda: Inverse(Radial(3)), (3,)),
    "compose": Case(lambda: Compose(LU(3), Planar(3), Inverse(Radial(3, context_dim=2))), (3,), 2),
    "identity": Case(lambda: Compose(), (3,)),
}

# One search for an inverse takes long to compile; one of them stands for all. That of a residual
# block is left out of any graph.
SLOW_TO_COMPILE = {
    n for n in LAYERS if any(w in n for w in ("mixture", "monotone", "gated", "residual block"))
}
SLOW_TO_COMPILE.remove("mixture coupling")
