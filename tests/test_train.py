"""Training: it learns, it resumes exactly, it survives being killed, it says what went wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nflib import checkpoints
from nflib.checkpoints import CheckpointError
from nflib.core import Bijection, Compose, Flow, StandardNormal
from nflib.linear import LU, Diagonal
from nflib.metrics import evaluate
from nflib.models import realnvp
from nflib.planar import Planar
from nflib.train import NonFiniteError, as_tensors, fit


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


ROUGH = {"lr": 0.3, "schedule": "constant", "validate_every": 5}
SETTINGS = {"steps": 40, "batch_size": 100, "ema": 0.9, "validate_every": 7, "loss": noisy}


def same(one: Flow, other: Flow) -> bool:
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
    model = make()
    history = fit(model, points(), points(500, 2), steps=60, **ROUGH)
    best = min(history.column("valid"))
    torch.testing.assert_close(-evaluate(model, points(500, 2)).nats, best, atol=1e-4, rtol=1e-4)
    assert history.column("valid")[-1] > best


def test_patience_stops() -> None:
    history = fit(make(), points(), points(500, 2), steps=5000, patience=3, **ROUGH)
    assert history.records[-1]["step"] == history.best_step + 15  # type: ignore[operator]


def test_same_seed_same_weights() -> None:
    one, other, third = make(), make(), make()
    fit(one, points(), points(seed=2), **SETTINGS)
    fit(other, points(), points(seed=2), **SETTINGS)
    fit(third, points(), points(seed=2), seed=1, **SETTINGS)
    assert same(one, other)
    assert not same(one, third)


@pytest.mark.parametrize("stop", [1, 7, 13, 39])
def test_resumed_equals_uninterrupted(stop: int, tmp_path: Path) -> None:
    whole = make()
    first = tmp_path / "whole.safetensors"
    history = fit(whole, points(), points(seed=2), checkpoint=first, **SETTINGS)

    class Stop(KeyboardInterrupt):
        pass

    calls = 0

    def interrupted(model: Flow, x: Tensor) -> Tensor:
        nonlocal calls
        calls += model.training
        if calls > stop:
            raise Stop
        return noisy(model, x)

    path = tmp_path / "run.safetensors"
    fit(make(), points(), points(seed=2), checkpoint=path, **SETTINGS | {"loss": interrupted})
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
    model = Flow(Compose(LU(2), Planar(2, context_dim=1)), StandardNormal(2))
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


def test_the_precision_of_a_run_ends_with_it() -> None:
    model = realnvp(2, 2, (16,))
    fit(model, points(), steps=30, lr=1e-2, mixed_precision="bf16", progress=False)
    x = points(8)
    assert torch.equal(model(x), model.log_prob(x))
    assert "forward" not in vars(model)


def test_compiled_training_is_the_same_up_to_rounding() -> None:
    eager, compiled = make(), make()
    settings = {"steps": 10, "batch_size": 64, "progress": False}
    fit(eager, points(), **settings)
    fit(compiled, points(), compile=True, **settings)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_non_finite_loss_names_step_layer_and_checkpoint(tmp_path: Path) -> None:
    model = Flow(Compose(LU(2), Exploding(), Diagonal(2)), StandardNormal(2))
    path = tmp_path / "run.safetensors"
    with pytest.raises(NonFiniteError) as caught:
        fit(model, points(), steps=50, checkpoint=path, validate_every=4)
    message = str(caught.value)
    assert "at step 9" in message
    assert "bijection.bijections.1 (Exploding), whose log_det is not finite" in message
    assert str(path) in message
    tensors, meta = checkpoints.read(path)
    assert meta["progress"]["step"] == 8
    assert all(torch.isfinite(v).all() for k, v in tensors.items() if k.startswith("model."))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_non_finite_gradient_stops_before_the_weights() -> None:
    model = make()

    def root(model: Flow, x: Tensor) -> Tensor:
        return -model(x).mean() + (model.bijection[0].bias * 0).abs().sqrt().sum()  # type: ignore[operator, union-attr, index]

    with pytest.raises(NonFiniteError, match=r"gradient of bijection\.bijections\.0\.bias"):
        fit(model, points(), steps=5, loss=root)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_bad_data_is_one_sentence() -> None:
    x = points()
    x[3, 1] = torch.nan
    with pytest.raises(ValueError, match="data must be finite, .* the first in row 3"):
        fit(make(), x, steps=1)
    with pytest.raises(ValueError, match="valid must be finite"):
        fit(make(), points(), x, steps=1)
    with pytest.raises(ValueError, match="at least one"):
        fit(make(), points()[:0], steps=1)
    with pytest.raises(ValueError, match="same number of rows"):
        fit(make(), (points(), torch.randn(3, 1)), steps=1)
    with pytest.raises(ValueError, match="tensors, got ndarray"):
        fit(make(), points().numpy(), steps=1)
    with pytest.raises(ValueError, match="expects a budget"):
        fit(make(), points())
    for budget in ({"steps": 0}, {"epochs": -1.0}, {"seconds": 0}):
        with pytest.raises(ValueError, match="above zero, got"):
            fit(make(), points(), **budget)
    with pytest.raises(ValueError, match="schedule"):
        fit(make(), points(), steps=1, schedule="linear")
    with pytest.raises(ValueError, match="checkpoint to resume from"):
        fit(make(), points(), steps=1, resume=True)
    with pytest.raises(ValueError, match="parameters, Compose has none"):
        fit(Compose(), points(), steps=1)
    assert as_tensors((x[:2], x[:2]), "data")[0].shape == (2, 2)


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


def test_two_processes_give_one_process_with_the_same_global_batch(tmp_path: Path) -> None:
    """`accelerate launch` on two gloo processes: the same weights up to rounding."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch
            torch.set_num_threads(1)
            sys.path.insert(0, sys.argv[2])
            from test_train import fit, make, points
            fit(make(), points(), points(seed=2), steps=20, batch_size=64, checkpoint=sys.argv[1])
            """
        )
    )
    path = tmp_path / "two.safetensors"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    command += [str(script), str(path), str(Path(__file__).parent)]
    subprocess.run(command, check=True, env=environment)
    one, two = make(), make()
    fit(one, points(), points(seed=2), steps=20, batch_size=64)
    checkpoints.load(two, path)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
