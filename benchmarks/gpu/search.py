"""A learning rate for each model of the claims: the same small search for all.

Each model makes the same short run with each rate from the same seed; the best on the validation
images wins. A rate with which the run fails has lost.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import claims
from benchmarks.gpu.place import Place
from benchmarks.gpu.store import failed, read
from benchmarks.gpu.training import train
from benchmarks.mixer_claims import splits

WHAT = "validation bits/dim after a short run with each learning rate, and the best rate"


def rows(place: Place) -> dict[str, Callable[[], Any]]:
    sizes = claims.SMALL if place.small else claims.LARGE
    return {name: partial(measure, name, sizes, place) for name in sizes.models}


def measure(name: str, sizes: claims.Sizes, place: Place) -> dict[str, Any]:
    """Runs of one model, one after the other."""
    row = sizes.models[name]
    parts = claims.fewer(splits(row), sizes)
    found: dict[str, Any] = {}
    for lr in sizes.rates:
        torch.manual_seed(0)
        flow = row.make(row.shape)
        options = sizes.options | {"steps": sizes.short, "lr": lr, "patience": None}
        try:
            facts = train(
                f"{claims.slug(name)}_{lr:g}",
                flow,
                (parts["train"],),
                (parts["valid"],),
                place,
                **options,
            )
        except (ArithmeticError, ValueError) as error:
            found[f"{lr:g}"] = {"failed": str(error)[:200]}
            continue
        best = min(point["valid"] for point in facts["history"])
        found[f"{lr:g}"] = {"valid, nats": best, "steps": facts["steps"]}
    judged = {lr: run["valid, nats"] for lr, run in found.items() if "valid, nats" in run}
    if not judged:
        raise ArithmeticError(f"{name} fails with every learning rate.")
    return {"rates": found, "best": float(min(judged, key=lambda lr: judged[lr]))}


def best_rates(place: Place) -> dict[str, float]:
    """The rates that have been found, by model."""
    found = read(place.out / "search.json").get("rows", {})
    return {name: row["best"] for name, row in found.items() if not failed(row)}
