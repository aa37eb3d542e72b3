"""Residual blocks: contractions, their inverses, and log-dets exact, cut off and estimated."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tape import Tape
from torch import Tensor, nn

from nflib import models
from nflib.arguments import ArgumentError
from nflib.cache import cached
from nflib.checks import (
    check_bijection,
    check_normalized,
    check_vmap,
    jacobian,
    randomize_parameters,
)
from nflib.core import Compose, Flow, Inverse, ShapeError, StandardNormal
from nflib.residual import (
    ConvergenceError,
    Exact,
    LipschitzConvNet,
    LipschitzMLP,
    LipSwish,
    LogDet,
    ResidualBlock,
    Roulette,
    Series,
    SpectralConv2d,
    SpectralLinear,
    jacobian_matrix,
    pullback,
    weighted_series,
)
from nflib.residual.lipschitz import SpectralNorm, spectral_layers
from nflib.train import GraphWarning, fit

mlp = partial(LipschitzMLP, 3, (8, 6))
conv = partial(LipschitzConvNet, (2, 3, 4), (5, 4))
MAKES: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "vectors": (mlp, (3,)),
    "images": (conv, (2, 3, 4)),
    "one dimension": (partial(LipschitzMLP, 1, 8), (1,)),
}


class Linear(nn.Module):
    """``g(x) = A x`` with a matrix of its own for each row, so that each row has its gradient."""

    def __init__(self, matrix: Tensor, rows: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.expand(rows, -1, -1).clone())

    def forward(self, x: Tensor) -> Tensor:
        return (self.matrix * x[:, None]).sum(2)


class Times(nn.Module):
    """``g(x) = a x``."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x


def contraction(size: int = 3, norm: float = 0.6) -> Tensor:
    torch.manual_seed(5)
    matrix = torch.randn(size, size).double()
    return matrix * norm / torch.linalg.matrix_norm(matrix, 2)


