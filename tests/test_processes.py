"""Several processes: two of them (gloo, on the CPU) train together, and stay one model.

All cases run in one launch, for a start takes longer than a case. Each process writes what it found
beside its rank and the number of processes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nflib import checkpoints, data, models
from nflib.core import Flow, StandardNormal
from nflib.linear import LU
from nflib.train import NonFiniteError, fit

Found = dict[str, Any]


def points(n: int = 64) -> Tensor:
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    return x * torch.tensor([3.0, 1.0])


def linear() -> Flow:
    torch.manual_seed(5)
    return Flow(LU(2), StandardNormal(2))


def state(model: nn.Module) -> list[float]:
    """All parameters and buffers in a row; JSON keeps each float as it is."""
    return torch.cat([t.detach().double().flatten() for t in model.state_dict().values()]).tolist()


def records(history: Any) -> Found:
    return {name: history.column(name) for name in ("step", "train", "valid")}


def same_rows(_: Path) -> Found:
    """No noise: what one process finds with the same batches."""
    model = linear()
    history = fit(model, points(), points(40), steps=6, batch_size=32, validate_every=2)
    return {"state": state(model)} | records(history)


def loader(_: Path) -> Found:
    model = linear()
    rows = DataLoader(points(), batch_size=32, shuffle=True)
    history = fit(model, rows, DataLoader(points(40), batch_size=16), steps=6, validate_every=2)
    return {"state": state(model)} | records(history)


def dequantized(_: Path) -> Found:
    """ActNorm starts from dequantized digits, with other noise in each process."""
    x = data.load("digits").x[:64]
    torch.manual_seed(0)
    model = models.glow((1, 8, 8), 2, 1, 8, grey_levels=17)
    fit(model, x, steps=3, batch_size=16)
    return {"state": state(model)}


def patience(_: Path) -> Found:
    """Each process finds another noisy loss, so that those that decide for themselves part."""
    model, calls = linear(), 100 * int(os.environ.get("RANK", 0))

    def noisy(model: Flow, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        noise = torch.randn((), generator=torch.Generator().manual_seed(calls))
        return -model(x).mean() + (0.0 if model.training else noise)

    options = {"validate_every": 1, "patience": 3, "lr": 1e-4}
    history = fit(model, points(), points(), steps=200, batch_size=32, loss=noisy, **options)
    return {"state": state(model), "best": history.best_step} | records(history)


def clock(_: Path) -> Found:
    model = linear()
    history = fit(model, points(), seconds=0.5, batch_size=32)
    return {"state": state(model)} | records(history)


def running_statistics(_: Path) -> Found:
    """Batch normalization keeps statistics of the rows that each process saw."""
    torch.manual_seed(0)
    model = models.realnvp(2, 2, 8, normalization="batchnorm")
    fit(model, points(), points(), steps=5, batch_size=32, validate_every=2, ema=0.9)
    return {"state": state(model)}


def noise(folder: Path) -> Found:
    """Each process draws noise of its own, after a resume as well."""
    drawn: list[float] = []

    def loss(model: Flow, x: Tensor) -> Tensor:
        drawn.append(torch.rand(()).item())
        return -model(x).mean()

    options = {"batch_size": 32, "checkpoint": folder / "noise.safetensors", "loss": loss}
    fit(linear(), points(), steps=2, schedule="constant", **options)
    model = linear()
    fit(model, points(), steps=4, schedule="constant", resume=True, **options)
    return {"drawn": drawn, "state": state(model)}


def uneven(_: Path) -> Found:
    said = []
    for rows in (points(), DataLoader(points(), batch_size=33)):
        size = 33 if isinstance(rows, Tensor) else None
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            fit(linear(), rows, steps=2, batch_size=size)
        said.append(str(caught.value))
    return {"said": said}


def broken_row(_: Path) -> Found:
    """A row that only one process sees stops both."""

    def loss(model: Flow, x: Tensor) -> Tensor:
        # Infinite without a gradient, so that the other's weights show nothing.
        return -model(x).mean() + torch.where(x[:, 0] > 50, torch.inf, 0.0).sum()

    x = points()
    x[7] = 100.0
    with pytest.raises(NonFiniteError) as caught:
        fit(linear(), x, steps=10, batch_size=32, loss=loss)
    return {"said": str(caught.value)}


CASES: dict[str, Callable[[Path], Found]] = {
    case.__name__: case
    for case in (
        same_rows,
        loader,
        dequantized,
        patience,
        clock,
        running_statistics,
        noise,
        uneven,
        broken_row,
    )
}


def child(folder: Path) -> None:
    torch.set_num_threads(1)
    found: Found = {name: case(folder) for name, case in CASES.items()}
    found["processes"] = torch.distributed.get_world_size()
    rank = torch.distributed.get_rank()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def launch(words: list[str]) -> None:
    """Two processes of a Python command; fails unless both end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*start, "--master_port", str(port), *words],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    folder = tmp_path_factory.mktemp("processes")
    launch([str(Path(__file__)), str(folder)])
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    assert [one["processes"] for one in found] == [2, 2]
    return found


