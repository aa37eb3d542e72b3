"""Kernelised flows."""

from __future__ import annotations

from functools import partial
from typing import Literal

from nflib.arguments import ContextShape, EventSizes, Levels, Size
from nflib.core import Compose, Flow, StandardNormal
from nflib.elementwise import Affine
from nflib.kernels import KernelConditioner, MakesKernel, SquaredExponential
from nflib.models.parts import dequantize, linear_couplings, model, permuted_couplings, vector


@model
def ferumal(
    dim: EventSizes,
    points: Size = 150,
    layers: Size = 8,
    *,
    backbone: Literal["realnvp", "glow"] = "realnvp",
    kernel: MakesKernel = SquaredExponential,
    context_dim: ContextShape = None,
    grey_levels: Levels | None = None,
) -> Flow:
    """Ferumal flow: affine couplings whose conditioners are kernel machines, not networks.

    Each of them has N auxiliary points, which `nflib.train.fit` starts at rows of the data, as the
    couplings see them. Scales and shifts share the points and have length scales of their own. A
    coupling that keeps d_A numbers, moves d_B and sees K numbers of context has
    ``(N + 2) (d_A + K) + 2 N d_B`` parameters. English et al. 2023,
    https://arxiv.org/abs/2307.14839.

    Args:
        dim: number of dimensions.
        points: number N of auxiliary points in each coupling.
        layers: number of couplings.
        backbone: what stands around a coupling: ``"realnvp"``, an actnorm before it and a fixed
            permutation after each pair, or ``"glow"``, an actnorm and an LU layer before it.
        kernel: of `nflib.kernels`, e.g. `nflib.kernels.Matern52`.
        context_dim, grey_levels: see `realnvp`.
    """
    dim = vector("ferumal", dim, 2)
    tau = Affine()
    net = partial(
        KernelConditioner, points=points, kernel=kernel, groups=tau.count, context_dim=context_dim
    )
    around = {"realnvp": permuted_couplings, "glow": linear_couplings}[backbone]
    steps = around(dim, layers, tau, net)
    return Flow(Compose(*dequantize(grey_levels), *steps), StandardNormal(dim))
