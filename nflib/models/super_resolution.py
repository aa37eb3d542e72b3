"""SRFlow: p(x | y) of an image x given a small version y of it."""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from nflib.arguments import ArgumentError, Count, ImageShape, Levels, Share, Size, Widths
from nflib.conditioning import Conditioned, DenseEncoder, Resize
from nflib.convolution import Invertible1x1Conv
from nflib.core import Bijection, Compose, Flow, Layer, Shape, StandardNormal
from nflib.coupling import Coupling, Injector, channels
from nflib.elementwise import Additive, Affine
from nflib.models.parts import LIMIT, dequantize, halvings, model
from nflib.multiscale import MultiScale, Squeeze
from nflib.nets import ConvNet
from nflib.normalization import ActNorm


@model
def srflow(
    shape: ImageShape,
    scale: Size = 4,
    steps: Size = 4,
    hidden: Widths = 64,
    *,
    levels: Size = 3,
    features: Size = 32,
    blocks: Size = 2,
    transitions: Count = 2,
    dropout: Share = 0.0,
    grey_levels: Levels | None = None,
) -> Flow:
    """SRFlow: the density of all large images that a small one may have come from.

        log p(x | y) = log N(f(x; u); 0, I) + log|det df/dx|,    u = encoder(y)        (nats)

    First the bicubic enlargement of y is subtracted, a shift with log-det 0: the flow draws what it
    leaves out. (In the paper the flow draws the whole image, which takes far longer to learn.) Each
    level squeezes and mixes neighbouring pixels by steps of actnorm and 1x1 convolution that see no
    context. Then come conditional steps: actnorm, 1x1 convolution,
    `Injector`, affine coupling. Half of the channels leave behind each level but the last, by way
    of a learned prior that sees the other half and u. The encoder runs once a call; its features
    are resized to each level. Lugmayr et al. 2020, https://arxiv.org/abs/2006.14200 (there: 16
    steps, an encoder of 23 blocks that was trained beforehand, 64 channels).

    No parameter depends on height and width: a flow built for another size takes the weights, by
    ``load_state_dict`` or `nflib.checkpoints.load`.

    Args:
        shape: channels, height and width of the large image; both sides are multiples of 2^levels
            and of scale.
        scale: how many times smaller the context is, an image ``(channels, H/scale, W/scale)``. Its
            numbers are those of the large image, or, if that is of grey levels, -1 (black) to 1
            (white), as `nflib.data.photographs.low_and_high` gives them.
        steps: conditional steps in each level (the paper's K).
        hidden: channels of the couplings' and injectors' networks, in both hidden layers.
        levels: number of scales of the flow (the paper's L).
        features: channels behind each block of the encoder.
        blocks: residual-in-residual dense blocks of the encoder.
        transitions: steps without a context behind each squeeze.
        dropout: of the couplings' and injectors' networks.
        grey_levels: number of grey levels if the data are integers. They get uniform noise and no
            logit, for the small image is a linear map of grey levels.
    """
    halvings("srflow", shape, levels, levels)
    if shape[1] % scale or shape[2] % scale:
        raise ArgumentError(
            f"srflow expects sides that are multiples of its scale {scale}, "
            f"got {shape[1]} x {shape[2]}."
        )
    context = (shape[0], shape[1] // scale, shape[2] // scale)
    encoder = DenseEncoder(shape[0], features, blocks)
    net = partial(ConvNet, hidden=hidden, dropout=dropout)
    encoded = (encoder.features, *context[1:])
    scales = []
    for k in range(levels):
        c, size = 4 * shape[0] * 2**k, (shape[1] >> (k + 1), shape[2] >> (k + 1))
        seen = (encoder.features, *size)
        level = Compose(*_steps(c, steps, net, seen, k == levels - 1))
        conditional = Conditioned(Resize(size), level, encoded)
        mixed = [layer for _ in range(transitions) for layer in _mix(c)]
        scales.append(Compose(Squeeze(), *mixed, conditional))
    whole = dequantize(grey_levels)[:1]  # without the logit
    rest = Injector(shape[0], Additive(), _itself, shape)
    whole.append(Conditioned(MinusEnlarged(scale, grey_levels), rest, context))
    whole.append(Conditioned(encoder, MultiScale(shape, *scales), context))
    return Flow(Compose(*whole), StandardNormal(math.prod(shape)))


class MinusEnlarged(nn.Module):
    """Minus the bicubic enlargement of an image of context, in the units that a flow sees.

    Args:
        scale: how many times larger it gets.
        grey_levels: k, if the flow sees dequantized grey levels ``(x + u) / k``; -1 then stands for
            the middle of the cell of 0, 1 for that of k - 1.
    """

    def __init__(self, scale: int, grey_levels: int | None) -> None:
        super().__init__()
        k = grey_levels
        self.scale = scale
        self.slope, self.start = (1.0, 0.0) if k is None else ((k - 1) / (2 * k), 0.5)

    def forward(self, image: Tensor) -> Tensor:
        large = F.interpolate(image, scale_factor=float(self.scale), mode="bicubic")
        return -(self.slope * large + self.start)


def _itself(inputs: int, outputs: int) -> nn.Module:
    """The network of an injector whose context is the shift itself."""
    return nn.Identity()


def _mix(c: int) -> list[Bijection]:
    """What needs no network: each pixel's channels are scaled, shifted and mixed."""
    return [ActNorm(c), Invertible1x1Conv(c)]


def _steps(c: int, steps: int, net: partial[ConvNet], seen: Shape, is_last: bool) -> list[Layer]:
    """The conditional steps of a level, and the prior of what leaves behind it."""
    parts: list[Layer] = []
    both = partial(net, context_dim=seen)
    for _ in range(steps):
        parts += [*_mix(c), Injector(c, Affine(), net, seen)]
        parts.append(Coupling(channels(c), Affine(), both, limit=LIMIT))
    if not is_last:
        parts.append(Coupling(channels(c), Affine(), both, limit=LIMIT))
    return parts
