"""Results that are kept for as long as the parameters they come from are the same."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# How many optimizer steps there were in this process: fused ones change parameters uncounted.
steps = 0


def _count_step(*_: Any) -> None:
    global steps
    steps += 1


register_optimizer_step_post_hook(_count_step)


def while_unchanged(method: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """Keep what a module's method makes of its parameters, in evaluation and without gradients.

    A matrix is then assembled once and not in each call of ``log_prob`` or ``sample``. Parameters
    count their changes in place (``Tensor._version``): after a change, a load, a move to another
    dtype or device, or any optimizer's step the method runs again. In training, with gradients, in
    a compiled graph and under ``torch.func`` it always runs. Only what is written through
    ``.data``, which hides a change from torch as well, goes unnoticed.
    """
    slot = f"_kept_{method.__name__}"

    @functools.wraps(method)
    def run(module: nn.Module) -> Tensor:
        if module.training or torch.is_grad_enabled() or is_traced():
            return method(module)
        state = [(p, steps, p._version, p.dtype, p.device) for p in module.parameters()]
        kept: tuple[Any, Tensor] | None = module.__dict__.get(slot)
        # Compared one by one, for two parameters are the same only if they are one object.
        if kept is None or not _same(kept[0], state):
            kept = module.__dict__[slot] = state, method(module)
        return kept[1]

    return run


def is_traced() -> bool:
    """Whether a compiler, or a transformation of `torch.func` such as ``vmap``, is at work."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def _same(old: list[tuple[Any, ...]], new: list[tuple[Any, ...]]) -> bool:
    return len(old) == len(new) and all(
        a[0] is b[0] and a[1:] == b[1:] for a, b in zip(old, new, strict=True)
    )
