"""WaveNet: a recording's probability as a product over its samples.

    log P(x) = sum_t log P(x_t | x_1, ..., x_{t-1}, c)

Van den Oord et al. 2016, https://arxiv.org/abs/1609.03499.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nflib.arguments import ArgumentError, ContextShape, Levels, Positive, Size, checked
from nflib.core import DataError, Model, ShapeError, check_levels, check_values
from nflib.core.flow import Draws
from nflib.discrete import Head, LogisticMixture, Softmax, check_integers, rows_for
from nflib.graphs import Replayed
from nflib.wavenet.stack import CachedSteps, CausalStack, Taps

# Marks what lies behind the end of a recording that is shorter than others of its batch.
PADDING = -1


class WaveNet(Model):
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

    Raises:
        ArgumentError: for arguments that cannot be, or do not fit together.
        ShapeError: when called with wrong shapes, dtypes and contexts.
    """

    @checked
    def __init__(
        self,
        levels: Levels = 256,
        channels: Size = 32,
        skip: Size = 64,
        blocks: Size = 1,
        layers: Size = 10,
        kernel: Taps = 2,
        context_dim: ContextShape = None,
        head: Head | None = None,
        one_hot: bool = False,
    ) -> None:
        super().__init__()
        head = Softmax(levels) if head is None else head
        if (head.levels, head.channels) != (levels, 1):
            raise ArgumentError(
                f"WaveNet expects a head of {levels} levels and 1 channel, got {head!r}."
            )
        self.levels, self.head, self.one_hot = levels, head, one_hot
        inputs = levels if one_hot else 1
        self.stack = CausalStack(
            inputs, head.count, channels, skip, layers, blocks, kernel, context_dim
        )
        self.context_shape = self.stack.context_shape
        self.event_shape = (None,)
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

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log P of each recording in nats, ``(batch,)``.

        Args:
            x: integers ``(batch, length)`` of any dtype.
            context: ``(batch, K)``, or one row that serves all.
        """
        return self.log_prob_each(x, context).sum(1)

    def log_prob_each(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log P of every sample given those before it, ``(batch, length)``; 0 at padding."""
        parameters = self.predict(x, context)
        terms = self.head.log_prob(x.clamp_min(0).unsqueeze(1), parameters)
        return torch.where(x < 0, torch.zeros_like(terms), terms)

    def predict(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The head's parameters for every sample, ``(batch, count, length)``."""
        self.check_input(x)
        return self._predict(x.clamp_min(0), self.rows_of_context(context, x.shape[0]))

    def dims_of(self, x: Tensor) -> Tensor:
        """How many samples of each recording count, those that are no padding: ``(batch,)``."""
        return (x >= 0).sum(1)

    def _predict(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.stack(self.encode(x), context)

    def encode(self, x: Tensor) -> Tensor:
        """Samples as the network sees them, ``(batch, inputs, ...)``: scaled, or one-hot."""
        dtype = self.stack.first.weight.dtype
        if self.one_hot:
            symbols = torch.arange(self.levels, device=x.device).view(-1, *[1] * (x.ndim - 1))
            return (x.unsqueeze(1) == symbols).to(dtype)
        return (2 * x.to(dtype) / (self.levels - 1) - 1).unsqueeze(1)

    @torch.no_grad()
    @checked
    def sample(
        self,
        n: Draws,
        length: Size,
        context: Tensor | None = None,
        *,
        start: Tensor | None = None,
        u: Tensor | None = None,
        cached: bool = True,
        temperature: Positive = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw recordings without a graph.

        Cached sampling computes every activation once, in steps that a GPU records and replays. The
        naive way runs the network on the whole receptive field for each sample; from the same u it
        makes the same recordings, but for draws that rounding decides.

        Args:
            n: how many, ``(n, length)``; the context has n rows, or is one that serves all. Or a
                shape, ``(k,)`` say, of draws for each of m contexts, ``(k, m, length)``.
            length: samples in each.
            context: of shape ``(m, K)`` or one alone.
            start: the first samples, which are kept, at most ``length``: those of one recording, or
                of as many as are drawn; with a shape of draws ``(m, samples)``.
            u: uniform numbers in [0, 1) to draw with, ``(n, head.uniforms, length)``.
            cached: False for the naive way.
            temperature: of the head, sample by sample; below 1 draws are nearer to likely values.
            generator: of the random numbers, instead of torch's own.

        Returns: integers, int64.
        """
        shape, context = self._plan("sample", n, context)
        weight, uniforms = self.stack.first.weight, self.head.uniforms
        if u is None:
            u = weight.new_empty(shape.numel(), uniforms, length).uniform_(generator=generator)
        else:
            u = rows_for("WaveNet.sample", "u", u, shape, (uniforms, length))
        x = weight.new_zeros(shape.numel(), length)
        given = 0
        if start is not None:
            given = self._begin(x, start, shape)
        draw = self._draw_cached if cached else self._draw_naive
        draw(x, u, context, given, temperature)
        return x.long().reshape(*shape, length)

    def _begin(self, x: Tensor, start: Tensor, shape: torch.Size) -> int:
        """Write the given samples into x; returns how many there are."""
        given = start.shape[-1] if start.ndim else 0
        if given > x.shape[1]:
            raise ShapeError(
                f"WaveNet.sample expects a start of at most {x.shape[1]} samples, "
                f"got {tuple(start.shape)}."
            )
        check_levels(start, "The start of WaveNet.sample", self.levels)
        x[:, :given] = rows_for("WaveNet.sample", "start", start, shape, (given,))
        return given

    def _draw_cached(
        self, x: Tensor, u: Tensor, context: Tensor | None, given: int, temperature: float
    ) -> None:
        drawing = _Drawing(self, x, u, context, temperature)
        for step, count in ((drawing.read, given), (drawing.draw, x.shape[1] - given)):
            run = Replayed(step, x.device)
            for _ in range(count):
                run()

    def _draw_naive(
        self, x: Tensor, u: Tensor, context: Tensor | None, given: int, temperature: float
    ) -> None:
        for t in range(given, x.shape[1]):
            window = x[:, max(0, t - self.receptive_field) : t + 1]
            parameters = self._predict(window, context)[:, :, -1]
            x[:, t : t + 1] = self._pick(parameters, u[:, :, t], temperature)

    def _pick(self, parameters: Tensor, u: Tensor, temperature: float) -> Tensor:
        if temperature != 1:
            parameters = self.head.cooled(parameters, temperature)
        return self.head.sample(parameters, u).to(parameters)

    def check_input(self, x: Tensor) -> None:
        """Raise `ShapeError` if x cannot be a batch of recordings; reads no values."""
        check_integers(type(self).__name__, x, (None,), self.stack.first.weight)

    def check_data(self, x: Tensor) -> None:
        """Raise `DataError` unless x holds whole numbers 0 .. levels-1, and -1 behind the end."""
        name = f"The data of {type(self).__name__}"
        check_values(x, name)
        check_levels(x, name, self.levels, lowest=PADDING)
        padding = x < 0
        if bool((padding[:, :-1] & ~padding[:, 1:]).any()):
            raise DataError(f"{name} must have padding (-1) behind the end only, got some before.")


class _Drawing:
    """Recordings that are drawn with kept activations: a part of `WaveNet.sample`.

    `read` and `draw` each go one position on. All that changes from one to the next stands in
    tensors that stay where they are, so that a GPU can replay them, see `nflib.graphs`.

    Args:
        model: what predicts.
        x: where the recordings are written, and where the given samples stand: ``(batch, length)``.
        u: uniform numbers, ``(batch, uniforms, length)``.
        context: of shape ``(batch, K)``, or None.
        temperature: of the head.
    """

    def __init__(
        self, model: WaveNet, x: Tensor, u: Tensor, context: Tensor | None, temperature: float
    ) -> None:
        self.model, self.x, self.temperature = model, x, temperature
        self.steps = CachedSteps(model.stack, len(x), context)
        self.parameters = self.steps.outputs.T
        # Those of one position side by side, and a place for those at t.
        self.uniforms = u.permute(2, 0, 1).contiguous()
        self.at_t = torch.zeros_like(self.uniforms[:1])
        self.u = self.at_t[0]
        self.entries = self._entries()
        # The samples at t-1 as columns of the entries; before the beginning the last one.
        self.seen = torch.full((len(x), 1), model.levels, device=x.device)
        self.columns = self.seen.squeeze(1)

    def _entries(self) -> Tensor:
        """What the first layer makes of each level, and of zeros: ``(channels, levels + 1)``."""
        model, first = self.model, self.model.stack.first
        assert first.bias is not None
        products = first.weight[:, :, 0]
        if not model.one_hot:
            levels = torch.arange(model.levels, device=products.device)
            products = products * model.encode(levels).T
        return F.pad(products, (0, 1)) + first.bias[:, None]

    def read(self) -> None:
        """The sample at t is given."""
        self._go_on()
        self._see(self.x.index_select(1, self.steps.t))

    def draw(self) -> None:
        """Draw the sample at t."""
        self._go_on()
        torch.index_select(self.uniforms, 0, self.steps.t, out=self.at_t)
        drawn = self.model._pick(self.parameters, self.u, self.temperature)
        self.x.index_copy_(1, self.steps.t, drawn)
        self._see(drawn)

    def _go_on(self) -> None:
        torch.index_select(self.entries, 1, self.columns, out=self.steps.h)
        self.steps.go_on()

    def _see(self, samples: Tensor) -> None:
        # Outside of the table nothing may be read, even if a head draws what is no number.
        self.seen.copy_(samples).clamp_(0, self.model.levels - 1)


@checked
def pad(x: Tensor, lengths: Tensor) -> Tensor:
    """Recordings ``(batch, length)`` with -1 (`PADDING`) behind each one's length.

    Returns: int16, or int32 if there are larger numbers.
    Raises: ShapeError if the lengths do not fit.
    """
    fit = x.ndim == 2 and tuple(lengths.shape) == (len(x),) and not lengths.is_floating_point()
    if not fit or bool(((lengths > x.shape[1]) | (lengths < 0)).any()):
        raise ShapeError(
            f"pad expects a length of at most {x.shape[-1] if x.ndim else 0} for each row of x, "
            f"got x of shape {tuple(x.shape)} and lengths of shape {tuple(lengths.shape)} in "
            f"{lengths.dtype}."
        )
    behind = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    is_small = x.numel() == 0 or x.max() < 2**15
    return x.to(torch.int16 if is_small else torch.int32).masked_fill(behind, PADDING)
