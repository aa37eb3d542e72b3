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
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


from nflib.core import Bijection, ShapeError, sum_log_det
from nflib.rootfinding import solve_increasing

ElementwiseMap = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class NotInvertedError(ValueError):
    """A numerical inverse did not reach its tolerance, so that it is not an inverse."""


class Elementwise:
    """Base of the elementwise maps.

    A subclass sets ``count``, how many parameters each entry needs, and writes ``forward`` and
    ``inverse``. All parameters zero, which is how a network whose last layer starts at zero begins,
    give the identity; the mixture and the monotone network give a smooth curve flatter than it.

    Attributes:
        count: numbers that each entry needs.
        exact_inverse: whether each direction undoes the other up to rounding, by a formula.
    """

    count: int
    exact_inverse = True

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """``x -> (z, log|dz/dx|)``, each ``(batch, *event)``."""
        raise TypeError(f"{type(self).__name__} does not define forward(x, parameters).")

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """``z -> (x, log|dx/dz|)``, each ``(batch, *event)``."""
        raise TypeError(f"{type(self).__name__} does not define inverse(z, parameters).")

    def replay(
        self, y: Tensor, parameters: Tensor, inverse: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The entries of which ``forward`` (or ``inverse``) made y, and its outputs once more.

        For `nflib.reversible`. A map overrides it if what it makes of its parameters serves both.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        inner = ", ".join(f"{k}={v}" for k, v in vars(self).items() if k != "count")
        return f"{type(self).__name__}({inner})"


class Additive(Elementwise):
    """``z = x + t``: volume is kept, log|det| 0.

    The coupling law of NICE (Dinh et al. 2014, https://arxiv.org/abs/1410.8516).
    """

    count = 1

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return x + parameters[:, 0], torch.zeros_like(x)

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return z - parameters[:, 0], torch.zeros_like(z)


class Affine(Elementwise):
    """``z = x exp(s) + t`` with ``s = b tanh(a / b)``, so that |s| < b; log-derivative s.

    The bound keeps both directions from overflowing: no entry is stretched or shrunk by more than
    exp(b) in one layer. RealNVP (Dinh et al. 2016, https://arxiv.org/abs/1605.08803) has a learned
    scale in the place of b.

    Args:
        bound: b > 0.
    """

    count = 2

    def __init__(self, bound: float = 3.0) -> None:
        if not bound > 0:
            raise ValueError(f"Affine expects a positive bound, got {bound!r}.")
        self.bound = bound

    def _scale_shift(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        a, t = parameters.unbind(1)
        b = self.bound
        if b > 30:
            return b * torch.tanh(a / b), t
        # The same as b - 2 b sigmoid(-2 a / b): torch's sigmoid takes a third of the time of its
        # tanh, but rounds to 1e-7 b, which is too coarse for a bound that is hardly one.
        return torch.rsub(torch.sigmoid(a * (-2 / b)), b, alpha=2 * b), t

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return _stretch(x, *self._scale_shift(parameters))

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return _shrink(z, *self._scale_shift(parameters))

    def replay(
        self, y: Tensor, parameters: Tensor, inverse: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        raise NotImplementedError


def _stretch(x: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.addcmul(t, x, s.exp()), s


def _shrink(z: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    shrink = -s
    return (z - t) * shrink.exp(), shrink


class RationalQuadraticSpline(Elementwise):
    """A monotone spline of K bins on [-B, B], the identity outside.

    Knots (x_k, y_k) with slopes delta_k. In bin k, with ``xi = (x - x_k) / w_k``, width w_k,
    height h_k and ``s_k = h_k / w_k``:

        z = y_k + h_k (s_k xi^2 + delta_k xi (1 - xi)) / d
        dz/dx = s_k^2 (delta_{k+1} xi^2 + 2 s_k xi (1 - xi) + delta_k (1 - xi)^2) / d^2
        d = s_k + (delta_{k+1} + delta_k - 2 s_k) xi (1 - xi)

    The outer slopes are 1, so that value and slope continue into the tails. x is clamped to the
    bin before the formula is used: no value or gradient is ever computed outside of it. The inverse
    solves a quadratic equation in xi. All parameters zero: the identity.
    Durkan et al. 2019, https://arxiv.org/abs/1906.04032.

    Args:
        bins: number K of bins.
        limit: B; data should lie mostly within [-B, B].
        minimum: smallest width and height of a bin, as a share of 2 B, and smallest slope.
    """

    def __init__(self, bins: int = 8, limit: float = 4.0, minimum: float = 1e-3) -> None:
        if bins < 2 or not limit > 0 or not 0 < minimum < 1 / bins:
            raise ValueError(
                "RationalQuadraticSpline expects at least 2 bins, a positive limit and a minimum "
                f"between 0 and 1 / bins, got bins={bins}, limit={limit}, minimum={minimum}."
            )
        self.bins, self.limit, self.minimum = bins, limit, minimum
        self.count = 3 * bins - 1

    def knots(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions x_k, heights y_k and slopes of the knots, each ``(batch, K + 1, *event)``."""
        x, y, logits = self._knots(parameters).unbind(1)
        return x, y, self._slopes(logits)

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self._rise(x, *self._bin(x, parameters, 0))

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self._fall(z, *self._bin(z, parameters, 1))

    def replay(
        self, y: Tensor, parameters: Tensor, inverse: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        corners = self._bin(y, parameters, 0 if inverse else 1)
        raise NotImplementedError

    def _knots(self, parameters: Tensor) -> Tensor:
        """`knots` as one tensor ``(batch, 3, K + 1, *event)``, with logits in place of slopes."""
        widths, heights, logits = parameters.split([self.bins, self.bins, self.bins - 1], 1)
        zero = torch.zeros_like(logits[:, :1])
        low, high = zero - self.limit, zero + self.limit
        parts = [low, self._inner(widths), high, low, self._inner(heights), high]
        return torch.cat([*parts, zero, logits, zero], 1).unflatten(1, (3, self.bins + 1))

    def _inner(self, logits: Tensor) -> Tensor:
        """The knots in between: -B + 2 B times the sum of shares m + (1 - K m) softmax so far."""
        count = torch.arange(1, self.bins, device=logits.device, dtype=logits.dtype)
        least = self.limit * (2 * self.minimum * count - 1).view(-1, *[1] * (logits.ndim - 2))
        rest = 2 * self.limit * (1 - self.bins * self.minimum)
        return torch.add(least, torch.softmax(logits, 1)[:, :-1].cumsum(1), alpha=rest)

    def _slopes(self, logits: Tensor) -> Tensor:
        # softplus(log(e^(1 - m) - 1)) + m = 1: zero is slope one.
        return self.minimum + F.softplus(logits + math.log(math.expm1(1 - self.minimum)))

    def _bin(self, at: Tensor, parameters: Tensor, row: int) -> tuple[Tensor, ...]:
        """(x_k, x_{k+1}, y_k, y_{k+1}, delta_k, delta_{k+1}) about each entry, x or y by the row.

        All in one look-up, and slopes are made of the logits of these two knots only.
        """
        knots = self._knots(parameters)
        index = (at.unsqueeze(1) >= knots[:, row, 1:-1]).sum(1, keepdim=True)
        sides = torch.cat([index, index + 1], 1).unsqueeze(1)
        x, y, logits = knots.gather(2, sides.expand(-1, 3, *sides.shape[2:])).unbind(1)
        return *x.unbind(1), *y.unbind(1), *self._slopes(logits).unbind(1)

    def _rise(
        self, x: Tensor, x0: Tensor, x1: Tensor, y0: Tensor, y1: Tensor, d0: Tensor, d1: Tensor
    ) -> tuple[Tensor, Tensor]:
        width, height = x1 - x0, y1 - y0
        xi = (x.clamp(-self.limit, self.limit) - x0) / width
        s, both = height / width, xi * (1 - xi)
        denominator = s + (d1 + d0 - 2 * s) * both
        z = y0 + height * (s * xi.square() + d0 * both) / denominator
        return self._tails(x, z, _log_slope(s, d0, d1, xi, both, denominator))

    def _fall(
        self, z: Tensor, x0: Tensor, x1: Tensor, y0: Tensor, y1: Tensor, d0: Tensor, d1: Tensor
    ) -> tuple[Tensor, Tensor]:
        width, height = x1 - x0, y1 - y0
        s, rise = height / width, z.clamp(-self.limit, self.limit) - y0
        e = d1 + d0 - 2 * s
        a = height * (s - d0) + rise * e
        b = height * d0 - rise * e
        c = -s * rise
        # The root between 0 and 1, in the form that is free of cancellation.
        xi = 2 * c / (-b - torch.sqrt((b.square() - 4 * a * c).clamp_min(0)))
        xi = xi.clamp(0, 1)
        both = xi * (1 - xi)
        log_slope = _log_slope(s, d0, d1, xi, both, s + e * both)
        return self._tails(z, x0 + width * xi, -log_slope)

    def _tails(self, given: Tensor, mapped: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
        outside = given.abs() >= self.limit
        return torch.where(outside, given, mapped), log_slope.masked_fill(outside, 0.0)


def _log_slope(s: Tensor, d0: Tensor, d1: Tensor, xi: Tensor, both: Tensor, d: Tensor) -> Tensor:
    numerator = d1 * xi.square() + 2 * s * both + d0 * (1 - xi).square()
    return numerator.log() + 2 * (s / d).log()


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
    """

    exact_inverse = False

    def __init__(self, components: int = 8, bound: float = 3.0) -> None:
        if components < 1 or not bound > 0:
            raise ValueError(
                "LogisticMixtureCDF expects at least 1 component and a positive bound, "
                f"got components={components}, bound={bound}."
            )
        self.components, self.bound = components, bound
        self.count = 3 * components + 2

    def _units(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(log pi_k, log slopes, offsets) of the units, then a and b."""
        k = self.components
        logits, means, log_scales, ends = parameters.split([k, k, k, 2], 1)
        spread = torch.linspace(-2, 2, k, device=parameters.device, dtype=parameters.dtype)
        means = means + (spread if k > 1 else 0 * spread).view(-1, *[1] * (parameters.ndim - 2))
        log_slopes = -self._bounded(log_scales)
        offsets = -means * log_slopes.exp()
        a, b = ends.unbind(1)
        return torch.log_softmax(logits, 1), log_slopes, offsets, self._bounded(a), b

    def _bounded(self, value: Tensor) -> Tensor:
        return self.bound * torch.tanh(value / self.bound)

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        *units, a, b = self._units(parameters)
        y, log_slope = logit_mixture(x, *units)
        return y * a.exp() + b, log_slope + a

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        *units, a, b = self._units(parameters)
        x = invert_logit_mixture((z - b) * (-a).exp(), *units, name="LogisticMixtureCDF")
        return x, -(logit_mixture(x, *units)[1] + a)


class MonotoneNet(Elementwise):
    """A network of L layers of K sigmoid units that can only increase: a deep sigmoidal flow.

        h <- logit(sum_k w_k sigmoid(a_k h + b_k)),    a_k > 0,  w_k > 0,  sum_k w_k = 1

    Positive slopes and weights make each layer increase; the logit undoes the squashing, so that
    its image is all of R and the flow is a density. Layers are inverted one after the other, each
    by Newton's method between exact brackets. One layer is `LogisticMixtureCDF` without its outer
    scale and shift. Huang et al. 2018 (Neural Autoregressive Flows, DSF),
    https://arxiv.org/abs/1804.00779.

    Args:
        units: number K of sigmoid units in a layer.
        layers: number L of layers.
        bound: of |log a_k|.

    Raises:
        NotInvertedError: if the search for an inverse misses its tolerance.
    """

    exact_inverse = False

    def __init__(self, units: int = 8, layers: int = 2, bound: float = 3.0) -> None:
        if units < 1 or layers < 1 or not bound > 0:
            raise ValueError(
                "MonotoneNet expects at least 1 unit, 1 layer and a positive bound, "
                f"got units={units}, layers={layers}, bound={bound}."
            )
        self.units, self.layers, self.bound = units, layers, bound
        self.count = 3 * units * layers

    def _layers(self, parameters: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(log w_k, log a_k, b_k) for each layer."""
        k = self.units
        spread = torch.linspace(-2, 2, k, device=parameters.device, dtype=parameters.dtype)
        spread = (spread if k > 1 else 0 * spread).view(-1, *[1] * (parameters.ndim - 2))
        layers = []
        for part in parameters.chunk(self.layers, 1):
            logits, slopes, offsets = part.split([k, k, k], 1)
            log_slopes = self.bound * torch.tanh(slopes / self.bound)
            layers.append((torch.log_softmax(logits, 1), log_slopes, offsets + spread))
        return layers

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(x)
        for units in self._layers(parameters):
            x, log_slope = logit_mixture(x, *units)
            total = total + log_slope
        return x, total

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(z)
        for units in reversed(self._layers(parameters)):
            z = invert_logit_mixture(z, *units, name="MonotoneNet")
            total = total - logit_mixture(z, *units)[1]
        return z, total


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
    """The x at which `logit_mixture` is y, with gradients in y and in the mixture's parameters."""

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        value, log_slope = logit_mixture(x, log_weights, log_slopes, offsets)
        return value, log_slope.exp()

    with torch.no_grad():
        # Where each unit alone would reach y: one of them is left of the solution, one right.
        quantiles = (y.unsqueeze(1) - offsets) * (-log_slopes).exp()
        low, high = quantiles.amin(1), quantiles.amax(1)
    x = solve_increasing(f, y, low, high)
    # A compiled graph cannot branch on values.
    if not torch.compiler.is_compiling():
        with torch.no_grad():
            value, slope = f(x)
            # What is left of f(x) - y beside the rounding of f, and what that means for x.
            rounding = 64 * torch.finfo(y.dtype).eps * (1 + y.abs())
            error = ((value - y).abs() - rounding).clamp_min(0) / slope.clamp_min(rounding)
            worst = (error / (1 + x.abs())).amax().item() if y.numel() else 0.0
        if not worst <= 1e-4:
            raise NotInvertedError(
                f"{name} expects to find its inverse to 1e-4 of 1 + |x|, missed it by {worst:.3g}."
            )
    return x


class Pointwise(Bijection):
    """An elementwise map with parameters of its own for each entry, the same for all rows.

    Args:
        elementwise: any `Elementwise` map.
        shape: sizes of the event.
    """

    def __init__(self, elementwise: Elementwise, *shape: int) -> None:
        super().__init__()
        if not shape or min(shape) < 1:
            raise ShapeError(
                f"Pointwise expects the event's sizes as positive integers, got {shape}."
            )
        self.elementwise = elementwise
        self.event_shape = shape
        # A row, not a vector: what initialises or shakes weights then sees their fan-in.
        self.theta = nn.Parameter(torch.zeros(1, elementwise.count, *shape))
        self.exact_inverse = elementwise.exact_inverse

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(self.elementwise.forward, x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(self.elementwise.inverse, z, context)

    def _map(
        self, function: ElementwiseMap, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        self.check_input(x, context)
        z, terms = function(x, self.theta.expand(len(x), *self.theta.shape[1:]))
        return z, sum_log_det(terms)
