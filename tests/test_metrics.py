"""Bits per dimension with the constants right."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from nflib.cache import kept
from nflib.core import Compose, Flow, StandardNormal
from nflib.dequantization import Logit
from nflib.linear import LU
from nflib.metrics import bits_per_dim, evaluate, log_probs


@pytest.mark.parametrize("levels", [2, 17, 32, 256])
def test_a_uniform_model_has_log2_k_bits_exactly(levels: int) -> None:
    dims = (1, 8, 8)
    # Seen as x / k in [0, 1): density 1. Seen as x in [0, k): density k^-D.
    assert bits_per_dim(0.0, dims, levels) == math.log2(levels)
    as_is = bits_per_dim(-64 * math.log(levels), dims)
    assert as_is == pytest.approx(math.log2(levels), rel=1e-15)
    assert torch.equal(
        bits_per_dim(torch.zeros(3), 64, levels), torch.full((3,), math.log2(levels))
    )


def test_both_scales_agree_for_any_density() -> None:
    x = torch.randint(0, 17, (100, 4)) + torch.rand(100, 4)
    flow = Flow(LU(4), StandardNormal(4))
    seen_scaled = flow.log_prob(x / 17)
    # The same density of the unscaled data: 17^-D of the scaled one.
    seen_as_is = seen_scaled - 4 * math.log(17)
    torch.testing.assert_close(bits_per_dim(seen_scaled, 4, 17), bits_per_dim(seen_as_is, 4))


def test_wrong_sizes_are_one_sentence() -> None:
    with pytest.raises(ValueError, match="dims to be a number of dimensions above 0"):
        bits_per_dim(0.0, 0)


def test_evaluate_is_the_mean_of_log_prob() -> None:
    flow = Flow(Compose(LU(3)), StandardNormal(3))
    x = torch.randn(1000, 3)
    score = evaluate(flow, x, batch_size=64)
    torch.testing.assert_close(score.nats, flow.log_prob(x).mean().item())
    assert score.standard_error == pytest.approx(
        flow.log_prob(x).std().item() / 1000**0.5, rel=1e-4
    )
    assert (score.rows, score.dims, score.likelihood) == (1000, 3, "exact")
    assert score.bits_per_dim() == pytest.approx(-score.nats / 3 / math.log(2))
    assert "nats (exact, 1000 rows of 3)" in repr(score)
    assert flow.training


def test_any_model_with_log_prob_and_context() -> None:
    x, context = torch.randn(10, 2), torch.randn(10, 2)
    torch.testing.assert_close(
        log_probs(Shifted(), x, context, batch_size=3), -(x - context).square().sum(1)
    )
    with pytest.raises(ValueError, match="at least one row"):
        log_probs(Shifted(), x[:0])
    with pytest.raises(ValueError, match="finite, but 2 of its 4 values are NaN or infinite"):
        evaluate(Flow(LU(2), StandardNormal(2)), torch.tensor([[0.0, 1.0], [torch.nan, torch.inf]]))


class Noisy:
    """A model that draws noise of its own: its k-th answer for a row is log k."""

    likelihood = "lower bound"

    def __init__(self) -> None:
        self.calls = 0

    def log_prob(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.full((len(x),), math.log(self.calls))


@pytest.mark.parametrize("samples", [1, 2, 10])
def test_several_samples_give_the_logarithm_of_the_mean_probability(samples: int) -> None:
    model, x = Noisy(), torch.randn(8, 3)
    score = evaluate(model, x, samples=samples)
    assert model.calls == samples
    assert score.nats == pytest.approx(math.log((samples + 1) / 2), abs=1e-6)
    assert (score.samples, score.likelihood) == (samples, "lower bound")
    words = f" with {samples} samples" if samples > 1 else ""
    assert f"nats (lower bound{words}, 8 rows of 3)" in repr(score)


def test_samples_go_over_every_batch_and_leave_an_exact_model_as_it_is() -> None:
    model = Noisy()
    values = log_probs(model, torch.randn(5, 2), batch_size=2, samples=2)
    means = torch.tensor([1.5, 1.5, 3.5, 3.5, 5.5])  # of 1 and 2, of 3 and 4, of 5 and 6
    torch.testing.assert_close(values, means.log())
    flow, x = Flow(LU(3), StandardNormal(3)), torch.randn(9, 3)
    torch.testing.assert_close(log_probs(flow, x, samples=5), flow.log_prob(x))
    # Probabilities far too small for a float are no obstacle.
    torch.testing.assert_close(log_probs(flow, 1e3 * x, samples=5), flow.log_prob(1e3 * x))
    with pytest.raises(ValueError, match="samples to be a whole number of at least 1, got 0"):
        evaluate(flow, x, samples=0)


class Weighted(Noisy):
    """A model that gives the log-weights of all its draws at once, as a VAE does."""

    def log_weights(self, x: Tensor, draws: int) -> Tensor:
        self.calls += 1
        return torch.arange(1.0, draws + 1).log()[:, None] + x.sum(1)


@pytest.mark.parametrize("samples", [1, 10])
def test_a_model_with_log_weights_is_asked_once_a_batch(samples: int) -> None:
    model, x = Weighted(), torch.randn(5, 3)
    found = log_probs(model, x, batch_size=2, samples=samples)
    assert model.calls == 3
    torch.testing.assert_close(found, math.log((samples + 1) / 2) + x.sum(1))


def test_weights_that_are_no_method_are_a_models_own_business() -> None:
    model = Noisy()
    model.log_weights = torch.zeros(3)  # of a mixture, say
    assert log_probs(model, torch.randn(4, 3), samples=2).shape == (4,)
    assert model.calls == 2


class Shifted:
    def log_prob(self, x: Tensor, context: Tensor) -> Tensor:
        return -(x - context).square().sum(1)


@pytest.mark.parametrize("function", [evaluate, log_probs])
@pytest.mark.parametrize("rows", [2048, 8192, 1])
def test_each_row_has_its_context(function: Any, rows: int) -> None:
    x, context = torch.randn(4096, 2), torch.randn(rows, 2)
    message = f"{function.__name__} expects a context for each of the 4096 rows of x, got {rows}."
    with pytest.raises(ValueError, match=message):
        function(Shifted(), x, context)


def test_arrays_are_scored_like_tensors() -> None:
    flow, x = Flow(LU(3), StandardNormal(3)), torch.randn(10, 3)
    assert evaluate(flow, x.double().numpy()).nats == pytest.approx(evaluate(flow, x).nats)
    assert torch.equal(log_probs(flow, x.numpy()), log_probs(flow, x))
    assert log_probs(flow.double(), x.numpy()).dtype == torch.float64
    both = log_probs(Shifted(), x.numpy()[:, :2], numpy.zeros((10, 2), dtype=numpy.float32))
    torch.testing.assert_close(both, -x[:, :2].square().sum(1))
    with pytest.raises(ValueError, match="evaluate expects x as a tensor or NumPy array of rows"):
        evaluate(flow, [[1.0, 2.0, 3.0]])


def test_data_that_a_model_cannot_take_are_refused_before_anything_runs() -> None:
    flow = Flow(Compose(Logit(), LU(4)), StandardNormal(4))
    for function in (evaluate, log_probs):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            function(flow, 2 * torch.rand(10, 4) - 1)


class Padded:
    """A uniform model of 256 levels; what is negative is padding."""

    def log_prob(self, x: Tensor) -> Tensor:
        return -math.log(256) * self.dims_of(x)

    def dims_of(self, x: Tensor) -> Tensor:
        return (x >= 0).sum(1)


def test_bits_are_of_the_numbers_that_count() -> None:
    x = torch.randint(0, 256, (8, 400))
    for row, length in enumerate((100, 400, 7, 50, 1, 399, 250, 100)):
        x[row, length:] = -1
    score = evaluate(Padded(), x)
    assert score.dims == pytest.approx(1307 / 8)
    assert score.bits_per_dim() == pytest.approx(8)


class Costly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.made = nn.Parameter(torch.ones(1)), 0

    @kept
    def matrix(self) -> Tensor:
        self.made += 1
        return self.scale * torch.eye(2)

    def log_prob(self, x: Tensor) -> Tensor:
        return -(x @ self.matrix()).square().sum(1)


def test_matrices_are_made_once_for_all_batches() -> None:
    model = Costly()
    log_probs(model, torch.randn(100, 2), batch_size=10)
    assert model.made == 1
    with torch.no_grad():
        model.scale.mul_(2)
    x = torch.randn(100, 2)
    torch.testing.assert_close(log_probs(model, x, batch_size=10), -(2 * x).square().sum(1))
    evaluate(model, x, batch_size=10)
    assert model.made == 3
