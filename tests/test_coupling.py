"""Couplings: masks that take an event apart and put it together, and what each part may know."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from layers import conv, gated, mlp, residual
from torch import Tensor, nn

from nflib.checks import LogDetError, check_bijection, jacobian, randomize_parameters
from nflib.core import Bijection, Compose, ShapeError
from nflib.coupling import (
    CheckerboardMask,
    Coupling,
    DimensionMask,
    Mask,
    alternating,
    channels,
    checkerboard,
    halves,
)
from nflib.elementwise import Additive, Affine, Elementwise, RationalQuadraticSpline
from nflib.models import realnvp

# Each mask with its event and the entries it keeps, written out.
MASKS: dict[str, tuple[Mask, list]] = {
    "halves of 4": (halves(4), [1, 1, 0, 0]),
    "halves of 5": (halves(5), [1, 1, 1, 0, 0]),
    "halves of 5, flipped": (halves(5, flip=True), [0, 0, 1, 1, 1]),
    "alternating of 5": (alternating(5), [1, 0, 1, 0, 1]),
    "alternating of 5, flipped": (alternating(5, flip=True), [0, 1, 0, 1, 0]),
    "alternating of 2": (alternating(2), [1, 0]),
    "a mask of one's own": (DimensionMask([True, False, False, True]), [1, 0, 0, 1]),
    "channels of 3": (channels(3), [[[1, 1]], [[1, 1]], [[0, 0]]]),
    "channels of 3, flipped": (channels(3, flip=True), [[[0, 0]], [[1, 1]], [[1, 1]]]),
    "board": (checkerboard(1, 3, 5), [[[1, 0, 1, 0, 1], [0, 1, 0, 1, 0], [1, 0, 1, 0, 1]]]),
    "board of 2 channels": (checkerboard(2, 2, 3), [[[1, 0, 1], [0, 1, 0]]] * 2),
    "board, flipped": (checkerboard(1, 1, 4, flip=True), [[[0, 1, 0, 1]]]),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_keep_what_they_say(name: str) -> None:
    mask, picture = MASKS[name]
    expected = torch.tensor(picture).bool()
    assert torch.equal(mask.kept(*expected.shape), expected)


@pytest.mark.parametrize("name", MASKS)
def test_masks_part_an_event_and_put_it_together(name: str) -> None:
    mask, picture = MASKS[name]
    keep = torch.tensor(picture).bool()
    x = torch.arange(1.0, 1 + 2 * keep.numel()).view(2, *keep.shape)
    kept, moved = mask.split(x)
    # What is kept (a board shows it among zeros) and what is moved are all of x, each entry once.
    seen = kept[kept != 0] if isinstance(mask, CheckerboardMask) else kept
    assert torch.equal(torch.cat([seen.flatten(), moved.flatten()]).sort()[0], x.flatten())
    assert torch.equal(moved.flatten().sort()[0], x[:, ~keep].flatten().sort()[0])
    assert torch.equal(mask.merge(kept, moved), x)
    assert torch.equal(mask.merge(kept, -moved), torch.where(keep, x, -x))
    # A conditioner's outputs at the moved entries, if it predicts x itself.
    if isinstance(mask, CheckerboardMask):
        assert torch.equal(mask.select(x[:, None])[:, 0], moved)


def test_masks_of_an_event_cover_it_between_them() -> None:
    for one, other in (
        (halves(5), halves(5, True)),
        (alternating(4), alternating(4, True)),
    ):
        assert (one.kept(one.dim) | other.kept(other.dim)).all()
    a, b = checkerboard(2, 3, 3), checkerboard(2, 3, 3, flip=True)
    assert torch.equal(a.kept(2, 3, 3), ~b.kept(2, 3, 3))


def coupling(mask: Mask, picture: Tensor, tau: Elementwise | None = None) -> Coupling:
    layer = Coupling(mask, tau or Affine(), mlp if picture.ndim == 1 else conv)
    randomize_parameters(layer)
    return layer


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("tau", [Affine(), RationalQuadraticSpline(4)], ids=["affine", "spline"])
def test_kept_entries_pass_unchanged_and_decide_over_the_others(
    name: str, tau: Elementwise
) -> None:
    mask, picture = MASKS[name]
    keep = torch.tensor(picture).bool()
    layer = coupling(mask, keep, tau).double()
    x = torch.randn(3, *keep.shape, dtype=torch.float64)
    z, back = layer(x)[0], layer.inverse(x)[0]
    for out in (z, back):
        assert torch.equal(out[:, keep], x[:, keep])
        assert (out[:, ~keep] != x[:, ~keep]).all()
    # A moved entry depends on itself and on kept ones: of the moved ones, on no other.
    matrix, moved = jacobian(lambda a: layer(a)[0], x), ~keep.flatten()
    among_moved = matrix[:, moved][:, :, moved]
    assert torch.equal(among_moved, torch.diag_embed(among_moved.diagonal(dim1=1, dim2=2)))
    assert matrix[:, moved][:, :, ~moved].any()


@pytest.mark.parametrize("name", MASKS)
def test_the_conditioner_sees_nothing_of_the_moved_entries(name: str) -> None:
    mask, picture = MASKS[name]
    keep = torch.tensor(picture).bool()
    layer = coupling(mask, keep).double()
    x = torch.randn(3, *keep.shape, dtype=torch.float64).requires_grad_()
    theta = layer.theta(layer.mask.split(x)[0], None)
    (gradient,) = torch.autograd.grad(theta.square().sum(), x)
    assert not gradient[:, ~keep].any()
    assert gradient[:, keep].any()


def test_a_stack_with_one_mask_leaves_dimensions_untouched() -> None:
    x = torch.randn(20, 4)
    same = Compose(*(Coupling(halves(4), Affine(), mlp) for _ in range(6)))
    turns = Compose(*(Coupling(halves(4, k % 2 == 1), Affine(), mlp) for k in range(2)))
    for layers in (same, turns):
        randomize_parameters(layers)
    assert torch.equal(same(x)[0][:, :2], x[:, :2])
    assert (turns(x)[0] != x).all()


def test_a_new_coupling_is_the_identity() -> None:
    x = torch.randn(5, 4)
    z, log_det = Coupling(alternating(4), Affine(), mlp)(x)
    assert torch.equal(z, x)
    assert not log_det.any()


@pytest.mark.parametrize("net", [conv, residual, gated], ids=["conv", "residual", "gated"])
@pytest.mark.parametrize("mask", [checkerboard(2, 3, 2), channels(2)], ids=["board", "channels"])
def test_an_image_may_be_the_context(net: Callable[..., nn.Module], mask: Mask) -> None:
    layer = Coupling(mask, Affine(), lambda i, o: net(i, o, context_dim=(1, 3, 2)))
    assert layer.context_shape == (1, 3, 2)
    x, context = torch.randn(3, 2, 3, 2), torch.randn(3, 1, 3, 2)
    check_bijection(layer, x, context)
    randomize_parameters(layer)
    assert not torch.equal(layer(x, context)[0], layer(x, context + 1)[0])
    for wrong in (None, context[:2], context[:, 0], torch.randn(3, 1, 2, 3)):
        with pytest.raises(ShapeError, match=r"^Coupling expects a context of shape .*, got .*\.$"):
            layer(x, wrong)


def test_a_conditioner_of_ones_own_may_be_any_function_of_the_kept_part() -> None:
    class Twice(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    x = torch.randn(4, 4)
    z, _ = Coupling(halves(4), Additive(), Twice)(x, torch.randn(4, 9))  # context is ignored
    torch.testing.assert_close(z, torch.cat([x[:, :2], x[:, 2:] + 2 * x[:, :2]], 1))


ONE_SENTENCE = r"^[\w.]+ expects .*, got .*\.$"


@pytest.mark.parametrize(
    "make",
    [
        lambda: halves(1),
        lambda: alternating(1),
        lambda: channels(0),
        lambda: DimensionMask([True, True]),
        lambda: DimensionMask([False, False]),
        lambda: DimensionMask([1, 0]),
        lambda: DimensionMask(torch.ones(2, 2).bool()),
        lambda: checkerboard(1, 1, 1),
        lambda: checkerboard(0, 4, 4),
    ],
)
def test_masks_that_part_nothing_are_one_sentence(make: Callable[[], Mask]) -> None:
    with pytest.raises(ValueError, match=ONE_SENTENCE):
        make()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Coupling(halves(4), Affine(), mlp), (2, 3)),
        (Coupling(halves(4), Affine(), mlp), (4,)),
        (Coupling(alternating(4), Affine(), mlp), (2, 5)),
        (Coupling(channels(4), Affine(), conv), (2, 3, 4, 4)),
        (Coupling(halves(4), Affine(), mlp), (2, 4, 3, 3)),
        (Coupling(channels(4), Affine(), conv), (2, 4)),
        (Coupling(channels(4), Affine(), conv), (2, 4, 3)),
        (Coupling(checkerboard(1, 3, 5), Affine(), conv), (2, 1, 5, 3)),
        (Coupling(checkerboard(1, 3, 5), Affine(), conv), (2, 3, 5)),
    ],
)
def test_wrong_events_are_one_sentence(layer: Coupling, shape: tuple[int, ...]) -> None:
    for function in (layer, layer.inverse):
        with pytest.raises(ValueError, match=ONE_SENTENCE):
            function(torch.randn(shape))


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_conditioner_of_the_wrong_size_is_one_sentence(extra: int) -> None:
    layer = Coupling(halves(4), Affine(), lambda i, o: mlp(i, o + extra))
    expected = r"^Coupling expects its conditioner to return shape \(3, 4\), got a tensor of shape"
    with pytest.raises(ShapeError, match=expected):
        layer(torch.randn(3, 4))


class Miscounted(Affine):
    """The log-derivative of the inverse where that of forward belongs."""

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        z, log_slope = super().forward(x, parameters)
        return z, -log_slope


class Halved(Coupling):
    """Half of the log-det in both directions: they cancel all the same."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward(x, context)
        return z, log_det / 2

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().inverse(z, context)
        return x, log_det / 2