@pytest.mark.parametrize(
    "case",
    ["same_rows", "loader", "dequantized", "patience", "clock", "running_statistics", "noise"],
)
def test_all_processes_end_with_the_same_weights(case: str, both: list[Found]) -> None:
    one, other = (found[case] for found in both)
    assert one["state"] == other["state"]


@pytest.mark.parametrize("case", ["same_rows", "loader"])
def test_two_processes_find_what_one_finds(case: str, both: list[Found], tmp_path: Path) -> None:
    alone = CASES[case](tmp_path)
    for found in both:
        assert found[case]["state"] == pytest.approx(alone["state"], abs=1e-4)
        for column in ("step", "train", "valid"):
            assert found[case][column] == pytest.approx(alone[column], abs=1e-4)


@pytest.mark.parametrize("case", ["patience", "clock"])
def test_all_processes_stop_at_one_step(case: str, both: list[Found]) -> None:
    one, other = (found[case] for found in both)
    assert one["step"] == other["step"]
    assert case != "patience" or 3 < one["step"][-1] < 200
    assert case != "patience" or one["best"] == other["best"] == one["step"][-1] - 3


def test_each_process_draws_noise_of_its_own(both: list[Found]) -> None:
    one, other = (found["noise"]["drawn"] for found in both)
    assert len(set(one + other)) == 8


def test_batches_that_cannot_be_shared_are_one_sentence(both: list[Found]) -> None:
    for found in both:
        assert found["uneven"]["said"] == 2 * [
            "fit expects a batch_size that 2 processes can share evenly, got 33 rows in a batch."
        ]


def test_a_loss_that_one_process_sees_stops_all(both: list[Found]) -> None:
    said = [found["broken_row"]["said"] for found in both]
    assert len({text.split(" on ")[0] for text in said}) == 1
    assert any("furthest out is row 7 of data" in text for text in said)


def test_the_command_trains_in_two_processes(tmp_path: Path) -> None:
    """On reals, without noise: the loss of one process with the same global batch."""
    words = ["mixerflow", "--data", "breast_cancer", "--updates", "20", "--batch-size", "64"]
    words += ["--patch", "5", "--layers", "2", "--hidden", "16", "--threads", "1"]
    two, one = tmp_path / "two.json", tmp_path / "one.json"
    launch(["-m", "nflib.train", *words, "--out", str(two)])
    command = [sys.executable, "-m", "nflib.train", *words, "--out", str(one)]
    subprocess.run(command, check=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    got, expected = (json.loads(path.read_text()) for path in (two, one))
    assert (got["processes"], expected["processes"]) == (2, 1)
    assert got["nats"] == pytest.approx(expected["nats"], abs=1e-3)
    for a, b in zip(got["history"], expected["history"], strict=True):
        assert a["valid"] == pytest.approx(b["valid"], abs=1e-3)
        assert a["train"] == pytest.approx(b["train"], abs=1e-3)
    assert checkpoints.read(two.with_suffix(".safetensors"))[0]


if __name__ == "__main__":
    child(Path(sys.argv[1]))
