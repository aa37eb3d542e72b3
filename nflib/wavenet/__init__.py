"""WaveNet, and the flow that learns from it to make sound in parallel."""

from nflib.wavenet.model import PADDING, WaveNet, pad
from nflib.wavenet.parallel import (
    CausalAffine,
    ParallelWaveNet,
    distill,
    distillation_loss,
    mixture_log_density,
    power_loss,
)
from nflib.wavenet.stack import CachedSteps, CausalStack

__all__ = [
    "PADDING",
    "CachedSteps",
    "CausalAffine",
    "CausalStack",
    "ParallelWaveNet",
    "WaveNet",
    "distill",
    "distillation_loss",
    "mixture_log_density",
    "pad",
    "power_loss",
]
