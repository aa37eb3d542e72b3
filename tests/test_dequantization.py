"""Dequantization: bounds that are bounds, with every constant in place; and the logit."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from layers import conv
from torch import Tensor, nn

from nflib.checks import jacobian, randomize_parameters
from nflib.core import Bijection, Compose, Flow, StandardNormal
from nflib.coupling import Coupling, checkerboard
from nflib.data import DataError
from nflib.dequantization import Logit, UniformDequantization, VariationalDequantization
from nflib.elementwise import Affine, Pointwise, RationalQuadraticSpline
from nflib.metrics import evaluate, log_probs
from nflib.normalization import ActNorm
from nflib.train import fit

SHAPE = (1, 3, 4)


def noise_flow(shape: tuple[int, int, int] = SHAPE) -> Compose:
    """A noise model that sees the image."""
    net = partial(conv, context_dim=shape)
    boards = [checkerboard(*shape, flip=flip) for flip in (False, True)]
    return Compose(ActNorm(shape[0]), *(Coupling(board, Affine(), net) for board in boards))


def dequantizations(levels: int) -> list[Bijection]:
    variational = VariationalDequantization(levels, noise_flow())
    randomize_parameters(variational)
    return [UniformDequantization(levels), variational]


def draw(levels: int, rows: int = 5) -> Tensor:
    return torch.randint(0, levels, (rows, *SHAPE))


class UnitCube(nn.Module):
    """The uniform density on [0, 1]^D."""

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        assert ((z >= 0) & (z <= 1)).all()
        return z.new_zeros(len(z))

    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        return torch.rand(n, *SHAPE)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_a_uniform_model_has_log2_k_bits_exactly(levels: int) -> None:
    flow = Flow(UniformDequantization(levels), UnitCube())
    x = draw(levels).double()
    for samples in (1, 7):
        bits = evaluate(flow, x, samples=samples).bits_per_dim()
        assert bits == pytest.approx(math.log2(levels), rel=1e-12)


def one_dimensional(levels: int, dequantization: Bijection | None = None) -> Flow:
    """A density of one number that bends within the cells of the integers."""
    rest = [Logit(0.05), Pointwise(RationalQuadraticSpline(6), 1)]
    flow = Flow(
        Compose(dequantization or UniformDequantization(levels), *rest), StandardNormal(1)
    ).double()
    randomize_parameters(flow, seed=3, scale=1.5)
    return flow


def exact(flow: Flow, levels: int, points: int = 20_000) -> Tensor:
    """log P of each integer: the density of [0, 1] integrated over its cell."""
    assert isinstance(flow.bijection, Compose)
    density = Flow(flow.bijection[1:], flow.base)
    z = (torch.arange(levels * points, dtype=torch.float64) + 0.5) / (levels * points)
    with torch.no_grad():
        p = density.log_prob(z[:, None]).exp().view(levels, points)
    return (p.mean(1) / levels).log()


@pytest.mark.parametrize("kind", ["uniform", "variational"])
def test_the_bound_lies_below_log_p_and_rises_to_it_with_more_samples(kind: str) -> None:
    levels = 3
    noise = Pointwise(Affine(), 1)
    layer = None if kind == "uniform" else VariationalDequantization(levels, noise)
    flow = one_dimensional(levels, layer)
    log_p = exact(flow, levels)
    # The logit reaches a little beyond [0, 1]: the integers have nearly all of the mass.
    assert 0.8 < log_p.exp().sum() <= 1.0001
    x = torch.arange(levels, dtype=torch.float64)[:, None].repeat_interleave(4000, 0)
    gaps = []
    for samples in (1, 4, 64):
        values = log_probs(flow, x, samples=samples).view(levels, -1)
        error = values.std(1) / 4000**0.5
        gap = log_p - values.mean(1)
        assert (gap > -4 * error).all()
        gaps.append(gap.mean().item())
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]
    assert gaps[0] > 0.02
    # Each draw's probability, not its logarithm, is right in the mean.
    mean = log_probs(flow, x).view(levels, -1).exp().mean(1)
    torch.testing.assert_close(mean, log_p.exp(), rtol=0.1, atol=0)


@pytest.mark.parametrize("levels", [2, 17])
def test_the_variational_contribution_is_the_noises_density_by_autograd(levels: int) -> None:
    g = noise_flow().double()
    layer = VariationalDequantization(levels, g).double()
    randomize_parameters(layer)
    x = draw(levels).double()
    torch.manual_seed(7)
    z, contribution = layer(x)
    torch.manual_seed(7)
    e = torch.randn(5, *SHAPE, dtype=torch.float64)
    scaled = 2 * x / (levels - 1) - 1

    def noise(e: Tensor) -> Tensor:
        return torch.sigmoid(g(e, scaled)[0])

    normal = torch.distributions.Normal(0.0, 1.0).log_prob(e).flatten(1).sum(1)
    log_q = normal - torch.linalg.slogdet(jacobian(noise, e))[1]
    torch.testing.assert_close(z, (x + noise(e)) / levels)
    torch.testing.assert_close(contribution, -log_q - 12 * math.log(levels))


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("which", [0, 1], ids=["uniform", "variational"])
def test_inverse_gives_back_the_integers_and_the_contribution(levels: int, which: int) -> None:
    layer = dequantizations(levels)[which].double()
    x = draw(levels, 200)
    z, contribution = layer(x)
    assert z.dtype == torch.float64
    assert ((z * levels).floor() == x).all()
    back, negative = layer.inverse(z)
    assert torch.equal(back, x.double())
    torch.testing.assert_close(negative, -contribution)


@pytest.mark.parametrize("levels", [17, 256])
def test_no_pixel_of_millions_leaves_its_cell(levels: int) -> None:
    layer = UniformDequantization(levels)
    x = torch.randint(0, levels, (1000, 4000))
    assert int((layer.inverse(layer(x)[0])[0] != x).sum()) == 0


@pytest.mark.parametrize("which", [0, 1], ids=["uniform", "variational"])
def test_noise_fills_the_cells_and_is_drawn_anew(which: int) -> None:
    layer, x = dequantizations(17)[which], draw(17, 400)
    u = 17 * layer(x)[0] - x
    assert ((u >= -1e-5) & (u <= 1 + 1e-5)).all()
    assert u.min() < 0.05
    assert u.max() > 0.95
    assert not torch.equal(layer(x)[0], layer(x)[0])


def test_variational_noise_sees_the_image() -> None:
    layer = dequantizations(17)[1]
    noises = []
    for value in (0, 16):
        torch.manual_seed(0)
        x = torch.full((1, *SHAPE), value)
        noises.append(17 * layer(x)[0] - x)
    assert (noises[0] - noises[1]).abs().max() > 0.01


def test_values_beyond_the_ends_become_the_ends() -> None:
    z = torch.tensor([-0.3, 0.0, 0.999, 1.0, 1.4]).view(5, 1, 1, 1).expand(5, *SHAPE)
    expected = torch.tensor([0.0, 0.0, 16.0, 16.0, 16.0])
    for layer in dequantizations(17):
        x, contribution = layer.inverse(z)
        assert torch.equal(x[:, 0, 0, 0], expected)
        assert torch.isfinite(contribution).all()


@pytest.mark.parametrize("which", [0, 1], ids=["uniform", "variational"])
def test_a_flow_for_integers_is_a_lower_bound_and_samples_integers(which: int) -> None:
    rest = (Logit(), Pointwise(Affine(), SHAPE))
    flow = Flow(Compose(dequantizations(17)[which], *rest), StandardNormal(SHAPE))
    assert flow.likelihood == "lower bound"
    assert Flow(Compose(*rest), StandardNormal(SHAPE)).likelihood == "exact"
    x = flow.sample(1000)
    assert torch.isfinite(flow.log_prob(x)).all()
    with pytest.raises(ValueError, match="a flow of bijections, got one with a stochastic layer"):
        flow.rsample(2)
    assert ((x >= 0) & (x <= 16) & (x == x.round())).all()
    assert evaluate(flow, x[:10]).likelihood == "lower bound"


@pytest.mark.parametrize("which", [0, 1], ids=["uniform", "variational"])
def test_any_type_of_integers_and_an_empty_batch_serve(which: int) -> None:
    layer, x = dequantizations(200)[which], draw(200)
    results = []
    for kind in (torch.uint8, torch.int64, torch.float32):
        torch.manual_seed(0)
        results.append(layer(x.to(kind)))
    for z, contribution in results:
        assert torch.equal(z, results[0][0])
        assert torch.equal(contribution, results[0][1])
        assert z.dtype == contribution.dtype == torch.float32
    for function in (layer, layer.inverse):
        z, contribution = function(torch.zeros(0, *SHAPE))
        assert (z.shape, contribution.shape) == ((0, *SHAPE), (0,))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.full((4, *SHAPE), 17), r"whole numbers in 0\.\.16, got values from 17 to 17\."),
        (torch.full((4, *SHAPE), -1), "got values from -1 to -1"),
        (torch.full((4, *SHAPE), 0.5), "with fractions"),
        (torch.full((4, *SHAPE), torch.nan), "finite"),
    ],
    ids=["above", "below", "fraction", "nan"],
)
@pytest.mark.parametrize("which", [0, 1], ids=["uniform", "variational"])
def test_data_that_are_not_levels_are_refused_before_training(
    wrong: Tensor, message: str, which: int
) -> None:
    rest = (Logit(), Pointwise(Affine(), SHAPE))
    flow = Flow(Compose(dequantizations(17)[which], *rest), StandardNormal(SHAPE))
    with pytest.raises(DataError, match=message):
        flow.initialize(wrong)
    # In a data set they are found wherever they stand, and in one that is held out.
    good = draw(17, 50)
    with pytest.raises(DataError, match="values from|finite"):
        fit(flow, torch.cat([good, wrong]), steps=1, batch_size=2, progress=False)
    with pytest.raises(DataError, match=message):
        fit(flow, good, wrong, steps=1, progress=False)
    with pytest.raises(DataError, match=message):
        evaluate(flow, wrong)


def test_initialize_reaches_the_flow_of_the_noise() -> None:
    layer = VariationalDequantization(17, noise_flow())
    layer.initialize(draw(17, 100))
    norm = next(m for m in layer.modules() if isinstance(m, ActNorm))
    assert norm.bias.any()
    assert norm.bias.abs().max() < 0.2  # standard normal noise, not the image


def test_wrong_levels_are_one_sentence() -> None:
    for levels in (1, 0, 2.5):
        with pytest.raises(
            ValueError, match="expects levels to be a whole number of at least 2, got"
        ):
            UniformDequantization(levels)  # type: ignore[arg-type]
        with pytest.raises(
            ValueError, match="expects levels to be a whole number of at least 2, got"
        ):
            VariationalDequantization(levels, Compose())  # type: ignore[arg-type]


def test_the_logit_is_finite_at_both_ends_of_the_interval() -> None:
    layer = Logit(0.01)
    z, log_det = layer(torch.tensor([[0.0], [0.5], [1.0]]))
    torch.testing.assert_close(z[:, 0], torch.logit(torch.tensor([0.01, 0.5, 0.99])))
    assert torch.isfinite(log_det).all()


@torch.no_grad()
def test_beyond_its_interval_the_logit_goes_on_as_a_straight_line() -> None:
    layer = Logit(0.01)
    ends = torch.tensor([[0.0], [1.0]])
    z, log_det = layer(ends)
    beyond = torch.tensor([[-1e4], [1e4]])
    x, minus = layer.inverse(beyond)
    torch.testing.assert_close(x - ends, (beyond - z) * (-log_det).exp()[:, None])
    torch.testing.assert_close(minus, -log_det)
    back, again = layer(x)
    torch.testing.assert_close(back, beyond)
    torch.testing.assert_close(again, log_det)


def test_the_logit_refuses_an_alpha_outside_of_its_range() -> None:
    for alpha in (0.0, 0.5, -1.0):
        with pytest.raises(ValueError, match="between 0 and 0.5, got"):
            Logit(alpha)


@pytest.mark.parametrize("value", [-0.01, 1.01, torch.inf, torch.nan])
def test_the_logit_refuses_data_outside_of_its_interval(value: float) -> None:
    x = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    Logit().check_data(x)
    x[1, 0] = value
    with pytest.raises(ValueError, match="^The data of Logit must (lie in|be finite)"):
        Logit().check_data(x)
