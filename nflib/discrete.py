"""Distributions of integers that a network predicts: what autoregressive models end in.

A position (a pixel, a sample of sound) has C channels, each a number in 0 .. k-1. A head turns the
``count`` numbers that a network predicts for each position into log-probabilities, or into a draw:

    log_prob(x, parameters)    x (batch, C, *positions), parameters (batch, count, *positions)
                               -> log P of each whole position in nats, (batch, *positions)
    sample(parameters, u)      u uniform in [0, 1), (batch, uniforms, *positions)
                               -> (batch, C, *positions)

The randomness comes in as ``u``: two samplers that are given the same u return the same values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nflib.core import ShapeError, log_det_dtype

# The smallest log-scale of a logistic, in units of half the range of the levels.
MIN_LOG_SCALE = -7.0


class Head:
    """Base of the heads: k levels, C channels.

    Attributes:
        count: numbers the network predicts for each position.
        uniforms: uniform random numbers that a draw of one position takes.
    """

    count: int
    uniforms: int

    def __init__(self, levels: int, channels: int = 1) -> None:
        if levels < 2 or channels < 1:
            raise ValueError(
                f"{type(self).__name__} expects at least 2 levels and 1 channel, "
                f"got levels={levels}, channels={channels}."
            )
        self.levels, self.channels = levels, channels

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        """log P of every position, all its channels together, in nats."""
        raise TypeError(f"{type(self).__name__} does not define log_prob(x, parameters).")

    def sample(self, parameters: Tensor, u: Tensor) -> Tensor:
        """The values that the uniform numbers u pick."""
        raise TypeError(f"{type(self).__name__} does not define sample(parameters, u).")

    def check(self, x: Tensor, parameters: Tensor) -> None:
        """Raise `ShapeError` if values and parameters do not fit together; reads shapes only."""
        rows, positions = x.shape[0], tuple(x.shape[2:])
        want = ((rows, self.channels, *positions), (rows, self.count, *positions))
        if (tuple(x.shape), tuple(parameters.shape)) != want:
            raise ShapeError(
                f"{type(self).__name__} expects values {want[0]} and parameters {want[1]}, "
                f"got {tuple(x.shape)} and {tuple(parameters.shape)}."
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(levels={self.levels}, channels={self.channels})"


class Softmax(Head):
    """Any distribution over the k values of each channel: ``log P(x) = l_x - logsumexp(l)``.

    Predicts k numbers for each channel, channel after channel; the channels are independent given
    the parameters, so a network that wants them dependent has to look at the earlier ones itself.
    """

    def __init__(self, levels: int, channels: int = 1) -> None:
        super().__init__(levels, channels)
        self.count, self.uniforms = levels * channels, channels

    def log_probs(self, parameters: Tensor) -> Tensor:
        """log P of all k values: ``(batch, C, k, *positions)``."""
        logits = parameters.unflatten(1, (self.channels, self.levels))
        return logits.to(log_det_dtype(logits.dtype)).log_softmax(2)

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        self.check(x, parameters)
        return self.log_probs(parameters).gather(2, x.long().unsqueeze(2)).squeeze(2).sum(1)

    def sample(self, parameters: Tensor, u: Tensor) -> Tensor:
        cdf = self.log_probs(parameters).exp().cumsum(2)[:, :, :-1]
        return (u.unsqueeze(2) >= cdf).sum(2).to(parameters.dtype)


class LogisticMixture(Head):
    """A mixture of K logistic densities, integrated over the bin of each level.

    With the levels spread over [-1, 1], h half the distance of two levels, and a, b the ends of the
    bin of x in units of a component's scale, ``a = (x - h - mu) / s``, ``b = (x + h - mu) / s``:

        P(x) = sum_i pi_i (sigma(b_i) - sigma(a_i)),    a = -inf at level 0, b = inf at level k-1
        log (sigma(b) - sigma(a)) = log sigma(b) + log sigma(-a) + log(1 - exp(a - b))

    The last line is exact and free of cancellation however narrow the component. With C channels
    the components are shared and their means move with the channels before: ``mu_c`` becomes
    ``mu_c + sum_{j<c} tanh(r_cj) x_j``. Predicts ``K (1 + 2 C + C (C - 1) / 2)`` numbers.
    Salimans et al. 2017 (PixelCNN++), https://arxiv.org/abs/1701.05517.

    Args:
        levels, channels: see `Head`.
        components: number K of logistics.
    """

    def __init__(self, levels: int, channels: int = 1, components: int = 5) -> None:
        super().__init__(levels, channels)
        if components < 1:
            raise ValueError(f"LogisticMixture expects a component or more, got {components}.")
        self.components = components
        self.links = channels * (channels - 1) // 2
        self.count = components * (1 + 2 * channels + self.links)
        self.uniforms = 1 + channels

    def unpack(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``log pi``, (batch, K, ...); means, log-scales, links r: (batch, C or pairs, K, ...)."""
        k, c = self.components, self.channels
        parameters = parameters.to(log_det_dtype(parameters.dtype))
        weights, means, scales, links = parameters.split([k, c * k, c * k, self.links * k], 1)
        return (
            weights.log_softmax(1),
            means.unflatten(1, (c, k)),
            scales.unflatten(1, (c, k)).clamp_min(MIN_LOG_SCALE),
            links.unflatten(1, (self.links, k)).tanh() if self.links else links,
        )

    def scaled(self, x: Tensor) -> Tensor:
        """Levels 0 .. k-1 on [-1, 1]."""
        return 2 * x / (self.levels - 1) - 1

    def _mean(self, channel: int, means: Tensor, links: Tensor, before: list[Tensor]) -> Tensor:
        """The means of one channel, ``(batch, K, ...)``, given the scaled channels before it."""
        mean = means[:, channel]
        first = channel * (channel - 1) // 2
        for j, value in enumerate(before):
            mean = mean + links[:, first + j] * value.unsqueeze(1)
        return mean

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        self.check(x, parameters)
        total, means, log_scales, links = self.unpack(parameters)
        at = self.scaled(x.to(total.dtype))
        half = 1 / (self.levels - 1)
        before: list[Tensor] = []
        for channel in range(self.channels):
            value = at[:, channel]
            mean = self._mean(channel, means, links, before)
            narrow = (-log_scales[:, channel]).exp()
            centred = (value.unsqueeze(1) - mean) * narrow
            width = half * narrow
            below = F.logsigmoid(centred + width)
            above = F.logsigmoid(width - centred)
            inside = below + above + torch.log(-torch.expm1(-2 * width))
            level = x[:, channel].unsqueeze(1)
            log_bin = torch.where(level < 0.5, below, inside)
            total = total + torch.where(level > self.levels - 1.5, above, log_bin)
            before.append(value)
        return total.logsumexp(1)

    def sample(self, parameters: Tensor, u: Tensor) -> Tensor:
        log_weights, means, log_scales, links = self.unpack(parameters)
        cdf = log_weights.exp().cumsum(1)[:, :-1]
        index = (u[:, :1] >= cdf).sum(1, keepdim=True)

        def chosen(values: Tensor) -> Tensor:
            return values.gather(1, index).squeeze(1)

        tiny = torch.finfo(u.dtype).tiny
        noise = u[:, 1:].clamp_min(tiny).log() - (-u[:, 1:]).log1p()
        drawn: list[Tensor] = []
        for channel in range(self.channels):
            mean = chosen(self._mean(channel, means, links, [self.scaled(d) for d in drawn]))
            value = mean + chosen(log_scales[:, channel]).exp() * noise[:, channel]
            level = torch.round((value + 1) * (self.levels - 1) / 2)
            drawn.append(level.clamp(0, self.levels - 1))
        return torch.stack(drawn, 1).to(parameters.dtype)

    def __repr__(self) -> str:
        return super().__repr__()[:-1] + f", components={self.components})"
