"""MixerFlow on a GPU: speed, precision, memory, training on MNIST and resuming, by one command.

    python -m benchmarks.mixer_gpu                       # all of it, on one GPU in 25 minutes
    python -m benchmarks.mixer_gpu --only speed memory   # the measurements with these in their name
    python -m benchmarks.mixer_gpu --device cpu --small  # the same on one core in five minutes

Writes one file a measurement into results/gpu (results/cpu with ``--device cpu``) and leaves those
that are there, so that the same command goes on after an interruption; ``--again`` measures anew.
The best MixerFlow of a GPU becomes data/mnist_mixerflow.safetensors. Training needs MNIST, see
`nflib.data.load`; everything else runs on photographs and digits that nflib holds.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine, memory
from nflib import checkpoints, data, models, reversible
from nflib.core import Flow
from nflib.train import hardware, processor

SHAPE = (1, 28, 28)
# Name: whether conditioners run in bfloat16, and whether the model is compiled.
MODES = {
    "float32": (False, False),
    "float32, compiled": (False, True),
    "bfloat16": (True, False),
    "bfloat16, compiled": (True, True),
}
MAX_BYTES = 8_000_000  # of weights that are committed


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    layers: int  # of MixerFlow
    hidden: int
    steps: int  # of Glow, in each of two levels
    channels: int
    batches: tuple[int, ...]
    compiled_batches: tuple[int, ...]
    seconds: float  # of each timed block
    warm: int  # steps of training before precision is judged
    depths: tuple[int, ...]
    depth_batch: int
    trainings: dict[str, str]  # the command line of each
    training_seconds: float
    updates: int  # of the run that is killed


MIXER = "mixerflow --extraction bands --patch 1 --flow maf"
GLOW = "glow --levels 2"
LONG = "--batch-size 256 --lr 2e-3 --warmup 200 --ema 0.999"
NARROW = "--mixed-precision bf16 --compile"
LARGE = Sizes(
    layers=4,
    hidden=128,
    steps=4,
    channels=64,
    batches=(128, 512, 2048),
    # Each compiles once more.
    compiled_batches=(128, 2048),
    seconds=2.0,
    warm=500,
    depths=(4, 8, 16, 32),
    depth_batch=256,
    trainings={
        "mixerflow": f"{MIXER} --layers 10 --hidden 256,256 {LONG} {NARROW}",
        "mixerflow_float32": f"{MIXER} --layers 10 --hidden 256,256 {LONG}",
        "glow": f"{GLOW} --steps 16 --hidden 128 {LONG} {NARROW}",
    },
    training_seconds=360.0,
    updates=300,
)
SHORT = "--batch-size 64 --lr 5e-3 --warmup 20 --ema 0.99 --validate-every 50 --valid-rows 500"
SMALL = Sizes(
    layers=2,
    hidden=64,
    steps=1,
    channels=16,
    batches=(16, 64, 256),
    compiled_batches=(64,),
    seconds=0.5,
    warm=100,
    depths=(4, 8, 16, 32),
    depth_batch=8,
    trainings={
        "mixerflow": f"{MIXER} --layers 4 --hidden 128 {SHORT} --mixed-precision bf16",
        "mixerflow_float32": f"{MIXER} --layers 4 --hidden 128 {SHORT}",
        "glow": f"{GLOW} --steps 2 --hidden 32 {SHORT} --mixed-precision bf16",
    },
    training_seconds=15.0,
    updates=150,
)


# --- what is measured ------------------------------------------------------------------------


def mixer(sizes: Sizes) -> Flow:
    hidden = (sizes.hidden,)
    return models.mixerflow(SHAPE, 1, sizes.layers, hidden, extraction="bands", grey_levels=256)


def glow(sizes: Sizes) -> Flow:
    return models.glow(SHAPE, 2, sizes.steps, sizes.channels, grey_levels=256)


def photographs(n: int, device: str, split: str = "train") -> Tensor:
    """Patches of photographs in the size of MNIST."""
    x = data.load("photo_patches", split, size=32, channels=1, n=n).x
    return x[..., 2:30, 2:30].contiguous().to(device)


def ready(make: Callable[[Sizes], Flow], sizes: Sizes, x: Tensor) -> Flow:
    """A model on the device of the data, initialised on them."""
    torch.manual_seed(0)
    flow = make(sizes).to(x.device)
    flow.initialize(x)
    return flow


def gradient(call: Callable[[Tensor], Tensor], x: Tensor, narrow: bool = False) -> None:
    """A forward and a backward pass, as in `nflib.train.fit`."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=narrow):
        loss = -call(x).mean()
    loss.backward()


