"""What an image costs against its size: MixerFlow and Glow on colour images of 16, 32 and 64.

    python -m benchmarks.mixer_size --threads 1

Parameters, milliseconds an image of a training step (loss, backward pass, optimizer) and of a
sample, medians of blocks in which the models take turns. `MixerFlow` keeps its patches at 4 x 4, so
that their number grows; with a grid of 8 x 8 patches their side grows instead; bands have one row
each. Writes results/mixer_size.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from nflib import models
from nflib.core import Flow

SIDES = (16, 32, 64)
mixer = partial(models.mixerflow, layers=8, hidden=(128,), grey_levels=256)
MODELS: dict[str, Callable[[int], Flow]] = {
    "MixerFlow, 4x4 patches": lambda side: mixer((3, side, side), patch=4),
    "MixerFlow, 8x8 grid": lambda side: mixer((3, side, side), patch=side // 8),
    "MixerFlow, bands": lambda side: mixer((3, side, side), patch=1, extraction="bands"),
    "Glow": lambda side: models.glow((3, side, side), 2, 4, 32, grey_levels=256),
}


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call, waiting for the device before and after."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


def step(flow: Flow, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One training step."""
    optimizer.zero_grad()
    (-flow(x).mean()).backward()
    optimizer.step()


def measure(side: int, batch: int, repeats: int, device: str) -> dict[str, dict[str, float]]:
    """All models on images of one size, taking turns."""
    torch.manual_seed(0)
    x = torch.randint(0, 256, (batch, 3, side, side), device=device)
    flows = {name: make(side).to(device) for name, make in MODELS.items()}
    optimizers = {n: torch.optim.AdamW(f.parameters(), fused=True) for n, f in flows.items()}
    train: dict[str, list[float]] = {name: [] for name in flows}
    draw: dict[str, list[float]] = {name: [] for name in flows}
    for _ in range(repeats + 2):
        for name, flow in flows.items():
            flow.train()
            train[name].append(timed(partial(step, flow, x, optimizers[name])))
            flow.eval()
            with torch.no_grad():
                draw[name].append(timed(partial(flow.sample, batch)))
    # The first two rounds warm up.
    return {
        name: {
            "parameters": sum(p.numel() for p in flow.parameters()),
            "train ms an image": 1e3 * statistics.median(train[name][2:]) / batch,
            "sample ms an image": 1e3 * statistics.median(draw[name][2:]) / batch,
        }
        for name, flow in flows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "results" / "mixer_size.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: dict[str, dict[str, Any]] = {name: {} for name in MODELS}
    for side in SIDES:
        for name, found in measure(side, options.batch, options.repeats, options.device).items():
            rows[name][str(side)] = found
            print(f"{name}, {side}: {found}", flush=True)
    what = "parameters and milliseconds an image against the side of a colour image, medians"
    facts = machine.facts("benchmarks.mixer_size") | {"batch": options.batch}
    machine.write(options.out, {"what": what, **facts, "rows": rows})


if __name__ == "__main__":
    main()
