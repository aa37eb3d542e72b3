"""Shifts, and shifts with a scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nflib.arguments import Positive, checked
from nflib.cache import is_traced
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
        return _scale_shift(parameters, self.bound)

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and not is_traced():
            return _Stretch.apply(x, parameters, self.bound)
        return _stretch(x, *self._scale_shift(parameters))

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return _shrink(z, *self._scale_shift(parameters))

    def rebuild(
        self, y: Tensor, parameters: Tensor, inverse: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return rebuilt(_stretch, _shrink, inverse, y, *self._scale_shift(parameters))


def _scale_shift(parameters: Tensor, b: float) -> tuple[Tensor, Tensor]:
    a, t = parameters.unbind(1)
    if b > 30:
        return b * torch.tanh(a / b), t
    # The same as b - 2 b sigmoid(-2 a / b): torch's sigmoid takes a third of the time of its
    # tanh, but rounds to 1e-7 b, which is too coarse for a bound that is hardly one.
    return torch.rsub(torch.sigmoid(a * (-2 / b)), b, alpha=2 * b), t


class _Stretch(torch.autograd.Function):
    """`_stretch` of `_scale_shift`, with its gradients in a third of autograd's passes.

    From ``z = x e^s + t`` and ``ds/da = 1 - (s / b)^2``, for gradients dz and ds of the outputs:

        dx = dz e^s,    dt = dz,    da = (ds + dx x) (1 - (s / b)^2)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameters: Tensor, b: float) -> tuple[Tensor, Tensor]:
        s, t = _scale_shift(parameters, b)
        stretch = s.exp()
        ctx.bound = b
        ctx.save_for_backward(x, parameters, s, stretch)
        return torch.addcmul(t, x, stretch), s

    @staticmethod
    def backward(ctx: Any, dz: Tensor, ds: Tensor) -> tuple[Tensor | None, ...]:
        x, parameters, s, stretch = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a derivative of this one
            wanted = ctx.needs_input_grad[:2]
            asked = [t for t, is_wanted in zip((x, parameters), wanted, strict=True) if is_wanted]
            outputs = _stretch(x, *_scale_shift(parameters, ctx.bound))
            found = iter(torch.autograd.grad(outputs, asked, (dz, ds), create_graph=True))
            return *(next(found) if is_wanted else None for is_wanted in wanted), None
        dx = dz * stretch
        # Of tanh torch knows the slope from its value.
        da = torch.ops.aten.tanh_backward(torch.addcmul(ds, dx, x), s / ctx.bound)
        return dx, torch.stack([da, dz], 1), None


def _stretch(x: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.addcmul(t, x, s.exp()), s


def _shrink(z: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    shrink = -s
    return (z - t) * shrink.exp(), shrink
