"""Where and how a measurement was made: what every file of results/ says of itself."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nflib.core import Flow, sum_event
from nflib.train import hardware

ROOT = Path(__file__).resolve().parent.parent


def facts(module: str) -> dict[str, Any]:
    """Command, hardware, threads and torch's version of the running measurement."""
    return {
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """One result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


@torch.no_grad()
def round_trip(flow: Flow, samples: int = 10_000) -> float:
    """How far log p of a flow's own samples, found by `inverse`, is from that found by `forward`.

    The largest difference over all samples in nats a dimension, behind dequantization and logit,
    whose rounding to integers has no way back.

    Raises: FloatingPointError if a sample is not finite.
    """
    bijection = flow.bijection[2:]
    worst = 0.0
    for _ in range(0, samples, 1000):
        z = flow.base.sample(1000)
        x, log_det = bijection.inverse(z)
        again, forward_log_det = bijection(x)
        if not bool(torch.isfinite(sum_event(x) + log_det).all()):
            raise FloatingPointError("A sample, or its log_det, is not finite.")
        gap = flow.base.log_prob(z) - log_det - flow.base.log_prob(again) - forward_log_det
        worst = max(worst, gap.abs().max().item() / z[0].numel())
    return worst


@torch.no_grad()
def sampling_seconds(model: Any, samples: int = 1000, repeats: int = 3) -> float:
    """Seconds for so many samples of any model, the median of repeats after one that warms up.

    No model here takes longer for better weights: what is solved numerically has fixed rounds.
    """
    model.eval()
    model.sample(samples)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        model.sample(samples)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
