"""Operations that a training step asks of a device: what a GPU waits for when batches are small.

    python -m benchmarks.kernels                # counts this code, in seconds
    python -m benchmarks.kernels --as before    # the same under another name

Counted are the operations that torch hands to a device in a forward and a backward pass, without
those that only look at memory in another way (views) or allocate it: on a GPU each is one kernel,
some are two. A layer's number is that of a model of three layers less that of a model of two.
Writes results/kernels.json, where the counts of other names stay.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import machine
from nflib import models
from nflib.core import Flow
from nflib.prepared import Prepared

RESULT = machine.ROOT / "results" / "kernels.json"
ALLOCATING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach")
# Asked of torch, not of the device.
NO_KERNEL = ("promote_types", "_unsafe_view")
GRAY = (1, 28, 28)
COLOUR = (3, 32, 32)
MODELS: dict[str, Callable[[int], Flow]] = {
    "MixerFlow, couplings": lambda layers: models.mixerflow(
        GRAY, 1, layers, (128,), extraction="bands", grey_levels=256
    ),
    "MixerFlow, couplings, two hidden layers": lambda layers: models.mixerflow(
        GRAY, 1, layers, (128, 128), extraction="bands", grey_levels=256
    ),
    "MixerFlow, MAF": lambda layers: models.mixerflow(
        GRAY, 1, layers, (128, 128), extraction="bands", flow="maf", grey_levels=256
    ),
    "Glow": lambda layers: models.glow(COLOUR, 1, layers, 64, grey_levels=256),
    "MAF": lambda layers: models.maf(43, layers, (128, 128)),
    "RealNVP, vectors": lambda layers: models.realnvp(43, layers, (128, 128)),
    "neural spline flow": lambda layers: models.spline_flow(43, layers, hidden=(128, 128)),
}


class Kernels(TorchDispatchMode):
    """Counts what is handed to the device while it is active, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ALLOCATING + NO_KERNEL:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def counted(make: Callable[[int], Flow], layers: int) -> Counter[str]:
    """A forward and a backward pass of a model with so many layers."""
    torch.manual_seed(0)
    flow = make(layers)
    x = data(flow)
    flow.initialize(x)
    prepared = Prepared(flow)
    gradient(flow, x, prepared)  # what is done once is done
    for parameter in flow.parameters():
        parameter.grad = None
    with Kernels() as kernels:
        gradient(flow, x, prepared)
    return kernels.counts


def data(flow: Flow) -> Tensor:
    shape = flow.event_shape
    assert shape is not None
    if len(shape) == 3:
        return torch.randint(0, 256, (16, *shape))  # type: ignore[arg-type]
    return torch.randn(16, *shape)  # type: ignore[arg-type]


def gradient(flow: Flow, x: Tensor, prepared: Prepared) -> None:
    with prepared():
        loss = -flow(x).mean()
    loss.backward()


def a_layer(make: Callable[[int], Flow]) -> Counter[str]:
    """What one layer more asks for."""
    counts = counted(make, 3)
    counts.subtract(counted(make, 2))
    return Counter({name: count for name, count in counts.items() if count})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--as", dest="name", default="now", help="the name of these counts")
    options = parser.parse_args()
    rows = {}
    for name, make in MODELS.items():
        counts = a_layer(partial(make))
        rows[name] = {"operations a layer": counts.total(), "of which": dict(counts.most_common())}
        print(f"{name:24} {counts.total():5}  {dict(counts.most_common(40))}")
    found = json.loads(RESULT.read_text())["counts"] if RESULT.is_file() else {}
    facts = machine.facts("benchmarks.kernels")
    del facts["hardware"], facts["threads"]
    what = "operations of a forward and backward pass that are no views, for one layer"
    machine.write(RESULT, {"what": what, "counts": found | {options.name: facts | {"rows": rows}}})


if __name__ == "__main__":
    main()