def step(
    call: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, x: Tensor, narrow: bool
) -> None:
    optimizer.zero_grad()
    gradient(call, x, narrow)
    optimizer.step()


# --- how it is measured ----------------------------------------------------------------------


def wait(device: str) -> None:
    """Until the device has done what was asked; a CPU always has."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], None], device: str) -> float:
    """One call."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def timed(run: Callable[[], None], device: str, seconds: float) -> dict[str, float | None]:
    """Many calls in one block, within which nothing waits for the device."""
    first = seconds_of(run, device)
    for _ in range(2):
        run()
    count = max(3, round(seconds / seconds_of(run, device)))

    def block() -> None:
        for _ in range(count):
            run()

    with utilisation(device) as busy:
        took = seconds_of(block, device)
    return {
        "milliseconds": round(1e3 * took / count, 3),
        "first call, seconds": round(first, 2),
        "utilisation, percent": round(sum(busy) / len(busy)) if busy else None,
    }


@contextmanager
def utilisation(device: str) -> Iterator[list[int]]:
    """Percent of the time in which the GPU computed, sampled beside what runs within."""
    found: list[int] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            if (value := utilisation_now()) is not None:
                found.append(value)

    thread = threading.Thread(target=look)
    if device == "cuda":
        thread.start()
    try:
        yield found
    finally:
        done.set()
        if device == "cuda":
            thread.join()


def utilisation_now() -> int | None:
    """By NVML if its Python package is there, else by nvidia-smi, else unknown."""
    try:
        return torch.cuda.utilization()
    except (ImportError, RuntimeError):
        if not shutil.which("nvidia-smi"):
            return None
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-i=0"]
    answer = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return int(answer) if answer.isdigit() else None


