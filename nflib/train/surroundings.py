"""What a run borrows from the process, and gives back: random numbers and accelerate's settings."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import nn

from nflib import checkpoints

# What accelerate sets on a model that it prepares.
WRAPPING = ("forward", "_original_forward", "_is_accelerate_prepared")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """After the block, however it ends, random numbers and accelerate are as they were before.

    Inside of it accelerate's settings (its precision, above all) are those of a fresh process:
    they belong to a run, while accelerate keeps them for the life of the process. What it puts
    around the model's ``forward`` goes as well.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    shared = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    own = {name: model.__dict__[name] for name in WRAPPING if name in model.__dict__}
    for state in shared[1:]:
        state.clear()
    with kept_random_state():
        try:
            yield
        finally:
            # Which process of several this is remains true; a single one may choose anew.
            several = shared[0].get("num_processes", 1) > 1
            for state, old in list(zip(shared, before, strict=True))[several:]:
                state.clear()
                state.update(old)
            for name in WRAPPING:
                model.__dict__.pop(name, None)
            model.__dict__.update(own)


@contextmanager
def matrix_precision(name: str | None) -> Iterator[None]:
    """Inside of the block float32 matrix products round their factors to tf32 if that is its name.

    Only GPUs that have it do so. Every other name leaves torch's settings as they are.
    """
    if name != "tf32":
        yield
        return
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def kept_random_state() -> Iterator[None]:
    """What is drawn inside of the block leaves the numbers that are drawn after it as they are."""
    python, arrays, tensors = random.getstate(), numpy.random.get_state(), checkpoints.rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
        checkpoints.set_rng_state(tensors)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside of the block random numbers are those of a seed; after it the ones of before go on."""
    with kept_random_state():
        start_random(seed)
        yield


def start_random(seed: int) -> None:
    """Seed Python, NumPy and torch: the CPU's generator and the current GPU's, no other."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)
