"""Seconds that samplers take: pixel by pixel, sample by sample, dimension by dimension.

Untrained models, for the work does not depend on the weights. The first call records what a GPU
can replay, and is told apart from later ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.place import Place
from benchmarks.gpu.timing import seconds_of
from benchmarks.gpu.weights import DIGITS
from benchmarks.maf_sampling import naive
from benchmarks.pixel_sampling import MODELS
from nflib import audio, models
from nflib.autoregressive import MaskedAutoregressive
from nflib.core import Flow
from nflib.elementwise import Affine
from nflib.graphs import captured
from nflib.pixel import PixelModel
from nflib.wavenet import WaveNet

WHAT = (
    "seconds to draw 16 images of 28 x 28 pixels and 256 grey levels, a second of sound at 8 kHz, "
    "and to invert masked autoregressive layers; the first call and the third"
)


def rows(place: Place) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for name, make in MODELS.items():
        found[f"{name}, images"] = partial(pixels, make, place)
    found["WaveNet, sound"] = partial(sound, place)
    for dim in (16,) if place.small else (64, 256, 784):
        found[f"MAF layer of {dim} dimensions"] = partial(inverse, dim, place)
    found["MixerFlow of MAF flows, images"] = partial(mixer, place)
    return found


def times(run: Callable[[], Any], place: Place) -> dict[str, float]:
    """Seconds of the first call and of the third: one of the first two records."""
    first, _, third = (seconds_of(run, place) for _ in range(3))
    return {"first": round(first, 5), "seconds": round(third, 5)}


def pixels(make: Callable[[], PixelModel], place: Place) -> dict[str, Any]:
    torch.manual_seed(0)
    model = make().to(place.device).eval()
    images = 1 if place.small else 16
    return times(lambda: model.sample(images), place) | {"images": images}


def sound(place: Place) -> dict[str, Any]:
    torch.manual_seed(0)
    model = WaveNet(**DIGITS).to(place.device).eval()
    context = torch.eye(12, device=place.device)[:1]
    length = 200 if place.small else audio.RATE
    return times(lambda: model.sample(1, length, context), place) | {"samples": length}


@torch.no_grad()
def inverse(dim: int, place: Place, batch: int = 512) -> dict[str, Any]:
    """Milliseconds of one pass forward, and of the ways back."""
    torch.manual_seed(0)
    layer = MaskedAutoregressive(dim, Affine(), (512, 512)).to(place.device).eval()
    # Jacobi needs more rounds than for the identity that the layer is at its start.
    for parameter in layer.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    z = torch.randn(batch, dim, device=place.device)

    def solved(solver: str) -> None:
        layer.solver = solver  # type: ignore[assignment]
        layer.inverse(z)

    ways: dict[str, Callable[[], Any]] = {
        "forward": lambda: layer(z),
        "naive": lambda: naive(layer, z),
        "incremental": partial(solved, "incremental"),
        "jacobi": partial(solved, "jacobi"),
    }
    found = {name: 1e3 * times(way, place)["seconds"] for name, way in ways.items()}
    with captured(layer):
        found["incremental, replayed"] = 1e3 * times(ways["incremental"], place)["seconds"]
    return {"batch": batch, "milliseconds": found}


def mixer(place: Place) -> dict[str, Any]:
    torch.manual_seed(0)
    layers, width = (1, 16) if place.small else (10, 256)
    flow: Flow = models.mixerflow(
        (1, 28, 28), 1, layers, (width,), extraction="bands", flow="maf", grey_levels=256
    )
    flow.to(place.device).eval()
    row: dict[str, Any] = {"images": 16, "layers": layers, "width": width}
    row |= times(lambda: flow.sample(16), place)
    with captured(flow):
        return row | {"replayed": times(lambda: flow.sample(16), place)["seconds"]}
