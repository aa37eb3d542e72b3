"""Training: one loop for any model with ``log_prob``, from Python or the command line.

    from nflib.train import fit
    history = fit(flow, x, x_valid, steps=1000)

    python -m nflib.train mixerflow --data mnist --patch 4 --layers 8 --seconds 600

``loop`` holds `fit`, ``rows`` the data's way into batches, ``step`` one step, ``run`` the state of
a run, ``compiling`` what `torch.compile` is given, ``command`` the command line, ``distillation``
the training of one model by another.
"""

from nflib.train.diagnosis import NonFiniteError
from nflib.train.hardware import hardware, processor
from nflib.train.loop import History, fit, negative_log_likelihood
from nflib.train.rows import as_tensors
from nflib.train.run import GraphWarning

__all__ = [
    "GraphWarning",
    "History",
    "NonFiniteError",
    "as_tensors",
    "fit",
    "hardware",
    "negative_log_likelihood",
    "processor",
]
