"""Plant faults in nflib, one at a time, and see whether the nearest tests find them.

    python tools/mutants.py [--only MODULE] [--all] [--list] [--least 95]

The faults stand in tests/mutants/*.toml, a file for each module: a text that occurs once in the
code, what takes its place, and what is wrong then. They are planted in a copy of the repository.
results/mutants.json is written after each fault; one whose code and tests are the same as then is
not planted again. The last lines name the faults that no test found.

They are chosen by hand. mutmut would change each operator and number in turn, thousands of them:
many change nothing that a caller could see, and on two cores one run takes days.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "mutants.json"
# What the tests of nflib need; the chapters and the site are left behind.
COPIED = ("nflib", "tests", "benchmarks", "tools", "pyproject.toml")
HELPERS = ("layers", "students", "tape")
# None of the faults is one that only a compiler shows, and compiling takes most of the time.
# To look for pytest's plugins takes longer than a test.
QUIET = ("TORCHDYNAMO_DISABLE", "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "TQDM_DISABLE", "OMP_NUM_THREADS")
# Imported once; each run of pytest is a fork that has them already.
LIBRARIES = ("accelerate", "hypothesis", "pytest", "torch.distributions", "torch.func")


@dataclass(frozen=True)
class Fault:
    """A text of a file that is replaced by another, and the pytest arguments that should tell."""

    module: str
    file: str
    text: str
    becomes: str
    wrong: str
    tests: str

    @property
    def name(self) -> str:
        return f"{self.module}: {self.wrong}"

    def state(self, folder: Path) -> str:
        """A hash of all that decides about the outcome."""
        tests = [word for word in shlex.split(self.tests) if word.endswith(".py")]
        texts = [(folder / path).read_text() for path in (self.file, *tests)]
        helpers = [name for name in HELPERS if f"from {name} import" in "".join(texts)]
        texts += [(folder / "tests" / f"{name}.py").read_text() for name in helpers]
        return hashlib.sha256("\0".join([repr(self), *texts]).encode()).hexdigest()


def faults() -> list[Fault]:
    """The faults of all files; what stands at the top of a file holds for each of its faults."""
    found = []
    for path in sorted((ROOT / "tests" / "mutants").glob("*.toml")):
        module = tomllib.loads(path.read_text())
        found += [Fault(**module | fault) for fault in module.pop("fault")]
    return found


def copy_repository(folder: Path) -> None:
    """The tracked and the new files of the repository, as they are now."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *COPIED]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())


def pytest_in(folder: Path, tests: str) -> None:
    """Be a process that runs pytest in the copy; what it says goes to the file `said`."""
    os.chdir(folder)
    os.environ["PYTHONPATH"] = sys.path[0] = str(folder)
    said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider"]
    os._exit(importlib.import_module("pytest").main([*options, *shlex.split(tests)]))


def run_tests(folder: Path, tests: str, limit: float) -> tuple[str, float]:
    """What pytest in the copy says (found, survived or timeout), and how long it took."""
    start = time.perf_counter()
    process = multiprocessing.get_context("fork").Process(target=pytest_in, args=(folder, tests))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return "timeout", limit
    if process.exitcode in (3, 4, 5):  # pytest itself failed, or ran no test
        raise SystemExit(f"pytest {tests} ends with {process.exitcode}.")
    return "found" if process.exitcode else "survived", time.perf_counter() - start


def plant(fault: Fault, folder: Path, limit: float) -> dict[str, Any]:
    """What the tests say of this fault; afterwards the copy is as before."""
    path = folder / fault.file
    before = path.read_text()
    path.write_text(before.replace(fault.text, fault.becomes))
    try:
        word, seconds = run_tests(folder, fault.tests, limit)
    finally:
        path.write_text(before)
    return {"outcome": word, "seconds": round(seconds, 1), "state": fault.state(folder)}


def plant_all(todo: list[Fault], folder: Path, outcomes: dict[str, dict[str, Any]]) -> set[str]:
    """Plant each fault and write down its outcome; return modules whose tests fail without one."""
    limits: dict[str, float] = {}
    red: set[str] = set()
    for fault in tqdm(todo, unit="fault"):
        if fault.tests not in limits:
            word, seconds = run_tests(folder, fault.tests, 1200)
            limits[fault.tests] = 20 + 3 * seconds
            tqdm.write(f"{fault.module}: {seconds:.0f} s without a fault: {fault.tests}")
            if word != "survived":
                red.add(fault.tests)
                tqdm.write("fails as it is:\n" + (folder / "said").read_text()[-3000:])
        if fault.tests in red:
            continue
        outcomes[fault.name] = done = plant(fault, folder, limits[fault.tests])
        RESULTS.write_text(json.dumps(dict(sorted(outcomes.items())), indent=2) + "\n")
        tqdm.write(f"{done['outcome']:8} {done['seconds']:5.1f} s  {fault.name}")
    return {fault.module for fault in todo if fault.tests in red}


def report(chosen: list[Fault], outcomes: dict[str, dict[str, Any]]) -> float:
    """Print a line for each module and survivor; return the share that was found, in percent."""
    words: dict[str, list[str]] = {}
    for fault in chosen:
        word = outcomes.get(fault.name, {}).get("outcome", "not planted")
        words.setdefault(fault.module, []).append(word)
        if word == "survived":
            print(f"survived: {fault.name}")
    every = [word for found in words.values() for word in found]
    print(f"{'module':36}{'faults':>8}{'found':>8}{'of them by timeout':>20}")
    for module, found in [*words.items(), ("all", every)]:
        late = found.count("timeout")
        print(f"{module:36}{len(found):8}{found.count('found') + late:8}{late:20}")
    return 100 * sum(word in ("found", "timeout") for word in every) / max(len(every), 1)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="MODULE", help="such as nflib.linear")
    parser.add_argument("--all", action="store_true", help="also what has not changed")
    parser.add_argument("--list", action="store_true", help="name the faults and plant none")
    parser.add_argument("--least", type=float, default=95, help="percent that must be found")
    options = parser.parse_args(arguments)
    every = faults()
    chosen = [fault for fault in every if fault.module.startswith(options.only)]
    if options.list:
        print(*(fault.name for fault in chosen), sep="\n")
        return 0
    os.environ.update(dict.fromkeys(QUIET, "1"))
    sys.dont_write_bytecode = True  # the same second may see two texts of one file
    for library in LIBRARIES:
        importlib.import_module(library)
    written = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    outcomes = {fault.name: written[fault.name] for fault in every if fault.name in written}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_repository(folder)
        lost = [f.name for f in chosen if (folder / f.file).read_text().count(f.text) != 1]
        if lost:
            print("These faults have no place, or several:", *lost, sep="\n")
            return 2
        last = {name: outcome["state"] for name, outcome in outcomes.items()}
        todo = [f for f in chosen if options.all or last.get(f.name) != f.state(folder)]
        red = plant_all(todo, folder, outcomes)
    share = report(chosen, outcomes)
    print(f"{share:.1f} % of {len(chosen)} faults found, at least {options.least:g} % wanted")
    for module in sorted(red):
        print(f"The tests of {module} fail without any fault.")
    return 1 if red or share < options.least else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
