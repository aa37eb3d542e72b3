"""Matrices that are kept while their parameters are unchanged: never stale, never in the way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nflib import checkpoints
from nflib.cache import while_unchanged
from nflib.convolution import Invertible1x1Conv
from nflib.linear import LU, Triangular


class Twice(nn.Module):
    """Counts how often its matrix is made."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(2))
        self.calls = 0

    @while_unchanged
    def weight(self) -> torch.Tensor:
        self.calls += 1
        return 2 * self.matrix


@torch.no_grad()
def test_it_is_made_once_and_again_after_every_change() -> None:
    layer = Twice().eval()
    assert layer.weight() is layer.weight()
    assert layer.calls == 1
    layer.matrix.mul_(3)
    assert layer.weight()[0, 0] == 6
    layer.load_state_dict({"matrix": torch.full((2, 2), 5.0)})
    assert layer.weight()[0, 0] == 10
    layer.double()
    assert layer.weight().dtype == torch.float64
    layer.matrix = nn.Parameter(torch.zeros(2, 2))
    assert layer.weight()[0, 0] == 0
    assert layer.calls == 5


def test_an_optimizers_step_is_a_change() -> None:
    for fused in (False, True):
        layer = Twice().eval()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
        with torch.no_grad():
            before = layer.weight().clone()
        layer.weight().sum().backward()
        optimizer.step()
        with torch.no_grad():
            assert not torch.equal(layer.weight(), before)
            assert torch.equal(layer.weight(), 2 * layer.matrix)


def test_with_gradients_it_is_always_made() -> None:
    layer = Twice().eval()
    with torch.no_grad():
        layer.weight()
    layer.weight().sum().backward()
    assert torch.equal(layer.matrix.grad, torch.full((2, 2), 2.0))


@torch.no_grad()
def test_while_training_nothing_is_kept() -> None:
    layer = Twice()
    layer.weight()
    layer.weight()
    assert layer.calls == 2


@torch.no_grad()
def test_a_copy_has_a_matrix_of_its_own() -> None:
    layer = Twice().eval()
    layer.weight()
    other = copy.deepcopy(layer)
    layer.matrix.zero_()
    assert other.weight()[0, 0] == 2
    other.matrix.mul_(2)
    assert other.weight()[0, 0] == 4
    assert "_kept_weight" not in other.state_dict()


@torch.no_grad()
def test_functional_calls_see_their_own_parameters() -> None:
    layer = LU(3).eval()
    kept = layer.weight()
    swapped = {"packed": layer.packed + 1, "bias": layer.bias}
    x = torch.randn(2, 3)
    z, _ = torch.func.functional_call(layer, swapped, (x,))
    assert not torch.allclose(z, x @ kept.T)
    many = torch.stack([layer.packed, layer.packed + 1])
    call = lambda packed: torch.func.functional_call(layer, {"packed": packed}, (x,))[0]  # noqa: E731
    one, two = torch.func.vmap(call)(many)
    torch.testing.assert_close(one, x @ kept.T)
    torch.testing.assert_close(two, z)


@pytest.mark.parametrize(
    "make", [lambda: LU(4), lambda: Triangular(4), lambda: Invertible1x1Conv(4)]
)
def test_layers_are_right_after_a_step_between_two_evaluations(make: type[LU], tmp_path) -> None:
    layer = make().eval()
    x = torch.randn(3, 4) if not isinstance(layer, Invertible1x1Conv) else torch.randn(3, 4, 2, 2)
    for _ in range(3):
        with torch.no_grad():
            z, log_det = layer(x)
            back, minus = layer.inverse(z)
            torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(log_det, -minus)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
        (layer(x)[0].square().mean()).backward()
        optimizer.step()
    checkpoints.save(layer, tmp_path / "layer.safetensors")
    other = make().eval()
    with torch.no_grad():
        other(x)
        checkpoints.load(other, tmp_path / "layer.safetensors")
        torch.testing.assert_close(other(x)[0], layer(x)[0])
