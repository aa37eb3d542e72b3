"""How long a training step takes, and why: modes, precisions, batches, widths, other libraries.

Rows in the order of their worth. The compiler takes seconds for each batch size and precision,
so that few of them are compiled.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import mixer_size, peer_models
from benchmarks.gpu.place import Place
from benchmarks.gpu.stepping import (
    PRECISIONS,
    autocast,
    likelihood,
    modes,
    ready,
    stepping,
    warmed,
)
from benchmarks.gpu.timing import kernels, milliseconds, seconds_of, utilisation
from nflib import models
from nflib.core import Flow
from nflib.train.surroundings import matrix_precision

WHAT = (
    "training steps (loss, backward pass, clipping, AdamW) on photographs of 1 x 28 x 28: "
    "milliseconds, images a second, seconds of the first one, by mode, precision and batch; "
    "kernels and utilisation; other libraries; change of log p by narrow numbers, nats/dim"
)
SHAPE = (1, 28, 28)


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        maf: layers and width of the model of autoregressive flows.
        batches, compiled: of the steps, those of compiled ones the most worthy first.
        seconds: of each timed block.
        deep: layers of the model whose first step is timed.
        warm: steps of training before log p is compared.
        sides: of the images whose cost is compared.
    """

    layers: int
    hidden: int
    steps: int
    channels: int
    maf: tuple[int, int]
    maf_batches: tuple[int, ...]
    batches: tuple[int, ...]
    compiled: tuple[int, ...]
    widths: tuple[int, ...]
    seconds: float
    deep: int
    warm: int
    sides: tuple[int, ...]


LARGE = Sizes(
    layers=4,
    hidden=128,
    steps=4,
    channels=64,
    maf=(10, 256),
    maf_batches=(256, 2048),
    batches=(128, 512, 2048, 8192),
    compiled=(2048, 128),
    widths=(64, 128, 256, 512),
    seconds=0.4,
    deep=30,
    warm=500,
    sides=(16, 32, 64),
)
SMALL = Sizes(
    layers=1,
    hidden=32,
    steps=1,
    channels=8,
    maf=(2, 32),
    maf_batches=(64,),
    batches=(16, 64),
    compiled=(64,),
    widths=(16, 64),
    seconds=0.1,
    deep=3,
    warm=20,
    sides=(16,),
)

Make = Callable[[], Flow]


def rows(place: Place) -> dict[str, Callable[[], Any]]:
    sizes = SMALL if place.small else LARGE
    bands = partial(models.mixerflow, SHAPE, 1, extraction="bands", grey_levels=256)
    mixer = partial(bands, sizes.layers, (sizes.hidden,))
    glow = partial(models.glow, SHAPE, 2, sizes.steps, sizes.channels, grey_levels=256)
    maf = partial(bands, sizes.maf[0], (sizes.maf[1],), flow="maf")
    main = sizes.compiled[0]
    found: dict[str, Callable[[], Any]] = {}

    def add(name: str, make: Make, precision: str, mode: str, batch: int) -> None:
        run = partial(step, make, place, precision, mode, batch, sizes)
        found[f"{name}, {precision}, {mode}, {batch}"] = run

    both = {"MixerFlow": mixer, "Glow": glow}
    for name, make in both.items():
        for mode in modes(place, "captured", "eager"):
            for batch in sizes.batches:
                add(name, make, "float32", mode, batch)
        for precision in ("tf32", "bf16"):
            add(name, make, precision, modes(place, "captured", "eager")[0], main)
    for batch in sizes.compiled:
        for mode in modes(place, "both", "compiled"):
            add("MixerFlow", mixer, "tf32" if place.has_graphs else "float32", mode, batch)
    for batch in sizes.maf_batches:
        for mode in modes(place, "captured", "eager"):
            add(f"MAF MixerFlow of {sizes.maf[0]} layers", maf, "float32", mode, batch)
    found["log p, MixerFlow"] = partial(narrowing, mixer, place, sizes)
    found["log p, Glow"] = partial(narrowing, glow, place, sizes)
    for side in sizes.sides:
        found[f"an image of {side} x {side}"] = partial(image, side, place)
    for width in sizes.widths:
        make = partial(bands, sizes.layers, (width,))
        found[f"MixerFlow of width {width}"] = partial(precisions, make, place, main, sizes)
    for mode in modes(place, "both", "eager"):
        make = partial(bands, sizes.deep, (sizes.hidden,))
        found[f"first step of {sizes.deep} layers, {mode}"] = partial(first, make, place, mode)
    peers = ["MAF, 64-D", "affine coupling, 64-D", "RQ-spline coupling, 64-D"]
    for name in peers if place.small else [*peers, "Glow, 3x32x32"]:
        found[f"libraries: {name}"] = partial(libraries, name, place, sizes)
    for name, make in both.items():
        # The compiler of a CPU takes half a minute for each model.
        few = place.device == "cpu" and name != "MixerFlow"
        for mode in modes(place, "eager", *([] if few else ["captured", "both", "compiled"])):
            found[f"kernels, {name}, {mode}"] = partial(counted, make, place, mode, main)
            if place.device == "cuda":
                found[f"utilisation, {name}, {mode}"] = partial(busy, make, place, mode, main)
    if place.device == "cuda":
        for name, make in both.items():
            for precision in ("float32", "bf16"):
                for mode in ("both", "compiled"):
                    add(name, make, precision, mode, main)
    for name, make in both.items():
        for precision in ("tf32", "bf16"):
            for mode in modes(place, "captured", "eager"):
                for batch in sizes.batches:
                    add(name, make, precision, mode, batch)
    return found


