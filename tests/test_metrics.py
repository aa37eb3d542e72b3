"""Bits per dimension with the constants right."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nflib.core import Compose, Flow, StandardNormal
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
    with pytest.raises(ValueError, match="positive dims and levels, got dims=0"):
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
    class Shifted:
        def log_prob(self, x: Tensor, context: Tensor) -> Tensor:
            return -(x - context).square().sum(1)

    x, context = torch.randn(10, 2), torch.randn(10, 2)
    torch.testing.assert_close(
        log_probs(Shifted(), x, context, batch_size=3), -(x - context).square().sum(1)
    )
    with pytest.raises(ValueError, match="at least one row"):
        log_probs(Shifted(), x[:0])
    with pytest.raises(ValueError, match="finite, but 2 of its 4 values are NaN or infinite"):
        evaluate(Flow(LU(2), StandardNormal(2)), torch.tensor([[0.0, 1.0], [torch.nan, torch.inf]]))
