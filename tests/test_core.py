"""Composition, flows and base densities."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from nflib.checks import check_gradients, check_normalized, randomize_parameters
from nflib.core import (
    Bijection,
    Compose,
    Flow,
    Inverse,
    ShapeError,
    StandardLogistic,
    StandardNormal,
)
from nflib.linear import LU, Dense, Diagonal
from nflib.planar import Planar, Radial, Sylvester


def small_flow(context_shape: int | None = None) -> Flow:
    flow = Flow(
        Compose(LU(2), Planar(2, context_shape), Inverse(Radial(2, context_shape)), Diagonal(2)),
        StandardNormal(2),
    )
    randomize_parameters(flow, seed=1)
    return flow


@pytest.mark.parametrize("base", [StandardNormal, StandardLogistic])
def test_bases_are_densities(base: type) -> None:
    check_normalized(base(1), dim=1, limits=(-30, 30), points=4000, tolerance=1e-3)
    check_normalized(base(2), limits=(-30, 30))


def test_bases_equal_torch_distributions() -> None:
    x = torch.randn(100, 3) * 4
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(StandardNormal(3).log_prob(x), normal.log_prob(x).sum(1))
    logistic = torch.distributions.TransformedDistribution(
        torch.distributions.Uniform(0.0, 1.0), [torch.distributions.SigmoidTransform().inv]
    )
    torch.testing.assert_close(
        StandardLogistic(3).log_prob(x.double()), logistic.log_prob(x.double()).sum(1)
    )


def test_logistic_far_out_is_finite() -> None:
    base = StandardLogistic(1)
    assert torch.isfinite(base.log_prob(torch.tensor([[1e4], [-1e4]]))).all()
    samples = base.sample(100_000)
    assert torch.isfinite(samples).all()
    assert abs(samples.std().item() - math.pi / 3**0.5) < 0.03


def test_flow_is_a_density_with_and_without_context() -> None:
    check_normalized(small_flow(), limits=(-14, 14), points=1000)
    context = torch.randn(1, 3)
    check_normalized(small_flow(3), context, limits=(-14, 14), points=1000)


def test_samples_follow_the_density() -> None:
    flow = small_flow()
    with torch.no_grad():
        x, log_prob = flow.rsample_with_log_prob(20_000)
        torch.testing.assert_close(flow.log_prob(x), log_prob, atol=1e-3, rtol=1e-3)
        # Probability of a box: by counting samples, and by integrating the density.
        inside = ((x > -1) & (x < 1)).all(1).double().mean().item()
        axis = torch.linspace(-1, 1, 401)[:-1] + 0.0025
        grid = torch.cartesian_prod(axis, axis)
        integral = flow.log_prob(grid).exp().sum().item() * 0.005**2
    assert abs(inside - integral) < 4 * (integral * (1 - integral) / 20_000) ** 0.5 + 1e-3


def test_sampling_is_reparameterised() -> None:
    flow = small_flow()
    x, log_prob = flow.rsample_with_log_prob(16)
    (x.square().sum() + log_prob.sum()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in flow.parameters())
    check_gradients(small_flow(), torch.randn(8, 2))


def test_encode_decode_and_call() -> None:
    flow, x = small_flow(2), torch.randn(5, 2)
    context = torch.randn(5, 2)
    torch.testing.assert_close(
        flow.decode(flow.encode(x, context), context), x, atol=1e-4, rtol=1e-4
    )
    assert torch.equal(flow(x, context), flow.log_prob(x, context))


def test_sample_with_one_or_n_rows_of_context() -> None:
    flow = small_flow(2)
    assert flow.sample(7, torch.randn(1, 2)).shape == (7, 2)
    assert flow.sample(7, torch.randn(7, 2)).shape == (7, 2)
    with pytest.raises(
        ShapeError, match=r"context of shape \(7, 2\), or one row for all, got \(3, 2\)"
    ):
        flow.sample(7, torch.randn(3, 2))


def test_base_may_be_a_flow_or_a_torch_distribution() -> None:
    inner = small_flow()
    outer = Flow(Compose(Diagonal(2)), inner)
    assert outer.log_prob(outer.sample(4)).shape == (4,)
    normal = torch.distributions.Independent(
        torch.distributions.Normal(torch.zeros(2), torch.ones(2)), 1
    )
    x = torch.randn(6, 2)
    with_torch = Flow(Compose(Diagonal(2)), normal)
    torch.testing.assert_close(
        with_torch.log_prob(x), Flow(Compose(Diagonal(2)), StandardNormal(2)).log_prob(x)
    )
    assert with_torch.sample(3).shape == (3, 2)
    with pytest.raises(ShapeError, match="empty batch shape"):
        Flow(Diagonal(2), torch.distributions.Normal(torch.zeros(2), torch.ones(2)))


def test_a_mixture_base_serves() -> None:
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(3)),
        torch.distributions.Independent(
            torch.distributions.Normal(torch.randn(3, 2), torch.ones(3, 2)), 1
        ),
    )
    check_normalized(Flow(LU(2), mixture))


def test_likelihood_is_the_weakest_word() -> None:
    class Bound(Diagonal):
        likelihood = "lower bound"

    class Estimate(Diagonal):
        likelihood = "estimate"

    base = StandardNormal(2)
    assert Flow(Compose(LU(2)), base).likelihood == "exact"
    assert Flow(Compose(LU(2), Bound(2)), base).likelihood == "lower bound"
    assert Flow(Compose(Inverse(Estimate(2)), Bound(2)), base).likelihood == "estimate"


def test_float64_stays_float64() -> None:
    flow = small_flow().double()
    x, log_prob = flow.rsample_with_log_prob(3)
    assert x.dtype == log_prob.dtype == flow.log_prob(x).dtype == torch.float64


def test_slices_share_parameters() -> None:
    composed = Compose(LU(2), Planar(2), Diagonal(2))
    assert len(composed) == 3
    assert composed[1:][0] is composed[1]


def test_initialize_walks_through_the_layers() -> None:
    class Seen(Bijection):
        def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
            self.mean = x.mean(0)

        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return x, x.new_zeros(len(x))

    shift = Diagonal(2)
    torch.nn.init.ones_(shift.bias)  # type: ignore[arg-type]
    seen = Seen()
    x = torch.randn(50, 2)
    Flow(Compose(shift, seen), StandardNormal(2)).initialize(x)
    torch.testing.assert_close(seen.mean, x.mean(0) + 1)


def test_wrong_parts_are_one_sentence() -> None:
    with pytest.raises(
        ValueError, match="Compose expects layers .*, got an object of Linear at position 1"
    ):
        Compose(LU(2), torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bijection first, got an object of StandardNormal"):
        Flow(StandardNormal(2), LU(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="StandardNormal expects shape to be"):
        StandardNormal(0)
    with pytest.raises(ShapeError, match=r"Flow expects a base over the noise .* \(2,\), got"):
        Flow(LU(2), StandardNormal(3))
    for kind in (LU, Dense, Diagonal, Planar, Sylvester):
        with pytest.raises(ValueError, match=f"^{kind.__name__} expects dim to be a whole number"):
            kind(0)


def test_import_is_cheap() -> None:
    code = (
        "import time, torch; t = time.perf_counter(); import nflib; "
        "from nflib import core, linear, planar, checks; print(time.perf_counter() - t)"
    )
    seconds = [
        float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(3)
    ]
    assert min(seconds) < 0.3
