"""WaveNet: a recording's probability as a product over its samples.

    log P(x) = sum_t log P(x_t | x_1, ..., x_{t-1}, c)

Van den Oord et al. 2016, https://arxiv.org/abs/1609.03499.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nflib.core import EventShape, ShapeError, describe, expand_context, fits
from nflib.data import DataError
from nflib.discrete import Head, LogisticMixture, Softmax
from nflib.wavenet.stack import CachedSteps, CausalStack

# Marks what lies behind the end of a recording that is shorter than others of its batch.
PADDING = -1


class WaveNet(nn.Module):
    """A causal stack that predicts the distribution of each sample from those before it.

    Recordings are integers 0 .. levels-1, ``(batch, length)``, of any length: mu-law or evenly
    quantized sound, see `nflib.audio`. Samples of -1 (`PADDING`) behind a recording's end count
    nothing, so that recordings of different lengths share a batch, see `pad`; a number of bits
    per sample then divides by the samples that are left. ``log_prob`` is exact, in nats.

    Cost: ``log_prob`` one pass for all positions; `sample` one step a sample, each as dear as one
    position of a pass.

    Args:
        levels: number of values of a sample.
        channels, skip, layers, blocks, kernel: of the `CausalStack`.
        context_dim: size K of a context vector (a speaker, a class) that all samples are given.
        head: what the network predicts: ``Softmax(levels)`` unless given, or a
            ``LogisticMixture(levels)``.
        one_hot: the network sees each sample as one of so many symbols. Otherwise it sees a number
            in [-1, 1], which is cheaper and knows which levels are neighbours.

    Raises: ShapeError for wrong shapes, dtypes and contexts, in one sentence.
    """

    likelihood = "exact"

    def __init__(
        self,
        levels: int = 256,
        channels: int = 32,
        skip: int = 64,
        blocks: int = 1,
        layers: int = 10,
        kernel: int = 2,
        context_dim: int | None = None,
        head: Head | None = None,
        one_hot: bool = False,
    ) -> None:
        super().__init__()
        head = Softmax(levels) if head is None else head
        if (head.levels, head.channels) != (levels, 1):
            raise ValueError(
                f"WaveNet expects a head of {levels} levels and 1 channel, got {head!r}."
            )
        self.levels, self.head, self.one_hot = levels, head, one_hot
        inputs = levels if one_hot else 1
        self.stack = CausalStack(
            inputs, head.count, channels, skip, layers, blocks, kernel, context_dim
        )
        self.context_shape: EventShape | None = self.stack.context_shape
        self.event_shape: EventShape = (None,)
        if isinstance(head, LogisticMixture):
            self._spread(head.components)

    @torch.no_grad()
    def _spread(self, components: int) -> None:
        """Start with logistics of medium width side by side, not with wide ones on one spot."""
        bias = self.stack.last[-1].bias
        assert isinstance(bias, Tensor)
        middle = (2 * torch.arange(components) + 1) / components - 1
        bias.copy_(torch.cat([0 * middle, 0.5 * middle, 0 * middle - 2]))

    @property
    def receptive_field(self) -> int:
        """How many earlier samples a prediction sees, in samples."""
        return self.stack.receptive_field

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.log_prob(x, context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log P of each recording in nats, ``(batch,)``."""
        return self.log_prob_each(x, context).sum(1)

    def log_prob_each(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log P of every sample given those before it, ``(batch, length)``; 0 at padding."""
        self.check_input(x, context)
        known = x.clamp_min(0)
        terms = self.head.log_prob(known.unsqueeze(1), self._predict(known, context))
        return torch.where(x == PADDING, torch.zeros_like(terms), terms)

    def predict(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The head's parameters for every sample, ``(batch, count, length)``."""
        self.check_input(x, context)
        return self._predict(x.clamp_min(0), context)

    def _predict(self, x: Tensor, context: Tensor | None) -> Tensor:
        seen = self.encode(x)
        return self.stack(seen) if context is None else self.stack(seen, context)

    def encode(self, x: Tensor) -> Tensor:
        """Samples as the network sees them, ``(batch, inputs, ...)``: scaled, or one-hot."""
        dtype = self.stack.first.weight.dtype
        if self.one_hot:
            symbols = torch.arange(self.levels, device=x.device).view(-1, *[1] * (x.ndim - 1))
            return (x.unsqueeze(1) == symbols).to(dtype)
        return (2 * x.to(dtype) / (self.levels - 1) - 1).unsqueeze(1)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        length: int,
        context: Tensor | None = None,
        start: Tensor | None = None,
        u: Tensor | None = None,
        cached: bool = True,
    ) -> Tensor:
        """Draw n recordings, integers ``(n, length)``.

        Cached sampling computes every activation once. The naive way runs the network on the whole
        receptive field for each sample; from the same u it makes the same recordings.

        Args:
            n, length: recordings, and samples in each.
            context: n rows, or one that serves all.
            start: the first samples, which are kept: ``(n, m)`` or ``(1, m)`` with m <= length.
            u: uniform numbers in [0, 1) to draw with, ``(n, head.uniforms, length)``.
            cached: False for the naive way.
        """
        weight = self.stack.first.weight
        shape = (n, self.head.uniforms, length)
        if n < 0 or length < 1:
            raise ValueError(f"WaveNet.sample expects a length of at least 1, got {length}.")
        if u is None:
            u = torch.rand(shape, dtype=weight.dtype, device=weight.device)
        elif tuple(u.shape) != shape:
            raise ShapeError(f"WaveNet.sample expects u of shape {shape}, got {tuple(u.shape)}.")
        context = expand_context(context, n)
        x = torch.zeros(n, length, dtype=weight.dtype, device=weight.device)
        self.check_input(x, context)
        given = 0
        if start is not None:
            given = start.shape[1] if start.ndim == 2 else length + 1
            if given > length or start.shape[0] not in (1, n):
                raise ShapeError(
                    f"WaveNet.sample expects a start of shape ({n}, m) with m <= {length}, "
                    f"got {tuple(start.shape)}."
                )
            self._check_levels(start, 0)
            x[:, :given] = start
        draw = self._draw_cached if cached else self._draw_naive
        draw(x, u, context, given)
        return x.long()

    def _draw_cached(self, x: Tensor, u: Tensor, context: Tensor | None, given: int) -> None:
        steps = CachedSteps(self.stack, len(x), context)
        seen = self.stack.first.weight.new_zeros(self.stack.inputs, len(x))
        uniforms = u.unbind(2)
        for t, column in enumerate(x.unbind(1)):
            parameters = steps.step(seen)
            if t >= given:
                column.copy_(self.head.sample(parameters.T, uniforms[t])[:, 0])
            seen = self.encode(column).T

    def _draw_naive(self, x: Tensor, u: Tensor, context: Tensor | None, given: int) -> None:
        for t in range(given, x.shape[1]):
            window = x[:, max(0, t - self.receptive_field) : t + 1]
            parameters = self._predict(window, context)[:, :, -1]
            x[:, t] = self.head.sample(parameters, u[:, :, t])[:, 0]

    def check_input(self, x: Tensor, context: Tensor | None = None) -> None:
        """Raise `ShapeError` if x or context cannot be this model's input; reads no values."""
        if x.ndim != 2 or x.shape[1] < 1 or x.is_complex() or x.dtype == torch.bool:
            raise ShapeError(
                "WaveNet expects integers of shape (batch, length), "
                f"got {x.dtype} of shape {tuple(x.shape)}."
            )
        if self.context_shape is None:
            return
        expected = (len(x), *self.context_shape)
        if context is None or not fits(context.shape, expected):
            got = "none" if context is None else tuple(context.shape)
            raise ShapeError(f"WaveNet expects a context of shape {describe(expected)}, got {got}.")

    def check_data(self, x: Tensor) -> None:
        """Raise `DataError` unless x holds whole numbers 0 .. levels-1, and -1 behind the end."""
        self._check_levels(x, PADDING)
        padding = x == PADDING
        if bool((padding[:, :-1] & ~padding[:, 1:]).any()):
            raise DataError("WaveNet expects padding (-1) behind the end only, got some before it.")

    def _check_levels(self, x: Tensor, lowest: int) -> None:
        if x.numel() == 0:
            return
        low, high = x.min().item(), x.max().item()
        whole = not x.is_floating_point() or bool((x == x.round()).all())
        if low < lowest or high > self.levels - 1 or not whole:
            raise DataError(
                f"WaveNet expects whole numbers in 0..{self.levels - 1}, got values from {low:g} "
                f"to {high:g}{'' if whole else ' with fractions'}."
            )


def pad(x: Tensor, lengths: Tensor) -> Tensor:
    """Recordings ``(batch, length)`` with -1 (`PADDING`) behind each one's length, as int16.

    Raises: ShapeError if the lengths do not fit.
    """
    if x.ndim != 2 or tuple(lengths.shape) != (len(x),) or bool((lengths > x.shape[1]).any()):
        raise ShapeError(
            f"pad expects a length of at most {x.shape[-1]} for each row of x, got x of shape "
            f"{tuple(x.shape)} and lengths of shape {tuple(lengths.shape)}."
        )
    behind = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return torch.where(behind, PADDING, x).to(torch.int16)
