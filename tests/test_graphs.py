"""Functions that are recorded and replayed: on tape here, as CUDA graphs on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from nflib import checks, models
from nflib.autoregressive import MaskedAutoregressive
from nflib.cache import cached, fresh
from nflib.core import Flow
from nflib.elementwise import Affine
from nflib.graphs import WARM_UP, HostReads, Replayed, captured
from nflib.precision import WIDE
from nflib.prepared import Prepared

CPU = torch.device("cpu")


class Walk:
    """A random walk of numbers, which all stand in tensors."""

    def __init__(self) -> None:
        self.x = torch.zeros(3)
        self.python_calls = 0

    def step(self, push: Tensor) -> Tensor:
        self.python_calls += 1
        noise = torch.randn(3)
        self.x.add_(noise).add_(push)
        self.x[:1] *= 2
        return self.x.cos() + noise


def test_replays_go_on_as_calls_would(recorded: list[object]) -> None:
    walk, plain = Walk(), Walk()
    step = Replayed(walk.step, CPU)
    results = []
    torch.manual_seed(0)
    for k in range(8):
        results.append(step(torch.full((3,), float(k))).clone())
    torch.manual_seed(0)
    expected = [plain.step(torch.full((3,), float(k))) for k in range(8)]
    assert torch.equal(torch.stack(results), torch.stack(expected))
    assert torch.equal(walk.x, plain.x)
    assert walk.python_calls == WARM_UP + 1
    assert len(recorded) == 1
    assert step.obstacle is None


def test_a_number_of_python_is_baked_in(recorded: list[object]) -> None:
    """The tape is as strict as a graph: else the test above would show nothing."""
    numbers = iter(range(100))
    total = torch.zeros(())
    step = Replayed(lambda: total.add_(next(numbers)), CPU)
    for _ in range(WARM_UP + 4):
        step()
    assert total.item() == sum(range(WARM_UP)) + 4 * WARM_UP


def test_training_through_a_recording_equals_the_plain_loop(recorded: list[object]) -> None:
    def losses(replayed: bool) -> Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.01), fused=True)

        def step(x: Tensor) -> Tensor:
            loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        run = Replayed(step, CPU) if replayed else step
        return torch.stack([run(torch.randn(16, 4)).clone() for _ in range(20)])

    assert torch.equal(losses(replayed=True), losses(replayed=False))
    assert len(recorded) == 1


def test_other_shapes_run_as_they_are(recorded: list[object]) -> None:
    double = Replayed(lambda x: 2 * x, CPU)
    for k in range(WARM_UP + 2):
        assert double(torch.full((2,), float(k))).tolist() == [2.0 * k] * 2
    assert double(torch.ones(5)).tolist() == [2.0] * 5
    assert double(torch.ones(2)).tolist() == [2.0] * 2


@pytest.mark.parametrize(
    ("name", "function", "words"),
    [
        ("item", lambda x: x * x.sum().item(), "a number read from a tensor in"),
        ("branch", lambda x: x if x.sum() > 0 else -x, "a number read from a tensor in"),
        ("mask", lambda x: x[x > 0], "indexing by a mask in"),
        ("nonzero", lambda x: x.nonzero(), "nonzero in"),
        ("equal", lambda x: torch.equal(x, x.clone()), "equal in"),
        ("in place", lambda x: x.clone().masked_fill_(x > 0, 0)[x > 0].zero_(), "indexing by"),
    ],
)
def test_what_reads_a_value_is_not_recorded_and_says_where(
    recorded: list[object], name: str, function: object, words: str
) -> None:
    run = Replayed(function, CPU)  # type: ignore[arg-type]
    for _ in range(WARM_UP + 2):
        run(torch.ones(3))
    assert recorded == []
    assert run.obstacle is not None
    assert words in run.obstacle
    assert "test_graphs.py line" in run.obstacle


def test_what_reads_no_value_has_no_reads() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    with HostReads() as reads:
        y = torch.where(x > 0, x, 0).index_select(0, torch.tensor([0, 2])).sum()
        y.backward()
    assert reads.found == []


def test_a_recording_that_fails_is_given_up_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(function: object) -> None:
        raise RuntimeError("CUDA error: operation not permitted\nand more")

    monkeypatch.setattr("nflib.graphs.recorder_for", lambda device: fail)
    run = Replayed(lambda x: 2 * x, CPU)
    for _ in range(WARM_UP + 2):
        assert run(torch.ones(1)).item() == 2
    assert run.obstacle == "it cannot be recorded (CUDA error: operation not permitted)"


def test_without_graphs_the_function_is_called() -> None:
    walk = Walk()
    for _ in range(2):
        assert Replayed(walk.step, CPU)(torch.zeros(3)).shape == (3,)
    assert walk.python_calls == 2


def sampled(flow: Flow, sizes: list[int]) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return [flow.sample(n) for n in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_maf_samples_the_same_within_captured(recorded: list[object], dtype: torch.dtype) -> None:
    flow = models.maf(5, 2, 16).to(dtype)
    checks.randomize_parameters(flow)
    sizes = [4, 4, 4, 3, 4, 3, 3]
    expected = sampled(flow, sizes)
    assert recorded == []
    with captured(flow):
        found = sampled(flow, sizes)
    assert len(recorded) == 2 * 2  # of each layer, for each batch size
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


def test_parameters_that_change_are_seen_and_nothing_kept_is_used(recorded: list[object]) -> None:
    flow = models.maf(5, 2, 16)
    with captured(flow), cached(flow):
        for scale in (0.1, 0.2, 0.3, 0.4):
            with torch.no_grad():
                for p in flow.parameters():
                    p.copy_(scale * torch.randn_like(p))
            got = sampled(flow, [4])[0]
            with fresh():
                torch.testing.assert_close(got, sampled(copy.deepcopy(flow), [4])[0])
    assert len(recorded) == 2


def test_with_gradients_and_outside_of_the_block_nothing_is_recorded(
    recorded: list[object],
) -> None:
    flow, z = models.maf(5, 1, 16), torch.randn(4, 5, requires_grad=True)
    with captured(flow):
        for _ in range(4):
            flow.decode(z).sum().backward()
    sampled(flow, [4] * 4)
    assert z.grad is not None
    assert recorded == []


def test_a_context_of_an_inverse_is_read_anew(recorded: list[object]) -> None:
    layer = MaskedAutoregressive(5, Affine(), 16, context_dim=2)
    checks.randomize_parameters(layer)
    z = torch.randn(4, 5)
    with captured(layer), torch.no_grad():
        for _ in range(4):
            context = torch.randn(4, 2)
            got = layer.inverse(z, context)
            with fresh():
                want = copy.deepcopy(layer).inverse(z, context)
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])
    assert len(recorded) == 1


def test_the_walk_through_a_maf_reads_no_value() -> None:
    flow = models.maf(5, 2, 16)
    with HostReads() as reads:
        sampled(flow, [4])
    assert reads.found == []


def test_what_a_caller_hands_over_and_gets_stays_as_it_is(recorded: list[object]) -> None:
    """Inputs are read and not held; what `replayed` returns is no place that is written to."""
    layer = MaskedAutoregressive(5, Affine(), 16)
    checks.randomize_parameters(layer)
    inputs = [torch.randn(4, 5) for _ in range(5)]
    copies = [z.clone() for z in inputs]
    with torch.no_grad():
        expected = [layer.inverse(z) for z in inputs]
        with captured(layer):
            found = [layer.inverse(z) for z in inputs]
    double = Replayed(lambda x: 2 * x, CPU)
    for z in inputs:
        double(z)
    assert all(map(torch.equal, inputs, copies))
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    assert len(recorded) == 2


def test_another_dtype_runs_as_it_is(recorded: list[object]) -> None:
    third = Replayed(lambda x: x / 3, CPU)
    for _ in range(WARM_UP + 2):
        third(torch.ones(2))
    double = third(torch.ones(2, dtype=torch.float64))
    assert double.dtype == torch.float64
    assert double.tolist() == [1 / 3] * 2


def test_it_can_be_turned_off(recorded: list[object]) -> None:
    double = Replayed(lambda x: 2 * x, CPU, enabled=False)
    for _ in range(WARM_UP + 2):
        assert double(torch.ones(1)).item() == 2
    assert recorded == []
    assert double.obstacle is None


def test_a_recording_that_fails_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fail(function: object) -> None:
        tried.append(function)
        raise RuntimeError("out of memory")

    monkeypatch.setattr("nflib.graphs.recorder_for", lambda device: fail)
    run = Replayed(lambda x: 2 * x, CPU)
    for _ in range(WARM_UP + 4):
        run(torch.ones(1))
    assert len(tried) == 1


def test_only_the_captured_models_layers_are_replayed(recorded: list[object]) -> None:
    flow, other = models.maf(5, 1, 16), models.maf(5, 1, 16)
    with captured(flow):
        sampled(other, [4] * 3)
        assert recorded == []
        sampled(flow, [4] * 3)
    assert len(recorded) == 1


def test_indexing_by_numbers_reads_nothing_and_a_copy_to_the_cpu_does() -> None:
    x = torch.randn(4, 3)
    with HostReads() as reads:
        x[torch.tensor([2, 0])] = x[torch.tensor([0, 1])]
        x.to(torch.float64), x.cpu(), x.to("cpu", torch.float64)
    assert reads.found == []
    # A device without numbers stands for a GPU: torch refuses the copy, but it was asked for it.
    far = torch.ones(2, device="meta")
    for copy_it in (far.cpu, lambda: torch.ones(2).copy_(far)):
        with HostReads() as reads, pytest.raises(NotImplementedError):
            copy_it()
        assert [line.split(" in ")[0] for line in reads.found] == ["a copy to the CPU"]


def test_a_recording_serves_its_own_mode_and_precision(recorded: list[object]) -> None:
    """Dropout, and matrix products that autocast makes narrow, are other operations."""
    layer = MaskedAutoregressive(5, Affine(), (WIDE, WIDE), dropout=0.5)
    checks.randomize_parameters(layer)
    z = torch.randn(4, 5)
    with torch.no_grad():
        exact = copy.deepcopy(layer).eval().inverse(z)[0]
        with captured(layer):
            for _ in range(3):
                layer.train().inverse(z)
                layer.eval()
                with torch.autocast("cpu", torch.bfloat16):
                    narrow = layer.inverse(z)[0]
                got = layer.inverse(z)[0]
    assert torch.equal(got, exact)
    assert not torch.equal(narrow, exact)
    assert len(recorded) == 3


def test_a_block_in_a_block_goes_on_with_both(recorded: list[object]) -> None:
    outer, inner = models.maf(5, 1, 16), models.maf(5, 1, 16)
    with captured(outer):
        sampled(outer, [4, 4])
        with captured(inner):
            sampled(inner, [4, 4])
            sampled(outer, [4])
            sampled(outer, [3, 3])
        sampled(outer, [4])
    assert len(recorded) == 3


def test_what_was_prepared_is_not_recorded(recorded: list[object]) -> None:
    flow = models.maf(5, 2, 16)
    prepared = Prepared(flow)
    with captured(flow):
        for _ in range(4):
            checks.randomize_parameters(flow)
            with prepared():
                got = sampled(flow, [4])[0]
            assert torch.equal(got, sampled(copy.deepcopy(flow), [4])[0])


def test_an_error_without_words_is_named_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: object) -> None:
        raise RuntimeError

    monkeypatch.setattr("nflib.graphs.recorder_for", lambda device: fail)
    run = Replayed(torch.sin, CPU)
    for _ in range(WARM_UP + 1):
        run(torch.ones(1))
    assert run.obstacle == "it cannot be recorded (RuntimeError)"
