"""The commands, the environment's files, the address in one place, the workflows."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from house import ROOT, chapters, tool
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

repository = tool("repository")
environment = tool("environment")
chromium = tool("chromium")


def pins() -> dict[str, str]:
    found = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            found[canonicalize_name(name)] = version
    return found


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# --- the environment -------------------------------------------------------------------------


def test_requirements_are_exact_and_come_from_an_index() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    for line in lines:
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[\w.+!]+", line), line
    names = [line.split("==")[0].lower() for line in lines if not line.startswith("#")]
    assert names == sorted(names, key=str.lower)
    assert not [name for name in names if name.startswith(("nvidia", "cuda", "triton", "nflib"))]


def test_pyproject_and_requirements_agree() -> None:
    pinned = pins()
    for line in project()["dependencies"]:
        requirement = Requirement(line)
        bounds = [each.operator for each in requirement.specifier]
        assert bounds == [">="], f"{line}: nflib takes lower bounds only"
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier


def test_environment_yml_is_the_same_environment() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(line for line in conda["dependencies"] if str(line).startswith("python "))
    allowed = SpecifierSet(python.removeprefix("python "))
    required = SpecifierSet(project()["requires-python"])
    minimum = ".".join(map(str, environment.MINIMUM))
    for version in ("3.10", "3.11", "3.12", "3.13"):
        assert (Version(version) in allowed) == (Version(version) in required)
    assert minimum in required
    assert "3.10" not in required
    pip = next(line["pip"] for line in conda["dependencies"] if isinstance(line, dict))
    assert pip == ["--requirement requirements.txt", "--editable ."]


def test_what_is_installed_is_what_is_pinned() -> None:
    for name in ("torch", "torchvision", "numpy", "matplotlib", "jupyter-book", "sphinx", "nbval"):
        assert Version(importlib.metadata.version(name)).public == Version(pins()[name]).public


def test_every_pin_installs_on_the_oldest_python() -> None:
    """Debian 12 has Python 3.11.2, and some releases ask for a later 3.11."""
    for name in pins():
        try:
            needs = importlib.metadata.metadata(name)["Requires-Python"]
        except importlib.metadata.PackageNotFoundError:
            continue
        assert needs is None or "3.11.0" in SpecifierSet(needs), f"{name} needs Python {needs}"


def test_an_old_python_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2, "final", 0))
    sentence = environment.make("never-made")
    assert re.fullmatch(
        r"The course needs Python 3\.11 or later, and this is 3\.9\.2 at .*\.", sentence
    )
    assert "PYTHON=" in sentence


def test_a_complete_environment_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "call", lambda command, **kw: calls.append(command) or 0)
    assert environment.make(str(tmp_path)) is None
    installed = [command[-1] for command in calls if "install" in command]
    assert installed == [str(ROOT / "requirements.txt"), str(ROOT)]
    calls.clear()
    assert environment.make(str(tmp_path)) is None
    assert calls == []
    monkeypatch.setattr(environment, "fingerprint", lambda: "changed")
    assert environment.make(str(tmp_path)) is None
    assert calls != []


def test_a_failed_installation_is_said_and_not_taken_for_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "call", lambda command, **kw: "--requirement" in command)
    assert environment.make(str(tmp_path)).startswith("requirements.txt could not be installed")
    assert not environment.is_complete(str(tmp_path))


@pytest.mark.parametrize("root", [True, False])
def test_a_debian_without_venv_is_helped_or_told(
    root: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(shutil, "which", lambda command: f"/usr/bin/{command}")
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    monkeypatch.setattr(subprocess, "call", lambda command, **kw: calls.append(command) or 0)
    problem = environment.install_venv_module()
    package = f"python3.{sys.version_info.minor}-venv"
    if root:
        assert problem is None
        assert calls[-1] == ["apt-get", "install", "-y", "-q", package]
    else:
        assert calls == []
        assert f"apt-get install {package}" in problem


def test_a_missing_chromium_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setattr(shutil, "which", lambda command: None)
    monkeypatch.setattr(chromium, "APPLICATIONS", ())
    with pytest.raises(FileNotFoundError, match="needs Chromium or Chrome, and none is here"):
        chromium.ensure()
    monkeypatch.setenv("CHROMIUM", "somewhere/chrome")
    assert chromium.ensure() == "somewhere/chrome"


def test_ci_runs_what_a_newcomer_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert [line for line in script.splitlines() if "make" in line] == ["exec make test"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    assert "- run: make test\n" in workflow


# --- make test -------------------------------------------------------------------------------


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = tool("test")
    monkeypatch.setattr(module, "REPORTS", tmp_path / "reports")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "test_good.py").write_text("def test_a(): pass\ndef test_b(): pass\n")
    (tmp_path / "test_bad.py").write_text("def test_c(): pass\ndef test_d(): assert False\n")
    return module


def test_counts_are_summed_over_the_stages(runner, capsys, monkeypatch) -> None:
    chosen = [
        runner.Stage("first", "two tests", [runner.tests("first", "test_good.py")]),
        runner.Stage("second", "the same", [runner.tests("second", "test_good.py")]),
    ]
    monkeypatch.setattr(runner, "stages", lambda: chosen)
    assert runner.main([]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "[1/2] first: two tests"
    assert re.fullmatch(r"All stages passed in \d+ s\.", lines[-2])
    assert lines[-1] == "4 passed, 0 failed"


def test_it_stops_at_the_first_stage_that_fails(runner, capsys, monkeypatch) -> None:
    chosen = [
        runner.Stage("first", "two tests", [runner.tests("first", "test_bad.py")]),
        runner.Stage("second", "never run", [runner.tests("second", "test_good.py")]),
    ]
    monkeypatch.setattr(runner, "stages", lambda: chosen)
    assert runner.main([]) == 1
    out = capsys.readouterr().out
    assert "never run" not in out
    assert "Stopped at the stage 'first'" in out
    assert out.strip().splitlines()[-1] == "1 passed, 1 failed"


def test_a_stage_without_tests_fails_too(runner, capsys, monkeypatch) -> None:
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(runner, "stages", lambda: [runner.Stage("lint", "a linter", [command])])
    assert runner.main([]) == 1
    assert capsys.readouterr().out.strip().splitlines()[-1] == "0 passed, 1 failed"
    assert runner.main(["lnt"]) == 2
    assert capsys.readouterr().out == "No stage is called lnt: choose among lint.\n"


def test_each_test_file_belongs_to_a_stage() -> None:
    runner = tool("test")
    named = {part for stage in runner.stages() for command in stage.commands for part in command}
    for name in runner.LATER:
        assert (ROOT / "tests" / name).exists()
        assert f"tests/{name}" in named


# --- the address -----------------------------------------------------------------------------


def test_the_address_is_the_same_everywhere() -> None:
    address = repository.address()
    assert project()["urls"]["Repository"] == address
    assert f'pip install "git+{address}"' in (ROOT / "README.md").read_text()
    assert f"git clone {address}\n" in (ROOT / "CONTRIBUTING.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["repository-code"] == address
    owner = address.split("/")[-2]
    for path in repository.files():
        for found in re.findall(r"github\.com/([\w.-]+)/normalizing-flows", path.read_text()):
            assert found in {owner, "you"}, f"{path.name} names the repository of {found}"


def test_make_repository_rewrites_every_file_and_keeps_notebooks_fresh(tmp_path: Path) -> None:
    old, new = repository.address(), "https://github.com/" + "ada/flows"
    for path in repository.files():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    changed = repository.rewrite(new + "/", tmp_path)
    assert repository.address(tmp_path) == new
    names = {str(path.relative_to(tmp_path)) for path in changed}
    assert {"_config.yml", "pyproject.toml", "README.md", "CITATION.cff"} <= names
    assert names >= {str(path.relative_to(ROOT)) for path in chapters()}
    for path in repository.files(tmp_path):
        assert old not in path.read_text(encoding="utf-8"), path.name
    notebooks = tool("notebooks")
    for path in chapters():
        copy = tmp_path / path.relative_to(ROOT)
        assert notebooks.is_stale(copy) == notebooks.is_stale(path)
        setup = notebooks.code_cells(notebooks.read(path))[0].source
        assert notebooks.code_cells(notebooks.read(copy))[0].source == setup.replace(old, new)
    assert repository.rewrite(old, tmp_path)
    for path in repository.files():
        assert (tmp_path / path.relative_to(ROOT)).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("url", ["", "github.com/ada/flows", "https://github.com/ada", "x y"])
def test_a_wrong_address_changes_nothing(url: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "_config.yml", tmp_path)
    with pytest.raises(ValueError, match="URL must look like"):
        repository.rewrite(url, tmp_path)
    assert (tmp_path / "_config.yml").read_bytes() == (ROOT / "_config.yml").read_bytes()


# --- files for other services ----------------------------------------------------------------


def schema_check(name: str, *files: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("check-jsonschema")), "--builtin-schema", name]
    return subprocess.run([*command, *map(str, files)], capture_output=True, text=True)


def test_workflows_are_valid(tmp_path: Path) -> None:
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert {file.stem for file in files} == {"tests", "pages", "weekly"}
    result = schema_check("vendor.github-workflows", *files)
    assert result.returncode == 0, result.stdout
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(files[0].read_text().replace("runs-on:", "runs-at:"))
    assert schema_check("vendor.github-workflows", wrong).returncode == 1


def test_workflows_run_commands_that_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        for target in re.findall(r"make ([a-z]+)", file.read_text()):
            assert target in targets


def test_the_citation_is_valid() -> None:
    result = schema_check("vendor.citation-file-format", ROOT / "CITATION.cff")
    assert result.returncode == 0, result.stdout
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project()["version"]


def test_pre_commit_downloads_nothing() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [each["repo"] for each in config["repos"]] == ["local"]
    hooks = {hook["id"]: hook for hook in config["repos"][0]["hooks"]}
    assert set(hooks) == {"ruff-check", "ruff-format", "notebook-rules"}
    assert all(hook["language"] == "system" for hook in hooks.values())
    assert all("jupyter" in hooks[name]["types_or"] for name in ("ruff-check", "ruff-format"))


def test_documented_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for name in ("README.md", "CONTRIBUTING.md", "house.md", "index.md", "teaching.md"):
        for target in re.findall(r"(?:`|^|\s)make ([a-z]+)\b", (ROOT / name).read_text(), re.M):
            assert target in targets | {"also"}, f"{name} names 'make {target}'"


# --- docstrings on the site ------------------------------------------------------------------


def as_rst(text: str) -> str:
    sys.path.append(str(ROOT / "_ext"))
    import docstrings

    return "\n".join(docstrings.to_rst(text.splitlines())).strip()


@pytest.mark.parametrize(
    ("plain", "rst"),
    [
        ("The log|det W| of `x_`.", r"The log\|det W\| of ``x_``."),
        ("of the map *just applied*, 2 * 3", r"of the map *just applied*, 2 \* 3"),
        ("Known as x_i.", r"Known as x\_i."),
        ("It is\n\n    z = |W| x\n\nso.", "It is\n\n::\n\n    z = |W| x\n\nso."),
        ("x: data,\n    more.\ny: class.", "- ``x``: data, more.\n- ``y``: class."),
        (
            "Args:\n    dim: size D.\n    a, b: two\n        numbers.",
            "**Args**\n\n- ``dim``: size D.\n- ``a``, ``b``: two numbers.",
        ),
        ("Returns: a `Report`.", "Returns: a ``Report``."),
    ],
)
def test_docstrings_are_shown_as_they_read(plain: str, rst: str) -> None:
    assert as_rst(plain) == rst


def test_the_page_on_speed_is_made_from_the_results() -> None:
    assert (ROOT / "speed.md").read_text() == tool("speed_page").page(), (
        "speed.md is stale: run `python tools/speed_page.py`"
    )
    for name in ("speed.png", "memory.png"):
        assert (ROOT / "_static" / name).stat().st_size < 500_000
