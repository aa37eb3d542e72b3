"""Shapes of events and contexts, log-dets of a batch, and the errors that speak of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
# None stands for any size, Ellipsis for any number of further dims: (3, ...) or (None, 8, 8).
EventShape = tuple[Any, ...]


class ShapeError(ValueError):
    """An input whose shape, dtype or context does not fit; the message says what was expected."""


class SingularMatrixError(ValueError):
    """A matrix that should be invertible is not."""


class NoCommonShape(ValueError):
    """Two descriptions of shapes that no shape fits both."""


def fits(shape: Sequence[int], expected: EventShape | None) -> bool:
    """Whether a shape is one of those that ``expected`` describes."""
    if expected is None or shape == expected:
        return True
    try:
        meet(tuple(shape), expected)
    except NoCommonShape:
        return False
    return True


def meet(one: EventShape | None, other: EventShape | None) -> EventShape | None:
    """What two descriptions say together: of ``(3, ...)`` and ``(None, 8, 8)``, ``(3, 8, 8)``.

    Raises: NoCommonShape if no shape fits both.
    """
    if one is None or other is None:
        return one if other is None else other
    if ... in one and ... in other:
        # How many dims there are stays open; the first ones can be compared.
        _common(one[: one.index(...)], other[: other.index(...)], strict=False)
        return max(one, other, key=len)
    rank = len(one) if ... in other else len(other)
    return _common(widen(one, rank), widen(other, rank))


def _common(one: EventShape, other: EventShape, strict: bool = True) -> EventShape:
    if strict and len(one) != len(other):
        raise NoCommonShape
    for a, b in zip(one, other, strict=False):
        if a != b and a is not None and b is not None:
            raise NoCommonShape
    return tuple(b if a is None else a for a, b in zip(one, other, strict=False))


def widen(shape: EventShape, rank: int) -> EventShape:
    """A shape with an Ellipsis, if it has one, as one of so many dims."""
    if ... not in shape:
        return shape
    at, missing = shape.index(...), rank + 1 - len(shape)
    if missing < 0:
        raise NoCommonShape
    return (*shape[:at], *[None] * missing, *shape[at + 1 :])


def is_known(shape: EventShape | None) -> bool:
    """Whether a shape names every size."""
    return shape is not None and None not in shape and ... not in shape


def describe(shape: Sequence[Any] | None) -> str:
    """A shape as a person writes it: ``(batch, 3, any, any)``."""
    if shape is None:
        return "(any shape)"
    words = {None: "any", ...: "..."}
    inner = [str(words[size] if size is None or size is ... else size) for size in shape]
    return f"({inner[0]},)" if len(inner) == 1 else f"({', '.join(inner)})"


def sum_event(x: Tensor) -> Tensor:
    """Sum over everything but the batch: ``(batch, *event) -> (batch,)``."""
    return x.sum(tuple(range(1, x.ndim))) if x.ndim > 1 else x


def sum_log_det(terms: Tensor) -> Tensor:
    """Log-derivatives of an elementwise map, summed over the event in at least float32."""
    narrow = terms.dtype in (torch.bfloat16, torch.float16)
    return sum_event(terms.float() if narrow else terms)


def zeros_log_det(x: Tensor) -> Tensor:
    """A zero for each row, in the dtype of x and at least float32."""
    return torch.zeros(x.shape[0], device=x.device, dtype=log_det_dtype(x.dtype))


def log_det_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a log-det: its input's, but never narrower than float32."""
    return torch.promote_types(dtype, torch.float32)


def expand_log_det(log_det: Tensor, x: Tensor) -> Tensor:
    """The scalar log-det of a map that does not depend on x, one copy for each row."""
    return log_det.to(log_det_dtype(x.dtype)).expand(x.shape[0])


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Keeps matrix products out of autocast: only conditioners may run in bfloat16."""
    return torch.autocast(x.device.type, enabled=False)
