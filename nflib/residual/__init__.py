"""Residual flows: ``z = x + g(x)`` is one to one if g is a contraction.

    block = ResidualBlock(LipschitzMLP(2))
    z, log_det = block(x)

The network g may be any whose Lipschitz constant is below 1; `LipschitzMLP` and `LipschitzConvNet`
keep theirs below a bound. There is no formula for the inverse and none for the log-det: the inverse
is a fixed point (`nflib.residual.solve`), the log-det the determinant of the Jacobian or a series,
cut off or estimated without bias (`nflib.residual.log_det`).

Behrmann et al. 2019 (i-ResNet), https://arxiv.org/abs/1811.00995; Chen et al. 2019 (Residual Flow),
https://arxiv.org/abs/1906.02735.
"""

from nflib.residual.block import ResidualBlock
from nflib.residual.lipschitz import (
    LipschitzConvNet,
    LipschitzMLP,
    LipSwish,
    SpectralConv2d,
    SpectralLinear,
)
from nflib.residual.log_det import (
    Exact,
    LogDet,
    Roulette,
    Series,
    jacobian_matrix,
    weighted_series,
)
from nflib.residual.pullback import pullback
from nflib.residual.solve import ConvergenceError

__all__ = [
    "ConvergenceError",
    "Exact",
    "LipSwish",
    "LipschitzConvNet",
    "LipschitzMLP",
    "LogDet",
    "ResidualBlock",
    "Roulette",
    "Series",
    "SpectralConv2d",
    "SpectralLinear",
    "jacobian_matrix",
    "pullback",
    "weighted_series",
]
