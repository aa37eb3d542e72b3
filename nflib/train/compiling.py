"""``torch.compile`` in pieces: each kind of layer is compiled once, however many there are.

A whole model takes the compiler longer with every layer. Layers of one kind, which differ in their
weights and in nothing else, share what was compiled for the first of them. What stands inside an
`Inverse` runs the other way and is left as it is: for a MAF that way is D steps, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nflib import reversible
from nflib.conditioning import Conditioned
from nflib.core import Compose, Inverse, Layer
from nflib.multiscale import MultiScale

# All layers share the lines that check their inputs, and to torch's compiler they are therefore
# variants of one function; it allows 8, a model of three scales has more kinds of layers.
KINDS = 256


@contextmanager
def compiled(model: nn.Module, is_on: bool = True) -> Iterator[Callable[[Any], Any]]:
    """Inside of the block the model's layers are compiled; after it they are as they were.

    Yields a function for what calls the model: a model that is no composition of layers, or that
    rebuilds its activations, is compiled by it as a whole.
    """
    pieces = regions(model) if is_on else []
    if not is_on or not pieces:
        with reversible.compiled_whole(is_on):
            yield torch.compile if is_on else lambda call: call
        return
    before = [piece._compiled_call_impl for piece in pieces]
    for piece in pieces:
        piece.compile()
    try:
        with torch._dynamo.config.patch(recompile_limit=KINDS):
            yield lambda call: call
    finally:
        for piece, old in zip(pieces, before, strict=True):
            piece._compiled_call_impl = old


def regions(model: nn.Module) -> list[nn.Module]:
    """The layers to compile: all with parameters that are no composition of others."""
    if any(isinstance(module, reversible.Reversible) for module in model.modules()):
        return []
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, Inverse):
                continue
            is_whole = isinstance(child, Layer) and not isinstance(
                child, Compose | MultiScale | Conditioned
            )
            if not is_whole:
                visit(child)
            elif next(child.parameters(), None) is not None:
                found.append(child)

    visit(model)
    return found