def step(
    make: Make, place: Place, precision: str, mode: str, batch: int, sizes: Sizes
) -> dict[str, Any]:
    """Steps in one mode."""
    x = place.photographs(batch)
    flow = ready(make, x)
    # What was compiled for another batch would now be compiled for batches of any size.
    torch.compiler.reset()
    with stepping(flow, place, mode, precision) as run:
        start = seconds_of(partial(run, x), place)
        took = milliseconds(warmed(run, x), place, sizes.seconds)
        return {
            "milliseconds": took,
            "images a second": round(1e3 * batch / took),
            "first step, seconds": round(start, 3),
            "parameters": sum(p.numel() for p in flow.parameters()),
            # Why it is not replayed, where it should be.
            **({"obstacle": run.obstacle} if run.obstacle else {}),
        }


def precisions(make: Make, place: Place, batch: int, sizes: Sizes) -> dict[str, Any]:
    """Milliseconds of a step in each precision."""
    x = place.photographs(batch)
    mode = modes(place, "captured", "eager")[0]
    found: dict[str, Any] = {"batch": batch, "mode": mode}
    for precision in PRECISIONS:
        with stepping(ready(make, x), place, mode, precision) as run:
            found[precision] = milliseconds(warmed(run, x), place, sizes.seconds)
    return found


def first(make: Make, place: Place, mode: str) -> dict[str, Any]:
    """Seconds of the first step: nothing is compiled yet, and there is nothing to go back to."""
    x = place.photographs(128)
    flow = ready(make, x)
    torch.compiler.reset()
    kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            with stepping(flow, place, mode) as run:
                one = seconds_of(partial(run, x), place)
                five = sum(seconds_of(partial(run, x), place) for _ in range(4))
        finally:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            if kept is not None:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = kept
    # The recording comes after some steps.
    return {"seconds": round(one, 3), "four more, seconds": round(five, 3)}


def narrowing(make: Make, place: Place, sizes: Sizes) -> dict[str, Any]:
    """How far log p of test images moves when what was trained in float32 runs in less."""
    train, test = place.photographs(4096), place.photographs(256, "test")
    flow = ready(make, train)
    with stepping(flow, place, modes(place, "captured", "eager")[0], lr=1e-3) as run:
        order = torch.Generator().manual_seed(0)
        for _ in range(sizes.warm):
            rows = torch.randint(len(train), (128,), generator=order)
            run(train[rows.to(place.device)])
    exact = log_prob(flow, test, place, "float32")
    found = {}
    for precision in PRECISIONS[1:]:
        moved = log_prob(flow, test, place, precision)
        assert exact.dtype == moved.dtype == torch.float32
        gap = (moved - exact).abs() / test[0].numel()
        found[precision] = {"largest": gap.max().item(), "mean": gap.mean().item()}
    return found | {"steps of training": sizes.warm}


@torch.no_grad()
def log_prob(flow: Flow, x: Tensor, place: Place, precision: str) -> Tensor:
    """With the same noise of dequantization in each call."""
    torch.manual_seed(0)
    with matrix_precision(precision), autocast(place, precision):
        return flow.log_prob(x)


def image(side: int, place: Place) -> dict[str, Any]:
    """What a colour image costs at one size, of all models of `benchmarks.mixer_size`, eager."""
    batch, repeats = (4, 1) if place.small else (64, 5)
    return {"batch": batch, **mixer_size.measure(side, batch, repeats, place.device)}


def libraries(name: str, place: Place, sizes: Sizes) -> dict[str, Any]:
    """The same step of the same architecture, as it is in each library, and replayed in nflib."""
    configuration = peer_models.CONFIGURATIONS[name]
    x = torch.randn(configuration.batch, *configuration.shape, device=place.device)
    found: dict[str, Any] = {"batch": configuration.batch}
    for library in ("nflib", "zuko", "normflows"):
        build = configuration.build[library]
        if isinstance(build, str):
            found[library] = build
        elif library != "nflib" and importlib.util.find_spec(library) is None:
            found[library] = "is not installed"
        else:
            torch.manual_seed(0)
            model = build()[0].to(place.device)
            with torch.no_grad():
                likelihood(model, x)  # what sets itself up at its first call
            for mode in modes(place, "eager", *(["captured"] if library == "nflib" else [])):
                with stepping(model, place, mode) as run:
                    key = library if mode == "eager" else f"{library}, {mode}"
                    found[key] = milliseconds(warmed(run, x), place, sizes.seconds)
    return found


def counted(make: Make, place: Place, mode: str, batch: int) -> dict[str, int]:
    """Kernels of a step."""
    x = place.photographs(batch)
    with stepping(ready(make, x), place, mode) as run:
        return kernels(warmed(run, x), place)


def busy(make: Make, place: Place, mode: str, batch: int) -> dict[str, Any]:
    """Percent of the time in which the device computed."""
    x = place.photographs(batch)
    with stepping(ready(make, x), place, mode) as run:
        return {"percent": utilisation(warmed(run, x), place, 2.0), "batch": batch}
