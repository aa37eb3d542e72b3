"""Autoregressive layers: what sees what, and inverses that are the naive loop's."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflib import autoregressive
from nflib.arguments import ArgumentError
from nflib.autoregressive import MADE, MaskedAutoregressive, MaskedLinear, NarrowHiddenWarning
from nflib.checks import (
    AutoregressiveError,
    InverseError,
    LogDetError,
    check_autoregressive,
    check_bijection,
    check_normalized,
    jacobian,
    randomize_parameters,
)
from nflib.core import Bijection, Compose, Flow, Inverse, StandardNormal
from nflib.data import load
from nflib.elementwise import (
    Additive,
    Affine,
    Elementwise,
    LogisticMixtureCDF,
    MonotoneNet,
    RationalQuadraticSpline,
)
from nflib.models import iaf, maf
from nflib.train import fit

# Few units are what many of these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::nflib.autoregressive.NarrowHiddenWarning")

ORDERS = {"natural": None, "reversed": [4, 3, 2, 1, 0], "own": [2, 0, 4, 1, 3], "random": "random"}
NETWORKS = {
    "one layer": {"hidden": (9,)},
    "three layers": {"hidden": (9, 5, 13)},
    "few units": {"hidden": (3, 3)},
    "residual": {"hidden": (8, 8), "residual": True},
    "dropout": {"hidden": (9, 7), "dropout": 0.5},
}
MAPS: dict[str, Elementwise] = {
    "additive": Additive(),
    "affine": Affine(),
    "spline": RationalQuadraticSpline(4),
    "mixture": LogisticMixtureCDF(3),
    "monotone": MonotoneNet(3, 2),
}
every_order = pytest.mark.parametrize("order", ORDERS)
every_network = pytest.mark.parametrize("network", NETWORKS)
every_map = pytest.mark.parametrize("tau", MAPS)
both_solvers = pytest.mark.parametrize("solver", ["incremental", "jacobi"])


def shaken(module: nn.Module, scale: float = 1.0) -> nn.Module:
    """In evaluation and float64, far from its initialisation, where all links are in use."""
    randomize_parameters(module, scale=scale)
    return module.double().eval()


def naive(layer: MaskedAutoregressive, z: Tensor, context: Tensor | None = None) -> Tensor:
    """The inverse as the definition has it: one pass of the whole network for each dimension."""
    x = z
    for i in layer.made.order.argsort().tolist():
        theta = layer.made(x, context)
        solved, _ = layer.elementwise.inverse(z, theta)
        x = torch.cat([x[:, :i], solved[:, i : i + 1], x[:, i + 1 :]], 1)
    return x


# --- what sees what ----------------------------------------------------------------------------


@every_order
@every_network
@pytest.mark.parametrize("context", [None, 3])
def test_outputs_see_the_dimensions_before_them(
    order: str, network: str, context: int | None
) -> None:
    made = shaken(MADE(5, 2, context_dim=context, order=ORDERS[order], **NETWORKS[network]))
    x = 4 * torch.randn(30, 5, dtype=torch.float64)  # wakes most of few units
    c = None if context is None else torch.randn(30, 3, dtype=torch.float64)
    check_autoregressive(lambda a: made(a, c).mT, x, made.order)
    # Networks that are wide enough have a path for every link which the order allows.
    paths = torch.eye(5)
    for mask in made.masks():
        paths = mask.float() @ paths
    below = torch.ones(5, 5).tril(-1) > 0
    assert torch.equal(paths > 0, below) or network == "few units"


@every_order
@every_map
def test_the_flow_is_triangular_in_its_order(order: str, tau: str) -> None:
    layer = shaken(MaskedAutoregressive(5, MAPS[tau], (9, 7), order=ORDERS[order]), 0.5)
    x = torch.randn(4, 5, dtype=torch.float64)
    for direction in (layer.forward, layer.inverse):
        check_autoregressive(lambda a, f=direction: f(a)[0], x, layer.made.order, strict=False)
        # That it may see itself is why the looser check is the right one.
        with pytest.raises(AutoregressiveError):
            check_autoregressive(lambda a, f=direction: f(a)[0], x, layer.made.order)


def test_a_context_reaches_every_dimension() -> None:
    layer = shaken(MaskedAutoregressive(4, Affine(), (9, 7), context_dim=2))
    x, c = torch.randn(3, 4).double(), torch.randn(3, 2).double()
    links = jacobian(lambda a: layer(x, a)[0], c).abs().amax(0)
    assert (links > 0).all()


class SeesItself(MADE):
    """An off-by-one: outputs see the units of their own dimension, too."""

    def degrees_of(self, hidden: tuple[int, ...]) -> list[Tensor]:
        *others, outputs = super().degrees_of(hidden)
        return [*others, outputs + 1]


class NotStrict(MADE):
    """An off-by-one at the other end: inputs one degree too low."""

    def degrees_of(self, hidden: tuple[int, ...]) -> list[Tensor]:
        inputs, *others = super().degrees_of(hidden)
        return [inputs - 1, *others]


class Backwards(MADE):
    """Hidden units see the units of higher degree."""

    def masks(self) -> list[Tensor]:
        first, *inner, last = super().masks()
        return [first, *(mask.T for mask in inner), last]


@pytest.mark.parametrize("kind", [SeesItself, NotStrict, Backwards])
@every_order
def test_a_planted_leak_is_found(kind: type[MADE], order: str) -> None:
    made = shaken(kind(5, 2, (8, 8), order=ORDERS[order]))
    x = torch.randn(6, 5, dtype=torch.float64)
    with pytest.raises(AutoregressiveError, match="which is not before it"):
        check_autoregressive(lambda a: made(a).mT, x, made.order)
    layer = MaskedAutoregressive(5, Affine(), (8, 8), order=made.order)
    layer.made = made.float()
    with pytest.raises((LogDetError, InverseError)):
        check_bijection(layer, torch.randn(4, 5))


def test_masks_are_the_papers() -> None:
    made = MADE(3, 1, (4, 4))
    degrees = [d.tolist() for d in made.degrees]
    assert degrees == [[1, 2, 3], [1, 1, 2, 2], [1, 1, 2, 2], [0, 1, 2]]
    first, inner, last = (mask.int().tolist() for mask in made.masks())
    assert first == [[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0]]
    assert inner == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert last == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("context", [None, 2])
@pytest.mark.parametrize("hidden", [(4,), (4, 4), (4, 6, 5), (16, 4), (4, 16)])
def test_narrow_layers_lose_no_more_than_they_must_and_say_so(
    hidden: tuple[int, ...], context: int | None
) -> None:
    needed = 9 if context is None else 10
    lost = needed - 4
    with pytest.warns(NarrowHiddenWarning) as caught:
        made = MADE(10, 1, hidden, context)
    assert str(caught[0].message) == (
        f"MADE expects hidden layers of at least {needed} units for 10 dimensions, got 4: {lost} "
        "of 9 outputs do not see the input just before them."
    )
    paths = torch.eye(10)
    for mask in made.masks():
        paths = mask.float() @ paths
    assert (paths.diagonal(-1) == 0).sum() == lost
    # The newest that an output sees is never further away than a fair share of the degrees.
    newest = [int(row.nonzero().max()) for row in paths[1:] if row.any()]
    assert max(rank - seen for rank, seen in enumerate(newest, 10 - len(newest))) <= 3


def test_wide_layers_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    for dim, hidden, context in (
        (10, (9, 40), None),
        (10, (10,), 2),
        (1, (1,), None),
        (2, 1, None),
    ):
        MADE(dim, 1, hidden, context)
    assert not recwarn.list


# --- weights -----------------------------------------------------------------------------------


def test_only_the_weights_in_use_are_stored() -> None:
    made = MADE(5, 2, (9, 7), context_dim=3)
    used = sum(int(mask.sum()) for mask in made.masks()[:-1]) + 2 * int(made.masks()[-1].sum())
    biases = 9 + 7 + 2 * 5
    assert sum(p.numel() for p in made.parameters()) == used + biases + 9 * 3
    for layer, mask in zip(made.layers, made.masks(), strict=False):
        assert torch.equal(layer.weight() != 0, mask)


def test_weights_start_as_wide_as_the_inputs_that_are_left() -> None:
    mask = torch.ones(3, 4000, dtype=torch.bool)
    mask[0, 4:], mask[2] = False, False
    layer = MaskedLinear(mask)
    weight = layer.weight()
    assert 0.1 < weight[0].abs().max() <= 0.5
    assert weight[1].abs().max() <= 4000**-0.5
    assert not weight[2].any()
    assert layer.taps.numel() == 4004
    zero = MaskedLinear(mask, zero=True)
    assert not zero.taps.any()
    assert not zero.bias.any()


def test_a_new_layer_is_the_identity() -> None:
    x = torch.randn(5, 4)
    for tau in (Affine(), RationalQuadraticSpline()):
        layer = MaskedAutoregressive(4, tau)
        z, log_det = layer(x)
        torch.testing.assert_close(z, x)
        torch.testing.assert_close(log_det, torch.zeros(5), atol=1e-5, rtol=0)


def test_the_order_is_part_of_the_state() -> None:
    """A random order comes back with the weights, into a layer that had another one."""
    first = MaskedAutoregressive(6, Affine(), (8,), order="random")
    second = MaskedAutoregressive(6, Affine(), (8,))
    randomize_parameters(first)
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(first(x)[0], second(x)[0])
    assert torch.equal(first.inverse(x)[0], second.inverse(x)[0])
    assert not second.made.natural
    third = MaskedAutoregressive(6, Affine(), (8,), order="random")
    third.load_state_dict(MaskedAutoregressive(6, Affine(), (8,)).state_dict())
    assert third.made.natural


# --- the inverse -------------------------------------------------------------------------------


@every_map
@every_network
@both_solvers
def test_inverse_is_the_naive_loop(tau: str, network: str, solver: str) -> None:
    options = {"order": ORDERS["own"], "solver": solver, **NETWORKS[network]}
    layer = shaken(MaskedAutoregressive(5, MAPS[tau], context_dim=2, **options), 0.5)
    z, c = torch.randn(7, 5).double(), torch.randn(7, 2).double()
    torch.testing.assert_close(layer.inverse(z, c)[0], naive(layer, z, c), atol=1e-12, rtol=1e-12)
    single = layer.float()
    expected = naive(single, z.float(), c.float())
    tolerance = {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(single.inverse(z.float(), c.float())[0], expected, **tolerance)


@both_solvers
@pytest.mark.parametrize("order", [None, "random"])
@pytest.mark.parametrize("dim", [1, 2, 8, 9, 16, 33])
@pytest.mark.parametrize("hidden", [(3,), (40, 40)])
def test_inverse_of_any_number_of_dimensions(
    dim: int, hidden: tuple[int, ...], order: str | None, solver: str
) -> None:
    """Dimensions that fill blocks of the incremental solver, and that do not."""
    layer = MaskedAutoregressive(dim, Affine(), hidden, order=order, solver=solver)
    shaken(layer)
    z = torch.randn(5, dim).double()
    x, log_det = layer.inverse(z)
    torch.testing.assert_close(x, naive(layer, z), atol=1e-12, rtol=1e-12)
    back, other = layer(x)
    torch.testing.assert_close(back, z, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(log_det, -other, atol=1e-10, rtol=1e-10)


@both_solvers
@every_map
def test_gradients_of_the_inverse_are_the_naive_loops(tau: str, solver: str) -> None:
    layer = shaken(MaskedAutoregressive(6, MAPS[tau], (9, 7), 2, "random", solver=solver), 0.5)
    z, c = torch.randn(4, 6).double().requires_grad_(), torch.randn(4, 2).double().requires_grad_()
    weights = torch.randn(4, 6).double()
    inputs = [z, c, *layer.parameters()]
    found = torch.autograd.grad((weights * layer.inverse(z, c)[0]).sum(), inputs)
    expected = torch.autograd.grad((weights * naive(layer, z, c)).sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


@every_map
@every_network
def test_without_gradients_the_inverse_is_the_same(tau: str, network: str) -> None:
    """Sums are then added up in place, but not under autocast or where a context is mapped over."""
    layer = shaken(MaskedAutoregressive(9, MAPS[tau], context_dim=2, **NETWORKS[network]), 0.5)
    z, c = torch.randn(7, 9).double(), torch.randn(7, 2).double()
    expected = layer.inverse(z, c)
    with torch.no_grad():
        assert torch.equal(layer.inverse(z, c)[0], expected[0])
        assert torch.equal(layer.inverse(z, c)[1], expected[1])
        if layer.exact_inverse:  # a search looks at values, which vmap refuses
            one = z[:1]
            mapped = torch.vmap(lambda row: layer.inverse(one, row[None])[0])(c)
            torch.testing.assert_close(mapped[:, 0], layer.inverse(one.expand(7, 9), c)[0])
        single = layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            narrow = single.inverse(z.float(), c.float())[0]
        torch.testing.assert_close(narrow.double(), expected[0], atol=0.2, rtol=0.2)


def test_every_unit_is_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the activations: rows of all calls together are the units of the network."""
    layer = shaken(MaskedAutoregressive(33, Affine(), (40, 50), order="random"))
    counted = []

    def relu(x: Tensor) -> Tensor:
        counted.append(len(x))
        return x.clamp_min(0)

    monkeypatch.setattr(autoregressive.made.F, "relu", relu)
    layer.inverse(torch.randn(5, 33).double())
    assert sum(counted) == 40 + 50


