"""Every kind of bijection by name: what builds it, and the shape of its event."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from nflib import models
from nflib.autoregressive import MaskedAutoregressive
from nflib.convolution import CausalConv, EmergingConv, Invertible1x1Conv, PeriodicConv
from nflib.core import Flow, Inverse, Layer
from nflib.coupling import Coupling, Network, channels, checkerboard, halves
from nflib.dequantization import Logit
from nflib.elementwise import (
    Additive,
    Affine,
    Elementwise,
    LogisticMixtureCDF,
    MonotoneNet,
    Pointwise,
    RationalQuadraticSpline,
)
from nflib.linear import (
    LU,
    BlockDiagonal,
    Dense,
    Diagonal,
    Householder,
    Permutation,
    Triangular,
)
from nflib.multiscale import Squeeze
from nflib.nets import MLP, ConvNet, GatedConvNet, ResidualConvNet
from nflib.normalization import ActNorm, BatchNorm
from nflib.planar import Planar, Radial, Sylvester

Make = Callable[[], Layer]

VECTOR, IMAGE = 6, (2, 4, 4)
MAPS: dict[str, Elementwise] = {
    "additive": Additive(),
    "affine": Affine(),
    "spline": RationalQuadraticSpline(4),
    "mixture": LogisticMixtureCDF(3),
    "monotone": MonotoneNet(3, 2),
}
NETS: dict[str, Network] = {
    "convolutions": partial(ConvNet, hidden=6),
    "residual": partial(ResidualConvNet, hidden=(6,)),
    "gated": partial(GatedConvNet, hidden=4, blocks=1, heads=2),
}
mlp = partial(MLP, hidden=(8,))
maf = partial(MaskedAutoregressive, hidden=(9, 9))


def model(build: Callable[..., Flow]) -> Make:
    return lambda: build().bijection


VECTORS: dict[str, Make] = {
    "dense": lambda: Dense(VECTOR),
    "diagonal": lambda: Diagonal(VECTOR),
    "triangular": lambda: Triangular(VECTOR),
    "block diagonal": lambda: BlockDiagonal(VECTOR, 3),
    "lu": lambda: LU(VECTOR),
    "permutation": lambda: Permutation(VECTOR),
    "householder": lambda: Householder(VECTOR),
    "planar": lambda: Planar(VECTOR),
    "radial": lambda: Radial(VECTOR),
    "sylvester": lambda: Sylvester(VECTOR, 2),
    "actnorm": lambda: ActNorm(VECTOR),
    "batchnorm": lambda: BatchNorm(VECTOR),
    "pointwise spline": lambda: Pointwise(MAPS["spline"], VECTOR),
    **{f"{n} coupling": partial(Coupling, halves(VECTOR), tau, mlp) for n, tau in MAPS.items()},
    **{f"{n} maf": partial(maf, VECTOR, tau) for n, tau in MAPS.items() if n != "additive"},
    "residual maf": partial(maf, VECTOR, Affine(), residual=True),
    "jacobi maf": partial(maf, VECTOR, Affine(), solver="jacobi"),
    "iaf layer": lambda: Inverse(maf(VECTOR, Affine())),
    "nice": model(partial(models.nice, VECTOR, 2, (8, 8))),
    "realnvp of vectors": model(partial(models.realnvp, VECTOR, 4, (8, 8))),
    "spline flow": model(partial(models.spline_flow, VECTOR, 2, 4, (8, 8))),
    "naf": model(partial(models.naf, VECTOR, 2, 3, (8, 8))),
    "maf": model(partial(models.maf, VECTOR, 2, (9, 9))),
}
IMAGES: dict[str, Make] = {
    "1x1 convolution": lambda: Invertible1x1Conv(2),
    "periodic convolution": lambda: PeriodicConv(2),
    "causal convolution": lambda: CausalConv(2),
    "emerging convolution": lambda: EmergingConv(2),
    "actnorm of images": lambda: ActNorm(2),
    "squeeze": lambda: Squeeze(),
    "logit": lambda: Logit(),
    **{f"channels, {n}": partial(Coupling, channels(2), Affine(), net) for n, net in NETS.items()},
    "board, mixture": lambda: Coupling(checkerboard(*IMAGE), MAPS["mixture"], NETS["convolutions"]),
    "realnvp of images": model(partial(models.realnvp, IMAGE, 4, (8,))),
    "glow": model(partial(models.glow, IMAGE, 2, 2, 8)),
    "flow++": model(partial(models.flowpp, IMAGE, 8, 1, couplings=(2, 2, 2))),
    "mixerflow": model(partial(models.mixerflow, IMAGE, 2, 2, (8,))),
    "mixerflow of maf flows": model(partial(models.mixerflow, IMAGE, 2, 2, (8,), flow="maf")),
}
EVENTS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "realnvp of images, wide": (model(partial(models.realnvp, (1, 8, 8))), (1, 8, 8)),
    **{name: (make, (VECTOR,)) for name, make in VECTORS.items()},
    **{name: (make, IMAGE) for name, make in IMAGES.items()},
}
