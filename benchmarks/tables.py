"""Densities of real tables: flows and what scikit-learn has, trained until they stop improving.

    python -m benchmarks.tables --threads 1                          # goes on where it stopped
    python -m benchmarks.tables --sets wine --models MAF --seeds 1   # only these rows

Every model gets the same rows, see `prepared`. Every flow gets the same search: the learning rate,
then the weight decay, by the validation loss of short runs with seed 0; then five seeds train with
the best until the validation loss has had no new best for a while. The weight decay of a ferumal
flow is the squared RKHS norm of its conditioners. Number of components and bandwidth of
scikit-learn's models are picked by the validation loss, too. Subsets of 100 and 500
training rows are validated and tested on all rows of the table. Iris is left out: the standard
error over its 22 test rows is larger than any difference. Writes results/tables.json after every
row.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.residual_flows import Results
from nflib import data, models
from nflib.core import Compose, Flow, StandardNormal
from nflib.elementwise import Affine, MonotoneNet, RationalQuadraticSpline
from nflib.kernels import with_rkhs_penalty
from nflib.metrics import log_probs
from nflib.models.parts import linear_couplings
from nflib.nets import MLP
from nflib.train import NonFiniteError, fit

SEEDS = 5
RATES, DECAYS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (0.01, 0.1, 1.0)
# Of the squared RKHS norms, before they are divided by the number of training rows.
PENALTIES = (1.0, 10.0, 100.0)
HIDDEN, NARROW = (64, 64), (16, 16)
SMALL = (100, 500)
Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Budget:
    """How long a flow may train; patience, of ten validations, ends it earlier as a rule."""

    steps: int
    search_steps: int
    validate_every: int
    ema: float


FEW, MANY = Budget(4000, 300, 20, 0.98), Budget(15_000, 1000, 200, 0.995)


def budget(x: Rows) -> Budget:
    return FEW if len(x["train"]) < 2000 else MANY


def lu_coupling(dim: int, hidden: tuple[int, ...] = HIDDEN) -> Flow:
    """Affine couplings with LU layers between them: Glow, with a vector for an image."""
    net = partial(MLP, hidden=hidden)
    return Flow(Compose(*linear_couplings(dim, 8, Affine(), net)), StandardNormal(dim))


def autoregressive_spline(dim: int) -> Flow:
    return models.maf(dim, 3, HIDDEN, elementwise=RationalQuadraticSpline(8))


def autoregressive_monotone(dim: int) -> Flow:
    """NAF as published: autoregressive, where `models.naf` has couplings."""
    return models.maf(dim, 3, HIDDEN, elementwise=MonotoneNet(8))


FLOWS: dict[str, Callable[[int], Flow]] = {
    "RealNVP": lambda dim: models.realnvp(dim, 8, HIDDEN),
    "Glow": lu_coupling,
    "Spline coupling": lambda dim: models.spline_flow(dim, 4, 8, HIDDEN),
    "MAF": lambda dim: models.maf(dim, 5, HIDDEN),
    "Spline MAF": autoregressive_spline,
    "NAF": autoregressive_monotone,
    "Residual flow": lambda dim: models.residual_flow(dim, 4, (96, 96)),
    "Ferumal RealNVP": models.ferumal,
    "Ferumal Glow": partial(models.ferumal, backbone="glow"),
    "RealNVP 16": lambda dim: models.realnvp(dim, 8, NARROW),
    "Glow 16": lambda dim: lu_coupling(dim, NARROW),
}


class Scikit:
    """A model of scikit-learn, asked as a flow is."""

    def __init__(self, fitted: Any, parameters: int) -> None:
        self.fitted, self.parameters = fitted, parameters

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.fitted.score_samples(x.double().numpy()))

    def sample(self, n: int) -> Any:
        return self.fitted.sample(n)


def gaussians(x: Rows, seed: int, components: tuple[int, ...]) -> tuple[Scikit, dict[str, Any]]:
    """Gaussians of full covariance; their number, and what is added to variances, by validation."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    n, dim = x["train"].shape
    found = []
    for k in components:
        for added in (1e-6, 1e-2):
            if k * (dim + 1) <= n:
                model = GaussianMixture(k, reg_covar=added, max_iter=200, random_state=seed)
                with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
                    model.fit(x["train"].double().numpy())
                found.append((model.score(x["valid"].double().numpy()), k, added, model))
    _, k, added, best = max(found, key=lambda one: one[0])
    count = k * (dim + dim * (dim + 1) // 2) + k - 1
    return Scikit(best, count), {"components": k, "added_variance": added}


def kernels(x: Rows, seed: int) -> tuple[Scikit, dict[str, Any]]:
    """A Gaussian kernel at every training row; the bandwidth by validation."""
    from sklearn.neighbors import KernelDensity

    widths = [0.05 * 1.25**k for k in range(16)]  # to 1.4 standard deviations
    fitted = [
        KernelDensity(bandwidth=width, rtol=1e-4).fit(x["train"].double().numpy())
        for width in widths
    ]
    held_out = x["valid"][:2000].double().numpy()
    best = max(fitted, key=lambda model: model.score(held_out))
    return Scikit(best, x["train"].numel()), {"bandwidth": best.bandwidth}


SCIKIT: dict[str, Callable[[Rows, int], tuple[Scikit, dict[str, Any]]]] = {
    "Gaussian": partial(gaussians, components=(1,)),
    "Mixture of Gaussians": partial(gaussians, components=(1, 2, 4, 8, 16, 32, 64, 128)),
    "Kernel density": kernels,
}
# Nothing in these depends on the seed.
FIXED = ("Gaussian", "Kernel density")
MODELS = [*SCIKIT, *FLOWS]
OF_SMALL = [
    *SCIKIT,
    *("RealNVP", "Glow", "RealNVP 16", "Glow 16", "Ferumal RealNVP", "Ferumal Glow"),
]
TABLES = ("wine", "breast_cancer", "diabetes", "power_plant", "protein")
SETS = [*TABLES, *(f"{name} {n}" for name in ("power_plant", "protein") for n in SMALL)]


@cache
def prepared(name: str) -> tuple[Rows, list[str]]:
    """The rows of each split as every model sees them, and what became of the columns.

    A real-valued target is a column like the others. As Papamakarios et al. 2017
    (https://arxiv.org/abs/1705.07057, appendix D) do, columns are left out that are discrete
    (fewer distinct values than a tenth of the rows, or one value in a tenth of them) or correlated
    above 0.98 with one that stays; here also such with a value more than 20 standard deviations
    out, which would decide the mean by itself. Of the others, rows are left out whose value a
    hundred training rows share, for there is no density there. What stays gets uniform noise of
    one step of its rounding, drawn once, and is standardised. The training rows decide all this.
    """
    name, _, count = name.partition(" ")
    splits = {s: data.load(name, s) for s in ("train", "valid", "test")}
    rows = {s: d.x.double() for s, d in splits.items()}
    y = splits["train"].y
    if y is not None and y.is_floating_point():
        mean, std = y.double().mean(), y.double().std()
        for s, d in splits.items():
            assert d.y is not None
            rows[s] = torch.cat([rows[s], (d.y[:, None].double() - mean) / std], 1)
    kept, said = columns(rows["train"])
    shared = [common(rows["train"][:, k]) for k in kept]
    for s, x in rows.items():
        has = torch.stack([torch.isin(x[:, k], v) for k, v in zip(kept, shared, strict=True)])
        rows[s] = x[~has.any(0)]
        if bool(has.any()):
            said.append(f"{s}: {int(has.any(0).sum())} rows with values that many share")
    steps = torch.stack([step(rows["train"][:, k]) for k in kept])
    for number, (s, x) in enumerate(rows.items()):
        noise = torch.rand(len(x), len(kept), generator=torch.Generator().manual_seed(number))
        rows[s] = x[:, kept] + (noise.double() - 0.5) * steps
    mean, std = rows["train"].mean(0), rows["train"].std(0)
    scaled = {s: ((x - mean) / std).float() for s, x in rows.items()}
    if count:
        scaled["train"] = scaled["train"][: int(count)]
    return scaled, said


def columns(x: Tensor) -> tuple[list[int], list[str]]:
    """The columns that stay, and a sentence on each of the others."""
    kept: list[int] = []
    said = []
    related = torch.corrcoef(x.T).abs()
    for k, column in enumerate(x.T):
        counts, farthest = column.unique(return_counts=True)[1], column.abs().max().item()
        if len(counts) < len(x) / 10:
            said.append(f"column {k}: {len(counts)} values in {len(x)} rows")
        elif counts.max() > len(x) / 10:
            said.append(f"column {k}: one value in {int(counts.max())} of {len(x)} rows")
        elif farthest > 20:
            said.append(f"column {k}: a value {farthest:.0f} standard deviations out")
        elif kept and related[k, kept].max() > 0.98:
            other = kept[int(related[k, kept].argmax())]
            said.append(f"column {k}: correlated {related[k, other]:.3f} with column {other}")
        else:
            kept.append(k)
    return kept, said


def common(column: Tensor) -> Tensor:
    """The values that a hundred rows or more share."""
    values, counts = column.unique(return_counts=True)
    return values[counts >= 100]


def step(column: Tensor) -> Tensor:
    """The step of a column's rounding: the least distance of two values, if any value repeats."""
    distinct = column.unique()
    # Equal values are equal in float32, too; distances below its precision are none.
    gaps = distinct.diff()
    gaps = gaps[gaps > 1e-6]
    return gaps.min() if len(distinct) < len(column) else torch.zeros((), dtype=column.dtype)


def train(model: str, x: Rows, lr: float, decay: float, seed: int, steps: int) -> tuple[Flow, Any]:
    """The trained flow and its history."""
    torch.manual_seed(seed)
    flow = FLOWS[model](x["train"].shape[1])
    n, limits = len(x["train"]), budget(x)
    is_kernel = model.startswith("Ferumal")
    history = fit(
        flow,
        x["train"],
        x["valid"],
        steps=steps,
        lr=lr,
        weight_decay=0.0 if is_kernel else decay,
        loss=with_rkhs_penalty(decay / n) if is_kernel else None,
        schedule="constant",
        warmup=20,
        clip=5.0,
        ema=limits.ema,
        batch_size=min(256, max(32, n // 8)),
        validate_every=limits.validate_every,
        patience=10,
        seed=seed,
        progress=False,
    )
    return flow, history


def measure_flow(name: str, model: str, chosen: dict[str, float], seed: int) -> dict[str, Any]:
    """One row: a flow trained until it stops improving, and judged."""
    x, _ = prepared(name)
    begin = time.process_time()
    try:
        flow, history = train(model, x, chosen["lr"], chosen["weight_decay"], seed, budget(x).steps)
    except NonFiniteError as error:
        return {"seed": seed, "failed": str(error)}
    seconds = time.process_time() - begin
    updates = int(history.records[-1]["step"])
    return {
        "seed": seed,
        "parameters": sum(p.numel() for p in flow.parameters()),
        "updates": updates,
        "best_update": history.best_step,
        "epochs": round(history.records[-1]["epoch"], 2),
        "stopped_improving": history.best_step < updates,
        "fit_seconds": round(seconds, 2),
        "valid_by_update": [round(value, 4) for value in history.column("valid")],
        **judged(name, flow.eval(), x),
    }


def measure_scikit(name: str, model: str, seed: int) -> dict[str, Any]:
    """One row: a model of scikit-learn, fitted and judged."""
    x, _ = prepared(name)
    begin = time.process_time()
    fitted, chosen = SCIKIT[model](x, seed)
    seconds = time.process_time() - begin
    row = {"seed": seed, "parameters": fitted.parameters, "fit_seconds": round(seconds, 2)}
    return row | chosen | judged(name, fitted, x)


def judged(name: str, model: Any, x: Rows) -> dict[str, Any]:
    """Mean log-likelihoods in nats a row, and how far the test's is above that of a Gaussian.

    Rows differ much more than models do, so the difference has its own, smaller standard error.
    """
    test = log_probs(model, x["test"]).double()
    gain = test - baseline(name)
    n = len(test)
    return {
        "train": log_probs(model, x["train"][:2000]).double().mean().item(),
        "valid": log_probs(model, x["valid"]).double().mean().item(),
        "test": test.mean().item(),
        "standard_error": test.std().item() / n**0.5,
        "gain": gain.mean().item(),
        "gain_standard_error": gain.std().item() / n**0.5,
        "sampling_seconds": sampling_seconds(model),
    }


def sampling_seconds(model: Any, samples: int = 1000) -> float:
    """Processor time of so many samples, after a few that warm up."""
    model.sample(10)
    begin = time.process_time()
    model.sample(samples)
    return round(time.process_time() - begin, 4)


@cache
def baseline(name: str) -> Tensor:
    """What a Gaussian says of each test row."""
    x, _ = prepared(name)
    return gaussians(x, 0, (1,))[0].log_prob(x["test"])


def search(results: Results, name: str, model: str) -> dict[str, float]:
    """The learning rate with the best validation loss of a short run, then the weight decay."""
    found = results.section("search", name, model)
    x, _ = prepared(name)

    def loss(lr: float, decay: float) -> float:
        key = f"lr {lr:g}, weight decay {decay:g}"
        if key not in found:
            try:
                history = train(model, x, lr, decay, 0, budget(x).search_steps)[1]
                found[key] = min(history.column("valid"))
            except NonFiniteError:
                found[key] = None  # the loss was not finite any more
            results.write()
        return float("inf") if found[key] is None else found[key]

    decays = PENALTIES if model.startswith("Ferumal") else DECAYS
    lr = min(RATES, key=lambda rate: loss(rate, decays[0]))
    return {"lr": lr, "weight_decay": min(decays, key=lambda decay: loss(lr, decay))}


def describe(results: Results, name: str) -> None:
    """What the models see of a table."""
    x, said = prepared(name)
    results.section("sets")[name] = {
        "columns": x["train"].shape[1],
        "rows": {split: len(rows) for split, rows in x.items()},
        "left_out": said,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="*", choices=SETS, default=SETS, metavar="SET")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=machine.ROOT / "results" / "tables.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    what = (
        "mean log-likelihood of the test rows in nats a row, exact, of standardised columns with "
        "uniform noise of one step of their rounding; standard errors over rows; gain is the "
        "difference to a Gaussian of full covariance, row by row; seconds are processor time, of "
        "sampling for 1,000 samples; search is the validation loss after a short run with seed 0"
    )
    # --sets and --models only choose rows: the whole file is made by the command without them.
    command = f"python -m benchmarks.tables --threads {options.threads}"
    facts = machine.facts("benchmarks.tables") | {"what": what, "command": command}
    facts |= {"budgets": {"below 2000 rows": asdict(FEW), "others": asdict(MANY)}}
    results = Results(options.out, facts)
    for name in options.sets:
        describe(results, name)
        allowed = OF_SMALL if " " in name else MODELS
        for model in [model for model in allowed if model in options.models]:
            entry = results.section("rows", name, model)
            if model in FLOWS:
                entry |= search(results, name, model)
            runs = entry.setdefault("runs", [])
            for seed in range(len(runs), 1 if model in FIXED else options.seeds):
                if model in FLOWS:
                    runs.append(measure_flow(name, model, entry, seed))
                else:
                    runs.append(measure_scikit(name, model, seed))
                results.write()
                shown = {k: v for k, v in runs[-1].items() if k != "valid_by_update"}
                print(f"{name}, {model}: {shown}", flush=True)


if __name__ == "__main__":
    main()
