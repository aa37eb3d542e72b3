"""Runs the parts one after the other, each in a process that is told its end. Needs no torch.

A process stops itself at its end. One that does not is killed a little later, with
all that it has started, so that the whole ends in time whatever happens.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.plan import Part, allotment
from benchmarks.gpu.store import complete, note_error, read

# Seconds between the end that a process was told and the one it is given, and what a part needs.
GRACE, LEAST = 4.0, 5.0
# Status of a process that found no device, and of one whose device is in disorder after an error.
NO_DEVICE, DISORDER = 3, 4
ROOT = Path(__file__).resolve().parents[2]
MODULE = "benchmarks.gpu.part"  # what a process runs


class Process:
    """A part's process. It imports what it needs and waits until it is told to begin."""

    def __init__(self, part: Part, arguments: Sequence[str]) -> None:
        self.part = part
        command = [sys.executable, "-m", MODULE, part.name, *arguments]
        # A group of its own, which is killed as a whole.
        self.popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT
        )

    def run(self, deadline: float) -> int | None:
        """Let it measure until then; returns its status, None if it had to be killed."""
        stdin = self.popen.stdin
        assert stdin is not None
        try:
            stdin.write(f"{deadline}\n")
            stdin.close()
        except OSError:
            pass  # it has ended by itself; its status says why
        try:
            return self.popen.wait(max(0, deadline - time.time()) + GRACE)
        except subprocess.TimeoutExpired:
            return None
        except KeyboardInterrupt:
            self.signal(signal.SIGINT)
            try:
                self.popen.wait(GRACE)
            except subprocess.TimeoutExpired:
                pass
            raise
        finally:
            self.signal(signal.SIGKILL)
            self.popen.wait()

    def signal(self, number: int) -> None:
        try:
            os.killpg(self.popen.pid, number)
        except ProcessLookupError:
            pass


def conduct(
    parts: Sequence[Part], arguments: Sequence[str], out: Path, deadline: float, early: bool
) -> bool:
    """Run the parts that are not complete; all is over at the deadline, in `time.time`.

    Args:
        arguments: of every part's process.
        early: start each process while the one before measures, which saves the time in which
            Python imports; for machines with cores to spare.

    Returns: False if the device was not found.
    """
    todo = [part for part in parts if not complete(read(out / f"{part.name}.json"))]
    waiting: Process | None = None
    try:
        for k, part in enumerate(todo):
            told = allotment(todo[k:], deadline - time.time()) - GRACE
            if told < LEAST:
                print(f"--- {part.name}: no time left", flush=True)
                dismissed(waiting)
                waiting = None
                continue
            print(f"--- {part.name}: {told:.0f} s", flush=True)
            end = time.time() + told
            process = waiting or Process(part, arguments)
            following = todo[k + 1] if k + 1 < len(todo) else None
            waiting = Process(following, arguments) if early and following else None
            status = process.run(end)
            while status == DISORDER and end - time.time() > LEAST:
                status = Process(part, [*arguments, "--leave-errors"]).run(end)
            if status == NO_DEVICE:
                return False
            if status not in (0, DISORDER):
                how = f"had to be killed after {told:.0f} s" if status is None else f"{status=}"
                note_error(out / f"{part.name}.json", f"The process of this part ended: {how}.")
    finally:
        dismissed(waiting)
    return True


def dismissed(waiting: Process | None) -> None:
    """End a process that will not be needed."""
    if waiting is not None:
        waiting.signal(signal.SIGKILL)
        waiting.popen.wait()
