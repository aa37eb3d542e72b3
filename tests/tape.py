"""A CUDA graph without CUDA: what torch is asked to do is noted once and done again as it stands.

As on a GPU, recording computes nothing that lasts, replaying calls no line of Python, every number
that Python computed is baked in, and every tensor stays where it was. A function that is not fit
to be a graph gives other results here, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from nflib import graphs


class Tape(TorchDispatchMode):
    """Notes operations instead of doing them: what would change a tensor changes a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not func._schema.is_mutable:
            result = func(*args, **kwargs)
        else:
            copies: dict[int, tuple[Tensor, Tensor]] = {}

            def copy(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                if id(value) not in copies:
                    copies[id(value)] = (value, value.clone())
                return copies[id(value)][1]

            result = func(*tree_map(copy, args), **tree_map(copy, kwargs))
            back = {id(new): old for old, new in copies.values()}
            result = tree_map(lambda value: back.get(id(value), value), result)
        if not func.is_view:
            self.notes.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, result in self.notes:
                again = func(*args, **kwargs)
                for old, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                    if isinstance(old, Tensor) and old is not new:
                        old.detach().copy_(new)


def record_on_tape(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    state = torch.get_rng_state()
    with Tape() as tape:
        result = function()
    torch.set_rng_state(state)
    return tape.replay, result


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """`nflib.graphs.Replayed` records on tape as it would on a GPU; the list tells how often."""
    made: list[Any] = []

    def record(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        made.append(function)
        return record_on_tape(function)

    monkeypatch.setattr(graphs, "recorder_for", lambda device: record)
    return made
