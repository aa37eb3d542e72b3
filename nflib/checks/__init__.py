"""Tests by computation: is this layer the bijection it says it is?

Each check compares what a layer claims with what autograd, an inverse or a grid finds, in float64
and on random parameters: at its identity initialisation a wrong log-det may well be zero. A
failed check raises a `CheckError` in one sentence that names the layer and the mistake; a passed
one says what was compared.

    check_bijection(MyLayer(4), torch.randn(8, 4))  # in a notebook: shows a table

Checks try a few points; they are no proof. They cannot see a fault elsewhere, nor that all of R^D
is reached: `check_onto` tries noise far out, and `check_normalized` integrates the density itself
in one or two dimensions.
"""

from nflib.checks.bijection import (
    check_batch_independence,
    check_bijection,
    check_inverse,
    check_log_det,
)
from nflib.checks.density import check_autoregressive, check_normalized
from nflib.checks.errors import (
    AutoregressiveError,
    BatchError,
    CheckError,
    CompileError,
    GradientError,
    InverseError,
    LayerError,
    LogDetError,
    NormalizationError,
    OntoError,
    PrecisionError,
    Report,
    StateError,
    VmapError,
)
from nflib.checks.onto import check_onto
from nflib.checks.tools import Map, jacobian, randomize_parameters
from nflib.checks.training import (
    check_autocast,
    check_compile,
    check_gradients,
    check_state,
    check_vmap,
)

__all__ = [
    "AutoregressiveError",
    "BatchError",
    "CheckError",
    "CompileError",
    "GradientError",
    "InverseError",
    "LayerError",
    "LogDetError",
    "Map",
    "NormalizationError",
    "OntoError",
    "PrecisionError",
    "Report",
    "StateError",
    "VmapError",
    "check_autocast",
    "check_autoregressive",
    "check_batch_independence",
    "check_bijection",
    "check_compile",
    "check_gradients",
    "check_inverse",
    "check_log_det",
    "check_normalized",
    "check_onto",
    "check_state",
    "check_vmap",
    "jacobian",
    "randomize_parameters",
]
