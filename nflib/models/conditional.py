"""The conditional invertible network: p(x | y) for a label, a vector or an image y."""

from __future__ import annotations

import math
from functools import partial

from nflib.arguments import ArgumentError, ContextShape, EventSizes, Levels, Share, Size, Widths
from nflib.conditioning import Conditioned, FeaturePyramid
from nflib.core import Compose, EventShape, Flow, Layer, Shape, StandardNormal, describe
from nflib.coupling import Coupling, halves
from nflib.elementwise import Affine
from nflib.linear import Permutation
from nflib.models.images import glow_level
from nflib.models.parts import dequantize, halvings, model, normalize, vector
from nflib.multiscale import MultiScale, Squeeze
from nflib.nets import MLP, ConvNet, shape_of

# Largest log-scale of a coupling; the paper's soft clamp has the same bound, by an arctan.
CLAMP = 1.5


@model
def cinn(
    shape: EventSizes,
    context_dim: ContextShape,
    steps: Size = 8,
    hidden: Widths = 128,
    *,
    levels: Size = 2,
    features: Size = 32,
    dropout: Share = 0.0,
    grey_levels: Levels | None = None,
) -> Flow:
    """Conditional INN: affine couplings whose networks also see a context, ``p(x | context)``.

        -log p(x | y) = 1/2 |f(x; y)|^2 - sum of all log-scales + D/2 log 2 pi        (nats)

    Vectors: actnorm, a fixed random permutation and a coupling of halves in each step; the context
    vector is appended to what the networks see. Images: the levels of `glow`. A context vector
    shifts the hidden channels; an image of context, which may be larger than the data, goes once
    a call through a conditioning network (`nflib.conditioning.FeaturePyramid`), and the couplings
    of each level see its features at their own size. Ardizzone et al. 2019,
    https://arxiv.org/abs/1907.02392 (there: log-scales bounded by an arctan, here by a tanh; a
    conditioning network that was trained beforehand, here learned with the flow).

    Args:
        shape: number of dimensions, or (channels, height, width).
        context_dim: size of the context vector; for images also ``(K, H, W)``, H and W the data's
            height and width times a common power of two.
        steps: number of couplings; of an image, in each level.
        hidden: widths of the couplings' hidden layers.
        levels: number of scales of an image.
        features: channels of the conditioning network at each scale.
        dropout: of the couplings' networks.
        grey_levels: number of grey levels if the data are integers.
    """
    context = shape_of(context_dim)
    if context is None:
        raise ArgumentError("cinn expects a context_dim, got None; without one, take glow.")
    whole: list[Layer] = dequantize(grey_levels)
    if isinstance(shape, int) or len(shape) == 1:
        dim = vector("cinn", shape, 2)
        if len(context) != 1:
            raise ArgumentError(
                "cinn expects the size of a context vector for data that are vectors, "
                f"got {describe(context)}."
            )
        net = partial(MLP, hidden=hidden, context_dim=context, dropout=dropout)
        for _ in range(steps):
            whole += [normalize(dim, "actnorm"), Permutation(dim)]
            whole.append(Coupling(halves(dim), Affine(CLAMP), net))
        return Flow(Compose(*whole), StandardNormal(dim))
    if len(shape) != 3:
        raise ArgumentError(
            "cinn expects the size of a vector or the shape (channels, height, width) of an "
            f"image, got {describe(shape)}."
        )
    halvings("cinn", shape, levels, levels)
    conv = partial(ConvNet, hidden=hidden, dropout=dropout)
    if len(context) == 1:
        scales = [
            Compose(*_level(shape, k, steps, partial(conv, context_dim=context), levels))
            for k in range(levels)
        ]
        whole.append(MultiScale(shape, *scales))
    else:
        whole.append(_under_pyramid(shape, context, steps, levels, conv, features))
    return Flow(Compose(*whole), StandardNormal(math.prod(shape)))


def _level(shape: Shape, k: int, steps: int, net: partial[ConvNet], levels: int) -> list[Layer]:
    """A squeeze and the steps behind it: the channels double from level to level."""
    c = 4 * shape[0] * 2**k
    return [Squeeze(), *glow_level(c, steps, Affine(CLAMP), net, k == levels - 1)]


def _under_pyramid(
    shape: Shape,
    context: EventShape,
    steps: int,
    levels: int,
    conv: partial[ConvNet],
    features: int,
) -> Layer:
    """The levels, each under the part of the conditioning network's features that is its own."""
    factors = {context[-2] / shape[1], context[-1] / shape[2]}
    if len(context) != 3 or len(factors) > 1 or math.log2(factors.pop()) not in range(16):
        raise ArgumentError(
            "cinn expects a vector or an image of context whose sides are those of the data, "
            f"{shape[1]} x {shape[2]}, times a power of two, got {describe(context)}."
        )
    sizes = [(shape[1] >> k, shape[2] >> k) for k in range(1, levels + 1)]
    pyramid = FeaturePyramid(context, sizes, features)
    packed = sum(math.prod(part) for part in pyramid.shapes)
    scales = []
    for k, seen in enumerate(pyramid.shapes):
        net = partial(conv, context_dim=seen)
        level = _level(shape, k, steps, net, levels)
        scales.append(Conditioned(pyramid.part(k), Compose(*level), packed))
    return Conditioned(pyramid, MultiScale(shape, *scales), context)
