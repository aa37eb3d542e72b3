"""Base densities: temperature and generator, and torch's distributions as bases that learn."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import (
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    transforms,
)

from nflib.arguments import ArgumentError
from nflib.core import Compose, Flow, ShapeError, StandardLogistic, StandardNormal
from nflib.linear import Diagonal


@pytest.mark.parametrize("base", [StandardNormal(2), StandardLogistic(2)])
def test_temperature_and_generator_reach_the_base(base: torch.nn.Module) -> None:
    flow = Flow(Compose(), base)
    one, other = (flow.sample(9, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(flow.sample(9), flow.sample(9))
    spread = [flow.sample(9999, temperature=t).std().item() for t in (0.5, 1.0, 2.0)]
    assert spread[1] / spread[0] == pytest.approx(2, rel=0.1) == spread[2] / spread[1]
    assert torch.finfo().max > flow.sample(9).abs().max()


@pytest.mark.parametrize("kind", [StandardNormal, StandardLogistic])
def test_an_event_of_another_shape_has_no_density(kind: type[StandardNormal]) -> None:
    for base, shape in ((kind(3), (4, 2)), (kind((1, 8, 8)), (2, 1, 8, 7)), (kind(3), (3,))):
        with pytest.raises(ShapeError, match=rf"^{kind.__name__} expects shape \(batch, .*, got"):
            base.log_prob(torch.zeros(shape))


def learned() -> dict[str, tuple[Distribution, int]]:
    """Distributions of torch over two numbers, and how many numbers of them are learned."""
    location, scale = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    covariance = MultivariateNormal(location, torch.eye(2))
    assert covariance.precision_matrix is not None  # now it knows two of its matrices
    steps = [
        transforms.AffineTransform(0.0, 2 * torch.ones(2)),
        transforms.AffineTransform(3.0, 1.0),
    ]
    return {
        "normal": (Independent(Normal(location, scale), 1), 4),
        "covariance": (covariance, 2),
        "transformed": (TransformedDistribution(Independent(Normal(location, scale), 1), steps), 4),
        "fixed": (MultivariateNormal(torch.ones(2), 2 * torch.eye(2)), 0),
    }


@pytest.mark.parametrize("name", ["normal", "covariance", "transformed", "fixed"])
def test_a_torch_distribution_learns_moves_and_is_saved(name: str) -> None:
    distribution, count = learned()[name]
    flow, x = Flow(Compose(), distribution), torch.randn(6, 2)
    assert sum(p.numel() for p in flow.parameters()) == count
    before = flow.log_prob(x)
    torch.testing.assert_close(before, distribution.log_prob(x))
    assert flow.rsample(3).requires_grad == (count > 0)
    assert not flow.sample(3).requires_grad
    optimizer = torch.optim.SGD([*flow.parameters(), torch.zeros(1, requires_grad=True)], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        if count:
            (-flow.log_prob(x + 1).mean()).backward()
        optimizer.step()
    after = flow.log_prob(x)
    assert torch.isfinite(after).all()  # whatever the step, a scale stays above zero
    assert torch.equal(before, after) == (count == 0)
    again = Flow(Compose(), learned()[name][0])
    again.load_state_dict(flow.state_dict())
    assert torch.equal(again.log_prob(x), after)
    assert again.double().sample(2).dtype == torch.float64


def test_a_torch_distribution_that_cannot_be_learned_is_one_sentence() -> None:
    scale = torch.zeros(2, requires_grad=True).exp() * 2
    with pytest.raises(
        ArgumentError, match="^Flow expects a base whose learned tensors are leaves"
    ):
        Flow(Diagonal(2), Independent(Normal(torch.zeros(2), scale), 1))
    counts = Independent(torch.distributions.Poisson(torch.ones(2)), 1)
    with pytest.raises(ArgumentError, match=r"^Flow.rsample expects a base that can be .*reparam"):
        Flow(Compose(), counts).rsample(3)


@pytest.mark.parametrize("name", ["covariance_matrix", "precision_matrix", "scale_tril"])
def test_a_matrix_of_a_normal_base_is_learned_within_its_range(name: str) -> None:
    start = torch.tensor([[2.0, 0.0], [0.5, 1.0]])
    start = start if name == "scale_tril" else start @ start.T
    learned = start.clone().requires_grad_()
    base = Flow(Diagonal(2), MultivariateNormal(torch.zeros(2), **{name: learned})).base
    z = torch.randn(5, 2)
    plain = MultivariateNormal(torch.zeros(2), **{name: start})
    torch.testing.assert_close(base.log_prob(z), plain.log_prob(z))
    base.log_prob(z).sum().backward()
    with torch.no_grad():
        for parameter in base.parameters():
            assert parameter.grad is not None
            parameter.add_(3 * torch.randn_like(parameter))
    assert torch.isfinite(base.log_prob(z)).all()
