"""Maps whose parameters are constrained, far out: in float32 everything stays a number.

Networks and optimizers know no bounds. Whatever they come up with, a layer's log-det, its inverse
and all gradients must be finite, or one row spoils a whole step.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nflib.core import Bijection
from nflib.elementwise import (
    Affine,
    LogisticMixtureCDF,
    MonotoneNet,
    Pointwise,
    RationalQuadraticSpline,
)
from nflib.planar import Planar, Radial, Sylvester

LAYERS: dict[str, Callable[[], Bijection]] = {
    "planar": lambda: Planar(3),
    "radial": lambda: Radial(3),
    "sylvester": lambda: Sylvester(3),
    "sylvester of rank 2": lambda: Sylvester(3, 2),
    "affine": lambda: Pointwise(Affine(), 64),
    "spline": lambda: Pointwise(RationalQuadraticSpline(), 64),
    "mixture": lambda: Pointwise(LogisticMixtureCDF(), 64),
    "monotone net": lambda: Pointwise(MonotoneNet(), 64),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def at_the_bound(name: str, seed: int, size: float) -> Bijection:
    torch.manual_seed(seed)
    layer = LAYERS[name]()
    for parameter_name, parameter in layer.named_parameters():
        torch.nn.init.uniform_(parameter, -size, size)
        # Then zero is where planar and Sylvester maps squeeze most, and where a radial one begins.
        if parameter_name in ("b", "centre") and seed % 2:
            torch.nn.init.zeros_(parameter)
    return layer


def inputs(layer: Bijection) -> Tensor:
    """Ordinary rows, zero, and rows far out."""
    assert layer.event_shape is not None
    (dim,) = layer.event_shape
    far = torch.where(torch.rand(3, dim) < 0.5, 50.0, torch.randn(3, dim))
    return torch.cat([torch.randn(16, dim), torch.zeros(1, dim), far, -far])


def assert_finite(function: Callable[[Tensor], tuple[Tensor, Tensor]], layer: Bijection) -> Tensor:
    """At the inputs, and at what `function` makes of them; returns the outputs."""
    x = inputs(layer).requires_grad_()
    out, log_det = function(x)
    wanted = [x, *layer.parameters()]
    gradients = torch.autograd.grad((out.sum(1) + log_det).sum(), wanted)
    for what, tensor in {"output": out, "log-det": log_det}.items():
        assert torch.isfinite(tensor).all(), what
    for gradient in gradients:
        assert torch.isfinite(gradient).all(), "gradient"
    return out.detach()


@every_layer
@pytest.mark.parametrize("size", [10.0, 100.0])
def test_everything_is_finite_whatever_the_parameters(name: str, size: float) -> None:
    for seed in range(20):
        layer = at_the_bound(name, seed, size)
        z = assert_finite(layer, layer)
        assert_finite(layer.inverse, layer)
        # What the inverse finds is mapped to z again, as well as the steepest part allows.
        x, log_det = layer.inverse(z)
        assert torch.isfinite(x).all()
        assert torch.isfinite(log_det).all()


@every_layer
def test_a_row_that_is_no_number_leaves_the_others_alone(name: str) -> None:
    layer = at_the_bound(name, 0, 3.0)
    rows = inputs(layer)[:5]
    spoiled = rows.clone()
    spoiled[2] = torch.nan
    others = [0, 1, 3, 4]
    for function in (layer.forward, layer.inverse):
        out, log_det = function(rows)
        found, found_log_det = function(spoiled)
        torch.testing.assert_close(found[others], out[others])
        torch.testing.assert_close(found_log_det[others], log_det[others])
        assert found[2].isnan().all()
