"""WaveNet, and the flow that learns from it to make sound in parallel."""

from nflib.wavenet.model import PADDING, WaveNet, pad
from nflib.wavenet.parallel import (
    CausalAffine,
    ParallelWaveNet,
    distillation_loss,
    mixture_log_density,
    power_loss,
)
from nflib.wavenet.spectrum import spectrum_power
from nflib.wavenet.stack import CachedSteps, CausalStack

__all__ = [
    "PADDING",
    "CachedSteps",
    "CausalAffine",
    "CausalStack",
    "ParallelWaveNet",
    "WaveNet",
    "distillation_loss",
    "mixture_log_density",
    "pad",
    "power_loss",
    "spectrum_power",
]
