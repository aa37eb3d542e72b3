"""Run every check of the repository in stages: `python tools/test.py [stage ...]`.

It stops at the first stage that fails and names it; the last line sums the tests of all stages
that ran.
"""

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import chromium

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "_build" / "reports"
CODE = ("_ext", "chapters", "nflib", "tests", "tools")
WORKERS = str(min(os.cpu_count() or 1, 8))
# These need the built site, a browser or a second environment, so each has a stage of its own.
LATER = ("test_site.py", "test_browser.py", "test_install.py")


@dataclass
class Stage:
    """One named check: commands to run in order, the first that fails ends it."""

    name: str
    what: str
    commands: list[list[str]] = field(default_factory=list)
    before: Callable[[], object] | None = None


def tool(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def script(name: str) -> str:
    """A command that stands beside this Python, and has no module to run it by."""
    return str(Path(sys.executable).with_name(name))


def tests(name: str, *arguments: str) -> list[str]:
    """A pytest command whose counts are written to _build/reports/<name>.xml."""
    report = f"--junitxml={REPORTS / name}.xml"
    return tool("-m", "pytest", report, "-o", "junit_suite_name=" + name, *arguments)


def stages() -> list[Stage]:
    unit = [f"--ignore=tests/{name}" for name in LATER]
    chapters = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=120", "chapters"]
    workers = ["-n", WORKERS, "--dist", "loadscope"]
    return [
        Stage(
            "lint",
            "ruff over code and notebooks, import-linter over the floors of nflib",
            [
                tool("-m", "ruff", "check", *CODE),
                tool("-m", "ruff", "format", "--check", *CODE),
                [script("lint-imports"), "--no-logo", "--no-cache"],
            ],
        ),
        Stage("types", "mypy over nflib", [tool("-m", "mypy")]),
        Stage("notebooks", "the rules of the chapters", [tool("tools/notebooks.py", "check")]),
        Stage(
            "unit",
            "unit and property tests",
            [tests("unit", "-n", WORKERS, *unit, "tests")],
        ),
        Stage("chapters", "every chapter run by nbval", [tests("chapters", *workers, *chapters)]),
        Stage("site", "the site, warnings as errors", [tool("tools/build.py")]),
        Stage(
            "browser",
            "every page in Chromium",
            [tests("browser", "tests/test_site.py", "tests/test_browser.py")],
            chromium.ensure,
        ),
        Stage(
            "install",
            "a chapter alone in a new environment, as in Colab",
            [tests("install", "tests/test_install.py")],
        ),
    ]


def environment(stage: Stage) -> dict[str, str]:
    """One thread a process (the workers share the cores), no progress bars, no live widgets."""
    quiet = {"TQDM_DISABLE": "1", "NFLIB_STATIC": "1", "PYTHONUNBUFFERED": "1"}
    variables = os.environ | quiet
    variables.setdefault("OMP_NUM_THREADS", "1")
    if stage.name == "unit":
        # Only there: in a notebook's kernel it would take the pictures away.
        variables["MPLBACKEND"] = "agg"
    return variables


def run(stage: Stage) -> int:
    """Run one stage; return the exit code of the command that failed, or 0."""
    if stage.before:
        try:
            stage.before()
        except FileNotFoundError as problem:
            print(problem)
            return 1
    for command in stage.commands:
        code = subprocess.run(command, cwd=ROOT, env=environment(stage)).returncode
        if code:
            return code
    return 0


def counts() -> tuple[int, int]:
    """Passed and failed tests, summed over the reports of this run."""
    passed = failed = 0
    for report in REPORTS.glob("*.xml"):
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
            broken = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            failed += broken
            passed += total - skipped - broken
    return passed, failed


def main(names: list[str]) -> int:
    known = stages()
    wrong = [name for name in names if name not in [stage.name for stage in known]]
    if wrong:
        print(f"No stage is called {wrong[0]}: choose among {', '.join(s.name for s in known)}.")
        return 2
    chosen = [stage for stage in known if not names or stage.name in names]
    REPORTS.mkdir(parents=True, exist_ok=True)
    for report in REPORTS.glob("*.xml"):
        report.unlink()
    begin = time.perf_counter()
    stopped = ""
    for number, stage in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {stage.name}: {stage.what}", flush=True)
        start = time.perf_counter()
        code = run(stage)
        seconds = time.perf_counter() - start
        if code:
            stopped = stage.name
            print(f"      failed after {seconds:.0f} s", flush=True)
            break
        print(f"      passed in {seconds:.0f} s", flush=True)
    passed, failed = counts()
    if stopped:
        print(f"Stopped at the stage '{stopped}'; 'make test STAGE={stopped}' runs it alone.")
        failed = max(failed, 1)
    else:
        print(f"All stages passed in {time.perf_counter() - begin:.0f} s.")
    print(f"{passed} passed, {failed} failed")
    return 1 if stopped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
