"""Training: it learns, it resumes exactly, it survives being killed, it says what went wrong."""

from __future__ import annotations

import math
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn

from nflib import checkpoints
from nflib.checkpoints import CheckpointError
from nflib.core import Bijection, Compose, Flow, StandardNormal
from nflib.linear import LU, Diagonal
from nflib.metrics import evaluate
from nflib.models import realnvp
from nflib.planar import Planar
from nflib.train import NonFiniteError, fit


def make() -> Flow:
    torch.manual_seed(5)
    return Flow(Compose(LU(2), Planar(2), Planar(2)), StandardNormal(2))


def points(n: int = 512, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator)
    return torch.stack([x[:, 0] * 2, x[:, 1] + x[:, 0] ** 2], 1)


def noisy(model: Flow, x: Tensor) -> Tensor:
    # Draws from the global generator, as dequantization and dropout do.
    return -model(x + 0.1 * torch.rand_like(x)).mean()


# Few rows and large steps: it overfits at once.
ROUGH = {"lr": 0.05, "schedule": "constant", "validate_every": 5, "batch_size": 10}
SETTINGS = {"steps": 40, "batch_size": 100, "ema": 0.9, "validate_every": 7, "loss": noisy}


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_it_learns() -> None:
    model = make()
    before = evaluate(model, points(2000, 1)).nats
    history = fit(model, points(2000), points(500, 2), steps=300, lr=1e-2)
    after = evaluate(model, points(2000, 1))
    gaussian = torch.distributions.MultivariateNormal(points().mean(0), points().T.cov())
    assert after.nats > before + 0.3
    assert after.nats > gaussian.log_prob(points(2000, 1)).mean().item() + 0.1
    assert history.best_step is not None
    assert history.records[-1]["step"] == 300
    assert "best valid" in repr(history)
    assert not model.training


def test_best_weights_are_kept() -> None:
    model = realnvp(2, 2, 16)
    history = fit(model, points(20), points(500, 2), steps=100, **ROUGH)
    best = min(history.column("valid"))
    torch.testing.assert_close(-evaluate(model, points(500, 2)).nats, best, atol=1e-4, rtol=1e-4)
    assert history.column("valid")[-1] > best + 0.1


def test_patience_stops() -> None:
    model = realnvp(2, 2, 16)
    history = fit(model, points(20), points(500, 2), steps=5000, patience=3, **ROUGH)
    assert history.best_step is not None
    assert history.records[-1]["step"] == history.best_step + 15


