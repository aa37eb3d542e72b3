"""A layer is called here, and whatever comes of it that is no result becomes one sentence."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from nflib.checks.errors import CheckError, GradientError, LayerError, LogDetError, PrecisionError
from nflib.checks.tools import first_line, show_row
from nflib.core import Layer, OutputError, log_det_dtype

Pair = tuple[Tensor, Tensor]


def call(layer: Layer, direction: str, x: Tensor, context: Tensor | None) -> Pair:
    """``layer.forward`` or ``layer.inverse`` at x.

    Raises: `LogDetError` if no output and log_det come back, `LayerError` for any other exception.
    """
    try:
        return layer(x, context) if direction == "forward" else layer.inverse(x, context)
    except CheckError:
        raise
    except OutputError as error:
        _explain(layer, direction, x, context)
        raise LogDetError(str(error)) from error
    except Exception as error:
        name = type(layer).__name__
        raise LayerError(f"{name}.{direction} raises {first_line(error)}.") from error


def differentiable(layer: Layer, direction: str, x: Tensor, context: Tensor | None) -> Tensor:
    """The output alone, from which autograd is to find the way back to x."""
    out = call(layer, direction, x, context)[0]
    if not out.requires_grad:
        raise GradientError(
            f"{type(layer).__name__}.{direction} returns an output without a graph, so autograd "
            "cannot differentiate it by its input: torch.no_grad(), detach(), .data, NumPy or "
            "torch.tensor(...) cuts the graph."
        )
    return out


def _explain(layer: Layer, direction: str, x: Tensor, context: Tensor | None) -> None:
    """Look at what the method itself returns, before the layer's own test of it refuses it."""
    guarded = getattr(type(layer), direction)
    method = inspect.unwrap(guarded)
    given = (x, context) if getattr(guarded, "takes_context", True) else (x,)
    try:
        result = method(layer, *given)
    except OutputError:
        return  # a layer inside of this one is to blame; the sentence names it
    check_result(layer, direction, x, result)


def check_result(layer: Layer, direction: str, x: Tensor, result: Any) -> None:
    """Output and log_det as the contract has them: type, shape, dtype, finite numbers."""
    name = f"{type(layer).__name__}.{direction}"
    if isinstance(result, Tensor) or result is None:
        got = (
            "None (is a return missing?)." if result is None else "one tensor: log_det is missing."
        )
        raise LogDetError(f"{name} expects to return a tuple (output, log_det), got {got}")
    if type(result) is not tuple or len(result) != 2:
        kind = type(result).__name__
        many = f"{len(result)} things" if isinstance(result, tuple) else f"a {kind}"
        raise LogDetError(f"{name} expects to return a tuple (output, log_det), got {many}.")
    for what, value in zip(("output", "log_det"), result, strict=True):
        if not isinstance(value, Tensor):
            raise LogDetError(
                f"{name} expects to return {what} as a tensor, got {type(value).__name__}."
            )
    _check_sizes(name, x, *result)
    _check_dtypes(name, x, *result)
    _check_finite(name, x, *result)


def _check_sizes(name: str, x: Tensor, out: Tensor, log_det: Tensor) -> None:
    if out.shape[:1] != x.shape[:1] or out.numel() != x.numel():
        raise LogDetError(
            f"{name} returns shape {tuple(out.shape)}, expected as many numbers a row as in "
            f"{tuple(x.shape)}."
        )
    if log_det.shape == x.shape[:1]:
        return
    hint = ""
    if log_det.ndim == 0:
        hint = ", not one for the whole batch (sum over the event only, or .expand(len(x)))"
    elif log_det.shape[0] == x.shape[0]:
        is_column = log_det.numel() == x.shape[0]
        hint = " (.flatten() it)" if is_column else ", so sum over the event, as with .sum(1)"
    elif log_det.shape == x.shape[1:]:
        hint = ", so sum over the event and not over the batch"
    raise LogDetError(
        f"{name} returns a log_det of shape {tuple(log_det.shape)}, "
        f"expected {tuple(x.shape[:1])}: one number a row{hint}."
    )


def _check_dtypes(name: str, x: Tensor, out: Tensor, log_det: Tensor) -> None:
    if out.dtype != x.dtype:
        raise PrecisionError(
            f"{name} turns {x.dtype} into {out.dtype}: .float(), or a new tensor without "
            "dtype=x.dtype, changes it."
        )
    if log_det.dtype != log_det_dtype(x.dtype):
        raise LogDetError(
            f"{name} returns a log_det in {log_det.dtype}, expected {log_det_dtype(x.dtype)}."
        )


def _check_finite(name: str, x: Tensor, out: Tensor, log_det: Tensor) -> None:
    for what, tensor in (("an output", out), ("a log_det", log_det)):
        finite = torch.isfinite(tensor)
        if bool(finite.all()):
            continue
        row = int((~finite).flatten(1).any(1).nonzero()[0]) if finite.ndim > 1 else None
        row = int((~finite).nonzero()[0]) if row is None else row
        value = tensor[row][~finite[row]].flatten()[0].item()
        raise LogDetError(
            f"{name} returns {what} that is not finite for finite input: {value} in row {row}, "
            f"where the input is {show_row(x, row)}."
        )
