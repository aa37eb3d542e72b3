"""From tensors and models to arrays that can be drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

# A map x -> z, or one that returns (z, log_det) as a Bijection does.
Map = Callable[[Tensor], Any]


def array(x: Any) -> NDArray[Any]:
    """A tensor, or anything numpy takes, on the CPU and without gradients."""
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        return (x.float() if x.dtype in {torch.bfloat16, torch.float16} else x).numpy()
    return np.asarray(x)


def points(x: Any, name: str) -> NDArray[Any]:
    """The rows of an ``(N, 2)`` tensor."""
    values = array(x)
    if values.ndim != 2 or values.shape[1] != 2:
        raise ValueError(f"{name} expects points of shape (N, 2), got {values.shape}.")
    return values


def like_model(model: Any, x: Tensor) -> Tensor:
    """x in the dtype and on the device of the model's first parameter or buffer."""
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                return x.to(tensor)
    return x.to(torch.get_default_dtype())


@contextmanager
def looking(model: Any) -> Iterator[None]:
    """No gradients, evaluation mode; each module's own mode comes back afterwards."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        if modules:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def apply(fn: Map, x: Tensor) -> Tensor:
    """Where ``fn`` takes x, whether it returns the point alone or ``(point, log_det)``."""
    with looking(fn):
        result = fn(like_model(fn, x))
    return result[0] if isinstance(result, tuple) else result


def log_density(model: Any, x: Tensor, name: str) -> NDArray[Any]:
    """log p of each row of x, for a model with ``log_prob`` or a callable: shape ``(N,)``."""
    log_prob = getattr(model, "log_prob", model)
    with looking(model):
        values = array(log_prob(like_model(model, x)))
    if values.shape != (len(x),):
        raise ValueError(f"{name} expects log p of shape ({len(x)},), got {values.shape}.")
    return values