class Slope(nn.Module):
    """One number whose loss is itself: AdamW moves it down by the learning rate at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.calls = 0

    def forward(self) -> Tensor:
        self.calls += self.training
        return self.w.sum()


def descend(**options: Any) -> float:
    model = Slope()
    fit(model, None, **{"loss": lambda m: m(), "schedule": "constant", "lr": 0.1} | options)
    return model.w.item()


def test_the_learning_rate_is_constant_or_falls_along_a_cosine() -> None:
    assert descend(steps=10) == pytest.approx(-1.0, abs=1e-4)
    halves = [0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert descend(steps=10, schedule="cosine") == pytest.approx(-0.1 * sum(halves), abs=1e-4)


def test_warmup_rises_linearly_from_zero() -> None:
    assert descend(steps=6, warmup=4) == pytest.approx(-0.1 * (0.25 + 0.5 + 0.75 + 3), abs=1e-4)


def test_weight_decay_is_apart_from_the_gradient() -> None:
    w = 0.0
    for _ in range(20):
        w = w * (1 - 0.1 * 0.5) - 0.1
    assert descend(steps=20, weight_decay=0.5) == pytest.approx(w, abs=1e-4)


def test_a_long_gradient_is_clipped() -> None:
    def rough(model: Slope) -> Tensor:
        return model() * (1e4 if model.calls == 5 else 1.0)

    # Ten equal steps, if the fifth gradient counts as much as the others and no more.
    assert descend(steps=10, clip=1.0, loss=rough) == pytest.approx(-1.0, abs=1e-4)


def test_the_averaged_weights_are_validated_and_kept() -> None:
    seen, average = [], 0.0
    for step in range(1, 11):
        # The first average is the first weights.
        average = -0.1 if step == 1 else 0.8 * average + 0.2 * (-0.1 * step)
        seen.append(average)
    assert descend(steps=10, ema=0.8) == pytest.approx(average, abs=1e-4)
    options = {"lr": 0.1, "schedule": "constant", "ema": 0.8, "validate_every": 1}
    history = fit(Slope(), points(), points(), steps=10, loss=lambda m, x: m(), **options)
    assert history.column("valid") == pytest.approx(seen, abs=1e-4)


def test_same_seed_same_weights() -> None:
    one, other, third = make(), make(), make()
    fit(one, points(), points(seed=2), **SETTINGS)
    torch.manual_seed(1234)
    fit(other, points(), points(seed=2), **SETTINGS)
    fit(third, points(), points(seed=2), seed=1, **SETTINGS)
    assert same(one, other)
    assert not same(one, third)


def test_members_of_an_ensemble_differ() -> None:
    members = []
    for _ in range(3):
        members.append(realnvp(2, 2, 8))
        fit(members[-1], points(), steps=2)
    assert not same(members[1], members[2])


def fails(kind: type[BaseException]) -> Callable[..., Tensor]:
    def loss(model: Flow, x: Tensor) -> Tensor:
        random.random()
        numpy.random.rand()
        noisy(model, x).backward()
        raise kind("in the middle of a step")

    return loss


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"steps": 3, "loss": noisy}, None),
        ({"steps": 3, "loss": fails(KeyboardInterrupt)}, None),
        ({"steps": 3, "loss": fails(RuntimeError)}, RuntimeError),
        ({"steps": 3, "loss": fails(SystemExit)}, SystemExit),
        ({"steps": 3, "loss": lambda model, x: noisy(model, x) * torch.nan}, NonFiniteError),
        ({"steps": 3, "warmup": 4}, ValueError),
    ],
)
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_random_numbers_and_the_model_are_free_of_the_run(
    options: dict[str, Any], error: type[BaseException] | None, precision: Any
) -> None:
    torch.manual_seed(7)
    random.seed(7)
    numpy.random.seed(7)
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    torch_state = torch.get_rng_state()
    model = make()
    torch.set_rng_state(torch_state)
    names = set(vars(model))
    if error is None:
        fit(model, points(), mixed_precision=precision, **options)
    else:
        with pytest.raises(error):
            fit(model, points(), mixed_precision=precision, **options)
    after = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after
    assert set(vars(model)) == names


def test_a_users_own_accelerator_stays_what_it_is() -> None:
    kinds = (PartialState, AcceleratorState, GradientState)
    for kind in kinds:
        kind._reset_state()
    fit(make(), points(), steps=1)
    assert not any(kind._shared_state for kind in kinds)
    try:
        mine = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4)
        fit(make(), points(), steps=1)
        with pytest.raises(RuntimeError):
            fit(make(), points(), steps=1, loss=fails(RuntimeError))
        assert mine.mixed_precision == mine.state.mixed_precision == "bf16"
        assert mine.gradient_accumulation_steps == 4
    finally:
        for kind in kinds:
            kind._reset_state()


class Stop(KeyboardInterrupt):
    """As if somebody had pressed Ctrl-C."""


def interrupted_after(steps: int) -> Callable[..., Tensor]:
    calls = 0

    def loss(model: Flow, x: Tensor) -> Tensor:
        nonlocal calls
        calls += model.training
        if calls > steps:
            raise Stop
        return noisy(model, x)

    return loss


@pytest.mark.parametrize("stop", [1, 7, 13, 39])
def test_resumed_equals_uninterrupted(stop: int, tmp_path: Path) -> None:
    whole = make()
    first = tmp_path / "whole.safetensors"
    history = fit(whole, points(), points(seed=2), checkpoint=first, **SETTINGS)
    path = tmp_path / "run.safetensors"
    interrupted = SETTINGS | {"loss": interrupted_after(stop)}
    fit(make(), points(), points(seed=2), checkpoint=path, **interrupted)
    _, meta = checkpoints.read(path)
    assert meta["progress"]["step"] == stop
    resumed = make()
    again = fit(resumed, points(), points(seed=2), checkpoint=path, resume=True, **SETTINGS)
    assert same(whole, resumed)
    assert [r["train"] for r in again.records] == [r["train"] for r in history.records]
    assert again.best_step == history.best_step
    whole_tensors, _ = checkpoints.read(first)
    tensors, _ = checkpoints.read(path)
    assert whole_tensors.keys() == tensors.keys()
    assert all(torch.equal(whole_tensors[k], tensors[k]) for k in tensors)


def test_killed_at_any_moment_resumes_exactly(tmp_path: Path) -> None:
    """SIGKILL at arbitrary moments, also while the checkpoint is being written."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch
            torch.set_num_threads(1)
            sys.path.insert(0, sys.argv[2])
            from test_train import SETTINGS, fit, make, points
            fit(make(), points(), points(seed=2), checkpoint=sys.argv[1], resume=True,
                save_every=0.0, **SETTINGS | {"steps": 400})
            """
        )
    )
    path = tmp_path / "killed.safetensors"
    command = [sys.executable, str(script), str(path), str(Path(__file__).parent)]
    kills = 0
    for attempt in range(4):
        process = subprocess.Popen(command)
        before = path.stat().st_mtime_ns if path.exists() else 0
        while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.005)
        time.sleep(0.05 + 0.07 * attempt)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        checkpoints.read(path)  # whole at every kill
    subprocess.run(command, check=True)
    assert kills > 0
    whole = make()
    fit(whole, points(), points(seed=2), **SETTINGS | {"steps": 400})
    resumed = make()
    checkpoints.load(resumed, path)
    assert same(whole, resumed)
    # A killed writer leaves at most its unfinished temporary files, never a broken checkpoint.
    assert path.is_file()


def test_validating_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    watched, alone = tmp_path / "watched.safetensors", tmp_path / "alone.safetensors"
    fit(make(), points(), points(seed=2), checkpoint=watched, **SETTINGS)
    fit(make(), points(), checkpoint=alone, **SETTINGS)
    one, two = checkpoints.read(watched)[0], checkpoints.read(alone)[0]
    assert all(torch.equal(one[k], two[k]) for k in one if k.startswith(("model.", "rng.")))


def test_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    one, other = make(), make()
    first = fit(one, points(), points(seed=2), checkpoint=path, **SETTINGS)
    second = fit(other, points(), points(seed=2), checkpoint=path, resume=True, **SETTINGS)
    assert same(one, other)
    assert second.records == first.records


def test_context_and_time_budget() -> None:
    model = realnvp(2, 2, 8, context_dim=1)
    context = torch.randn(512, 1)
    start = time.monotonic()
    history = fit(model, (points() + context, context), (points() + context, context), seconds=1.0)
    assert 0.9 < time.monotonic() - start < 10
    assert history.records[-1]["seconds"] >= 1.0


def test_a_part_of_an_epoch_is_at_least_one_step() -> None:
    history = fit(make(), points(), epochs=1e-6)
    assert [record["step"] for record in history.records] == [1]


def test_precision_may_change_between_runs() -> None:
    plain, mixed = make(), make()
    fit(plain, points(), steps=5)
    fit(mixed, points(), steps=5, mixed_precision="bf16")
    # These flows have no conditioner: nothing may run in bfloat16.
    assert same(plain, mixed)
    fit(plain, points(), steps=5)
    assert plain(points()).dtype == torch.float32


def test_conditioners_run_in_bfloat16_on_request_and_only_then() -> None:
    kinds = []

    def loss(model: Flow, x: Tensor) -> Tensor:
        kinds.append(torch.is_autocast_enabled("cpu"))
        return -model(x).mean()

    model = realnvp(2, 2, 8)
    for precision in (None, "bf16", None):
        fit(model, points(), points(), steps=1, loss=loss, mixed_precision=precision)
    assert kinds == [False, False, True, True, False, False]  # a step, a validation
    x = points(8)
    assert torch.equal(model(x), model.log_prob(x))


def test_compiled_training_is_the_same_up_to_rounding() -> None:
    torch.manual_seed(0)
    eager, compiled = realnvp(2, 2, 8), realnvp(2, 2, 8)
    compiled.load_state_dict(eager.state_dict())
    settings = {"steps": 5, "batch_size": 64, "progress": False}
    fit(eager, points(), **settings)
    fit(compiled, points(), compile=True, **settings)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


class Exploding(Bijection):
    """Fine for a while, then its log_det is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(2))
        self.calls = 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.calls += self.training
        bad = torch.inf if self.calls > 10 else 0.0
        return x * self.scale, self.scale.abs().log().sum() + bad + torch.zeros(len(x))


