"""What the checks share: Jacobians, random parameters, and numbers in sentences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from nflib.arguments import Count, NonNegative, Rule, checked
from nflib.core import ShapeError


def _function(value: Any) -> Any:
    if not callable(value) or isinstance(value, type):
        raise TypeError
    return value


Map = Annotated[Callable[[Tensor], Tensor], Rule("a function or a network", _function)]


@checked
def randomize_parameters(module: nn.Module, seed: Count = 0, scale: NonNegative = 0.5) -> None:
    """Shake every parameter away from its initialisation, in place.

    Gaussian noise of standard deviation ``scale``, divided for matrices and kernels by the square
    root of their fan-in, so that a layer of any width is moved about as far.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((noise * scale / fan_in**0.5).to(parameter))


@checked
def jacobian(function: Map, x: Tensor) -> Tensor:
    """Jacobians of a batch by autograd: ``(batch, D_out, D_in)``, events flattened.

    One backward pass for each output; it relies on rows that do not see one another.
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ShapeError(
            f"jacobian expects x of shape (batch, *event) in floating-point numbers, got {x.dtype} "
            f"of shape {tuple(x.shape)}."
        )
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = function(x).flatten(1)
        rows = [
            torch.autograd.grad(column.sum(), x, retain_graph=True, materialize_grads=True)[0]
            for column in out.unbind(1)
        ]
    return torch.stack([row.flatten(1) for row in rows], 1).detach()


def noise_like(x: Tensor, seed: int) -> Tensor:
    """Standard normal numbers that do not touch the state of torch's own generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)


def worst(error: Tensor, scale: Tensor | float = 1.0) -> float:
    """The largest |error| / scale; NaN counts as infinite, nothing at all as zero."""
    if error.numel() == 0:
        return 0.0
    return (error.detach().abs() / scale).nan_to_num(nan=torch.inf).max().item()


def below(tolerance: float, dtype: torch.dtype) -> str:
    """How closely two things agreed, in a form that is the same on every machine."""
    return f"{str(dtype).removeprefix('torch.')}, error < {tolerance:g}"


def rows(context: Tensor | None, at: slice) -> Tensor | None:
    """Some rows of a context that need not be there."""
    return None if context is None else context[at]


def apart(one: float, other: float) -> tuple[str, str]:
    """Two numbers with as many digits as show that they differ, six at least."""
    for digits in range(6, 18):
        # Zeros at the end are kept where it is the last digit that counts.
        form = f".{digits}g" if digits == 6 else f"#.{digits}g"
        words = f"{one:{form}}", f"{other:{form}}"
        if words[0] != words[1]:
            break
    return words


def show_row(x: Tensor, row: int) -> str:
    """The numbers of one event, as far as they go into a sentence."""
    numbers = x[row].flatten().tolist()
    words = ", ".join(f"{number:.4g}" for number in numbers[:4])
    return f"({words}, ...)" if len(numbers) > 4 else f"({words})"


def first_line(error: Exception) -> str:
    """The first sentence of an error's message, without the stop at its end."""
    lines = str(error).strip().splitlines()
    return (
        f"{type(error).__name__}: {lines[0].split('. ')[0].rstrip('. ')}"
        if lines
        else (type(error).__name__)
    )