def test_jacobi_stops_when_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MaskedAutoregressive(40, Affine(), (80,), solver="jacobi")
    randomize_parameters(layer, scale=0.1)
    rounds = []
    by_rank = layer.made.by_rank
    monkeypatch.setattr(layer.made, "by_rank", lambda *a: rounds.append(0) or by_rank(*a))
    x, _ = layer.inverse(torch.randn(5, 40))
    assert 1 < len(rounds) < 20
    torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x)


@both_solvers
def test_a_wild_layer_is_inverted_all_the_same(solver: str) -> None:
    """Guesses of the Jacobi solver would overflow here, and zero times infinity is NaN."""
    torch.manual_seed(1)
    layer = MaskedAutoregressive(60, Affine(), (120, 120), solver=solver)
    randomize_parameters(layer, scale=20.0)
    layer.double()
    z = torch.randn(6, 60).double()
    x = naive(layer, z)
    found = layer.inverse(z)[0]
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[:, :20], x[:, :20], atol=1e-6, rtol=1e-6)


@both_solvers
def test_a_layer_can_be_vmapped(solver: str) -> None:
    layer = shaken(MaskedAutoregressive(9, Affine(), (12,), solver=solver))
    z = torch.randn(3, 4, 9).double()
    for function in (layer.forward, layer.inverse):
        whole = function(z.flatten(0, 1))
        for mapped, expected in zip(torch.vmap(function)(z), whole, strict=True):
            torch.testing.assert_close(mapped.flatten(0, 1), expected)


