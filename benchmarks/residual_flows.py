"""Residual flow, RealNVP and planar flow, trained until the validation loss is flat.

    python -m benchmarks.residual_flows --threads 1     # goes on where it stopped

Two-dimensional densities with 324 parameters, and scikit-learn's digits with about 110,000. The
learning rate of each model is picked from the same few, by the validation loss after a short run
with seed 0; then three seeds train with it until the validation loss has had no new best for a
while. Of the residual flow of the digits (seed 0) it is also measured what a series that is cut off
misses, how far the estimates scatter, and what a log-det keeps in memory for the backward pass.
Writes results/residual_flows.json after every row.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from benchmarks import machine
from nflib import data, models
from nflib.core import Compose, Flow, StandardNormal
from nflib.linear import LU
from nflib.metrics import evaluate
from nflib.normalization import ActNorm
from nflib.planar import Planar
from nflib.residual import (
    LipschitzMLP,
    LogDet,
    ResidualBlock,
    Roulette,
    Series,
    jacobian_matrix,
    pullback,
    weighted_series,
)
from nflib.train import NonFiniteError, fit

LEVELS, SEEDS, DRAWS = 17, 3, 16
DENSITIES = ("moons", "checkerboard", "spirals")


def planar(depth: int) -> Flow:
    """Planar maps one after the other, in the plane."""
    return Flow(Compose(ActNorm(2), *[Planar(2) for _ in range(depth)]), StandardNormal(2))


def planar_of_digits() -> Flow:
    """Planar maps with linear ones between them, behind the logit."""
    layers = [layer for _ in range(25) for layer in (LU(64), Planar(64))]
    return Flow(Compose(*models.dequantize(LEVELS), ActNorm(64), *layers), StandardNormal(64))


@dataclass(frozen=True)
class Task:
    """What the models are trained on and how."""

    models: dict[str, Callable[[], Flow]]
    rates: tuple[float, ...]
    batch_size: int
    validate_every: int
    patience: int
    steps: int
    search_steps: int
    schedule: Literal["cosine", "constant"]
    weight_decay: float = 0.0


PLANE = Task(
    {
        "residual flow": partial(models.residual_flow, 2, 4, (6, 6)),
        "RealNVP": partial(models.realnvp, 2, 4, (6, 7)),
        "planar flow": partial(planar, 64),
    },
    rates=(1e-2, 3e-2, 1e-1),
    batch_size=256,
    validate_every=100,
    patience=10,
    steps=1500,
    search_steps=500,
    schedule="cosine",
)
# In the plane the residual flow trains with exact log-dets; once it plays roulette instead.
CONTROL = "residual flow, roulette"
PLAYING = partial(models.residual_flow, 2, 4, (6, 6), train_log_det=Roulette())
DIGITS = Task(
    {
        "residual flow": partial(models.residual_flow, 64, 5, (96, 96), grey_levels=LEVELS),
        "RealNVP": partial(models.realnvp, 64, 6, (96, 96), grey_levels=LEVELS),
        "planar flow": planar_of_digits,
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    batch_size=128,
    validate_every=20,
    patience=15,
    steps=3000,
    search_steps=200,
    schedule="constant",
    weight_decay=0.01,
)


def splits(name: str) -> dict[str, Tensor]:
    """Training, validation and test rows."""
    if name == "digits":
        return {s: data.load("digits", s).x.flatten(1) for s in ("train", "valid", "test")}
    sizes = {"train": 20_000, "valid": 5_000, "test": 10_000}
    return {split: data.load(name, split, n=n).x for split, n in sizes.items()}


def train(task: Task, model: str, x: dict[str, Tensor], lr: float, seed: int, steps: int) -> Any:
    """The trained flow and its history."""
    torch.manual_seed(seed)
    flow = PLAYING() if model == CONTROL else task.models[model]()
    history = fit(
        flow,
        x["train"],
        x["valid"],
        steps=steps,
        lr=lr,
        schedule=task.schedule,
        clip=1.0,
        ema=0.99,
        batch_size=task.batch_size,
        weight_decay=task.weight_decay,
        validate_every=task.validate_every,
        patience=task.patience,
        seed=seed,
        progress=False,
    )
    return flow, history


def measure(task: Task, name: str, model: str, lr: float, seed: int) -> dict[str, Any]:
    """One row: a model trained until it stops improving, and judged."""
    x = splits(name)
    begin = time.perf_counter()
    flow, history = train(task, model, x, lr, seed, task.steps)
    seconds = time.perf_counter() - begin
    updates = int(history.records[-1]["step"])
    torch.manual_seed(0)
    row = {
        "seed": seed,
        "parameters": sum(p.numel() for p in flow.parameters()),
        "updates": updates,
        "best_update": history.best_step,
        "epochs": round(history.records[-1]["epoch"], 2),
        "seconds": round(seconds, 1),
        "valid": [round(value, 4) for value in history.column("valid")],
    }
    if name != "digits":
        score = evaluate(flow, x["test"])
        row |= {"test": score.nats, "standard_error": score.standard_error}
        return row | ({"weights": packed(flow)} if seed == 0 else {})
    found = [evaluate(flow, x["test"]).bits_per_dim() for _ in range(DRAWS)]
    row |= {"test": sum(found) / DRAWS}
    row |= {"iw32": evaluate(flow, x["test"], samples=32).bits_per_dim()}
    if model == "residual flow" and seed == 0:
        row |= {"series": series(flow, x["test"][:64])}
    return row


def packed(flow: Flow) -> str:
    """The parameters, one after the other, as the bytes of float32 numbers in base64."""
    numbers = nn.utils.parameters_to_vector(flow.parameters()).detach()
    return base64.b64encode(numbers.numpy().tobytes()).decode()


@torch.no_grad()
def series(flow: Flow, x: Tensor, draws: int = 200) -> dict[str, Any]:
    """Bias of the series and scatter of the estimates, in nats an image, over all blocks.

    The bias is that of exact traces, without any draw: only what is cut off counts.
    """
    flow.eval()
    places, here = [], x
    for layer in cast(Compose, flow.bijection):
        if isinstance(layer, ResidualBlock):
            places.append((layer.net, here))
        here = layer(here)[0]
    terms = 30
    parts, exact, largest = torch.zeros(terms, len(x)).double(), torch.zeros(len(x)).double(), []
    for net, at in places:
        matrix = jacobian_matrix(pullback(net, at)[1], at).double()
        largest.append(torch.linalg.matrix_norm(matrix, 2).max().item())
        eye = torch.eye(matrix.shape[-1]).double()
        exact += torch.linalg.slogdet(eye + matrix)[1]
        power = eye.expand_as(matrix)
        for k in range(1, terms + 1):
            power = power @ matrix
            parts[k - 1] += (-1) ** (k + 1) / k * power.diagonal(dim1=1, dim2=2).sum(1)
    missed = parts.cumsum(0) - exact
    estimates: dict[str, LogDet] = {f"series {n}": Series(n) for n in (1, 2, 3, 5, 10, 20)}
    for law in ("geometric", "poisson"):
        estimates |= {f"{law} {b}": Roulette(b, 2.0, law) for b in (0, 1, 2, 4, 8)}
    spread = {}
    for name, estimate in estimates.items():
        found = torch.zeros(draws, len(x)).double()
        for draw in found:
            for net, at in places:
                draw += estimate(pullback(net, at)[1], at).double()
        spread[name] = {
            "std": found.std(0).mean().item(),
            "mean": (found - exact).mean().item(),
            "standard_error": (found - exact).mean(1).std().item() / draws**0.5,
        }
    return {
        "exact": exact.mean().item(),
        "bias": missed.mean(1).tolist(),
        "largest_singular_value": largest,
        "estimates": spread,
        "draws": draws,
        "images": len(x),
    }


def memory() -> dict[str, Any]:
    """Bytes that the backward pass of one block's log-det holds, by number of terms."""
    torch.manual_seed(0)
    net, x = LipschitzMLP(64, (96, 96)), torch.randn(128, 64, requires_grad=True)
    found: dict[str, Any] = {"terms": [1, 2, 4, 8, 12, 16, 20], "batch": 128, "dim": 64}
    ways = {"in the forward pass": weighted_series, "plain autograd": plain_series}
    for name, way in ways.items():
        found[name] = [held(partial(way, weights=[1.0] * n), net, x) for n in found["terms"]]
    return found