@pytest.mark.parametrize(
    "layer", [Coupling(halves(4), Miscounted(), mlp), Halved(halves(4), Affine(), mlp)]
)
def test_a_wrong_log_det_is_found(layer: Bijection) -> None:
    with pytest.raises(LogDetError, match="autograd finds"):
        check_bijection(layer, torch.randn(3, 4))


def test_the_conditioner_sees_a_clamped_input() -> None:
    """Far out its answer stays the one at the limit, and the coupling stays a bijection."""
    layer = Coupling(halves(4), Affine(), mlp, limit=2.0)
    randomize_parameters(layer)
    inner = torch.tensor([[2.0, -2.0, 0.3, 0.4]])
    outer = torch.tensor([[50.0, -9.0, 0.3, 0.4]])
    torch.testing.assert_close(layer(outer)[0][:, 2:], layer(inner)[0][:, 2:])
    assert not torch.allclose(layer(inner / 2)[0][:, 2:], layer(inner)[0][:, 2:])
    check_bijection(layer, 5 * torch.randn(6, 4))
    with pytest.raises(ValueError, match="^Coupling expects limit to be a number above 0, got 0.$"):
        Coupling(halves(4), Affine(), mlp, limit=0)


def test_the_limit_keeps_an_image_flow_from_exploding() -> None:
    """A stack whose networks answer far inputs with larger ones, with and without the limit."""
    torch.manual_seed(0)
    flow = realnvp((1, 4, 4), hidden=(8,), levels=1, layers=8)
    randomize_parameters(flow)
    couplings = [part for part in flow.modules() if isinstance(part, Coupling)]
    z = 30 * torch.randn(50, 16)
    sizes = []
    for limit in (couplings[0].limit, math.inf):
        for coupling in couplings:
            coupling.limit = limit
        sizes.append(flow.decode(z).abs().max().item())
    assert sizes[0] < sizes[1] / 10


