"""Seconds, kernels and utilisation of something that runs on a device."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu.place import Place

Run = Callable[[], Any]


def seconds_of(run: Run, place: Place) -> float:
    """One call."""
    place.wait()
    start = time.perf_counter()
    run()
    place.wait()
    return time.perf_counter() - start


def milliseconds(run: Run, place: Place, seconds: float) -> float:
    """Of a call, among so many as take these seconds, between which nothing waits."""
    run()
    count = max(3, round(seconds / max(1e-6, seconds_of(run, place))))

    def block() -> None:
        for _ in range(count):
            run()

    return round(1e3 * seconds_of(block, place) / count, 4)


def utilisation(run: Run, place: Place, seconds: float) -> int | None:
    """Percent of the time in which the GPU computed, by NVML; None without one."""
    with watched(place) as found:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            # A host that never waits would be minutes ahead of the device.
            for _ in range(20):
                run()
            place.wait()
    return round(sum(found) / len(found)) if found else None


@contextmanager
def watched(place: Place) -> Iterator[list[int]]:
    """Samples of the utilisation, taken by a thread beside what runs within."""
    found: list[int] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            if (value := utilisation_now()) is not None:
                found.append(value)

    thread = threading.Thread(target=look)
    if place.device == "cuda":
        thread.start()
    try:
        yield found
    finally:
        done.set()
        if place.device == "cuda":
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


def kernels(run: Run, place: Place) -> dict[str, int]:
    """What a call hands to the device: launches by the host, and kernels, which a graph bundles.

    On a CPU: operations that call no other, compiled ones among them.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if place.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        run()
        place.wait()
    events = profile.events()
    assert events is not None
    if place.device == "cpu":
        return {
            "operations": sum(
                not event.cpu_children
                and (event.name.startswith("aten::") or "cpp_fused" in event.name)
                for event in events
            )
        }
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    return {
        "launches": sum("LaunchKernel" in e.name or "GraphLaunch" in e.name for e in events),
        # Neither copies nor the marks that torch's optimizers set.
        "kernels": sum(not e.name.startswith(("Mem", "Optimizer.")) for e in on_device),
    }
