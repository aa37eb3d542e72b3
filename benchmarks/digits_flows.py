"""The coupling flows on scikit-learn's digits: same data, same seconds, three seeds.

    python -m benchmarks.digits_flows                     # all models, goes on where it stopped
    python -m benchmarks.digits_flows --models Glow NICE  # only these, measured anew
    python -m benchmarks.digits_flows --long              # some of them, ten minutes each

Each model trains for 60 seconds on 1,297 images of 8 x 8 pixels and 17 grey levels, keeps the
weights that are best on the 200 validation images, and is judged on the 300 test images: bits/dim,
a lower bound on the likelihood with one draw of noise for each image (mean over 16 repeats) and
with 32 draws. Writes results/digits_flows.json, or results/digits_flows_long.json, after every run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from nflib import data, models
from nflib.core import Compose, Flow, StandardNormal
from nflib.elementwise import Affine, RationalQuadraticSpline
from nflib.linear import LU
from nflib.metrics import evaluate
from nflib.normalization import ActNorm
from nflib.planar import Planar
from nflib.train import fit

LEVELS, SHAPE = 17, (1, 8, 8)
TRAINING = {"batch_size": 128, "ema": 0.99, "validate_every": 20}
REPEATS = 16


@dataclass(frozen=True)
class Row:
    """A model of the table: how it is built and trained, and what the table says of it."""

    make: Callable[[], Flow]
    transformation: str
    dequantization: str = "uniform"
    scales: str = "one"
    vectors: bool = False
    weight_decay: float = 0.01
    # Convolutions make few steps in the time, which have to be larger; networks that many patches
    # share take larger ones still, after a few small ones.
    lr: float = 4e-3
    warmup: int = 0


flowpp = partial(
    models.flowpp,
    SHAPE,
    hidden=24,
    blocks=1,
    components=4,
    couplings=(0, 4, 4),
    attention=3,
    dropout=0.1,
    grey_levels=LEVELS,
)
plusplus = partial(Row, scales="two")
vectors = partial(Row, vectors=True, lr=2e-3)
mixer = partial(models.mixerflow, SHAPE, grey_levels=LEVELS)
mixing = partial(Row, lr=8e-3, warmup=20)
ROWS: dict[str, Row] = {
    "NICE": Row(
        partial(models.nice, 64, 4, (256, 256), dropout=0.2, grey_levels=LEVELS),
        "additive coupling, diagonal",
        vectors=True,
        lr=2e-3,
    ),
    "RealNVP, vectors": Row(
        partial(models.realnvp, 64, 8, (128, 128), dropout=0.2, grey_levels=LEVELS),
        "affine coupling, permutation",
        vectors=True,
        lr=2e-3,
    ),
    "RealNVP": Row(
        partial(models.realnvp, SHAPE, 4, (32,), dropout=0.1, grey_levels=LEVELS),
        "affine coupling, checkerboards and channels",
        scales="two",
    ),
    "Spline coupling": Row(
        partial(
            models.glow,
            SHAPE,
            2,
            4,
            64,
            elementwise=RationalQuadraticSpline(8),
            dropout=0.1,
            grey_levels=LEVELS,
        ),
        "spline coupling, 1x1 convolution",
        scales="two",
    ),
    "Glow": Row(
        partial(models.glow, SHAPE, 2, 4, 64, dropout=0.1, grey_levels=LEVELS),
        "affine coupling, 1x1 convolution",
        scales="two",
    ),
    "Flow++": plusplus(flowpp, "mixture CDF coupling, 1x1 convolution", "variational"),
    "Flow++, uniform noise": plusplus(
        partial(flowpp, dequantization="uniform"), "mixture CDF coupling, 1x1 convolution"
    ),
    "Flow++, affine couplings": plusplus(
        partial(flowpp, elementwise=Affine()), "affine coupling, 1x1 convolution", "variational"
    ),
    "Flow++, no attention": plusplus(
        partial(flowpp, attention=0), "mixture CDF coupling, 1x1 convolution", "variational"
    ),
    "MixerFlow": mixing(
        partial(mixer, 2, 8, (64,)), "affine coupling, LU, along 2x2 patches that shift"
    ),
    "MixerFlow, fixed patches": mixing(
        partial(mixer, 2, 8, (64,), extraction="patches"), "affine coupling, LU, along 2x2 patches"
    ),
    "MixerFlow, bands": mixing(
        partial(mixer, 1, 8, (128,), extraction="bands"), "affine coupling, LU, along rows"
    ),
    "MixerFlow, MAF flows": mixing(
        partial(mixer, 1, 6, (64,), extraction="bands", flow="maf"),
        "affine autoregressive, LU, along rows",
    ),
}


def planar() -> Flow:
    """Eight planar maps with linear ones between them, as in chapter 3, behind the logit."""
    layers = [layer for _ in range(8) for layer in (LU(64), Planar(64))]
    return Flow(Compose(*models.dequantize(LEVELS), ActNorm(64), *layers), StandardNormal(64))


vector_flow = {"hidden": (128, 128), "dropout": 0.2, "grey_levels": LEVELS}
ROWS |= {
    "Planar": vectors(planar, "planar, LU"),
    "Spline coupling, vectors": vectors(
        partial(models.spline_flow, 64, 4, 8, **vector_flow), "spline coupling, LU"
    ),
    "NAF": vectors(partial(models.naf, 64, 3, 8, **vector_flow), "monotone-network coupling, LU"),
    "MAF, affine": vectors(
        partial(models.maf, 64, 5, order="random", **vector_flow), "affine autoregressive"
    ),
    "IAF": vectors(
        partial(models.iaf, 64, 2, **vector_flow), "affine autoregressive, read backwards"
    ),
    "Residual flow": Row(
        partial(models.residual_flow, 64, 5, (96, 96), grey_levels=LEVELS),
        "residual blocks, log-det by roulette in training",
        vectors=True,
        lr=2e-2,
    ),
}
LONG = {name: ROWS[name] for name in ("MixerFlow, bands", "RealNVP, vectors")}


def measure(row: Row, seed: int, seconds: float) -> dict[str, Any]:
    """Train one model from one seed and judge it."""
    splits = {s: data.load("digits", s).x for s in ("train", "valid", "test")}
    if row.vectors:
        splits = {name: x.flatten(1) for name, x in splits.items()}
    torch.manual_seed(seed)
    flow = row.make()
    begin = time.perf_counter()
    history = fit(
        flow,
        splits["train"],
        splits["valid"],
        seconds=seconds,
        lr=row.lr,
        warmup=row.warmup,
        weight_decay=row.weight_decay,
        seed=seed,
        progress=False,
        **TRAINING,
    )
    elapsed = time.perf_counter() - begin
    torch.manual_seed(0)
    disagreement = machine.round_trip(flow)
    draws = [evaluate(flow, splits["test"]).bits_per_dim() for _ in range(REPEATS)]
    return {
        "parameters": sum(p.numel() for p in flow.parameters()),
        "test": sum(draws) / len(draws),
        "iw32": evaluate(flow, splits["test"], samples=32).bits_per_dim(),
        "train": evaluate(flow, splits["train"]).bits_per_dim(),
        "steps": int(history.records[-1]["step"]),
        "best_step": history.best_step,
        "seconds": round(elapsed, 1),
        "round_trip": disagreement,
        "sampling": machine.sampling_seconds(flow),
    }


def time_sampling(path: Path, makes: dict[str, Callable[[], Any]]) -> None:
    """Add the time of 1,000 samples to the rows that lack it; training would not change it."""
    result = json.loads(path.read_text())
    for name, row in result["rows"].items():
        if "sampling" not in row:
            row["sampling"] = [machine.sampling_seconds(makes[name]())]
            print(f"{name}: {row['sampling'][0]:.3f} s for 1,000 samples", flush=True)
    machine.write(path, result)


def measured(path: Path) -> dict[str, Any]:
    """The rows that the file holds so far."""
    return json.loads(path.read_text())["rows"] if path.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=list(ROWS), metavar="NAME")
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
    options.seconds = options.seconds or (600.0 if options.long else 60.0)
    name = "digits_flows_long" if options.long else "digits_flows"
    options.out = options.out or machine.ROOT / "results" / f"{name}.json"
    if options.sampling:
        return time_sampling(options.out, {name: row.make for name, row in rows_of.items()})
    what = (
        "bits/dim of the digits' test images after so many seconds of training: lower bounds with "
        "one draw of noise (test) and with 32 (iw32); round_trip is the largest difference, in "
        "nats a dimension, between log p of 10,000 samples on the way out and on the way back; "
        "sampling is seconds for 1,000 samples"
    )
    # --models only chooses rows: the whole file is made by the command without it.
    command = "python -m benchmarks.digits_flows" + (" --long" if options.long else "")
    command += f" --threads {options.threads}"
    facts = machine.facts("benchmarks.digits_flows") | {"command": command}
    facts["seconds"] = options.seconds
    for name in options.models or rows_of:
        row = rows_of[name]
        table = {key: getattr(row, key) for key in ("transformation", "dequantization", "scales")}
        fresh = table | {"seeds": []}
        entry = fresh if options.models else measured(options.out).get(name, fresh)
        for seed in [s for s in range(options.seeds) if s not in entry["seeds"]]:
            result = measure(row, seed, options.seconds)
            entry["parameters"] = result.pop("parameters")
            entry["seeds"].append(seed)
            for key, value in result.items():
                entry.setdefault(key, []).append(value)
            # Read again: another process may have measured other rows meanwhile.
            rows = measured(options.out) | {name: entry}
            machine.write(options.out, {"what": what, **facts, "rows": rows})
            print(
                f"{name}, seed {seed}: {result['test']:.3f} bits/dim, {result['iw32']:.3f} with 32 "
                f"draws, {result['steps']} steps",
                flush=True,
            )


if __name__ == "__main__":
    main()