def test_in_training_dropout_acts_on_both_ways() -> None:
    layer = MaskedAutoregressive(4, Affine(), (32, 32), dropout=0.5)
    randomize_parameters(layer)
    x = torch.randn(3, 4)
    for function in (layer.forward, layer.inverse):
        assert not torch.equal(function(x)[0], function(x)[0])
    layer.eval()
    for function in (layer.forward, layer.inverse):
        assert torch.equal(function(x)[0], function(x)[0])


@both_solvers
@pytest.mark.parametrize("rows", [0, 1])
def test_small_batches_and_one_dimension(rows: int, solver: str) -> None:
    for context in (None, 2):
        layer = MaskedAutoregressive(1, Affine(), (4,), context, solver=solver)
        randomize_parameters(layer)
        c = None if context is None else torch.randn(rows, 2)
        x, log_det = layer.inverse(torch.randn(rows, 1), c)
        assert x.shape == (rows, 1)
        assert log_det.shape == (rows,)
    for tau in MAPS.values():
        check_bijection(MaskedAutoregressive(1, tau, (4, 4), solver=solver), torch.randn(3, 1))


@pytest.mark.parametrize("make", [maf, iaf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_whole_models_compile_and_keep_their_dtype(
    make: Callable[..., Flow], dtype: torch.dtype
) -> None:
    flow = make(4, 2, (8, 8)).to(dtype)
    randomize_parameters(flow)
    x = torch.randn(3, 4, dtype=dtype)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, flow(x))
    assert compiled.dtype == dtype
    assert flow.sample(2).dtype == dtype


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: MADE(0),
        lambda: MADE(3, 0),
        lambda: MADE(3, 1, ()),
        lambda: MADE(3, 1, (4, 0)),
        lambda: MADE(3, 1, (4, 5), residual=True),
        lambda: MADE(3, context_dim=0),
        lambda: MADE(3, order=[0, 1]),
        lambda: MADE(3, order=[0, 1, 1]),
        lambda: MADE(3, order=[1, 2, 3]),
        lambda: MADE(3, order=torch.zeros(3, 3)),
        lambda: MADE(3, order=torch.tensor(1)),
        lambda: MADE(3, order="reversed"),
        lambda: MADE(3, order=2),
        lambda: MADE(3, order=object()),
        lambda: MADE(True),
        lambda: MADE(3, dropout=1.0),
        lambda: MaskedLinear(torch.ones(3, 4)),
        lambda: MaskedAutoregressive(3, Affine),
        lambda: MaskedAutoregressive(3, nn.Tanh()),
        lambda: MaskedAutoregressive(3, Affine(), solver="newton"),
        lambda: maf(3, order="natural"),
        lambda: iaf(3, normalization="none"),
        lambda: MADE(3)(torch.randn(2, 4)),
        lambda: MADE(3)(torch.randn(3)),
        lambda: MADE(3, context_dim=2)(torch.randn(2, 3)),
        lambda: MADE(3, context_dim=2)(torch.randn(2, 3), torch.randn(2, 3)),
        lambda: MaskedAutoregressive(3, Affine())(torch.randn(2, 4)),
        lambda: MaskedAutoregressive(3, Affine()).inverse(torch.randn(2, 4)),
    ],
)
def test_what_does_not_fit_is_one_sentence(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"^[\w.]+ expects .*, got .*\.$"):
        make()


