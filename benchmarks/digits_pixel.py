"""The autoregressive models on scikit-learn's digits: same data, same seconds, three seeds.

    python -m benchmarks.digits_pixel                       # all models, goes on where it stopped
    python -m benchmarks.digits_pixel --models "PixelCNN"   # only these, measured anew
    python -m benchmarks.digits_pixel --long                # two of them, ten minutes each

Each model trains on 1,297 images of 8 x 8 pixels and 17 grey levels, keeps the weights that are
best on the 200 validation images, and is judged on the 300 test images: bits/dim, exact, but for
MAF, a flow behind uniform noise, whose numbers are lower bounds on the likelihood with one draw
(mean over 16 repeats) and with 32 draws. After every run it writes results/digits_pixel.json, or
results/digits_pixel_long.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import machine
from benchmarks.digits_flows import measured, time_sampling
from nflib import data, models
from nflib.elementwise import LogisticMixtureCDF
from nflib.metrics import evaluate
from nflib.pixel import GatedPixelCNN, PixelCNN, PixelCNNPP, PixelRNN
from nflib.train import fit

LEVELS, SHAPE = 17, (1, 8, 8)
TRAINING = {"batch_size": 64, "ema": 0.99, "validate_every": 20, "lr": 3e-3, "weight_decay": 0.01}
REPEATS = 16


@dataclass(frozen=True)
class Row:
    """A model of the table: how it is built and trained."""

    make: Callable[[], nn.Module]
    training: dict[str, Any] = field(default_factory=dict)
    vectors: bool = False


recurrent, gentle = partial(PixelRNN, SHAPE, LEVELS, dropout=0.1), {"lr": 5e-3}
ROWS: dict[str, Row] = {
    "MAF": Row(
        partial(
            models.maf,
            64,
            2,
            (128, 128),
            elementwise=LogisticMixtureCDF(4),
            dropout=0.2,
            grey_levels=LEVELS,
        ),
        {"lr": 2e-3, "batch_size": 128},
        vectors=True,
    ),
    "PixelRNN, Row LSTM": Row(partial(recurrent, "row", 24, 2), gentle),
    "PixelRNN, Diagonal BiLSTM": Row(partial(recurrent, "diagonal", 24, 1), gentle),
    "PixelCNN": Row(partial(PixelCNN, SHAPE, LEVELS, 48, 4, dropout=0.1)),
    "Gated PixelCNN": Row(partial(GatedPixelCNN, SHAPE, LEVELS, 32, 4, dropout=0.2)),
    "PixelCNN++": Row(partial(PixelCNNPP, SHAPE, LEVELS, 24, 1, 2, dropout=0.2)),
}
LONG: dict[str, Row] = {
    "Gated PixelCNN": Row(partial(GatedPixelCNN, SHAPE, LEVELS, 48, 5, dropout=0.4)),
    "PixelCNN++": Row(partial(PixelCNNPP, SHAPE, LEVELS, 32, 1, 2, dropout=0.4)),
}


def measure(row: Row, seed: int, seconds: float) -> dict[str, Any]:
    """Train one model from one seed and judge it."""
    splits = {s: data.load("digits", s).x for s in ("train", "valid", "test")}
    if row.vectors:
        splits = {name: x.flatten(1) for name, x in splits.items()}
    torch.manual_seed(seed)
    model = row.make()
    begin = time.perf_counter()
    training = TRAINING | row.training
    history = fit(
        model,
        splits["train"],
        splits["valid"],
        seconds=seconds,
        seed=seed,
        progress=False,
        **training,
    )
    elapsed = time.perf_counter() - begin
    exact = evaluate(model, splits["valid"][:2]).likelihood == "exact"
    torch.manual_seed(0)
    draws = [evaluate(model, splits["test"]).bits_per_dim() for _ in range(1 if exact else REPEATS)]
    samples = 1 if exact else 32
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "likelihood": "exact" if exact else "lower bound",
        "test": sum(draws) / len(draws),
        "iw32": evaluate(model, splits["test"], samples=samples).bits_per_dim(),
        "valid": evaluate(model, splits["valid"]).bits_per_dim(),
        "train": evaluate(model, splits["train"]).bits_per_dim(),
        "steps": int(history.records[-1]["step"]),
        "best_step": history.best_step,
        "seconds": round(elapsed, 1),
        "sampling": machine.sampling_seconds(model),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--long", action="store_true", help="ten minutes each")
    parser.add_argument("--seconds", type=float, help="of training, 60, or 600 with --long")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--sampling", action="store_true", help="time samples of the rows there are"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows_of = LONG if options.long else ROWS
    unknown = set(options.models or ()) - set(rows_of)
    if unknown:
        parser.error(f"expected models among {', '.join(rows_of)}, got {', '.join(unknown)}")
    name = "digits_pixel_long" if options.long else "digits_pixel"
    out = options.out or machine.ROOT / "results" / f"{name}.json"
    seconds = options.seconds or (600.0 if options.long else 60.0)
    if options.sampling:
        return time_sampling(out, {name: row.make for name, row in rows_of.items()})
    what = (
        "bits/dim of the digits' test images after so many seconds of training: exact, or where "
        "`likelihood` says so a lower bound with one draw of noise (test) and with 32 (iw32); "
        "sampling is seconds for 1,000 samples"
    )
    # --models only chooses rows: the whole file is made by the command without it.
    command = "python -m benchmarks.digits_pixel" + (" --long" if options.long else "")
    command += f" --threads {options.threads}"
    facts = machine.facts("benchmarks.digits_pixel") | {"command": command, "seconds": seconds}
    for name in options.models or rows_of:
        fresh: dict[str, Any] = {"seeds": []}
        entry = fresh if options.models else measured(out).get(name, fresh)
        for seed in [s for s in range(options.seeds) if s not in entry["seeds"]]:
            result = measure(rows_of[name], seed, seconds)
            entry["parameters"] = result.pop("parameters")
            entry["likelihood"] = result.pop("likelihood")
            entry["seeds"].append(seed)
            for key, value in result.items():
                entry.setdefault(key, []).append(value)
            # Read again: another process may have measured other rows meanwhile.
            machine.write(out, {"what": what, **facts, "rows": measured(out) | {name: entry}})
            print(
                f"{name}, seed {seed}: test {result['test']:.3f} bits/dim, valid "
                f"{result['valid']:.3f}, {result['steps']} steps, best {result['best_step']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
