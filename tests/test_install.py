"""As a student in Colab: torch and Jupyter are there, nflib is not, one notebook lies in a folder.

The packages of this environment are shared with a new one through a .pth file, all but nflib. Git
is told to take the repository's address for this folder, so `pip install git+...` needs no network
for nflib itself. INSTALL_TORCH=2.14.0 gives the new environment that release of torch first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest
from house import ROOT, chapters, tool

ADDRESS = tool("repository").address()
OTHER_TORCH = os.environ.get("INSTALL_TORCH")

# Runs in the new environment: the notebook from its first to its last cell.
RUN = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
client = NotebookClient(notebook, kernel_name="python3", timeout=600)
client.execute(cwd=".")
nbformat.write(notebook, "executed.ipynb")
"""

FACTS = """
import importlib.util, json, sys
from importlib.metadata import version
found = importlib.util.find_spec("nflib")
facts = {name: version(name) for name in ("torch", "torchvision", "numpy")}
facts["nflib"] = found.origin if found else None
print(json.dumps(facts))
"""


def run(python: Path, *arguments: str, cwd: Path, env: dict[str, str]) -> str:
    result = subprocess.run(
        [str(python), *arguments], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """A new environment's python, an empty folder, and the variables to run with."""
    home = tmp_path_factory.mktemp("student")
    subprocess.run([sys.executable, "-m", "venv", str(home / "venv")], check=True)
    python = home / "venv" / "bin" / "python"
    own = Path(
        subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    shared = Path(sysconfig.get_path("purelib"))
    # A folder of links shares every package but nflib; its .pth files would bring nflib back.
    links = home / "shared"
    links.mkdir()
    for entry in shared.iterdir():
        name = entry.name.lower()
        if "nflib" not in name and not name.endswith(".pth") and name != "__pycache__":
            (links / entry.name).symlink_to(entry)
    (own / "shared.pth").write_text(f"{links}\n")
    # The kernel of this environment, and no other, answers to the name python3.
    kernel = home / "venv" / "share" / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [str(python), "-m", "ipykernel_launcher", "--log-level=40", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": command, "display_name": "Python 3", "language": "python"})
    )

    repository = home / "repository"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file() and not name.startswith(("chapters/", "tests/", "_extra/")):
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            (repository / name).write_bytes((ROOT / name).read_bytes())
    identity = ["-c", "user.name=student", "-c", "user.email=student@localhost"]
    for arguments in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "course"]):
        subprocess.run(["git", *arguments], cwd=repository, check=True)

    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "MPL", "JUPYTER", "VIRTUAL_ENV", "GIT_"))
    }
    variables |= {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{repository.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": ADDRESS,
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTER_PATH": str(kernel.parents[1]),
        "TQDM_DISABLE": "1",
        "NFLIB_STATIC": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    folder = home / "folder"
    folder.mkdir()
    if OTHER_TORCH:
        wanted = [f"torch=={OTHER_TORCH}", "torchvision"]
        run(python, "-m", "pip", "install", "-q", *wanted, cwd=folder, env=variables)
    return python, folder, variables


def test_a_chapter_alone_installs_nflib_and_runs(
    student: tuple[Path, Path, dict[str, str]],
) -> None:
    python, folder, variables = student
    before = json.loads(run(python, "-c", FACTS, cwd=folder, env=variables))
    assert before.pop("nflib") is None, "the new environment knows nflib already"
    if OTHER_TORCH:
        assert before["torch"].startswith(OTHER_TORCH)

    # The smallest chapter serves: what is tested is the way in. It must not ask for a file of the
    # repository over the network; test_checkpoints does that against a local server.
    alone = [path for path in chapters() if "checkpoints.find" not in path.read_text()]
    chapter = min(alone, key=lambda path: path.stat().st_size)
    (folder / chapter.name).write_bytes(chapter.read_bytes())
    assert [path.name for path in folder.iterdir()] == [chapter.name]
    run(python, "-c", RUN, chapter.name, cwd=folder, env=variables)

    after = json.loads(run(python, "-c", FACTS, cwd=folder, env=variables))
    installed = after.pop("nflib")
    assert Path(installed).is_relative_to(python.parents[1]), installed
    assert after == before, "installing nflib changed torch, torchvision or numpy"

    executed = nbformat.read(folder / "executed.ipynb", as_version=4)
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
