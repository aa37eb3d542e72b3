"""Training from the command line: one command for every model, resumed exactly, mistakes named."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nflib import checkpoints, data, models
from nflib.elementwise import RationalQuadraticSpline
from nflib.train import command as cli
from nflib.train.surroundings import seeded

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
    "ferumal": ["--points", "8", "--layers", "2", "--backbone", "glow"],
    "vae": [
        *["--patch", "2", "--latent-dim", "4", "--width", "4", "--hidden", "8", "--features", "3"],
        *["--flow", "planar", "--steps", "2", "--prior-steps", "1", "--flow-hidden", "8"],
        *["--warm-up", "4", "--free-bits", "0.5", "--amortised", "True"],
    ],
}
# What a command cannot say: the context of a data set, the estimators of a log-det.
WITHOUT = {"cinn", "residual_flow", "srflow"}
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
    public = [n for n in flows if not n.startswith("_") and n not in WITHOUT]
    assert sorted(cli.MODELS) == sorted([*built, "vae"]) == sorted([*public, "vae"])
    assert sorted(cli.MODELS) == sorted(SMALL)


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


def test_a_vae_is_judged_by_its_importance_weighted_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.json"
    command = ["vae", *RUN, *SMALL["vae"], "--out", str(out)]
    one = cli.main(command)
    many = cli.main([*command, "--samples", "200"])
    stored = json.loads(out.read_text())
    assert (one["samples"], many["samples"], many["test_rows"]) == (1, 200, 300)
    assert many["likelihood"] == "lower bound"
    assert many["nats"] > one["nats"] + 0.1
    assert many["nats"] == stored["nats"]
    assert many["bits_per_dim"] == pytest.approx(-many["nats"] / 64 / math.log(2))
    assert f"{many['bits_per_dim']:.3f} bits/dim, {many['nats']:.3f} nats (lower bound, test)" in (
        capsys.readouterr().out
    )
    options = cli.model_options("vae", SMALL["vae"])
    model = cli.build("vae", torch.zeros(1, 1, 8, 8), 17, options)
    assert model.decoder.head.levels == model.encoder.levels == 17
    assert (model.warm_up, model.free_bits, model.latent_dim) == (4, 0.5, 4)
    checkpoints.load(model, out.with_suffix(".safetensors"))
    assert model.steps_seen == 2
    with torch.no_grad():
        test = data.load("digits", "test").x
        with seeded(0):
            again = torch.cat([model.log_weights(part, 200) for part in test.split(500)], 1)
    assert (again.logsumexp(0) - math.log(200)).mean().item() == pytest.approx(many["nats"])


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
        (["vae", *RUN, "--flow", "maf"], "vae expects flow to be 'planar', 'radial', 'sylves"),
        (["vae", *RUN, "--patch", "3"], "expects a patch that divides both sides of 8 x 8"),
        (["vae", "--data", "moons", "--updates", "1"], "vae expects shape to be the shape (chan"),
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