def test_non_finite_loss_names_step_layer_and_checkpoint(tmp_path: Path) -> None:
    model = Flow(Compose(LU(2), Exploding(), Diagonal(2)), StandardNormal(2))
    path = tmp_path / "run.safetensors"
    with pytest.raises(NonFiniteError) as caught:
        fit(model, points(), steps=50, checkpoint=path, validate_every=4)
    message = str(caught.value)
    step = int(message.split("at step ")[1].split()[0])
    assert 8 <= step <= 10
    assert "on a loss that is not finite" in message
    assert "bijection.bijections.1 (Exploding), whose log_det is not finite" in message
    assert str(path) in message
    tensors, meta = checkpoints.read(path)
    assert meta["progress"]["step"] == 8
    assert all(torch.isfinite(v).all() for k, v in tensors.items() if k.startswith("model."))
    assert all(torch.isfinite(p).all() for p in model.parameters())


class Logarithm(Bijection):
    """Fails for the rows that are not positive."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.log(), -x.log().sum(1)


def test_a_row_that_breaks_a_layer_is_named_and_kept() -> None:
    model = Flow(Compose(Logarithm(), LU(2)), StandardNormal(2))
    x = torch.rand(300, 2) + 1
    x[211, 1] = -1.0
    with pytest.raises(NonFiniteError) as caught:
        fit(model, x, epochs=1, batch_size=100)
    assert "whose output is not finite for row 211 of data." in str(caught.value)
    assert caught.value.row is not None
    assert torch.equal(caught.value.batch[0][caught.value.row], x[211])


def test_a_norm_that_overflows_is_told_from_a_gradient_that_does() -> None:
    x = torch.cat([torch.randn(2000, 4), torch.full((1, 4), 1e6)])
    with pytest.raises(NonFiniteError) as caught:
        fit(realnvp(4, hidden=32), x, steps=300, lr=2e-3)
    message = str(caught.value)
    assert "on a loss of " in message
    assert "the norm of the gradient overflows, though each of its numbers is finite" in message
    assert "furthest out is row 2000 of data, which holds 1e+06." in message


def test_non_finite_gradient_stops_before_the_weights() -> None:
    model = make()

    def root(model: Flow, x: Tensor) -> Tensor:
        return -model(x).mean() + (model.bijection[0].bias * 0).abs().sqrt().sum()  # type: ignore[operator, union-attr, index]

    with pytest.raises(NonFiniteError, match=r"gradient of bijection\.bijections\.0\.bias is not"):
        fit(model, points(), steps=5, loss=root)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "fit expects a budget of epochs, steps or seconds, got none."),
        ({"steps": 0}, "fit expects steps to be a whole number of at least 1"),
        ({"epochs": -1.0}, "fit expects epochs to be a number above 0"),
        ({"seconds": 0}, "fit expects seconds to be a number above 0"),
        ({"steps": 1, "schedule": "linear"}, "schedule to be 'cosine' or 'constant', got 'linear'"),
        ({"steps": 1, "resume": True}, "fit expects a checkpoint to resume from, got none."),
        ({"steps": 1, "patience": 3}, "fit expects valid to measure patience by, got patience=3"),
        ({"steps": 1, "validate_every": 0}, "fit expects validate_every to be a whole number"),
        ({"steps": 1, "batch_size": 0}, "fit expects batch_size to be a whole number of at least"),
        ({"steps": 1, "ema": 0.0}, "fit expects ema to be a number between 0 and 1, got 0"),
        ({"steps": 1, "ema": 1.0}, "fit expects ema to be a number from 0 to below 1"),
        ({"steps": 5, "warmup": 6}, "fit expects a warmup within its 5 steps, got 6."),
        ({"steps": 5, "lr": -1.0}, "fit expects lr to be a number above 0"),
        (
            {"steps": 5, "mixed_precision": "fp16"},
            "fit expects mixed_precision to be 'no', 'tf32' or",
        ),
    ],
)
def test_wrong_arguments_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        fit(make(), points(), **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="parameters, Flow has none"):
        fit(Flow(Compose(), StandardNormal(2)), points(), steps=1)


def test_resuming_another_run_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    fit(make(), points(), steps=2, checkpoint=path)
    with pytest.raises(CheckpointError, match="a run with seed 0, this one has 1"):
        fit(make(), points(), steps=2, checkpoint=path, resume=True, seed=1)
    other = Flow(Compose(LU(2), Planar(2)), StandardNormal(2))
    with pytest.raises(CheckpointError, match="checkpoint of another model"):
        fit(other, points(), steps=2, checkpoint=path, resume=True)
    checkpoints.save(make(), path)
    with pytest.raises(CheckpointError, match="without the state of a training run"):
        fit(make(), points(), steps=2, checkpoint=path, resume=True)


class Told(nn.Module):
    """Its loss in training is `Slope`'s; each validation finds the next of some numbers."""

    def __init__(self, valid: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.valid = iter(valid)

    def loss(self, model: nn.Module, x: Tensor) -> Tensor:
        return self.w.sum() if self.training else torch.tensor(next(self.valid))


TOLD = {"lr": 0.1, "schedule": "constant", "validate_every": 1, "progress": False}


def test_patience_begins_anew_with_each_new_best() -> None:
    model = Told([5.0, 6.0, 4.0, 6.0, 3.0, 6.0, 6.0, 1.0])
    history = fit(model, points(4), points(4), steps=9, patience=2, loss=model.loss, **TOLD)
    assert history.column("valid") == [5.0, 6.0, 4.0, 6.0, 3.0, 6.0, 6.0]
    assert history.best_step == 5
    torch.testing.assert_close(model.w.item(), -0.5)


def test_a_resumed_run_ends_with_the_best_weights_of_before(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    first = Told([5.0, 2.0, 6.0])
    fit(first, points(4), points(4), steps=3, loss=first.loss, checkpoint=path, **TOLD)
    second = Told([7.0, 8.0])
    options = {"checkpoint": path, "resume": True} | TOLD
    history = fit(second, points(4), points(4), steps=5, loss=second.loss, **options)
    assert history.best_step == 2
    assert len(history.records) == 5
    torch.testing.assert_close(second.w.item(), -0.2)


@pytest.mark.parametrize(("budget", "steps"), [((3, 5), 3), ((30, 1), 4)])
def test_the_shorter_of_two_budgets_ends_a_run(budget: tuple[int, int], steps: int) -> None:
    options = {"batch_size": 10, "progress": False}
    history = fit(make(), points(40), steps=budget[0], epochs=budget[1], **options)
    assert history.records[-1]["step"] == steps


def test_a_seed_decides_about_the_noise_of_a_run() -> None:
    def drawn(seed: int) -> list[float]:
        numbers: list[float] = []

        def loss(model: Flow, x: Tensor) -> Tensor:
            numbers.append(torch.rand(()).item())
            return -model(x).mean()

        fit(make(), points(20), steps=3, seed=seed, loss=loss, progress=False)
        return numbers

    assert drawn(1) == drawn(1) != drawn(2)
