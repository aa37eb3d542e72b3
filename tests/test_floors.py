"""The floors of nflib and what it may depend on: the rules of pyproject.toml can be broken."""

from __future__ import annotations

import ast
import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from house import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def lint_imports(folder: Path) -> tuple[int, str]:
    command = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [str(command), "--no-logo", "--no-cache"], cwd=folder, capture_output=True, text=True
    )
    return result.returncode, result.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package and its rules."""
    shutil.copytree(ROOT / "nflib", tmp_path / "nflib", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_package_keeps_its_floors(copy: Path) -> None:
    code, said = lint_imports(copy)
    assert code == 0, said


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("core/flow.py", "import nflib.nets", "nflib.core is not allowed to import nflib.nets"),
        ("linear.py", "from nflib import models", "nflib.linear is not allowed to import"),
        ("models/images.py", "import nflib.plot", "nflib.models is not allowed to import"),
        ("nets.py", "def late() -> None:\n    import numpy", "nflib.nets is not allowed to import"),
        ("rootfinding.py", "from nflib import checks", "No cycles are allowed in nflib"),
        ("newcomer.py", "", "newcomer"),
    ],
)
def test_an_import_from_above_is_found(file: str, line: str, broken: str, copy: Path) -> None:
    with open(copy / "nflib" / file, "a") as module:
        module.write(f"\n{line}\n")
    if "cycles" in broken:
        with open(copy / "nflib" / "checks" / "tools.py", "a") as module:
            module.write("\nimport nflib.rootfinding\n")
    code, said = lint_imports(copy)
    assert code == 1
    assert broken in " ".join(said.split())


def imported() -> set[str]:
    """The packages that nflib imports anywhere, beside itself and Python's own."""
    found = set()
    for path in (ROOT / "nflib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"nflib"}


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["notebook"]
    return {canonicalize_name(Requirement(line).name) for line in lines}


# cycler comes with matplotlib, which needs it for the same purpose; google.colab is asked for where
# it has been imported already.
BROUGHT = {"cycler", "google"}


def test_what_is_imported_is_declared() -> None:
    packages = importlib.metadata.packages_distributions()
    for module in imported() - BROUGHT:
        names = {canonicalize_name(name) for name in packages[module]}
        assert names & declared(), f"nflib imports {module}, which pyproject.toml does not declare"
