"""MixerFlow's claims beside Glow: same data, same seconds of one core, three seeds.

    python -m benchmarks.mixer_claims --threads 1            # every row; goes on where it stopped
    python -m benchmarks.mixer_claims --only mnist shift     # the rows of these experiments, anew

Experiments: ``mnist`` (three sizes of each model), ``permuted`` (the same pixels in a fixed random
order), ``shift`` (what cuts the image, on 28 x 28), ``colour`` (32 x 32), ``fashion`` (and how well
a linear classifier reads the class from the latents). Needs the data sets, see `nflib.data.load`.
Writes results/mixer_claims.json after every run; `benchmarks.mixer_size` measures the cost of an
image against its size.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.digits_flows import measured
from nflib import data, models
from nflib.core import Flow
from nflib.metrics import evaluate
from nflib.train import fit

GREY, COLOUR = (1, 28, 28), (3, 32, 32)
TRAINING = {"batch_size": 64, "lr": 5e-3, "warmup": 20, "ema": 0.99, "validate_every": 100}
# Rows that choose the best weights, and on which a linear classifier learns.
VALID, PROBE = 500, 5000

mixer = partial(models.mixerflow, patch=4, layers=8, hidden=(128,), grey_levels=256)
bands = partial(mixer, patch=1, extraction="bands")
glow = partial(models.glow, levels=2, steps=4, hidden=32, grey_levels=256)


@dataclass(frozen=True)
class Row:
    """A model on a data set, in one of the experiments."""

    make: Callable[..., Flow]
    data: str = "mnist"
    shape: tuple[int, int, int] = GREY
    permute: bool = False
    probe: bool = False


fashion = partial(Row, data="fashion_mnist", probe=True)
colour = partial(Row, data="cifar10_subset", shape=COLOUR)
EXPERIMENTS: dict[str, dict[str, Row]] = {
    "mnist": {
        "MixerFlow, small": Row(partial(bands, layers=4, hidden=(64,))),
        "MixerFlow": Row(bands),
        "MixerFlow, large": Row(partial(bands, hidden=(256, 256))),
        "Glow, small": Row(partial(glow, steps=2, hidden=16)),
        "Glow": Row(glow),
        "Glow, large": Row(partial(glow, steps=8, hidden=64)),
        "MixerFlow, MAF flows": Row(partial(bands, layers=6, flow="maf")),
    },
    "shift": {
        "shifted patches": Row(mixer),
        "fixed patches": Row(partial(mixer, extraction="patches")),
    },
    "colour": {
        "MixerFlow, shifted patches": colour(mixer),
        "MixerFlow, fixed patches": colour(partial(mixer, extraction="patches")),
        "MixerFlow, bands": colour(bands),
        "Glow": colour(glow),
    },
    "permuted": {"MixerFlow": Row(bands, permute=True), "Glow": Row(glow, permute=True)},
    "fashion": {"MixerFlow": fashion(bands), "Glow": fashion(glow)},
}


def splits(row: Row) -> dict[str, Tensor]:
    """Train, valid and test rows; without a validation split the end of the training rows."""
    train, test = (data.load(row.data, split).x for split in ("train", "test"))
    if "valid" in data.card(row.data).splits:
        valid = data.load(row.data, "valid").x[:VALID]
    else:
        train, valid = train[:-VALID], train[-VALID:]
    found = {"train": train, "valid": valid, "test": test}
    if row.permute:
        order = torch.randperm(train[0].numel(), generator=torch.Generator().manual_seed(0))
        found = {name: x.flatten(1)[:, order].view(x.shape) for name, x in found.items()}
    return found


def probe(row: Row, flow: Flow) -> dict[str, float]:
    """Test accuracy of a linear classifier on the latents, and on the pixels."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = data.load(row.data, "train", n=PROBE), data.load(row.data, "test")
    device = next(flow.parameters()).device

    @torch.no_grad()
    def latents(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        parts = [flow.encode(part.to(device)).flatten(1).cpu() for part in x.split(500)]
        return torch.cat(parts)

    def accuracy(one: Tensor, other: Tensor) -> float:
        # Strongly regularised: 784 numbers are many for 5,000 rows.
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(one.numpy(), train.y.numpy())
        return float(model.score(other.numpy(), test.y.numpy()))

    pixels = [part.x.flatten(1).float() for part in (train, test)]
    return {
        "probe": accuracy(latents(train.x), latents(test.x)),
        "probe of pixels": accuracy(*pixels),
    }


def measure(row: Row, seed: int, seconds: float) -> dict[str, Any]:
    """Train one model from one seed and judge it."""
    rows = splits(row)
    torch.manual_seed(seed)
    flow = row.make(row.shape)
    history = fit(
        flow, rows["train"], rows["valid"], seconds=seconds, seed=seed, progress=False, **TRAINING
    )
    last = history.records[-1]
    torch.manual_seed(0)
    disagreement = machine.round_trip(flow, 1000)
    test = rows["test"][:2000].to(next(flow.parameters()).device)
    result = {
        "parameters": sum(p.numel() for p in flow.parameters()),
        "test": evaluate(flow, test, batch_size=500).bits_per_dim(),
        "steps": int(last["step"]),
        "best_step": history.best_step,
        "images a second": last["step"] * TRAINING["batch_size"] / last["seconds"],
        "round_trip": disagreement,
    }
    return result | (probe(row, flow) if row.probe else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(EXPERIMENTS), help="anew")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of training")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=machine.ROOT / "results" / "mixer_claims.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    what = (
        "bits/dim of 2,000 test images (all there are, if fewer) after so many seconds of "
        "training, lower bounds with one draw of noise; probe is the accuracy of a linear "
        "classifier on the latents of the test images"
    )
    facts = machine.facts("benchmarks.mixer_claims") | {"seconds": options.seconds}
    facts["command"] = f"python -m benchmarks.mixer_claims --threads {options.threads}"
    for experiment in options.only or EXPERIMENTS:
        for name, row in EXPERIMENTS[experiment].items():
            stored = measured(options.out).get(experiment, {}).get(name)
            entry = stored if stored and not options.only else {"data": row.data, "seeds": []}
            for seed in [s for s in range(options.seeds) if s not in entry["seeds"]]:
                result = measure(row, seed, options.seconds)
                entry["parameters"] = result.pop("parameters")
                entry["seeds"].append(seed)
                for key, value in result.items():
                    entry.setdefault(key, []).append(value)
                # Read again: another process may have measured other rows meanwhile.
                rows = measured(options.out)
                rows.setdefault(experiment, {})[name] = entry
                machine.write(
                    options.out, {"what": what, **facts, "training": TRAINING, "rows": rows}
                )
                print(f"{experiment}, {name}, seed {seed}: {result}", flush=True)


if __name__ == "__main__":
    main()
