"""Weights that the chapters lack: ten models, some of which train at once.

Each has seconds of its own, in which it shares the GPU with others; its rate falls to zero by
their end. Colour is CIFAR-10 where its file is found, else patches of photographs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.gpu.place import Place
from benchmarks.gpu.training import Rows, judge, keep, train
from benchmarks.spoken_digits import MODEL, bits_per_sample, crops, recordings
from nflib import data, models
from nflib.pixel import GatedPixelCNN, PixelCNN, PixelCNNPP
from nflib.wavenet import WaveNet

WHAT = (
    "bits/dim of test images, exact for pixel models and a lower bound on the likelihood with one "
    "draw of noise (and with eight) for flows; nats for binarized MNIST; bits per sample of whole "
    "test recordings for the WaveNet, exact"
)
GREY, COLOUR = (1, 28, 28), (3, 32, 32)
DIGITS: dict[str, Any] = MODEL  # the WaveNet of `benchmarks.spoken_digits`


@dataclass(frozen=True)
class Training:
    """A model, its data, and what differs from the common options of `nflib.train.fit`."""

    make: Callable[[], nn.Module]
    data: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """The trainings by the names of their weights; rows of each split, None for all."""

    trainings: dict[str, Training]
    options: dict[str, Any]
    rows: dict[str, int | None]


def of_bytes(make: Callable[..., nn.Module], *sizes: Any, **options: Any) -> Any:
    """A flow of images with 256 grey levels."""
    return partial(make, *sizes, grey_levels=256, **options)


LARGE = Sizes(
    trainings={
        "mnist_glow": Training(of_bytes(models.glow, GREY, 2, 8, 80), "mnist"),
        "mnist_realnvp": Training(of_bytes(models.realnvp, GREY, 4, (32, 32)), "mnist"),
        "mnist_flowpp": Training(
            of_bytes(models.flowpp, GREY, 32, 1, components=4, couplings=(0, 4, 4)), "mnist"
        ),
        "mnist_classes_gated": Training(
            partial(GatedPixelCNN, GREY, 256, 40, 6, context_dim=10), "mnist_classes"
        ),
        "mnist_classes_plusplus": Training(
            partial(PixelCNNPP, GREY, 256, 40, 1, 2, context_dim=10), "mnist_classes"
        ),
        "binarized_pixelcnn": Training(partial(PixelCNN, GREY, 2, 64, 12), "binarized_mnist"),
        "wavenet_digits": Training(partial(WaveNet, **DIGITS), "spoken_digits", {"batch_size": 32}),
        "colour_mixerflow": Training(
            of_bytes(models.mixerflow, COLOUR, 1, 8, (128,), extraction="bands"), "colour"
        ),
        "colour_glow": Training(of_bytes(models.glow, COLOUR, 3, 6, 64), "colour"),
        "mnist_classes_pixelcnn": Training(
            partial(PixelCNN, GREY, 256, 64, 8, context_dim=10), "mnist_classes"
        ),
    },
    options={"seconds": 28.0, "lr": 3e-3, "warmup": 200, "ema": 0.998, "validate_every": 500},
    rows={"train": None, "valid": 2000, "test": None},
)
SMALL = Sizes(
    trainings={
        "mnist_glow": Training(of_bytes(models.glow, GREY, 2, 1, 8), "mnist"),
        "mnist_realnvp": Training(of_bytes(models.realnvp, GREY, 2, (8,)), "mnist"),
        "mnist_flowpp": Training(
            of_bytes(models.flowpp, GREY, 8, 1, components=2, couplings=(0, 1, 1)), "mnist"
        ),
        "mnist_classes_gated": Training(
            partial(GatedPixelCNN, GREY, 256, 8, 2, context_dim=10), "mnist_classes"
        ),
        "mnist_classes_plusplus": Training(
            partial(PixelCNNPP, GREY, 256, 8, 1, 1, context_dim=10), "mnist_classes"
        ),
        "binarized_pixelcnn": Training(partial(PixelCNN, GREY, 2, 8, 2), "binarized_mnist"),
        "wavenet_digits": Training(
            partial(WaveNet, channels=8, skip=16, layers=5, context_dim=12), "spoken_digits"
        ),
        "colour_mixerflow": Training(
            of_bytes(models.mixerflow, COLOUR, 1, 2, (16,), extraction="bands"), "colour"
        ),
        "colour_glow": Training(of_bytes(models.glow, COLOUR, 2, 1, 8), "colour"),
        "mnist_classes_pixelcnn": Training(
            partial(PixelCNN, GREY, 256, 8, 1, context_dim=10), "mnist_classes"
        ),
    },
    options={"seconds": 2.0, "lr": 4e-3, "batch_size": 16, "ema": 0.9, "validate_every": 20},
    rows={"train": 1000, "valid": 50, "test": 50},
)


def rows(place: Place) -> dict[str, Callable[[], Any]]:
    sizes = SMALL if place.small else LARGE
    return {name: partial(measure, name, sizes, place) for name in sizes.trainings}


def measure(name: str, sizes: Sizes, place: Place) -> dict[str, Any]:
    """Train one of them, judge it, keep its weights."""
    training = sizes.trainings[name]
    source = name_of(training.data)
    split = {s: load(source, s, sizes.rows[s]) for s in ("train", "valid", "test")}
    torch.manual_seed(0)
    model = training.make()
    options = sizes.options | training.options
    facts = {"data": source} | train(name, model, split["train"], split["valid"], place, **options)
    if source == "spoken_digits":
        x, context = (part.to(place.device) for part in split["test"])
        bits, error = bits_per_sample(model, x, context)  # type: ignore[arg-type]
        facts |= {"test": bits, "standard error": error, "likelihood": "exact"}
    else:
        # Bounds only get better with more draws of a noise that the model has.
        draws = 1 if place.small or isinstance(model, PIXELS) else 8
        facts |= judge(model, split["test"], draws, in_nats=source == "binarized_mnist")
    keep(name, model, place, facts)  # type: ignore[arg-type]
    return facts


PIXELS = (PixelCNN, GatedPixelCNN, PixelCNNPP)


def name_of(kind: str) -> str:
    """The data set behind a kind of data."""
    if kind != "colour":
        return kind
    try:
        data.load("cifar10", "test", n=1, download=False)
        return "cifar10"
    except data.DataError:
        return "photo_patches"


def load(name: str, split: str, n: int | None) -> Rows:
    """Rows of a split, with classes or speakers as one-hot contexts where the model has them."""
    if name == "spoken_digits":
        # Whole recordings to be judged, pieces to learn from.
        x, context = recordings(split) if split == "test" else crops(split)
        # In order of speaker and digit: a part of them takes some of each.
        some = torch.linspace(0, len(x) - 1, min(n or len(x), len(x))).long()
        return x[some], context[some]
    if name == "photo_patches":
        return (data.load(name, split, n=n, size=32, channels=3).x,)
    found = data.load(name.removesuffix("_classes"), split, n=n)
    if name != "mnist_classes":
        return (found.x,)
    assert found.y is not None
    return found.x, F.one_hot(found.y, 10).float()
