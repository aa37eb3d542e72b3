"""Residual flows."""

from __future__ import annotations

import math
from typing import Literal

from nflib.arguments import ContextShape, EventSizes, Levels, Size, Widths
from nflib.core import Bijection, Compose, Flow, Layer, Shape, StandardNormal
from nflib.models.parts import dequantize, halvings, model, vector
from nflib.multiscale import MultiScale, Squeeze
from nflib.normalization import ActNorm
from nflib.residual import Exact, LipschitzConvNet, LipschitzMLP, LogDet, ResidualBlock
from nflib.residual.lipschitz import Contraction


@model
def residual_flow(
    shape: EventSizes,
    layers: Size = 8,
    hidden: Widths = (128, 128),
    *,
    levels: Size = 1,
    bound: Contraction = 0.97,
    log_det: LogDet | None = None,
    train_log_det: LogDet | None = None,
    solver: Literal["fixed point", "newton"] = "fixed point",
    context_dim: ContextShape = None,
    grey_levels: Levels | None = None,
) -> Flow:
    """Residual blocks ``x + g(x)``, g a contraction, with an ActNorm before each and at the end.

    No mask and no order: every dimension moves by a function of all of them. Images of several
    levels are squeezed after each level but the last, and half of the channels is factored out.
    Behrmann et al. 2019, https://arxiv.org/abs/1811.00995; Chen et al. 2019,
    https://arxiv.org/abs/1906.02735 (there: 16 blocks at each of three scales, hidden (512, 512)).

    Args:
        shape: number of dimensions, or (channels, height, width).
        layers: number of blocks; of an image, in each level.
        hidden: widths of the hidden layers of g, see `LipschitzMLP` and `LipschitzConvNet`.
        levels: number of scales of an image.
        bound: of the Lipschitz constant of each g.
        log_det: in evaluation, by default exact, with D backward passes for each block; above some
            hundred dimensions take ``Roulette(exact_terms=20)``.
        train_log_det: in training, by default ``Roulette()``, or exact for up to 4 dimensions,
            where that is cheaper.
        solver: of the inverse, see `ResidualBlock`.
        context_dim, grey_levels: see `realnvp`.
    """
    blocks = (log_det, train_log_det, solver)
    if not isinstance(shape, int) and len(shape) == 3:
        halvings("residual_flow", shape, levels, levels - 1)
        scales, (c, height, width) = [], shape
        for level in range(levels):
            here: Shape = (c, height, width)
            steps: list[Bijection] = []
            for _ in range(layers):
                conv = LipschitzConvNet(here, hidden, bound, context_dim)
                steps += [ActNorm(c), ResidualBlock(conv, *blocks)]
            is_last = level == levels - 1
            scales.append(Compose(*steps, ActNorm(c) if is_last else Squeeze()))
            c, height, width = 2 * c, height // 2, width // 2
        whole = Compose(*dequantize(grey_levels), MultiScale(shape, *scales))
        return Flow(whole, StandardNormal(math.prod(shape)))
    dim = vector("residual_flow", shape)
    if train_log_det is None and dim <= 4:
        blocks = (log_det, Exact(), solver)
    parts: list[Layer] = dequantize(grey_levels)
    for _ in range(layers):
        net = LipschitzMLP(dim, hidden, bound, context_dim)
        parts += [ActNorm(dim), ResidualBlock(net, *blocks)]
    return Flow(Compose(*parts, ActNorm(dim)), StandardNormal(dim))
