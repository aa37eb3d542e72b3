"""The six claims about MixerFlow, on models that have stopped improving.

    1 fewer parameters for the same bits/dim    4 robust to a permutation of the pixels
    2 better bits/dim                           5 scales better with the size of the image
    3 the shift helps                           6 more informative latents

The models are those of `benchmarks.mixer_claims`, each with the learning rate that `search` found
for it. The rate stays as it is, averaged weights are judged, and a run ends when some validations
in a row have found nothing better; a row says if its budget of steps ended it before. The
fifth claim is one about costs, which `speed` measures: its rows "an image of 16 x 16" and larger.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import mixer_claims
from benchmarks.gpu.place import Place
from benchmarks.gpu.training import judge, train

WHAT = (
    "bits/dim of test images at a plateau of the validation loss, lower bounds on the likelihood "
    "with one draw of noise; probe: accuracy of a linear classifier on the latents"
)
# The claims in the order of their worth, by the experiment that tries them.
ORDER = ("mnist", "colour", "fashion", "shift", "permuted")


def experiments() -> dict[str, mixer_claims.Row]:
    """All models, as `experiment: name`."""
    return {
        f"{experiment}: {name}": row
        for experiment in ORDER
        for name, row in mixer_claims.EXPERIMENTS[experiment].items()
    }


@dataclass(frozen=True)
class Sizes:
    """What is trained, and how.

    Attributes:
        rates, short: the learning rates of the search, and its steps.
        rows: of each split at most, None for all.
    """

    models: dict[str, mixer_claims.Row]
    seeds: int
    options: dict[str, Any]
    rates: tuple[float, ...]
    short: int
    rows: dict[str, int | None]


PLATEAU = {"schedule": "constant", "warmup": 100, "ema": 0.998}
LARGE = Sizes(
    models=experiments(),
    seeds=3,
    options=PLATEAU | {"steps": 20_000, "batch_size": 256, "validate_every": 250, "patience": 8},
    rates=(1e-3, 3e-3, 9e-3),
    short=600,
    rows={"train": None, "valid": 2000, "test": None},
)
SMALL = Sizes(
    models={
        "mnist: MixerFlow": mixer_claims.Row(partial(mixer_claims.bands, layers=1, hidden=(8,))),
        "fashion: Glow": mixer_claims.fashion(partial(mixer_claims.glow, steps=1, hidden=4)),
    },
    seeds=1,
    options={**PLATEAU, "ema": 0.9, "warmup": 5}
    | {"steps": 60, "batch_size": 16, "validate_every": 10, "patience": 2},
    rates=(3e-3, 1e-2),
    short=20,
    rows={"train": 500, "valid": 50, "test": 50},
)


def rows(place: Place) -> dict[str, Callable[[], Any]]:
    sizes = SMALL if place.small else LARGE
    found: dict[str, Callable[[], Any]] = {}
    for experiment in dict.fromkeys(name.split(":")[0] for name in sizes.models):
        mine = [name for name in sizes.models if name.split(":")[0] == experiment]
        # The first seed of all first: three of one model say less than one of each.
        for seed in range(sizes.seeds):
            for name in mine:
                found[f"{name}, seed {seed}"] = partial(measure, name, seed, sizes, place)
    return found


def measure(name: str, seed: int, sizes: Sizes, place: Place) -> dict[str, Any] | None:
    """Train a model to its plateau, judge it, and read the class from its latents if asked.

    None as long as there is no learning rate for it.
    """
    from benchmarks.gpu.search import best_rates

    row, rates = sizes.models[name], best_rates(place)
    if name not in rates:
        return None
    torch.manual_seed(seed)
    flow = row.make(row.shape)
    parts = fewer(mixer_claims.splits(row), sizes)
    facts: dict[str, Any] = {"data": row.data, "seed": seed, "lr": rates[name]}
    facts |= train(
        f"{slug(name)}_{seed}",
        flow,
        (parts["train"],),
        (parts["valid"],),
        place,
        **(sizes.options | {"lr": rates[name], "seed": seed}),
    )
    facts |= judge(flow, (parts["test"],))
    return facts | (mixer_claims.probe(row, flow) if row.probe else {})


def fewer(parts: dict[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    return {split: x[: sizes.rows[split]] for split, x in parts.items()}


def slug(name: str) -> str:
    """The name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower())
