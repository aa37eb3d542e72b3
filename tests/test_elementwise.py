"""Elementwise maps: their formulas, edges and far ends, and inverses that are exact or say not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nflib.arguments import ArgumentError
from nflib.checks import check_normalized, randomize_parameters
from nflib.core import Flow, StandardNormal
from nflib.elementwise import (
    Additive,
    Affine,
    Elementwise,
    LogisticMixtureCDF,
    MonotoneNet,
    NotInvertedError,
    Pointwise,
    RationalQuadraticSpline,
    mixture,
)

MAPS: dict[str, Elementwise] = {
    "additive": Additive(),
    "affine": Affine(),
    "spline": RationalQuadraticSpline(5, limit=3.0),
    "mixture": LogisticMixtureCDF(4),
    "monotone": MonotoneNet(3, 2),
}
SEARCHING = {name: MAPS[name] for name in ("mixture", "monotone")}


def draw(tau: Elementwise, rows: int, scale: float = 1.0, **options: torch.dtype) -> Tensor:
    return scale * torch.randn(rows, tau.count, 1, **options)


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def spline_formula(x: float, theta: Tensor, bins: int, limit: float, minimum: float) -> float:
    """Durkan et al. 2019, equation 4, one number at a time."""
    if not -limit < x < limit:
        return x
    ends = []
    for logits in (theta[:bins], theta[bins : 2 * bins]):
        shares = minimum + (1 - bins * minimum) * logits.softmax(0)
        ends.append([-limit, *(-limit + 2 * limit * shares.cumsum(0)).tolist()])
    softplus = (1 + (theta[2 * bins :].exp() * (torch.tensor(1.0 - minimum).exp() - 1))).log()
    slopes = [1.0, *(minimum + softplus).tolist(), 1.0]
    (x_knots, y_knots) = ends
    k = max(i for i in range(bins) if x_knots[i] <= x)
    w, h = x_knots[k + 1] - x_knots[k], y_knots[k + 1] - y_knots[k]
    xi, s = (x - x_knots[k]) / w, h / w
    top = h * (s * xi**2 + slopes[k] * xi * (1 - xi))
    return y_knots[k] + top / (s + (slopes[k + 1] + slopes[k] - 2 * s) * xi * (1 - xi))


def mixture_formula(x: Tensor, theta: Tensor, k: int, bound: float = 3.0) -> Tensor:
    """The logit of the mixture's CDF, with torch's own logistic CDF; x and theta of one entry."""
    logits, means, scales, (a, b) = theta.split([k, k, k, 2])
    means = means + torch.linspace(-2, 2, k, dtype=theta.dtype)
    widths = (bound * (scales / bound).tanh()).exp()
    cdf = (logits.softmax(0) * torch.sigmoid((x - means) / widths)).sum()
    return (torch.logit(cdf) * (bound * (a / bound).tanh()).exp() + b)[None]


def test_additive_and_affine_equal_their_formulas() -> None:
    x, theta = torch.randn(9, 1), torch.randn(9, 2, 1)
    a, t = theta.unbind(1)
    assert torch.equal(Additive().forward(x, t[:, None])[0], x + t)
    s = 2 * torch.tanh(a / 2)
    z, log_slope = Affine(bound=2.0).forward(x, theta)
    torch.testing.assert_close(z, x * s.exp() + t)
    torch.testing.assert_close(log_slope, s)


def test_the_spline_equals_its_formula() -> None:
    tau = RationalQuadraticSpline(5, limit=3.0, minimum=1e-2)
    x, theta = 2 * torch.randn(50, 1, dtype=torch.float64), draw(tau, 50, 2, dtype=torch.float64)
    expected = [spline_formula(x[i].item(), theta[i, :, 0], 5, 3.0, 1e-2) for i in range(50)]
    torch.testing.assert_close(tau.forward(x, theta)[0][:, 0].tolist(), expected, rtol=1e-6, atol=0)


def test_the_mixture_equals_its_formula() -> None:
    tau = LogisticMixtureCDF(4)
    x, theta = 2 * torch.randn(50, 1, dtype=torch.float64), draw(tau, 50, dtype=torch.float64)
    expected = torch.stack([mixture_formula(a, t[:, 0], 4) for a, t in zip(x, theta, strict=True)])
    torch.testing.assert_close(tau.forward(x, theta)[0], expected)


def test_a_monotone_net_of_one_layer_is_the_mixture_without_its_outer_map() -> None:
    net, mixture = MonotoneNet(4, layers=1), LogisticMixtureCDF(4)
    x, theta = 3 * torch.randn(20, 1), draw(mixture, 20)
    theta[:, -2:] = 0
    log_pi, log_slopes, offsets, _, _ = mixture._units(theta)
    # The same units in the network's own coordinates.
    raw = 3 * torch.atanh(log_slopes / 3)
    spread = torch.linspace(-2, 2, 4)[:, None]
    same = torch.cat([log_pi, raw, offsets - spread], 1)
    for mine, other in zip(net.forward(x, same), mixture.forward(x, theta), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_round_trip_and_log_slope_equal_autograd(name: str, scale: float) -> None:
    tau = MAPS[name]
    theta = draw(tau, 200, scale, dtype=torch.float64)
    x = 3 * torch.randn(200, 1, dtype=torch.float64)
    for function, at in ((tau.forward, x), (tau.inverse, tau.forward(x, theta)[0])):
        at = at.detach().requires_grad_()
        out, log_slope = function(at, theta)
        (slope,) = torch.autograd.grad(out.sum(), at)
        assert (slope > 0).all()
        torch.testing.assert_close(log_slope, slope.log(), rtol=1e-6, atol=1e-6)
    z, log_slope = tau.forward(x, theta)
    back, back_log_slope = tau.inverse(z, theta)
    torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(back_log_slope, -log_slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("inverse", [False, True])
def test_rebuild_finds_the_entries_and_maps_them_once_more(name: str, inverse: bool) -> None:
    tau = MAPS[name]
    theta = draw(tau, 200, dtype=torch.float64).requires_grad_()
    given = (3 * torch.randn(200, 1, dtype=torch.float64)).requires_grad_()
    there = tau.inverse if inverse else tau.forward
    expected = there(given, theta)
    x, outputs = tau.rebuild(expected[0].detach(), theta, inverse)
    torch.testing.assert_close(x, given, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(outputs, expected, rtol=1e-6, atol=1e-6)
    wanted, found = (
        torch.autograd.grad((out.sin() + log_slope.sin()).sum(), (at, theta))
        for at, (out, log_slope) in ((given, expected), (x, outputs))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_rebuilding_with_a_spline_looks_up_its_knots_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tau, calls = RationalQuadraticSpline(5), []
    knots = tau._knots
    monkeypatch.setattr(tau, "_knots", lambda theta: calls.append(1) or knots(theta))
    tau.rebuild(torch.randn(9, 1), draw(tau, 9), inverse=False)
    assert calls == [1]


@pytest.mark.parametrize("name", MAPS)
def test_parameters_of_zero_give_nearly_the_identity(name: str) -> None:
    x = torch.linspace(-3, 3, 61)[:, None]
    z, log_slope = MAPS[name].forward(x, torch.zeros(61, MAPS[name].count, 1))
    if name in SEARCHING:
        assert ((z[1:] - z[:-1]) > 0).all()
        assert (z - x).abs().max() < 2
        assert log_slope.abs().max() < 1
    else:
        torch.testing.assert_close(z, x)
        torch.testing.assert_close(log_slope, torch.zeros_like(x), atol=1e-6, rtol=0)


# Affine


@pytest.mark.parametrize("theta", [1e6, -1e6])
def test_affine_overflows_in_neither_direction(theta: float) -> None:
    parameters = torch.full((4, 2, 1), theta).requires_grad_()
    x = column(-1e6, -1.0, 1.0, 1e6).requires_grad_()
    for function in (Affine().forward, Affine().inverse):
        out, log_slope = function(x, parameters)
        gradients = torch.autograd.grad((out + log_slope).sum(), (x, parameters))
        for tensor in (out, log_slope, *gradients):
            assert torch.isfinite(tensor).all()
        assert (log_slope.abs() <= 3).all()


# Spline


def around_the_knots(knots: Tensor) -> Tensor:
    """Each knot and its nearest neighbours among the floats, ``(points, 1)``."""
    up = torch.nextafter(knots, torch.full_like(knots, torch.inf))
    down = torch.nextafter(knots, torch.full_like(knots, -torch.inf))
    return torch.cat([knots, up, down])[:, None]


@pytest.mark.parametrize("scale", [1.0, 5.0, 20.0])
def test_the_spline_is_exact_at_every_knot_and_edge(scale: float) -> None:
    tau = RationalQuadraticSpline(8, limit=4.0)
    theta = draw(tau, 1, scale)
    x, y, slopes = (knot[0, :, 0] for knot in tau.knots(theta))
    assert (x[0].item(), x[-1].item(), y[0].item(), y[-1].item()) == (-4.0, 4.0, -4.0, 4.0)
    assert (x.diff() > 0).all()
    assert (y.diff() > 0).all()
    many = theta.expand(9, -1, -1)
    z, log_slope = tau.forward(x[:, None], many)
    assert torch.equal(z[:, 0], y)
    torch.testing.assert_close(log_slope[:, 0], slopes.log(), atol=1e-4, rtol=1e-4)
    back, back_log_slope = tau.inverse(y[:, None], many)
    assert torch.equal(back[:, 0], x)
    torch.testing.assert_close(back_log_slope[:, 0], -slopes.log(), atol=1e-4, rtol=1e-4)


def test_the_spline_is_the_identity_outside() -> None:
    tau = RationalQuadraticSpline(4, limit=2.0)
    x = column(-1e30, -50.0, -2.0, 2.0, 2.0001, 1e30, torch.inf)
    for function in (tau.forward, tau.inverse):
        z, log_slope = function(x, draw(tau, 7, 3))
        assert torch.equal(z, x)
        assert not log_slope.any()


def test_the_splines_derivative_is_continuous() -> None:
    tau = RationalQuadraticSpline(6, limit=3.0)
    theta = draw(tau, 1, dtype=torch.float64)
    knots = tau.knots(theta)[0][0]
    left, right = (tau.forward(knots + step, theta.expand(7, -1, -1))[1] for step in (-1e-9, 1e-9))
    torch.testing.assert_close(left, right, atol=1e-6, rtol=0)
    # The slope does change between knots: the comparison above is not one of constants.
    middle = tau.forward((knots[1:] + knots[:-1]) / 2, theta.expand(6, -1, -1))[1]
    assert (middle - left[1:]).abs().min() > 1e-4


every_direction = pytest.mark.parametrize("direction", ["forward", "inverse"])
sizes = pytest.mark.parametrize("size", [0.0, 1.0, 5.0, 20.0, 100.0])


def critical(tau: RationalQuadraticSpline, theta: Tensor, direction: str) -> Tensor:
    """Knots, edges and their neighbours, the tails, and ordinary numbers, ``(points, 1)``."""
    knots = tau.knots(theta)[0 if direction == "forward" else 1][0, :, 0].detach()
    far = torch.tensor([-1e30, -50.0, -4.1, 4.1, 50.0, 1e30], dtype=theta.dtype)[:, None]
    return torch.cat([around_the_knots(knots), far, 3 * torch.randn(200, 1, dtype=theta.dtype)])


@sizes
@every_direction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_splines_gradients_are_finite_everywhere(
    direction: str, size: float, dtype: torch.dtype
) -> None:
    tau = RationalQuadraticSpline(8, limit=4.0)
    for seed in range(5):
        torch.manual_seed(seed)
        theta = draw(tau, 1, size, dtype=dtype).requires_grad_()
        x = critical(tau, theta, direction).requires_grad_()
        z, log_slope = getattr(tau, direction)(x, theta.expand(len(x), -1, -1))
        gradients = torch.autograd.grad((z + log_slope).sum(), (x, theta))
        for tensor in (z, log_slope, *gradients):
            assert torch.isfinite(tensor).all()


@sizes
@every_direction
def test_rounding_hardly_moves_the_splines_values_and_gradients(
    direction: str, size: float
) -> None:
    """In float32 and float64, from the same knots: what differs is the rounding of the formulas."""
    tau = RationalQuadraticSpline(8, limit=4.0)
    row = 0 if direction == "forward" else 1
    function = tau._fall if row else tau._rise
    for seed in range(5):
        torch.manual_seed(seed)
        theta = draw(tau, 1, size)
        x = critical(tau, theta, direction)
        corners = torch.stack(tau._bin(x, theta.expand(len(x), -1, -1), row))
        found = []
        for dtype in (torch.float32, torch.float64):
            at, c = (t.to(dtype).requires_grad_() for t in (x, corners))
            z, log_slope = function(at, *c)
            for out in (z, log_slope):
                gradients = torch.autograd.grad(out.sum(), (at, c), retain_graph=True)
                found.append((out, gradients[0], *gradients[1]))
        for single, double in zip(found[:2], found[2:], strict=True):
            # Beside the largest of a point's gradients, which may be hundreds.
            largest = 1 + torch.stack([g.abs() for g in double[1:]]).amax(0)
            for k, (a, b) in enumerate(zip(single, double, strict=True)):
                unit = largest if k else 1 + b.abs()
                assert ((a - b).abs() / unit).max() < 3e-3


@sizes
def test_the_gradients_of_the_splines_inverse_are_those_of_the_implicit_function(
    size: float,
) -> None:
    """``dx/dz = 1 / f'(x)`` and ``dx/dtheta = -(df/dtheta) / f'(x)``, at knots and elsewhere."""
    tau = RationalQuadraticSpline(8, limit=4.0)
    theta = draw(tau, 1, size, dtype=torch.float64)
    z = critical(tau, theta, "inverse")
    theta = theta.expand(len(z), -1, -1).clone().requires_grad_()
    z.requires_grad_()
    x, _ = tau.inverse(z, theta)
    by_z, by_theta = torch.autograd.grad(x.sum(), (z, theta))
    x = x.detach().requires_grad_()
    back, log_slope = tau.forward(x, theta)
    (back_by_theta,) = torch.autograd.grad(back.sum(), theta)
    slope = log_slope.detach().exp()
    inside = slope[:, 0] > 1e-4  # flatter, an x rounded at the 16th digit is another point
    torch.testing.assert_close(by_z[inside], 1 / slope[inside], rtol=1e-5, atol=1e-7)
    expected = -back_by_theta / slope.unsqueeze(1)
    torch.testing.assert_close(by_theta[inside], expected[inside], rtol=1e-4, atol=1e-6)


# Mixture and monotone network


@pytest.mark.parametrize("name", SEARCHING)
def test_the_inverse_in_float32_is_good_to_1e_4_up_to_a_thousand(name: str) -> None:
    tau = SEARCHING[name]
    theta = draw(tau, 20_000)
    size = 10 ** (6 * torch.rand(20_000, 1) - 3)  # 1e-3 to 1e3
    x = torch.where(torch.rand(20_000, 1) < 0.5, size, -size)
    z, log_slope = tau.forward(x, theta)
    back, back_log_slope = tau.inverse(z, theta)
    assert ((back - x).abs() / (1 + x.abs())).max() < 1e-4
    assert (log_slope + back_log_slope).abs().max() < 1e-3


@pytest.mark.parametrize("components", [1, 2, 8])
def test_the_inverse_does_not_fail_where_components_leave_a_flat_part(components: int) -> None:
    # Between components far apart the map rises by less than float32 can resolve in x. What must
    # hold there is f(x) = z, and that the search does not raise.
    tau = LogisticMixtureCDF(components)
    theta = draw(tau, 50_000, 2)
    z, _ = tau.forward(0.3 * torch.randn(50_000, 1), theta)
    again, _ = tau.forward(tau.inverse(z, theta)[0], theta)
    assert ((again - z).abs() / (1 + z.abs())).max() < 1e-3


@pytest.mark.parametrize("name", SEARCHING)
def test_the_log_slope_far_out_is_finite(name: str) -> None:
    tau = SEARCHING[name]
    theta = draw(tau, 4).requires_grad_()
    x = column(-1e4, -1e3, 1e3, 1e4).requires_grad_()
    z, log_slope = tau.forward(x, theta)
    for tensor in (z, log_slope, *torch.autograd.grad((z + log_slope).sum(), (x, theta))):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("name", SEARCHING)
def test_the_inverses_gradient_equals_finite_differences(name: str) -> None:
    tau = SEARCHING[name]
    z = torch.randn(3, 1, dtype=torch.float64).requires_grad_()
    theta = draw(tau, 3, 0.7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: tau.inverse(a, b)[0], (z, theta), atol=1e-4)
    # And so does that of its log-derivative, which a loss on samples needs.
    assert torch.autograd.gradcheck(lambda a, b: tau.inverse(a, b)[1], (z, theta), atol=1e-4)


@pytest.mark.parametrize("name", SEARCHING)
def test_a_broken_search_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = mixture.solve_increasing
    tau = SEARCHING[name]
    z, theta = torch.randn(5, 1), draw(tau, 5)
    for wrong in (lambda x: x + 0.01, lambda x: torch.full_like(x, torch.nan)):

        def search(*args: Tensor, wrong: Callable[[Tensor], Tensor] = wrong, **_: int) -> Tensor:
            return wrong(honest(*args))

        monkeypatch.setattr(mixture, "solve_increasing", search)
        with pytest.raises(NotInvertedError, match=rf"^{type(tau).__name__} expects .* by .*\.$"):
            tau.inverse(z, theta)


@pytest.mark.parametrize("name", SEARCHING)
def test_a_sample_that_is_no_number_leaves_the_others_alone(name: str) -> None:
    tau = SEARCHING[name]
    z, theta = torch.randn(6, 1), draw(tau, 6)
    expected = tau.inverse(z, theta)
    z[2], theta[4, 0] = torch.nan, torch.inf
    for found, whole in zip(tau.inverse(z, theta), expected, strict=True):
        assert found[2].isnan()
        assert found[4].isnan()
        torch.testing.assert_close(found[[0, 1, 3, 5]], whole[[0, 1, 3, 5]])
    assert tau.inverse(torch.zeros(0, 1), draw(tau, 0))[0].shape == (0, 1)


@pytest.mark.parametrize("name", MAPS)
def test_maps_can_be_vmapped(name: str) -> None:
    tau = MAPS[name]
    x, theta = torch.randn(5, 3, 1), draw(tau, 15).unflatten(0, (5, 3))
    for function in (tau.forward, tau.inverse):
        whole = function(x.flatten(0, 1), theta.flatten(0, 1))
        for mapped, expected in zip(torch.vmap(function)(x, theta), whole, strict=True):
            torch.testing.assert_close(mapped.flatten(0, 1), expected)


def test_a_search_goes_on_where_units_are_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A staircase whose bracket is a thousand times wider than a step: 20 rounds do not do."""
    tau = MonotoneNet()
    generator = torch.Generator().manual_seed(0)
    theta = 200 * torch.rand(20_000, tau.count, 1, generator=generator) - 100
    x = torch.cat([torch.randn(19_900, 1), 50 * torch.randn(100, 1)])
    z, _ = tau.forward(x, theta)
    again, _ = tau.forward(tau.inverse(z, theta)[0], theta)
    assert ((again - z).abs() / (1 + z.abs())).max() < 1e-3
    honest = mixture.solve_increasing
    monkeypatch.setattr(mixture, "solve_increasing", lambda *a, rounds=None: honest(*a))
    with pytest.raises(NotInvertedError):
        tau.inverse(z, theta)


