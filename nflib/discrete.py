"""Distributions of integers that a network predicts: what autoregressive models end in.

A position (a pixel, a sample of sound) has C channels, each a number in 0 .. k-1. A head turns the
``count`` numbers that a network predicts for each position into log-probabilities, or into a draw:

    log_prob(x, parameters)    x (batch, C, *positions), parameters (batch, count, *positions)
                               -> log P of each whole position in nats, (batch, *positions)
    sample(parameters, u)      u uniform in [0, 1), (batch, uniforms, *positions)
                               -> (batch, C, *positions)
    mean(parameters)           E[x] of each channel, (batch, C, *positions)
    cooled(parameters, T)      the parameters of the distribution at temperature T

The randomness comes in as ``u``: two samplers that are given the same u return the same values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from nflib.arguments import Levels, Size, checked, show
from nflib.core import EventShape, ShapeError, describe, fits, log_det_dtype


class Head:
    """Base of the heads: k levels, C channels.

    Attributes:
        count: numbers the network predicts for each position.
        uniforms: uniform random numbers that a draw of one position takes.
    """

    count: int
    uniforms: int

    @checked
    def __init__(self, levels: Levels, channels: Size = 1) -> None:
        self.levels, self.channels = levels, channels

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        """log P of every position, all its channels together, in nats."""
        raise NotImplementedError(f"{type(self).__name__} does not define log_prob(x, parameters).")

    def sample(self, parameters: Tensor, u: Tensor) -> Tensor:
        """The values that the uniform numbers u pick."""
        raise NotImplementedError(f"{type(self).__name__} does not define sample(parameters, u).")

    def mean(self, parameters: Tensor) -> Tensor:
        """E[x] of each channel, on the scale 0 .. k-1: ``(batch, C, *positions)``."""
        raise NotImplementedError(f"{type(self).__name__} does not define mean(parameters).")

    def cooled(self, parameters: Tensor, temperature: float) -> Tensor:
        """Parameters of which draws are the nearer to the likeliest values, the lower T is."""
        raise NotImplementedError(
            f"{type(self).__name__} does not define cooled(parameters, temperature)."
        )

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


class Bernoulli(Head):
    """Two levels: ``log P(x) = x log sigma(l) + (1 - x) log sigma(-l)``, one logit l a channel.

    What `Softmax` of two levels predicts with two numbers, with one.
    """

    @checked
    def __init__(self, channels: Size = 1) -> None:
        super().__init__(2, channels)
        self.count = self.uniforms = channels

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        self.check(x, parameters)
        logits = parameters.to(log_det_dtype(parameters.dtype))
        return -F.binary_cross_entropy_with_logits(logits, x.to(logits), reduction="none").sum(1)

    def sample(self, parameters: Tensor, u: Tensor) -> Tensor:
        return (u < self.mean(parameters)).to(parameters.dtype)

    def mean(self, parameters: Tensor) -> Tensor:
        return parameters.to(log_det_dtype(parameters.dtype)).sigmoid()

    def cooled(self, parameters: Tensor, temperature: float) -> Tensor:
        """``P(x)^(1/T)``, normalised."""
        return parameters / temperature

    def __repr__(self) -> str:
        return f"Bernoulli(channels={self.channels})"


class Softmax(Head):
    """Any distribution over the k values of each channel: ``log P(x) = l_x - logsumexp(l)``.

    Predicts k numbers for each channel, channel after channel; the channels are independent given
    the parameters, so a network that wants them dependent has to look at the earlier ones itself.
    """

    @checked
    def __init__(self, levels: Levels, channels: Size = 1) -> None:
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
        return (u.unsqueeze(2) >= cdf).sum(2, dtype=parameters.dtype)

    def mean(self, parameters: Tensor) -> Tensor:
        probabilities = self.log_probs(parameters).exp()
        return torch.einsum(
            "bck...,k->bc...", probabilities, torch.arange(self.levels).to(probabilities)
        )

    def cooled(self, parameters: Tensor, temperature: float) -> Tensor:
        """``P(x)^(1/T)``, normalised."""
        return parameters / temperature


class LogisticMixture(Head):
    """A mixture of K logistic densities, integrated over the bin of each level.

    With the levels spread over [-1, 1], h half the distance of two levels, and a, b the ends of the
    bin of x in units of a component's scale, ``a = (x - h - mu) / s``, ``b = (x + h - mu) / s``:

        P(x) = sum_i pi_i (sigma(b_i) - sigma(a_i)),    a = -inf at level 0, b = inf at level k-1

    See `logistic_bin` for its logarithm. With C channels the components are shared and their means
    move with the channels before: ``mu_c`` becomes ``mu_c + sum_{j<c} tanh(r_cj) x_j``. Predicts
    ``K (1 + 2 C + C (C - 1) / 2)`` numbers. Salimans et al. 2017 (PixelCNN++),
    https://arxiv.org/abs/1701.05517.

    The log-scale has a floor: -7 up to 256 levels, as in the authors' code. There half a bin is 4.3
    scales wide, so that one level can have probability 0.97. With more levels bins are narrower,
    and the floor is lower in proportion.

    Args:
        levels, channels: see `Head`.
        components: number K of logistics.

    Attributes:
        min_log_scale: the floor.
    """

    @checked
    def __init__(self, levels: Levels, channels: Size = 1, components: Size = 5) -> None:
        super().__init__(levels, channels)
        self.components = components
        # The half bin of k levels is 1 / (k - 1).
        self.min_log_scale = min(-7.0, -7.0 + math.log(255 / (levels - 1)))
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
            scales.unflatten(1, (c, k)).clamp_min(self.min_log_scale),
            links.unflatten(1, (self.links, k)).tanh() if self.links else links,
        )

    def scaled(self, x: Tensor) -> Tensor:
        """Levels 0 .. k-1 on [-1, 1]."""
        return 2 * x / (self.levels - 1) - 1

    def _mean(self, channel: int, means: Tensor, links: Tensor, before: list[Tensor]) -> Tensor:
        """The means of one channel, ``(batch, K, ...)``, given the scaled channels before it.

        Those are ``(batch, 1, ...)``, the same for all components, or ``(batch, K, ...)``.
        """
        mean = means[:, channel]
        first = channel * (channel - 1) // 2
        for j, value in enumerate(before):
            mean = mean + links[:, first + j] * value
        return mean

    def bins(self, at: Tensor, means: Tensor, log_scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`logistic_bin` around points of [-1, 1], half the distance of two levels to each side."""
        return logistic_bin(at, means, log_scales, 1 / (self.levels - 1))

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        self.check(x, parameters)
        total, means, log_scales, links = self.unpack(parameters)
        at = self.scaled(x.to(total.dtype))
        before: list[Tensor] = []
        for channel in range(self.channels):
            value = at[:, channel].unsqueeze(1)
            mean = self._mean(channel, means, links, before)
            below, inside, above = self.bins(value, mean, log_scales[:, channel])
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
            before = [self.scaled(d).unsqueeze(1) for d in drawn]
            mean = chosen(self._mean(channel, means, links, before))
            value = mean + chosen(log_scales[:, channel]).exp() * noise[:, channel]
            level = torch.round((value + 1) * (self.levels - 1) / 2)
            drawn.append(level.clamp(0, self.levels - 1))
        return torch.stack(drawn, 1).to(parameters.dtype)

    def mean(self, parameters: Tensor) -> Tensor:
        """The mean of the logistics before they are rounded, each moved into [0, k - 1].

        Within half a level of E[x] where no logistic reaches beyond the first or the last level,
        and the nearer to it, the wider they are: half a level is the most that rounding moves.
        """
        log_weights, means, _, links = self.unpack(parameters)
        centres: list[Tensor] = []
        for channel in range(self.channels):
            centres.append(self._mean(channel, means, links, centres).clamp(-1, 1))
        scaled = (log_weights.exp().unsqueeze(1) * torch.stack(centres, 1)).sum(2)
        return (scaled + 1) * (self.levels - 1) / 2

    def cooled(self, parameters: Tensor, temperature: float) -> Tensor:
        """Weights ``pi_i^(1/T)``, normalised, and all scales times T."""
        k, c = self.components, self.channels
        weights, means, scales, links = parameters.split([k, c * k, c * k, self.links * k], 1)
        cooler = scales + math.log(temperature)
        return torch.cat([weights / temperature, means, cooler, links], 1)

    def __repr__(self) -> str:
        return super().__repr__()[:-1] + f", components={self.components})"


