"""Products of a network's transposed Jacobian and a vector, without the Jacobian."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nflib.cache import is_traced

Map = Callable[[Tensor], Tensor]
Method = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def pullback(function: Map, x: Tensor) -> tuple[Tensor, Map]:
    """``g(x)``, and the function that takes v to ``J^T v``, J the Jacobian of g at x, row by row.

    It works under ``torch.no_grad()``, too, where neither result has a graph; elsewhere both can be
    differentiated once more. Cost: one forward pass, and one backward pass for each product.

    Args:
        function: g, whose rows do not see one another.
        x: ``(batch, *event)``.
    """
    if is_traced():
        # What a compiler and vmap can follow; the hooks of a checkpoint cannot follow it.
        value, pull, *_ = torch.func.vjp(function, x)
        return value, lambda v: pull(v)[0]
    has_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        at = x if x.requires_grad else x.detach().requires_grad_()
        value = function(at)

    def transposed(v: Tensor) -> Tensor:
        return torch.autograd.grad(
            value, at, v, retain_graph=True, create_graph=torch.is_grad_enabled()
        )[0]

    return value if has_graph else value.detach(), transposed


def in_inference_mode() -> bool:
    """Whether torch's inference mode is on, which no compiler meets."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def without_graph(method: Method, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """A method that needs gradients inside, called under ``torch.inference_mode()``.

    There nothing has a graph, not even under ``enable_grad``: it is left, with no gradients asked
    for, and its tensors are copied, for no graph may hold them.
    """
    with torch.inference_mode(False), torch.no_grad():
        return method(x.clone(), None if context is None else context.clone())
