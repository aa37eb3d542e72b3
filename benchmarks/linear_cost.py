"""How the cost of a linear flow grows with D: the tutorial's table, measured on one CPU thread.

    python -m benchmarks.linear_cost                # all rows, writes results/linear_cost.json
    python -m benchmarks.linear_cost --max-dim 256  # a quick look, writes nothing

For each row and size the time of the inverse of one event and that of log|det W| alone. Rows that
store a D x D matrix stop at a few thousand dimensions, the others go on until their growth stands
clear of the constant cost of a call. Each number is the fastest of many repeats in several rounds,
because other work on the machine can only make a run slower.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from benchmarks import machine
from nflib.convolution import EmergingConv, Invertible1x1Conv, PeriodicConv
from nflib.core import Bijection
from nflib.linear import LU, BlockDiagonal, Dense, Diagonal, Triangular

BLOCK, CHANNELS, KERNEL = 16, 4, 3
MATRIX_SIZES = [2**k for k in range(6, 13)]
STRUCTURED_SIZES = [4**k for k in range(4, 11)]
IMAGE_SIZES = [4**k for k in range(4, 8)]

Timed = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A row of the table: how to build it for D dimensions, and the exponents theory predicts."""

    build: Callable[[int], Bijection]
    sizes: list[int]
    inverse: float
    log_det: float
    image: bool = False


class Substitution(Triangular):
    """A triangular layer whose W is put together once, before the clock starts."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.ready = super().weight()

    def weight(self) -> Tensor:
        return self.ready


ROWS = {
    "full": Row(Dense, MATRIX_SIZES, 3, 3),
    "triangular": Row(Triangular, MATRIX_SIZES, 2, 1),
    "LU": Row(LU, MATRIX_SIZES, 2, 1),
    "substitution alone": Row(Substitution, MATRIX_SIZES, 2, 1),
    "diagonal": Row(Diagonal, STRUCTURED_SIZES, 1, 1),
    "block-diagonal": Row(lambda d: BlockDiagonal(d, BLOCK), STRUCTURED_SIZES, 1, 1),
    # d log d, which is a little steeper than 1 at any finite d.
    "spatial convolution": Row(
        lambda d: PeriodicConv(CHANNELS, KERNEL), STRUCTURED_SIZES, 1, 1, image=True
    ),
    "1x1 convolution": Row(
        lambda d: Invertible1x1Conv(CHANNELS, "dense"), STRUCTURED_SIZES, 1, 0, image=True
    ),
    "emerging convolution": Row(
        lambda d: EmergingConv(CHANNELS, KERNEL), IMAGE_SIZES, 1, 0, image=True
    ),
}


def event(dim: int, image: bool) -> Tensor:
    """One vector of ``dim`` numbers, or one square image of so many."""
    if not image:
        return torch.randn(1, dim)
    side = round((dim / CHANNELS) ** 0.5)
    return torch.randn(1, CHANNELS, side, side)


def operations(layer: Bijection, z: Tensor) -> dict[str, Timed]:
    """What is timed: the inverse alone where the layer has it apart, and log|det W|."""
    if isinstance(layer, PeriodicConv):
        return {
            "inverse": lambda: layer.inverse(z),
            "log_det": lambda: layer._log_abs_det(layer._spectrum(z), z.shape[3]),
        }
    if isinstance(layer, Invertible1x1Conv):
        return {"inverse": lambda: layer.inverse(z), "log_det": layer.linear.log_abs_det}
    if isinstance(layer, EmergingConv):
        scales = [factor.log_scale for factor in layer]
        return {
            "inverse": lambda: layer.inverse(z),
            "log_det": lambda: sum(scale.sum() for scale in scales),
        }
    return {"inverse": lambda: layer.solve(z), "log_det": layer.log_abs_det}


def seconds(operation: Timed, min_run_time: float) -> float:
    """Shortest time of a call on one thread, without gradients."""
    timer = Timer("with torch.no_grad(): f()", globals={"f": operation, "torch": torch})
    return min(timer.blocked_autorange(min_run_time=min_run_time).times)


@torch.no_grad()
def measure(row: Row, max_dim: int, rounds: int, min_run_time: float) -> dict[str, list[float]]:
    """Sizes up to ``max_dim`` and, for each, the seconds of both operations."""
    result: dict[str, list[float]] = {"sizes": [], "inverse": [], "log_det": []}
    for dim in [size for size in row.sizes if size <= max_dim]:
        torch.manual_seed(0)
        layer = row.build(dim)
        timed = operations(layer, event(dim, row.image))
        result["sizes"].append(dim)
        for name, operation in timed.items():
            result[name].append(min(seconds(operation, min_run_time) for _ in range(rounds)))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-dim", type=int, default=max(STRUCTURED_SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--min-run-time", type=float, default=0.3, help="seconds a measurement")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "results" / "linear_cost.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name, row in ROWS.items():
        rows[name] = measure(row, options.max_dim, options.rounds, options.min_run_time)
        rows[name] |= {"theory": {"inverse": row.inverse, "log_det": row.log_det}}
        shown = ", ".join(f"{t * 1e6:.0f}" for t in rows[name]["inverse"])
        print(f"{name:>20}: inverse of one event in microseconds {shown}", flush=True)
    if options.max_dim < max(STRUCTURED_SIZES):
        return
    result = {
        "what": "seconds for one event, float32, the fastest of many repeats",
        **machine.facts("benchmarks.linear_cost"),
        "block": BLOCK,
        "channels": CHANNELS,
        "kernel_size": KERNEL,
        "rounds": options.rounds,
        "rows": rows,
    }
    machine.write(options.out, result)
    print(f"Wrote {options.out.name}.")


if __name__ == "__main__":
    main()
