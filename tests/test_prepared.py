"""What layers make of their parameters, made for all of them together: the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nflib import checks, models, reversible
from nflib.autoregressive import MaskedAutoregressive, MaskedLinear
from nflib.core import Bijection, Compose, Flow, StandardNormal
from nflib.elementwise import Affine
from nflib.linear import LU
from nflib.normalization import ActNorm
from nflib.prepared import Prepared

VECTORS = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
COLOURS = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, tuple[Callable[[], Flow], Tensor]] = {
    "spline flow": (lambda: models.spline_flow(6, 3, hidden=16), VECTORS),
    "maf": (lambda: models.maf(6, 3, 16), VECTORS),
    "iaf": (lambda: models.iaf(6, 3, 16), VECTORS),
    "glow": (lambda: models.glow((3, 8, 8), 2, 2, 8), COLOURS),
    "mixerflow": (lambda: models.mixerflow((1, 8, 8), 2, 3, 16), IMAGES),
    "mixerflow, maf": (lambda: models.mixerflow((1, 8, 8), 2, 2, 16, flow="maf"), IMAGES),
    "mixerflow, batch norm": (
        lambda: models.mixerflow((1, 8, 8), 2, 2, 16, normalization="batchnorm"),
        IMAGES,
    ),
    "nothing to prepare": (lambda: models.nice(6), VECTORS),
}


def results(flow: nn.Module, x: Tensor) -> list[Tensor]:
    """log p, and the gradients of its parameters."""
    log_prob = flow(x)
    weights = torch.arange(1.0, len(x) + 1, dtype=x.dtype)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    found = torch.autograd.grad((weights * log_prob).sum(), parameters, allow_unused=True)
    return [log_prob, *(g for g in found if g is not None)]


def settled(make: Callable[[], Flow], x: Tensor) -> Flow:
    torch.manual_seed(0)
    flow = make().double()
    flow.initialize(x)
    checks.randomize_parameters(flow)
    return flow.eval()


@pytest.mark.parametrize("name", MODELS)
def test_densities_and_gradients_are_those_of_the_layers(name: str) -> None:
    make, x = MODELS[name]
    flow = settled(make, x)
    expected = results(flow, x)
    with Prepared(flow)():
        found = results(flow, x)
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_what_is_prepared_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside of the block no layer puts its own parameters together."""
    flows = [settled(*MODELS[name]) for name in ("glow", "mixerflow, maf")]
    prepared = [Prepared(flow) for flow in flows]

    def fail(self: object) -> Tensor:
        raise AssertionError("a layer assembled its own weight")

    monkeypatch.setattr("nflib.linear.place", fail)
    monkeypatch.setattr("nflib.autoregressive.made.place", fail)
    monkeypatch.setattr(LU, "factors", fail)
    for flow, ready, x in zip(flows, prepared, (COLOURS, IMAGES), strict=True):
        with ready():
            assert flow(x).shape == (4,)
        with pytest.raises(AssertionError):
            flow(x)


def test_new_parameters_are_seen() -> None:
    flow = settled(*MODELS["mixerflow"])
    prepared = Prepared(flow)
    with prepared():
        before = flow(IMAGES)
    checks.randomize_parameters(flow)
    with prepared():
        after = flow(IMAGES)
    torch.testing.assert_close(after, flow(IMAGES))
    assert not torch.allclose(before, after)


def test_what_a_reversible_composition_holds_is_left_alone() -> None:
    flow = settled(*MODELS["mixerflow"])
    expected = results(flow, IMAGES)
    reversible.turn_on(flow)
    with Prepared(flow)():
        found = results(flow, IMAGES)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


def test_only_pairs_without_a_bias_between_are_joined() -> None:
    def flow(bias: bool, norm: type[ActNorm] = ActNorm) -> Flow:
        layers = [layer for _ in range(3) for layer in (norm(4), LU(4, bias=bias))]
        return Flow(Compose(*layers), StandardNormal(4))

    class Other(ActNorm):
        """Somebody's own layer, which may do something else."""

    assert [len(Prepared(flow(bias)).joints) for bias in (False, True)] == [1, 0]
    assert Prepared(flow(False, Other)).joints == []


def test_a_matrix_of_random_order_keeps_its_rows() -> None:
    layers = [layer for _ in range(3) for layer in (ActNorm(5), LU(5, bias=False))]
    flow = Flow(Compose(*layers), StandardNormal(5)).double()
    checks.randomize_parameters(flow)
    assert any(lu.order.tolist() != [0, 1, 2, 3, 4] for lu in flow.modules() if isinstance(lu, LU))
    x = torch.randn(6, 5, dtype=torch.float64)
    expected = flow(x)
    with Prepared(flow)():
        torch.testing.assert_close(flow(x), expected, rtol=1e-10, atol=1e-10)


def test_the_way_back_is_as_it_was() -> None:
    flow = settled(*MODELS["glow"])
    z = torch.randn(4, 192, dtype=torch.float64)
    expected = flow.bijection.inverse(z)
    with Prepared(flow)():
        for got, want in zip(flow.bijection.inverse(z), expected, strict=True):
            assert torch.equal(got, want)


def test_wrong_shapes_are_still_one_sentence() -> None:
    flow = settled(*MODELS["spline flow"])
    with Prepared(flow)(), pytest.raises(ValueError, match="expects shape"):
        flow.bijection(torch.randn(3, 5, dtype=torch.float64))


