"""nflib beside zuko, nflows, normflows and FrEIA: milliseconds, graph breaks, bfloat16.

    pip install -e ".[bench]"
    python -m benchmarks.peers --threads 1 --compile    # all of it, writes results/peers.json
    python -m benchmarks.peers --threads 1 --only "MAF, 64-D" --libraries nflib,zuko    # a part

All libraries run the same architectures in one process, see `benchmarks.peer_models`, on the same
standard normal data with the same optimizer. Three operations: a training step, `log_prob` and
sampling, the last two without gradients. Blocks of calls of about 0.2 s take turns between the
libraries, so that other work on the machine meets them alike; compiled ones, whose caches would
disturb one another, run one library after the other.

The floor is nflib's conditioners alone, each on a random input of its shape, through which a
gradient passes where one does in the flow. What nflib takes beyond it is the flow's own work.

A run measures its configurations and libraries anew and leaves the others in the file, if they
were measured on the same hardware, threads and torch with as many repeats.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import itertools
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nflib
from benchmarks import machine
from benchmarks.peer_models import CONFIGURATIONS, LIBRARIES, Configuration, Sample, quiet
from nflib.autoregressive import MADE
from nflib.cache import cached
from nflib.core import Flow
from nflib.coupling import Coupling
from nflib.train import processor

BLOCK_SECONDS, BATCHES, STEPS = 0.2, 16, 20
WHAT = (
    "milliseconds a call, float32: 10th percentile, median and 90th percentile over blocks of "
    "calls. train: zero_grad, backward of -log_prob.mean() and a step of fused AdamW at 1e-3; "
    "log_prob and sample: without gradients, in evaluation mode, nflib's inside of "
    "nflib.cache.cached; floor: nflib's conditioners "
    f"alone. bf16: |log p under bfloat16 autocast - log p in float32| of one batch after {STEPS} "
    "training steps from random weights. graph breaks: of log_prob, by torch._dynamo.explain"
)
REVERSE_KL = (
    "normflows' layers go from noise to data, so this is a step of reverse KL divergence: "
    "-(log p(x) - log q(x)).mean() for as many samples x of the flow q, p normal about (1, 1) with "
    "standard deviation 1/2. Graph breaks and bf16 are of log p(x) - log q(x)"
)
Facts = dict[str, Any]


class Floor(nn.Module):
    """The conditioners of a flow without the flow, each with an input of its own."""

    def __init__(self, flow: nn.Module, x: Tensor) -> None:
        super().__init__()
        nets = [part.conditioner for part in flow.modules() if isinstance(part, Coupling)]
        nets += [part for part in flow.modules() if isinstance(part, MADE)]
        seen: list[Tensor] = []
        # The flow does not call its MADE as a module, but the layers of it.
        entries = [net.layers[0] if isinstance(net, MADE) else net for net in nets]
        hooks = [e.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for e in entries]
        flow(x)
        for hook in hooks:
            hook.remove()
        self.inputs = [torch.randn_like(a).requires_grad_(a.requires_grad) for a in seen]
        self.nets = nn.ModuleList(deepcopy(nets))

    def forward(self, x: Tensor) -> list[Tensor]:
        runs = [net.by_rank if isinstance(net, MADE) else net for net in self.nets]
        # Detached, so that no gradient is added up from call to call.
        inputs = [a.detach().requires_grad_(a.requires_grad) for a in self.inputs]
        return [run(a) for run, a in zip(runs, inputs, strict=True)]


@dataclass
class Subject:
    """A library's model of one configuration, or the floor, and what is timed of it."""

    module: nn.Module
    data: Tensor
    sample: Sample | None = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-3, fused=True)
        self.batches = itertools.cycle(self.data)

    def step(self, call: Callable[[Tensor], Any]) -> None:
        self.optimizer.zero_grad()
        out = call(next(self.batches))
        loss = -out.mean() if isinstance(out, Tensor) else torch.stack([o.sum() for o in out]).sum()
        loss.backward()
        self.optimizer.step()

    def call(self, operation: str, module: nn.Module | None = None) -> Callable[[], object]:
        """One call of an operation, by the module compiled if it is given."""
        run = self.module if module is None else module
        if operation == "train":
            return lambda: self.step(run)
        if operation == "sample":
            assert self.sample is not None
            return torch.no_grad()(lambda: self.sample(self.data.shape[1]))
        return torch.no_grad()(lambda: run(self.data[0]))


