"""A whole distribution instead of one number: p(y | x) on real tables, judged by its calibration.

    python -m benchmarks.regression --threads 1                      # goes on where it stopped
    python -m benchmarks.regression --sets diabetes --seeds 1        # only these rows

Models: a straight line with normal errors of one size; a network that gives mean and deviation of
a normal; a network that gives a mixture of logistics, and one that gives a spline: all three are
one-dimensional conditional flows; and quantiles by gradient boosting (scikit-learn). Flows get the
learning rate, then the weight decay, by the validation loss of short runs with seed 0, boosting its
learning rate by the validation CRPS; then five seeds train until the validation loss has had no new
best for a while. Writes results/regression.json after every row.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.residual_flows import Results
from benchmarks.tables import DECAYS, FEW, RATES, Budget, step
from nflib import data
from nflib.autoregressive import MaskedAutoregressive
from nflib.core import Compose, Flow, StandardLogistic, StandardNormal
from nflib.elementwise import Affine, LogisticMixtureCDF, RationalQuadraticSpline
from nflib.metrics import coverage, crps, log_probs, pit
from nflib.train import NonFiniteError, fit

SEEDS, DRAWS = 5, 500
MANY = Budget(60_000, 1000, 200, 0.995)
SETS = ("diabetes", "power_plant", "protein")
# The middles of twenty equal shares: their mean pinball loss is half of the CRPS, by midpoints.
# Two of them bound the central interval of each level.
QUANTILES = [(k + 0.5) / 20 for k in range(20)]
LEVELS = torch.linspace(0.05, 0.95, 10)
BOOSTING_RATES = (0.03, 0.1, 0.3)
HIDDEN = (64, 64)
Split = tuple[Tensor, Tensor]  # y (n, 1), x (n, K)


def normal(size: int) -> Flow:
    """Mean and deviation from a network: one affine map that sees x."""
    return Flow(MaskedAutoregressive(1, Affine(), HIDDEN, size), StandardNormal(1))


def mixture(size: int) -> Flow:
    """A mixture of eight logistics from a network: its CDF, then a logit."""
    return Flow(MaskedAutoregressive(1, LogisticMixtureCDF(8), HIDDEN, size), StandardLogistic(1))


def spline(size: int) -> Flow:
    """A spline of eight bins within +-3 after an affine map, for it leaves far values alone."""
    layers = (
        MaskedAutoregressive(1, map_, HIDDEN, size)
        for map_ in (Affine(), RationalQuadraticSpline())
    )
    return Flow(Compose(*layers), StandardNormal(1))


FLOWS: dict[str, Callable[[int], Flow]] = {
    "Normal of a network": normal,
    "Mixture of a network": mixture,
    "Spline of a network": spline,
}
LINE, BOOSTING = "Line, normal errors", "Quantile boosting"
MODELS = [LINE, *FLOWS, BOOSTING]


@dataclass(frozen=True)
class Table:
    """Splits with a standardised y, and y's mean and deviation in its own unit."""

    train: Split
    valid: Split
    test: Split
    mean: float
    unit: float


@cache
def prepared(name: str) -> Table:
    """x as it is loaded; y with uniform noise of one step of its rounding, drawn once."""
    splits = {s: data.load(name, s) for s in ("train", "valid", "test")}
    rows = {s: cast(Tensor, d.y).double() for s, d in splits.items()}
    width, mean, unit = step(rows["train"]), rows["train"].mean(), rows["train"].std()
    found = {}
    for number, (s, y) in enumerate(rows.items()):
        noise = torch.rand(len(y), generator=torch.Generator().manual_seed(number)).double() - 0.5
        found[s] = ((y + noise * width - mean) / unit)[:, None].float(), splits[s].x
    return Table(**found, mean=mean.item(), unit=unit.item())


def budget(table: Table) -> Budget:
    return FEW if len(table.train[0]) < 2000 else MANY


