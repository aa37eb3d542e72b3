"""Training from the command line: one command for every model, resumed exactly, mistakes named."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nflib import checkpoints, models
from nflib.elementwise import RationalQuadraticSpline
from nflib.train import command as cli

SMALL = {
    "nice": ["--layers", "2", "--hidden", "8"],
    "realnvp": ["--layers", "2", "--hidden", "8"],
    "spline_flow": ["--layers", "2", "--hidden", "8,8"],
    "naf": ["--layers", "1", "--hidden", "8", "--units", "3"],
    "maf": ["--layers", "2", "--hidden", "64"],
    "iaf": ["--layers", "1", "--hidden", "64"],
    "glow": ["--levels", "2", "--steps", "1", "--hidden", "8"],
    "flowpp": ["--hidden=8", "--blocks=1", "--couplings=(1,1,1)", "--attention=2"],
    "mixerflow": ["--patch", "2", "--layers", "2", "--hidden", "8"],
}
RUN = ["--data", "digits", "--rows", "64", "--valid-rows", "32", "--updates", "2"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


def test_every_model_of_models_has_its_command() -> None:
    built = [n for n in dir(models) if getattr(models, n) in cli.MODELS.values()]
    flows = [
        n
        for n, f in vars(models).items()
        if getattr(f, "__module__", "").startswith("nflib.models") and "-> 'Flow'" in _signature(f)
    ]
    public = [n for n in flows if not n.startswith("_")]
    assert sorted(cli.MODELS) == sorted(built) == sorted(public) == sorted(SMALL)


def _signature(function: object) -> str:
    import inspect

    return str(inspect.signature(function)) if inspect.isfunction(function) else ""


@pytest.mark.parametrize("model", SMALL)
def test_one_command_trains_judges_and_writes(model: str, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    result = cli.main([model, *RUN, *SMALL[model], "--out", str(out)])
    stored = json.loads(out.read_text())
    assert stored["bits_per_dim"] == result["bits_per_dim"] < 6
    assert stored["steps"] == 2
    assert stored["likelihood"] == "lower bound"
    assert stored["history"][-1]["step"] == 2
    options = cli.model_options(model, SMALL[model])
    rows = cli.rows_for(model, torch.zeros(1, 1, 8, 8))
    flow = cli.build(model, rows, 17, options)
    checkpoints.load(flow, out.with_suffix(".safetensors"))
    assert sum(p.numel() for p in flow.parameters()) == stored["parameters"]


def test_reals_are_judged_in_nats(tmp_path: Path) -> None:
    command = ["maf", "--data", "moons", "--rows", "128", "--updates", "3", "--layers", "1"]
    result = cli.main([*command, "--out", str(tmp_path / "run.json")])
    assert result["likelihood"] == "exact"
    assert "bits_per_dim" not in result
    assert result["nats"] < 0


def test_options_are_arguments_of_the_models_function() -> None:
    words = "--hidden 16,8 --dropout=0.1 --extraction bands --patch (2,4) --elementwise spline"
    options = cli.model_options("mixerflow", words.split())
    spline = options.pop("elementwise")
    assert isinstance(spline, RationalQuadraticSpline)
    assert options == {"hidden": (16, 8), "dropout": 0.1, "extraction": "bands", "patch": (2, 4)}
    assert cli.model_options("maf", ["--hidden", "32"]) == {"hidden": 32}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["mixerflow", *RUN, "--path", "2"],
            "mixerflow expects options with one value among --pat",
        ),
        (["mixerflow", *RUN, "--patch"], "got '--patch'."),
        (["mixerflow", *RUN, "--patch", "3"], "Patches expects patches that tile the event"),
        (["maf", *RUN, "--elementwise", "cubic"], "--elementwise expects one of additive, affine"),
        (["maf", "--data", "digit", "--updates", "1"], "There is no data set 'digit'"),
        (["maf", "--data", "digits"], "expects a budget"),
        (["maf", *RUN, "--rows", "9999"], "digits has 1297 train examples, got n=9999."),
        (["flowpp", *RUN, "--memory", "reversible"], "Reversible expects layers that are undone"),
    ],
)
def test_a_mistake_ends_in_one_sentence(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*words, "--out", str(tmp_path / "run.json")])
    assert message in str(caught.value)
    assert str(caught.value).startswith("nflib.train: ")
    assert "\n" not in str(caught.value)


def command(out: Path) -> list[str]:
    words = ["mixerflow", "--data", "digits", "--rows", "256", "--valid-rows", "64", "--seed", "3"]
    words += ["--updates", "150", "--validate-every", "10", "--threads", "1", "--ema", "0.9"]
    words += [*SMALL["mixerflow"], "--out", str(out), "--resume"]
    return [sys.executable, "-m", "nflib.train", *words]


def test_a_killed_run_resumes_to_the_same_result(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed.json", tmp_path / "whole.json"
    state = killed.with_suffix(".state.safetensors")
    process = subprocess.Popen(command(killed))
    while process.poll() is None and not state.exists():
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists(), "the run ended before it was killed: make it longer"
    for out in (killed, whole):
        subprocess.run(command(out), check=True)
    one, two = (json.loads(path.read_text()) for path in (killed, whole))
    assert one["bits_per_dim"] == two["bits_per_dim"]
    assert one["steps"] == two["steps"] == 150
    a, b = (checkpoints.read(path.with_suffix(".safetensors"))[0] for path in (killed, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)
