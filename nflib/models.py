"""The papers' models as compositions: each function builds a `Flow` from parts of nflib.

A shape of one number, or an int, builds the vector version, a shape ``(channels, height, width)``
the image version. With ``grey_levels=k`` the flow takes integers 0 .. k-1, which it dequantizes,
and ``log_prob`` is a lower bound in nats for them; without, it takes reals and is exact.
``context_dim`` is the size of a context vector that every conditioner sees.

    model        elementwise map        linear part           dequantization   several scales
    nice         additive               diagonal, at the end  uniform          no
    realnvp      affine                 permutations          uniform          yes (images)
    spline_flow  rational-quadratic     LU                    uniform          no
    naf          monotone network       LU                    uniform          no
    maf, iaf     affine, autoregressive reversed order        uniform          no
    glow         affine                 1x1 convolutions      uniform          yes
    flowpp       mixture-logistic CDF   1x1 convolutions      variational      yes
    mixerflow    affine, in matrices    LU, along both sides  uniform          no
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from nflib.autoregressive import MaskedAutoregressive
from nflib.convolution import Invertible1x1Conv
from nflib.core import (
    Bijection,
    Compose,
    Flow,
    Inverse,
    Shape,
    ShapeError,
    StandardLogistic,
    StandardNormal,
)
from nflib.coupling import Coupling, Mask, Network, alternating, channels, checkerboard, halves
from nflib.dequantization import Logit, UniformDequantization, VariationalDequantization
from nflib.elementwise import (
    Additive,
    Affine,
    Elementwise,
    LogisticMixtureCDF,
    MonotoneNet,
    RationalQuadraticSpline,
)
from nflib.linear import LU, Dense, Diagonal, Householder, Permutation
from nflib.mixer import AlongChannels, AlongPatches, Bands, Patches, Shift
from nflib.multiscale import MultiScale, Squeeze
from nflib.nets import MLP, ConvNet, GatedConvNet, ResidualConvNet
from nflib.normalization import ActNorm, BatchNorm

ALPHA = 1e-3  # of the logit behind dequantization
# What the networks of image flows see is clamped, see `Coupling`, far outside of the data.
LIMIT = 12.0


def nice(
    dim: int,
    layers: int = 4,
    hidden: Sequence[int] = (128, 128),
    *,
    context_dim: int | None = None,
    dropout: float = 0.0,
    grey_levels: int | None = None,
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
    net = partial(MLP, hidden=hidden, context=context_dim, dropout=dropout)
    couplings = [
        Coupling(alternating(dim, flip=k % 2 == 1), Additive(), net) for k in range(layers)
    ]
    steps = [*dequantize(grey_levels), ActNorm(dim), *couplings, Diagonal(dim)]
    return Flow(Compose(*steps), StandardLogistic(dim))


def realnvp(
    shape: int | Shape,
    layers: int = 8,
    hidden: Sequence[int] = (128, 128),
    *,
    levels: int = 2,
    normalization: str = "actnorm",
    context_dim: int | None = None,
    dropout: float = 0.0,
    grey_levels: int | None = None,
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
    if len(sizes(shape)) == 3:
        net = partial(ResidualConvNet, hidden=hidden, context=context_dim, dropout=dropout)
        return _image_realnvp(sizes(shape), layers, levels, net, normalization, grey_levels)
    (dim,) = sizes(shape)
    mlp = partial(MLP, hidden=hidden, context=context_dim, dropout=dropout)
    steps: list[Bijection] = dequantize(grey_levels)
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
    normalization: str,
    grey_levels: int | None,
) -> Flow:
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
    return Flow(whole, StandardNormal(*whole.output_shape(shape)))


def spline_flow(
    dim: int,
    layers: int = 5,
    bins: int = 8,
    hidden: Sequence[int] = (128, 128),
    *,
    limit: float = 4.0,
    context_dim: int | None = None,
    dropout: float = 0.0,
    grey_levels: int | None = None,
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
    net = partial(MLP, hidden=hidden, context=context_dim, dropout=dropout)
    spline = RationalQuadraticSpline(bins, limit)
    return Flow(
        Compose(*dequantize(grey_levels), *_linear_couplings(dim, layers, spline, net)),
        StandardNormal(dim),
    )


def naf(
    dim: int,
    layers: int = 4,
    units: int = 8,
    hidden: Sequence[int] = (128, 128),
    *,
    depth: int = 2,
    context_dim: int | None = None,
    dropout: float = 0.0,
    grey_levels: int | None = None,
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
    net = partial(MLP, hidden=hidden, context=context_dim, dropout=dropout)
    monotone = MonotoneNet(units, depth)
    return Flow(
        Compose(*dequantize(grey_levels), *_linear_couplings(dim, layers, monotone, net)),
        StandardNormal(dim),
    )


def _linear_couplings(
    dim: int, layers: int, elementwise: Elementwise, net: Network
) -> list[Bijection]:
    """ActNorm, LU and a coupling, ``layers`` times."""
    steps: list[Bijection] = []
    for k in range(layers):
        mask = halves(dim, flip=k % 2 == 1)
        steps += [ActNorm(dim), LU(dim, bias=False), Coupling(mask, elementwise, net)]
    return steps


def maf(
    dim: int,
    layers: int = 5,
    hidden: Sequence[int] = (128, 128),
    *,
    elementwise: Elementwise | None = None,
    order: str = "reversed",
    residual: bool = False,
    normalization: str = "actnorm",
    context_dim: int | None = None,
    dropout: float = 0.0,
    grey_levels: int | None = None,
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
    if order not in ("reversed", "random"):
        raise ValueError(f"maf expects order 'reversed' or 'random', got {order!r}.")
    orders = ["random"] * 2 if order == "random" else [None, range(dim - 1, -1, -1)]
    limit = LIMIT if grey_levels else math.inf
    tau = elementwise or Affine()
    make = partial(MaskedAutoregressive, dim, tau, hidden, context_dim, limit=limit)
    steps: list[Bijection] = dequantize(grey_levels)
    for k in range(layers):
        layer = make(order=orders[k % 2], residual=residual, dropout=dropout)
        steps += [normalize(dim, normalization), layer]
    return Flow(Compose(*steps), StandardNormal(dim))


def iaf(dim: int, layers: int = 5, hidden: Sequence[int] = (128, 128), **options: Any) -> Flow:
    """Inverse autoregressive flow: `maf` with each layer read backwards.

    A sample, with its log-density, costs one pass through the networks; ``log_prob`` of given data
    takes D short steps in each layer. Kingma et al. 2016, https://arxiv.org/abs/1606.04934 (there
    as the posterior of a variational autoencoder, whose samples are its own).

    Args: those of `maf`.
    """
    flow = maf(dim, layers, hidden, **options)
    assert isinstance(flow.bijection, Compose)
    steps = [Inverse(s) if isinstance(s, MaskedAutoregressive) else s for s in flow.bijection]
    return Flow(Compose(*steps), flow.base)


def glow(
    shape: Shape,
    levels: int = 2,
    steps: int = 4,
    hidden: int = 128,
    *,
    elementwise: Elementwise | None = None,
    context_dim: int | None = None,
    dropout: float = 0.0,
    grey_levels: int | None = None,
) -> Flow:
    """Glow: levels of a squeeze and steps of actnorm, invertible 1x1 convolution, affine coupling.

    After each level but the last half of the channels is factored out, with a learned prior given
    the other half. Kingma and Dhariwal 2018, https://arxiv.org/abs/1807.03039.

    Args:
        shape: channels, height and width; both sides multiples of 2^levels.
        levels: number of scales (the paper's L).
        steps: number of steps in each level (the paper's K).
        hidden: channels of the conditioners (the paper: 512).
        elementwise: another map in the place of the affine one, e.g. a spline.
        context_dim, dropout, grey_levels: see `realnvp`.
    """
    net = partial(ConvNet, hidden=hidden, context=context_dim, dropout=dropout)
    tau = elementwise or Affine()
    scales, (c, _, _) = [], sizes(shape, 3)
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
    return Flow(whole, StandardNormal(*whole.output_shape(shape)))


def flowpp(
    shape: Shape,
    hidden: int = 64,
    blocks: int = 2,
    *,
    components: int = 8,
    couplings: tuple[int, int, int] = (4, 2, 3),
    attention: int = 4,
    elementwise: Elementwise | None = None,
    dequantization: str = "variational",
    noise_couplings: int = 2,
    context_dim: int | None = None,
    dropout: float = 0.0,
    grey_levels: int | None = None,
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
    if dequantization not in ("variational", "uniform"):
        raise ValueError(
            f"flowpp expects dequantization 'variational' or 'uniform', got {dequantization!r}."
        )
    c, height, width = sizes(shape, 3)
    tau = elementwise or LogisticMixtureCDF(components)

    def network(size: tuple[int, int]) -> Network:
        gated = partial(GatedConvNet, hidden=hidden, blocks=blocks, heads=attention)
        return partial(gated, size=size, context=context_dim, dropout=dropout)

    def step(mask: Mask, count: int, net: Network) -> list[Bijection]:
        return [ActNorm(count), Invertible1x1Conv(count), Coupling(mask, tau, net)]

    steps: list[Bijection] = []
    first, split, last = couplings
    squeezed = (4 * c, height // 2, width // 2)
    full, small = network((height, width)), network((squeezed[1], squeezed[2]))
    for k in range(first):
        steps += step(checkerboard(*shape, flip=k % 2 == 1), c, full)
    steps.append(Squeeze())
    for k in range(split):
        steps += step(channels(4 * c, flip=k % 2 == 1), 4 * c, small)
    for k in range(last):
        steps += step(checkerboard(*squeezed, flip=k % 2 == 1), 4 * c, small)

    pixels: list[Bijection] = dequantize(grey_levels)
    if grey_levels is not None and dequantization == "variational":
        # The noise is simpler than the image: a lighter network, which sees the image, will do.
        light = partial(
            GatedConvNet,
            hidden=hidden // 2,
            blocks=1,
            heads=0,
            context=tuple(shape),
            dropout=dropout,
        )
        noise: list[Bijection] = []
        for k in range(noise_couplings):
            board = checkerboard(*shape, flip=k % 2 == 1)
            noise += [ActNorm(c), Coupling(board, tau, light)]
        pixels[0] = VariationalDequantization(grey_levels, Compose(*noise, ActNorm(c)))
    whole = Compose(*pixels, *steps)
    return Flow(whole, StandardNormal(*whole.output_shape(sizes(shape, 3))))


# Builds the k-th mixing flow, a bijection of vectors of so many numbers.
MixingFlow = Callable[[int, int], Bijection]


def mixerflow(
    shape: int | Shape,
    patch: int | tuple[int, int] = 2,
    layers: int = 8,
    hidden: Sequence[int] = (64, 64),
    *,
    mixing: str = "channels+patches",
    extraction: str = "shifted",
    shift: int | None = None,
    normalization: str = "actnorm",
    linear: str = "lu",
    flow: str | MixingFlow = "coupling",
    elementwise: Elementwise | None = None,
    network: Network | None = None,
    context_dim: int | None = None,
    dropout: float = 0.0,
    grey_levels: int | None = None,
) -> Flow:
    """MixerFlow: the image as a matrix of patches x channels, mixed along one side and the other.

    Each layer normalizes, maps linearly and couples the channels of every patch with one flow, then
    the patches of every channel with another; between layers the grid of patches moves. With C
    channels, P patches and couplings of hidden widths h_1 .. h_m the parameters of a layer are
    n(C) + n(P), where ``n(d) = 2 d + d^2 + MLP(d / 2 -> h_1 -> .. -> h_m -> d)``: the image's size
    enters by P alone. English et al. 2023, https://arxiv.org/abs/2310.16777.

    Their earlier layer (channel flow, batch norm, patch flow, batch norm) is ``mixerflow(...,
    normalization="batchnorm", linear="none")``: between any two flows stands one batch norm.

    Args:
        shape: channels, height and width, or the size of a vector, which is cut into pieces.
        patch: side of a patch, or its height and width; of bands the number of rows.
        layers: number of layers.
        hidden: widths of the conditioners' hidden layers.
        mixing: ``"channels+patches"``, or one side alone: ``"channels"`` or ``"patches"``.
        extraction: ``"patches"``, ``"bands"``, or ``"shifted"``: patches whose grid moves.
        shift: how many pixels it moves each way after a layer, by default half a patch.
        normalization: ``"actnorm"`` or ``"batchnorm"``, before each flow and at the end.
        linear: ``"lu"`` or ``"dense"``, which start at the identity, ``"householder"``,
            ``"permutation"`` or ``"none"``, before each flow.
        flow: ``"coupling"``, ``"maf"``, or a function that builds the k-th flow of so many numbers.
        elementwise: another map in the place of the affine one, e.g. a spline.
        network: another conditioner in the place of the `MLP`.
        context_dim, dropout, grey_levels: see `realnvp`.
    """
    shape = sizes(shape)
    if extraction not in ("patches", "bands", "shifted"):
        raise ValueError(
            f"mixerflow expects extraction 'patches', 'bands' or 'shifted', got {extraction!r}."
        )
    # Of bands the patch is a number of rows, which Bands itself checks.
    cut = Bands(shape, patch) if extraction == "bands" else Patches(shape, patch)  # type: ignore[arg-type]
    sides: dict[str, tuple[type[AlongChannels], int]] = {
        "channels": (AlongChannels, cut.channels),
        "patches": (AlongPatches, cut.patches),
    }
    mixed = mixing.split("+")
    if not set(mixed) <= sides.keys():
        raise ValueError(
            f"mixerflow expects mixing 'channels+patches', 'channels' or 'patches', got {mixing!r}."
        )
    for side in mixed:
        if sides[side][1] < 2:
            raise ShapeError(
                f"mixerflow expects at least two {side} to mix, got one: {cut.patches} patches of "
                f"{cut.channels} channels."
            )
    net = network or partial(MLP, hidden=hidden, context=context_dim, dropout=dropout)
    tau = elementwise or Affine()

    def coupling(dim: int, k: int) -> Bijection:
        return Coupling(halves(dim, flip=k % 2 == 1), tau, net, limit=LIMIT)

    def autoregressive(dim: int, k: int) -> Bijection:
        order = range(dim - 1, -1, -1) if k % 2 else None
        layer = partial(MaskedAutoregressive, context=context_dim, order=order, limit=LIMIT)
        return layer(dim, tau, hidden, dropout=dropout)

    flows: dict[str, MixingFlow] = {"coupling": coupling, "maf": autoregressive}
    if isinstance(flow, str) and flow not in flows:
        raise ValueError(f"mixerflow expects flow 'coupling', 'maf' or a function, got {flow!r}.")
    make = flows[flow] if isinstance(flow, str) else flow
    steps: list[Bijection] = [*dequantize(grey_levels), cut]
    for k in range(layers):
        for side in mixed:
            along, dim = sides[side]
            norm = normalize(dim, normalization)
            steps.append(along(Compose(norm, *linear_map(dim, linear), make(dim, k))))
        if extraction == "shifted" and k < layers - 1:
            steps += [Inverse(cut), _shift(cut, shift), cut]
    along, dim = sides[mixed[0]]
    steps += [along(normalize(dim, normalization)), Inverse(cut)]
    return Flow(Compose(*steps), StandardNormal(*shape))


def _shift(cut: Patches, step: int | None) -> Shift:
    """By so many pixels each way, by default half a patch."""
    _, h, w = cut.block
    down, right = (max(1, h // 2), max(1, w // 2)) if step is None else (step, step)
    return Shift(right) if len(cut.event_shape or ()) == 1 else Shift(down, right)


def linear_map(dim: int, kind: str) -> list[Bijection]:
    """The linear layer of that name, without a bias, or none.

    Matrices start at the identity: a number keeps its meaning, and so do neighbours. A random
    rotation would scramble patches before anything is learned.
    """
    eye = torch.eye(dim)
    kinds: dict[str, Callable[[], Bijection]] = {
        "lu": lambda: LU(dim, bias=False, weight=eye),
        "dense": lambda: Dense(dim, bias=False, weight=eye),
        "householder": lambda: Householder(dim, bias=False),
        "permutation": lambda: Permutation(dim),
    }
    if kind == "none":
        return []
    if kind not in kinds:
        names = ", ".join(map(repr, kinds))
        raise ValueError(f"linear expects {names} or 'none', got {kind!r}.")
    return [kinds[kind]()]


def dequantize(grey_levels: int | None) -> list[Bijection]:
    """Uniform dequantization and the logit for integers; nothing for reals."""
    if grey_levels is None:
        return []
    return [UniformDequantization(grey_levels), Logit(ALPHA)]


def normalize(dim: int, kind: str) -> Bijection:
    """The normalization layer of that name."""
    kinds: dict[str, type[ActNorm] | type[BatchNorm]] = {"actnorm": ActNorm, "batchnorm": BatchNorm}
    if kind not in kinds:
        raise ValueError(f"normalization expects 'actnorm' or 'batchnorm', got {kind!r}.")
    return kinds[kind](dim)


def sizes(shape: int | Shape, dims: int | None = None) -> Shape:
    """A shape as a tuple, of 1 or 3 numbers (or as many as ``dims`` says)."""
    found = (shape,) if isinstance(shape, int) else tuple(shape)
    allowed = (1, 3) if dims is None else (dims,)
    if len(found) not in allowed or min(found) < 1:
        raise ShapeError(
            "A model expects the shape of one event, "
            f"{'a number of dimensions or ' if dims is None else ''}(channels, height, width), "
            f"got {shape!r}."
        )
    return found
