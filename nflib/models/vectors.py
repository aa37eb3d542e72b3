"""Flows of vectors: NICE, spline flow, NAF, MAF, IAF."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

from nflib.arguments import ContextShape, EventSizes, Levels, Positive, Share, Size, Widths
from nflib.autoregressive import MaskedAutoregressive
from nflib.core import Compose, Flow, Inverse, Layer, StandardLogistic, StandardNormal
from nflib.coupling import Coupling, alternating
from nflib.elementwise import Additive, Affine, Elementwise, MonotoneNet, RationalQuadraticSpline
from nflib.linear import Diagonal
from nflib.models.parts import (
    LIMIT,
    Normalization,
    dequantize,
    linear_couplings,
    model,
    normalize,
    vector,
)
from nflib.nets import MLP
from nflib.normalization import ActNorm

Order = Literal["reversed", "random"]


@model
def nice(
    dim: EventSizes,
    layers: Size = 4,
    hidden: Widths = (128, 128),
    *,
    context_dim: ContextShape = None,
    dropout: Share = 0.0,
    grey_levels: Levels | None = None,
) -> Flow:
    """NICE: additive couplings on alternating halves, then a learned diagonal; logistic base.

    Dinh et al. 2014, https://arxiv.org/abs/1410.8516 (there: 4 couplings of 5 hidden layers of
    1000 units, no logit).

    Args:
        dim: number of dimensions.
        layers: number of couplings.
        hidden: widths of the conditioners' hidden layers.
        context_dim, dropout, grey_levels: see `realnvp`.
    """
    dim = vector("nice", dim, 2)
    net = partial(MLP, hidden=hidden, context_dim=context_dim, dropout=dropout)
    couplings = [
        Coupling(alternating(dim, flip=k % 2 == 1), Additive(), net) for k in range(layers)
    ]
    steps = [*dequantize(grey_levels), ActNorm(dim), *couplings, Diagonal(dim)]
    return Flow(Compose(*steps), StandardLogistic(dim))


@model
def spline_flow(
    dim: EventSizes,
    layers: Size = 5,
    bins: Size = 8,
    hidden: Widths = (128, 128),
    *,
    limit: Positive = 4.0,
    context_dim: ContextShape = None,
    dropout: Share = 0.0,
    grey_levels: Levels | None = None,
) -> Flow:
    """Rational-quadratic spline couplings with LU linear layers between them.

    Durkan et al. 2019, https://arxiv.org/abs/1906.04032, the coupling variant.

    Args:
        dim: number of dimensions.
        layers: number of couplings.
        bins: of each spline.
        hidden: widths of the conditioners' hidden layers.
        limit: the splines bend within [-limit, limit].
        context_dim, dropout, grey_levels: see `realnvp`.
    """
    dim = vector("spline_flow", dim, 2)
    net = partial(MLP, hidden=hidden, context_dim=context_dim, dropout=dropout)
    spline = RationalQuadraticSpline(bins, limit)
    return Flow(
        Compose(*dequantize(grey_levels), *linear_couplings(dim, layers, spline, net)),
        StandardNormal(dim),
    )


@model
def naf(
    dim: EventSizes,
    layers: Size = 4,
    units: Size = 8,
    hidden: Widths = (128, 128),
    *,
    depth: Size = 2,
    context_dim: ContextShape = None,
    dropout: Share = 0.0,
    grey_levels: Levels | None = None,
) -> Flow:
    """Couplings whose elementwise map is a monotone network (deep sigmoidal flow).

    Huang et al. 2018, https://arxiv.org/abs/1804.00779; their conditioner is autoregressive, this
    one sees half of the dimensions, so that both directions are fast.

    Args:
        dim: number of dimensions.
        layers: number of couplings.
        units: sigmoid units in each layer of the monotone network.
        hidden: widths of the conditioners' hidden layers.
        depth: layers of the monotone network.
        context_dim, dropout, grey_levels: see `realnvp`.
    """
    dim = vector("naf", dim, 2)
    net = partial(MLP, hidden=hidden, context_dim=context_dim, dropout=dropout)
    monotone = MonotoneNet(units, depth)
    return Flow(
        Compose(*dequantize(grey_levels), *linear_couplings(dim, layers, monotone, net)),
        StandardNormal(dim),
    )


@model
def maf(
    dim: EventSizes,
    layers: Size = 5,
    hidden: Widths = (128, 128),
    *,
    elementwise: Elementwise | None = None,
    order: Order = "reversed",
    residual: bool = False,
    normalization: Normalization = "actnorm",
    context_dim: ContextShape = None,
    dropout: Share = 0.0,
    grey_levels: Levels | None = None,
) -> Flow:
    """Masked autoregressive flow: each layer moves every dimension, given the ones before it.

    ``log_prob`` costs one pass through the networks; a sample takes D short steps in each layer,
    see `MaskedAutoregressive`. Papamakarios et al. 2017, https://arxiv.org/abs/1705.07057 (there:
    batch norm).

    Args:
        dim: number of dimensions.
        layers: number of autoregressive layers.
        hidden: widths of the conditioners' hidden layers.
        elementwise: another map in the place of the affine one, e.g. a spline.
        order: ``"reversed"`` in every other layer, as in the paper, or ``"random"`` in each.
        residual: conditioners with shortcuts, see `MADE`.
        normalization: ``"actnorm"`` or ``"batchnorm"``, before each layer.
        context_dim, dropout, grey_levels: see `realnvp`.
    """
    dim = vector("maf", dim)
    orders = ["random"] * 2 if order == "random" else [None, range(dim - 1, -1, -1)]
    limit = LIMIT if grey_levels else math.inf
    tau = elementwise or Affine()
    make = partial(MaskedAutoregressive, dim, tau, hidden, context_dim, limit=limit)
    steps: list[Layer] = dequantize(grey_levels)
    for k in range(layers):
        layer = make(order=orders[k % 2], residual=residual, dropout=dropout)
        steps += [normalize(dim, normalization), layer]
    return Flow(Compose(*steps), StandardNormal(dim))


@model
def iaf(
    dim: EventSizes,
    layers: Size = 5,
    hidden: Widths = (128, 128),
    *,
    elementwise: Elementwise | None = None,
    order: Order = "reversed",
    residual: bool = False,
    normalization: Normalization = "actnorm",
    context_dim: ContextShape = None,
    dropout: Share = 0.0,
    grey_levels: Levels | None = None,
) -> Flow:
    """Inverse autoregressive flow: `maf` with each layer read backwards.

    A sample, with its log-density, costs one pass through the networks; ``log_prob`` of given data
    takes D short steps in each layer. Kingma et al. 2016, https://arxiv.org/abs/1606.04934 (there
    as the posterior of a variational autoencoder, whose samples are its own).

    Args: those of `maf`.
    """
    flow = maf(
        vector("iaf", dim),
        layers,
        hidden,
        elementwise=elementwise,
        order=order,
        residual=residual,
        normalization=normalization,
        context_dim=context_dim,
        dropout=dropout,
        grey_levels=grey_levels,
    )
    assert isinstance(flow.bijection, Compose)
    steps = [Inverse(s) if isinstance(s, MaskedAutoregressive) else s for s in flow.bijection]
    return Flow(Compose(*steps), flow.base)
