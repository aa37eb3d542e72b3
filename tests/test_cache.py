"""Matrices that are kept while a block runs: never stale, never in the way."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from nflib import models
from nflib.cache import cached, fresh, kept, made_ready, ready
from nflib.checks import randomize_parameters
from nflib.convolution import Invertible1x1Conv
from nflib.core import Layer
from nflib.linear import LU, Triangular
from nflib.metrics import evaluate


class Twice(nn.Module):
    """Counts how often its matrix is made."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(2))
        self.calls = 0

    @kept
    def weight(self) -> torch.Tensor:
        self.calls += 1
        return 2 * self.matrix


@torch.no_grad()
def test_it_is_made_once_inside_of_a_block_and_always_outside() -> None:
    layer = Twice()
    layer.weight(), layer.weight()
    assert layer.calls == 2
    with cached(layer):
        assert layer.weight() is layer.weight()
        assert layer.calls == 3
    layer.weight()
    assert layer.calls == 4


@torch.no_grad()
def test_a_block_inside_of_a_block_goes_on_with_what_is_there() -> None:
    layer, other = Twice(), Twice()
    with cached(layer):
        layer.weight()
        with cached(nn.Sequential(layer, other)):
            layer.weight(), other.weight(), other.weight()
        other.weight()
        layer.weight()
    assert layer.calls == 1
    assert other.calls == 2


@torch.no_grad()
def test_only_the_models_own_modules_are_kept() -> None:
    inside, outside = Twice(), Twice()
    with cached(inside):
        outside.weight(), outside.weight()
    assert outside.calls == 2


def test_with_gradients_it_is_always_made_and_has_a_graph() -> None:
    layer = Twice()
    with cached(layer):
        with torch.no_grad():
            layer.weight()
        layer.weight().sum().backward()
    assert torch.equal(layer.matrix.grad, torch.full((2, 2), 2.0))


@torch.no_grad()
def test_nothing_survives_an_error_or_shows_in_another_thread() -> None:
    layer = Twice()

    def fail() -> None:
        with cached(layer):
            layer.weight()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    layer.weight()
    assert layer.calls == 2
    with cached(layer):
        layer.weight()
        thread = threading.Thread(target=lambda: [layer.weight(), layer.weight()])
        thread.start()
        thread.join()
    assert layer.calls == 5


@torch.no_grad()
def test_a_copy_has_nothing_and_the_state_knows_nothing() -> None:
    layer = Twice()
    with cached(layer):
        layer.weight()
        other = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
        other.matrix.zero_()
        assert other.weight()[0, 0] == 0
    assert list(layer.state_dict()) == ["matrix"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["maf", "iaf", "spline_flow"])
def test_what_is_written_behind_torchs_back_is_seen(name: str) -> None:
    flow = getattr(models, name)(4, 2, 8).eval()
    randomize_parameters(flow)
    x = torch.randn(5, 4)
    flow.log_prob(x), flow.sample(3), evaluate(flow, x)
    other = copy.deepcopy(flow)
    randomize_parameters(other, seed=1)
    vector = nn.utils.parameters_to_vector(other.parameters())
    nn.utils.vector_to_parameters(vector, flow.parameters())  # through .data
    torch.testing.assert_close(flow.log_prob(x), other.log_prob(x))


@torch.no_grad()
def test_functional_calls_see_their_own_parameters() -> None:
    layer = LU(3)
    mine = layer.weight()
    other = copy.deepcopy(layer)
    other.packed.add_(1)
    moved, x = other.weight(), torch.randn(2, 3)
    with cached(layer):
        layer(x)
        many = torch.stack([layer.packed, layer.packed + 1])
        call = lambda packed: torch.func.functional_call(layer, {"packed": packed}, (x,))[0]  # noqa: E731
        one, two = torch.func.vmap(call)(many)
    torch.testing.assert_close(one, x @ mine.T)
    torch.testing.assert_close(two, x @ moved.T)


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [lambda: LU(4), lambda: Triangular(4), lambda: Invertible1x1Conv(4)]
)
def test_results_are_the_same_with_and_without(make: type[Layer]) -> None:
    layer = make()
    randomize_parameters(layer)
    x = torch.randn(3, 4, 2, 2) if isinstance(layer, Invertible1x1Conv) else torch.randn(3, 4)
    plain = [*layer(x), *layer.inverse(x)]
    with cached(layer):
        for _ in range(2):
            for one, other in zip(plain, [*layer(x), *layer.inverse(x)], strict=True):
                assert torch.equal(one, other)


def test_importing_nflib_hooks_no_optimizer() -> None:
    from torch.optim import optimizer

    assert not optimizer._global_optimizer_post_hooks
    assert not optimizer._global_optimizer_pre_hooks


@torch.no_grad()
def test_a_block_for_another_model_leaves_the_outer_ones_kept() -> None:
    outer, inner = Twice(), Twice()
    with cached(outer), cached(inner):
        outer.weight(), outer.weight(), inner.weight(), inner.weight()
    assert outer.calls == inner.calls == 1


@torch.no_grad()
def test_a_recording_makes_its_own_and_leaves_what_is_kept() -> None:
    layer = Twice()
    with cached(layer):
        mine = layer.weight()
        with fresh():
            assert layer.weight() is not mine
            layer.weight()
        assert layer.calls == 3
        assert layer.weight() is mine


def test_what_was_made_ready_is_found_by_its_module_and_by_no_compiler() -> None:
    layer, other = Twice(), Twice()
    made = 3 * layer.matrix
    with ready({layer: made}):
        assert layer.weight() is made  # with its graph
        assert made_ready() == {layer: made}
        other.weight()
        assert torch.func.vmap(lambda x: x * (made_ready() is None))(torch.ones(2)).all()
    assert (layer.calls, other.calls) == (0, 1)
    assert made_ready() is None
    layer.weight()
    assert layer.calls == 1


def test_an_error_ends_what_was_made_ready() -> None:
    layer = Twice()
    with pytest.raises(KeyError), ready({layer: layer.matrix}):
        raise KeyError
    assert made_ready() is None


@torch.no_grad()
def test_what_is_ready_goes_before_what_is_kept() -> None:
    layer = Twice()
    with cached(layer):
        layer.weight()
        with ready({layer: torch.zeros(2, 2)}):
            assert layer.weight().sum() == 0
        assert layer.weight()[0, 0] == 2
