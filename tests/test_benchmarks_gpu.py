"""The command that measures all on a GPU, at tiny sizes on a CPU: its plan, its parts, its end."""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import (
    clock,
    conduct,
    correctness,
    gather,
    layers,
    memory,
    mixer,
    part,
    place,
    plan,
    samplers,
    speed,
    store,
    training,
    weights,
)
from nflib import models

FAR = 1e10  # seconds since 1970


def here(folder: Path, deadline: float = FAR) -> place.Place:
    runs = folder / "runs"
    runs.mkdir(exist_ok=True)
    return place.Place("cpu", True, folder / "out", runs, clock.Clock(deadline))


@pytest.fixture
def signals() -> Iterator[None]:
    """What a clock sets is undone."""
    numbers = (signal.SIGALRM, signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


# --- the plan --------------------------------------------------------------------------------


def test_the_shares_are_the_whole_and_what_one_leaves_goes_to_those_after_it() -> None:
    assert sum(p.share for p in plan.PARTS) == pytest.approx(1)
    assert plan.allotment(plan.PARTS, 540) == pytest.approx(540 * plan.PARTS[0].share)
    late = plan.PARTS[-2:]
    # The two that are left have all of the time between them, and the last one what remains.
    assert plan.allotment(late, 100) == pytest.approx(100 * 0.07 / 0.18)
    assert plan.allotment(late[1:], 60) == 60


def test_parts_keep_their_order_whatever_is_asked_for() -> None:
    assert [p.name for p in plan.chosen(["speed", "correctness"])] == ["correctness", "speed"]
    assert plan.chosen([]) == list(plan.PARTS)
    with pytest.raises(ValueError, match="expects parts among correctness, mixer, .*, got sped"):
        plan.chosen(["sped"])


def test_what_the_command_says_of_its_parts_is_the_plan() -> None:
    text = command.__doc__ or ""
    for each in plan.PARTS:
        assert f"    {each.name:12}{540 * each.share:4.0f} s " in text
    kept = {"mnist_mixerflow", *weights.LARGE.trainings}
    assert kept == {"mnist_mixerflow", *weights.SMALL.trainings} == set(plan.WORTH)


# --- processes -------------------------------------------------------------------------------

# Stands in for a part: the first one does not stop, the second ends with a status, the third works.
STUBBORN = """
import json, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
name, out = sys.argv[1], sys.argv[sys.argv.index("--out") + 1]
seconds = float(sys.stdin.readline()) - time.time()
if name == "correctness":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(f"{out}/child", "w").write(str(child.pid))
    time.sleep(60)
if name == "mixer":
    sys.exit(9)
json.dump({"rows": {"a": seconds}, "missing": []}, open(f"{out}/{name}.json", "w"))
"""


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()


@pytest.mark.parametrize("early", [False, True])
def test_a_part_that_does_not_stop_is_killed_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(conduct, "MODULE", "stubborn")
    monkeypatch.setattr(conduct, "GRACE", 0.3)
    monkeypatch.setattr(conduct, "LEAST", 0.3)
    # Equal shares: 4 seconds for three parts.
    parts = [plan.Part(name, 1.0) for name in ("correctness", "mixer", "speed")]
    start = time.time()
    words = ["--out", str(tmp_path)]
    assert conduct.conduct(parts, words, tmp_path, start + 4, early)
    assert time.time() - start < 4.2
    errors = {
        name: store.read(tmp_path / f"{name}.json").get("error")
        for name in ("correctness", "mixer")
    }
    assert "killed after 1 s" in str(errors["correctness"])
    assert "status=9" in str(errors["mixer"])
    # All that the first two left over.
    assert store.read(tmp_path / "speed.json")["rows"]["a"] > 1.5
    assert not is_running(int((tmp_path / "child").read_text()))
    assert [
        p.name for p in parts if not store.complete(store.read(tmp_path / f"{p.name}.json"))
    ] == [
        "correctness",
        "mixer",
    ]


def test_without_a_gpu_the_command_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    words = ["--only", "memory", "--minutes", "1", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="finds no GPU; use --device cpu --small"):
        command.main([*words, "--build", str(tmp_path)])


# --- rows ------------------------------------------------------------------------------------


def results(folder: Path, name: str = "memory") -> dict[str, Any]:
    return json.loads((folder / "out" / f"{name}.json").read_text())


def test_rows_are_measured_once_and_failed_ones_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def row(name: str) -> Callable[[], Any]:
        def run() -> dict[str, str]:
            calls.append(name)
            if name == "b" and calls.count("b") == 1:
                raise RuntimeError("no luck\nand a traceback")
            return {"is": name}

        return run

    monkeypatch.setattr(
        memory, "rows", lambda where: {n: row(n) for n in "abc"} | {"d": lambda: None}
    )
    for _ in range(2):
        part.measure(plan.Part("memory", 1.0), here(tmp_path))
        if len(calls) == 3:
            found = results(tmp_path)
            assert found["rows"]["b"] == {"error": "RuntimeError: no luck"}
            assert found["missing"] == ["b", "d"]
    assert calls == ["a", "b", "c", "b"]
    found = results(tmp_path)
    assert found["rows"] == {n: {"is": n} for n in "abc"}
    assert list(found["rows"]) == ["a", "b", "c"]
    assert found["missing"] == ["d"]  # it said that it could not be measured yet
    assert {"what", "command", "hardware", "torch", "seconds"} <= found.keys()


def test_an_error_of_a_whole_part_is_written_down_and_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(where: place.Place) -> Any:
        raise OSError("no such data")

    part.measure(plan.Part("samplers", 1.0), here(tmp_path, deadline=0))
    monkeypatch.setattr(samplers, "rows", broken)
    part.measure(plan.Part("samplers", 1.0), here(tmp_path))
    assert results(tmp_path, "samplers")["error"] == "OSError: no such data"
    monkeypatch.setattr(samplers, "rows", lambda where: {"a": lambda: {"b": 1}})
    part.measure(plan.Part("samplers", 1.0), here(tmp_path))
    assert "error" not in results(tmp_path, "samplers")
    assert store.complete(results(tmp_path, "samplers"))


def test_no_row_begins_when_the_time_is_over(tmp_path: Path) -> None:
    part.measure(plan.Part("memory", 1.0), here(tmp_path, deadline=time.time() + 0.1))
    found = results(tmp_path)
    assert found["rows"] == {}
    assert found["missing"] == ["2", "4"]


def test_rows_of_other_hardware_say_so(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for hardware, name in (("one", "a"), ("two", "b")):
        kept = store.Store(path, {"hardware": hardware})
        kept.expect(["a", "b"])
        kept.add(name, {"value": 1}, 2.0)
    found = store.read(path)
    assert found["hardware"] == "one"
    assert found["rows"] == {"a": {"value": 1}, "b": {"value": 1, "hardware": "two"}}
    assert found["seconds"] == 4.0


def test_rows_at_once_are_the_rows_in_turn(tmp_path: Path) -> None:
    where = here(tmp_path, deadline=time.time() + 60)
    some = ["bijection: lu", "bijection: spline coupling"]
    found = dict(part.in_processes(plan.Part("correctness", 1.0, workers=2), where, some))
    own = correctness.rows(where)
    assert found == {name: own[name]() for name in some}


# --- trainings -------------------------------------------------------------------------------


@pytest.mark.usefixtures("signals")
def test_a_training_that_is_interrupted_goes_on(tmp_path: Path) -> None:
    x = torch.randint(0, 17, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    options = {"steps": 150, "batch_size": 32, "validate_every": 50, "ema": 0.9}

    def flow() -> Any:
        torch.manual_seed(0)
        return models.mixerflow((1, 8, 8), 2, 1, (8,), grey_levels=17)

    def train(where: place.Place, **more: Any) -> tuple[dict[str, Any], Any]:
        model = flow()
        return training.train("it", model, (x,), (x[:8],), where, **options, **more), model

    (tmp_path / "whole").mkdir()
    facts, whole = train(here(tmp_path / "whole"))
    assert facts["steps"] == 150
    assert facts["ended by"] == "budget"
    # The clock rings in the middle: after a part of the time that the whole took.
    where = here(tmp_path, deadline=time.time() + 0.4 * facts["training, seconds"] + 0.05)
    where.clock.start()
    with pytest.raises(KeyboardInterrupt):
        train(where, loss=slow)
    assert (where.runs / "it.state.safetensors").is_file()
    again, _ = train(here(tmp_path))
    assert again["steps"] == 150


def slow(model: Any, x: torch.Tensor) -> torch.Tensor:
    time.sleep(0.01)
    return -model(x).mean()


def test_the_mixer_is_trained_once_more_with_less_if_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def train(*words: Any, **options: Any) -> dict[str, Any]:
        tried.append((options["lr"], options["seconds"]))
        if len(tried) == 1:
            raise ArithmeticError("not finite")
        return {"steps": 1}

    rows = SimpleNamespace(x=torch.randint(0, 256, (8, 1, 28, 28)))
    monkeypatch.setattr(mixer.data, "load", lambda name, split, n: rows)
    monkeypatch.setattr(mixer, "train", train)
    sizes = dataclasses.replace(mixer.SMALL, layers=1, hidden=(27,), components=1)
    facts = mixer.measure(sizes, here(tmp_path))
    rate, seconds = sizes.training["lr"], sizes.training["seconds"]
    assert tried == [(rate, seconds), (rate / 2, seconds)]
    assert facts["first attempt"] == "ArithmeticError: not finite"
    assert facts["test, 2 draws"] < facts["test"]
    assert (tmp_path / "runs" / "mnist_mixerflow.safetensors").is_file()


def test_a_plateau_is_told_from_the_end_of_the_budget(tmp_path: Path) -> None:
    x = torch.randint(0, 17, (96, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    flow = models.mixerflow((1, 8, 8), 2, 1, (8,), grey_levels=17)
    options: dict[str, Any] = {"steps": 200, "batch_size": 32, "validate_every": 5, "patience": 2}
    options |= {"lr": 0.05, "schedule": "constant"}
    # There is nothing to be learnt from noise but its scale.
    facts = training.train("it", flow, (x[:64],), (x[64:],), here(tmp_path), **options)
    assert facts["ended by"] == "plateau"
    assert facts["steps"] < 200
    assert facts["best step"] == facts["steps"] - 10


def test_weights_are_kept_by_worth_as_far_as_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "WORTH", ("a", "b", "c", "d"))
    monkeypatch.setattr(gather, "MAX_FILE", 80)
    monkeypatch.setattr(gather, "MAX_TOTAL", 160)
    out, runs = tmp_path / "out", tmp_path / "runs" / "weights"
    for folder in (out, runs):
        folder.mkdir(parents=True)
    (out / "speed.json").write_text("x" * 30)
    for name, size in (("a", 90), ("b", 70), ("c", 65), ("d", 50)):
        (runs / f"{name}.safetensors").write_text("x" * size)
    (runs / "a.state.safetensors").write_text("x" * 20)
    left_out = gather.gather(out, tmp_path / "runs")
    kept = [path.name for path in sorted(out.glob("*.safetensors"))]
    # a is too large by itself; after b there are 60 left: not enough for c, enough for d.
    assert kept == ["b.safetensors", "d.safetensors"]
    assert left_out == {
        "a": "90 bytes, where there is room for 80",
        "c": "65 bytes, where there is room for 60",
    }


# --- what is measured ------------------------------------------------------------------------


def test_every_layer_of_the_list_is_right(tmp_path: Path) -> None:
    # Some of each kind: all of them run with the command itself.
    for name in ("lu", "mixture coupling", "affine maf", "periodic convolution", "glow"):
        make, event = layers.EVENTS[name]
        row = correctness.bijection(make, event, here(tmp_path))
        assert row["log_det"] < 1e-10
        assert row["round trip"] < 1e-10
        assert row["from the CPU"] == 0


def test_the_layer_at_which_two_devices_part_is_found() -> None:
    make, event = layers.EVENTS["realnvp of images"]
    torch.manual_seed(0)
    there = make().double()
    here = make().double()
    here.load_state_dict(there.state_dict())
    x = torch.rand(2, *event, dtype=torch.float64)
    names = [name for name, _, _ in correctness.recorded(there, x)]
    with torch.no_grad():
        dict(here.named_modules())[names[2]].bias.add_(1e-3)
    found = correctness.where(there, here, x, x)
    assert [row["part"].split()[0] for row in found] == names
    assert [row["own"] > 0 for row in found].index(True) == 2
    assert sum(row["own"] > 0 for row in found) == 1
    assert all((row["difference"] > 0) == (k >= 2) for k, row in enumerate(found))


@pytest.mark.usefixtures("recorded")
def test_replayed_steps_are_the_ordinary_ones(tmp_path: Path) -> None:
    row = correctness.replayed(correctness.REPLAYED["Glow"], here(tmp_path))
    assert row["relative difference"] < 1e-5
    assert "obstacle" not in row
    first, last = row["first and last loss"]
    assert last < first


def test_resuming_changes_no_weight(tmp_path: Path) -> None:
    assert correctness.resumed("no", here(tmp_path))["largest difference of a weight"] == 0


@pytest.mark.usefixtures("recorded")
def test_steps_are_timed_in_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place.Place, "has_graphs", True)
    monkeypatch.setattr(place, "PATCHES", 64)
    tiny = dataclasses.replace(
        speed.SMALL,
        hidden=8,
        batches=(2, 4),
        maf_batches=(4,),
        compiled=(4,),
        widths=(8,),
        seconds=0.0,
        warm=2,
        sides=(),
    )
    monkeypatch.setattr(speed, "SMALL", tiny)
    # The compiler takes half a minute, and the models of other libraries have sizes of their own.
    rows = speed.rows(here(tmp_path)).items()
    slow = ("compiled", "both", "libraries")
    found = {name: row() for name, row in rows if not any(word in name for word in slow)}
    for mode in ("eager", "captured"):
        step = found[f"MixerFlow, float32, {mode}, 4"]
        assert step["images a second"] == round(4e3 / step["milliseconds"])
        assert "obstacle" not in step
        assert found[f"Glow, bf16, {mode}, 4"]["milliseconds"] > 0
    assert found["kernels, MixerFlow, eager"]["operations"] > 100
    assert found["log p, MixerFlow"]["tf32"]["largest"] == 0  # a CPU has none
    assert set(found["MixerFlow of width 8"]) >= {"float32", "tf32", "bf16"}


@pytest.mark.usefixtures("recorded")
def test_memory_grows_with_depth_unless_it_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "PATCHES", 64)
    monkeypatch.setattr(place.Place, "has_graphs", True)
    sizes = memory.Sizes(depths=(1, 2), hidden=8, batch=2, seconds=0.0)
    one, two = (memory.measure(depth, sizes, here(tmp_path)) for depth in sizes.depths)
    assert one["plain"]["bytes"] < two["plain"]["bytes"]
    assert two["reversible"]["bytes"] < 1.2 * one["reversible"]["bytes"]
    assert two["relative error of the gradient"] < 1e-4
    for way in ("plain", "reversible"):
        assert two[way]["eager, milliseconds"] > 0
        assert two[way]["captured, milliseconds"] > 0
        assert "obstacle" not in two[way]
