"""Sampling pixel models: every activation once against the whole network for every pixel.

    python -m benchmarks.pixel_sampling --threads 1

Untrained models of 28 x 28 pixels and 256 grey levels; the work does not depend on the weights.
Both samplers get the same uniform numbers and return the same images, which is checked. Medians of
interleaved repeats, in seconds of processor time for a batch, which other work on the machine
disturbs less than the clock. Beside them stands how many operations a pixel is on a GPU, which
waits for each of them: one number for each kind of pixel, from those that only the full size has to
those that every size has. Writes results/pixel_sampling.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import machine
from benchmarks.kernels import Kernels
from nflib import graphs
from nflib.pixel import GatedPixelCNN, PixelCNN, PixelCNNPP, PixelModel

SHAPE, LEVELS = (1, 28, 28), 256
MODELS: dict[str, Callable[[], PixelModel]] = {
    "PixelCNN": partial(PixelCNN, SHAPE, LEVELS, 64, 6),
    "Gated PixelCNN": partial(GatedPixelCNN, SHAPE, LEVELS, 32, 6),
    "PixelCNN++": partial(PixelCNNPP, SHAPE, LEVELS, 32, 1, 3),
}


def measure(model: PixelModel, n: int, repeats: int) -> dict[str, Any]:
    """Median seconds of both samplers for n images, and how often they agreed."""
    times: dict[bool, list[float]] = {True: [], False: []}
    same = 1.0
    for repeat in range(repeats):
        u = torch.rand(n, model.head.uniforms, *SHAPE[1:])
        drawn = {}
        for cached in times:
            begin = time.process_time()
            drawn[cached] = model.sample(n, cached=cached, u=u)
            times[cached].append(time.process_time() - begin)
        same = min(same, (drawn[True] == drawn[False]).float().mean().item())
        print(f"  repeat {repeat}: {times[True][-1]:.2f} s cached, {times[False][-1]:.2f} s naive")
    quick, slow = (statistics.median(times[kind]) for kind in (True, False))
    return {"cached": quick, "naive": slow, "times_faster": slow / quick, "same_pixels": same}


def operations(model: PixelModel) -> list[int]:
    """How many operations the recording of a pixel has, for each kind of pixel."""
    counts: list[int] = []

    def record(step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        kind = len(counts)
        counts.append(0)

        def replay() -> None:
            with Kernels() as kernels:
                step()
            counts[kind] = kernels.counts.total()

        return replay, None

    with mock.patch.object(graphs, "recorder_for", return_value=record):
        model.sample(1)
    return sorted(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, default=machine.ROOT / "results" / "pixel_sampling.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: dict[str, Any] = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make()
        count = sum(p.numel() for p in model.parameters())
        rows[name] = {"parameters": count, "operations": operations(model)}
        for n in (1, 16):
            print(f"{name}, {n} images", flush=True)
            rows[name][str(n)] = measure(model, n, options.repeats)
    what = "processor seconds to sample 1 and 16 images of 28 x 28 pixels and 256 grey levels"
    result = {"what": what, **machine.facts("benchmarks.pixel_sampling"), "rows": rows}
    machine.write(options.out, result)
    for name, row in rows.items():
        found = ", ".join(f"{row[n]['times_faster']:.0f}x for {n}" for n in ("1", "16"))
        print(f"{name}: {found}; equal pixels {row['16']['same_pixels']:.4f}; ", end="")
        print(f"{row['operations']} operations a pixel")


if __name__ == "__main__":
    main()
