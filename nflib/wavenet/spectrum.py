"""Which frequencies a waveform holds."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from nflib.arguments import checked, whole
from nflib.core import ShapeError

# Every quarter of a window begins another one.
Window = Annotated[int, whole(4)]


@checked
def spectrum_power(x: Tensor, window: Window = 256) -> Tensor:
    """``|STFT(x)|^2`` of ``(batch, length)``: ``(batch, window/2 + 1, frames)``, differentiable.

    Hann windows of ``window`` samples every quarter of a window, scaled so that white noise of
    variance v has the power v at every frequency.

    Raises: ShapeError if there are fewer samples than one window.
    """
    require_waveform("spectrum_power", "x", x, window)
    weights = torch.hann_window(window, dtype=x.dtype, device=x.device)
    found = torch.stft(x, window, window // 4, window=weights, center=False, return_complex=True)
    return (found.real.square() + found.imag.square()) / weights.square().sum()


def require_waveform(caller: str, name: str, x: Tensor, window: int) -> None:
    """Raise `ShapeError` unless this is a batch of waveforms of at least one window."""
    if x.ndim != 2 or x.shape[1] < window or not x.is_floating_point():
        raise ShapeError(
            f"{caller} expects {name} of shape (batch, length) with length >= {window} in "
            f"floating-point numbers, got {x.dtype} of shape {tuple(x.shape)}."
        )