class Stopwatch:
    """Times an operation in blocks of as many calls as take about BLOCK_SECONDS."""

    def __init__(self, subject: Subject, operation: str, module: nn.Module | None = None) -> None:
        self.subject, self.training = subject, operation == "train"
        self.call, self.count, self.times = subject.call(operation, module), 2, []
        for _ in range(2):  # caches fill and kernels compile in the first
            milliseconds = self.block()
        self.count = max(1, round(1000 * BLOCK_SECONDS / milliseconds))
        self.times.clear()

    def block(self) -> float:
        module = self.subject.module.train(self.training)
        # A block in which no parameter changes, as nflib's own `evaluate` runs it.
        is_kept = isinstance(module, Flow) and not self.training
        gc.disable()
        try:
            with cached(module) if is_kept else nullcontext():
                synchronize(self.subject.data)
                begin = time.perf_counter()
                for _ in range(self.count):
                    self.call()
                synchronize(self.subject.data)
                self.times.append(1000 * (time.perf_counter() - begin) / self.count)
        finally:
            gc.enable()
        return self.times[-1]

    def result(self) -> list[float]:
        quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        return [digits(t) for t in torch.tensor(self.times).double().quantile(quantiles).tolist()]


def digits(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def failure(error: Exception) -> str:
    """What went wrong, in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def prepare(build: Callable[..., Any], data: Tensor) -> Subject:
    """Build a model and train it for STEPS steps, so that nothing is as its constructor left it."""
    torch.manual_seed(0)
    module, sample = build()
    module.to(data.device).train()
    if isinstance(module, Flow):
        module.initialize(data[0])
    subject = Subject(module, data, sample)
    for _ in range(STEPS):
        subject.step(module)
    return subject


@torch.no_grad()
def bf16(module: nn.Module, x: Tensor) -> Facts:
    """How far log p moves under autocast, in nats and in nats per dimension."""
    module.eval()
    torch.manual_seed(1)
    full = module(x).double()
    torch.manual_seed(1)  # a model whose call draws samples draws them again
    with torch.autocast(x.device.type, torch.bfloat16):
        gap = (module(x).double() - full).abs()
    if not bool(gap.isfinite().all()):
        return {"error": "log p is not finite"}
    found = {"max nats": gap.max().item(), "mean nats": gap.mean().item()}
    found |= {f"{name} per dim": value / x[0].numel() for name, value in found.items()}
    return {name: digits(value) for name, value in found.items()}


@torch.no_grad()
def graph_breaks(module: nn.Module, x: Tensor) -> int:
    """How often torch.compile leaves log_prob for the interpreter."""
    torch._dynamo.reset()
    module.eval()
    return torch._dynamo.explain(module)(x).graph_break_count


def measure_compiled(subject: Subject, operations: Sequence[str], repeats: int, row: Facts) -> None:
    """Times of one library's compiled operations, added to its row."""
    torch._dynamo.reset()
    module = torch.compile(subject.module)
    for operation in [o for o in operations if o != "sample"]:
        try:
            watch = Stopwatch(subject, operation, module)
            for _ in range(repeats):
                watch.block()
            row["ms"][f"{operation} compiled"] = watch.result()
        except Exception as error:
            row.setdefault("errors", {})[f"{operation} compiled"] = failure(error)
    torch._dynamo.reset()


def measure(
    config: Configuration, libraries: Sequence[str], device: str, repeats: int, compiled: bool
) -> dict[str, Facts]:
    """A row for each library, and the floor's."""
    torch.manual_seed(0)
    data = torch.randn(BATCHES, config.batch, *config.shape).to(device)
    rows: dict[str, Facts] = {}
    subjects: dict[str, Subject] = {}
    for name in libraries:
        build = config.build[name]
        if isinstance(build, str):
            rows[name] = {"skipped": build}
            continue
        try:
            subject = prepare(build, data)
        except Exception as error:
            rows[name] = {"skipped": failure(error)}
            continue
        subjects[name] = subject
        counts = [p.numel() for p in subject.module.parameters() if p.requires_grad]
        rows[name] = {"parameters": sum(counts)}
        rows[name] |= {"note": config.notes[name]} if name in config.notes else {}
        rows[name]["ms"] = {}
        for key, find in {"bf16": bf16, "graph breaks": graph_breaks}.items():
            try:
                rows[name][key] = find(subject.module, data[0])
            except Exception as error:
                rows[name][key] = {"error": failure(error)}
    torch._dynamo.reset()
    if "nflib" in subjects and not config.reverse_kl:
        subjects["floor"] = Subject(Floor(subjects["nflib"].module, data[0]), data)
        rows["floor"] = {"ms": {}}

    operations = ("sample", "train") if config.reverse_kl else ("log_prob", "sample", "train")
    for operation in operations:
        watches: dict[str, Stopwatch] = {}
        for name, subject in subjects.items():
            if operation == "sample" and subject.sample is None:
                continue
            try:
                watches[name] = Stopwatch(subject, operation)
            except Exception as error:
                rows[name].setdefault("errors", {})[operation] = failure(error)
        for _ in range(repeats):
            for watch in watches.values():
                watch.block()
        for name, watch in watches.items():
            rows[name]["ms"][operation] = watch.result()
    if compiled:
        for name, subject in subjects.items():
            if name != "floor":
                measure_compiled(subject, operations, repeats, rows[name])
    return rows


def merged(path: Path, facts: Facts, name: str, rows: dict[str, Facts]) -> Facts:
    """The file with one configuration's new rows; other rows stay if measured in the same way."""
    old = json.loads(path.read_text()) if path.is_file() else {}
    same = ("device", "hardware", "threads", "torch", "repeats")
    if any(old.get(key) != facts[key] for key in same):
        old = {}
    versions = old.get("versions", {}) | facts["versions"]
    tables = old.get("configurations", {})
    tables[name] = {**tables.get(name, {}), **rows}
    tables[name] = {key: tables[name][key] for key in (*LIBRARIES, "floor") if key in tables[name]}
    ordered = {key: tables[key] for key in CONFIGURATIONS if key in tables}
    return {"what": WHAT, **facts, "versions": versions, "configurations": ordered}


def installed(libraries: Sequence[str]) -> dict[str, str]:
    """Versions of the libraries; of one that is missing a line says so."""
    versions = {"nflib": nflib.__version__}
    for name in [library for library in libraries if library != "nflib"]:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed: pip install 'nflib[bench]'", flush=True)
    return {name: versions[name] for name in libraries if name in versions}


def show(name: str, rows: dict[str, Facts]) -> None:
    for library, row in rows.items():
        times = ", ".join(f"{key} {value[1]:.4g}" for key, value in row.get("ms", {}).items())
        shown = row.get("skipped") or f"{row.get('parameters', '')} ms: {times}"
        extra = {key: row[key] for key in ("graph breaks", "bf16", "errors") if key in row}
        print(f"{name} | {library:>9} | {shown} {extra or ''}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(CONFIGURATIONS), metavar="CONFIGURATION")
    parser.add_argument("--libraries", default=",".join(LIBRARIES), help="separated by commas")
    parser.add_argument("--repeats", type=int, default=15, help="blocks of each operation")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well, takes long")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="by default results/peers.json, or peers_cuda")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet()
    libraries = options.libraries.split(",")
    unknown = set(libraries) - set(LIBRARIES)
    if unknown:
        parser.error(f"expected libraries among {', '.join(LIBRARIES)}, got {', '.join(unknown)}")
    versions = installed(libraries)
    on_cpu = options.device == "cpu"
    stem = "peers" if on_cpu else f"peers_{options.device.split(':')[0]}"
    out = options.out or machine.ROOT / "results" / f"{stem}.json"
    # --only and --libraries choose rows: the whole file is made by the command without them.
    command = f"python -m benchmarks.peers --threads {options.threads}"
    command += (" --compile" if options.compile else "") + ("" if on_cpu else " --device cuda")
    facts = machine.facts("benchmarks.peers") | {"command": command, "device": options.device}
    # A GPU that only stands by is not the hardware of a measurement on the CPU.
    facts |= {"hardware": processor()} if on_cpu else {}
    facts |= {"versions": versions, "repeats": options.repeats}
    facts |= {"batch": {name: config.batch for name, config in CONFIGURATIONS.items()}}
    facts |= {"steps": {n: REVERSE_KL for n, config in CONFIGURATIONS.items() if config.reverse_kl}}
    for name in [options.only] if options.only else CONFIGURATIONS:
        rows = measure(
            CONFIGURATIONS[name], list(versions), options.device, options.repeats, options.compile
        )
        machine.write(out, merged(out, facts, name, rows))
        show(name, rows)
    print(f"Wrote {out.name}.")


if __name__ == "__main__":
    main()
