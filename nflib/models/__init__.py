"""The papers' models as compositions: each function builds a `Flow` from parts of nflib.

A shape of one number, or an int, builds the vector version, a shape ``(channels, height, width)``
the image version. With ``grey_levels=k`` the flow takes integers 0 .. k-1, which it dequantizes,
and ``log_prob`` is a lower bound in nats for them; without, it takes reals and is exact.
``context_dim`` is the size of a context vector, or for images the shape of an image of context,
that every conditioner sees.

    model        elementwise map        linear part           dequantization   several scales
    nice         additive               diagonal, at the end  uniform          no
    realnvp      affine                 permutations          uniform          yes (images)
    spline_flow  rational-quadratic     LU                    uniform          no
    naf          monotone network       LU                    uniform          no
    maf, iaf     affine, autoregressive reversed order        uniform          no
    glow         affine                 1x1 convolutions      uniform          yes
    flowpp       mixture-logistic CDF   1x1 convolutions      variational      yes
    mixerflow    affine, in matrices    LU, along both sides  uniform          no
    cinn         affine                 permutations or 1x1   uniform          yes (images)
    srflow       affine                 1x1 convolutions      uniform          yes
    residual_flow  x + g(x), contraction  none                uniform          if asked (images)
    ferumal      affine, kernel machines  permutations or LU  uniform          no
"""

from nflib.models.conditional import cinn
from nflib.models.images import flowpp, glow, realnvp
from nflib.models.kernelised import ferumal
from nflib.models.mixer import mixerflow
from nflib.models.parts import dequantize, normalize
from nflib.models.residual import residual_flow
from nflib.models.super_resolution import srflow
from nflib.models.vectors import iaf, maf, naf, nice, spline_flow

__all__ = [
    "cinn",
    "dequantize",
    "ferumal",
    "flowpp",
    "glow",
    "iaf",
    "maf",
    "mixerflow",
    "naf",
    "nice",
    "normalize",
    "realnvp",
    "residual_flow",
    "spline_flow",
    "srflow",
]
