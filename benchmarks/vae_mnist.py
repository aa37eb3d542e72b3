"""Flows as posteriors of a VAE on static binarized MNIST: one table, three seeds.

    python -m benchmarks.vae_mnist --threads 1             # all rows, goes on where it stopped
    python -m benchmarks.vae_mnist --rows "plain,iaf 4"    # only these

Encoder and decoder are the same in all rows, and so are epochs and batches. The posterior's flow is
what changes. Each kind of flow gets its learning rate from the same short search. Some rows also
train for three times as long, to see what longer training changes.

A row keeps the weights that are best on the validation images and is judged on the 10,000 test
images: the ELBO in its parts (mean of 10 draws of z), and the importance-weighted bound with 200
draws, whose gain over the ELBO is measured on every tenth image. Needs the data, see
`nflib.data.load`. After every row it writes results/vae_mnist.json; the states of the runs are kept
in _build/vae. The long runs of two rows go to data/vae_mnist.safetensors.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from nflib import checkpoints, data
from nflib.train import History, fit
from nflib.variational import VAE, vae

SHAPE, LATENTS = (1, 28, 28), 40
DRAWS, ELBO_DRAWS, EVERY = 200, 10, 10
TRAINING: dict[str, Any] = {
    "batch_size": 128,
    "warmup": 300,
    "mixed_precision": "bf16",
    # Without it encoders fit their training images: 3 nats are lost on others.
    "weight_decay": 0.1,
    "ema": 0.999,
}
EPOCHS, LONG, SEARCH_EPOCHS = 20, 60, 5
WARM_UP = 0.25  # share of the epochs over which the KL gets its weight
RATES = (1e-3, 2e-3, 4e-3)
IAF = {"flow": "iaf", "flow_hidden": (128, 128)}
DEEP = {"flow": "realnvp", "steps": 20}
ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    **{f"realnvp {k}": {"flow": "realnvp", "steps": k} for k in (2, 5, 10, 20)},
    **{f"planar {k}": {"flow": "planar", "steps": k} for k in (4, 10, 20, 40)},
    "iaf 4": {**IAF, "steps": 4},
    "sylvester 4": {"flow": "sylvester", "steps": 4, "rank": 16},
    "realnvp 20, batch norm": {**DEEP, "batch_norm": True},
    "realnvp 20, weight norm": {**DEEP, "weight_norm": True},
    "realnvp 20, both": {**DEEP, "batch_norm": True, "weight_norm": True},
}
# The learning rate of a kind is searched with this row.
SEARCHED = {
    "plain": "plain",
    "realnvp": "realnvp 5",
    "planar": "planar 10",
    "iaf": "iaf 4",
    "sylvester": "sylvester 4",
}
LONGER = ("plain", "iaf 4", "realnvp 20, weight norm")
SHIPPED = ("plain", "iaf 4")
SPLITS = ("train", "valid", "test")

Splits = dict[str, Tensor]


def build(name: str, epochs: int = 0, images: int = 0) -> VAE:
    """The model of a row, its weights as the random numbers of the moment make them."""
    steps = epochs * images // TRAINING["batch_size"]
    return vae(SHAPE, LATENTS, warm_up=round(WARM_UP * steps), **ROWS[name])


def train(
    name: str, splits: Splits, seed: int, lr: float, epochs: int, run: Path | None = None
) -> tuple[VAE, History]:
    torch.manual_seed(seed)
    model = build(name, epochs, len(splits["train"]))
    history = fit(
        model,
        splits["train"],
        splits["valid"],
        epochs=epochs,
        lr=lr,
        seed=seed,
        checkpoint=run,
        resume=run is not None,
        save_every=60.0,
        **TRAINING,
    )
    return model, history


def search(kind: str, splits: Splits) -> dict[str, Any]:
    """The validation loss of a kind after a few epochs with each learning rate."""
    found = {}
    for rate in RATES:
        history = train(SEARCHED[kind], splits, 100, rate, SEARCH_EPOCHS)[1]
        found[str(rate)] = min(history.column("valid"))
    return {"kind": kind, "valid": found, "lr": float(min(found, key=found.__getitem__))}


def judge(model: VAE, test: Tensor) -> dict[str, Any]:
    """ELBO and its parts, and the importance-weighted bound, of the test images, in nats.

    Many draws are costly, so what they gain over the ELBO is measured on every tenth image. The
    gain differs less from image to image than the bounds do, hence a small standard error.
    """
    model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        bounds = [model.bound(part, ELBO_DRAWS) for part in test.split(500)]
        weights = [model.log_weights(part, DRAWS) for part in test[::EVERY].split(20)]
    reconstruction = torch.cat([b.reconstruction for b in bounds]).double()
    kl = torch.cat([b.kl for b in bounds]).double()
    log_w = torch.cat(weights, 1).double()
    gain = log_w.logsumexp(0) - math.log(DRAWS) - log_w.mean(0)
    negative_elbo = (kl - reconstruction).mean().item()
    return {
        "reconstruction": -reconstruction.mean().item(),
        "kl": kl.mean().item(),
        "negative_elbo": negative_elbo,
        "elbo_draws": ELBO_DRAWS,
        "negative_log_p": negative_elbo - gain.mean().item(),
        "iw_draws": DRAWS,
        "gain_images": len(gain),
        "gain_error": (gain.std() / len(gain) ** 0.5).item(),
    }


def row(name: str, seed: int, lr: float, epochs: int, splits: Splits, runs: Path) -> dict[str, Any]:
    """Train and judge one model, and keep its weights beside its state."""
    place = state(runs, name, seed, epochs)
    model, history = train(name, splits, seed, lr, epochs, place)
    last = history.records[-1]
    facts = {
        "name": name,
        "seed": seed,
        "lr": lr,
        "parameters": sum(p.numel() for p in model.parameters()),
        "updates": int(last["step"]),
        "epochs": last["epoch"],
        "best_step": history.best_step,
        "seconds": last["seconds"],
        "train": last["train"],
        "valid": min(history.column("valid")),
        "curve": curve(history),
    }
    facts |= judge(model, splits["test"])
    checkpoints.save(model, weights_of(place), facts={"name": name})
    print({k: v for k, v in facts.items() if k != "curve"}, flush=True)
    return facts


def state(runs: Path, name: str, seed: int, epochs: int) -> Path:
    plain = name.replace(", ", "_").replace(" ", "_")
    return runs / f"{plain}_{seed}_{epochs}.safetensors"


def weights_of(state: Path) -> Path:
    return state.with_suffix(".weights.safetensors")


def keep(runs: Path, images: Tensor, out: Path) -> None:
    """What the course ships: two models of seed 0 in half precision, and ten test images."""
    tensors = {"images": images.clone()}
    for name in SHIPPED:
        model = build(name)
        checkpoints.load(model, weights_of(state(runs, name, 0, LONG)))
        weights = model.state_dict().items()
        tensors |= {f"model.{name.split()[0]}.{k}": v.half() for k, v in weights}
    checkpoints.write(out, tensors, {"rows": SHIPPED, "epochs": LONG})


def curve(history: History) -> list[list[float]]:
    """Epoch, and validation loss in nats."""
    return [[round(r["epoch"], 1), round(r["valid"], 2)] for r in history.records]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS).replace(", ", ";"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=Path, default=machine.ROOT / "_build" / "vae")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "results" / "vae_mnist.json")
    weights = machine.ROOT / "data" / "vae_mnist.safetensors"
    parser.add_argument("--weights", type=Path, default=weights)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.runs.mkdir(parents=True, exist_ok=True)
    splits = {s: data.load("binarized_mnist", s).x for s in SPLITS}
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    result = {
        "what": "VAE on static binarized MNIST: nats of the 10,000 test images, lower is better; "
        "negative ELBO with its parts, and the importance-weighted bound",
        **machine.facts("benchmarks.vae_mnist"),
        "training": TRAINING | {"kl_warm_up": WARM_UP, "schedule": "cosine"},
        "search": result.get("search", []),
        "rows": result.get("rows", []),
    }
    names = [name.replace(";", ", ") for name in options.rows.split(",")]
    seeds = [int(seed) for seed in options.seeds.split(",")]
    wanted = [(name, seed, EPOCHS) for seed in seeds for name in names]
    wanted += [(name, 0, LONG) for name in LONGER if name in names and 0 in seeds]
    for name, seed, epochs in wanted:
        kind = name.split()[0]
        rates = {s["kind"]: s["lr"] for s in result["search"]}
        if kind not in rates:
            result["search"].append(search(kind, splits))
            machine.write(options.out, result)
            rates[kind] = result["search"][-1]["lr"]
        done = {(r["name"], r["seed"], round(r["epochs"])) for r in result["rows"]}
        if (name, seed, epochs) not in done:
            result["rows"].append(row(name, seed, rates[kind], epochs, splits, options.runs))
            machine.write(options.out, result)
    # Where the rows came with the file, the weights of their runs are not here.
    if all(weights_of(state(options.runs, name, 0, LONG)).is_file() for name in SHIPPED):
        keep(options.runs, splits["test"][500::1000], options.weights)


if __name__ == "__main__":
    main()