def operations(run: Callable[[], None], device: str) -> int:
    """Kernels that a call starts on a GPU; on a CPU its operations that call no other."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        run()
        wait(device)
    if device == "cuda":
        return sum("LaunchKernel" in event.name for event in profile.events())
    return sum(
        not event.cpu_children and (event.name.startswith("aten::") or "cpp_fused" in event.name)
        for event in profile.events()
    )


def peak_bytes(model: nn.Module, x: Tensor) -> int:
    """Peak bytes of a forward and backward pass without parameters and their gradients."""
    if x.device.type == "cpu":
        return memory.peak_bytes(model, x)
    model.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradient(model, x)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return torch.cuda.max_memory_allocated() - before - gradients


# --- the measurements ------------------------------------------------------------------------


def speed(make: Callable[[Sizes], Flow], sizes: Sizes, device: str, runs: Path) -> dict[str, Any]:
    """Training steps in each mode, for several batch sizes."""
    x = photographs(max(sizes.batches), device)
    rows: dict[str, Any] = {}
    for mode, (narrow, compiled) in MODES.items():
        torch.compiler.reset()
        # Nothing that an earlier run compiled makes the first call quicker.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
        flow = ready(make, sizes, x)
        call = torch.compile(flow, fullgraph=True, dynamic=False) if compiled else flow
        optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-4, fused=True)
        row: dict[str, Any] = {"batches": {}}
        for batch in sizes.compiled_batches if compiled else sizes.batches:
            run = partial(step, call, optimizer, x[:batch], narrow)
            found = timed(run, device, sizes.seconds)
            found["images a second"] = round(1e3 * batch / found["milliseconds"])
            row["batches"][str(batch)] = found
            print(mode, batch, found, flush=True)
        row["operations"] = operations(partial(gradient, call, x[:batch], narrow), device)
        rows[mode] = row
    return {
        "what": "training steps (loss, backward pass, AdamW) on images of 1 x 28 x 28, and "
        "kernels (on a CPU: operations) of a forward and backward pass",
        "parameters": sum(p.numel() for p in flow.parameters()),
        "rows": rows,
    }


def precision(sizes: Sizes, device: str, runs: Path) -> dict[str, Any]:
    """How far log p moves when conditioners run in bfloat16, after some training in it."""
    train, test = photographs(4096, device), photographs(256, device, "test")
    rows = {}
    for name, make in (("MixerFlow", mixer), ("Glow", glow)):
        flow = ready(make, sizes, train[:512])
        optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3, fused=True)
        for _ in range(sizes.warm):
            index = torch.randint(len(train), (64,), device=device)
            step(flow, optimizer, train[index], narrow=True)
        exact, moved = (log_prob(flow, test, narrow) for narrow in (False, True))
        assert exact.dtype == moved.dtype == torch.float32
        gap = (moved - exact).abs() / test[0].numel()
        rows[name] = {"largest": gap.max().item(), "mean": gap.mean().item()}
    what = "change of log p of 256 photographs by bfloat16 in the conditioners, nats/dim"
    return {"what": what, "rows": rows}


@torch.no_grad()
def log_prob(flow: Flow, x: Tensor, narrow: bool) -> Tensor:
    """With the same noise of dequantization in each call."""
    torch.manual_seed(0)
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=narrow):
        return flow.log_prob(x)


def depth(sizes: Sizes, device: str, runs: Path) -> dict[str, Any]:
    """Memory and time of a step against the number of layers, activations kept or rebuilt."""
    photos = photographs(sizes.depth_batch, device)
    x = (photos + torch.rand(photos.shape, device=device) - 128) / 64

    def make(layers: int) -> nn.Module:
        flow = models.mixerflow(SHAPE, 1, layers, (sizes.hidden,), extraction="bands")
        return flow.to(device)

    rows: dict[str, Any] = {}
    for layers in sizes.depths:
        plain = memory.settle(make, layers, x)
        pair = {"plain": plain, "reversible": reversible.turn_on(copy.deepcopy(plain))}
        row: dict[str, Any] = {}
        for name, model in pair.items():
            row[name] = {"bytes": peak_bytes(model, x)}
        one, other = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in pair.values())
        row["relative error of the gradient"] = ((one - other).norm() / one.norm()).item()
        for name, model in pair.items():
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            row[name] |= timed(partial(memory.step, model, optimizer, x), device, sizes.seconds)
        rows[str(layers)] = row
        print(layers, row, flush=True)
    what = (
        "peak bytes of a forward and backward pass without parameters and their gradients, "
        "milliseconds of a step with AdamW, and the relative error of float32 gradients, by layers"
    )
    return {"what": what, "batch": list(x.shape), "rows": rows}


def training(name: str, sizes: Sizes, device: str, runs: Path) -> dict[str, Any]:
    """One run of the command line on MNIST, which goes on where it was interrupted."""
    out = runs / f"{name}.json"
    words = [*sizes.trainings[name].split(), "--data", "mnist"]
    words += ["--seconds", str(sizes.training_seconds), "--out", str(out), "--resume"]
    if device == "cpu":
        words += ["--threads", str(torch.get_num_threads())]
    subprocess.run(command(words), check=True, env=environment(device))
    what = "MNIST in bits/dim of the test images, a lower bound with one draw of noise"
    run = json.loads(out.read_text())
    # Where the files of the run lay is nobody's business.
    run["command"] = run["command"].replace(str(runs), "runs")
    return {"what": what, "run": run}


def resume(sizes: Sizes, device: str, runs: Path) -> dict[str, Any]:
    """A run that is killed and goes on, beside one that nothing stops."""
    words = "mixerflow --data digits --patch 2 --layers 4 --hidden 64 --ema 0.9".split()
    words += ["--updates", str(sizes.updates), "--validate-every", "10", "--resume", "--out"]
    killed, whole = runs / "killed.json", runs / "whole.json"
    state = killed.with_suffix(".state.safetensors")
    process = subprocess.Popen(command([*words, str(killed)]), env=environment(device))
    while process.poll() is None and not state.exists():
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if killed.exists():
        raise RuntimeError("The run ended before it was killed: give it more updates.")
    stopped = checkpoints.read(state)[1]["progress"]["step"]
    for out in (killed, whole):
        subprocess.run(command([*words, str(out)]), check=True, env=environment(device))
    one, two = (json.loads(path.read_text()) for path in (killed, whole))
    a, b = (checkpoints.read(path.with_suffix(".safetensors"))[0] for path in (killed, whole))
    return {
        "what": "digits in bits/dim after the same updates, of a run that was killed and resumed "
        "and of one that was not, and the largest difference of their weights",
        "updates": sizes.updates,
        "resumed from step": stopped,
        "killed and resumed": one["bits_per_dim"],
        "uninterrupted": two["bits_per_dim"],
        "largest difference of a weight": max((a[k] - b[k]).abs().max().item() for k in a),
    }


def command(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "nflib.train", *words]


def environment(device: str) -> dict[str, str]:
    return os.environ | ({"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {})


Measurement = Callable[[Sizes, str, Path], dict[str, Any]]


def measurements(sizes: Sizes) -> dict[str, Measurement]:
    """Each by the name of its file; the short ones come first."""
    return {
        "precision": precision,
        "memory": depth,
        "resume": resume,
        "speed_mixerflow": partial(speed, mixer),
        "speed_glow": partial(speed, glow),
        **{f"train_{name}": partial(training, name) for name in sizes.trainings},
    }


def keep_best(out: Path, runs: Path, weights: Path) -> None:
    """Copy the weights of the best MixerFlow to where the course keeps them, if small enough."""
    scores = {
        path.stem.removeprefix("train_"): json.loads(path.read_text())["run"]["bits_per_dim"]
        for path in out.glob("train_mixerflow*.json")
    }
    found = [name for name in scores if (runs / f"{name}.safetensors").is_file()]
    if not found:
        return
    best = runs / f"{min(found, key=lambda name: scores[name])}.safetensors"
    if best.stat().st_size > MAX_BYTES:
        print(f"{best} has {best.stat().st_size:,} bytes, too many to keep.")
        return
    weights.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(best, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for one core")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of measurements' names")
    parser.add_argument("--again", action="store_true", help="also what has been measured")
    parser.add_argument("--training-seconds", type=float, help="of each training run")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--out", type=Path, help="folder, by default results/gpu or results/cpu")
    weights = machine.ROOT / "data" / "mnist_mixerflow.safetensors"
    parser.add_argument("--weights", type=Path, default=weights, help="of the best on a GPU")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.mixer_gpu finds no GPU; use --device cpu --small.")
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = SMALL if options.small else LARGE
    if options.training_seconds:
        sizes = Sizes(**vars(sizes) | {"training_seconds": options.training_seconds})
    place = "gpu" if options.device == "cuda" else "cpu"
    out = options.out or machine.ROOT / "results" / place
    runs = machine.ROOT / "_build" / "mixer_gpu" / place
    measure(sizes, options.device, out, runs, options.only, options.again)
    if options.device == "cuda":
        keep_best(out, runs, options.weights)


def measure(
    sizes: Sizes, device: str, out: Path, runs: Path, only: list[str], again: bool = False
) -> None:
    """Make the measurements whose names hold one of these parts."""
    runs.mkdir(parents=True, exist_ok=True)
    # So that the profiler of a CPU sees the compiler's operations.
    torch._inductor.config.cpp.enable_kernel_profile = device == "cpu"
    for name, function in measurements(sizes).items():
        path = out / f"{name}.json"
        if not any(part in name for part in only) or (path.is_file() and not again):
            continue
        if name == "resume" or again:
            # What an older measurement left there is not to be resumed.
            kind = name.removeprefix("train_")
            for stem in ("killed", "whole") if name == "resume" else (kind,):
                for old in runs.glob(f"{stem}.*"):
                    old.unlink()
        print(f"--- {name}", flush=True)
        start = time.perf_counter()
        result = function(sizes, device, runs)
        facts = machine.facts("benchmarks.mixer_gpu")
        facts["hardware"] = processor() if device == "cpu" else hardware()
        facts["seconds"] = round(time.perf_counter() - start)
        machine.write(path, facts | result)


if __name__ == "__main__":
    main()
