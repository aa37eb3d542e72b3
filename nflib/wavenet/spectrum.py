"""Which frequencies a waveform holds."""

from __future__ import annotations

import torch
from torch import Tensor

from nflib.core import ShapeError


def spectrum_power(x: Tensor, window: int = 256) -> Tensor:
    """``|STFT(x)|^2`` of ``(batch, length)``: ``(batch, window/2 + 1, frames)``, differentiable.

    Hann windows of ``window`` samples every quarter of a window, scaled so that white noise of
    variance v has the power v at every frequency.

    Raises: ShapeError if there are fewer samples than one window, or windows of less than 4.
    """
    if window < 4:
        raise ShapeError(f"spectrum_power expects a window of at least 4 samples, got {window}.")
    if x.ndim != 2 or x.shape[1] < window:
        raise ShapeError(
            f"spectrum_power expects shape (batch, length) with length >= {window}, "
            f"got {tuple(x.shape)}."
        )
    weights = torch.hann_window(window, dtype=x.dtype, device=x.device)
    found = torch.stft(x, window, window // 4, window=weights, center=False, return_complex=True)
    return (found.real.square() + found.imag.square()) / weights.square().sum()