def test_too_few_numbers_and_a_network_that_is_none_are_one_sentence() -> None:
    for make in (halves, alternating, channels):
        with pytest.raises(ValueError, match=f"^{make.__name__} expects at least 2 numbers"):
            make(1)
    with pytest.raises(ValueError, match="^Coupling expects network to build an nn.Module"):
        Coupling(halves(4), Affine(), lambda i, o: torch.sin)  # type: ignore[arg-type, return-value]


def test_a_conditioner_names_one_parameter_of_all_entries_after_the_other() -> None:
    class Named(nn.Module):
        """Log-scales 0.1 and 0.2, then shifts 3 and 4."""

        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([0.1, 0.2, 3.0, 4.0]).expand(len(x), 4)

    x = torch.randn(5, 4)
    scale, shift = torch.tensor([0.1, 0.2]), torch.tensor([3.0, 4.0])
    z, _ = Coupling(halves(4), Affine(bound=100.0), Named)(x)
    torch.testing.assert_close(z[:, 2:], x[:, 2:] * scale.exp() + shift)


def test_within_its_limit_a_conditioner_sees_both_signs() -> None:
    layer = Coupling(halves(2), Affine(), mlp, limit=2.0)
    randomize_parameters(layer)
    # What is kept, from below the limit to above it, beside a one that is moved.
    kept = torch.tensor([-9.0, -2.0, -1.0, 0.0, 1.0, 2.0, 9.0])
    z, _ = layer(torch.stack([kept, torch.ones(7)], 1))
    moved = z[:, 1]
    assert torch.equal(moved[0], moved[1])
    assert torch.equal(moved[5], moved[6])
    assert len(moved[1:6].unique()) == 5
