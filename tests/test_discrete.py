"""Distributions of integers: they sum to one, their draws follow them, nothing underflows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nflib.arguments import ArgumentError
from nflib.core import ShapeError
from nflib.discrete import Bernoulli, Head, LogisticMixture, Softmax

HEADS = {
    "bernoulli": Bernoulli(),
    "bernoulli of 3 channels": Bernoulli(3),
    "softmax": Softmax(5),
    "softmax of 3 channels": Softmax(4, 3),
    "mixture": LogisticMixture(5, 1, 3),
    "mixture of 1": LogisticMixture(2, 1, 1),
    "mixture of 2 channels": LogisticMixture(4, 2, 2),
    "mixture of 3 channels": LogisticMixture(4, 3, 3),
}
every = pytest.mark.parametrize("name", HEADS)


def all_values(head: Head) -> Tensor:
    """Every value of a position, ``(levels ** channels, channels)``."""
    one = torch.arange(head.levels)
    return torch.cartesian_prod(*[one] * head.channels).view(-1, head.channels).double()


def parameters(head: Head, rows: int, scale: float = 2.0) -> Tensor:
    torch.manual_seed(0)
    return scale * torch.randn(1, head.count, dtype=torch.float64).expand(rows, -1)


@every
def test_probabilities_sum_to_one(name: str) -> None:
    head = HEADS[name]
    x = all_values(head)
    total = head.log_prob(x, parameters(head, len(x))).exp().sum()
    torch.testing.assert_close(total, torch.ones((), dtype=torch.float64))


@every
def test_draws_follow_the_probabilities(name: str) -> None:
    head, n = HEADS[name], 100_000
    x = all_values(head)
    p = head.log_prob(x, parameters(head, len(x))).exp()
    torch.manual_seed(1)
    u = torch.rand(n, head.uniforms, dtype=torch.float64)
    drawn = head.sample(parameters(head, n), u)
    place = torch.tensor([head.levels ** (head.channels - 1 - c) for c in range(head.channels)])
    found = torch.bincount((drawn * place).sum(1).long(), minlength=len(x)) / n
    assert (found - p).abs().max() < 4 * (0.25 / n) ** 0.5 + 1e-3


@pytest.mark.parametrize("name", [name for name in HEADS if "mixture" not in name])
def test_the_mean_is_that_of_all_values(name: str) -> None:
    head = HEADS[name]
    x = all_values(head)
    p = head.log_prob(x, parameters(head, len(x))).exp()
    torch.testing.assert_close(head.mean(parameters(head, 1))[0], (p[:, None] * x).sum(0))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_mean_of_a_mixture_is_that_of_its_draws(channels: int) -> None:
    head, n = LogisticMixture(256, channels, 3), 100_000
    torch.manual_seed(4)
    p = 0.3 * torch.randn(1, head.count, dtype=torch.float64)
    scales = slice(3 + 3 * channels, 3 + 6 * channels)
    p[:, scales] = -3.5  # four levels wide, so that nothing reaches beyond the ends
    drawn = head.sample(p.expand(n, -1), torch.rand(n, head.uniforms, dtype=torch.float64))
    error = drawn.std(0) / n**0.5
    assert ((drawn.mean(0) - head.mean(p)[0]).abs() < 4 * error + 0.02).all()


def test_the_mean_of_a_mixture_is_rounded_by_half_a_level_and_stays_within_the_levels() -> None:
    head = LogisticMixture(5, 1, 1)
    between = torch.tensor([[0.0, 0.2, -9.0], [0.0, 7.0, -9.0], [0.0, -7.0, 2.0]])
    assert head.mean(between)[:, 0].tolist() == pytest.approx([2.4, 4.0, 0.0])
    x = torch.arange(5.0)[:, None]
    exact = (x[:, 0] * head.log_prob(x, between[:1].expand(5, -1)).exp()).sum()
    assert exact.item() == pytest.approx(2.0, abs=1e-3)


@every
def test_the_mean_has_the_shape_of_the_values(name: str) -> None:
    head = HEADS[name]
    p = torch.randn(2, head.count, 3, 4, dtype=torch.float64)
    found = head.mean(p)
    assert found.shape == (2, head.channels, 3, 4)
    torch.testing.assert_close(found[:, :, 1, 2], head.mean(p[:, :, 1, 2]))


@every
def test_positions_are_mapped_one_by_one(name: str) -> None:
    head = HEADS[name]
    torch.manual_seed(0)
    p = torch.randn(2, head.count, 3, 4, dtype=torch.float64)
    u = torch.rand(2, head.uniforms, 3, 4, dtype=torch.float64)
    x = head.sample(p, u)
    assert x.shape == (2, head.channels, 3, 4)
    whole = head.log_prob(x, p)
    assert whole.shape == (2, 3, 4)
    torch.testing.assert_close(whole[:, 1, 2], head.log_prob(x[:, :, 1, 2], p[:, :, 1, 2]))
    assert torch.equal(x[:, :, 1, 2], head.sample(p[:, :, 1, 2], u[:, :, 1, 2]))


def test_a_bin_is_the_difference_of_two_sigmoids() -> None:
    """Against the textbook formula in float64, where nothing underflows."""
    head = LogisticMixture(7, 1, 2)
    x = torch.arange(7.0, dtype=torch.float64)[:, None]
    p = parameters(head, 7, scale=0.5)
    log_weights, means, log_scales, _ = head.unpack(p)
    half, at = 1 / 6, 2 * x / 6 - 1
    scale = log_scales[:, 0].exp()
    upper = torch.where(x == 6, 1.0, torch.sigmoid((at + half - means[:, 0]) / scale))
    lower = torch.where(x == 0, 0.0, torch.sigmoid((at - half - means[:, 0]) / scale))
    expected = (log_weights.exp() * (upper - lower)).sum(1).log()
    torch.testing.assert_close(head.log_prob(x, p), expected)


def test_the_means_of_later_channels_follow_the_earlier() -> None:
    head = LogisticMixture(256, 2, 1)
    p = torch.zeros(2, head.count)
    p[:, 3:5] = -6  # narrow
    p[:, 5] = 3  # the link, tanh(3) = 0.995
    x = torch.tensor([[200.0, 200.0], [200.0, 127.0]])
    near, far = head.log_prob(x, p)
    assert near > far + 10


@pytest.mark.parametrize("log_scale", [-20.0, -7.0, 0.0, 7.0])
def test_nothing_underflows_far_out(log_scale: float) -> None:
    head = LogisticMixture(256, 1, 1)
    x = torch.tensor([0.0, 1.0, 128.0, 254.0, 255.0])[:, None]
    p = torch.tensor([[0.0, 3.0, log_scale]]).repeat(5, 1).requires_grad_()
    log_prob = head.log_prob(x, p)
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all()
    assert p.grad is not None
    assert torch.isfinite(p.grad).all()
    # The top level holds all of the mass above it; every other one still pulls the mean.
    assert (p.grad[:-1, 1].abs() > 0).all()


def test_half_precision_parameters_give_full_precision() -> None:
    head = Softmax(4)
    p = torch.randn(3, 4).bfloat16()
    assert head.log_prob(torch.zeros(3, 1), p).dtype == torch.float32
    assert Bernoulli(4).log_prob(torch.zeros(3, 4), p).dtype == torch.float32
    assert Bernoulli(4).mean(p).dtype == torch.float32
    assert LogisticMixture(4, 1, 2).log_prob(torch.zeros(3, 1), torch.randn(3, 6).half()).dtype == (
        torch.float32
    )


@every
def test_wrong_shapes_are_one_sentence(name: str) -> None:
    head = HEADS[name]
    with pytest.raises(ShapeError, match=rf"^{type(head).__name__} expects values .*, got .*\.$"):
        head.log_prob(torch.zeros(2, head.channels), torch.zeros(2, head.count + 1))
    with pytest.raises(ShapeError, match="expects values"):
        head.log_prob(torch.zeros(2, head.channels, 3), torch.zeros(2, head.count, 4))


def test_wrong_sizes_are_one_sentence() -> None:
    for make, message in (
        (lambda: Softmax(1), "Softmax expects levels to be a whole number of at least 2, got 1"),
        (lambda: Softmax(2.0), "Softmax expects levels .*, got 2.0"),
        (lambda: Softmax(4, 0), "Softmax expects channels .* at least 1, got 0"),
        (lambda: LogisticMixture(4, 1, 0), "LogisticMixture expects components .*, got 0"),
        (lambda: Bernoulli(0), "Bernoulli expects channels .* at least 1, got 0"),
    ):
        with pytest.raises(ArgumentError, match=rf"^{message}\.$"):
            make()
    assert repr(LogisticMixture(np.int64(4))) == (
        "LogisticMixture(levels=4, channels=1, components=5)"
    )


@pytest.mark.parametrize("levels", [2, 17, 256, 4096, 65536])
@pytest.mark.parametrize("log_scale", [-30.0, -9.0, 0.0, 30.0])
def test_a_mixture_serves_any_number_of_levels_in_float32(levels: int, log_scale: float) -> None:
    head = LogisticMixture(levels, components=2)
    x = torch.arange(levels)[:, None]
    level = levels // 3
    p = torch.tensor([0.0, 1.0, 2 * level / (levels - 1) - 1, 0.4, log_scale, log_scale])
    p = p.repeat(levels, 1).requires_grad_()
    log_prob = head.log_prob(x, p)
    assert log_prob.dtype == torch.float32
    assert log_prob.exp().double().sum().item() == pytest.approx(1, abs=2e-4)
    log_prob.sum().backward()
    assert p.grad is not None
    assert torch.isfinite(p.grad).all()


@pytest.mark.parametrize("bits", [1, 4, 8, 12, 16])
def test_one_level_can_be_nearly_certain(bits: int) -> None:
    head, level = LogisticMixture(2**bits, components=1), 2 ** (bits - 1)
    p = torch.tensor([[0.0, 2 * level / (2**bits - 1) - 1, -30.0]])
    assert head.log_prob(torch.tensor([[level]]), p).exp() > 0.97
    # And is as likely to be drawn.
    u = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
    assert (head.sample(p.expand(2000, 3), u) == level).double().mean() > 0.96


def test_the_floor_of_the_scale_is_that_of_256_levels_up_to_there() -> None:
    assert [LogisticMixture(k).min_log_scale for k in (2, 17, 256)] == [-7, -7, -7]
    assert LogisticMixture(511).min_log_scale == pytest.approx(-7 - math.log(2))


@every
def test_cooled_parameters_are_the_distribution_at_a_temperature(name: str) -> None:
    head = HEADS[name]
    x = all_values(head)
    p = parameters(head, len(x), scale=1.0)
    at_one, at_half = (head.log_prob(x, head.cooled(p, t)).exp() for t in (1.0, 0.5))
    torch.testing.assert_close(at_one, head.log_prob(x, p).exp())
    torch.testing.assert_close(at_half.sum(), torch.ones((), dtype=torch.float64))
    if isinstance(head, Softmax | Bernoulli):
        torch.testing.assert_close(at_half, at_one.square() / at_one.square().sum())
    else:
        weights, means, log_scales, links = head.unpack(p)
        cooled = head.unpack(head.cooled(p, 0.5))
        torch.testing.assert_close(cooled[0], (2 * weights).log_softmax(1))
        torch.testing.assert_close(cooled[2], log_scales - math.log(2))
        assert torch.equal(cooled[1], means)
        assert torch.equal(cooled[3], links)


def test_a_head_that_is_not_written_says_so() -> None:
    head = Head(2)
    for call in (
        lambda: head.log_prob(torch.zeros(1, 1), torch.zeros(1, 1)),
        lambda: head.sample(torch.zeros(1, 1), torch.zeros(1, 1)),
        lambda: head.mean(torch.zeros(1, 1)),
        lambda: head.cooled(torch.zeros(1, 1), 0.5),
    ):
        with pytest.raises(NotImplementedError, match=r"^Head does not define \w+\(.*\)\.$"):
            call()


def test_a_softmaxs_numbers_are_channel_after_channel() -> None:
    likely = torch.tensor([[0.0, 0.0, 9.0, 0.0, 9.0, 0.0]])  # level 2 of channel 0, 1 of channel 1
    head = Softmax(3, 2)
    assert head.log_prob(torch.tensor([[2, 1]]), likely).item() > -0.01
    assert head.sample(likely, torch.full((1, 2), 0.5)).tolist() == [[2.0, 1.0]]


def test_each_pair_of_channels_has_a_link_of_its_own_and_scales_have_a_floor() -> None:
    head = LogisticMixture(101, 3, 1)
    # A weight, three means, three log-scales, then the links 1-0, 2-0 and 2-1.
    links = torch.tensor([0.2, -0.4, 0.7]).atanh()
    means, floor = torch.tensor([0.5, -0.2, 0.1]), head.min_log_scale

    def parameters(log_scale: float) -> Tensor:
        return torch.cat([torch.zeros(1), means, torch.full((3,), log_scale), links])[None]

    x0, x1 = 0.5, -0.2 + 0.2 * 0.5
    expected = [x0, x1, 0.1 - 0.4 * x0 + 0.7 * x1]
    drawn = head.sample(parameters(-50.0), torch.full((1, 4), 0.5))
    assert drawn[0].tolist() == [round(50 * (value + 1)) for value in expected]
    x = drawn + 1
    assert torch.equal(head.log_prob(x, parameters(-50.0)), head.log_prob(x, parameters(floor)))
    assert head.log_prob(x, parameters(floor)) < head.log_prob(x, parameters(floor + 1))
