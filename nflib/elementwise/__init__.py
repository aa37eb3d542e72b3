"""Monotone maps of one number whose parameters a network predicts: the transformers of a flow.

`Coupling` and the autoregressive flows apply them to each entry of an event:

    z_i = tau(x_i; theta_i),    log|det| = sum_i log |d tau / dx (x_i; theta_i)|

All share one interface. ``forward(x, parameters)`` and ``inverse(z, parameters)`` take x or z of
shape ``(batch, *event)`` and parameters of shape ``(batch, count, *event)``, as a network that
predicts ``count`` numbers for each entry returns them, and give back the mapped entries and the
logarithm of the derivative, both ``(batch, *event)``.

    map                      numbers for each entry   inverse
    Additive                 1                        formula
    Affine                   2                        formula
    RationalQuadraticSpline  3 K - 1                  formula (a quadratic equation)
    LogisticMixtureCDF       3 K + 2                  Newton between exact brackets
    MonotoneNet              3 K L                    the same, layer by layer

Every formula is written without differences of nearly equal numbers: values, log-derivatives and
gradients stay finite for parameters of any size that a network in float32 may predict.
"""

from nflib.elementwise.affine import Additive, Affine
from nflib.elementwise.base import Elementwise, ElementwiseMap
from nflib.elementwise.mixture import (
    LogisticMixtureCDF,
    NotInvertedError,
    invert_logit_mixture,
    logit_mixture,
)
from nflib.elementwise.monotone import MonotoneNet
from nflib.elementwise.pointwise import Pointwise
from nflib.elementwise.spline import RationalQuadraticSpline

__all__ = [
    "Additive",
    "Affine",
    "Elementwise",
    "ElementwiseMap",
    "LogisticMixtureCDF",
    "MonotoneNet",
    "NotInvertedError",
    "Pointwise",
    "RationalQuadraticSpline",
    "invert_logit_mixture",
    "logit_mixture",
]
