"""What `nflib.train.fit` costs beside the model: epochs by fit against their bare steps.

    python -m benchmarks.training_loop --threads 1

The bare steps are all that training cannot do without: loss, backward pass, clipping, optimizer,
for as many batches of the same size that lie ready. fit adds the order of the rows, batches, the
schedule, the check of the loss, the progress and a validation. MNIST if its file is there (see
`nflib.data.load`), else noise of its shape and size: the time is the same. Rounds of both take
turns. Writes results/training_loop.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine
from nflib import data, models
from nflib.core import Flow
from nflib.train import fit

ROWS, BATCH, EPOCHS = 12_800, 128, 3
MODELS: dict[str, Callable[[], Flow]] = {
    "RealNVP of 4 couplings on vectors": lambda: models.realnvp(784, 4, grey_levels=256),
    "Glow of 2 levels with 2 steps": lambda: models.glow((1, 28, 28), 2, 2, 32, grey_levels=256),
}


def images() -> Tensor:
    try:
        return data.load("mnist", "train", download=False).x[:ROWS].float().view(-1, 1, 28, 28)
    except data.DataError:
        return torch.randint(0, 256, (ROWS, 1, 28, 28)).float()


def bare(model: nn.Module, x: Tensor) -> float:
    """Seconds for the steps of an epoch, averaged."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    parameters = list(model.parameters())
    model.train()
    start = time.perf_counter()
    for batch in x.split(BATCH) * EPOCHS:
        optimizer.zero_grad()
        (-model(batch).mean()).backward()
        nn.utils.clip_grad_norm_(parameters, 50.0)
        optimizer.step()
    return (time.perf_counter() - start) / EPOCHS


def by_fit(model: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    fit(model, x, epochs=EPOCHS, batch_size=BATCH, progress=False)
    return (time.perf_counter() - start) / EPOCHS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    default = machine.ROOT / "results" / "training_loop.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x = images()
    rows: dict[str, Any] = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make()
        rows_of = x.flatten(1) if "vectors" in name else x
        model.initialize(rows_of[:BATCH])
        bare(model, rows_of[: 10 * BATCH])
        times: dict[str, list[float]] = {"bare": [], "fit": []}
        for _ in range(options.repeats):
            times["bare"].append(bare(model, rows_of))
            times["fit"].append(by_fit(model, rows_of))
        row: dict[str, Any] = {key: round(statistics.median(t), 3) for key, t in times.items()}
        row["outside"] = round(1 - row["bare"] / row["fit"], 4)
        rows[name] = row
        print(name, row, flush=True)
    what = (
        f"seconds for each of {EPOCHS} epochs of {len(x):,} images in batches of {BATCH}: bare "
        "steps and fit, medians; outside: the share of fit that is not steps"
    )
    machine.write(
        options.out, {"what": what, **machine.facts("benchmarks.training_loop"), "rows": rows}
    )


if __name__ == "__main__":
    main()