def far(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network with weights far above what their bounds allow."""
    randomize_parameters(net, seed, 3.0)
    return net


# Lipschitz constants


@pytest.mark.parametrize("raw", [-3.0, 0.5, 4.0])
def test_the_slope_of_lipswish_is_at_most_one(raw: float) -> None:
    swish = LipSwish().double()
    nn.init.constant_(swish.raw_b, raw)
    x = torch.linspace(-200, 200, 400_001).double().requires_grad_()
    slope = torch.autograd.grad(swish(x).sum(), x)[0]
    assert 0.9995 < slope.max() < 1
    assert slope.min() > -0.1


def test_lipswish_is_its_formula() -> None:
    x = torch.linspace(-3, 3, 7)
    b = math.log(1 + math.exp(0.5))
    torch.testing.assert_close(LipSwish()(x), x / (1 + torch.exp(-b * x)) / 1.1)


LAYERS: dict[str, Callable[[], SpectralNorm]] = {
    "tall": lambda: SpectralLinear(2, 64, 0.5),
    "square": lambda: SpectralLinear(64, 64, 0.5),
    "3x3": lambda: SpectralConv2d((3, 6, 5), 8, 3, 0.5),
    "1x1": lambda: SpectralConv2d((8, 6, 5), 8, 1, 0.5),
    "5x5": lambda: SpectralConv2d((1, 8, 8), 4, 5, 0.5),
    "3x3, small image": lambda: SpectralConv2d((4, 2, 2), 4, 3, 0.5),
}


def dense(layer: SpectralNorm, weight: Tensor) -> Tensor:
    """The layer as a matrix: what it makes of each unit vector."""
    units = torch.eye(layer.direction.numel(), dtype=weight.dtype)
    return layer.apply_to(units.view(-1, *layer.direction.shape), weight).flatten(1).mT


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", LAYERS)
def test_the_norm_is_that_of_the_whole_matrix(name: str, seed: int) -> None:
    """From a direction that belongs to other weights; 0.97 leaves a network 3 % of room."""
    torch.manual_seed(seed)
    layer = LAYERS[name]().double().eval()
    far(layer, seed)
    exact = torch.linalg.matrix_norm(dense(layer, layer.raw), 2)
    assert exact * 0.99 < layer.norm() < exact * (1 + 1e-9)
    shrunk = torch.linalg.matrix_norm(dense(layer, layer.weight()), 2)
    assert shrunk.item() == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("name", LAYERS)
def test_the_way_back_is_the_transpose(name: str) -> None:
    layer = LAYERS[name]().double()
    v = torch.randn(1, *layer.direction.shape).double()
    there = layer.apply_to(v, layer.raw)
    u = torch.randn_like(there)
    back = layer.apply_back(u, layer.raw)
    assert (there * u).sum().item() == pytest.approx((v * back).sum().item())


def test_a_weight_within_its_bound_is_left_alone() -> None:
    layer = SpectralLinear(3, 3, 0.5).eval()
    nn.init.eye_(layer.raw)
    torch.testing.assert_close(layer.weight(), 0.5 * torch.eye(3))
    layer.raw.data *= 0.1
    torch.testing.assert_close(layer.weight(), 0.1 * torch.eye(3))


def test_the_kernel_as_a_matrix_has_another_norm() -> None:
    layer = SpectralConv2d((1, 32, 32), 1, 3).double().eval()
    nn.init.ones_(layer.raw)
    assert torch.linalg.matrix_norm(layer.raw.flatten(1), 2) == 3
    assert 8.8 < layer.norm() < 9


def test_a_weight_of_zero_gives_zero() -> None:
    for layer in (SpectralLinear(3, 3), SpectralConv2d((1, 4, 4), 2)):
        nn.init.zeros_(layer.raw)
        layer.iterate(3)
        assert not layer.weight().any()
        assert torch.linalg.vector_norm(layer.direction).item() == pytest.approx(1)


@pytest.mark.parametrize("bound", [0.3, 0.97])
@pytest.mark.parametrize("name", MAKES)
def test_networks_keep_their_bound(name: str, bound: float) -> None:
    make, event = MAKES[name]
    net = far(make(bound=bound)).double().eval()
    x = 5 * torch.randn(100, *event).double()
    norms = torch.linalg.matrix_norm(jacobian(net, x), 2)
    assert norms.max() < bound * 1.01
    y = x.flip(0)
    change = (net(x) - net(y)).flatten(1).norm(dim=1)
    assert (change <= bound * 1.01 * (x - y).flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("name", MAKES)
def test_the_layers_bounds_multiply_to_that_of_the_network(name: str) -> None:
    bounds = [layer.bound for layer in spectral_layers(MAKES[name][0](bound=0.3))]
    assert math.prod(bounds) == pytest.approx(0.3)
    assert len(set(bounds)) == 1


def test_the_bound_is_used_and_not_only_kept() -> None:
    """Linear layers alone, at their bounds and along one direction, reach it."""
    net = LipschitzMLP(2, (4,), bound=0.9).double().eval()
    for layer, size in zip(net.layers, ((4, 2), (2, 4)), strict=True):
        layer.raw.data = 10 * torch.eye(*size).double()
    net.activations[0] = nn.Identity()
    torch.testing.assert_close(net(torch.ones(1, 2).double()), 0.9 * torch.ones(1, 2).double())


def test_training_turns_the_directions_once_a_step_and_nothing_else_does() -> None:
    block, x = ResidualBlock(far(mlp())), torch.randn(4, 3)
    layers = spectral_layers(block.net)
    assert len(layers) == 3

    def directions() -> list[Tensor]:
        return [layer.direction.clone() for layer in layers]

    before = directions()
    expected = copy.deepcopy(layers)
    for layer in expected:
        layer.iterate(1)
    block.train()(x)
    for now, then, once in zip(directions(), before, expected, strict=True):
        assert not torch.equal(now, then)
        torch.testing.assert_close(now, once.direction)
    before = directions()
    block.inverse(x)
    block.eval()(x)
    block.inverse(x)
    assert all(torch.equal(a, b) for a, b in zip(directions(), before, strict=True))


def test_power_iterations_follow_the_weights_through_training() -> None:
    layer = SpectralLinear(16, 16, 0.5).double().train()
    for step in range(300):
        randomize_parameters(layer, step, 0.01)
        layer.iterate()
    exact = torch.linalg.matrix_norm(layer.raw, 2).item()
    assert layer.norm().item() == pytest.approx(exact, rel=1e-3)


def test_two_steps_forward_and_then_backward() -> None:
    block, x = ResidualBlock(mlp()).train(), torch.randn(4, 3)
    (block(x)[1].sum() + block(x)[1].sum()).backward()


def test_the_norms_gradient_is_that_of_the_largest_singular_value() -> None:
    layer = SpectralConv2d((2, 4, 4), 3, 3, 0.5).double().eval()
    far(layer)
    found = torch.autograd.grad(layer.norm(), layer.raw)[0]
    exact = torch.autograd.grad(torch.linalg.matrix_norm(dense(layer, layer.raw), 2), layer.raw)[0]
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-2)


# Log-dets


def test_the_series_of_a_number_is_that_of_the_logarithm() -> None:
    block = ResidualBlock(Times(0.5).double(), Series(3)).eval()
    _, log_det = block(torch.randn(4, 1).double())
    torch.testing.assert_close(log_det, torch.full((4,), 0.5 - 0.125 + 0.125 / 3).double())


@pytest.mark.parametrize("terms", [1, 2, 7])
def test_a_series_is_cut_off_where_it_says(terms: int) -> None:
    """Of a diagonal J random signs give the traces without any scatter."""
    diagonal = torch.tensor([0.5, -0.4, 0.1]).double()
    net = Linear(diagonal.diag(), 5)
    _, log_det = ResidualBlock(net, Series(terms)).eval()(torch.randn(5, 3).double())
    exact = sum((-1) ** (k + 1) * diagonal.pow(k).sum() / k for k in range(1, terms + 1))
    torch.testing.assert_close(log_det, exact.expand(5))
    bound = 3 * (-math.log(0.5) - sum(0.5**k / k for k in range(1, terms + 1)))
    assert abs(log_det[0] - torch.log1p(diagonal).sum()) <= bound


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_the_gradient_of_a_series_is_that_of_the_terms_it_has(terms: int) -> None:
    diagonal = torch.tensor([0.5, -0.4, 0.1]).double()
    net = Linear(diagonal.diag(), 1)
    ResidualBlock(net, Series(terms)).eval()(torch.randn(1, 3).double())[1].sum().backward()
    exact = sum((-1) ** (k - 1) * diagonal.pow(k - 1) for k in range(1, terms + 1))
    torch.testing.assert_close(net.matrix.grad[0].diagonal(), exact)  # type: ignore[index]


ROULETTES = [
    Roulette(2, 2.0, "geometric"),
    Roulette(0, 1.0, "geometric"),
    Roulette(2, 2.0, "poisson"),
    Roulette(0, 3.0, "poisson"),
]


@pytest.mark.parametrize("roulette", ROULETTES, ids=repr)
def test_the_weights_are_one_over_how_often_a_term_is_met(roulette: Roulette) -> None:
    torch.manual_seed(0)
    draws = torch.tensor([roulette.draw() for _ in range(20_000)])
    assert draws.double().mean().item() == pytest.approx(roulette.mean, abs=0.06)
    weights = roulette.weights(4)
    assert weights[: roulette.exact_terms] == [1.0] * roulette.exact_terms
    for j, weight in enumerate(weights[roulette.exact_terms :], 1):
        share = (draws >= j).double().mean().item()
        assert share * weight == pytest.approx(1, abs=5 * ((weight - 1) / 20_000) ** 0.5)
    assert roulette.weights(0) == [1.0] * roulette.exact_terms


@pytest.mark.parametrize("roulette", ROULETTES, ids=repr)
def test_the_estimate_and_its_gradient_are_unbiased(roulette: Roulette) -> None:
    """20,000 draws; of each N as many rows at once as drew it."""
    matrix, x = contraction(), torch.randn(1, 3).double()
    torch.manual_seed(1)
    counts = torch.tensor([roulette.draw() for _ in range(20_000)])
    values, gradients = [], []
    for n in counts.unique().tolist():
        rows = int((counts == n).sum())
        net, at = Linear(matrix, rows), x.expand(rows, 3)
        estimate = weighted_series(pullback(net, at)[1], at, roulette.weights(n))
        values.append(estimate.detach())
        found = torch.autograd.grad(estimate.sum(), net.matrix, materialize_grads=True)[0]
        gradients.append(found)
    exact = torch.linalg.slogdet(torch.eye(3).double() + matrix)[1]
    slope = torch.linalg.inv(torch.eye(3).double() + matrix).mT
    for found, truth in ((torch.cat(values), exact), (torch.cat(gradients), slope)):
        error = found.std(0) / 20_000**0.5
        assert ((found.mean(0) - truth).abs() < 4 * error).all()
        # And not because the error is large.
        assert (error < 0.03).all()


def test_the_block_draws_in_training_and_is_exact_in_evaluation() -> None:
    block, x = ResidualBlock(mlp()), torch.randn(64, 3)
    torch.manual_seed(0)
    first, second = block(x)[1], block(x)[1]
    assert not torch.equal(first, second)
    block.eval()
    assert torch.equal(block(x)[1], block(x)[1])
    assert torch.equal(ResidualBlock(block.net, train_log_det=Exact())(x)[1], block(x)[1])
    cut = ResidualBlock(block.net, Series(20)).eval()
    assert not torch.equal(cut(x)[1], cut(x)[1])


@pytest.mark.parametrize(
    ("log_det", "word"),
    [(None, "exact"), (Exact(), "exact"), (Series(5), "estimate"), (Roulette(), "estimate")],
)
def test_the_likelihood_is_what_the_log_det_is(log_det: LogDet | None, word: str) -> None:
    for shape in (3, 5, (1, 4, 4)):
        assert models.residual_flow(shape, 1, 8, log_det=log_det).likelihood == word


def held(terms: int) -> int:
    """Bytes that autograd keeps for a backward pass."""
    torch.manual_seed(0)
    net, x, sizes = mlp(), torch.randn(16, 3, requires_grad=True), {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        weighted_series(pullback(net, x)[1], x, [1.0] * terms)
    return sum(t.untyped_storage().nbytes() for t in sizes.values())


def test_memory_does_not_grow_with_the_number_of_terms() -> None:
    assert held(1) == held(20) > 0


def test_a_jacobian_is_autograds() -> None:
    net, x = far(conv()).double().eval(), torch.randn(3, 2, 3, 4).double()
    torch.testing.assert_close(jacobian_matrix(pullback(net, x)[1], x), jacobian(net, x))


def test_a_pullback_has_a_graph_where_one_is_asked_for() -> None:
    net, x = mlp(), torch.randn(4, 3)
    value, pull = pullback(net, x)
    assert value.requires_grad
    assert pull(x).requires_grad
    with torch.no_grad():
        value, pull = pullback(net, x)
        assert not value.requires_grad
        assert not pull(x).requires_grad


def test_log_probs_are_the_same_with_and_without_gradients() -> None:
    flow, x = models.residual_flow(3, 2, 8).eval(), torch.randn(5, 3)
    expected = flow.log_prob(x)
    assert expected.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found, sample = flow.log_prob(x), flow.sample(4)
        assert not found.requires_grad
        assert not sample.requires_grad
        torch.testing.assert_close(found, expected.detach())


def test_inference_mode_takes_a_context() -> None:
    block, x, c = ResidualBlock(mlp(context_dim=2)).eval(), torch.randn(4, 3), torch.randn(4, 2)
    with torch.inference_mode():
        z, log_det = block(2 * x, 2 * c)
        back, other = block.inverse(z, 2 * c)
    torch.testing.assert_close(back, 2 * x, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(log_det, -other, atol=1e-4, rtol=1e-4)


# Inverses


@pytest.mark.parametrize("solver", ["fixed point", "newton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_is_as_close_as_it_says(dtype: torch.dtype, solver: str) -> None:
    block = ResidualBlock(far(mlp()), solver=solver).to(dtype).eval()  # type: ignore[arg-type]
    z = 3 * torch.randn(50, 3, dtype=dtype)
    x, _ = block.inverse(z)
    limit = torch.finfo(dtype).eps ** 0.7 * (1 + z.abs().amax(1))
    assert ((block(x)[0] - z).abs().amax(1) <= limit).all()


def test_a_fixed_point_comes_nearer_by_the_bound_in_each_round() -> None:
    """``x <- z - x / 2``, from z = 1: 1/2, 3/4, 5/8, ... towards 2/3."""
    z = torch.ones(1, 1).double()
    for rounds in range(2, 8):
        block = ResidualBlock(Times(0.5).double(), tolerance=0.51**rounds, rounds=rounds + 1)
        error = (block.inverse(z)[0] - 2 / 3).abs().item()
        assert error <= 0.5**rounds
    with pytest.raises(ConvergenceError):
        ResidualBlock(Times(0.5).double(), tolerance=0.5**20, rounds=10).inverse(z)


def test_newton_needs_few_rounds() -> None:
    net, z = nn.Sequential(nn.Tanh(), Times(0.9).double()), torch.randn(20, 3).double()
    ResidualBlock(net, solver="newton", rounds=12).inverse(z)
    with pytest.raises(ConvergenceError):
        ResidualBlock(net, rounds=24).inverse(z)


def test_newton_is_exact_for_a_linear_map_at_once() -> None:
    net, z = Linear(contraction(), 5), torch.randn(5, 3).double()
    x, _ = ResidualBlock(net, solver="newton", rounds=2).eval().inverse(z)
    torch.testing.assert_close(x + net(x), z)


def test_newton_does_not_leave_a_contraction() -> None:
    """Where the slope changes fast a Newton step overshoots; a fixed-point step does not."""

    class Steep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.98 * torch.sin(x)

    z = torch.linspace(-60, 60, 1001).double()[:, None]
    x, _ = ResidualBlock(Steep(), solver="newton", rounds=60).eval().inverse(z)
    torch.testing.assert_close(x + 0.98 * torch.sin(x), z)


def test_rows_that_do_not_converge_are_named() -> None:
    class Jump(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -2 * x * (x > 0)

    block = ResidualBlock(Jump(), rounds=50)
    x = torch.tensor([[-1.0], [1.0], [-2.0], [3.0]])
    message = (
        r"^ResidualBlock\.inverse expects to come within [\d.e-]+ of z in 50 rounds, got 2 of 4 "
        r"rows that are not there \(rows 1, 3\), the worst [\d.e+]+ away; a network with a "
        r"Lipschitz constant below 1 converges if it gets enough rounds\.$"
    )
    with pytest.raises(ConvergenceError, match=message):
        block.inverse(x)
    with pytest.raises(ConvergenceError, match=r"1 of 1 rows that are not there \(row 0\)"):
        block.inverse(x[1:2])
    assert issubclass(ConvergenceError, ValueError)
    block.inverse(x[::2])


def test_a_number_that_is_none_does_not_pass_for_converged() -> None:
    block = ResidualBlock(mlp(), rounds=20, tolerance=1e-2)
    z = torch.randn(3, 3)
    z[1, 2] = math.nan
    with pytest.raises(ConvergenceError, match=r"1 of 3 rows .* \(row 1\), the worst inf away"):
        block.inverse(z)


def test_the_inverses_gradient_is_exact_however_small() -> None:
    net, z = Linear(contraction(), 1), torch.randn(1, 3).double().requires_grad_()
    x, _ = ResidualBlock(net).eval().inverse(z)
    inverse = torch.linalg.inv(torch.eye(3).double() + contraction())
    for size in (1.0, 1e-12):
        found = torch.autograd.grad((size * x).sum(), (z, net.matrix), retain_graph=True)
        torch.testing.assert_close(found[0][0] / size, inverse.sum(0))
        slope = -torch.outer(inverse.sum(0), x[0].detach())
        torch.testing.assert_close(found[1][0] / size, slope)
    zero = torch.autograd.grad((0 * x).sum(), z, retain_graph=True)[0]
    assert not zero.any()
    with pytest.raises(NotImplementedError, match="has first derivatives only"):
        torch.autograd.grad(x.sum(), z, create_graph=True)


def test_reparameterised_samples_have_gradients() -> None:
    flow = models.residual_flow(3, 2, 8)
    x, log_prob = flow.rsample_with_log_prob(6)
    (x.sum() + log_prob.sum()).backward()
    # The last bias moves nothing that the log-det sees, but it moves the samples.
    assert all(p.grad is not None and p.grad.any() for p in flow.parameters())


# How it is used


def test_it_is_mapped_and_differentiated_by_torch_func() -> None:
    block, x = ResidualBlock(mlp()).double().eval(), torch.randn(3, 3).double()
    mapped = ResidualBlock(mlp(bound=0.5), rounds=60).double().eval()
    check_vmap(mapped, x)
    found = torch.func.jacrev(lambda a: block.inverse(a[None])[0][0])(x[0])
    torch.testing.assert_close(torch.linalg.slogdet(found)[1], block.inverse(x[:1])[1][0])
    slope = torch.func.grad(lambda a: block(a[None])[1][0])(x[0])
    at = x[:1].clone().requires_grad_()
    torch.testing.assert_close(slope, torch.autograd.grad(block(at)[1].sum(), at)[0][0])


@pytest.mark.parametrize("log_det", [Exact(), Series(3)])
def test_forward_compiles_as_one_graph_and_inverse_is_left_out(log_det: LogDet) -> None:
    block = ResidualBlock(Linear(contraction().diagonal().diag(), 4), log_det).eval()
    x = torch.randn(4, 3).double()
    compiled = torch.compile(block.forward, fullgraph=True, backend="aot_eager")(x)
    for found, expected in zip(compiled, block(x), strict=True):
        torch.testing.assert_close(found, expected)
    back = torch.compile(block.inverse, backend="aot_eager")(compiled[0].detach())[0]
    torch.testing.assert_close(back, x)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(block.inverse, fullgraph=True, backend="aot_eager")(x)


def test_it_is_copied_and_pickled() -> None:
    block = ResidualBlock(mlp(), Series(4), Roulette(1, 3.0, "poisson"), "newton")
    x = torch.randn(4, 3)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert repr(other) == repr(block)
        assert torch.equal(other.eval()(x)[0], block.eval()(x)[0])
    assert "Series(terms=4)" in repr(block)
    assert "Roulette(exact_terms=1, mean=3.0, law='poisson')" in repr(block)


def test_weights_are_made_once_a_call_and_once_where_they_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = ResidualBlock(mlp()).eval()
    made: list[SpectralLinear] = []
    norm = SpectralLinear.norm

    def counted(layer: SpectralLinear) -> Tensor:
        made.append(layer)
        return norm(layer)

    monkeypatch.setattr(SpectralLinear, "norm", counted)
    x = torch.randn(4, 3)
    with torch.no_grad():
        expected = block(x)[0]
        assert len(made) == 3
        made.clear()
        block.inverse(x)
        assert len(made) <= 6
        made.clear()
        with cached(block):
            assert torch.equal(block(x)[0], expected)
            block.inverse(x)
            block(x)
        assert len(made) == 3


def test_a_network_of_ones_own_will_do() -> None:
    block = ResidualBlock(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    nn.init.orthogonal_(block.net[0].weight, 0.7)  # type: ignore[index]
    check_bijection(block, torch.randn(4, 2), randomize=False)


def test_directions_are_the_only_state_beside_the_parameters() -> None:
    names = {name for name, _ in ResidualBlock(mlp()).named_buffers()}
    assert names == {f"net.layers.{k}.direction" for k in range(3)}


# Training


def trained(train_log_det: LogDet | None, steps: int = 12) -> tuple[Flow, list[float]]:
    torch.manual_seed(3)
    flow = models.residual_flow(3, 2, 8, train_log_det=train_log_det)
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    history = fit(flow, x, steps=steps, batch_size=16, validate_every=4, progress=False)
    return flow, history.column("train")


@pytest.mark.parametrize("log_det", [Exact(), Series(4)])
def test_a_step_with_a_fixed_number_of_terms_is_recorded(
    recorded: list[Tape], monkeypatch: pytest.MonkeyPatch, log_det: LogDet
) -> None:
    flow, losses = trained(log_det)
    assert len(recorded) == 1
    monkeypatch.setattr("nflib.graphs.recorder_for", lambda device: None)
    plain, expected = trained(log_det)
    assert losses == expected
    for a, b in zip(flow.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("law", ["geometric", "poisson"])
def test_a_step_that_draws_its_number_of_terms_is_not_recorded(
    recorded: list[Tape], monkeypatch: pytest.MonkeyPatch, law: Any
) -> None:
    """The number would be frozen into the recording, and the estimate be biased."""
    with pytest.warns(GraphWarning, match=r"reads a value back \(a number .* in draw, log_det\.py"):
        flow, losses = trained(Roulette(law=law))
    assert recorded == []
    monkeypatch.setattr("nflib.graphs.recorder_for", lambda device: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, expected = trained(Roulette(law=law))
    assert losses == expected
    for a, b in zip(flow.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("dim", "kind"), [(1, Exact), (4, Exact), (5, Roulette)])
def test_few_dimensions_train_with_exact_log_dets(dim: int, kind: type) -> None:
    """Up to four products are fewer than roulette needs on average."""
    block = models.residual_flow(dim, 1, 4).bijection[1]  # type: ignore[index]
    assert type(block.train_log_det) is kind
    block = models.residual_flow(dim, 1, 4, train_log_det=Series(2)).bijection[1]  # type: ignore[index]
    assert type(block.train_log_det) is Series


def test_a_flow_learns() -> None:
    torch.manual_seed(0)
    flow = models.residual_flow(2, 3, 16)
    x = torch.randn(512, 2)
    x[:, 1] += x[:, 0].square()
    before = flow.eval().log_prob(x).mean()
    fit(flow, x, steps=120, batch_size=128, lr=2e-2, progress=False)
    assert flow.log_prob(x).mean() > before + 0.5
    y = flow.sample(100)
    torch.testing.assert_close(flow.decode(flow.encode(y)), y, atol=1e-3, rtol=1e-3)


def test_images_of_grey_levels() -> None:
    flow = models.residual_flow((1, 4, 4), 1, 4, levels=2, grey_levels=17)
    x = torch.randint(0, 17, (20, 1, 4, 4))
    fit(flow, x, steps=3, batch_size=10, progress=False)
    assert flow.likelihood == "lower bound"
    assert flow.log_prob(x).shape == (20,)
    assert flow.sample(3).shape == (3, 1, 4, 4)


# Errors


def wrong(make: Any, *args: Any, **options: Any) -> Any:
    """A call that a type checker would not let pass."""
    return make(*args, **options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: wrong(ResidualBlock, nn.Linear), "net to be a Module, got the class Linear"),
        (
            lambda: wrong(ResidualBlock, mlp(), "exact"),
            "log_det to be a LogDet or None, got 'exact'",
        ),
        (lambda: wrong(ResidualBlock, mlp(), solver="bisection"), "solver to be 'fixed point' or"),
        (lambda: ResidualBlock(mlp(), tolerance=0.0), "tolerance to be a number above 0"),
        (lambda: ResidualBlock(mlp(), rounds=0), "rounds to be a whole number of at least 1"),
        (lambda: LipschitzMLP(0), "dim to be a whole number of at least 1"),
        (lambda: LipschitzMLP(2, bound=1.0), "bound to be a number between 0 and 1, got 1.0"),
        (lambda: LipschitzMLP(2, bound=0), "bound to be a number between 0 and 1, got 0"),
        (lambda: LipschitzMLP(2, context_dim=(1, 2, 2)), "context_dim to be the size of a vector"),
        (lambda: wrong(LipschitzConvNet, 2), "shape to be the shape .channels, height, width"),
        (lambda: LipschitzConvNet((1, 2, 2), context_dim=(1, 2, 2)), "context_dim to be the size"),
        (lambda: SpectralConv2d((1, 2, 2), 1, 2), "kernel to be an odd whole number"),
        (lambda: SpectralLinear(2, 2, 0.0), "bound to be a number above 0"),
        (lambda: Series(0), "terms to be a whole number of at least 1, got 0"),
        (lambda: Roulette(-1), "exact_terms to be a whole number of at least 0"),
        (lambda: Roulette(mean=0.0), "mean to be a number above 0"),
        (lambda: wrong(Roulette, law="uniform"), "law to be 'geometric' or 'poisson'"),
        (lambda: models.residual_flow((2, 3)), "the size of a vector, got the shape"),
        (lambda: models.residual_flow(2, bound=2.0), "bound to be a number between 0 and 1"),
        (lambda: models.residual_flow((1, 3, 4), levels=2), "sides that are multiples of 2"),
    ],
)
def test_bad_arguments_are_one_sentence(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^\w+ (with \d levels )?expects .*{words}.*\.$"):
        make()


def test_inputs_that_do_not_fit_are_one_sentence() -> None:
    with pytest.raises(ShapeError, match=r"^ResidualBlock expects shape \(batch, 3\), got"):
        ResidualBlock(mlp())(torch.randn(4, 2))
    with pytest.raises(ShapeError, match=r"^ResidualBlock\.inverse expects shape \(batch, 2, 3, 4"):
        ResidualBlock(conv()).inverse(torch.randn(4, 2, 4, 4))
    with pytest.raises(ShapeError, match=r"^Flow expects a base over"):
        Flow(ResidualBlock(mlp()), StandardNormal(4))
    with pytest.raises(ShapeError, match=r"expects a context of shape \(batch, 2\), got none"):
        ResidualBlock(mlp(context_dim=2))(torch.randn(4, 3))


def test_networks_refuse_what_does_not_fit_by_themselves() -> None:
    for call, words in (
        (
            lambda: mlp()(torch.randn(4, 2)),
            r"LipschitzMLP expects shape \(batch, 3\), got \(4, 2\)",
        ),
        (
            lambda: conv()(torch.randn(4, 2, 4, 3)),
            r"LipschitzConvNet expects shape \(batch, 2, 3, 4",
        ),
        (lambda: SpectralConv2d((1, 4, 4), 1)(torch.randn(2, 1, 5, 5)), "SpectralConv2d expects"),
        (lambda: mlp(context_dim=2)(torch.randn(4, 3)), r"LipschitzMLP expects a context of shape"),
    ):
        with pytest.raises(ShapeError, match=f"^{words}"):
            call()


def test_parts_left_to_a_reader_say_so() -> None:
    with pytest.raises(NotImplementedError, match=r"LogDet does not define __call__\(pull, x\)"):
        LogDet()(lambda v: v, torch.zeros(1))

    class Half(SpectralNorm):
        pass

    with pytest.raises(NotImplementedError, match=r"Half does not define apply_to\(v, weight\)"):
        Half(torch.eye(2), (2,), 1.0)


# All of it at once, and slowly


@pytest.mark.parametrize("solver", ["fixed point", "newton"])
@pytest.mark.parametrize("name", MAKES)
def test_it_is_a_bijection(name: str, solver: str) -> None:
    make, event = MAKES[name]
    check_bijection(ResidualBlock(make(), solver=solver), torch.randn(4, *event))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MAKES)
def test_it_is_a_bijection_with_a_context(name: str) -> None:
    make, event = MAKES[name]
    block = ResidualBlock(make(context_dim=2))
    check_bijection(block, torch.randn(4, *event), torch.randn(4, 2))


@pytest.mark.parametrize(
    ("flow", "event", "context"),
    [
        (lambda: models.residual_flow(3, 2, 8), (3,), None),
        (lambda: models.residual_flow(3, 2, 8, context_dim=2, solver="newton"), (3,), 2),
        (lambda: models.residual_flow((1, 4, 6), 1, 4), (1, 4, 6), None),
        (lambda: models.residual_flow((1, 4, 6), 1, 4, levels=2, context_dim=2), (1, 4, 6), 2),
    ],
)
def test_the_model_is_a_bijection(
    flow: Callable[[], Flow], event: tuple[int, ...], context: int | None
) -> None:
    rows = None if context is None else torch.randn(3, context)
    check_bijection(flow().bijection, torch.randn(3, *event), rows)


def test_it_stands_in_compositions_and_read_backwards() -> None:
    block = ResidualBlock(mlp(context_dim=2))
    check_bijection(
        Compose(block, Inverse(ResidualBlock(mlp()))), torch.randn(4, 3), torch.randn(4, 2)
    )


def test_the_density_integrates_to_one() -> None:
    flow = models.residual_flow(2, 3, 8)
    randomize_parameters(flow, 1, 0.3)
    check_normalized(flow.eval())
