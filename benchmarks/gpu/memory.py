"""Memory and time of a training step against depth, activations kept or rebuilt."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.place import Place
from benchmarks.gpu.stepping import likelihood, modes, stepping, warmed
from benchmarks.gpu.timing import milliseconds
from benchmarks.memory import peak_bytes as peak_on_cpu
from benchmarks.memory import settle
from nflib import models, reversible

WHAT = (
    "MixerFlow by number of layers: peak bytes of a forward and backward pass without parameters "
    "and their gradients, milliseconds of a step (loss, backward pass, clipping, AdamW), and the "
    "relative error of the float32 gradient with rebuilt activations"
)


@dataclass(frozen=True)
class Sizes:
    """Depths of the models, their width, and the images in a step."""

    depths: tuple[int, ...]
    hidden: int
    batch: int
    seconds: float


LARGE = Sizes(depths=(4, 8, 16, 32), hidden=128, batch=256, seconds=0.5)
SMALL = Sizes(depths=(2, 4), hidden=32, batch=8, seconds=0.1)


def rows(place: Place) -> dict[str, Callable[[], Any]]:
    sizes = SMALL if place.small else LARGE
    return {str(depth): partial(measure, depth, sizes, place) for depth in sizes.depths}


def measure(depth: int, sizes: Sizes, place: Place) -> dict[str, Any]:
    """Both ways for one depth."""
    torch.manual_seed(0)
    photos = place.photographs(sizes.batch)
    x = (photos + torch.rand(photos.shape, device=place.device) - 128) / 64

    def make(layers: int) -> nn.Module:
        hidden = (sizes.hidden,)
        flow = models.mixerflow((1, 28, 28), 1, layers, hidden, extraction="bands")
        return flow.to(place.device)

    plain = settle(make, depth, x)
    ways = {"plain": plain, "reversible": reversible.turn_on(copy.deepcopy(plain))}
    row: dict[str, Any] = {"batch": sizes.batch}
    for name, model in ways.items():
        row[name] = {"bytes": peak_bytes(model, x)}
    one, other = (gradient(model) for model in ways.values())
    row["relative error of the gradient"] = ((one - other).norm() / one.norm()).item()
    for name, model in ways.items():
        for mode in modes(place, "captured", "eager"):
            with stepping(model, place, mode) as run:
                took = milliseconds(warmed(run, x), place, sizes.seconds)
                row[name][f"{mode}, milliseconds"] = took
                if run.obstacle:
                    row[name]["obstacle"] = run.obstacle
    return row


def peak_bytes(model: nn.Module, x: Tensor) -> int:
    """Peak bytes of a forward and backward pass without parameters and their gradients."""
    if x.device.type == "cpu":
        return peak_on_cpu(model, x)
    model.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    likelihood(model, x).backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return torch.cuda.max_memory_allocated() - before - gradients


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
