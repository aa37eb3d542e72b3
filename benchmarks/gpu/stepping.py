"""A bare training step in one of its modes: loss, backward pass, clipping, AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

from benchmarks.gpu.place import Place
from nflib.core import Flow
from nflib.graphs import Replayed
from nflib.train.compiling import compiled
from nflib.train.step import Step
from nflib.train.surroundings import matrix_precision

PRECISIONS = ("float32", "tf32", "bf16")


@dataclass(frozen=True)
class Mode:
    """How a step is run: layers compiled, kernels recorded as a graph and replayed."""

    compile: bool
    capture: bool


MODES = {
    "eager": Mode(False, False),
    "captured": Mode(False, True),
    "compiled": Mode(True, False),
    "both": Mode(True, True),
}


def modes(place: Place, *names: str) -> list[str]:
    """Those of these modes that the device has: without graphs, those that record nothing."""
    return [n for n in names or MODES if place.has_graphs or not MODES[n].capture]


def likelihood(call: Any, *batch: Tensor) -> Tensor:
    return -call(*batch).mean()


def ready(make: Callable[[], Flow], x: Tensor, seed: int = 0) -> Flow:
    """A model on the device of the data, initialised on them."""
    torch.manual_seed(seed)
    flow = make().to(x.device)
    flow.initialize(x[:512])
    return flow


@contextmanager
def stepping(
    model: nn.Module,
    place: Place,
    mode: str = "eager",
    precision: str = "float32",
    lr: float = 1e-4,
) -> Iterator[Replayed]:
    """Inside of the block what it yields makes one step when it is called with a batch."""
    how = MODES[mode]
    # The profiler of a CPU sees what was compiled only if it announces itself.
    seen = inductor.patch({"cpp.enable_kernel_profile": place.device == "cpu"})
    with seen, matrix_precision(precision), compiled(model, how.compile) as wrap:
        step = Step(
            model, likelihood, autocast=partial(autocast, place, precision), compiled=how.compile
        )
        step.call = wrap(model)
        step.rate.fill_(lr)
        yield Replayed(step, torch.device(place.device), how.capture)


def autocast(place: Place, precision: str) -> AbstractContextManager[Any]:
    """Conditioners in bfloat16, if that is the precision."""
    if precision == "bf16":
        return torch.autocast(place.device, dtype=torch.bfloat16)
    return nullcontext()


def warmed(run: Callable[..., Any], *batch: Tensor) -> Callable[[], Any]:
    """One more step, as a call without arguments, after those that come before a recording."""
    for _ in range(5):
        run(*batch)
    return partial(run, *batch)