# Pointwise


@pytest.mark.parametrize("name", MAPS)
def test_one_dimensional_densities_integrate_to_one(name: str) -> None:
    flow = Flow(Pointwise(MAPS[name], 1), StandardNormal(1))
    for seed in range(3):
        randomize_parameters(flow, seed, scale=1.0)
        check_normalized(flow, dim=1, limits=(-200, 200), points=40_000, tolerance=1e-3)


def test_pointwise_gives_each_entry_its_own_parameters() -> None:
    layer = Pointwise(Additive(), (2, 3))
    torch.nn.init.normal_(layer.theta)
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(layer(x)[0], x + layer.theta[0, 0])


def test_a_pointwise_layer_shows_its_map() -> None:
    layer = Pointwise(RationalQuadraticSpline(4, limit=3.0), (2, 3))
    assert repr(layer) == (
        "Pointwise(RationalQuadraticSpline(bins=4, limit=3.0, minimum=0.001), (2, 3))"
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Affine(0.0),
        lambda: Affine(float("nan")),
        lambda: RationalQuadraticSpline(1),
        lambda: RationalQuadraticSpline(limit=-1.0),
        lambda: RationalQuadraticSpline(10, minimum=0.1),
        lambda: RationalQuadraticSpline(minimum=0.0),
        lambda: LogisticMixtureCDF(0),
        lambda: LogisticMixtureCDF(bound=0.0),
        lambda: MonotoneNet(0),
        lambda: MonotoneNet(2, 0),
        lambda: MonotoneNet(bound=-1.0),
        lambda: Pointwise(Additive(), ()),
        lambda: Pointwise(Additive(), 0),
        lambda: Pointwise(Additive(), (2, -1)),
        lambda: Pointwise(Additive, 2),
        lambda: Pointwise(torch.nn.Tanh(), 2),
    ],
)
def test_bad_arguments_are_one_sentence(make: Callable[[], object]) -> None:
    with pytest.raises(ArgumentError, match=r"^\w+ expects .*, got .*\.$"):
        make()


@pytest.mark.parametrize("bound", [0.5, 3.0, 1e4])
def test_the_affine_scale_is_a_bounded_tanh(bound: float) -> None:
    a, t = torch.randn(200), torch.zeros(200)
    _, s = Affine(bound).forward(torch.zeros(200), torch.stack([a, t]).unsqueeze(0))
    exact = bound * torch.tanh(a.double() / bound)
    torch.testing.assert_close(s[0].double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bound", [3.0, 40.0])
def test_the_affine_map_has_the_gradients_of_its_formula(bound: float) -> None:
    """First and second derivatives of a backward pass that is written by hand."""
    tau = Affine(bound)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    theta = (2 * torch.randn(5, 2, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(tau.forward, (x, theta))
    assert torch.autograd.gradgradcheck(tau.forward, (x, theta))
    still = x.detach()
    assert torch.autograd.gradgradcheck(lambda p: tau.forward(still, p), (theta,))
