"""Log-likelihoods in nats, and in bits per dimension with the constants right."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import numpy
import torch
from torch import Tensor, nn

from nflib.arguments import Rule, Size, checked, integer, real
from nflib.cache import cached
from nflib.core import Shape, check_finite


class HasLogProb(Protocol):
    """Any model with ``log_prob(x)`` or ``log_prob(x, context)``, in nats for each row."""

    def log_prob(self, x: Tensor, /) -> Tensor: ...


class CountsDims(Protocol):
    """A model whose rows differ in how many numbers they hold, such as padded recordings."""

    def dims_of(self, x: Tensor) -> Tensor:
        """How many numbers of each row count, ``(rows,)``; by default all of them do."""
        ...


def _nats(value: Any) -> Any:
    # A number that is not one is passed on: it is what some model has found.
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number and not isinstance(value, Tensor | numpy.ndarray):
        raise TypeError
    return value


def _dims(value: Any) -> float:
    count = math.prod(map(integer, value)) if isinstance(value, tuple | list) else real(value)
    if not count > 0:
        raise ValueError
    return count


def _model(value: Any) -> Any:
    if isinstance(value, type) or not callable(getattr(value, "log_prob", None)):
        raise TypeError
    return value


LogProb = Annotated[Tensor | float, Rule("a number of nats, or a tensor of them", _nats)]
Dims = Annotated[
    float | Shape, Rule("a number of dimensions above 0, or the shape of an event", _dims)
]
Judged = Annotated[HasLogProb, Rule("a model with log_prob", _model)]


@checked
def bits_per_dim(log_prob: LogProb, dims: Dims, levels: Size = 1) -> Any:
    """Bits per dimension of integer data: ``-log_prob / (D log 2) + log2(levels)``.

    ``log_prob`` is in nats. If the model saw the integers (plus noise) as they are, leave
    ``levels`` at 1. If it saw them divided by the number k of grey levels, give ``levels=k``: the
    density was measured in units of k levels a dimension, which is worth log2 k bits. So a
    uniform model of k-level data has exactly log2 k bits/dim: 8 for 256 levels.

    Args:
        log_prob: log-densities in nats, any shape, or one number.
        dims: the number D of dimensions (for rows of different lengths its mean), or the event's
            shape.
        levels: what the integers were divided by before the model saw them.

    Returns: bits per dimension, of log_prob's shape. Lower is better.
    """
    assert not isinstance(dims, tuple)  # which `checked` counts
    return -log_prob / (dims * math.log(2)) + math.log2(levels)


@dataclass(frozen=True)
class Score:
    """The mean log-likelihood of a data set, with what one needs to quote it.

    Attributes:
        nats: mean log-likelihood of a row, in nats; higher is better.
        standard_error: of that mean, in nats.
        rows: number of rows.
        dims: numbers in a row; their mean, if rows differ (see `CountsDims`).
        likelihood: ``"exact"``, ``"lower bound"`` or ``"estimate"``.
        samples: draws of the model's own noise behind each row's number.
    """

    nats: float
    standard_error: float
    rows: int
    dims: float
    likelihood: str
    samples: int = 1

    def bits_per_dim(self, levels: int = 1) -> float:
        """The same in bits per dimension, see `nflib.metrics.bits_per_dim`."""
        return float(bits_per_dim(self.nats, self.dims, levels))

    def __repr__(self) -> str:
        draws = f" with {self.samples} samples" if self.samples > 1 else ""
        return (
            f"{self.nats:.3f} +- {self.standard_error:.3f} nats ({self.likelihood}{draws}, "
            f"{self.rows} rows of {self.dims:.6g})"
        )


@checked
def log_probs(
    model: Judged,
    x: object,
    context: object = None,
    batch_size: Size = 2048,
    samples: Size = 1,
) -> Tensor:
    """``model.log_prob`` of every row of x in large batches without gradients, ``(rows,)``.

    With ``samples = K > 1`` the model is asked K times and a row gets
    ``log 1/K sum_k exp(log_prob_k)``: for a model that draws noise of its own, such as
    dequantization, the importance-weighted bound, which rises towards log P(x) with K (Burda et
    al. 2015, https://arxiv.org/abs/1509.00519). A model that has ``log_weights(x, K)``, such as a
    VAE, whose encoder need not run K times, is asked for all of them at once.

    Args: those of `evaluate`.
    """
    return _log_probs(model, *_data("log_probs", model, x, context), batch_size, samples)


@checked
def evaluate(
    model: Judged,
    x: object,
    context: object = None,
    batch_size: Size = 2048,
    samples: Size = 1,
) -> Score:
    """The mean log-likelihood of x under any model with ``log_prob``, in evaluation mode.

    Args:
        model: a `Flow` or any other model with ``log_prob(x)`` or ``log_prob(x, context)``. If it
            has ``dims_of``, see `CountsDims`, bits per dimension are of the numbers that count.
        x: data, ``(rows, *event)``, a tensor or a NumPy array. An array's floating-point numbers
            are converted to the model's dtype.
        context: ``(rows, ...)`` if the model is conditional: one for each row of x.
        batch_size: rows at a time; only memory depends on it.
        samples: draws of the model's own noise for each row, see `log_probs`; cost grows with it.

    Raises: ValueError before anything runs, for data that are not finite or that the model cannot
        take (its ``check_data``), and for a context with another number of rows.
    """
    rows, given = _data("evaluate", model, x, context)
    with _evaluating(model):
        values = _log_probs(model, rows, given, batch_size, samples).double()
    spread = values.std().item() / len(values) ** 0.5 if len(values) > 1 else math.nan
    count = getattr(model, "dims_of", lambda rows: torch.tensor(rows[0].numel()))
    return Score(
        nats=values.mean().item(),
        standard_error=spread,
        rows=len(values),
        dims=count(rows).double().mean().item(),
        likelihood=getattr(model, "likelihood", "exact"),
        samples=samples,
    )


def _data(name: str, model: Any, x: Any, context: Any) -> tuple[Tensor, Tensor | None]:
    """Both as tensors, or one sentence on what is wrong with them."""
    x = _as_tensor(name, "x", model, x)
    context = None if context is None else _as_tensor(name, "context", model, context)
    if len(x) == 0:
        raise ValueError(f"{name} expects at least one row, got none.")
    if context is not None and len(context) != len(x):
        raise ValueError(
            f"{name} expects a context for each of the {len(x)} rows of x, got {len(context)}."
        )
    check_finite(x)
    if hasattr(model, "check_data"):
        model.check_data(x)
    return x, context


def _as_tensor(name: str, what: str, model: Any, rows: Any) -> Tensor:
    if isinstance(rows, numpy.ndarray) and rows.dtype.kind in "biuf":
        found = torch.from_numpy(numpy.array(rows))  # a copy: torch shares no read-only memory
        parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
        if not parameters:
            return found
        kind = parameters[0].dtype if found.is_floating_point() else found.dtype
        return found.to(parameters[0].device, kind)
    if not isinstance(rows, Tensor) or rows.ndim == 0:
        got = getattr(rows, "dtype", None) or type(rows).__name__
        raise ValueError(f"{name} expects {what} as a tensor or NumPy array of rows, got {got}.")
    return rows


@torch.no_grad()
def _log_probs(
    model: Any, x: Tensor, context: Tensor | None, batch_size: int, samples: int
) -> Tensor:
    batches = x.split(batch_size)
    contexts = [None] * len(batches) if context is None else context.split(batch_size)
    parts = []
    with cached(model) if isinstance(model, nn.Module) else nullcontext():
        for part, c in zip(batches, contexts, strict=True):
            given = (part,) if c is None else (part, c)
            draws = _draws(model, given, samples)
            parts.append(draws.logsumexp(0) - math.log(samples))
    return torch.cat(parts)


def _draws(model: Any, given: tuple[Tensor, ...], samples: int) -> Tensor:
    """What ``log_prob`` says in so many draws of the model's noise, ``(samples, rows)``."""
    log_weights = getattr(model, "log_weights", None)
    if callable(log_weights) and len(given) == 1:
        draws: Tensor = log_weights(*given, samples)
        return draws
    return torch.stack([model.log_prob(*given) for _ in range(samples)])


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the one it was in."""
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()
