"""Matrices that are kept while a block of code runs.

Some layers assemble a matrix from their parameters: LU multiplies its factors, a MADE spreads its
weights over a masked matrix. Inside of a block that changes no parameter once is enough:

    with cached(flow), torch.no_grad():
        for rows in x.split(1000):
            flow.log_prob(rows)

`nflib.metrics.evaluate` and the inverses that run a network many times do so themselves. Outside of
the block nothing is kept, so nothing can be out of date.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from nflib.arguments import checked

# What is kept for each module of the models that `cached` was given; None outside of any block.
_kept: ContextVar[dict[nn.Module, dict[str, Tensor]] | None] = ContextVar("kept", default=None)

# What `nflib.prepared` has made for modules, with gradients; None outside of any block.
_ready: ContextVar[dict[nn.Module, Any] | None] = ContextVar("ready", default=None)


@checked
@contextmanager
def cached(model: nn.Module) -> Iterator[None]:
    """Keep what the model's methods marked `kept` return, as long as the block runs.

    Parameters must not change inside of it. With gradients, in a compiled graph and under
    ``torch.func`` nothing is kept, for the result would not know its origin.
    """
    before = _kept.get() or {}
    # A block inside of another goes on with what is there.
    token = _kept.set({module: before.get(module, {}) for module in model.modules()} | before)
    try:
        yield
    finally:
        _kept.reset(token)


def kept(method: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """Mark a method that makes a tensor of its module's parameters and of nothing else."""
    name = method.__name__

    @functools.wraps(method)
    def run(module: nn.Module) -> Tensor:
        if is_traced():
            return method(module)
        made = _ready.get()
        if made is not None and module in made:
            return made[module]
        stores = _kept.get()
        store = None if stores is None or torch.is_grad_enabled() else stores.get(module)
        if store is None:
            return method(module)
        if name not in store:
            store[name] = method(module)
        return store[name]

    return run


@contextmanager
def fresh() -> Iterator[None]:
    """Inside of the block nothing is taken from what is kept: a recording needs its own."""
    token = _kept.set(None)
    try:
        with ready(None):
            yield
    finally:
        _kept.reset(token)


@contextmanager
def ready(made: dict[nn.Module, Any] | None) -> Iterator[None]:
    """Inside of the block these modules find what they need of their parameters."""
    token = _ready.set(made)
    try:
        yield
    finally:
        _ready.reset(token)


def made_ready() -> dict[nn.Module, Any] | None:
    """What `ready` was given, or None; a compiler, which arranges all of it itself, sees none."""
    return None if is_traced() else _ready.get()


def is_traced() -> bool:
    """Whether a compiler, or a transformation of `torch.func` such as ``vmap``, is at work."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None
