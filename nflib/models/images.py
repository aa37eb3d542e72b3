"""Flows of images: RealNVP (of vectors, too), Glow, Flow++."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

from nflib.arguments import (
    ArgumentError,
    ContextShape,
    Count,
    EventSizes,
    ImageShape,
    Levels,
    Share,
    Size,
    Widths,
    integer,
    show,
)
from nflib.convolution import Invertible1x1Conv
from nflib.core import Bijection, Compose, Flow, Layer, Shape, StandardNormal
from nflib.coupling import Coupling, Mask, Network, channels, checkerboard, halves
from nflib.dequantization import VariationalDequantization
from nflib.elementwise import Affine, Elementwise, LogisticMixtureCDF
from nflib.linear import Permutation
from nflib.models.parts import LIMIT, Normalization, dequantize, halvings, model, normalize, vector
from nflib.multiscale import MultiScale, Squeeze
from nflib.nets import MLP, ConvNet, GatedConvNet, ResidualConvNet, equal_widths
from nflib.normalization import ActNorm


@model
def realnvp(
    shape: EventSizes,
    layers: Size = 8,
    hidden: Widths = (128, 128),
    *,
    levels: Size = 2,
    normalization: Normalization = "actnorm",
    context_dim: ContextShape = None,
    dropout: Share = 0.0,
    grey_levels: Levels | None = None,
) -> Flow:
    """RealNVP: affine couplings, each followed by the one that moves the other half.

    Vectors: halves, and a random permutation after each pair of couplings. Images: in each level
    half of the couplings have checkerboard masks, then the image is squeezed and the others split
    its channels; half of the channels is factored out. The last level has checkerboards only.
    Dinh et al. 2016, https://arxiv.org/abs/1605.08803 (there: batch norm).

    Args:
        shape: number of dimensions, or (channels, height, width).
        layers: number of couplings; of an image, in each level.
        hidden: widths of the conditioners' hidden layers; for an image one residual block for each.
        levels: number of scales of an image.
        normalization: ``"actnorm"`` or ``"batchnorm"``, before each coupling.
        context_dim: size of the context vector, if any.
        dropout: of the conditioners.
        grey_levels: number of grey levels if the data are integers.
    """
    if not isinstance(shape, int) and len(shape) == 3:
        net = partial(ResidualConvNet, hidden=hidden, context_dim=context_dim, dropout=dropout)
        return _image_realnvp(shape, layers, levels, net, normalization, grey_levels)
    dim = vector("realnvp", shape, 2)
    mlp = partial(MLP, hidden=hidden, context_dim=context_dim, dropout=dropout)
    steps: list[Layer] = dequantize(grey_levels)
    for k in range(layers):
        if k % 2 == 0 and k > 0 and dim > 2:
            steps.append(Permutation(dim))
        steps += [normalize(dim, normalization), Coupling(halves(dim, k % 2 == 1), Affine(), mlp)]
    return Flow(Compose(*steps), StandardNormal(dim))


def _image_realnvp(
    shape: Shape,
    layers: int,
    levels: int,
    net: Network,
    normalization: Normalization,
    grey_levels: int | None,
) -> Flow:
    halvings("realnvp", shape, levels, levels - 1)

    def couplings(masks: Sequence[Mask], count: int) -> list[Bijection]:
        steps: list[Bijection] = []
        for mask in masks:
            steps += [normalize(count, normalization), Coupling(mask, Affine(), net, limit=LIMIT)]
        return steps

    scales, (c, height, width) = [], shape
    for level in range(levels):
        is_last = level == levels - 1
        boards = layers if is_last else layers - layers // 2
        board = [checkerboard(c, height, width, flip=k % 2 == 1) for k in range(boards)]
        split = [channels(4 * c, flip=k % 2 == 1) for k in range(layers - boards)]
        squeezed = [] if is_last else [Squeeze(), *couplings(split, 4 * c)]
        scales.append(Compose(*couplings(board, c), *squeezed))
        c, height, width = 2 * c, height // 2, width // 2
    whole = Compose(*dequantize(grey_levels), MultiScale(shape, *scales))
    return Flow(whole, StandardNormal(math.prod(shape)))


@model
def glow(
    shape: ImageShape,
    levels: Size = 2,
    steps: Size = 4,
    hidden: Widths = 128,
    *,
    elementwise: Elementwise | None = None,
    context_dim: ContextShape = None,
    dropout: Share = 0.0,
    grey_levels: Levels | None = None,
) -> Flow:
    """Glow: levels of a squeeze and steps of actnorm, invertible 1x1 convolution, affine coupling.

    After each level but the last half of the channels is factored out, with a learned prior given
    the other half. Kingma and Dhariwal 2018, https://arxiv.org/abs/1807.03039.

    Args:
        shape: channels, height and width; both sides multiples of 2^levels.
        levels: number of scales (the paper's L).
        steps: number of steps in each level (the paper's K).
        hidden: channels of the conditioners, the same in both hidden layers (the paper: 512).
        elementwise: another map in the place of the affine one, e.g. a spline.
        context_dim, dropout, grey_levels: see `realnvp`.
    """
    halvings("glow", shape, levels, levels)
    net = partial(ConvNet, hidden=hidden, context_dim=context_dim, dropout=dropout)
    tau = elementwise or Affine()
    scales, c = [], shape[0]
    for level in range(levels):
        c *= 4
        parts: list[Bijection] = [Squeeze()]
        for _ in range(steps):
            parts += [ActNorm(c), Invertible1x1Conv(c)]
            parts.append(Coupling(channels(c), tau, net, limit=LIMIT))
        if level < levels - 1:
            # The prior of what leaves here.
            parts.append(Coupling(channels(c), Affine(), net, limit=LIMIT))
        scales.append(Compose(*parts))
        c //= 2
    whole = Compose(*dequantize(grey_levels), MultiScale(shape, *scales))
    return Flow(whole, StandardNormal(math.prod(shape)))


@model
def flowpp(
    shape: ImageShape,
    hidden: Widths = 64,
    blocks: Size | None = None,
    *,
    components: Size = 8,
    couplings: Sequence[int] = (4, 2, 3),
    attention: Count = 4,
    elementwise: Elementwise | None = None,
    dequantization: Literal["variational", "uniform"] = "variational",
    noise_couplings: Size = 2,
    context_dim: ContextShape = None,
    dropout: Share = 0.0,
    grey_levels: Levels | None = None,
) -> Flow:
    """Flow++: mixture-logistic couplings, gated convolutions with attention, learned noise.

    Checkerboard couplings at full size, then a squeeze, couplings that split the channels, and
    checkerboards again. Ho et al. 2019, https://arxiv.org/abs/1902.00275 (there: 96 channels, 10
    blocks, 32 components).

    Args:
        shape: channels, height and width, both even.
        hidden: channels of the conditioners.
        blocks: gated blocks in each conditioner.
        components: logistic densities in each mixture.
        couplings: how many before the squeeze, how many split channels, how many checkerboards end.
        attention: number of heads; 0 leaves the attention out.
        elementwise: another map in the place of the mixture CDF, for comparison.
        dequantization: ``"variational"`` or ``"uniform"``.
        noise_couplings: couplings of the flow that makes the noise.
        context_dim, dropout, grey_levels: see `realnvp`.
    """
    first, split, last = three_counts(couplings)
    halvings("flowpp", shape, 2, 1)
    c, height, width = shape
    tau = elementwise or LogisticMixtureCDF(components)

    def network(size: tuple[int, int]) -> Network:
        gated = partial(GatedConvNet, hidden=hidden, blocks=blocks, heads=attention)
        return partial(gated, size=size, context_dim=context_dim, dropout=dropout)

    def step(mask: Mask, count: int, net: Network) -> list[Bijection]:
        return [ActNorm(count), Invertible1x1Conv(count), Coupling(mask, tau, net)]

    steps: list[Bijection] = []
    squeezed = (4 * c, height // 2, width // 2)
    full, small = network((height, width)), network((squeezed[1], squeezed[2]))
    for k in range(first):
        steps += step(checkerboard(*shape, flip=k % 2 == 1), c, full)
    steps.append(Squeeze())
    for k in range(split):
        steps += step(channels(4 * c, flip=k % 2 == 1), 4 * c, small)
    for k in range(last):
        steps += step(checkerboard(*squeezed, flip=k % 2 == 1), 4 * c, small)

    pixels: list[Layer] = dequantize(grey_levels)
    if grey_levels is not None and dequantization == "variational":
        # The noise is simpler than the image: a lighter network, which sees the image, will do.
        light = partial(
            GatedConvNet,
            hidden=max(1, equal_widths(hidden, "flowpp") // 2),
            blocks=1,
            heads=0,
            context_dim=shape,
            dropout=dropout,
        )
        noise: list[Bijection] = []
        for k in range(noise_couplings):
            board = checkerboard(*shape, flip=k % 2 == 1)
            noise += [ActNorm(c), Coupling(board, tau, light)]
        pixels[0] = VariationalDequantization(grey_levels, Compose(*noise, ActNorm(c)))
    whole = Compose(*pixels, *steps)
    return Flow(whole, StandardNormal(squeezed))


def three_counts(couplings: Sequence[int]) -> tuple[int, int, int]:
    """How many couplings of each kind `flowpp` has."""
    try:
        first, split, last = (integer(count) for count in couplings)
        if min(first, split, last) >= 0:
            return first, split, last
    except (TypeError, ValueError):
        pass
    raise ArgumentError(
        f"flowpp expects couplings to be three whole numbers of at least 0, got {show(couplings)}."
    )
