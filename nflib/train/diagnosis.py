"""What to say when a loss or a gradient is not finite: which step, layer or parameter, and row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteError(ArithmeticError):
    """The loss or the gradient became NaN or infinite; the message says when, where and on what.

    Attributes:
        batch: the tensors of that step, as the loss got them.
        row: which of their rows stands out, or None without data.
    """

    def __init__(self, message: str, batch: Sequence[Tensor] = (), row: int | None = None) -> None:
        super().__init__(message)
        self.batch, self.row = list(batch), row


def diagnose(
    model: nn.Module,
    objective: Callable[..., Tensor],
    batch: Sequence[Tensor],
    loss: float,
    place: Callable[[int], str],
) -> tuple[str, int | None]:
    """What is not finite, in words, and the row that stands out.

    The gradients are those of the step, not yet clipped; the batch is run once more.

    Args:
        place: where a row of the batch comes from, in words.
    """
    with _watched(model) as found, torch.no_grad():
        objective(model, *batch)
    what = f"a loss of {loss:.4g}" if math.isfinite(loss) else "a loss that is not finite"
    named = list(model.named_parameters())
    weights = [name for name, p in named if not _finite(p)]
    gradients = [name for name, p in named if p.grad is not None and not _finite(p.grad)]
    row = None
    if weights:
        where = f"the weights {weights[0]} are not finite any more"
    elif found:
        layer, row = found[0]
        where = f"the first layer to go wrong is {layer}"
        where += f" for {place(row)}" if row is not None else ""
    elif gradients:
        where = f"the gradient of {gradients[0]} is not finite"
    elif math.isfinite(loss):
        size, name = max((float(p.grad.abs().max()), n) for n, p in named if p.grad is not None)
        where = (
            f"the norm of the gradient overflows, though each of its numbers is finite "
            f"(up to {size:.1g}, in that of {name})"
        )
    else:
        where = "no layer shows it when the batch is run again"
    if row is None and batch:
        row, value = furthest(batch[0])
        where += f"; furthest out is {place(row)}, which holds {value:.4g}"
    return f"{what}: {where}", row


def furthest(x: Tensor) -> tuple[int, float]:
    """The row furthest from the median, in units of what is usual, and its number there."""
    x = x.detach().flatten(1).double()
    distance = (x - x.nanmedian(0).values).abs()
    usual = distance.nanmedian(0).values.maximum(distance.nanmedian())
    relative = (distance / usual.clamp_min(1e-12)).nan_to_num(torch.inf)
    row, column = divmod(int(relative.argmax()), x.shape[1])
    return row, float(x[row, column])


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[tuple[str, int | None]]]:
    """Layers (what returns an output and a log_det) in the order in which they went wrong."""
    found: list[tuple[str, int | None]] = []

    def watch(name: str, layer: nn.Module) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not (isinstance(output, tuple) and len(output) == 2):
                return
            for what, tensor in zip(("output", "log_det"), output, strict=True):
                if isinstance(tensor, Tensor) and not _finite(tensor):
                    bad = (~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1)
                    text = f"{name} ({type(layer).__name__}), whose {what} is not finite"
                    # A fault of all rows is none of the data.
                    found.append((text, None if bool(bad.all()) else int(bad.int().argmax())))

        return layer.register_forward_hook(hook)

    hooks = [watch(name, module) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
