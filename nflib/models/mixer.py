"""MixerFlow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from nflib.arguments import (
    ArgumentError,
    ContextShape,
    EventSizes,
    Levels,
    Share,
    Size,
    Whole,
    Widths,
)
from nflib.autoregressive import MaskedAutoregressive
from nflib.core import Bijection, Compose, Flow, Inverse, Layer, Shape, ShapeError, StandardNormal
from nflib.coupling import Coupling, Network, halves
from nflib.elementwise import Affine, Elementwise
from nflib.mixer import AlongChannels, AlongPatches, Bands, Patches, Shift
from nflib.models.parts import (
    LIMIT,
    LinearMap,
    Normalization,
    dequantize,
    linear_map,
    model,
    normalize,
)
from nflib.nets import MLP

# Builds the k-th mixing flow, a bijection of vectors of so many numbers.
MixingFlow = Callable[[int, int], Layer]


@model
def mixerflow(
    shape: EventSizes,
    patch: EventSizes = 2,
    layers: Size = 8,
    hidden: Widths = (64, 64),
    *,
    mixing: Literal["channels+patches", "channels", "patches"] = "channels+patches",
    extraction: Literal["patches", "bands", "shifted"] = "shifted",
    shift: Whole | None = None,
    normalization: Normalization = "actnorm",
    linear: LinearMap = "lu",
    flow: Literal["coupling", "maf"] | MixingFlow = "coupling",
    elementwise: Elementwise | None = None,
    network: Network | None = None,
    context_dim: ContextShape = None,
    dropout: Share = 0.0,
    grey_levels: Levels | None = None,
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
    cut = _cut(shape, patch, extraction)
    sides: dict[str, tuple[type[AlongChannels], int]] = {
        "channels": (AlongChannels, cut.channels),
        "patches": (AlongPatches, cut.patches),
    }
    mixed = mixing.split("+")
    for side in mixed:
        if sides[side][1] < 2:
            raise ShapeError(
                f"mixerflow expects at least two {side} to mix, got one: {cut.patches} patches of "
                f"{cut.channels} channels."
            )
    net = network or partial(MLP, hidden=hidden, context_dim=context_dim, dropout=dropout)
    tau = elementwise or Affine()

    def coupling(dim: int, k: int) -> Bijection:
        return Coupling(halves(dim, flip=k % 2 == 1), tau, net, limit=LIMIT)

    def autoregressive(dim: int, k: int) -> Bijection:
        order = range(dim - 1, -1, -1) if k % 2 else None
        layer = partial(MaskedAutoregressive, context_dim=context_dim, order=order, limit=LIMIT)
        return layer(dim, tau, hidden, dropout=dropout)

    flows: dict[str, MixingFlow] = {"coupling": coupling, "maf": autoregressive}
    make = flows[flow] if isinstance(flow, str) else flow
    steps: list[Layer] = [*dequantize(grey_levels), cut]
    for k in range(layers):
        for side in mixed:
            along, dim = sides[side]
            norm = normalize(dim, normalization)
            steps.append(along(Compose(norm, *linear_map(dim, linear), make(dim, k))))
        if extraction == "shifted" and k < layers - 1:
            steps += [Inverse(cut), _shift(cut, shift), cut]
    along, dim = sides[mixed[0]]
    steps += [along(normalize(dim, normalization)), Inverse(cut)]
    return Flow(Compose(*steps), StandardNormal(shape))


def _cut(shape: int | Shape, patch: int | Shape, extraction: str) -> Patches:
    """How the event becomes a matrix; of bands the patch is a number of rows."""
    if extraction != "bands":
        return Patches(shape, patch)
    rows = patch if isinstance(patch, int) else patch[0]
    if not isinstance(patch, int) and len(patch) > 1:
        raise ArgumentError(f"mixerflow expects of bands a number of rows as patch, got {patch}.")
    return Bands(shape, rows)  # type: ignore[arg-type]


def _shift(cut: Patches, step: int | None) -> Shift:
    """By so many pixels each way, by default half a patch."""
    _, h, w = cut.block
    down, right = (max(1, h // 2), max(1, w // 2)) if step is None else (step, step)
    return Shift(right) if len(cut.event_shape or ()) == 1 else Shift(down, right)
