"""Reversible memory: the gradients of the plain backward pass, without its activations."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from layers import LAYERS
from torch import Tensor, nn

from benchmarks.memory import peak_bytes
from nflib import checks, models, reversible
from nflib.core import Bijection, Compose, Flow, Inverse, StandardNormal
from nflib.coupling import Coupling, halves
from nflib.dequantization import UniformDequantization
from nflib.elementwise import Affine, LogisticMixtureCDF
from nflib.nets import MLP
from nflib.normalization import ActNorm, BatchNorm
from nflib.planar import Planar
from nflib.precision import WIDE
from nflib.reversible import Reversible
from nflib.train import fit

EXACT = [name for name, case in LAYERS.items() if not reversible.obstacle(case.make())]


def gradients(f: Compose, direction: str, x: Tensor, context: Tensor | None) -> list[Tensor | None]:
    """Of a function of both outputs, for the input, the context and every parameter."""
    x = x.clone().requires_grad_()
    context = None if context is None else context.clone().requires_grad_()
    f.zero_grad()
    y, log_det = getattr(f, direction)(x, context)
    weights = torch.arange(1.0, 1 + len(log_det), dtype=y.dtype)
    (y.sin().sum() + (weights * log_det).sum()).backward()
    found = [x.grad, None if context is None else context.grad]
    return found + [parameter.grad for parameter in f.parameters()]


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", EXACT)
def test_rebuilt_gradients_are_the_plain_ones(name: str, direction: str) -> None:
    case = LAYERS[name]
    # Copies, for the cases share their masks.
    layers: list[Bijection] = [copy.deepcopy(case.make()).double() for _ in range(3)]
    if case.draw is not torch.randn or layers[0].output_shape(case.event) != case.event:
        layers = layers[:1]
    for layer in layers:
        checks.randomize_parameters(layer)
    x, context = case.inputs()
    x, context = x.double(), None if context is None else context.double()
    if direction == "inverse":
        x = Compose(*layers)(x, context)[0].detach()
    plain, rebuilt = Compose(*layers), Reversible(*layers)
    expected = gradients(plain, direction, x, context)
    for want, got in zip(expected, gradients(rebuilt, direction, x, context), strict=True):
        assert (want is None) == (got is None)
        if want is not None and got is not None:
            torch.testing.assert_close(
                got, want, rtol=1e-10, atol=1e-10 * (1 + want.abs().max().item())
            )


def test_most_layers_are_reversible() -> None:
    assert len(EXACT) > 50


def deep(depth: int, memory: str, dim: int = 8, hidden: tuple[int, ...] = (32,)) -> Flow:
    torch.manual_seed(0)
    net = partial(MLP, hidden=hidden, context_dim=None)
    steps: list[Bijection] = []
    for k in range(depth):
        steps += [ActNorm(dim), Coupling(halves(dim, k % 2 == 1), Affine(), net)]
    kind = Reversible if memory == "reversible" else Compose
    flow = Flow(kind(*steps), StandardNormal(dim))
    checks.randomize_parameters(flow, scale=0.5)
    return flow


def test_memory_does_not_grow_with_depth() -> None:
    x = torch.randn(256, 8)
    few, many = (peak_bytes(deep(depth, "reversible"), x) for depth in (4, 32))
    assert many <= 1.1 * few
    assert peak_bytes(deep(32, "plain"), x) > 4 * peak_bytes(deep(4, "plain"), x)


def test_inner_compositions_and_inverses_are_taken_apart() -> None:
    parts = list(deep(4, "plain").bijection)  # type: ignore[call-overload]
    nested = Compose(Compose(*parts[:3]), Inverse(parts[3]), Compose(Compose(parts[4])))
    whole = Reversible(*nested)
    x = torch.randn(4, 8)
    expected, got = (gradients(f, "forward", x, None) for f in (nested, whole))
    for want, found in zip(expected, got, strict=True):
        if want is not None and found is not None:
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_a_layer_used_twice_gets_both_gradients() -> None:
    first, second = ActNorm(3).double(), Coupling(halves(3), Affine(), MLP).double()
    checks.randomize_parameters(first)
    checks.randomize_parameters(second)
    layers, x = (first, second, first, second), torch.randn(5, 3).double()
    expected = gradients(Compose(*layers), "forward", x, None)
    got = gradients(Reversible(*layers), "forward", x, None)
    for want, found in zip(expected, got, strict=True):
        torch.testing.assert_close(found, want)


def test_under_autocast_the_networks_see_what_they_saw() -> None:
    x = torch.randn(64, 8)
    found = []
    for memory in ("plain", "reversible"):
        flow = deep(4, memory, hidden=(WIDE, WIDE))
        with torch.autocast("cpu", torch.bfloat16):
            loss = -flow(x).mean()
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in flow.parameters()]))
    exact = deep(4, "plain", hidden=(WIDE, WIDE))
    (-exact(x).mean()).backward()
    full = torch.cat([p.grad.flatten() for p in exact.parameters()])
    gap = (found[0] - found[1]).norm() / found[0].norm()
    assert gap < 1e-4 < (found[0] - full).norm() / full.norm()


def test_compiled_without_a_break() -> None:
    flow, x = deep(2, "reversible"), torch.randn(16, 8)
    torch._dynamo.reset()
    whole = hasattr(torch._dynamo.config, "trace_autograd_ops")
    before = dict(torch._dynamo.config.get_config_copy())
    with reversible.compiled_whole():
        (-torch.compile(flow, fullgraph=whole)(x).mean()).backward()
    assert torch._dynamo.config.get_config_copy() == before
    found = [p.grad.clone() for p in flow.parameters()]
    flow.zero_grad()
    (-flow(x).mean()).backward()
    for got, parameter in zip(found, flow.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-5)


def test_turned_on_in_a_model_of_several_scales_with_dequantization_and_context() -> None:
    x, context = torch.randint(0, 17, (8, 1, 8, 8)), torch.randn(8, 3).double()
    found = []
    for prepare in (nn.Identity(), reversible.turn_on):
        torch.manual_seed(0)
        model = models.glow((1, 8, 8), 2, 2, 8, context_dim=3, grey_levels=17).double()
        checks.randomize_parameters(model, scale=0.5)
        prepare(model)
        torch.manual_seed(1)
        (-model(x.double(), context).mean()).backward()
        found.append([p.grad for p in model.parameters()])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    inner = [m for m in model.modules() if isinstance(m, Compose) and m is not model.bijection]
    assert inner
    assert all(isinstance(m, Reversible) for m in inner)


def test_dequantization_at_the_start_runs_as_ever() -> None:
    flow = models.realnvp(4, 2, (8,), grey_levels=5)
    x = torch.randint(0, 5, (6, 4)).float()
    torch.manual_seed(0)
    plain = flow(x)
    reversible.turn_on(flow)
    torch.manual_seed(0)
    torch.testing.assert_close(flow(x), plain)
    assert flow(x).requires_grad


def test_a_run_of_fit_is_the_same() -> None:
    x = torch.randn(200, 8)
    runs = []
    for memory in ("plain", "reversible"):
        flow = deep(4, memory)
        fit(flow, x, steps=20, batch_size=50, progress=False)
        runs.append(torch.cat([p.detach().flatten() for p in flow.parameters()]))
    torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: BatchNorm(4), "BatchNorm has no inverse that is exact"),
        (lambda: Planar(4), "Planar has no inverse that is exact"),
        (lambda: Coupling(halves(4), LogisticMixtureCDF(3), MLP), "Coupling has no inverse"),
        (lambda: Coupling(halves(4), Affine(), partial(MLP, dropout=0.1)), "dropout draws another"),
    ],
)
def test_what_cannot_be_undone_is_refused(make: partial[Bijection], reason: str) -> None:
    with pytest.raises(reversible.NotReversibleError, match=reason):
        Reversible(ActNorm(4), make())


def test_refusals_of_other_input() -> None:
    with pytest.raises(reversible.NotReversibleError, match="UniformDequantization"):
        Reversible(ActNorm(2), UniformDequantization(4))
    with pytest.raises(reversible.NotReversibleError, match="a Compose in it, got Linear"):
        reversible.turn_on(nn.Linear(2, 2))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_neither_direction_keeps_more_for_more_layers(direction: str) -> None:
    def kept(depth: int, memory: str) -> int:
        tensors: list[Tensor] = []
        layers = deep(depth, memory).bijection
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: tensors.append(t) or t, lambda t: t
        ):
            getattr(layers, direction)(torch.randn(3, 8))
        return len(tensors)

    assert kept(2, "reversible") == kept(6, "reversible") < kept(2, "plain") < kept(6, "plain")


def test_a_composition_inside_is_rebuilt_layer_by_layer() -> None:
    def nested(depth: int) -> Flow:
        return Flow(Reversible(Compose(*deep(depth, "plain").bijection)), StandardNormal(8))

    x = torch.randn(256, 8)
    assert peak_bytes(nested(32), x) <= 1.1 * peak_bytes(nested(4), x)
