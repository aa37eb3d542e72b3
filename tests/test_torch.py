"""Flows are ordinary torch objects: pickled, copied, exported, mapped over, assigned to."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nflib import models, reversible
from nflib.checks import randomize_parameters
from nflib.core import Flow, StandardNormal
from nflib.elementwise import RationalQuadraticSpline

IMAGE = (1, 4, 4)
FLOWS: dict[str, tuple[Callable[..., Flow], tuple[int, ...]]] = {
    "nice": (lambda **o: models.nice(4, 2, 8, **o), (4,)),
    "realnvp": (lambda **o: models.realnvp(4, 2, 8, **o), (4,)),
    "realnvp, batchnorm": (
        lambda **o: models.realnvp(4, 2, 8, normalization="batchnorm", **o),
        (4,),
    ),
    "spline_flow": (lambda **o: models.spline_flow(4, 2, 4, 8, **o), (4,)),
    "naf": (lambda **o: models.naf(4, 2, 3, 8, **o), (4,)),
    "maf": (lambda **o: models.maf(4, 2, 8, **o), (4,)),
    "maf of splines": (
        lambda **o: models.maf(4, 2, 8, elementwise=RationalQuadraticSpline(4), **o),
        (4,),
    ),
    "iaf": (lambda **o: models.iaf(4, 2, 8, **o), (4,)),
    "realnvp of images": (lambda **o: models.realnvp(IMAGE, 2, 8, **o), IMAGE),
    "glow": (lambda **o: models.glow(IMAGE, 2, 1, 8, **o), IMAGE),
    "flowpp": (lambda **o: models.flowpp(IMAGE, 8, 1, components=2, **o), IMAGE),
    "mixerflow": (lambda **o: models.mixerflow(IMAGE, 2, 2, 8, **o), IMAGE),
}
every = pytest.mark.parametrize("name", FLOWS)


def shaken(name: str, **options: object) -> tuple[Flow, Tensor]:
    build, shape = FLOWS[name]
    flow = build(**options).eval()
    randomize_parameters(flow, scale=0.2)
    return flow, torch.randn(6, *shape)


@every
@torch.no_grad()
def test_pickled_saved_and_copied(name: str) -> None:
    flow, x = shaken(name)
    flow.log_prob(x), flow.sample(2)
    file = io.BytesIO()
    torch.save(flow, file)
    file.seek(0)
    others = [
        pickle.loads(pickle.dumps(flow)),
        copy.deepcopy(flow),
        torch.load(file, weights_only=False),
    ]
    for other in others:
        assert torch.equal(other.log_prob(x), flow.log_prob(x))
    # A copy moves alone.
    others[1].double()
    assert flow.log_prob(x).dtype == torch.float32
    assert others[1].log_prob(x.double()).dtype == torch.float64


@every
@torch.no_grad()
def test_loading_by_assignment_takes_the_states_dtype(name: str) -> None:
    flow, x = shaken(name)
    flow.log_prob(x)
    state = copy.deepcopy(flow).double().state_dict()
    flow.load_state_dict(state, assign=True)
    for buffer_owner in flow.modules():  # what no state holds follows by hand, as in any module
        for key, buffer in buffer_owner.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(buffer_owner, key, buffer.double())
    assert flow.log_prob(x.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="dtype torch.float64, got torch.float32"):
        flow.log_prob(x)


@every
@torch.no_grad()
def test_exported_with_a_batch_of_any_size(name: str) -> None:
    flow, x = shaken(name)
    rows = torch.export.Dim("rows", min=2, max=1024)
    program = torch.export.export(flow, (x,), dynamic_shapes=({0: rows},))
    for other in (x, torch.randn(11, *x.shape[1:])):
        torch.testing.assert_close(program.module()(other), flow(other), rtol=1e-4, atol=1e-4)


@every
@torch.no_grad()
def test_mapped_over_parameters_and_over_rows(name: str) -> None:
    flow, x = shaken(name)
    other = copy.deepcopy(flow)
    randomize_parameters(other, seed=1, scale=0.2)
    one, two = (dict(f.named_parameters()) for f in (flow, other))
    both = {key: torch.stack([one[key], two[key]]) for key in one}
    run = lambda p: torch.func.functional_call(flow, p, (x,))  # noqa: E731
    found = torch.func.vmap(run)(both)
    for got, member in zip(found, (flow, other), strict=True):
        torch.testing.assert_close(got, member(x), rtol=1e-4, atol=1e-4)
    alone = torch.func.vmap(lambda row: flow(row[None])[0])(x)
    torch.testing.assert_close(alone, flow(x), rtol=1e-4, atol=1e-4)


@every
def test_gradients_of_each_row(name: str) -> None:
    if "batchnorm" in name:
        pytest.skip("its rows see one another while it trains")
    flow, x = shaken(name)
    parameters = dict(flow.named_parameters())

    def loss(p: dict[str, Tensor], row: Tensor) -> Tensor:
        return -torch.func.functional_call(flow, p, (row[None],))[0]

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    (-flow(x).sum()).backward()
    for key, parameter in parameters.items():
        torch.testing.assert_close(each[key].sum(0), parameter.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["realnvp", "glow", "mixerflow"])
def test_reversible_flows_are_pickled_and_copied(name: str) -> None:
    flow, x = shaken(name)
    before = flow.log_prob(x)
    keys = list(flow.state_dict())
    reversible.turn_on(flow)
    assert list(flow.state_dict()) == keys
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        randomize_parameters(other, seed=2)
        assert torch.equal(flow.log_prob(x), before)
        other.log_prob(x).sum().backward()
        assert all(p.grad is not None for p in other.parameters())
        assert all(p.grad is None for p in flow.parameters())


class Learned(nn.Module):
    """A base of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(4))

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return StandardNormal(4).to(z).log_prob(z - self.mean)

    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        return torch.randn(n, 4).to(self.mean) + self.mean


def test_a_base_of_ones_own_moves_and_is_saved() -> None:
    flow = Flow(models.realnvp(4, 2, 8).bijection, Learned()).double()
    assert "base.mean" in flow.state_dict()
    assert flow.sample(3).dtype == torch.float64
    assert not flow.sample(3).requires_grad
    with pytest.raises(ValueError, match=r"^Flow.rsample expects a base with rsample, got Learned"):
        flow.rsample(3)
    with pytest.raises(ValueError, match="expects a base that takes temperature, got Learned"):
        flow.sample(3, temperature=0.5)
