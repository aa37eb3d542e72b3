"""A MixerFlow on MNIST, as good as some minutes of a GPU make it with fewer than a million numbers.

Bands of one row: the matrix is the image. Autoregressive flows along its rows and along its
columns, each number mapped by the CDF of a mixture of logistics: `benchmarks.mixer_claims` finds
autoregressive flows ahead of couplings, and a mixture is to an affine map what MAF MoG is to MAF.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.place import Place
from benchmarks.gpu.training import judge, keep, train
from nflib import data, models
from nflib.core import Flow
from nflib.elementwise import LogisticMixtureCDF

WHAT = (
    "MixerFlow on MNIST: bits/dim of the test images, lower bounds on the likelihood with one draw "
    "of uniform noise and with more"
)


@dataclass(frozen=True)
class Sizes:
    """The model, its training, and how many images judge it."""

    layers: int
    hidden: tuple[int, ...]
    components: int
    training: dict[str, Any]
    draws: int
    rows: dict[str, int | None] = field(default_factory=dict)  # of each split, None for all


LARGE = Sizes(
    layers=6,
    hidden=(160,),
    components=8,
    training={
        "seconds": 105.0,
        "batch_size": 512,
        "lr": 5e-3,
        "warmup": 200,
        "ema": 0.999,
        "validate_every": 500,
    },
    draws=16,
    rows={"train": None, "valid": 4000, "test": None},
)
SMALL = Sizes(
    layers=2,
    hidden=(32,),
    components=2,
    training={
        "seconds": 12.0,
        "batch_size": 64,
        "lr": 5e-3,
        "warmup": 20,
        "ema": 0.99,
        "validate_every": 50,
    },
    draws=2,
    rows={"train": 5000, "valid": 200, "test": 200},
)


def rows(place: Place) -> dict[str, Callable[[], Any]]:
    return {"MixerFlow": partial(measure, SMALL if place.small else LARGE, place)}


def make(sizes: Sizes) -> Flow:
    return models.mixerflow(
        (1, 28, 28),
        1,
        sizes.layers,
        sizes.hidden,
        extraction="bands",
        flow="maf",
        elementwise=LogisticMixtureCDF(sizes.components),
        grey_levels=256,
    )


def measure(sizes: Sizes, place: Place) -> dict[str, Any]:
    """Train and judge. If it fails, the compiler is left out and the learning rate halved, once."""
    splits = {s: data.load("mnist", s, n=n).x for s, n in sizes.rows.items()}
    failure: dict[str, str] = {}
    for compile, rate in ((place.device == "cuda", 1.0), (False, 0.5)):
        torch.manual_seed(0)
        flow = make(sizes)
        try:
            facts = train(
                "mnist_mixerflow",
                flow,
                (splits["train"],),
                (splits["valid"],),
                place,
                **(sizes.training | {"lr": rate * sizes.training["lr"], "compile": compile}),
            )
            break
        except Exception as error:
            if rate < 1:
                raise
            failure = {"first attempt": f"{type(error).__name__}: {error}"[:500]}
    facts |= judge(flow, (splits["test"],), sizes.draws)
    model = {"layers": sizes.layers, "hidden": list(sizes.hidden), "components": sizes.components}
    facts |= {"model": model, **failure}
    keep("mnist_mixerflow", flow, place, facts)
    return facts
