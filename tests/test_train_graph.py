"""A training step as a CUDA graph, on tape: losses, weights and errors are the plain loop's."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tape import Tape
from torch import Tensor, nn

from nflib import checkpoints, data, models
from nflib.core import Flow
from nflib.graphs import WARM_UP, HostReads
from nflib.train import GraphWarning, NonFiniteError, fit
from nflib.train.step import Step

# Of each kind of model that a run can meet, with what it takes.
DIGITS = data.load("digits", "train", n=200).x
POINTS = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, tuple[Callable[[], Flow], Tensor]] = {
    "realnvp": (lambda: models.realnvp(6, 2, 16), POINTS),
    "spline flow": (lambda: models.spline_flow(6, 2, 16), POINTS),
    "maf": (lambda: models.maf(6, 2, 16), POINTS),
    "nice": (lambda: models.nice(6), POINTS),
    "glow": (lambda: models.glow((1, 8, 8), 2, 1, 8, grey_levels=17), DIGITS),
    "flowpp": (lambda: models.flowpp((1, 8, 8), 8, 1, grey_levels=17), DIGITS),
    "mixerflow": (lambda: models.mixerflow((1, 8, 8), 2, 2, 16, grey_levels=17), DIGITS),
    "batch norm": (
        lambda: models.mixerflow((1, 8, 8), 2, 1, 16, normalization="batchnorm", grey_levels=17),
        DIGITS,
    ),
}


def run(make: Callable[[], Any], x: Tensor, **options: Any) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(3)
    model = make()
    settings = {"steps": 23, "batch_size": 64, "lr": 1e-2, "warmup": 4, "ema": 0.9} | options
    history = fit(model, x, x[:50], validate_every=5, progress=False, **settings)
    return model, history.column("train") + history.column("valid")


def no_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nflib.graphs.recorder_for", lambda device: None)


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_weights_are_those_of_the_plain_loop(
    recorded: list[Tape], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    captured, losses = run(*MODELS[name])
    assert len(recorded) == 1
    no_recorder(monkeypatch)
    plain, expected = run(*MODELS[name])
    assert losses == expected
    for a, b in zip(captured.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_capture_can_be_turned_off(recorded: list[Tape]) -> None:
    run(*MODELS["maf"], capture=False)
    assert recorded == []


def test_a_recorded_run_resumes_as_if_nothing_had_stopped_it(
    recorded: list[Tape], tmp_path: Path
) -> None:
    whole, losses = run(*MODELS["maf"], checkpoint=tmp_path / "a.safetensors")

    class Stop(Exception):
        pass

    steps = 0

    def stops(model: Flow, x: Tensor) -> Tensor:
        nonlocal steps
        steps += model.training
        if steps == WARM_UP:
            raise Stop
        return -model(x).mean()

    path = tmp_path / "b.safetensors"
    options = {"checkpoint": path, "save_every": 0.0}
    with pytest.raises(Stop):
        run(*MODELS["maf"], loss=stops, **options)
    resumed, again = run(*MODELS["maf"], resume=True, **options)
    assert losses == again
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad_step", [2, 7, 13, 21])
def test_a_bad_step_changes_no_weight_and_is_named(
    recorded: list[Tape], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bad_step: int
) -> None:
    """A row that a batch meets once has no logarithm."""
    x = POINTS.abs() + 0.1
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    x[order[bad_step * 8 + 5]] = -1.0

    def loss(model: Flow, x: Tensor) -> Tensor:
        return -model(x.log()).mean()

    def spoilt() -> tuple[nn.Module, str]:
        torch.manual_seed(3)
        model = models.maf(6, 2, 16)
        with pytest.raises(NonFiniteError) as caught:
            fit(
                model, x, steps=25, batch_size=8, loss=loss, progress=False,
                checkpoint=tmp_path / "run.safetensors", save_every=0.0,
            )  # fmt: skip
        return model, str(caught.value)

    model, message = spoilt()
    no_recorder(monkeypatch)
    plain, expected = spoilt()
    assert message.split(" on ")[0] == f"The training stopped at step {bad_step}"
    assert f"row {order[bad_step * 8 + 5]} of data" in message
    assert message.split(":")[1:] == expected.split(":")[1:]
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda model, x: -model(x).mean() * float(x.abs().mean()), "a number read from a tensor"),
        (lambda model, x: -model(x[x[:, 0] > 0]).mean(), "indexing by a mask"),
    ],
)
def test_a_loss_that_reads_values_trains_without_a_graph_and_says_why(
    recorded: list[Tape], loss: Callable[..., Tensor], words: str
) -> None:
    with pytest.warns(GraphWarning, match=words) as caught:
        run(*MODELS["maf"], loss=loss)
    assert recorded == []
    assert len([w for w in caught if w.category is GraphWarning]) == 1
    assert "test_train_graph.py line" in str(caught[0].message)


def test_nothing_is_said_where_there_are_no_graphs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(*MODELS["maf"], loss=lambda model, x: -model(x).mean() * float(x.abs().mean()))


def test_batches_of_a_loader_are_replayed_and_the_short_one_is_not(
    recorded: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = torch.utils.data.DataLoader(POINTS, 64)  # 64, 64, 64, 8
    torch.manual_seed(3)
    model = models.maf(6, 2, 16)
    plain = copy.deepcopy(model)
    losses = fit(model, loader, steps=12, progress=False).column("train")
    assert len(recorded) == 1
    no_recorder(monkeypatch)
    assert losses == fit(plain, loader, steps=12, progress=False).column("train")


@pytest.mark.parametrize("name", MODELS)
def test_a_step_never_waits_for_the_device(recorded: list[Tape], name: str) -> None:
    make, x = MODELS[name]
    model = make()
    model.initialize(x)
    step = Step(model, lambda call, x: -call(x).mean(), ema=0.99)
    step(x[:64])
    with HostReads() as reads:
        step(x[:64])
    assert reads.found == []


@pytest.mark.parametrize("fails", [False, True])
def test_tf32_lasts_as_long_as_the_run(fails: bool) -> None:
    def settings() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    seen = []

    def loss(model: Flow, x: Tensor) -> Tensor:
        seen.append(settings())
        if fails:
            raise KeyError
        return -model(x).mean()

    torch.backends.cudnn.allow_tf32 = False
    try:
        before = settings()
        assert before == ("highest", False)
        for name in ("no", "tf32"):
            with pytest.raises(KeyError) if fails else warnings.catch_warnings():
                run(*MODELS["maf"], steps=1, warmup=0, loss=loss, mixed_precision=name)
            assert settings() == before
    finally:
        torch.backends.cudnn.allow_tf32 = True
    assert seen[0] == before
    assert seen[-1] == ("high", True)


def test_averaged_weights_are_judged_with_the_statistics_of_today() -> None:
    """What a BatchNorm has gathered is no weight: it is the same with and without an average."""
    make, x = MODELS["batch norm"]
    found = []
    for ema in (None, 0.9):
        torch.manual_seed(3)
        model = make()
        fit(model, x, steps=9, batch_size=64, ema=ema, progress=False)
        found.append(dict(model.named_buffers()))
    assert any("mean" in name for name in found[0])
    for name, buffer in found[0].items():
        assert torch.equal(buffer, found[1][name]), name


def spoilt_run(bad_step: int, **options: Any) -> tuple[nn.Module, str, int]:
    """The model, the message, and which row was the bad one of a run that ends on it."""
    x = POINTS.abs() + 0.1
    row = int(torch.randperm(200, generator=torch.Generator().manual_seed(0))[bad_step * 8 + 5])
    x[row] = -1.0
    torch.manual_seed(3)
    model = models.maf(6, 2, 16)
    with pytest.raises(NonFiniteError) as caught:
        fit(
            model, x, steps=25, batch_size=8, progress=False,
            loss=lambda model, x: -model(x.log()).mean(), **options,
        )  # fmt: skip
    return model, str(caught.value), row


@pytest.mark.parametrize("bad_step", [2, 7, 13, 21])
def test_a_bad_step_is_named_though_nobody_looked_for_steps(
    recorded: list[Tape], monkeypatch: pytest.MonkeyPatch, bad_step: int
) -> None:
    """The steps behind it are good ones, and change nothing either."""
    model, message, row = spoilt_run(bad_step)
    assert len(recorded) == 1
    assert message.startswith(f"The training stopped at step {bad_step} on ")
    assert f"row {row} of data" in message
    no_recorder(monkeypatch)
    plain = spoilt_run(bad_step)[0]
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_no_state_behind_a_bad_step_is_written(recorded: list[Tape], tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    spoilt_run(13, checkpoint=path, save_every=0.0)
    progress = checkpoints.read(path)[1]["progress"]
    assert progress["step"] == progress["loss_count"] == 13
    assert math.isfinite(progress["loss_sum"])


def test_a_run_resumes_into_a_model_that_started_elsewhere(tmp_path: Path) -> None:
    """What a checkpoint stores of an LU, its permutation and signs, counts from the first step."""
    path = tmp_path / "run.safetensors"

    def trained(seed: int, steps: int, resume: bool) -> nn.Module:
        torch.manual_seed(seed)
        model = models.glow((1, 8, 8), 1, 2, 8, grey_levels=17)
        fit(
            model, DIGITS, steps=steps, batch_size=64, schedule="constant", progress=False,
            checkpoint=path, resume=resume,
        )  # fmt: skip
        return model

    trained(0, 5, resume=False)
    kept = path.read_bytes()
    same = trained(0, 10, resume=True)
    path.write_bytes(kept)
    other = trained(1, 10, resume=True)
    for a, b in zip(same.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
