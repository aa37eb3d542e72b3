"""Shifts, and shifts with a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from nflib.arguments import Positive, checked
from nflib.elementwise.base import Elementwise, rebuilt


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

    @checked
    def __init__(self, bound: Positive = 3.0) -> None:
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

    def rebuild(
        self, y: Tensor, parameters: Tensor, inverse: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return rebuilt(_stretch, _shrink, inverse, y, *self._scale_shift(parameters))


def _stretch(x: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.addcmul(t, x, s.exp()), s


def _shrink(z: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    shrink = -s
    return (z - t) * shrink.exp(), shrink
