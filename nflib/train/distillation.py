"""Training one model by another: a Parallel WaveNet by a WaveNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nflib.core import StandardLogistic
from nflib.discrete import LogisticMixture
from nflib.train.loop import History, fit
from nflib.wavenet.model import WaveNet
from nflib.wavenet.parallel import ParallelWaveNet, distillation_loss, power_loss


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
        draws: see `nflib.wavenet.distillation_loss`.
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
    parameters = list(teacher.parameters())

    def loss(model: ParallelWaveNet, x: Tensor, context: Tensor | None = None) -> Tensor:
        if parameters[0].device != x.device:
            teacher.to(x.device)
        z = StandardLogistic(x.shape[1]).to(x).sample(len(x))
        divergence, made = distillation_loss(model, teacher, z, context, draws)
        return divergence + power * power_loss(made, x) if power else divergence

    wanted, device = [p.requires_grad for p in parameters], parameters[0].device
    was_training = teacher.training
    teacher.requires_grad_(False).eval()
    try:
        return fit(student, data, valid, loss=loss, **options)
    finally:
        teacher.to(device).train(was_training)
        for parameter, flag in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(flag)
