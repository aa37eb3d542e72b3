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
from nflib.conditioning import Conditioned, SpaceToDepth
from nflib.convolution import Invertible1x1Conv
from nflib.core import (
    Bijection,
    Compose,
    EventShape,
    Flow,
    Layer,
    Shape,
    StandardNormal,
    describe,
)
from nflib.coupling import Coupling, Mask, Network, channels, checkerboard
from nflib.dequantization import VariationalDequantization
from nflib.elementwise import Affine, Elementwise, LogisticMixtureCDF
from nflib.models.parts import (
    LIMIT,
    Normalization,
    dequantize,
    halvings,
    model,
    normalize,
    permuted_couplings,
    vector,
)
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
        context_dim: size of the context vector, if any; for an image also the shape
            ``(K, height, width)`` of an image of the same size. Where the data are squeezed, so is
            it: every conditioner sees all of it, at its own scale.
        dropout: of the conditioners.
        grey_levels: number of grey levels if the data are integers.
    """
    if not isinstance(shape, int) and len(shape) == 3:
        net = partial(ResidualConvNet, hidden=hidden, dropout=dropout)
        return _image_realnvp(shape, layers, levels, net, normalization, context_dim, grey_levels)
    dim = vector("realnvp", shape, 2)
    mlp = partial(MLP, hidden=hidden, context_dim=context_dim, dropout=dropout)
    steps = permuted_couplings(dim, layers, Affine(), mlp, normalization)
    return Flow(Compose(*dequantize(grey_levels), *steps), StandardNormal(dim))


def _image_realnvp(
    shape: Shape,
    layers: int,
    levels: int,
    net: partial[ResidualConvNet],
    normalization: Normalization,
    context_dim: EventShape | int | None,
    grey_levels: int | None,
) -> Flow:
    halvings("realnvp", shape, levels, levels - 1)
    image = image_context("realnvp", shape, context_dim)

    def couplings(masks: Sequence[Mask], count: int, factor: int) -> list[Bijection]:
        seen = partial(net, context_dim=coarser(image, factor) or context_dim)
        steps: list[Bijection] = []
        for mask in masks:
            steps += [normalize(count, normalization), Coupling(mask, Affine(), seen, limit=LIMIT)]
        return steps

    scales, (c, height, width) = [], shape
    for level in range(levels):
        is_last, factor = level == levels - 1, 2**level
        boards = layers if is_last else layers - layers // 2
        board = [checkerboard(c, height, width, flip=k % 2 == 1) for k in range(boards)]
        split = [channels(4 * c, flip=k % 2 == 1) for k in range(layers - boards)]
        parts = at_scale(image, factor, couplings(board, c, factor))
        if not is_last:
            squeezed = couplings(split, 4 * c, 2 * factor)
            parts += [Squeeze(), *at_scale(image, 2 * factor, squeezed)]
        scales.append(Compose(*parts))
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
    image = image_context("glow", shape, context_dim)
    scales, c = [], shape[0]
    for level in range(levels):
        seen = coarser(image, 2 ** (level + 1)) or context_dim
        net = partial(ConvNet, hidden=hidden, context_dim=seen, dropout=dropout)
        steps_here = glow_level(4 * c, steps, elementwise or Affine(), net, level == levels - 1)
        scales.append(Compose(*at_scale(image, 2 ** (level + 1), [Squeeze(), *steps_here])))
        c *= 2
    whole = Compose(*dequantize(grey_levels), MultiScale(shape, *scales))
    return Flow(whole, StandardNormal(math.prod(shape)))


def glow_level(
    c: int, steps: int, elementwise: Elementwise, net: Network, is_last: bool
) -> list[Bijection]:
    """Steps of actnorm, invertible 1x1 convolution and coupling on c channels.

    Unless it is the last level half of the channels leaves behind it, by way of a learned prior.
    """
    parts: list[Bijection] = []
    for _ in range(steps):
        parts += [ActNorm(c), Invertible1x1Conv(c)]
        parts.append(Coupling(channels(c), elementwise, net, limit=LIMIT))
    if not is_last:
        # The prior of what leaves here.
        parts.append(Coupling(channels(c), Affine(), net, limit=LIMIT))
    return parts


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

    image = image_context("flowpp", shape, context_dim)

    def network(factor: int) -> Network:
        size = (height // factor, width // factor)
        gated = partial(GatedConvNet, hidden=hidden, blocks=blocks, heads=attention, size=size)
        return partial(gated, context_dim=coarser(image, factor) or context_dim, dropout=dropout)

    def step(mask: Mask, count: int, net: Network) -> list[Bijection]:
        return [ActNorm(count), Invertible1x1Conv(count), Coupling(mask, tau, net)]

    steps: list[Layer] = []
    squeezed = (4 * c, height // 2, width // 2)
    full, small = network(1), network(2)
    for k in range(first):
        steps += step(checkerboard(*shape, flip=k % 2 == 1), c, full)
    behind: list[Bijection] = []
    for k in range(split):
        behind += step(channels(4 * c, flip=k % 2 == 1), 4 * c, small)
    for k in range(last):
        behind += step(checkerboard(*squeezed, flip=k % 2 == 1), 4 * c, small)
    steps += [Squeeze(), *at_scale(image, 2, behind)]

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


def image_context(
    name: str, shape: Shape, context_dim: EventShape | int | None
) -> EventShape | None:
    """The shape of an image of context, which has the data's size; None for a vector or none."""
    if context_dim is None or isinstance(context_dim, int) or len(context_dim) == 1:
        return None
    if len(context_dim) != 3 or tuple(context_dim[1:]) != tuple(shape[1:]):
        raise ArgumentError(
            f"{name} expects context_dim to be the size of a vector, or the shape "
            f"{describe(('K', *shape[1:]))} of an image of the data's size, "
            f"got {describe(context_dim)}."
        )
    return tuple(context_dim)


def coarser(image: EventShape | None, factor: int) -> EventShape | None:
    """The shape of an image of context at a coarser scale: its pixels become channels."""
    if image is None:
        return None
    return image[0] * factor**2, image[1] // factor, image[2] // factor


def at_scale(image: EventShape | None, factor: int, layers: Sequence[Layer]) -> list[Layer]:
    """Layers at a coarser scale, which see an image of context at that scale, too."""
    if image is None or factor == 1 or not layers:
        return list(layers)
    return [Conditioned(SpaceToDepth(factor), Compose(*layers), image)]


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
