"""A multi-scale flow on MNIST: train it for a budget, stop and resume at will, keep the weights.

    python -m benchmarks.mnist_glow --seconds 3600 --threads 1   # an hour of one CPU core
    python -m benchmarks.mnist_glow --seconds 3600 --resume      # go on after an interruption

Needs MNIST, see `nflib.data.load`. Writes data/mnist_glow.safetensors (the best weights) and
results/mnist_glow.json (bits/dim of the 10,000 test images, with one draw of uniform noise and with
eight). The state of the run is kept in a file of its own until it is complete.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import machine
from nflib import checkpoints, data, models
from nflib.metrics import evaluate
from nflib.train import fit

MODEL = {"shape": (1, 28, 28), "levels": 2, "steps": 8, "hidden": 64, "grey_levels": 256}
TRAINING = {"batch_size": 64, "lr": 1.5e-3, "warmup": 200, "ema": 0.999, "seed": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600.0, help="of training")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=["bf16"], help="of the conditioners")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument(
        "--run", type=Path, default=machine.ROOT / "_build" / "mnist_glow.safetensors"
    )
    parser.add_argument(
        "--weights", type=Path, default=machine.ROOT / "data" / "mnist_glow.safetensors"
    )
    parser.add_argument("--out", type=Path, default=machine.ROOT / "results" / "mnist_glow.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.run.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(TRAINING["seed"])
    flow = models.glow(**MODEL)
    history = fit(
        flow,
        data.load("mnist", "train").x,
        # Two thousand rows tell the best weights as well as ten, in a fifth of the time.
        data.load("mnist", "valid").x[:2000],
        seconds=options.seconds,
        validate_every=500,
        checkpoint=options.run,
        resume=options.resume,
        mixed_precision=options.precision,
        **TRAINING,
    )
    torch.manual_seed(0)
    disagreement = machine.round_trip(flow)
    test = data.load("mnist", "test").x.to(next(flow.parameters()).device)
    one, eight = (evaluate(flow, test, batch_size=500, samples=k) for k in (1, 8))
    last = history.records[-1]
    facts = {
        "model": MODEL | {"shape": list(MODEL["shape"])},
        "training": TRAINING | {"seconds": last["seconds"], "steps": last["step"]},
        "epochs": last["epoch"],
        "parameters": sum(p.numel() for p in flow.parameters()),
        "test": one.bits_per_dim(),
        "test, 8 samples": eight.bits_per_dim(),
        "round_trip": disagreement,
    }
    options.weights.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.save(flow.cpu(), options.weights, facts=facts)
    what = "bits/dim of MNIST's test images, lower bounds with 1 and 8 draws of uniform noise"
    curve = [{k: r[k] for k in ("step", "train", "valid") if k in r} for r in history.records]
    result = {"what": what, **machine.facts("benchmarks.mnist_glow"), **facts, "history": curve}
    machine.write(options.out, result)
    print(f"{one.bits_per_dim():.3f} bits/dim, {eight.bits_per_dim():.3f} with 8 samples")


if __name__ == "__main__":
    main()
