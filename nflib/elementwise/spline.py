"""Monotone splines of rational quadratic functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from nflib.arguments import ArgumentError, Positive, Size, checked
from nflib.elementwise.base import Elementwise, rebuilt


class RationalQuadraticSpline(Elementwise):
    """A monotone spline of K bins on [-B, B], the identity outside.

    Knots (x_k, y_k) with slopes delta_k. In bin k, of width w, height h and ``s = h / w``, let xi
    be the share of the width left of x and eta the share of the height below z:

        eta = (s xi^2 + delta_k xi (1 - xi)) / d
        dz/dx = s^2 (delta_{k+1} xi^2 + 2 s xi (1 - xi) + delta_k (1 - xi)^2) / d^2
        d = s (xi^2 + (1 - xi)^2) + (delta_{k+1} + delta_k) xi (1 - xi)

    The way back is a quadratic equation for the odds ``u = xi / (1 - xi)``:

        (1 - eta) s u^2 + b u - eta s = 0,    b = (1 - eta) delta_k - eta delta_{k+1}
        u = 2 eta s / (b + r) = (r - b) / (2 (1 - eta) s),    r^2 = b^2 + 4 eta (1 - eta) s^2

    r is never zero, and of the two forms of u one adds positive numbers only: there is no
    cancellation, and no slope of a root at zero, at any knot. The outer slopes are 1, so that value
    and slope continue into the tails. x is clamped to the bin before a formula is used: no value or
    gradient is ever computed outside of it. All parameters zero: the identity.
    Durkan et al. 2019, https://arxiv.org/abs/1906.04032.

    Args:
        bins: number K of bins, at least 2.
        limit: B; data should lie mostly within [-B, B].
        minimum: smallest width and height of a bin, as a share of 2 B, and smallest slope.
    """

    @checked
    def __init__(self, bins: Size = 8, limit: Positive = 4.0, minimum: Positive = 1e-3) -> None:
        if bins < 2 or minimum * bins >= 1:
            raise ArgumentError(
                f"{type(self).__name__} expects at least 2 bins and a minimum below 1 / bins, "
                f"got bins={bins}, minimum={minimum}."
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

    def rebuild(
        self, y: Tensor, parameters: Tensor, inverse: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        corners = self._bin(y, parameters, 0 if inverse else 1)
        return rebuilt(self._rise, self._fall, inverse, y, *corners)

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
        inside = x.clamp(-self.limit, self.limit)
        s, xi, rest = height / width, (inside - x0) / width, (x1 - inside) / width
        divisor = _divisor(s, d0, d1, xi, rest)
        z = y0 + height * xi * (s * xi + d0 * rest) / divisor
        return self._tails(x, z, _log_slope(s, d0, d1, xi, rest, divisor))

    def _fall(
        self, z: Tensor, x0: Tensor, x1: Tensor, y0: Tensor, y1: Tensor, d0: Tensor, d1: Tensor
    ) -> tuple[Tensor, Tensor]:
        width, height = x1 - x0, y1 - y0
        inside = z.clamp(-self.limit, self.limit)
        s, eta, above = height / width, (inside - y0) / height, (y1 - inside) / height
        b = above * d0 - eta * d1
        low = b >= 0
        root = torch.sqrt(b.square() + 4 * eta * above * s.square())
        sum_ = root + torch.where(low, b, -b)
        side = 2 * s * torch.where(low, eta, above)
        xi = torch.where(low, side, sum_) / (side + sum_)
        rest = torch.where(low, sum_, side) / (side + sum_)
        log_slope = _log_slope(s, d0, d1, xi, rest, _divisor(s, d0, d1, xi, rest))
        return self._tails(z, x0 + width * xi, -log_slope)

    def _tails(self, given: Tensor, mapped: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
        outside = given.abs() >= self.limit
        return torch.where(outside, given, mapped), log_slope.masked_fill(outside, 0.0)


def _divisor(s: Tensor, d0: Tensor, d1: Tensor, xi: Tensor, rest: Tensor) -> Tensor:
    return s * (xi.square() + rest.square()) + (d0 + d1) * xi * rest


def _log_slope(
    s: Tensor, d0: Tensor, d1: Tensor, xi: Tensor, rest: Tensor, divisor: Tensor
) -> Tensor:
    top = d1 * xi.square() + 2 * s * xi * rest + d0 * rest.square()
    return top.log() + 2 * (s / divisor).log()