def train(
    model: str, name: str, lr: float, decay: float, seed: int, steps: int
) -> tuple[Flow, Any]:
    """The trained flow and its history."""
    table = prepared(name)
    torch.manual_seed(seed)
    y, x = table.train
    flow, limits = FLOWS[model](x.shape[1]), budget(table)
    history = fit(
        flow,
        (y, x),
        table.valid,
        steps=steps,
        lr=lr,
        weight_decay=decay,
        schedule="constant",
        warmup=20,
        clip=5.0,
        ema=limits.ema,
        batch_size=min(256, max(32, len(y) // 8)),
        validate_every=limits.validate_every,
        patience=10,
        seed=seed,
        progress=False,
    )
    return flow, history


def search(results: Results, name: str, model: str) -> dict[str, float]:
    """The learning rate with the best validation loss of a short run, then the weight decay."""
    found = results.section("search", name, model)

    def loss(lr: float, decay: float) -> float:
        key = f"lr {lr:g}, weight decay {decay:g}"
        if key not in found:
            steps = budget(prepared(name)).search_steps
            try:
                found[key] = min(train(model, name, lr, decay, 0, steps)[1].column("valid"))
            except NonFiniteError:
                found[key] = None  # the loss was not finite any more
            results.write()
        return float("inf") if found[key] is None else found[key]

    lr = min(RATES, key=lambda rate: loss(rate, DECAYS[0]))
    return {"lr": lr, "weight_decay": min(DECAYS, key=lambda decay: loss(lr, decay))}


def judged(name: str, draws: Tensor, values: Tensor | None) -> dict[str, Any]:
    """CRPS in the unit of y, the share of y in each central interval, and nats a row.

    draws ``(k, n, 1)`` come from each prediction, values are log p of the test rows.
    """
    table = prepared(name)
    y = table.test[0]
    scores, ranks = crps(draws, y) * table.unit, pit(draws, y)
    row = scored(scores, ranks)
    if values is not None:
        gain = values.double() - of_line(name)
        row |= {
            "test": values.double().mean().item(),
            "gain": gain.mean().item(),
            "gain_standard_error": gain.std().item() / len(gain) ** 0.5,
        }
    return row


def scored(scores: Tensor, ranks: Tensor) -> dict[str, Any]:
    shares = coverage(ranks, LEVELS)
    return {
        "crps": scores.mean().item(),
        "crps_standard_error": scores.std().item() / len(scores) ** 0.5,
        "coverage": [round(share, 4) for share in shares.tolist()],
        "miscalibration": (shares - LEVELS).abs().mean().item(),
    }


@cache
def line(name: str) -> tuple[Tensor, float]:
    """Weights of least squares, the constant last, and the deviation of the errors."""
    y, x = (part.double() for part in prepared(name).train)
    inputs = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    weights = torch.linalg.lstsq(inputs, y).solution
    return weights, (y - inputs @ weights).square().mean().sqrt().item()


def line_at(name: str, x: Tensor) -> Tensor:
    weights, _ = line(name)
    return torch.cat([x.double(), torch.ones(len(x), 1).double()], 1) @ weights


@cache
def of_line(name: str) -> Tensor:
    """What the line says of each test row."""
    y, x = prepared(name).test
    errors = torch.distributions.Normal(line_at(name, x), line(name)[1])
    return errors.log_prob(y.double())[:, 0]


def measure_line(name: str) -> dict[str, Any]:
    y, x = prepared(name).test
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(DRAWS, len(y), 1, generator=random)
    draws = line_at(name, x).float() + line(name)[1] * noise
    return {"seed": 0, "parameters": x.shape[1] + 2, **judged(name, draws, of_line(name))}


@torch.no_grad()
def draws_of(flow: Flow, x: Tensor) -> Tensor:
    random = torch.Generator().manual_seed(0)
    parts = [flow.sample((DRAWS,), some, generator=random) for some in x.split(500)]
    return torch.cat(parts, 1)


def measure_flow(name: str, model: str, chosen: dict[str, float], seed: int) -> dict[str, Any]:
    """One row: a flow trained until it stops improving, and judged."""
    table = prepared(name)
    begin = time.process_time()
    flow, history = train(
        model, name, chosen["lr"], chosen["weight_decay"], seed, budget(table).steps
    )
    seconds = time.process_time() - begin
    updates = int(history.records[-1]["step"])
    y, x = table.test
    row = {
        "seed": seed,
        "parameters": sum(p.numel() for p in flow.parameters()),
        "updates": updates,
        "best_update": history.best_step,
        "epochs": round(history.records[-1]["epoch"], 2),
        "stopped_improving": history.best_step < updates,
        "fit_seconds": round(seconds, 2),
        "valid_by_update": [round(value, 4) for value in history.column("valid")],
        **judged(name, draws_of(flow.eval(), x), log_probs(flow, y, x)),
    }
    if seed == 0:
        row["examples"] = examples(name, flow)
    return row


@torch.no_grad()
def examples(name: str, flow: Flow) -> dict[str, Any]:
    """The predicted densities of the first three test rows, over y in its own unit."""
    table = prepared(name)
    y, x = table.test
    ends = table.train[0].min().item() - 0.3, table.train[0].max().item() + 0.3
    grid = torch.linspace(*ends, 161)
    densities = [
        (flow.log_prob(grid[:, None], one.expand(len(grid), -1)).exp() / table.unit).tolist()
        for one in x[:3]
    ]
    return {
        "y": [round(v * table.unit + table.mean, 4) for v in grid.tolist()],
        "density": [[float(f"{v:.4g}") for v in one] for one in densities],
        "came": [round(v * table.unit + table.mean, 4) for v in y[:3, 0].tolist()],
    }


def boosted(name: str, lr: float, seed: int, split: str) -> tuple[Tensor, list[int]]:
    """Sorted predicted quantiles ``(20, n)`` of a split, and the trees of each."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    table = prepared(name)
    y, x = table.train
    found, trees = [], []
    for quantile in QUANTILES:
        model = HistGradientBoostingRegressor(
            loss="quantile",
            quantile=quantile,
            learning_rate=lr,
            max_iter=1000,
            early_stopping=True,
            validation_fraction=0.15,
            random_state=seed,
        )
        model.fit(x.numpy(), y[:, 0].numpy())
        found.append(torch.from_numpy(model.predict(getattr(table, split)[1].numpy())).float())
        trees.append(int(model.n_iter_))
    # Separate models may cross: a quantile of 0.6 below that of 0.5. Sorted they cannot.
    return torch.stack(found).sort(0).values, trees


def pinball(quantiles: Tensor, y: Tensor) -> Tensor:
    """CRPS of each row: twice the pinball loss, averaged over the middles of equal shares."""
    share = torch.tensor(QUANTILES)[:, None]
    error = y - quantiles
    return 2 * torch.maximum(share * error, (share - 1) * error).mean(0)


def ranks_of(quantiles: Tensor, y: Tensor) -> Tensor:
    """The middle of the share in which each y lies; the first and the last are half as wide."""
    return (quantiles < y).float().mean(0).clamp(1 / 80, 1 - 1 / 80)


def measure_boosting(results: Results, name: str, seed: int) -> dict[str, Any]:
    table = prepared(name)
    tried = results.section("search", name, BOOSTING)
    for lr in BOOSTING_RATES:
        if f"lr {lr:g}" not in tried:
            quantiles, _ = boosted(name, lr, 0, "valid")
            tried[f"lr {lr:g}"] = pinball(quantiles, table.valid[0][:, 0]).mean().item()
            results.write()
    lr = min(BOOSTING_RATES, key=lambda rate: tried[f"lr {rate:g}"])
    begin = time.process_time()
    quantiles, trees = boosted(name, lr, seed, "test")
    seconds = time.process_time() - begin
    y = table.test[0][:, 0]
    row = scored(pinball(quantiles, y) * table.unit, ranks_of(quantiles, y))
    facts = {"seed": seed, "lr": lr, "trees": sum(trees), "fit_seconds": round(seconds, 2)}
    return {**facts, "stopped_improving": max(trees) < 1000, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="*", choices=SETS, default=SETS, metavar="SET")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=machine.ROOT / "results" / "regression.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    what = (
        "CRPS in the unit of y (500 draws of each prediction; boosting: 20 quantiles), share of "
        "test rows in the central interval of each level, test log-likelihood in nats a row of the "
        "standardised y (exact) and its gain over the line, row by row; seconds are processor time"
    )
    command = f"python -m benchmarks.regression --threads {options.threads}"
    facts = machine.facts("benchmarks.regression") | {"what": what, "command": command}
    facts |= {"levels": [round(level, 2) for level in LEVELS.tolist()]}
    results = Results(options.out, facts)
    for name in options.sets:
        table = prepared(name)
        rows = {split: len(getattr(table, split)[0]) for split in ("train", "valid", "test")}
        results.section("sets")[name] = {"rows": rows, "deviation_of_y": table.unit}
        for model in options.models:
            entry = results.section("rows", name, model)
            if model in FLOWS:
                entry |= search(results, name, model)
            runs = entry.setdefault("runs", [])
            for seed in range(len(runs), 1 if model == LINE else options.seeds):
                if model in FLOWS:
                    runs.append(measure_flow(name, model, entry, seed))
                elif model == BOOSTING:
                    runs.append(measure_boosting(results, name, seed))
                else:
                    runs.append(measure_line(name))
                results.write()
                hidden = ("valid_by_update", "examples", "coverage")
                shown = {k: v for k, v in runs[-1].items() if k not in hidden}
                print(f"{name}, {model}: {shown}", flush=True)


if __name__ == "__main__":
    main()
