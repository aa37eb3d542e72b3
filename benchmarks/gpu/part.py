"""The process of one part: measures its rows one after the other, or some at once.

It imports everything, then waits on its standard input for the time at which it must end. A
part is a module of this package with ``WHAT``, one sentence, and ``rows(place)``, which names all
rows and gives a function for each; it returns None if it cannot be measured yet.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.conduct import DISORDER, NO_DEVICE
from benchmarks.gpu.place import Place
from benchmarks.gpu.plan import Part, chosen
from benchmarks.gpu.store import Store, failed, note_error
from nflib.train import hardware, processor

Row = Callable[[], Any]
# Seconds that a row needs at least, and by which processes of a pool end before their part.
LEAST, EARLIER = 0.5, 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part")
    parser.add_argument("--device", required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--leave-errors", action="store_true")
    options = parser.parse_args(arguments)
    (part,) = chosen([options.part])
    if options.device == "cpu":
        # Before anything asks for it: neither torch nor accelerate finds a GPU that there may be.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    path = options.out / f"{part.name}.json"
    try:
        importlib.import_module(f"benchmarks.gpu.{part.name}")
    except Exception as error:
        note_error(path, said(error))
        return 0
    deadline = sys.stdin.readline()
    if not deadline:
        return 0  # whoever started this has ended
    clock = Clock(float(deadline))
    clock.start()
    place = Place(options.device, options.small, options.out, options.runs / part.name, clock)
    try:
        if options.device == "cuda" and not torch.cuda.is_available():
            return NO_DEVICE
        return measure(part, place, options.leave_errors)
    except KeyboardInterrupt:
        return 0
    finally:
        clock.stop()


def measure(part: Part, place: Place, leave_errors: bool = False) -> int:
    """Measure all rows that are not there, as far as the time goes; returns the status."""
    start = time.time()
    module = importlib.import_module(f"benchmarks.gpu.{part.name}")
    place.runs.mkdir(parents=True, exist_ok=True)
    store = Store(place.out / f"{part.name}.json", {"what": module.WHAT, **facts(place)})
    try:
        rows = module.rows(place)
    except Exception as error:
        note_error(store.path, said(error))
        return 0
    todo = store.expect(rows, leave_errors)
    store.save(0.0)
    at_once = part.workers > 1 and place.device == "cuda"
    results = in_processes(part, place, todo) if at_once else in_turn(rows, place, todo)
    try:
        for name, result in results:
            if result is None:
                continue
            store.add(name, result, time.time() - start)
            print(f"{name}: {result}"[:300], flush=True)
            if failed(result) and not at_once and in_disorder(place):
                return DISORDER
    finally:
        store.save(time.time() - start)
    return 0


def in_turn(rows: dict[str, Row], place: Place, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Rows one after the other, as long as there is time."""
    for name in names:
        if place.clock.left() < LEAST:
            return
        yield name, attempt(rows[name])
        if place.device == "cuda" and not in_disorder(place):
            torch.cuda.empty_cache()


def in_processes(part: Part, place: Place, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Some rows at once, each in a new process: small models leave a GPU room for others."""
    pool = ProcessPoolExecutor(part.workers, get_context("spawn"), max_tasks_per_child=1)
    waiting = list(names)
    running: dict[Future[Any], str] = {}
    try:
        while waiting or running:
            # No more than can run: what the pool has taken cannot be called back.
            while waiting and len(running) < part.workers and place.clock.left() > LEAST:
                name = waiting.pop(0)
                running[pool.submit(one_row, part, place, name)] = name
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def one_row(part: Part, place: Place, name: str) -> Any:
    """What a process of the pool does; None if the time was over."""
    clock = Clock(place.clock.deadline - EARLIER)
    if clock.left() < LEAST:
        return None
    clock.start()
    here = Place(place.device, place.small, place.out, place.runs, clock)
    try:
        return attempt(importlib.import_module(f"benchmarks.gpu.{part.name}").rows(here)[name])
    except KeyboardInterrupt:
        return None
    finally:
        clock.stop()


def attempt(row: Row) -> Any:
    """The row, or the error that it ended with."""
    try:
        return row()
    except Exception as error:
        return {"error": said(error)}
    finally:
        # A recorded graph holds memory as long as anything refers to it.
        gc.collect()


def said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'without words'}"


def in_disorder(place: Place) -> bool:
    """Whether an error has left the device such that nothing runs on it any more."""
    try:
        place.wait()
    except Exception:
        return True
    return False


def facts(place: Place) -> dict[str, Any]:
    words = "" if place.device == "cuda" else f" --device {place.device}"
    command = f"python -m benchmarks.gpu{words}{' --small' if place.small else ''}"
    name = hardware() if place.device == "cuda" else processor()
    return machine.facts("benchmarks.gpu") | {"command": command, "hardware": name}


if __name__ == "__main__":
    sys.exit(main())
