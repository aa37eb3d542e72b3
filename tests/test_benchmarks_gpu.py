"""The measurements of `benchmarks.mixer_gpu` that need no MNIST run, at tiny sizes on the CPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import mixer_gpu

TINY = dataclasses.replace(
    mixer_gpu.SMALL,
    layers=1,
    hidden=8,
    channels=8,
    batches=(2, 4),
    compiled_batches=(),
    seconds=0.0,
    warm=2,
    depths=(1, 2),
    depth_batch=2,
    trainings={},
)


def test_the_measurements_run_and_are_not_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = {mode: kind for mode, kind in mixer_gpu.MODES.items() if not kind[1]}
    monkeypatch.setattr(mixer_gpu, "MODES", eager)
    only = ["precision", "memory", "speed"]
    for _ in range(2):
        mixer_gpu.measure(TINY, "cpu", tmp_path / "out", tmp_path / "runs", only)
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*")}
    assert sorted(found) == ["memory", "precision", "speed_glow", "speed_mixerflow"]
    for result in found.values():
        assert {"what", "command", "hardware", "torch", "seconds"} <= result.keys()
    one, two = (found["memory"]["rows"][k] for k in ("1", "2"))
    assert one["plain"]["bytes"] < two["plain"]["bytes"]
    assert two["relative error of the gradient"] < 1e-4
    assert found["precision"]["rows"]["MixerFlow"]["largest"] < 0.05
    row = found["speed_mixerflow"]["rows"]["bfloat16"]
    assert row["operations"] > 100
    assert set(row["batches"]) == {"2", "4"}


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    for name, bits in (("mixerflow", 1.1), ("mixerflow_float32", 1.2)):
        (tmp_path / f"train_{name}.json").write_text(json.dumps({"run": {"bits_per_dim": bits}}))
        (tmp_path / f"{name}.safetensors").write_text(name)
    weights = tmp_path / "data" / "best.safetensors"
    mixer_gpu.keep_best(tmp_path, tmp_path, weights)
    assert weights.read_text() == "mixerflow"
