"""From integers to reals: dequantization, and the logit that frees them from their interval.

Pixels are integers 0 .. k-1; a density on reals needs noise between them. With u in [0, 1)^D,

    log P(x)  = log int p((x + u) / k) k^-D du
             >= E_q(u|x) [log p((x + u) / k) - D log k - log q(u|x)]

Dequantization layers return the terms behind log p where a bijection returns its log_det, so that
they stand in a `Compose` like any layer. They draw u anew at each call: ``log_prob`` is then one
draw of a lower bound in nats for the integers themselves. The mean of ``exp`` over several draws is
a tighter one, see `nflib.metrics.evaluate` with ``samples``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from nflib.arguments import ArgumentError, Levels, checked
from nflib.core import (
    Bijection,
    DataError,
    Layer,
    Stochastic,
    check_finite,
    check_values,
    log_det_dtype,
    log_normal,
    require_bijection,
    sum_event,
    sum_log_det,
)


class Dequantization(Stochastic):
    """What the two kinds share: k levels, integers in, numbers in [0, 1] out."""

    event_shape = (None, ...)
    anchor: Tensor

    @checked
    def __init__(self, levels: Levels) -> None:
        super().__init__()
        self.levels = levels
        # Follows the model's device and dtype, which the integers do not tell.
        self.register_buffer("anchor", torch.zeros(()), persistent=False)

    def check_data(self, x: Tensor) -> None:
        """Refuse data that are not whole numbers in 0 .. k-1."""
        check_values(x, f"The data of {type(self).__name__}", self.levels)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        self.check_data(x)

    def _numbers(self, x: Tensor) -> Tensor:
        return x if x.is_floating_point() else x.to(self.anchor.dtype)

    def _within_cells(self, x: Tensor, u: Tensor) -> Tensor:
        """``(x + u) / k``, never so close to a cell's end that rounding would leave the cell."""
        margin = 4 * torch.finfo(x.dtype).eps
        low, high = x * (1 + margin), (x + 1) * (1 - margin)
        return torch.clamp(x + u, low, high) / self.levels

    def _log_levels(self, x: Tensor) -> Tensor:
        """``-D log k`` for each row: what dividing by k costs."""
        cost = -x.shape[1:].numel() * math.log(self.levels)
        return torch.full((x.shape[0],), cost, device=x.device, dtype=log_det_dtype(x.dtype))

    def _pixels(self, z: Tensor) -> Tensor:
        """The integers whose cells hold z; beyond the ends, the nearest."""
        return (z * self.levels).floor().clamp(0, self.levels - 1)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class UniformDequantization(Dequantization):
    """``z = (x + u) / k`` with u uniform on [0, 1)^D; contribution ``-D log k``.

    ``forward`` takes integers (uint8, or floats that hold integers) and draws u; ``inverse``
    returns ``floor(k z)`` as floats, where values that a sample has below 0 or above k - 1 become
    these, and the contribution with the sign changed. q(u|x) is 1, so the bound is
    ``E log p((x + u) / k) - D log k``. Theis et al. 2016, https://arxiv.org/abs/1511.01844.

    Args:
        levels: number k of grey levels, 256 for 8-bit images.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self._numbers(x)
        return self._within_cells(x, torch.rand_like(x)), self._log_levels(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._pixels(z), -self._log_levels(z)


class VariationalDequantization(Dequantization):
    """``z = (x + u) / k`` with learned noise ``u = sigmoid(g(e; x))``, e standard normal.

        contribution = -log q(u|x) - D log k
        log q(u|x) = log N(e; 0, I) - log|det dg/de| - sum_i log u_i (1 - u_i)

    The noise has the support [0, 1) and any shape that makes the pixels' density smooth, which
    uniform noise with its steep walls does not: the bound is tighter. At its start g is near the
    identity. Ho et al. 2019 (Flow++), https://arxiv.org/abs/1902.00275.

    Args:
        levels: number k of grey levels.
        bijection: g, a bijection over events of x's shape. Its context is the image, scaled to
            [-1, 1]: layers with a ``context_shape`` equal to x's shape see it.
    """

    def __init__(self, levels: int, bijection: Layer) -> None:
        super().__init__(levels)
        self.bijection = require_bijection("VariationalDequantization", bijection)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        super().initialize(x, context)
        x = self._numbers(x)
        with torch.no_grad():
            self.bijection.initialize(torch.randn_like(x), self._scaled(x))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self._numbers(x)
        noise = torch.randn_like(x)
        v, log_det = self.bijection(noise, self._scaled(x))
        z = self._within_cells(x, torch.sigmoid(v))
        return z, self._log_levels(x) - self._log_q(noise, v, log_det)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self._pixels(z)
        # Outside of [0, k) no noise could have led here: the nearest that could is taken.
        edge = torch.finfo(z.dtype).eps
        v = torch.logit((z * self.levels - x).clamp(edge, 1 - edge))
        noise, log_det = self.bijection.inverse(v, self._scaled(x))
        return x, self._log_q(noise, v, -log_det) - self._log_levels(z)

    def _scaled(self, x: Tensor) -> Tensor:
        return 2 * x / (self.levels - 1) - 1

    def _log_q(self, noise: Tensor, v: Tensor, log_det: Tensor) -> Tensor:
        """log q(u|x) for ``u = sigmoid(v)``, v the image of the noise."""
        log_sigmoid_slope = sum_event(F.logsigmoid(v) + F.logsigmoid(-v))
        return log_normal(noise) - log_det - log_sigmoid_slope


class Logit(Bijection):
    """``z = log(p / (1 - p))`` with ``p = alpha + (1 - 2 alpha) x``: from [0, 1] to the reals.

        log|det| = sum_i log(1 - 2 alpha) - log p_i - log(1 - p_i)

    alpha keeps x = 0 and x = 1 at a finite distance. RealNVP (Dinh et al. 2016,
    https://arxiv.org/abs/1605.08803) prints alpha + (1 - alpha) x, which only the lower end needs.

    Beyond [0, 1], where there are no data but a model has samples, the map goes on as a straight
    line of the slope at the end, ``m = (1 - 2 alpha) / (alpha (1 - alpha))``. The logit itself
    would become so steep there that the next float32 below p = 1 is z = 17, and a sample beyond it
    could not be told from infinity: its density would be that of another point.

    Args:
        alpha: in (0, 0.5).

    Raises:
        DataError: from ``check_data``, for data outside of [0, 1].
    """

    @checked
    def __init__(self, alpha: float = 1e-3) -> None:
        super().__init__()
        if not 0 < alpha < 0.5:
            raise ArgumentError(f"Logit expects alpha between 0 and 0.5, got {alpha!r}.")
        self.alpha = alpha

    def check_data(self, x: Tensor) -> None:
        """Refuse data outside of [0, 1]."""
        check_finite(x, "The data of Logit")
        low, high = x.min().item(), x.max().item()
        if low < 0 or high > 1:
            raise DataError(
                "The data of Logit must lie in [0, 1], got values from "
                f"{low:g} to {high:g}; divide pixels by 255, or dequantize them."
            )

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inside = x.clamp(0, 1)
        z = torch.logit(self.alpha + (1 - 2 * self.alpha) * inside)
        return z + self._steepest() * (x - inside), self._log_det(z)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        end = math.log1p(-self.alpha) - math.log(self.alpha)
        inside = z.clamp(-end, end)
        x = (torch.sigmoid(inside) - self.alpha) / (1 - 2 * self.alpha)
        return x + (z - inside) / self._steepest(), -self._log_det(inside)

    def _steepest(self) -> float:
        """dz/dx at both ends of [0, 1]."""
        return (1 - 2 * self.alpha) / (self.alpha * (1 - self.alpha))

    def _log_det(self, z: Tensor) -> Tensor:
        """dp/dz = p (1 - p), and log p = logsigmoid(z)."""
        terms = math.log(1 - 2 * self.alpha) - F.logsigmoid(z) - F.logsigmoid(-z)
        return sum_log_det(terms)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
