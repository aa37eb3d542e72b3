"""Composition, flows and base densities."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from nflib.arguments import ArgumentError
from nflib.checks import check_gradients, check_normalized, randomize_parameters
from nflib.core import (
    Bijection,
    Compose,
    DataError,
    Flow,
    Inverse,
    ShapeError,
    StandardLogistic,
    StandardNormal,
)
from nflib.dequantization import Logit, UniformDequantization
from nflib.linear import LU, Dense, Diagonal, Permutation
from nflib.mixer import Patches
from nflib.multiscale import Squeeze
from nflib.normalization import ActNorm
from nflib.planar import Planar, Radial, Sylvester


def small_flow(context_dim: int | None = None) -> Flow:
    flow = Flow(
        Compose(LU(2), Planar(2, context_dim), Inverse(Radial(2, context_dim)), Diagonal(2)),
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
        ShapeError, match=r"expects 7 rows of context, or one row for all, got 3; sample\(\(7,\)"
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


def test_an_inverse_takes_what_its_bijection_returns() -> None:
    patches = Patches((1, 4, 6), (2, 3))
    back = Inverse(patches)
    assert back.event_shape == back.input_shape((1, 4, 6)) == patches.latent_shape == (4, 6)
    assert back.latent_shape == back.output_shape((4, 6)) == (1, 4, 6)
    x = torch.randn(2, 1, 4, 6)
    assert torch.equal(Compose(patches, back)(x)[0], x)
    with pytest.raises(ShapeError, match=r"^Inverse expects shape \(batch, 4, 6\), got"):
        back(x)
    assert Inverse(Planar(2, context_dim=3)).context_shape == (3,)


def test_what_does_not_follow_on_another_is_told_when_it_is_built() -> None:
    with pytest.raises(ShapeError, match=r"^Compose expects .* LU at position 1, which takes \(3,"):
        Compose(LU(2), LU(3))
    with pytest.raises(
        ShapeError, match="^Compose expects one context for all .* Planar .* Radial"
    ):
        Compose(Planar(2, context_dim=3), Radial(2, context_dim=4))
    # What a later layer knows reaches the first one, and the base's sizes the flow.
    assert Compose(Squeeze(), Permutation(4)).event_shape == (1, None, None)
    assert Flow(Compose(), StandardNormal((1, 8, 8))).event_shape == (1, 8, 8)
    assert not Compose(LU(2), Planar(2)).exact_inverse
    assert len(Compose(LU(2), Planar(2), Diagonal(2))[1:]) == 2  # type: ignore[arg-type]


def test_the_first_layer_checks_the_data() -> None:
    x = torch.full((2, 2), 7.0)
    Compose(Diagonal(2), Logit()).check_data(x)
    with pytest.raises(DataError, match="The data of Logit"):
        Compose(Logit(), Diagonal(2)).check_data(x)


def is_normal(x: Tensor) -> bool:
    return bool((x.mean(0).abs() < 1e-4).all() and ((x.std(0) - 1).abs() < 0.02).all())


def test_layers_are_initialized_in_the_order_in_which_they_are_read() -> None:
    first, second, x = ActNorm(2), ActNorm(2), 5 + 3 * torch.randn(100, 2)
    Compose(Inverse(Compose(first, second))).initialize(x)
    assert is_normal(second.inverse(x)[0])
    assert torch.equal(first.bias, torch.zeros(2)) or is_normal(
        first.inverse(second.inverse(x)[0])[0]
    )
    twice = Inverse(Inverse(ActNorm(2)))
    twice.initialize(x)
    assert is_normal(twice(x)[0])


def test_a_flow_as_base_is_initialized_with_what_reaches_it() -> None:
    shift, inner = Diagonal(2), Flow(ActNorm(2), StandardNormal(2))
    torch.nn.init.constant_(shift.bias, 9.0)  # type: ignore[arg-type]
    x = torch.randn(100, 2)
    Flow(shift, inner).initialize(x)
    assert is_normal(inner.encode(shift(x)[0]).detach())


def test_samples_have_no_graph() -> None:
    flow = small_flow()
    assert not flow.sample(3).requires_grad
    assert flow.rsample(3).requires_grad


@pytest.mark.parametrize("n", [-1, 2.5, True, "3", (2, -1), None])
def test_a_number_of_draws_that_is_none_is_one_sentence(n: object) -> None:
    with pytest.raises(ArgumentError, match="^Flow.sample expects a number of draws of at least 0"):
        small_flow().sample(n)  # type: ignore[arg-type]


def test_contexts_of_every_kind_reach_their_rows() -> None:
    flow, x, contexts = small_flow(3), torch.randn(4, 2), torch.randn(4, 3)
    alone = contexts[0]
    expected = flow.log_prob(x, contexts[:1].expand(4, 3))
    for one in (alone, contexts[:1]):
        torch.testing.assert_close(flow.log_prob(x, one), expected)
        assert flow.sample(5, one).shape == flow.sample((5,), alone).shape == (5, 2)
    # At temperature 0 a draw is what its context makes of the centre.
    centre = flow.decode(torch.zeros(4, 2), contexts)
    draws = flow.sample((2, 3), contexts, temperature=0.0)
    assert draws.shape == (2, 3, 4, 2)
    torch.testing.assert_close(draws, centre.expand(2, 3, 4, 2))
    draws, log_prob = flow.rsample_with_log_prob((2, 3), contexts)
    assert log_prob.shape == (2, 3, 4)
    torch.testing.assert_close(flow.log_prob(draws, contexts), log_prob, atol=1e-3, rtol=1e-3)
    for wrong in (None, contexts[:3], contexts[:, :2], contexts.double(), 3.0):
        with pytest.raises(ShapeError, match=r"^Flow(\.log_prob)? expects a context .*, got .*\.$"):
            flow.log_prob(x, wrong)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="^Flow.* expects a context of its parameters' dtype"):
        flow.sample(4, contexts.double())
    with pytest.raises(ShapeError, match="^Flow expects no context, .* got a tensor"):
        small_flow().log_prob(x, contexts)


def test_a_bound_in_the_base_makes_the_flow_one() -> None:
    bound = Flow(Compose(UniformDequantization(4), Diagonal(2)), StandardNormal(2))
    assert Flow(Diagonal(2), bound).likelihood == "lower bound"
