"""PIT values, coverage and CRPS against what is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.distributions import Exponential, Normal

from nflib.metrics import coverage, crps, pit


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def crps_of_a_normal(y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """s (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)), Gneiting & Raftery 2007, section 4.2."""
    z = (y - mean) / std
    phi = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return std * (z * (2 * torch.special.ndtr(z) - 1) + 2 * phi - 1 / math.sqrt(math.pi))


def test_crps_of_a_normal_is_the_closed_form() -> None:
    y = torch.linspace(-4, 4, 9, dtype=torch.float64)
    mean, std = torch.linspace(1, -1, 9).double(), torch.linspace(0.5, 3, 9).double()
    draws = mean + std * torch.randn(200_000, 9, dtype=torch.float64, generator=seeded())
    found, expected = crps(draws, y), crps_of_a_normal(y, mean, std)
    assert found.shape == y.shape
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    centre = crps_of_a_normal(torch.zeros(1), torch.zeros(1), torch.ones(1))
    assert centre.item() == pytest.approx(0.2337, abs=1e-4)


@pytest.mark.parametrize("k", [2, 3, 10])
def test_crps_of_few_draws_has_no_bias(k: int) -> None:
    draws = torch.randn(k, 400_000, dtype=torch.float64, generator=seeded())
    y = torch.full((400_000,), 0.7, dtype=torch.float64)
    expected = crps_of_a_normal(y[:1], torch.zeros(1).double(), torch.ones(1).double())
    assert crps(draws, y).mean().item() == pytest.approx(expected.item(), abs=5e-3)


def test_crps_is_the_sum_over_pairs() -> None:
    draws, y = torch.randn(7, 5, 1, generator=seeded()).double(), torch.randn(5, 1).double()
    pairs = [(a - b).abs() for a, b in permutations(draws, 2)]
    expected = (draws - y).abs().mean(0) - torch.stack(pairs).mean(0) / 2
    torch.testing.assert_close(crps(draws, y), expected)


def test_crps_of_equal_draws_is_the_absolute_error() -> None:
    y = torch.tensor([450.0, 1.0, -3.0])
    torch.testing.assert_close(crps(torch.full((100, 3), 2.0), y), (y - 2).abs())


def test_crps_prefers_the_distribution_that_y_comes_from() -> None:
    y = torch.randn(20_000, generator=seeded(1))
    noise = torch.randn(50, 20_000, generator=seeded(2))
    right = crps(noise, y).mean()
    for wrong in (noise + 0.3, noise * 0.7, noise * 1.4):
        assert crps(wrong, y).mean() > right + 0.005


def test_crps_far_from_zero_keeps_its_digits() -> None:
    draws, y = torch.randn(200, 300, generator=seeded()), torch.randn(300, generator=seeded(1))
    far = 2**13  # 4 of float32's 7 digits
    expected = crps(draws.double(), y.double())
    torch.testing.assert_close(crps(draws + far, y + far).double(), expected, atol=2e-3, rtol=0)


def test_pit_counts_the_draws_below() -> None:
    draws = torch.tensor([[1.0], [2.0], [3.0]])
    for y, expected in ((0.0, 0.125), (1.5, 0.375), (2.0, 0.5), (2.5, 0.625), (9.0, 0.875)):
        assert pit(draws, torch.tensor([y])).item() == pytest.approx(expected)


def test_pit_is_the_distribution_function() -> None:
    y = torch.tensor([[0.1], [1.0], [2.5]])
    draws = Exponential(torch.ones(3, 1)).sample((100_000,))
    torch.testing.assert_close(pit(draws, y), 1 - (-y).exp(), atol=0.01, rtol=0)


def test_pit_of_a_calibrated_model_is_uniform_on_its_places() -> None:
    y, draws = torch.randn(40_000, generator=seeded(1)), torch.randn(9, 40_000, generator=seeded(2))
    counts = torch.histc(pit(draws, y), 10, 0, 1)
    assert (counts - 4000).abs().max() < 4.5 * 4000**0.5


def test_coverage_of_normals_that_are_too_narrow_or_right_or_too_wide() -> None:
    y = torch.randn(200_000, generator=seeded(), dtype=torch.float64)
    levels = torch.linspace(0, 1, 21, dtype=torch.float64)
    unit = Normal(0.0, 1.0)
    for std in (0.5, 1.0, 2.0):
        found = coverage(torch.special.ndtr(y / std), levels)
        # The interval of level l of N(0, s) ends at s q, of which N(0, 1) covers erf(s q / sqrt 2).
        ends = unit.icdf((1 + levels) / 2)
        expected = torch.special.erf(std * ends / math.sqrt(2))
        torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)
    assert coverage(torch.rand(100, 1), levels).shape == (21,)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: crps(torch.zeros(5, 3), torch.zeros(4)), "entry of y (4,), got torch.float32 (5"),
        (lambda: crps(torch.zeros(5, 4, 1), torch.zeros(4)), "(k, *y.shape)"),
        (lambda: crps(torch.zeros(1, 4), torch.zeros(4)), "crps expects at least 2 draws"),
        (lambda: pit(torch.zeros(0, 4), torch.zeros(4)), "pit expects at least 1 draws"),
        (lambda: pit(torch.zeros(5, 4).long(), torch.zeros(4)), "got torch.int64"),
        (lambda: crps([1.0, 2.0], torch.zeros(())), "draws to be a Tensor"),
        (lambda: crps(torch.full((3, 1), math.nan), torch.zeros(1)), "3 of its 3 values"),
        (lambda: pit(torch.zeros(3, 1), torch.full((1,), math.inf)), "1 of its 1 values"),
        (lambda: coverage(torch.tensor([1.5]), torch.tensor([0.5])), "coverage expects pit"),
        (lambda: coverage(torch.tensor([0.5]), torch.tensor([90.0])), "coverage expects levels"),
        (lambda: coverage(torch.zeros(0), torch.tensor([0.9])), "coverage expects pit"),
    ],
)
def test_wrong_use_is_told_in_one_sentence(call: Callable[[], Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=".") as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")
