"""All results that the course wants from a GPU, by one command in ten minutes.

    python -m benchmarks.gpu                        # all parts, on one GPU in 9 minutes
    python -m benchmarks.gpu --only mixer speed     # these parts, which then share the minutes
    python -m benchmarks.gpu --device cpu --small   # a rehearsal on one core in 4 minutes

The parts, in the order of their worth, with their share of 9 minutes:

    correctness   38 s   every bijection against autograd and against the CPU, samplers, replayed
                         steps against ordinary ones, a resumed run against an uninterrupted one
    mixer        135 s   a MixerFlow with less than a million parameters on MNIST
    speed         97 s   training steps: eager, compiled, replayed; float32, tf32, bf16; kernels,
                         utilisation, other libraries, what narrow numbers do to log p
    samplers      22 s   images of the pixel models, a second of sound, MAF's inverse
    memory        27 s   bytes and time against depth, activations kept and rebuilt
    weights      124 s   ten models for the chapters, four at once
    search        38 s   a learning rate for each model of the claims
    claims        59 s   MixerFlow's six claims, to a plateau, three seeds

What one part does not need goes to those after it. Every row of a result is written as soon as it
stands. The same command goes on where it stopped: rows that are there are not measured again, rows
that failed are, and a training continues from its checkpoint. ``--again`` measures anew. Nothing
goes on for longer than the minutes given. ``search`` and ``claims`` want some ten minutes more:
give the command a second time.

Writes results/gpu (results/cpu with ``--device cpu``): a JSON file a part, summary.json, and
weights as safetensors, at most 16 MB together. Running trainings lie in _build/gpu. The data sets
are searched in NFLIB_DATA, see `nflib.data.load`; nothing is downloaded where they are found.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.conduct import ROOT, conduct
from benchmarks.gpu.gather import gather, summarize
from benchmarks.gpu.plan import PARTS, Part, chosen

# Seconds for gathering and for Python to end.
LAST = 1.0


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.time()
    options = parse(arguments)
    try:
        parts = chosen(options.only)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    out, runs = options.out.resolve(), (options.build / options.out.name).resolve()
    if options.again:
        forget(parts, out, runs)
    # A request to terminate ends as a Ctrl-C does: checkpoints are written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found, is_gpu = True, options.device == "cuda"
    try:
        words = ["--out", str(out), "--runs", str(runs), *told(options)]
        end = start + 60 * options.minutes - LAST
        found = conduct(parts, words, out, end, early=is_gpu)
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here.", flush=True)
    if not found:
        raise SystemExit("benchmarks.gpu finds no GPU; use --device cpu --small.")
    facts = {"command": command(options), "seconds": round(time.time() - start, 1)}
    summarize(out, PARTS, gather(out, runs), facts)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="of everything together")
    add("--only", nargs="*", default=[], metavar="NAME", help="these parts")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--small", action="store_true", help="sizes for one core")
    add("--again", action="store_true", help="also what has been measured")
    add("--out", type=Path, help="folder, by default results/gpu or results/cpu")
    add("--build", type=Path, default=ROOT / "_build" / "gpu", help="for running trainings")
    options = parser.parse_args(arguments)
    if options.out is None:
        options.out = ROOT / "results" / ("gpu" if options.device == "cuda" else "cpu")
    return options


def told(options: argparse.Namespace) -> list[str]:
    """The options that change what is measured."""
    return ["--device", options.device, *(["--small"] if options.small else [])]


def command(options: argparse.Namespace) -> str:
    """The command that makes all results of this kind; where they lie is nobody's business."""
    words = [] if options.device == "cuda" else ["--device", options.device]
    return " ".join(["python -m benchmarks.gpu", *words, *(["--small"] if options.small else [])])


def forget(parts: Sequence[Part], out: Path, runs: Path) -> None:
    """Remove the results and the trainings of these parts."""
    for part in parts:
        (out / f"{part.name}.json").unlink(missing_ok=True)
        shutil.rmtree(runs / part.name, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
