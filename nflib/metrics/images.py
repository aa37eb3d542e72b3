"""How like two images are."""

from __future__ import annotations

import torch
from torch import Tensor

from nflib.arguments import checked


@checked
def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels: ``10 log10(255^2 / mean squared error)``.

    Higher is better; 10 more decibels are a tenth of the error, and images that are equal have
    infinitely many. Rounding to whole grey levels alone leaves 58.9.

    Args:
        images, truth: grey levels 0 .. 255, ``(..., C, H, W)``; leading dims are broadcast, so that
            draws ``(k, N, C, H, W)`` stand beside truth ``(N, C, H, W)``.

    Returns: one number an image, ``(...)``.
    """
    images, truth = _pair("psnr", images, truth, least=1)
    error = (images - truth).square().mean((-3, -2, -1))
    return (10 * (255**2 / error).log10()).float()


@checked
def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity: 1 for equal images, near 0 for unrelated ones.

    In a Gaussian window of 1.5 pixels around each pixel, the product of how alike the two means,
    the two variances and the two patterns are; then the mean over pixels and channels, by
    `skimage.metrics` with the settings of the paper. Wang et al. 2004,
    https://doi.org/10.1109/TIP.2003.819861. Cost: some milliseconds an image of 64 x 64.

    Args:
        images, truth: as for `psnr`, of at least 11 pixels a side.

    Returns: one number an image, ``(...)``.
    """
    from skimage.metrics import structural_similarity

    images, truth = _pair("ssim", images, truth, least=11)
    pairs = zip(*(each.reshape(-1, *each.shape[-3:]) for each in (images, truth)), strict=True)
    found = [
        structural_similarity(
            one.numpy(),
            other.numpy(),
            channel_axis=0,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for one, other in pairs
    ]
    return torch.tensor(found).float().reshape(images.shape[:-3])


def _pair(name: str, images: Tensor, truth: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both in float64, of the same leading dims, or one sentence on what is wrong with them."""
    if images.ndim < 3 or images.shape[-3:] != truth.shape[-3:] or min(images.shape[-2:]) < least:
        raise ValueError(
            f"{name} expects images and truth of one shape (..., channels, height, width), at "
            f"least {least} pixels a side, got {tuple(images.shape)} and {tuple(truth.shape)}."
        )
    try:
        one, other = torch.broadcast_tensors(images.double(), truth.double())
    except RuntimeError:
        raise ValueError(
            f"{name} expects leading dims of images and truth that can be broadcast, got "
            f"{tuple(images.shape)} and {tuple(truth.shape)}."
        ) from None
    return one, other