def plain_series(pull: Callable[[Tensor], Tensor], x: Tensor, weights: list[float]) -> Tensor:
    """The series with the graph of each of its terms."""
    v = torch.randn_like(x).sign()
    value, power = torch.zeros(len(x)), v
    for k, weight in enumerate(weights, 1):
        power = pull(power)
        value = value + (-1) ** (k + 1) * weight / k * (power * v).sum(1)
    return value


def held(way: Callable[..., Tensor], net: nn.Module, x: Tensor) -> int:
    """Bytes of all tensors that autograd saves, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value, pull = pullback(net, x)
        way(pull, x)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)


class Results:
    """The file, written whole after every row, so that a run goes on where the last one stopped."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self.found = json.loads(path.read_text()) if path.is_file() else {}
        self.found |= facts

    def section(self, *names: str) -> dict[str, Any]:
        """A part of the file, made if it is not there."""
        part = self.found
        for name in names:
            part = part.setdefault(name, {})
        return part

    def write(self) -> None:
        beside = self.path.with_suffix(".part")
        machine.write(beside, self.found)
        os.replace(beside, self.path)


def search(results: Results, task: Task, name: str, model: str) -> float:
    """The learning rate with the best validation loss after a short run with seed 0."""
    row = results.section("search", "digits" if name == "digits" else "plane", model)
    for lr in task.rates:
        if str(lr) not in row:
            try:
                history = train(task, model, splits(name), lr, 0, task.search_steps)[1]
                row[str(lr)] = min(history.column("valid"))
            except NonFiniteError:
                row[str(lr)] = None  # the loss was not finite any more
            results.write()
            print(f"{name}, {model}, learning rate {lr}: {row[str(lr)]}", flush=True)
    return min((lr for lr in task.rates if row[str(lr)] is not None), key=lambda lr: row[str(lr)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--out", type=Path, default=machine.ROOT / "results" / "residual_flows.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    what = (
        "test log-likelihood in nats (densities; exact), bits/dim (digits; lower bounds with one "
        f"draw of the dequantization's noise, the mean of {DRAWS} repeats, and with 32; log-dets "
        "exact) of models trained until the validation loss had no new best for a while; search is "
        "the validation loss by learning rate after a short run; memory is in bytes"
    )
    results = Results(options.out, {"what": what, **machine.facts("benchmarks.residual_flows")})
    if "memory" not in results.found:
        results.section("memory").update(memory())
        results.write()
    tasks = [(DIGITS, "digits"), *((PLANE, name) for name in DENSITIES)]
    plan = [(task, name, model) for model in PLANE.models for task, name in tasks]
    for task, name, model in [*plan, (PLANE, "moons", CONTROL)]:
        searched = "residual flow" if model == CONTROL else model
        lr = search(results, task, "digits" if name == "digits" else "moons", searched)
        entry = results.section("rows", name, model)
        entry["lr"] = lr
        runs = entry.setdefault("runs", [])
        for seed in range(len(runs), SEEDS):
            runs.append(measure(task, name, model, lr, seed))
            results.write()
            found = {k: v for k, v in runs[-1].items() if k not in ("weights", "series")}
            print(f"{name}, {model}: {found}", flush=True)


if __name__ == "__main__":
    main()
