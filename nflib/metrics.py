"""Numbers that can be compared: nats, bits per dimension, and how like two images are."""

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


@checked
def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels: ``10 log10(255^2 / mean squared error)``.

    Higher is better; 10 more decibels are a tenth of the error, and images that are equal have
    infinitely many. Rounding to whole grey levels alone leaves 58.9.

    Args:
        images, truth: grey levels 0 .. 255, ``(..., C, H, W)``; leading dims are broadcast, so that
            draws ``(k, N, C, H, W)`` stand beside truth ``(N, C, H, W)``.

    Returns: one number an image, ``(...)``.
    """
    images, truth = _pair("psnr", images, truth, least=1)
    error = (images - truth).square().mean((-3, -2, -1))
    return (10 * (255**2 / error).log10()).float()


@checked
def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity: 1 for equal images, near 0 for unrelated ones.

    In a Gaussian window of 1.5 pixels around each pixel, the product of how alike the two means,
    the two variances and the two patterns are; then the mean over pixels and channels, by
    `skimage.metrics` with the settings of the paper. Wang et al. 2004,
    https://doi.org/10.1109/TIP.2003.819861. Cost: some milliseconds an image of 64 x 64.

    Args:
        images, truth: as for `psnr`, of at least 11 pixels a side.

    Returns: one number an image, ``(...)``.
    """
    from skimage.metrics import structural_similarity

    images, truth = _pair("ssim", images, truth, least=11)
    pairs = zip(*(each.reshape(-1, *each.shape[-3:]) for each in (images, truth)), strict=True)
    found = [
        structural_similarity(
            one.numpy(),
            other.numpy(),
            channel_axis=0,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for one, other in pairs
    ]
    return torch.tensor(found).float().reshape(images.shape[:-3])


def _pair(name: str, images: Tensor, truth: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both in float64, of the same leading dims, or one sentence on what is wrong with them."""
    if images.ndim < 3 or images.shape[-3:] != truth.shape[-3:] or min(images.shape[-2:]) < least:
        raise ValueError(
            f"{name} expects images and truth of one shape (..., channels, height, width), at "
            f"least {least} pixels a side, got {tuple(images.shape)} and {tuple(truth.shape)}."
        )
    try:
        one, other = torch.broadcast_tensors(images.double(), truth.double())
    except RuntimeError:
        raise ValueError(
            f"{name} expects leading dims of images and truth that can be broadcast, got "
            f"{tuple(images.shape)} and {tuple(truth.shape)}."
        ) from None
    return one, other


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
