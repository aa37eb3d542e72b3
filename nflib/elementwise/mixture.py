"""Maps made of logistic CDFs: the mixture of Flow++, and the search for their inverses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nflib.arguments import Positive, Size, checked
from nflib.cache import is_traced
from nflib.elementwise.base import Elementwise
from nflib.rootfinding import Function, solve_increasing

# By how much of 1 + |x| an inverse may be wrong.
TOLERANCE = 1e-4


class NotInvertedError(ValueError):
    """A numerical inverse did not reach its tolerance, so that it is not an inverse."""


class LogisticMixtureCDF(Elementwise):
    """``z = logit(F(x)) exp(a) + b``, F the CDF of a mixture of K logistic densities.

        F(x) = sum_k pi_k sigmoid((x - mu_k) exp(-s_k))
        log dz/dx = log F'(x) - log F(x) - log(1 - F(x)) + a

    log F and log(1 - F) are each a log-sum-exp, so that nothing rounds to 0 or 1 however far out x
    is. The inverse searches between the smallest and the largest component's quantile, which
    enclose the mixture's. ``a`` is bounded like the scale of `Affine`. With all parameters zero the
    means are spread evenly over [-2, 2], so that the components learn different things.
    Ho et al. 2019 (Flow++), https://arxiv.org/abs/1902.00275.

    Args:
        components: number K of logistic densities.
        bound: of |a| and of |s_k|.

    Raises:
        NotInvertedError: if the search for an inverse misses its tolerance.
    """

    exact_inverse = False

    @checked
    def __init__(self, components: Size = 8, bound: Positive = 3.0) -> None:
        self.components, self.bound = components, bound
        self.count = 3 * components + 2

    def _units(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(log pi_k, log slopes, offsets) of the units, then a and b."""
        k = self.components
        logits, means, log_scales, ends = parameters.split([k, k, k, 2], 1)
        log_slopes = -bounded(log_scales, self.bound)
        offsets = -(means + spread(means)) * log_slopes.exp()
        a, b = ends.unbind(1)
        return torch.log_softmax(logits, 1), log_slopes, offsets, bounded(a, self.bound), b

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        *units, a, b = self._units(parameters)
        y, log_slope = logit_mixture(x, *units)
        return y * a.exp() + b, log_slope + a

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        *units, a, b = self._units(parameters)
        x = invert_logit_mixture((z - b) * (-a).exp(), *units, name=type(self).__name__)
        return x, -(logit_mixture(x, *units)[1] + a)


def bounded(value: Tensor, bound: float) -> Tensor:
    """``b tanh(v / b)``, within (-b, b)."""
    return bound * torch.tanh(value / bound)


def spread(units: Tensor) -> Tensor:
    """Evenly over [-2, 2] along the units of ``(batch, K, *event)``; zero for a single one."""
    k = units.shape[1]
    points = torch.linspace(-2, 2, k, device=units.device, dtype=units.dtype)
    return (points if k > 1 else 0 * points).view(-1, *[1] * (units.ndim - 2))


def logit_mixture(
    x: Tensor, log_weights: Tensor, log_slopes: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """``y = logit(sum_k w_k sigmoid(a_k x + b_k))`` and ``log dy/dx``, all in log space.

    With ``t_k = a_k x + b_k`` and the log-sum-exps L+ of ``log w_k + log sigmoid(t_k)`` and L- of
    ``log w_k + log sigmoid(-t_k)``, y = L+ - L- and

        log dy/dx = log sum_k w_k a_k sigmoid(t_k) sigmoid(-t_k) - L+ - L-.

    Args:
        x: ``(batch, *event)``.
        log_weights, log_slopes, offsets: ``(batch, K, *event)``.
    """
    t = torch.addcmul(offsets, x.unsqueeze(1), log_slopes.exp())
    up = F.logsigmoid(t)
    down = up - t  # log sigmoid(-t)
    below = torch.logsumexp(log_weights + up, 1)
    above = torch.logsumexp(log_weights + down, 1)
    density = torch.logsumexp(log_weights + log_slopes + up + down, 1)
    return below - above, density - below - above


def invert_logit_mixture(
    y: Tensor, log_weights: Tensor, log_slopes: Tensor, offsets: Tensor, *, name: str
) -> Tensor:
    """The x at which `logit_mixture` is y, with gradients in y and in the mixture's parameters.

    Where y or a parameter is not finite, x is not either; such entries leave the others alone.

    Raises:
        NotInvertedError: in the name of ``name``, if a finite entry misses the tolerance.
    """

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        value, log_slope = logit_mixture(x, log_weights, log_slopes, offsets)
        return value, log_slope.exp()

    with torch.no_grad():
        # Where each unit alone would reach y: one of them is left of the solution, one right.
        quantiles = (y.unsqueeze(1) - offsets) * (-log_slopes).exp()
        low, high = quantiles.amin(1), quantiles.amax(1)
        finite = torch.isfinite(low + high + log_weights.sum(1))
        # Rounding of f itself, whose terms are as large as y and the offsets.
        rounding = 16 * torch.finfo(y.dtype).eps * (1 + y.abs() + offsets.abs().amax(1))
    x = solve_increasing(f, y, low, high)
    # A compiled graph cannot branch on values.
    if is_traced() or _miss(f, x, y, rounding, finite) <= TOLERANCE:
        return x
    # Where units are far apart f is a staircase, and only halving the bracket leads to the step.
    x = solve_increasing(f, y, low, high, rounds=100)
    miss = _miss(f, x, y, rounding, finite)
    if not miss <= TOLERANCE:
        raise NotInvertedError(
            f"{name} expects to find its inverse to {TOLERANCE:g} of 1 + |x|, missed it by "
            f"{miss:.3g}."
        )
    return x


@torch.no_grad()
def _miss(f: Function, x: Tensor, y: Tensor, rounding: Tensor, finite: Tensor) -> float:
    """The largest error of x as a solution of ``f(x) = y`` in units of 1 + |x|."""
    if y.numel() == 0:
        return 0.0
    value, slope = f(x)
    # What is left of f(x) - y beside the rounding of f, and what that means for x.
    error = ((value - y).abs() - rounding).clamp_min(0) / slope.clamp_min(rounding)
    error = (error / (1 + x.abs())).nan_to_num(nan=torch.inf)
    return torch.where(finite, error, 0.0).amax().item()