# --- MAF and IAF -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [maf, iaf])
@pytest.mark.parametrize("tau", ["affine", "spline"])
def test_in_two_dimensions_they_integrate_to_one(make: Callable[..., Flow], tau: str) -> None:
    flow = make(2, 2, (8,), elementwise=MAPS[tau], order="random")
    randomize_parameters(flow, scale=0.5)
    check_normalized(flow, limits=(-30, 30))


def test_iaf_is_maf_read_backwards() -> None:
    """The same layer, the other way round: what one does forwards the other does backwards."""
    layer = shaken(MaskedAutoregressive(5, RationalQuadraticSpline(4), (9, 7)))
    x = torch.randn(4, 5).double()
    for one, other in ((layer, Inverse(layer)), (Inverse(layer), layer)):
        assert all(torch.equal(a, b) for a, b in zip(one(x), other.inverse(x), strict=True))
    # Whole models: the layers of one, one by one the inverse of those of the other.
    torch.manual_seed(0)
    first = maf(5, 3, (16,))
    torch.manual_seed(0)
    second = iaf(5, 3, (16,))
    assert isinstance(first.bijection, Compose)
    assert isinstance(second.bijection, Compose)
    for one, other in zip(first.bijection, second.bijection, strict=True):
        if isinstance(other, Inverse):
            torch.testing.assert_close(one(x.float())[0], other.inverse(x.float())[0])


