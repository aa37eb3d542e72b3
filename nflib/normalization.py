"""Normalization layers that are bijections: each dimension, or channel, gets mean 0 and spread 1.

    z = (x - m) / s  (and a learned scale and shift),    log|det| = -H W sum_c log s_c + ...

On vectors ``(batch, dim)`` every dimension is normalised, on images ``(batch, c, H, W)`` every
channel, over all of its H W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nflib.arguments import ArgumentError, Positive, Size, checked
from nflib.core import Bijection, expand_log_det


class PerDimension(Bijection):
    """What the two layers share: one scale and shift for each entry of the first event dim."""

    @checked
    def __init__(self, dim: Size) -> None:
        super().__init__()
        self.dim = dim
        self.event_shape = (dim, ...)

    def _column(self, values: Tensor, x: Tensor) -> Tensor:
        """Values of the dimensions in a shape that broadcasts with x."""
        return values if x.ndim == 2 else values.view(-1, *[1] * (x.ndim - 2))

    def _log_det(self, log_scale: Tensor, x: Tensor) -> Tensor:
        total = log_scale.sum()
        return expand_log_det(total if x.ndim == 2 else total * x.shape[2:].numel(), x)

    def extra_repr(self) -> str:
        return f"{self.dim}"


class ActNorm(PerDimension):
    """``z = (x + b) exp(s)`` with learned b and s; ``log|det| = H W sum_c s_c``.

    `initialize`, which `nflib.train.fit` calls, sets b and s so that a first batch comes out with
    mean 0 and standard deviation 1 (a dimension without spread, as in a batch of one, keeps its
    scale). It acts once: whether it has is part of the layer's state. Inside `Inverse` it is what
    ``inverse`` returns that gets mean 0 and standard deviation 1.
    Cost: O(D) each way. Kingma and Dhariwal 2018 (Glow), https://arxiv.org/abs/1807.03039.

    Args:
        dim: numbers in a vector, or channels of an image.
    """

    initialized: Tensor

    @checked
    def __init__(self, dim: Size) -> None:
        super().__init__(dim)
        self.bias = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.zeros(dim))
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        self.check_input(x, context)
        if len(x) and not bool(self.initialized):
            mean, log_spread = centre_and_spread(x)
            self._start(-mean, -log_spread)

    @torch.no_grad()
    def initialize_inverse(self, z: Tensor, context: Tensor | None = None) -> None:
        self.check_input(z, context, inverse=True)
        if len(z) and not bool(self.initialized):
            mean, log_spread = centre_and_spread(z)
            self._start(mean * (-log_spread).exp(), log_spread)

    def _start(self, bias: Tensor, log_scale: Tensor) -> None:
        self.bias.copy_(bias)
        self.log_scale.copy_(log_scale)
        self.initialized.fill_(True)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # Files from before the flag was stored hold weights that were trained.
        if f"{prefix}log_scale" in state:
            state.setdefault(f"{prefix}initialized", torch.tensor(True))
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = (x + self._column(self.bias, x)) * self._column(self.log_scale.exp(), x)
        return z, self._log_det(self.log_scale, x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = z * self._column((-self.log_scale).exp(), z) - self._column(self.bias, z)
        return x, self._log_det(-self.log_scale, z)


class BatchNorm(PerDimension):
    """``z = (x - m) exp(g) / sqrt(v + eps) + b``, m and v the mean and variance of the batch.

        log|det| = H W sum_c (g_c - 1/2 log(v_c + eps))

    In training m and v are the batch's own; rows then see one another, and the log-det is that of
    the map with m and v held fixed. ``inverse`` in training undoes the last ``forward``: it uses
    that batch's m and v. In evaluation both directions use running averages, unbiased for the
    variance and corrected for their start, so that they are honest from the first batch on. A
    dimension of which a batch shows one number only (a single vector) has no spread: the running
    averages serve there, too. Before any training the layer is the identity, up to eps.
    Cost: O(D) each way. Dinh et al. 2016 (RealNVP), appendix E, https://arxiv.org/abs/1605.08803.

    Args:
        dim: numbers in a vector, or channels of an image.
        momentum: weight of a new batch in the running averages.
        eps: added to the variance.
    """

    # In training a second forward would move the running averages once more.
    exact_inverse = False

    running_mean: Tensor
    running_variance: Tensor
    weight_of_batches: Tensor
    batch_mean: Tensor
    batch_variance: Tensor

    @checked
    def __init__(self, dim: Size, momentum: Positive = 0.1, eps: Positive = 1e-5) -> None:
        super().__init__(dim)
        if momentum > 1:
            raise ArgumentError(f"BatchNorm expects a momentum of at most 1, got {momentum}.")
        self.momentum, self.eps = momentum, eps
        self.log_gain = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        # Averages that start at zero, and how much weight they hold: dividing corrects the start.
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_variance", torch.zeros(dim))
        self.register_buffer("weight_of_batches", torch.zeros(()))
        self.register_buffer("batch_mean", torch.zeros(dim))
        self.register_buffer("batch_variance", torch.ones(dim))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance that evaluation uses, each ``(dim,)``; 0 and 1 before any training."""
        missing = 1 - self.weight_of_batches
        seen = self.weight_of_batches.clamp_min(torch.finfo(missing.dtype).tiny)
        fresh = (self.weight_of_batches == 0).to(missing.dtype)
        return self.running_mean / seen, self.running_variance / seen + fresh

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        count = x.numel() // self.dim
        if self.training and count > 1:
            mean, variance = moments(x)
            with torch.no_grad():
                unbiased = variance * (count / (count - 1))
                self.running_mean.lerp_(mean, self.momentum)
                self.running_variance.lerp_(unbiased, self.momentum)
                self.weight_of_batches.lerp_(torch.ones_like(self.weight_of_batches), self.momentum)
                self.batch_mean.copy_(mean)
                self.batch_variance.copy_(variance)
        else:
            mean, variance = self.statistics()
            if self.training:
                self.batch_mean.copy_(mean)
                self.batch_variance.copy_(variance)
        log_scale = self.log_gain - 0.5 * (variance + self.eps).log()
        z = (x - self._column(mean, x)) * self._column(log_scale.exp(), x)
        return z + self._column(self.bias, x), self._log_det(log_scale, x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training:
            # Copies, for the next forward overwrites them while gradients may still be asked for.
            mean, variance = self.batch_mean.clone(), self.batch_variance.clone()
        else:
            mean, variance = self.statistics()
        log_scale = 0.5 * (variance + self.eps).log() - self.log_gain
        x = (z - self._column(self.bias, z)) * self._column(log_scale.exp(), z)
        return x + self._column(mean, z), self._log_det(log_scale, z)


def centre_and_spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log standard deviation of each entry of the first event dim, each ``(dim,)``.

    A dimension without spread counts as one of spread 1.
    """
    mean, variance = moments(x)
    return mean, torch.where(variance > 1e-12, 0.5 * variance.log(), 0.0)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each entry of the first event dim, each ``(dim,)``."""
    rows = x.transpose(0, 1).flatten(1)
    variance, mean = torch.var_mean(rows, 1, correction=0)
    return mean, variance
