"""Parallel WaveNet: a flow that makes all samples at once, taught by a WaveNet.

    x_t = z_t exp(s_t(z_1, ..., z_{t-1})) + mu_t(z_1, ..., z_{t-1}),    z logistic noise

Maximum likelihood would need z for given x, sample after sample. So the flow learns from what it
draws itself, which is quick, with a trained WaveNet as the judge (probability density
distillation). Van den Oord et al. 2017, https://arxiv.org/abs/1711.10433.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from nflib.arguments import ArgumentError, ContextShape, Positive, Rule, Size, checked, show
from nflib.cache import is_traced
from nflib.core import (
    Bijection,
    Compose,
    EventShape,
    Flow,
    Model,
    ShapeError,
    StandardLogistic,
    sum_log_det,
)
from nflib.core.flow import Draws
from nflib.discrete import LogisticMixture
from nflib.elementwise import Affine
from nflib.graphs import Replayed
from nflib.wavenet.model import WaveNet
from nflib.wavenet.spectrum import Window, require_waveform, spectrum_power
from nflib.wavenet.stack import CachedSteps, CausalStack, Taps

# The largest log-scale of a `CausalAffine`, unless it is asked for another.
BOUND = 6.0


class CausalAffine(Bijection):
    """An inverse autoregressive flow on waveforms ``(batch, length)`` of any length.

        inverse:  x_t = z_t exp(s_t) + mu_t,    s, mu from a `CausalStack` of z before t
        log|det dx/dz| = sum_t s_t

    Inverse (noise to data) costs one pass, all positions at once. Forward needs z_1 .. z_{t-1} for
    z_t and goes step by step with kept activations, at one pass of arithmetic but ``length`` steps,
    which a GPU records and replays. With gradients, or inside ``torch.compile`` and ``torch.func``,
    it repeats whole passes instead, one for each position: meant for proofs on short events, for no
    training needs it.

    Args:
        channels, skip, layers, blocks, kernel, context_dim: of the `CausalStack`.
        scale: the factor exp(s) that the layer starts with.
        bound: |s| stays below it.
    """

    @checked
    def __init__(
        self,
        channels: Size = 16,
        skip: Size = 16,
        layers: Size = 8,
        blocks: Size = 1,
        kernel: Taps = 2,
        context_dim: ContextShape = None,
        scale: Positive = 1.0,
        bound: Positive = BOUND,
    ) -> None:
        super().__init__()
        if not abs(math.log(scale)) < bound:
            raise ArgumentError(
                f"CausalAffine expects a scale between exp(-{bound:g}) and exp({bound:g}), "
                f"got {scale!r}."
            )
        self.event_shape = (None,)
        self.affine = Affine(bound)
        self.stack = CausalStack(1, 2, channels, skip, layers, blocks, kernel, context_dim)
        self.context_shape = self.stack.context_shape
        last = self.stack.last[-1]
        assert isinstance(last, nn.Conv1d)
        assert last.bias is not None
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([bound * math.atanh(math.log(scale) / bound), 0.0]))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, s = self.affine.forward(z, self.parameters_of(z, context))
        return x, sum_log_det(s)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        whole = torch.is_grad_enabled() or is_traced()
        z, terms = self._repeat(x, context) if whole else self._step(x, context)
        return z, sum_log_det(terms)

    def output_shape(self, shape: EventShape | None) -> EventShape | None:
        return _some_samples(shape)

    def input_shape(self, shape: EventShape | None) -> EventShape | None:
        return _some_samples(shape)

    def parameters_of(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """What the affine map of every position takes, ``(batch, 2, length)``."""
        return self.stack(z.unsqueeze(1), context).to(z.dtype)

    def _repeat(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        # After i passes the first i positions, and their gradients, are exact.
        z, terms = x, x
        for _ in range(x.shape[1]):
            z, terms = self.affine.inverse(x, self.parameters_of(z, context))
        return z, terms

    def _step(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        steps = CachedSteps(self.stack, len(x), context)
        z, terms, before = torch.empty_like(x), torch.empty_like(x), x.new_zeros(len(x), 1)
        seen, parameters = before.T, steps.outputs.T.unsqueeze(2)

        def step() -> None:
            steps.step(seen)
            value, term = self.affine.inverse(x.index_select(1, steps.t), parameters)
            z.index_copy_(1, steps.t, value)
            terms.index_copy_(1, steps.t, term)
            before.copy_(value)

        run = Replayed(step, x.device)
        for _ in range(x.shape[1]):
            run()
        return z, terms


def _some_samples(shape: EventShape | None) -> EventShape | None:
    if shape == (0,):
        raise ShapeError("CausalAffine expects a length of at least 1, got 0.")
    return shape


class ParallelWaveNet(Model):
    """A few `CausalAffine` layers one after another, over logistic noise.

    Given ``z_1 .. z_{t-1}``, sample t is logistic noise scaled and shifted, however many layers
    there are, for every layer is affine in its own sample:

        x_t = z_t exp(s^tot_t) + mu^tot_t

    Time runs the same way in all layers. Waveforms are floats on the scale that the teacher's
    levels are spread over, [-1, 1] from the first to the last level, without rounding.

    Cost: `sample` one pass of each layer for all samples; ``log_prob`` of a given waveform goes
    sample by sample. Exact.

    Args:
        flows: number of layers.
        channels, skip, layers, blocks, kernel: of each one's `CausalStack`.
        context_dim: size of a context vector.
        scale: of the noise that the untrained student makes; near the data's standard deviation.
    """

    @checked
    def __init__(
        self,
        flows: Size = 3,
        channels: Size = 16,
        skip: Size = 16,
        layers: Size = 8,
        blocks: Size = 1,
        kernel: Taps = 2,
        context_dim: ContextShape = None,
        scale: Positive = 0.1,
    ) -> None:
        super().__init__()
        if not abs(math.log(scale)) < BOUND * flows:
            raise ArgumentError(
                f"ParallelWaveNet with {flows} flows expects a scale between "
                f"exp(-{BOUND * flows:g}) and exp({BOUND * flows:g}), got {scale!r}."
            )
        sizes = (channels, skip, layers, blocks, kernel)
        self.bijection = Compose(
            *(CausalAffine(*sizes, context_dim, scale ** (1 / flows)) for _ in range(flows))
        )
        self.noise = StandardLogistic(1)  # of one sample
        self.context_shape = self.bijection.context_shape
        self.event_shape = (None,)

    @checked
    def flow(self, length: Size) -> Flow:
        """The same density over waveforms of one length as a `Flow`; parameters are shared."""
        return Flow(self.bijection, StandardLogistic(length).to(next(self.parameters())))

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density of waveforms ``(batch, length)`` in nats, ``(batch,)``."""
        context = self._check(x, context)
        z, log_det = self.bijection(x, context)
        return self._log_noise(z) + log_det

    def _log_noise(self, z: Tensor) -> Tensor:
        """The log-density of noise of any length."""
        return self.noise.log_prob(z.reshape(-1, 1)).view(z.shape).sum(1)

    def _check(self, x: Tensor, context: Tensor | None) -> Tensor | None:
        """The context of a batch of waveforms, a row each; refuses what is no such batch."""
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] == 0:
            raise ShapeError(
                f"{type(self).__name__} expects waveforms of shape (batch, length), got {show(x)}."
            )
        context = self.rows_of_context(context, x.shape[0])
        self.bijection.check_input(x, context, name=type(self).__name__)
        return context

    @checked
    def sample(
        self,
        n: Draws,
        length: Size,
        context: Tensor | None = None,
        *,
        temperature: Positive = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw waveforms without a graph.

        Args:
            n: how many, ``(n, length)``; the context has n rows, or is one that serves all. Or a
                shape, ``(k,)`` say, of draws for each of m contexts, ``(k, m, length)``.
            length: samples in each.
            context: of shape ``(m, K)`` or one alone.
            temperature: of the noise; below 1 draws are nearer to its centre.
            generator: of the random numbers, instead of torch's own.
        """
        with torch.no_grad():
            return self._draw("sample", n, length, context, temperature, generator)[0]

    @checked
    def rsample(
        self, n: Draws, length: Size, context: Tensor | None = None, **options: Any
    ) -> Tensor:
        """`sample`, reparameterised: gradients reach the parameters and the context."""
        return self.rsample_with_log_prob(n, length, context, **options)[0]

    @checked
    def rsample_with_log_prob(
        self,
        n: Draws,
        length: Size,
        context: Tensor | None = None,
        *,
        temperature: Positive = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`rsample`, and the log-densities at temperature 1 of what is drawn, from one pass."""
        return self._draw("rsample", n, length, context, temperature, generator)

    def _draw(
        self,
        method: str,
        n: Draws,
        length: int,
        context: Tensor | None,
        temperature: float,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        shape, context = self._plan(method, n, context)
        z = self.noise.rsample(shape.numel() * length, temperature=temperature, generator=generator)
        z = z.view(-1, length).to(next(self.parameters()))
        x, log_det = self.bijection.inverse(z, context)
        return x.reshape(*shape, length), (self._log_noise(z) - log_det).reshape(shape)

    def conditionals(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The waveform made of z, and what each of its samples was drawn from.

        Returns: x, the means ``mu^tot`` and the log-scales ``s^tot``, each ``(batch, length)``,
            with ``x = z exp(s^tot) + mu^tot``.
        """
        context = self._check(z, context)
        x, mean, log_scale = z, torch.zeros_like(z), torch.zeros_like(z)
        for layer in reversed(list(self.bijection)):
            assert isinstance(layer, CausalAffine)
            theta = layer.parameters_of(x, context)
            x, s = layer.affine.forward(x, theta)
            mean, _ = layer.affine.forward(mean, theta)
            log_scale = log_scale + s
        return x, mean, log_scale


def mixture_log_density(head: LogisticMixture, x: Tensor, parameters: Tensor) -> Tensor:
    """A `LogisticMixture` as a density of real numbers on [-1, 1], in nats.

    The mass that the mixture puts within half a level of x, divided by the width of a level, 2 h:

        log p(x) = log sum_i pi_i (sigma((x + h - mu_i)/s_i) - sigma((x - h - mu_i)/s_i)) - log 2h

    It is the density of the mixture plus even noise one level wide, so that it integrates to one,
    and at each level it is the probability that the teacher has learnt, over 2 h. (The density of
    the mixture itself says nothing reliable: narrower than a level it may peak anywhere in it.)

    Args:
        head: a mixture for one channel.
        x: ``(batch, length)``.
        parameters: ``(batch, count, length)``.

    Returns: log-densities ``(batch, length)``.
    """
    log_weights, means, log_scales, _ = head.unpack(parameters)
    x = x.to(means.dtype).unsqueeze(1)
    _, log_mass, _ = head.bins(x, means[:, 0], log_scales[:, 0])
    return (log_weights + log_mass).logsumexp(1) - math.log(2 / (head.levels - 1))


def _student(value: Any) -> Any:
    # A compiled one is of another class, but has all that it had.
    if isinstance(value, type) or not hasattr(value, "conditionals"):
        raise TypeError
    return value


Student = Annotated[ParallelWaveNet, Rule("a ParallelWaveNet", _student)]


@checked
def distillation_loss(
    student: Student,
    teacher: WaveNet,
    z: Tensor,
    context: Tensor | None = None,
    draws: Size = 4,
) -> tuple[Tensor, Tensor]:
    """An unbiased estimate of ``KL(student || teacher)`` in nats a sample, and the waveforms.

        KL = H(P_S, P_T) - H(P_S)
        H(P_S) = E_z sum_t s^tot_t(z_<t) + 2 T             a logistic of scale s has log s + 2
        H(P_S, P_T) = E_{x ~ P_S} sum_t E_{y ~ P_S(x_t | x_<t)} [-log p_T(y | x_<t)]

    One pass of the teacher over x gives its conditionals at all t; against each, ``draws`` values y
    of the student's own conditional are scored, which costs no further pass. The teacher scores
    real numbers by `mixture_log_density`, and sees x unrounded.

    Args:
        student, teacher: gradients flow through the teacher, to the student's waveforms.
        z: logistic noise ``(batch, length)``.
        context: ``(batch, K)``, given to both.
        draws: values y for each sample.

    Raises: ArgumentError if the teacher's head or input is of another kind, or without draws.
    """
    if not isinstance(teacher.head, LogisticMixture) or teacher.one_hot:
        raise ArgumentError(
            "distillation_loss expects a teacher with a LogisticMixture head that sees scaled "
            f"numbers, got {teacher.head!r} and one_hot={teacher.one_hot}."
        )
    x, mean, log_scale = student.conditionals(z, context)
    parameters = teacher.stack(x.unsqueeze(1), teacher.rows_of_context(context, x.shape[0]))
    noise = StandardLogistic(z.shape[1]).to(z)
    cross = torch.zeros((), device=z.device)
    for _ in range(draws):
        y = mean + log_scale.exp() * noise.sample(len(z))
        cross = cross - mixture_log_density(teacher.head, y, parameters).mean() / draws
    return cross - (log_scale.mean() + 2), x


@checked
def power_loss(x: Tensor, y: Tensor, window: Window = 256) -> Tensor:
    """How far the frequencies of waveforms x are from those of y: a mean over rows.

    ``| mean_time |STFT(x)|^2 - mean_time |STFT(y)|^2 |^2 / | mean_time |STFT(y)|^2 |^2``, each
    power averaged over time, for student and recording are not aligned. 0 if all powers agree,
    about 1 for silence.
    """
    for name, each in (("x", x), ("y", y)):
        require_waveform("power_loss", name, each, window)
    mine, theirs = (spectrum_power(each, window).mean(2) for each in (x, y))
    size = theirs.square().sum(1).clamp_min(torch.finfo(theirs.dtype).tiny)
    return ((mine - theirs).square().sum(1) / size).mean()
