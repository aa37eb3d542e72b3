"""A PixelCNN on static binarized MNIST: train it for a budget, stop and resume, keep the weights.

    python -m benchmarks.binarized_mnist --seconds 2400 --threads 1   # forty minutes of one core
    python -m benchmarks.binarized_mnist --seconds 2400 --resume      # go on after an interruption

Needs the data, see `nflib.data.load`. Writes data/mnist_pixelcnn.safetensors (the weights that are
best on the validation images) and results/binarized_mnist.json (nats of the 10,000 test images,
exact). The state of the run is kept in a file of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from nflib import checkpoints, data
from nflib.metrics import evaluate
from nflib.pixel import PixelCNN
from nflib.train import fit

MODEL: dict[str, Any] = {"shape": (1, 28, 28), "levels": 2, "width": 32, "blocks": 15}
TRAINING: dict[str, Any] = {"batch_size": 16, "lr": 3e-3, "warmup": 200, "ema": 0.998, "seed": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2400.0, help="of training")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=["bf16"], help="of the network")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    build, root = machine.ROOT / "_build", machine.ROOT
    parser.add_argument("--run", type=Path, default=build / "binarized_mnist.safetensors")
    parser.add_argument(
        "--weights", type=Path, default=root / "data" / "mnist_pixelcnn.safetensors"
    )
    parser.add_argument("--out", type=Path, default=root / "results" / "binarized_mnist.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.run.parent.mkdir(parents=True, exist_ok=True)
    splits = {s: data.load("binarized_mnist", s).x for s in ("train", "valid", "test")}
    splits = {name: x.view(-1, *MODEL["shape"]) for name, x in splits.items()}
    torch.manual_seed(TRAINING["seed"])
    model = PixelCNN(**MODEL)
    history = fit(
        model,
        splits["train"],
        # A thousand images tell the best weights as well as ten times as many.
        splits["valid"][:1000],
        seconds=options.seconds,
        validate_every=1000,
        checkpoint=options.run,
        resume=options.resume,
        mixed_precision=options.precision,
        **TRAINING,
    )
    test = splits["test"].to(next(model.parameters()).device)
    score = evaluate(model, test, batch_size=250)
    last = history.records[-1]
    facts = {
        "model": MODEL | {"shape": list(MODEL["shape"])},
        "training": TRAINING | {"seconds": last["seconds"], "steps": last["step"]},
        "epochs": last["epoch"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "test": -score.nats,
        "standard_error": score.standard_error,
    }
    options.weights.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.save(model.cpu(), options.weights, facts=facts)
    what = "negative log-likelihood of static binarized MNIST's test images: mean, nats, exact"
    curve = [{k: r[k] for k in ("step", "train", "valid") if k in r} for r in history.records]
    result = {"what": what, **machine.facts("benchmarks.binarized_mnist"), **facts}
    machine.write(options.out, result | {"history": curve})
    print(f"{-score.nats:.2f} nats")


if __name__ == "__main__":
    main()
