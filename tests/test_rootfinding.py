"""The search for an inverse: it arrives, also where a function is flat or steep, and its gradients.

Functions are given as value and derivative, as `solve_increasing` asks for them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nflib.rootfinding import solve_increasing

Pair = tuple[Tensor, Tensor]


def cubic(t: Tensor) -> Pair:
    return t**3 + t, 3 * t.square() + 1


def tanhs(t: Tensor) -> Pair:
    """Three steps of different steepness on a slope of 0.1."""
    value, slope = 0.1 * t, torch.full_like(t, 0.1)
    for steep, at in ((1.0, -3.0), (10.0, 0.0), (100.0, 2.0)):
        step = torch.tanh(steep * (t - at))
        value, slope = value + step, slope + steep * (1 - step.square())
    return value, slope


def flat_then_steep(t: Tensor) -> Pair:
    """Slopes from 1e-3 to 1e5 within a few units."""
    return 1e-3 * t + torch.exp(5 * t), 1e-3 + 5 * torch.exp(5 * t)


TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("f", [cubic, tanhs])
@pytest.mark.parametrize("width", [1.0, 1e3])
def test_finds_the_known_solution(
    f: Callable[[Tensor], Pair], dtype: torch.dtype, width: float
) -> None:
    known = torch.linspace(-8, 8, 999, dtype=dtype)
    lower, upper = known - width * torch.rand_like(known), known + width * torch.rand_like(known)
    found = solve_increasing(f, f(known)[0], lower, upper)
    error = (found - known).abs() / (1 + known.abs())
    assert error.max() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_flat_and_steep_parts_are_found_as_well_as_rounding_allows(dtype: torch.dtype) -> None:
    known = torch.linspace(-4, 2.5, 501, dtype=dtype)
    value, slope = flat_then_steep(known)
    found = solve_increasing(flat_then_steep, value, known - 3, known + 1)
    # The solution moves by this much when the target's last digit does.
    unsure = torch.finfo(dtype).eps * (value.abs() / slope + known.abs())
    assert ((found - known).abs() <= 16 * unsure).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_solution_at_an_end_of_its_bracket_is_found(dtype: torch.dtype) -> None:
    known = torch.tensor([-2.0, 0.5, 3.0], dtype=dtype)
    target = cubic(known)[0]
    for lower, upper in ((known, known + 7), (known - 7, known), (known, known)):
        found = solve_increasing(cubic, target, lower, upper)
        torch.testing.assert_close(found, known, rtol=4e-6, atol=4e-6)


def test_never_leaves_the_bracket_where_rounding_hides_the_slope() -> None:
    # Between two steep parts f rises by 2e-6, four roundings of its value: a Newton step on such
    # a rounding jumps far out of the flat part.
    def f(t: Tensor) -> Pair:
        jump = 100 * torch.relu(t.abs() - 1) * t.sign()
        return 5 + 1e-6 * t + jump, torch.where(t.abs() > 1, 100.0, 1e-6)

    target = 5 + torch.linspace(-2e-6, 2e-6, 201)
    lower, upper = torch.full_like(target, -1.5), torch.full_like(target, 2.5)
    found = solve_increasing(f, target, lower, upper)
    assert ((found >= lower) & (found <= upper)).all()
    assert (f(found)[0] - target).abs().max() < 2e-5


def test_the_gradient_is_that_of_the_implicit_function() -> None:
    y = torch.linspace(-20, 20, 9, dtype=torch.float64).requires_grad_()
    a = torch.full_like(y, 2.0).requires_grad_()

    def solve(target: Tensor, scale: Tensor) -> Tensor:
        def f(t: Tensor) -> Pair:
            return scale * t**3 + t, 3 * scale * t.square() + 1

        bracket = torch.full_like(target, 30.0)
        return solve_increasing(f, target, -bracket, bracket)

    assert torch.autograd.gradcheck(solve, (y, a))
    t = solve(y, a)
    by_y, by_a = torch.autograd.grad(t.sum(), (y, a))
    slope = (3 * a * t.square() + 1).detach()
    torch.testing.assert_close(by_y, 1 / slope)
    torch.testing.assert_close(by_a, (-(t**3) / slope).detach())


def test_an_empty_batch_and_a_target_of_any_shape_work() -> None:
    for shape in ((0, 3), (2, 3, 4)):
        target = torch.randn(shape)
        found = solve_increasing(cubic, target, target - 9, target + 9)
        torch.testing.assert_close(cubic(found)[0], target, atol=1e-5, rtol=1e-5)


def test_more_rounds_find_a_step_in_a_bracket_a_hundred_thousand_wide() -> None:
    def stairs(t: Tensor) -> Pair:
        """Two steps far apart, and next to nothing in between."""
        ups = [torch.sigmoid(20 * (t - at)) for at in (-700.0, 900.0)]
        return ups[0] + ups[1], 20 * sum(u * (1 - u) for u in ups)

    known = torch.linspace(-0.2, 0.2, 101)
    for at in (-700.0, 900.0):
        target = stairs(at + known)[0]
        bracket = torch.full_like(target, 1e5)
        found = solve_increasing(stairs, target, -bracket, 0.7 * bracket, rounds=60)
        assert (stairs(found)[0] - target).abs().max() < 1e-3
    few = solve_increasing(stairs, target, -bracket, 0.7 * bracket, rounds=5)
    assert (stairs(few)[0] - target).abs().max() > 0.1


def test_what_is_no_number_leaves_the_others_alone() -> None:
    target = torch.randn(6)
    lower, upper = target - 9, target + 9
    expected = solve_increasing(cubic, target, lower, upper)
    target[2], lower[4] = torch.nan, torch.nan
    found = solve_increasing(cubic, target, lower, upper)
    assert found[[2, 4]].isnan().all()
    assert torch.equal(found[[0, 1, 3, 5]], expected[[0, 1, 3, 5]])


def test_no_point_outside_of_the_bracket_is_tried() -> None:
    """Newton's second step, from 0.9, is short enough but ends at 1.07."""
    tried: list[float] = []

    def f(t: Tensor) -> Pair:
        tried.append(t.item())
        if t < 0.6:
            return t - 0.9, torch.ones_like(t)
        if t < 0.98:
            return 0.6 * (t - 0.9) - 0.1, torch.full_like(t, 0.6)
        return 10 * (t - 0.98) - 0.052, torch.full_like(t, 10.0)

    found = solve_increasing(f, torch.zeros(1), torch.zeros(1), torch.ones(1))
    assert found.item() == pytest.approx(0.9852, abs=1e-5)
    assert 0 <= min(tried)
    assert max(tried) <= 1


def test_the_best_point_of_all_is_returned() -> None:
    """The middle is nearly right; from there the search has to go far away."""

    def f(t: Tensor) -> Pair:
        inside = t.abs() < 0.1
        value = torch.where(inside, 1e-9 * t, 8 * t**3)
        return 1e-3 + value, torch.where(inside, 1e-9, 24 * t.square())

    zero, one = torch.zeros(1), torch.ones(1)
    found = solve_increasing(f, zero, -one, one, rounds=2)
    assert f(found)[0].abs().item() <= 2e-3