def test_a_reader_builds_a_maf_in_three_lines() -> None:
    torch.manual_seed(0)
    orders = [None, [1, 0]]
    layers = [MaskedAutoregressive(2, Affine(), (16, 16), order=order) for order in orders]
    flow = Flow(Compose(*layers), StandardNormal(2))
    moons, held_out = load("moons", "train", n=1000).x, load("moons", "valid", n=500).x
    before = flow.log_prob(held_out).mean().item()
    fit(flow, moons, steps=150, lr=1e-2, progress=False)
    assert flow.log_prob(held_out).mean().item() > before + 0.3
    assert flow.sample(4).shape == (4, 2)


def test_made_alone_is_a_density() -> None:
    """MADE with a Bernoulli for each bit: all 2^4 probabilities sum to one, in any order."""
    made = MADE(4, 1, (12, 12), order="random")
    randomize_parameters(made, scale=3.0)
    bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    logits = made(bits)[:, 0]
    log_prob = -F.binary_cross_entropy_with_logits(logits, bits, reduction="none").sum(1)
    torch.testing.assert_close(log_prob.exp().sum(), torch.tensor(1.0))


def test_layers_of_reversed_order_see_all_pairs() -> None:
    flow = shaken(maf(4, 2, (9, 9)))
    links = jacobian(flow.encode, torch.randn(3, 4).double()).abs().amax(0)
    assert (links > 0).all()


def parts(flow: Flow) -> list[str]:
    assert isinstance(flow.bijection, Compose)
    return [type(part).__name__ for part in flow.bijection]


def test_models_are_made_of_the_parts_that_they_say() -> None:
    assert parts(maf(4, 2)) == ["ActNorm", "MaskedAutoregressive"] * 2
    assert parts(iaf(4, 2, normalization="batchnorm")) == ["BatchNorm", "Inverse"] * 2
    assert parts(maf(4, 1, grey_levels=17))[:2] == ["UniformDequantization", "Logit"]

    def orders(flow: Flow) -> list[list[int]]:
        return [m.order.tolist() for m in flow.modules() if isinstance(m, MADE)]

    assert orders(maf(3, 3)) == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]
    torch.manual_seed(0)
    drawn = orders(iaf(20, 3, order="random"))
    assert all(a != b for a, b in pairwise(drawn))
    assert all(made.residual for made in maf(3, residual=True).modules() if isinstance(made, MADE))


