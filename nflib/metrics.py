"""Numbers that can be compared: nats, and bits per dimension with the constants right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nflib.core import Shape
from nflib.data import check_finite


def bits_per_dim(log_prob: Tensor | float, dims: int | Shape, levels: int = 1) -> Any:
    """Bits per dimension of integer data: ``-log_prob / (D log 2) + log2(levels)``.

    ``log_prob`` is in nats. If the model saw the integers (plus noise) as they are, leave
    ``levels`` at 1. If it saw them divided by the number k of grey levels, give ``levels=k``: the
    density was measured in units of k levels a dimension, which is worth log2 k bits. So a
    uniform model of k-level data has exactly log2 k bits/dim: 8 for 256 levels.

    Args:
        log_prob: log-densities in nats, any shape, or one number.
        dims: the number D of dimensions, or the event's shape.
        levels: what the integers were divided by before the model saw them.

    Returns: bits per dimension, of log_prob's shape. Lower is better.
    """
    count = dims if isinstance(dims, int) else math.prod(dims)
    if count < 1 or levels < 1:
        raise ValueError(
            f"bits_per_dim expects positive dims and levels, got dims={dims}, levels={levels}."
        )
    return -log_prob / (count * math.log(2)) + math.log2(levels)


@dataclass(frozen=True)
class Score:
    """The mean log-likelihood of a data set, with what one needs to quote it.

    Attributes:
        nats: mean log-likelihood of a row, in nats; higher is better.
        standard_error: of that mean, in nats.
        rows: number of rows.
        dims: numbers in a row.
        likelihood: ``"exact"``, ``"lower bound"`` or ``"estimate"``.
        samples: draws of the model's own noise behind each row's number.
    """

    nats: float
    standard_error: float
    rows: int
    dims: int
    likelihood: str
    samples: int = 1

    def bits_per_dim(self, levels: int = 1) -> float:
        """The same in bits per dimension, see `nflib.metrics.bits_per_dim`."""
        return float(bits_per_dim(self.nats, self.dims, levels))

    def __repr__(self) -> str:
        draws = f" with {self.samples} samples" if self.samples > 1 else ""
        return (
            f"{self.nats:.3f} +- {self.standard_error:.3f} nats ({self.likelihood}{draws}, "
            f"{self.rows} rows of {self.dims})"
        )


@torch.no_grad()
def log_probs(
    model: Any,
    x: Tensor,
    context: Tensor | None = None,
    batch_size: int = 2048,
    samples: int = 1,
) -> Tensor:
    """``model.log_prob`` of every row of x in large batches without gradients, ``(rows,)``.

    With ``samples = K > 1`` the model is asked K times and a row gets
    ``log 1/K sum_k exp(log_prob_k)``: for a model that draws noise of its own, such as
    dequantization, the importance-weighted bound, which rises towards log P(x) with K (Burda et
    al. 2015, https://arxiv.org/abs/1509.00519).
    """
    if len(x) == 0:
        raise ValueError("log_probs expects at least one row, got none.")
    if samples < 1:
        raise ValueError(f"log_probs expects at least one sample, got {samples}.")
    check_finite(x)
    check_data = getattr(model, "check_data", None)
    if check_data is not None:
        check_data(x)
    contexts = [None] * len(x) if context is None else context.split(batch_size)
    parts = []
    for part, c in zip(x.split(batch_size), contexts, strict=False):
        draws = [
            model.log_prob(part) if c is None else model.log_prob(part, c) for _ in range(samples)
        ]
        parts.append(torch.stack(draws).logsumexp(0) - math.log(samples))
    return torch.cat(parts)


def evaluate(
    model: Any,
    x: Tensor,
    context: Tensor | None = None,
    batch_size: int = 2048,
    samples: int = 1,
) -> Score:
    """The mean log-likelihood of x under any model with ``log_prob``, in evaluation mode.

    Args:
        model: a `Flow` or any other model with ``log_prob(x)`` or ``log_prob(x, context)``.
        x: data, ``(rows, *event)``.
        context: ``(rows, ...)`` if the model is conditional.
        batch_size: rows at a time; only memory depends on it.
        samples: draws of the model's own noise for each row, see `log_probs`; cost grows with it.
    """
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        values = log_probs(model, x, context, batch_size, samples).double()
    finally:
        if was_training:
            model.train()
    spread = values.std().item() / len(values) ** 0.5 if len(values) > 1 else math.nan
    return Score(
        nats=values.mean().item(),
        standard_error=spread,
        rows=len(values),
        dims=x[0].numel(),
        likelihood=getattr(model, "likelihood", "exact"),
        samples=samples,
    )
