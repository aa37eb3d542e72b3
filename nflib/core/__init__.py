"""The algebra: layers, how they combine, and the density they give.

Change of variables: for an invertible, differentiable ``z = f(x)`` and a base density ``p_Z``,

    log p_X(x) = log p_Z(f(x)) + log|det df/dx|.

``forward`` goes from data x to noise z, ``inverse`` from z back to x. Each returns its output and
``log_det``, the log|det| of the map *just applied*, of shape ``(batch,)``. Hence the two log-dets
of one pair (x, z) add to zero, and those of a composition add up.
"""

from nflib.core.bases import Base, BaseDensity, StandardLogistic, StandardNormal, log_normal
from nflib.core.compose import Compose, Inverse, in_turn, require_bijection
from nflib.core.distributions import TorchBase
from nflib.core.flow import Flow, Model
from nflib.core.layer import Bijection, Layer, OutputError, Stochastic
from nflib.core.shapes import (
    EventShape,
    Shape,
    ShapeError,
    SingularMatrixError,
    describe,
    expand_log_det,
    fits,
    full_precision,
    is_known,
    log_det_dtype,
    sum_event,
    sum_log_det,
    zeros_log_det,
)
from nflib.core.values import DataError, check_finite, check_levels, check_values

__all__ = [
    "Base",
    "BaseDensity",
    "Bijection",
    "Compose",
    "DataError",
    "EventShape",
    "Flow",
    "Inverse",
    "Layer",
    "Model",
    "OutputError",
    "Shape",
    "ShapeError",
    "SingularMatrixError",
    "StandardLogistic",
    "StandardNormal",
    "Stochastic",
    "TorchBase",
    "check_finite",
    "check_levels",
    "check_values",
    "describe",
    "expand_log_det",
    "fits",
    "full_precision",
    "in_turn",
    "is_known",
    "log_det_dtype",
    "log_normal",
    "require_bijection",
    "sum_event",
    "sum_log_det",
    "zeros_log_det",
]
