"""Numbers that can be compared: nats, bits per dimension, calibration, likeness of images.

Anomalies are judged by scikit-learn's ``roc_auc_score(is_anomaly, -log_probs(model, x))``.
"""

from nflib.metrics.calibration import coverage, crps, pit
from nflib.metrics.images import psnr, ssim
from nflib.metrics.likelihood import (
    CountsDims,
    Dims,
    HasLogProb,
    Judged,
    LogProb,
    Score,
    bits_per_dim,
    evaluate,
    log_probs,
)

__all__ = [
    "CountsDims",
    "Dims",
    "HasLogProb",
    "Judged",
    "LogProb",
    "Score",
    "bits_per_dim",
    "coverage",
    "crps",
    "evaluate",
    "log_probs",
    "pit",
    "psnr",
    "ssim",
]