def test_a_layer_is_a_bijection_of_its_own_order() -> None:
    layer: Bijection = MaskedAutoregressive(5, Affine(), (8,), order=[4, 2, 0, 1, 3])
    assert layer.event_shape == (5,)
    check_bijection(layer, torch.randn(4, 5))


@both_solvers
def test_the_network_sees_no_further_than_the_limit(solver: str) -> None:
    layer = shaken(MaskedAutoregressive(4, Affine(), (8,), solver=solver, limit=2.0), 0.5)
    far = torch.tensor([[3.0, -5.0, 9.0, 1.0], [2.0, -2.0, 2.0, 1.0]]).double()
    assert torch.equal(*layer._theta(far, None))
    # Both inside and outside of the limit it is a bijection.
    check_bijection(layer, 4 * torch.randn(8, 4), randomize=False)
    with pytest.raises(
        ArgumentError, match="^MaskedAutoregressive expects limit to be .*, got 0.$"
    ):
        MaskedAutoregressive(4, Affine(), limit=0)


def test_the_limit_keeps_a_flow_of_images_from_exploding() -> None:
    """A stack whose networks answer far inputs with larger ones, with and without the limit."""
    torch.manual_seed(0)
    flow = maf(16, 4, (32,), grey_levels=17)
    randomize_parameters(flow)
    layers = [part for part in flow.modules() if isinstance(part, MaskedAutoregressive)]
    z = 10 * torch.randn(50, 16)
    behind = flow.bijection[2:]
    sizes = []
    for limit in (layers[0].limit, math.inf):
        for layer in layers:
            layer.limit = limit
        sizes.append(behind.inverse(z)[0].abs().max().item())
    assert sizes[0] < sizes[1] / 10


def test_a_layer_shows_its_map_its_solver_and_its_limit() -> None:
    layer = MaskedAutoregressive(3, Affine(bound=2.0), (8,), solver="jacobi", limit=12)
    first = repr(layer).splitlines()[1]
    assert first.strip() == "Affine(bound=2.0), solver='jacobi', limit=12"
    assert "limit" not in repr(MaskedAutoregressive(3, Affine(), (8,)))


@pytest.mark.parametrize(("name", "steps"), [("digits", 150), ("mnist", 100)])
@torch.no_grad()
def test_samples_of_pixels_keep_their_log_density(name: str, steps: int) -> None:
    """Behind dequantization and logit, 10,000 samples within 1e-3 nats/dim of the way they came."""
    try:
        data = load(name, "train", download=False)
    except ValueError:
        pytest.skip(f"{name} is not here")
    x = data.x.flatten(1)
    dim = x.shape[1]
    flow = maf(dim, 3, (128,), grey_levels=data.levels)
    with torch.enable_grad():
        fit(flow, x, steps=steps, lr=3e-3, progress=False)
    behind = flow.bijection[1:]
    z = flow.base.sample(10_000)
    pixels, log_det = behind.inverse(z)
    again, back_log_det = behind(pixels)
    there = flow.base.log_prob(z) - log_det
    back = flow.base.log_prob(again) + back_log_det
    assert torch.isfinite(there).all()
    assert (there - back).abs().max() / dim < 1e-3


def test_a_residual_made_adds_its_blocks_to_what_runs_along_the_shortcuts() -> None:
    made = MADE(4, 2, (6, 6), residual=True)
    randomize_parameters(made)
    x = torch.randn(5, 4)
    first, *rest = made.layers
    h = first(x)
    for inner, outer in zip(rest[::2], rest[1::2], strict=True):
        h = h + outer(torch.relu(inner(torch.relu(h))))
    assert len(rest) == 4
    torch.testing.assert_close(made(x), made.last(torch.relu(h)).view(5, 2, 4))


def test_guesses_that_overflow_leave_what_is_final_alone() -> None:
    """Not limited, the guesses of single precision reach infinity here, and all becomes NaN."""
    torch.manual_seed(1)
    layer = MaskedAutoregressive(30, Affine(), (60,), solver="jacobi")
    randomize_parameters(layer, scale=300.0)
    assert torch.isfinite(layer.inverse(torch.randn(6, 30))[0]).all()
