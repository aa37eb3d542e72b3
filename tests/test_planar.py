"""Planar, radial and Sylvester maps: their formulas, and how hard they may squeeze."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nflib.arguments import ArgumentError
from nflib.checks import check_bijection, jacobian, randomize_parameters
from nflib.core import Bijection
from nflib.planar import Planar, Radial, Sylvester, log_stretch, solve_tanh


def set_parameters(layer: Bijection, **values: float) -> Bijection:
    for name, value in values.items():
        torch.nn.init.constant_(layer.get_parameter(name), value)
    return layer


def exact_log_det(layer: Bijection, x: Tensor) -> Tensor:
    return torch.linalg.slogdet(jacobian(lambda a: layer(a)[0], x))[1]


def test_planar_is_the_papers_formula() -> None:
    layer = Planar(4).double()
    randomize_parameters(layer)
    x, (u, w, b) = torch.randn(7, 4).double(), layer.values(None)
    product = (w * u).sum()
    u = u + (F.softplus(product) - 1 - product) * w / w.square().sum()
    h = torch.tanh(x @ w[0] + b[0])
    z, log_det = layer(x)
    torch.testing.assert_close(z, x + h[:, None] * u)
    torch.testing.assert_close(log_det, (1 + (u @ w[0]) * (1 - h.square())).log())


def test_radial_is_the_papers_formula() -> None:
    layer = Radial(4).double()
    randomize_parameters(layer)
    x, (centre, a, c) = torch.randn(7, 4).double(), layer.values(None)
    alpha = F.softplus(a)
    beta = F.softplus(c) - alpha
    r = (x - centre).norm(dim=1, keepdim=True)
    z, log_det = layer(x)
    torch.testing.assert_close(z, x + beta * (x - centre) / (alpha + r))
    h = 1 / (alpha + r)
    expected = 3 * (1 + beta * h).log() + (1 + alpha * beta * h.square()).log()
    torch.testing.assert_close(log_det, expected[:, 0])


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_sylvesters_log_det_is_that_of_its_jacobian(rank: int) -> None:
    layer = Sylvester(4, rank).double()
    randomize_parameters(layer)
    x = torch.randn(5, 4).double()
    torch.testing.assert_close(layer(x)[1], exact_log_det(layer, x))
    check_bijection(layer.float(), torch.randn(5, 4))


def test_a_planar_map_that_nearly_folds_keeps_its_log_det_and_its_inverse() -> None:
    """softplus(-20) = 2e-9: one minus that is one in float32."""
    layer = set_parameters(Planar(1), w=1.0, u=-20.0, b=0.0)
    zero = torch.zeros(1, 1)
    assert layer(zero)[1].item() == pytest.approx(-20, abs=1e-4)
    x, log_det = layer.inverse(zero)
    assert x.item() == 0
    assert log_det.item() == pytest.approx(20, abs=1e-4)


def test_a_radial_map_that_nearly_folds_keeps_its_log_det_and_its_inverse() -> None:
    """As a fit to a ring found it: a = 38.6, c = -18.4."""
    layer = set_parameters(Radial(2), centre=0.0, a=38.6, c=-18.4)
    zero = torch.zeros(1, 2)
    expected = 2 * (-18.4 - math.log(38.6))
    assert layer(zero)[1].item() == pytest.approx(expected, abs=1e-4)
    x, log_det = layer.inverse(zero)
    assert x.tolist() == [[0.0, 0.0]]
    assert log_det.item() == pytest.approx(-expected, abs=1e-4)


def test_a_sylvester_map_that_nearly_folds_keeps_its_log_det_and_its_inverse() -> None:
    """``1 + tanh(9) tanh(-9.5)``, to which float64 comes close."""
    layer = set_parameters(Sylvester(1), vectors=1.0, triangles=9.0, diagonal=-9.5, b=0.0)
    zero = torch.zeros(1, 1)
    expected = math.log(2 * (math.exp(-18) + math.exp(-19)))
    assert layer(zero)[1].item() == pytest.approx(expected, abs=1e-4)
    x, log_det = layer.inverse(zero)
    assert x.item() == 0
    assert log_det.item() == pytest.approx(-expected, abs=1e-4)


@pytest.mark.parametrize("make", [lambda: Planar(3), lambda: Radial(3), lambda: Sylvester(3)])
@pytest.mark.parametrize("size", [1.0, 10.0])
def test_log_dets_in_float32_are_those_of_float64(make: type[Bijection], size: float) -> None:
    layer = make()
    for seed in range(10):
        randomize_parameters(layer, seed, scale=size)
        x = torch.randn(50, 3)
        single = layer.float()(x)[1]
        double = layer.double()(x.double())[1]
        # Not exactly: x and the parameters decide by rounding how far from the fold a point is.
        error = (single - double).abs() / (1 + double.abs())
        assert error.median() < 1e-5
        assert error.max() < 3e-2
        layer.float()


@pytest.mark.parametrize("margin", [1e-14, 1e-6, 0.1, 1.0, 1.9, 30.0, 3e4, 1e6])
def test_the_tanh_equation_is_solved_for_any_margin(margin: float) -> None:
    target = torch.cat([torch.linspace(-50, 50, 201), margin * torch.linspace(-1.1, 1.1, 201)])
    m = torch.full_like(target, margin)
    s = solve_tanh(m, target, rounds=30)
    error = s + (m - 1) * torch.tanh(s) - target
    unit = 1 + target.abs() + (m - 1).abs() * (s.abs() > 0)
    assert (error.abs() / unit).max() < 1e-6
    assert torch.equal(s.sign(), target.sign())


def test_a_planar_map_of_a_million_is_inverted_all_the_same() -> None:
    """It stretches rounding by a million, too; that does not show in the log-det."""
    layer = set_parameters(Planar(1), w=1000.0, u=1000.0, b=0.0)
    z = torch.linspace(-1500, 1500, 301)[:, None]
    single, double = layer.inverse(z)[1], layer.double().inverse(z.double())[1]
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-2)


def test_the_stretch_is_exact_far_out() -> None:
    s = torch.linspace(-12, 12, 101)
    for margin in (1e-14, 1.0, 1e6):
        found = log_stretch(torch.tensor(margin), s).double()
        exact = 1 + (margin - 1) / torch.cosh(s.double()).square()
        if margin >= 1:
            torch.testing.assert_close(found, exact.log(), rtol=0, atol=1e-5)
        assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Planar(0),
        lambda: Planar(2.5),
        lambda: Radial((2, 3)),
        lambda: Radial(2, context_dim=0),
        lambda: Planar(2, context_dim=(1, 2, 2)),
        lambda: Sylvester(3, 4),
        lambda: Sylvester(3, 0),
    ],
)
def test_bad_arguments_are_one_sentence(make: type[Bijection]) -> None:
    with pytest.raises(ArgumentError, match=r"^\w+ expects .*, got .*\.$"):
        make()


def test_a_radial_map_that_pushes_far_is_inverted_without_cancellation() -> None:
    layer = set_parameters(Radial(2), centre=0.0, a=-7.0, c=1000.0)
    x = torch.tensor([[1e-3, -2e-3], [1e-4, 0.0], [3.0, 4.0]])
    torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x, rtol=1e-4, atol=0)


@pytest.mark.parametrize("u", [-150.0, -1e4])
def test_a_planar_map_whose_softplus_underflows_stays_finite(u: float) -> None:
    layer = set_parameters(Planar(1), w=1.0, u=u, b=0.0)
    for function in (layer, layer.inverse):
        out, log_det = function(torch.zeros(1, 1))
        assert torch.isfinite(out).all()
        assert torch.isfinite(log_det).all()
