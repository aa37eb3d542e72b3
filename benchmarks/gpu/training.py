"""One training that goes on where it was stopped, and what is said of it."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.place import Place
from nflib import checkpoints
from nflib.core import Model
from nflib.metrics import evaluate
from nflib.train import History, fit
from nflib.train.surroundings import seeded

Rows = tuple[Tensor, ...]


def train(
    name: str, model: nn.Module, data: Rows, valid: Rows, place: Place, **options: Any
) -> dict[str, Any]:
    """`nflib.train.fit` with a checkpoint of its own, until it is done or the clock rings.

    Args:
        name: of the checkpoint.
        data, valid: rows, or rows and contexts.
        options: of fit.

    Raises: KeyboardInterrupt if the clock rang; the next call goes on from the checkpoint.
    """
    path = place.runs / f"{name}.state.safetensors"
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        history = fit(model, data, valid, checkpoint=path, resume=True, progress=False, **options)
    if place.clock.rang:
        print(f"{name} is interrupted and will go on from its checkpoint", flush=True)
        raise KeyboardInterrupt
    facts = said(history, options, data)
    # Why a step was not replayed, for one.
    said_of = sorted({str(w.message) for w in heard if w.category.__module__.startswith("nflib")})
    facts |= {"warnings": said_of} if said_of else {}
    return facts | {"parameters": sum(p.numel() for p in model.parameters())}


def said(history: History, options: dict[str, Any], data: Rows) -> dict[str, Any]:
    """Steps, time, what ended it, and the curve of the validation loss, nats."""
    last = history.records[-1]
    judged = [r for r in history.records if "valid" in r]
    since = sum(r["step"] > (history.best_step or 0) for r in judged)
    patience = options.get("patience")
    batch = min(options.get("batch_size", 128), len(data[0]))
    # A hundred points are enough for a curve.
    few = judged[:: max(1, len(judged) // 100)]
    return {
        "steps": int(last["step"]),
        "best step": history.best_step,
        "epochs": round(last["epoch"], 2),
        "training, seconds": round(last["seconds"], 1),
        "rows a second": round(last["step"] * batch / last["seconds"]),
        "ended by": "plateau" if patience and since >= patience else "budget",
        "options": {k: v for k, v in options.items() if v is not None},
        "history": [
            {k: round(r[k], 4) for k in ("step", "seconds", "train", "valid")} for r in few
        ],
    }


def judge(model: Any, rows: Rows, samples: int = 1, in_nats: bool = False) -> dict[str, Any]:
    """Bits/dim of held-out rows, a bound with so many draws as well; in nats, too, if asked."""
    device = next(model.parameters()).device
    x, context = rows[0].to(device), rows[1].to(device) if len(rows) > 1 else None
    found: dict[str, Any] = {}
    for count in sorted({1, samples}):
        with seeded(0):
            score = evaluate(model, x, context, batch_size=500, samples=count)
        key = "test" if count == 1 else f"test, {count} draws"
        found[key] = score.bits_per_dim()
    found |= {"likelihood": score.likelihood, "test rows": score.rows}
    if in_nats:
        found |= {"test, nats": -score.nats, "standard error, nats": score.standard_error}
    if not math.isfinite(found["test"]):
        raise FloatingPointError(f"The test rows have {found['test']} bits/dim.")
    return found


def keep(name: str, model: Model, place: Place, facts: dict[str, Any]) -> None:
    """Write the weights where `gather` looks for them, without the state of the training."""
    told = {k: v for k, v in facts.items() if k != "history"}
    json.dumps(told)
    checkpoints.save(model.cpu(), place.runs / f"{name}.safetensors", facts=told)
    if place.device == "cuda":
        torch.cuda.empty_cache()
