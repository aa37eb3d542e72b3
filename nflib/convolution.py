"""Convolutions that can be inverted: 1x1, periodic (by FFT) and emerging.

All act on images ``(batch, channels, height, width)``, are linear, and start near a rotation of
the channels, so that their inverse is well conditioned.

    layer              inverse                          log|det|
    Invertible1x1Conv  O(c^2 H W + c^3), LU: no c^3     O(c^3), LU: O(c)
    PeriodicConv       O(c^2 H W + c^3 H W)             O(c^3 H W + c^2 H W log(H W))
    EmergingConv       O(k^2 c^2 H W), in wavefronts    O(c)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflib.arguments import Odd, Size, checked
from nflib.cache import kept
from nflib.core import (
    Bijection,
    Compose,
    EventShape,
    ShapeError,
    expand_log_det,
    full_precision,
)
from nflib.linear import LU, Dense, Linear, place, random_rotation, solve_matrix


class Invertible1x1Conv(Bijection):
    """The same ``c x c`` matrix applied to the channel vector of every pixel.

        z[:, i, j] = W x[:, i, j] + b,      log|det| = H W log|det W|

    A learned permutation of the channels. Kingma and Dhariwal 2018 (Glow),
    https://arxiv.org/abs/1807.03039.

    Args:
        channels: number of channels c.
        parametrization: ``"lu"`` (log|det W| in O(c), never singular) or ``"dense"``.
        bias: whether to add a learned b.
    """

    @checked
    def __init__(
        self,
        channels: Size,
        parametrization: Literal["lu", "dense"] = "lu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        kinds: dict[str, type[Dense] | type[LU]] = {"lu": LU, "dense": Dense}
        self.linear: Linear = kinds[parametrization](channels, bias)
        self.event_shape = (channels, None, None)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with full_precision(x):
            weight = self.linear.weight()[:, :, None, None]
            z = F.conv2d(x, weight, self.linear.bias)
            log_det = self.linear.log_abs_det() * (x.shape[2] * x.shape[3])
        return z, expand_log_det(log_det, x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        bias = self.linear.bias
        with full_precision(z):
            shifted = z if bias is None else z - bias[:, None, None]
            x = F.conv2d(shifted, self.inverse_weight()[:, :, None, None])
            log_det = -self.linear.log_abs_det() * (z.shape[2] * z.shape[3])
        return x, expand_log_det(log_det, z)

    @kept
    def inverse_weight(self) -> Tensor:
        """``W^-1``, ``(channels, channels)``: few channels, many pixels."""
        size = self.linear.dim
        parameter = next(self.parameters())
        return self.linear.solve(torch.eye(size, device=parameter.device, dtype=parameter.dtype)).T


class PeriodicConv(Bijection):
    """A k x k convolution on a torus: what leaves at one edge enters at the other.

        z^(f) = W^(f) x^(f) at each spatial frequency f,    log|det| = sum_f log|det W^(f)|

    where ``^`` is the 2-D discrete Fourier transform and W^(f) a ``c x c`` matrix: convolution
    is multiplication there, so the inverse is a small solve for each frequency. Real images need
    half of the spectrum only; the other half is its conjugate and counts twice.
    Hoogeboom et al. 2019, https://arxiv.org/abs/1901.11137.

    Args:
        channels: number of channels c.
        kernel_size: size k of the kernel; odd, and at most the image's height and width.

    Raises:
        SingularMatrixError: if a frequency is wiped out, so that no inverse exists.
    """

    @checked
    def __init__(self, channels: Size, kernel_size: Odd = 3, bias: bool = True) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(rotation_kernel(channels, kernel_size))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.event_shape = (channels, None, None)

    def output_shape(self, shape: EventShape | None) -> EventShape | None:
        sides = [side for side in (shape or ())[1:] if isinstance(side, int)]
        if sides and min(sides) < self.kernel_size:
            raise ShapeError(
                f"PeriodicConv expects images of at least {self.kernel_size} pixels each way, "
                f"got {tuple(sides)}."
            )
        return shape

    def input_shape(self, shape: EventShape | None) -> EventShape | None:
        return self.output_shape(shape)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        spectrum = self._spectrum(x)
        margin = self.kernel_size // 2
        with full_precision(x):
            wrapped = F.pad(x, (margin,) * 4, mode="circular")
            z = F.conv2d(wrapped, self.weight, self.bias)
        return z, expand_log_det(self._log_abs_det(spectrum, x.shape[3]), x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        spectrum = self._spectrum(z)
        shifted = z if self.bias is None else z - self.bias[:, None, None]
        if shifted.shape[0] == 0:  # torch 2.6 has no Fourier transform of an empty batch
            return shifted, expand_log_det(-self._log_abs_det(spectrum, z.shape[3]), z)
        # (batch, c, H, F) -> one right-hand side a batch row at each frequency: (H, F, c, batch)
        rows = torch.fft.rfft2(shifted.to(self.weight.dtype)).permute(2, 3, 1, 0)
        solved = solve_matrix(spectrum, rows, "PeriodicConv").permute(3, 2, 0, 1)
        x = torch.fft.irfft2(solved, s=z.shape[2:])
        return x, expand_log_det(-self._log_abs_det(spectrum, z.shape[3]), z)

    def _spectrum(self, x: Tensor) -> Tensor:
        """W^(f) for half of the frequencies: complex ``(H, W // 2 + 1, c, c)``."""
        height, width = x.shape[2:]
        k = self.kernel_size
        kernel = F.pad(self.weight, (0, width - k, 0, height - k))
        # The kernel's centre belongs at the origin.
        kernel = kernel.roll((-(k // 2), -(k // 2)), dims=(2, 3))
        # conv2d correlates, which in the spectrum is the conjugate.
        return torch.fft.rfft2(kernel).conj().permute(2, 3, 0, 1)

    def _log_abs_det(self, spectrum: Tensor, width: int) -> Tensor:
        # det of a complex matrix: half the log|det| of W W^H would lose digits, so slogdet itself.
        terms = torch.linalg.slogdet(spectrum)[1].sum(0)
        # Every column but the first, and the last of an even width, stands for two.
        twice = terms[1 : (width + 1) // 2]
        return terms.sum() + twice.sum()


class CausalConv(Bijection):
    """A k x k convolution whose Jacobian is triangular in raster order: one autoregressive pass.

    Output pixel (i, j) sees the pixels above and to the left of it, and of its own channels those
    before; ``log|det| = H W sum_c log|w_cc|`` with w_cc = exp(a_c) > 0 at the kernel's centre.
    Padding with zeros. The inverse solves pixel by pixel, all pixels of a wavefront at once.

    Args:
        channels: number of channels c.
        kernel_size: size k of the kernel, odd.
        reverse: the opposite order: sees pixels below and to the right, and channels after.
    """

    position: Tensor

    @checked
    def __init__(
        self, channels: Size, kernel_size: Odd = 3, reverse: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        k = kernel_size
        self.channels, self.kernel_size, self.reverse = channels, k, reverse
        self.event_shape = (channels, None, None)
        mask = torch.zeros(channels, channels, k, k)
        mask[:, :, : k // 2] = 1
        mask[:, :, k // 2, : k // 2] = 1
        mask[:, :, k // 2, k // 2] = torch.ones(channels, channels).tril(-1)
        position = mask.flatten().nonzero()[:, 0]
        # A row, not a vector: what initialises or shakes weights then sees their fan-in.
        self.taps = nn.Parameter(0.1 / (k * channels**0.5) * torch.randn(1, len(position)))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.register_buffer("position", position, persistent=False)

    def weight(self) -> Tensor:
        """The kernel in raster order, ``(c, c, k, k)``: zero where the mask forbids a tap."""
        k = self.kernel_size
        taps = place(self.taps[0], self.position, (self.channels, self.channels, k, k))
        diagonal = torch.diag(self.log_scale.exp())[..., None, None]
        return taps + F.pad(diagonal, (k // 2,) * 4)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight = self.weight()
        if self.reverse:
            weight = weight.flip(0, 1, 2, 3)
        with full_precision(x):
            z = F.conv2d(x, weight, self.bias, padding=self.kernel_size // 2)
        return z, self._log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = -self._log_det(z)
        if self.bias is not None:
            z = z - self.bias[:, None, None]
        with full_precision(z):
            if self.reverse:
                return self._solve(z.flip(1, 2, 3)).flip(1, 2, 3), log_det
            return self._solve(z), log_det

    def _log_det(self, x: Tensor) -> Tensor:
        return expand_log_det(self.log_scale.sum() * (x.shape[2] * x.shape[3]), x)

    def _solve(self, z: Tensor) -> Tensor:
        """Substitution in raster order, vectorised over wavefronts.

        Pixel (i, j) needs its row up to j - 1 and the p rows above up to column j + p, p = k // 2.
        So all pixels with equal ``j + (p + 1) i`` are independent: W + (p + 1)(H - 1) steps.
        """
        batch, c, height, width = z.shape
        p, k = self.kernel_size // 2, self.kernel_size
        weight = self.weight()
        centre = weight[:, :, p, p]
        # Neighbours by position: (c, c k k), zero at the centre, whose unknowns are being solved.
        others = weight * (1 - F.pad(torch.ones_like(centre)[..., None, None], (p,) * 4))
        taps = others.permute(0, 2, 3, 1).flatten(1)
        # Pixel-major, with a margin of zeros: a pixel's neighbours are rows to gather.
        x = z.new_zeros(batch, (height + 2 * p) * (width + 2 * p), c)
        rows, columns = height + 2 * p, width + 2 * p
        offsets = (torch.arange(k)[:, None] * columns + torch.arange(k)).flatten().to(z.device)
        rhs = z.permute(0, 2, 3, 1).flatten(1, 2)
        for wave in range(width + (p + 1) * (height - 1)):
            i = torch.arange(
                max(0, -(-(wave - width + 1) // (p + 1))), min(height - 1, wave // (p + 1)) + 1
            ).to(z.device)
            j = wave - (p + 1) * i
            corner = i * columns + j
            seen = x[:, corner[:, None] + offsets].flatten(2)
            known = rhs[:, i * width + j] - seen @ taps.T
            solved = torch.linalg.solve_triangular(centre, known.mT, upper=False).mT
            x = x.index_add(1, corner + p * columns + p, solved)
        return x.view(batch, rows, columns, c)[:, p : p + height, p : p + width].permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, reverse={self.reverse}"


class EmergingConv(Compose):
    """Two causal convolutions of opposite order: together their window is a full square.

        log|det| = H W sum_c (log|w1_cc| + log|w2_cc|)

    Each factor sees half of the neighbourhood, so each is triangular and cheap to invert; the
    composition sees all of it. Hoogeboom et al. 2019, https://arxiv.org/abs/1901.11137.

    Args:
        channels: number of channels c.
        kernel_size: size k of each factor's kernel, odd.
    """

    @checked
    def __init__(self, channels: Size, kernel_size: Odd = 3, bias: bool = True) -> None:
        super().__init__(
            CausalConv(channels, kernel_size, bias=False),
            CausalConv(channels, kernel_size, reverse=True, bias=bias),
        )


def rotation_kernel(channels: int, kernel_size: int) -> Tensor:
    """A random rotation of the channels at the kernel's centre, and a little noise around it."""
    scale = 0.1 / (kernel_size * channels**0.5)
    kernel = scale * torch.randn(channels, channels, kernel_size, kernel_size)
    kernel[:, :, kernel_size // 2, kernel_size // 2] = random_rotation(channels)
    return kernel