def test_masked_layers_of_different_sizes_share_one_stretch() -> None:
    masks = [torch.rand(a, b) > 0.4 for a, b in ((3, 5), (7, 2), (4, 4))]
    net = nn.ModuleList(MaskedLinear(mask) for mask in masks)
    expected = [layer.weight() for layer in net]
    with Prepared(net)():
        for layer, want in zip(net, expected, strict=True):
            assert torch.equal(layer.weight(), want)


def test_a_context_reaches_masked_layers() -> None:
    layers = [MaskedAutoregressive(4, Affine(), 8, context_dim=2) for _ in range(2)]
    flow = Flow(Compose(*layers), StandardNormal(4)).double()
    checks.randomize_parameters(flow)
    x, context = torch.randn(3, 4).double(), torch.randn(3, 2).double()
    expected = flow.log_prob(x, context)
    with Prepared(flow)():
        torch.testing.assert_close(flow.log_prob(x, context), expected)


@pytest.mark.parametrize("name", ["glow", "mixerflow", "mixerflow, maf"])
def test_under_autocast_matrices_stay_in_float32(name: str) -> None:
    make, x = MODELS[name]
    flow = settled(make, x).float()
    x = x.float()
    expected = results(flow, x)
    with torch.autocast("cpu", torch.bfloat16), Prepared(flow)():
        found = flow(x)
    # Networks this narrow do not follow autocast, and nothing else may.
    torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-3)


def test_one_matrix_in_its_natural_order_says_nothing_about_the_others() -> None:
    lus = [LU(5, bias=False, weight=torch.eye(5)), LU(5, bias=False), LU(5, bias=False)]
    flow = Flow(Compose(*(layer for lu in lus for layer in (ActNorm(5), lu))), StandardNormal(5))
    flow = flow.double()
    checks.randomize_parameters(flow)
    natural = [lu.order.tolist() == [0, 1, 2, 3, 4] for lu in lus]
    assert natural[0]
    assert not all(natural)
    x = torch.randn(6, 5, dtype=torch.float64)
    expected = flow(x)
    with Prepared(flow)():
        torch.testing.assert_close(flow(x), expected, rtol=1e-10, atol=1e-10)


def test_layers_that_compute_anew_on_the_way_back_have_nothing_prepared() -> None:
    for name in ("mixerflow", "maf"):
        flow = settled(*MODELS[name])
        plain = Prepared(flow)
        assert plain.joints or plain.masked
        reversible.turn_on(flow)
        alone = Prepared(flow)
        assert alone.joints == []
        assert alone.masked is None


def test_parts_of_two_dtypes_are_prepared_apart() -> None:
    def part(dtype: torch.dtype) -> Compose:
        layers = [layer for _ in range(2) for layer in (ActNorm(4), LU(4, bias=False))]
        return Compose(*layers).to(dtype)

    both = nn.ModuleList(map(part, (torch.float32, torch.float64)))
    checks.randomize_parameters(both)
    inputs = [torch.randn(3, 4), torch.randn(3, 4, dtype=torch.float64)]
    expected = [layers(x) for layers, x in zip(both, inputs, strict=True)]
    with Prepared(both)():
        for layers, x, want in zip(both, inputs, expected, strict=True):
            torch.testing.assert_close(layers(x), want)


class Doubled(Bijection):
    """A layer of somebody's own that does not say what it takes and returns."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.repeat(1, 2), x.new_zeros(len(x))

    def output_shape(self, shape: object) -> None:
        return None


def test_what_reaches_a_pair_is_checked_like_what_reaches_a_layer() -> None:
    pairs = [layer for _ in range(2) for layer in (ActNorm(6), LU(6, bias=False))]
    layers = Compose(Doubled(), *pairs)
    assert layers(torch.randn(3, 3))[0].shape == (3, 6)
    with Prepared(layers)():
        assert layers(torch.randn(3, 3))[0].shape == (3, 6)
        with pytest.raises(ValueError, match="ActNorm expects shape"):
            layers(torch.randn(3, 4))


def test_what_is_loaded_after_it_was_made_counts() -> None:
    """Signs and permutations of an LU are buffers, which another model's state replaces."""
    make, x = MODELS["glow"]
    flow = settled(make, x)
    prepared = Prepared(flow)
    torch.manual_seed(1)
    other = make().double()
    checks.randomize_parameters(other)
    flow.load_state_dict(other.state_dict())
    with prepared():
        torch.testing.assert_close(flow(x), other.eval()(x), rtol=1e-9, atol=1e-9)


def test_an_actnorm_in_two_places_acts_in_both() -> None:
    shared = ActNorm(4)
    layers = [shared, LU(4, bias=False), shared, ActNorm(4), LU(4, bias=False)]
    flow = Flow(Compose(*layers, ActNorm(4), LU(4, bias=False)), StandardNormal(4)).double()
    checks.randomize_parameters(flow)
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = flow(x)
    prepared = Prepared(flow)
    assert [len(joints.norms) for joints in prepared.joints] == [2]
    with prepared():
        torch.testing.assert_close(flow(x), expected, rtol=1e-10, atol=1e-10)


def test_layers_that_somebody_watches_are_called() -> None:
    flow = settled(*MODELS["mixerflow"])
    seen = []
    watched = next(module for module in flow.modules() if isinstance(module, LU))
    watched.register_forward_hook(lambda *_: seen.append(1))
    with Prepared(flow)():
        flow(IMAGES)
    assert seen == [1]
