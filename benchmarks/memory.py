"""Memory of a training step against depth, with activations kept and with activations rebuilt.

    python -m benchmarks.memory --threads 1

Peak bytes of a forward and backward pass, without the parameters and their gradients, which grow
with depth in any case; time of a step with its optimizer; and how far float32 gradients that were
rebuilt are from those that were not. Writes results/memory.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import machine
from nflib import models, reversible

DEPTHS = (8, 16, 32, 64)
# Name: the model of so many couplings, or steps, and the shape of a batch.
MODELS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "RealNVP, 64-D": (lambda depth: models.realnvp(64, depth), (512, 64)),
    "spline couplings, 64-D": (lambda depth: models.spline_flow(64, depth), (512, 64)),
    "Glow, 3x32x32": (
        lambda depth: models.glow((3, 32, 32), levels=1, steps=depth, hidden=64),
        (16, 3, 32, 32),
    ),
}


class Peak(TorchDispatchMode):
    """The largest number of bytes that were alive at once, of tensors made while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.bytes = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.model = model

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                entry = (StorageWeakRef(storage), storage.nbytes())
                self.alive.setdefault(storage._cdata, entry)
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        known = {p.untyped_storage()._cdata for p in self.model.parameters()}
        held = sum(size for key, (_, size) in self.alive.items() if key not in known)
        self.bytes = max(self.bytes, held)
        return out


def peak_bytes(model: nn.Module, x: Tensor) -> int:
    """Peak bytes of one forward and backward pass, parameters and their gradients not counted."""
    model.zero_grad(set_to_none=True)
    with Peak(model) as peak:
        (-model(x).mean()).backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return peak.bytes - gradients


def settle(make: Callable[[int], nn.Module], depth: int, x: Tensor) -> nn.Module:
    """A model that was initialised on a batch and has left the identity in a few steps."""
    torch.manual_seed(0)
    model = make(depth)
    model.initialize(x)  # type: ignore[operator]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(10):
        step(model, optimizer, x)
    return model


def measure(make: Callable[[int], nn.Module], shape: tuple[int, ...], repeats: int) -> Any:
    rows: dict[str, Any] = {}
    for depth in DEPTHS:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        plain = settle(make, depth, x)
        rebuilt = reversible.turn_on(copy.deepcopy(plain))
        row: dict[str, Any] = {}
        gradients, steps = {}, {}
        for name, model in (("plain", plain), ("reversible", rebuilt)):
            row[name] = {"bytes": peak_bytes(model, x)}
            gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
            steps[name] = partial(step, model, torch.optim.AdamW(model.parameters(), fused=True), x)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(repeats + 1):
            for name, run in steps.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
        for name, seconds in times.items():
            row[name]["milliseconds"] = round(1e3 * statistics.median(seconds[1:]), 2)
        gap = (gradients["plain"] - gradients["reversible"]).norm() / gradients["plain"].norm()
        row["relative error of the gradient"] = gap.item()
        rows[str(depth)] = row
        print(depth, row, flush=True)
    return rows


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    (-model(x).mean()).backward()
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    default = machine.ROOT / "results" / "memory.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    what = (
        "peak bytes of a training step without parameters and their gradients, milliseconds of a "
        "step with AdamW (median), and the relative error of float32 gradients, by depth"
    )
    rows = {}
    for name, (make, shape) in MODELS.items():
        print(name, flush=True)
        rows[name] = {"batch": list(shape), "depths": measure(make, shape, options.repeats)}
    machine.write(options.out, {"what": what, **machine.facts("benchmarks.memory"), "rows": rows})


if __name__ == "__main__":
    main()
