"""Which direction of an autoregressive layer is fast, and three ways to go through the slow one.

    python -m benchmarks.maf_sampling            # all sizes, writes results/maf_sampling.json
    python -m benchmarks.maf_sampling --quick    # a look, writes nothing

One affine layer with two hidden layers of 128 units, on one CPU thread, without gradients: the time
of `log_prob` (one pass), and of a sample by the naive loop of D passes, by the incremental inverse
and by the Jacobi iteration. The ways take turns, so that other work on the machine meets them
alike; each number is the median over the turns. The layers were trained for a moment, on a random
mixture of squashed Gaussians, for how many passes Jacobi makes depends on the weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from nflib.autoregressive import MaskedAutoregressive
from nflib.core import Flow, StandardNormal
from nflib.elementwise import Affine
from nflib.train import fit

DIMS, BATCH, HIDDEN = (16, 64, 256), 512, (128, 128)
Timed = Callable[[], Tensor]


def naive(layer: MaskedAutoregressive, z: Tensor) -> Tensor:
    """The inverse by D passes of the network, each of which makes one more dimension right."""
    x = torch.zeros_like(z)
    for _ in range(z.shape[1]):
        x, _ = layer.elementwise.inverse(z, layer.made(x))
    return x


def trained(dim: int, steps: int) -> MaskedAutoregressive:
    """A layer that has learned something: at its start it is the identity, too easy for Jacobi."""
    torch.manual_seed(0)
    mix = torch.randn(dim, dim) / dim**0.5
    data = torch.tanh(torch.randn(10_000, dim) @ mix) + 0.1 * torch.randn(10_000, dim)
    layer = MaskedAutoregressive(dim, Affine(), HIDDEN)
    fit(Flow(layer, StandardNormal(dim)), data, steps=steps, batch_size=256, progress=False)
    return layer


def rounds(layer: MaskedAutoregressive, z: Tensor) -> int:
    """How many passes the Jacobi iteration makes."""
    calls: list[int] = []
    hook = layer.made.last.register_forward_hook(lambda *_: calls.append(1))
    layer.inverse(z)
    hook.remove()
    return len(calls)


@torch.no_grad()
def compare(layer: MaskedAutoregressive, turns: int) -> dict[str, float]:
    """Median seconds of each way, the passes that Jacobi takes, and how far the ways disagree."""
    dim = layer.made.dim
    flow = Flow(layer, StandardNormal(dim))
    z = torch.randn(BATCH, dim)
    x = naive(layer, z)

    def solved(solver: str) -> Timed:
        def run() -> Tensor:
            layer.solver = solver
            return layer.inverse(z)[0]

        return run

    ways: dict[str, Timed] = {
        "log_prob": lambda: flow.log_prob(x),
        "naive": lambda: naive(layer, z),
        "incremental": solved("incremental"),
        "jacobi": solved("jacobi"),
    }
    gap = max((ways[name]() - x).abs().max().item() for name in ("incremental", "jacobi"))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            way()  # its weights in the cache, as within a loop over batches
            begin = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - begin)
    result = {name: statistics.median(values) for name, values in times.items()}
    layer.solver = "jacobi"
    return result | {"jacobi_passes": rounds(layer, z), "largest_difference": gap}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--steps", type=int, default=400, help="of training each layer")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "results" / "maf_sampling.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for dim in DIMS:
        layer = trained(dim, 50 if options.quick else options.steps).eval()
        row = compare(layer, 3 if options.quick else options.turns)
        rows[str(dim)] = row
        ways = ("log_prob", "naive", "incremental", "jacobi")
        shown = ", ".join(f"{name} {1e3 * row[name]:.2f}" for name in ways)
        gain = row["naive"] / row["incremental"]
        print(
            f"D = {dim}: milliseconds {shown}; incremental is {gain:.1f} times as fast", flush=True
        )
    if options.quick:
        return
    result = {
        "what": f"seconds for {BATCH} rows, one affine layer, float32; median of interleaved turns",
        **machine.facts("benchmarks.maf_sampling"),
        "batch": BATCH,
        "hidden": list(HIDDEN),
        "turns": options.turns,
        "rows": rows,
    }
    machine.write(options.out, result)
    print(f"Wrote {options.out.name}.")


if __name__ == "__main__":
    main()
