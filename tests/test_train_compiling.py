"""Layers that are compiled one kind at a time: few graphs, the same numbers, no traces left.

torch traces here without its last stages, which write and compile C++ for minutes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from nflib import checks, models, reversible
from nflib.convolution import Invertible1x1Conv
from nflib.core import Compose, Flow, StandardNormal
from nflib.linear import LU
from nflib.mixer import AlongChannels, AlongPatches
from nflib.multiscale import Squeeze
from nflib.normalization import ActNorm
from nflib.pixel import PixelCNN
from nflib.train import compiling, fit
from nflib.train.compiling import compiled, regions
from nflib.wavenet import WaveNet

IMAGES = torch.rand(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
POINTS = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
# Models of any depth, with what they take.
DEEP: dict[str, tuple[Callable[[int], Flow], Tensor]] = {
    "mixerflow": (lambda depth: models.mixerflow((1, 8, 8), 2, depth, 8), IMAGES),
    "mixerflow, maf": (
        lambda depth: models.mixerflow((1, 8, 8), 2, depth, 16, flow="maf"),
        IMAGES,
    ),
    "glow": (lambda depth: models.glow((1, 8, 8), 2, depth, 8), IMAGES),
    "spline flow": (lambda depth: models.spline_flow(6, depth, 8), POINTS),
    "maf": (lambda depth: models.maf(6, depth, 8), POINTS),
}


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Whatever is compiled is traced and then runs as it is; the list tells what it was."""
    seen: list[Any] = []
    real = partial(torch.compile, backend="eager")

    def trace(function: Any) -> Any:
        seen.append(function)
        return real(function)

    monkeypatch.setattr(torch, "compile", trace)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch.compiler.reset()
    counters.clear()
    strict = {"disable": False, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(strict):
        yield seen
    torch.compiler.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def settled(make: Callable[[int], Flow], depth: int, x: Tensor) -> Flow:
    flow = make(depth).double()
    flow.initialize(x)
    checks.randomize_parameters(flow)
    return flow


def gradients(model: nn.Module, call: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
    log_prob = call(x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(log_prob.mean(), parameters, allow_unused=True)
    return [log_prob, *(g for g in found if g is not None)]


def implementations(model: nn.Module) -> list[Any]:
    return [module._compiled_call_impl for module in model.modules()]


@pytest.mark.parametrize("name", DEEP)
def test_a_deeper_model_has_no_more_graphs_and_the_numbers_of_eager_torch(name: str) -> None:
    make, x = DEEP[name]
    counts = []
    for depth in (3, 6):
        torch.compiler.reset()
        counters.clear()
        flow = settled(make, depth, x)
        expected = gradients(flow, flow, x)
        with compiled(flow) as wrap:
            found = gradients(flow, wrap(flow), x)
        counts.append(graphs())
        assert len(found) == len(expected)
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert 0 < counts[0] == counts[1] < len(regions(flow))
    assert not counters["graph_break"]


@pytest.mark.parametrize("fails", [False, True])
def test_after_the_block_layers_are_as_they_were(fails: bool, traced: list[Any]) -> None:
    flow = models.spline_flow(6, 2, 8)
    by_hand = regions(flow)[0]
    by_hand.compile()
    before = implementations(flow)
    del traced[:]

    def inside() -> None:
        with compiled(flow):
            assert len(traced) == len(regions(flow)) == sum(map(bool, implementations(flow)))
            assert implementations(flow) != before
            if fails:
                raise KeyError

    with pytest.raises(KeyError) if fails else torch.no_grad():
        inside()
    after = implementations(flow)
    assert all(a is b for a, b in zip(after, before, strict=True))
    assert by_hand._compiled_call_impl is not None


def test_nothing_is_compiled_unless_it_is_asked_for(traced: list[Any]) -> None:
    flow = models.realnvp(6, 2, 8)
    with compiled(flow, is_on=False) as wrap:
        assert wrap(flow) is flow
        flow(POINTS.float())
        assert not any(implementations(flow))
    assert traced == []
    assert graphs() == 0


def test_layers_are_compiled_and_not_what_is_composed_of_them() -> None:
    glow = regions(models.glow((1, 8, 8), 2, 1, 8))
    assert {type(layer).__name__ for layer in glow} >= {"ActNorm", "Invertible1x1Conv", "Coupling"}
    mixer = regions(models.mixerflow((1, 8, 8), 2, 3, 8))
    assert {type(layer) for layer in mixer} == {AlongChannels, AlongPatches}
    layers = Compose(Squeeze(), ActNorm(4), Compose(Invertible1x1Conv(4), Squeeze()))
    # A Squeeze has nothing to learn, and its two lines gain nothing.
    assert [type(layer) for layer in regions(layers)] == [ActNorm, Invertible1x1Conv]


def test_a_reversible_model_is_compiled_whole(traced: list[Any]) -> None:
    flow = settled(lambda depth: models.realnvp(6, depth, 8), 4, POINTS)
    expected = gradients(flow, flow, POINTS)
    reversible.turn_on(flow)
    with compiled(flow) as wrap:
        whole = wrap(flow)
        assert traced == [flow]
        assert not any(implementations(flow))
        for got, want in zip(gradients(flow, whole, POINTS), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert graphs() >= 1
    if hasattr(torch._dynamo.config, "trace_autograd_ops"):
        assert not torch._dynamo.config.trace_autograd_ops
        assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (PixelCNN((1, 4, 4), 4, width=4, blocks=1), torch.randint(4, (3, 1, 4, 4)).float()),
        (WaveNet(4, 2, 2, layers=2), torch.randint(4, (2, 9)).float()),
    ],
    ids=["pixelcnn", "wavenet"],
)
def test_a_model_that_has_no_layers_is_compiled_whole(
    model: nn.Module, x: Tensor, traced: list[Any]
) -> None:
    assert regions(model) == []
    expected = model(x)
    with compiled(model) as wrap:
        torch.testing.assert_close(wrap(model)(x), expected)
    assert traced == [model]
    assert graphs() == 1


def test_a_model_of_many_kinds_stays_below_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is 8 without `KINDS`: then torch gives up in the middle of the model."""
    make = lambda: models.glow((3, 16, 16), 3, 2, 8, grey_levels=4)  # noqa: E731
    flow, x = make(), torch.randint(4, (2, 3, 16, 16)).float()
    with compiled(flow) as wrap:
        wrap(flow)(x).sum().backward()
    assert 8 < graphs() < compiling.KINDS
    torch.compiler.reset()
    monkeypatch.setattr(compiling, "KINDS", 8)
    with pytest.raises(Exception, match="limit"), compiled(flow) as wrap:
        wrap(flow)(x)


def fitted(compile: bool, valid: Tensor | None, **options: Any) -> tuple[Flow, list[float]]:
    torch.manual_seed(0)
    flow = models.spline_flow(6, 2, 8)
    settings = {"steps": 6, "batch_size": 8, "validate_every": 3, "progress": False} | options
    history = fit(flow, POINTS, valid, compile=compile, **settings)
    return flow, history.column("train") + history.column("valid")


def test_a_run_is_that_of_eager_torch_and_leaves_no_trace() -> None:
    flow, losses = fitted(True, POINTS[:30], ema=0.5)
    assert graphs() > 0
    assert not any(implementations(flow))
    assert losses == pytest.approx(fitted(False, POINTS[:30], ema=0.5)[1], rel=1e-4)
    copy.deepcopy(flow)


@pytest.mark.parametrize("ema", [None, 0.5])
def test_validation_is_eager(ema: float | None) -> None:
    """Its batches have other shapes, without gradients: each kind would be compiled once more."""
    fitted(True, None, ema=ema)
    alone = graphs()
    torch.compiler.reset()
    counters.clear()
    fitted(True, POINTS[:30], ema=ema)
    assert graphs() == alone > 0
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_flow_of_one_layer_is_compiled() -> None:
    flow = Flow(LU(6), StandardNormal(6))
    with compiled(flow) as wrap:
        assert wrap(flow) is flow
        flow(POINTS.float())
    assert graphs() == 1