def logistic_bin(
    at: Tensor, means: Tensor, log_scales: Tensor, half: float
) -> tuple[Tensor, Tensor, Tensor]:
    """How much of a logistic lies below the upper end of a bin, inside of it, above its lower end.

    With ``a, b = (at -+ half - mu) / s`` and sigma the logistic function:

        log sigma(b),    log (sigma(b) - sigma(a)),    log sigma(-a)

    The one in the middle is computed as ``log sigma(b) + log sigma(-a) + log(1 - exp(a - b))``,
    which is free of cancellation however narrow the logistic is.
    """
    narrow = (-log_scales).exp()
    centred, width = (at - means) * narrow, half * narrow
    below, above = F.logsigmoid(centred + width), F.logsigmoid(width - centred)
    return below, below + above + torch.log(-torch.expm1(-2 * width)), above


def rows_for(
    name: str, argument: str, value: Tensor, draws: torch.Size, sizes: tuple[int, ...]
) -> Tensor:
    """An argument of a sampler with one row for each draw, ``(draws.numel(), *sizes)``.

    It may have them all, ``(*draws, *sizes)``, or what broadcasts to them, one row for all say.

    Args:
        name: what the user called.
        argument: which argument.
        value: what it is.
        draws: the shape of the draws.
        sizes: of a row.
    """
    try:
        rows = value.expand(*draws, *sizes)
    except RuntimeError:
        raise ShapeError(
            f"{name} expects {argument} of shape {describe((*draws, *sizes))}, or one for all, "
            f"got {tuple(value.shape)}."
        ) from None
    return rows.reshape(draws.numel(), *sizes)


def check_integers(name: str, x: Tensor, shape: EventShape, like: Tensor) -> None:
    """Raise `ShapeError` unless x can be a batch of integers for a model of this name.

    Any dtype that holds integers will do; reads shape, dtype and device only.

    Args:
        name: what the user called.
        x: the input.
        shape: of one event, None where any size will do.
        like: a parameter of the model.
    """
    if not isinstance(x, Tensor):
        raise ShapeError(f"{name} expects a tensor, got {show(x)}; torch.as_tensor makes one.")
    if x.ndim == 0 or not fits(tuple(x.shape[1:]), shape) or 0 in x.shape[1:]:
        raise ShapeError(
            f"{name} expects shape {describe(('batch', *shape))}, got {tuple(x.shape)}."
        )
    if x.dtype == torch.bool or x.is_complex():
        raise ShapeError(f"{name} expects whole numbers, of any dtype for numbers, got {x.dtype}.")
    if x.device != like.device:
        raise ShapeError(
            f"{name} expects its input on its own device {like.device}, got {x.device}; "
            "move the input with .to(device), or the model."
        )
