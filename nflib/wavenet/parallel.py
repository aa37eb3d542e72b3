"""Parallel WaveNet: a flow that makes all samples at once, taught by a WaveNet.

    x_t = z_t exp(s_t(z_1, ..., z_{t-1})) + mu_t(z_1, ..., z_{t-1}),    z logistic noise

Maximum likelihood would need z for given x, sample after sample. So the flow learns from what it
draws itself, which is quick, with a trained WaveNet as the judge (probability density
distillation). Van den Oord et al. 2017, https://arxiv.org/abs/1711.10433.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflib.audio import spectrum_power
from nflib.core import (
    Bijection,
    Compose,
    Flow,
    StandardLogistic,
    sum_log_det,
)
from nflib.discrete import LogisticMixture
from nflib.elementwise import Affine
from nflib.train import History, as_tensors, fit
from nflib.wavenet.model import WaveNet
from nflib.wavenet.stack import CachedSteps, CausalStack


class CausalAffine(Bijection):
    """An inverse autoregressive flow on waveforms ``(batch, length)`` of any length.

        inverse:  x_t = z_t exp(s_t) + mu_t,    s, mu from a `CausalStack` of z before t
        log|det dx/dz| = sum_t s_t

    Inverse (noise to data) costs one pass, all positions at once. Forward needs z_1 .. z_{t-1} for
    z_t and goes step by step with kept activations, at one pass of arithmetic but ``length`` steps.
    With gradients, or inside ``torch.compile``, it repeats whole passes instead, one for each
    position: meant for proofs on short events, for no training needs it.

    Args:
        channels, skip, layers, blocks, kernel, context: of the `CausalStack`.
        scale: the factor exp(s) that the layer starts with.
        bound: |s| stays below it.
    """

    def __init__(
        self,
        channels: int = 16,
        skip: int = 16,
        layers: int = 8,
        blocks: int = 1,
        kernel: int = 2,
        context: int | None = None,
        scale: float = 1.0,
        bound: float = 6.0,
    ) -> None:
        super().__init__()
        if not 0 < scale < math.exp(bound) or not scale > math.exp(-bound):
            raise ValueError(
                f"CausalAffine expects a scale between exp(-{bound:g}) and exp({bound:g}), "
                f"got {scale!r}."
            )
        self.event_shape = (None,)
        self.affine = Affine(bound)
        self.stack = CausalStack(1, 2, channels, skip, layers, blocks, kernel, context)
        self.context_shape = self.stack.context_shape
        last = self.stack.last[-1]
        assert isinstance(last, nn.Conv1d)
        assert last.bias is not None
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([bound * math.atanh(math.log(scale) / bound), 0.0]))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_input(z, context)
        x, s = self.affine.forward(z, self.parameters_of(z, context))
        return x, sum_log_det(s)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_input(x, context)
        whole = torch.is_grad_enabled() or torch.compiler.is_compiling()
        z, terms = self._repeat(x, context) if whole else self._step(x, context)
        return z, sum_log_det(terms)

    def parameters_of(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """What the affine map of every position takes, ``(batch, 2, length)``."""
        seen = z.unsqueeze(1)
        raw = self.stack(seen) if self.context_shape is None else self.stack(seen, context)
        return raw.to(z.dtype)

    def _repeat(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        # After i passes the first i positions, and their gradients, are exact.
        z, terms = x, x
        for _ in range(x.shape[1]):
            z, terms = self.affine.inverse(x, self.parameters_of(z, context))
        return z, terms

    def _step(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        steps = CachedSteps(self.stack, len(x), context)
        z, terms = torch.empty_like(x), torch.empty_like(x)
        before = x.new_zeros(1, len(x))
        for t, column in enumerate(x.unbind(1)):
            theta = steps.step(before).T.unsqueeze(2)
            value, term = self.affine.inverse(column.unsqueeze(1), theta)
            z[:, t : t + 1], terms[:, t : t + 1] = value, term
            before = value.T
        return z, terms


class ParallelWaveNet(nn.Module):
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

    likelihood = "exact"

    def __init__(
        self,
        flows: int = 3,
        channels: int = 16,
        skip: int = 16,
        layers: int = 8,
        blocks: int = 1,
        kernel: int = 2,
        context_dim: int | None = None,
        scale: float = 0.1,
    ) -> None:
        super().__init__()
        if flows < 1 or not scale > 0:
            raise ValueError(
                "ParallelWaveNet expects at least one flow and a positive scale, "
                f"got {flows} and {scale!r}."
            )
        self.bijection = Compose(
            *(
                CausalAffine(
                    channels, skip, layers, blocks, kernel, context_dim, scale ** (1 / flows)
                )
                for _ in range(flows)
            )
        )
        self.context_shape = next(iter(self.bijection)).context_shape

    def flow(self, length: int) -> Flow:
        """The same density over waveforms of one length as a `Flow`; parameters are shared."""
        base = StandardLogistic(length).to(next(self.parameters()))
        return Flow(self.bijection, base)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.log_prob(x, context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density of waveforms ``(batch, length)`` in nats, ``(batch,)``."""
        return self.flow(x.shape[1]).log_prob(x, context)

    def sample(self, n: int, length: int, context: Tensor | None = None) -> Tensor:
        """Draw n waveforms ``(n, length)``; reparameterised. Context has n rows, or one."""
        return self.flow(length).sample(n, context)

    def conditionals(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The waveform made of z, and what each of its samples was drawn from.

        Returns: x, the means ``mu^tot`` and the log-scales ``s^tot``, each ``(batch, length)``,
            with ``x = z exp(s^tot) + mu^tot``.
        """
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
    """
    log_weights, means, log_scales, _ = head.unpack(parameters)
    half = 1 / (head.levels - 1)
    narrow = (-log_scales[:, 0]).exp()
    centred, width = (x.to(narrow.dtype).unsqueeze(1) - means[:, 0]) * narrow, half * narrow
    log_mass = (
        F.logsigmoid(centred + width)
        + F.logsigmoid(width - centred)
        + torch.log(-torch.expm1(-2 * width))
    )
    return (log_weights + log_mass).logsumexp(1) - math.log(2 * half)


def distillation_loss(
    student: ParallelWaveNet,
    teacher: WaveNet,
    z: Tensor,
    context: Tensor | None = None,
    draws: int = 4,
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
    """
    x, mean, log_scale = student.conditionals(z, context)
    seen = x.unsqueeze(1)
    parameters = teacher.stack(seen) if context is None else teacher.stack(seen, context)
    assert isinstance(teacher.head, LogisticMixture)
    noise = StandardLogistic(z.shape[1]).to(z)
    cross = torch.zeros((), device=z.device)
    for _ in range(draws):
        y = mean + log_scale.exp() * noise.sample(len(z))
        cross = cross - mixture_log_density(teacher.head, y, parameters).mean() / draws
    return cross - (log_scale.mean() + 2), x


def power_loss(x: Tensor, y: Tensor, window: int = 256) -> Tensor:
    """How far the frequencies of waveforms x are from those of y: a mean over rows.

    ``| mean_time |STFT(x)|^2 - mean_time |STFT(y)|^2 |^2 / | mean_time |STFT(y)|^2 |^2``, each
    power averaged over time, for student and recording are not aligned. 0 if all powers agree,
    about 1 for silence.
    """
    mine, theirs = (spectrum_power(each, window).mean(2) for each in (x, y))
    size = theirs.square().sum(1).clamp_min(torch.finfo(theirs.dtype).tiny)
    return ((mine - theirs).square().sum(1) / size).mean()


def distill(
    student: ParallelWaveNet,
    teacher: WaveNet,
    data: Any,
    valid: Any = None,
    *,
    draws: int = 4,
    power: float = 1.0,
    **options: Any,
) -> History:
    """Train the student to be what the teacher would call probable: `fit` with another loss.

        loss = KL(student || teacher) in nats a sample + power * power_loss

    Args:
        student, teacher: the teacher has a `LogisticMixture` head and sees scaled numbers; it is
            left as it is.
        data: waveforms ``(n, length)`` in [-1, 1], on the scale of the teacher's levels, or a
            tuple ``(x, context)``. The recordings serve the power loss only; the contexts are
            those the student is asked for.
        valid: the same, held out.
        draws: see `distillation_loss`.
        power: weight of the power loss; 0 leaves it out.
        options: of `nflib.train.fit`: ``steps``, ``batch_size``, ``lr``, ...

    Returns: the `History`, with the loss in place of nats.
    Raises: ValueError if the teacher's head or input is of another kind.
    """
    if not isinstance(teacher.head, LogisticMixture) or teacher.one_hot:
        raise ValueError(
            "distill expects a teacher with a LogisticMixture head that sees scaled numbers, got "
            f"{teacher.head!r} and one_hot={teacher.one_hot}."
        )

    def loss(model: ParallelWaveNet, x: Tensor, context: Tensor | None = None) -> Tensor:
        z = StandardLogistic(x.shape[1]).to(x).sample(len(x))
        divergence, made = distillation_loss(model, teacher, z, context, draws)
        return divergence + power * power_loss(made, x) if power else divergence

    wanted = [p.requires_grad for p in teacher.parameters()]
    was_training = teacher.training
    teacher.requires_grad_(False).eval().to(as_tensors(data, "data")[0].device)
    try:
        return fit(student, data, valid, loss=loss, **options)
    finally:
        teacher.train(was_training)
        for parameter, flag in zip(teacher.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)
