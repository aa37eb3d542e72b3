"""Run the chapters and check their rules.

`python tools/notebooks.py run [--chapter 03] [--all]` executes, in place, the notebooks whose code
changed since their outputs were stored, and brings them into the stored form.
`python tools/notebooks.py check [file ...]` prints one sentence for each broken rule.
"""

import argparse
import base64
import hashlib
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from repository import address

ROOT = Path(__file__).resolve().parent.parent

SETUP = """\
# @title Setup (installs nflib where it is missing, as in Colab)
import importlib.util

if importlib.util.find_spec("nflib") is None:
    %pip install -q "git+{address}"
import torch

from nflib import checks, data, plot

plot.style()
torch.manual_seed(0);"""

SETUP_TITLE = "# @title Setup"
SOLUTION = "# @title Solution"
MAX_BYTES = 1_048_576
MAX_LINES = 45
MAX_SECONDS = 90
MAX_COLOUR_ERROR = 3  # root mean square, of 255

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
# What a cell may carry besides its text; editors add much more.
CELL_METADATA = ("tags", "mystnb", "jupyter")
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

# What the text before the first code cell has to say, and how that is recognised.
HEADER = {
    "a title": re.compile(r"^# \S", re.M),
    "what the reader will learn": re.compile(r"you will learn", re.I),
    "what the reader needs": re.compile(r"you need", re.I),
    "the minutes it takes": re.compile(r"\d+ minutes", re.I),
    "its papers": re.compile(r"\bpapers?\b", re.I),
}
# MyST shows as raw text in Colab, in Jupyter and on GitHub.
MYST = {
    "a directive": re.compile(r"^\s*(?:`{3,}|~{3,}|:{3,})\{", re.M),
    "a role": re.compile(r"\{[a-zA-Z][\w:.+-]*\}`"),
    "a target": re.compile(r"^\([\w-]+\)=\s*$", re.M),
    "an equation label": re.compile(r"\$\$ *\([\w:-]+\) *$", re.M),
    "a block break": re.compile(r"^\+\+\+", re.M),
}
FENCE = re.compile(r"^(`{3,}|~{3,})(?!\{).*?^\1", re.M | re.S)
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")
ABSOLUTE = re.compile(
    r"(?<![\w.:/])/(?:home|root|tmp|usr|var|opt|mnt|srv|private|Users|content|workspace)/[\w.~-]+"
    r"|\b[A-Z]:\\[\w.~-]+"
)
TIMING = re.compile(r"\b\d+(?:\.\d+)?\s?(?:s|ms|µs|us|sec|secs|seconds|minutes|it/s)\b")
IMAGE = re.compile(r"<img\b[^>]*>", re.S)
GENERATED_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){0,3}(?:-[0-9a-f]{12})?|[\w-]{12}")


def chapters(root: Path = ROOT) -> list[Path]:
    """The chapters in reading order."""
    return sorted((root / "chapters").glob("[0-9][0-9]_*.ipynb"))


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def write(notebook: NotebookNode, path: Path) -> None:
    """Write in one step, so that an interrupted run leaves the old notebook whole."""
    fresh = path.with_name(f".{path.name}.part")
    nbformat.write(notebook, fresh)
    os.replace(fresh, path)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_hash(notebook: NotebookNode) -> str:
    """The sha256 of the code cells' sources: it changes when an output may have."""
    digest = hashlib.sha256()
    for cell in code_cells(notebook):
        digest.update(cell.source.encode() + b"\0")
    return digest.hexdigest()


def recorded_hash(notebook: NotebookNode) -> str | None:
    return notebook.metadata.get("nflib", {}).get("code_sha256")


def is_stale(path: Path) -> bool:
    """True where the code is not the code that made the stored outputs."""
    notebook = read(path)
    return recorded_hash(notebook) != code_hash(notebook)


def setup_source(root: Path = ROOT) -> str:
    """The first code cell of every chapter."""
    return SETUP.format(address=address(root))


# --- running ---------------------------------------------------------------------------------


def slug(text: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return words[:40].strip("-") or "cell"


def name_cells(notebook: NotebookNode) -> None:
    """Give cells ids that say where they stand; ids that a person chose are kept."""
    section, taken, number = "top", set(), 0
    for cell in notebook.cells:
        heading = re.match(r"#+ +(.+)", cell.source) if cell.cell_type == "markdown" else None
        if heading:
            section, number = slug(heading[1]), 0
        chosen = cell.get("id", "")
        if not chosen or GENERATED_ID.fullmatch(chosen) or chosen in taken:
            chosen = section if number == 0 else f"{section}-{number}"
            while chosen in taken:
                number += 1
                chosen = f"{section}-{number}"
            cell["id"] = chosen
        taken.add(cell.id)
        number += 1


def shrink(png: str) -> str:
    """A PNG with a palette of 256 colours, where that is smaller and looks the same.

    Plots have few colours. Photographs have more, and keep them.
    """
    from PIL import Image, ImageChops, ImageStat

    content = base64.b64decode(png)
    with Image.open(io.BytesIO(content)) as picture:
        if picture.mode == "P":
            return png
        opaque = Image.new("RGB", picture.size, "white")
        opaque.paste(picture, mask=picture.getchannel("A") if picture.mode == "RGBA" else None)
    palette = opaque.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    smaller = io.BytesIO()
    palette.save(smaller, "PNG", optimize=True)
    error = max(ImageStat.Stat(ImageChops.difference(opaque, palette.convert("RGB"))).rms)
    if error > MAX_COLOUR_ERROR or len(smaller.getvalue()) >= len(content):
        return png
    return base64.b64encode(smaller.getvalue()).decode()


def tidy_outputs(cell: NotebookNode, count: int) -> None:
    """Join streams, drop live widgets, number results: what is stored does not depend on timing.

    Pictures get a palette.
    """
    tidy: list[NotebookNode] = []
    for output in cell.outputs:
        if WIDGET_VIEW in output.get("data", {}):
            continue
        if "metadata" in output:
            # A picture's width and height make it sharp; the rest is the front end's business.
            output.metadata = NotebookNode(
                {key: value for key, value in output.metadata.items() if key.startswith("image/")}
            )
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = shrink(output.data["image/png"])
        if output.output_type == "execute_result":
            output.execution_count = count
        previous = tidy[-1] if tidy else None
        if (
            previous
            and output.output_type == previous.output_type == "stream"
            and output.name == previous.name
        ):
            previous.text += output.text
        else:
            tidy.append(output)
    cell.outputs = tidy


def normalise(notebook: NotebookNode) -> None:
    """Bring a notebook into the stored form; its outputs must come from its present code."""
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    metadata: dict[str, object] = {"kernelspec": KERNEL, "language_info": LANGUAGE}
    if "accelerator" in notebook.metadata:
        metadata["accelerator"] = notebook.metadata.accelerator
    metadata["nflib"] = {"code_sha256": code_hash(notebook)}
    notebook.metadata = nbformat.from_dict(metadata)
    name_cells(notebook)
    for cell in notebook.cells:
        kept = {key: cell.metadata[key] for key in CELL_METADATA if key in cell.metadata}
        if "jupyter" in kept:
            hidden = kept["jupyter"].get("source_hidden", False)
            kept["jupyter"] = {"source_hidden": True} if hidden else {}
        cell.metadata = nbformat.from_dict({key: value for key, value in kept.items() if value})
    for count, cell in enumerate(code_cells(notebook), 1):
        cell.execution_count = count
        tidy_outputs(cell, count)


def stderr_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [
        cell
        for cell in code_cells(notebook)
        if any(output.get("name") == "stderr" for output in cell.outputs)
    ]


def first_line(cell: NotebookNode) -> str:
    lines = [line for line in cell.source.splitlines() if line.strip()]
    return lines[0][:60] if lines else ""


def execute(path: Path) -> str | None:
    """Run one notebook and store it; return a sentence where that was not possible."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    print(f"Running {path.name}", flush=True)
    # Formatting changes the code, so it comes before the run and not after it.
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(path)], check=True)
    notebook = read(path)
    code = code_cells(notebook)
    if code and code[0].source.startswith(SETUP_TITLE):
        code[0].source = setup_source()
    seconds: list[tuple[float, NotebookNode]] = []
    started: dict[int, float] = {}

    def begin(cell: NotebookNode, cell_index: int) -> None:
        started[cell_index] = time.perf_counter()

    def end(cell: NotebookNode, cell_index: int, execute_reply: dict) -> None:
        if cell_index in started:
            seconds.append((time.perf_counter() - started.pop(cell_index), cell))

    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=600,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--IPKernelApp.log_level=40"],
        on_cell_execute=begin,
        on_cell_executed=end,
        record_timing=False,
    )
    start = time.perf_counter()
    try:
        client.execute()
    except CellTimeoutError:
        return f"{path.name}: a cell took more than 10 minutes."
    except CellExecutionError as problem:
        print(re.sub(r"\x1b\[[0-9;]*m", "", str(problem)))
        return f"{path.name}: a cell raised {problem.ename}, so the notebook was not stored."
    total = time.perf_counter() - start
    if noisy := stderr_cells(notebook):
        for output in noisy[0].outputs:
            if output.get("name") == "stderr":
                print(output.text)
        line = first_line(noisy[0])
        return f"{path.name}: the cell '{line}' prints on stderr, so the notebook was not stored."
    normalise(notebook)
    write(notebook, path)
    print(f"  {total:.0f} s, {path.stat().st_size / 1024:.0f} KiB; slowest cells:")
    for took, cell in sorted(seconds, key=lambda pair: -pair[0])[:3]:
        print(f"  {took:6.1f} s  {first_line(cell)}")
    if total > MAX_SECONDS:
        print(f"  That is more than the {MAX_SECONDS} s which a chapter may take on 2 CPU cores.")
    return None


def run(paths: list[Path], everything: bool) -> int:
    stale = [path for path in paths if everything or is_stale(path)]
    if not stale:
        print("The stored outputs of every chapter come from its present code: nothing to run.")
        return 0
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["NFLIB_STATIC"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The kernel draws inline; a backend named outside would take the pictures away.
    os.environ.pop("MPLBACKEND", None)
    problems = [problem for path in stale if (problem := execute(path))]
    for problem in problems:
        print(problem)
    return 1 if problems else 0


# --- rules -----------------------------------------------------------------------------------


def prose(cell: NotebookNode) -> str:
    """A markdown cell without its code blocks and without inline code."""
    text = FENCE.sub("", cell.source)
    return re.sub(r"(?<!\})(`+)(?!`).+?(?<!`)\1(?!`)", "", text)


def output_texts(output: NotebookNode) -> Iterator[tuple[str, str]]:
    """(kind, text) of an output, without the pictures inside HTML."""
    if output.output_type == "stream":
        yield "text/plain", output.text
    for kind, value in output.get("data", {}).items():
        if kind.startswith("text/") or kind == "image/svg+xml":
            yield kind, re.sub(r"data:[\w/+.;-]+,[A-Za-z0-9+/=\\\s]+", "", str(value))


def header_problems(notebook: NotebookNode) -> Iterator[str]:
    text = ""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            break
        text += cell.source + "\n\n"
    for what, pattern in HEADER.items():
        if not pattern.search(text):
            yield f"the text before the first code cell does not give {what}"


def markdown_problems(cell: NotebookNode, folder: Path) -> Iterator[str]:
    text = prose(cell)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target = link.split("#")[0]
        if target and not re.match(r"\w+:", target) and not (folder / target).exists():
            yield f"links to {target}, which does not exist"
    # A directive opens a fence, so it is looked for before code blocks are taken away.
    for what, pattern in MYST.items():
        if pattern.search(cell.source if what == "a directive" else text):
            yield f"holds {what} of MyST, which shows as raw text in Colab and Jupyter"
    for picture in re.findall(r"!\[\s*\]\(", text):
        yield f"shows an image without alt text ({picture}...)"


def code_problems(cell: NotebookNode) -> Iterator[str]:
    lines = len(cell.source.splitlines())
    if lines > MAX_LINES:
        yield f"has {lines} lines, and {MAX_LINES} is the most a cell may have"
    tags = cell.metadata.get("tags", [])
    for tag in {"hide-input", "hide-output"}.intersection(tags):
        yield f"is tagged '{tag}', and the site calls whatever is folded a solution"
    if cell.source.startswith(SOLUTION):
        if "hide-cell" not in tags:
            yield "is a solution without the tag 'hide-cell', which collapses it on the site"
        if not cell.metadata.get("jupyter", {}).get("source_hidden"):
            yield "is a solution without 'jupyter.source_hidden', which collapses it in JupyterLab"
    elif "hide-cell" in tags:
        yield f"is tagged 'hide-cell' and does not start with '{SOLUTION}', which Colab collapses"


def output_problems(cell: NotebookNode) -> Iterator[str]:
    compared = "nbval-check-output" in cell.metadata.get("tags", [])
    for output in cell.outputs:
        if output.output_type == "error":
            yield "stores an error"
        if output.get("name") == "stderr":
            yield "stores output on stderr"
        if WIDGET_VIEW in output.get("data", {}):
            yield "stores a live widget, which shows nothing without a kernel"
        for kind, text in output_texts(output):
            for found in ABSOLUTE.findall(text) + [p for p in (str(ROOT),) if p in text]:
                yield f"stores the absolute path {found}"
            if kind != "text/html" and (found := ADDRESS.search(text)):
                yield f"stores the memory address {found[0]}"
            if compared and (found := TIMING.search(text)):
                yield f"stores the timing '{found[0]}' in an output that is compared"
            for tag in IMAGE.findall(text) if kind == "text/html" else []:
                if not re.search(r"""\balt\s*=\s*(["'])\s*\S.*?\1""", tag, re.S):
                    yield "stores an HTML image without alt text"
    if any("image/png" in output.get("data", {}) for output in cell.outputs):
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        if not alt.strip():
            yield "shows a picture without alt text in cell.metadata.mystnb.image.alt"


def metadata_problems(notebook: NotebookNode) -> Iterator[str]:
    if notebook.metadata.get("kernelspec") != KERNEL:
        yield "its kernelspec is not the plain python3 one"
    for key in sorted(set(notebook.metadata) - {"kernelspec", "language_info", "nflib"}):
        if key != "accelerator":
            yield f"its metadata holds '{key}', which an editor left there"
    for key in sorted({key for cell in notebook.cells for key in cell.metadata}):
        if key not in CELL_METADATA:
            yield f"a cell's metadata holds '{key}', which an editor left there"


def problems(path: Path, root: Path = ROOT) -> list[str]:
    """One sentence for each broken rule: the notebook, the cell, the rule."""
    notebook = read(path)
    found = [f"{path.name}: {problem}." for problem in header_problems(notebook)]
    found += [f"{path.name}: {problem}." for problem in metadata_problems(notebook)]
    code = code_cells(notebook)
    if path.stat().st_size > MAX_BYTES:
        found.append(f"{path.name}: it has {path.stat().st_size} bytes, more than {MAX_BYTES}.")
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append(f"{path.name}: its execution counts are not 1..{len(code)}: run it.")
    if not any(cell.outputs for cell in code):
        found.append(f"{path.name}: it stores no outputs: run it.")
    if recorded_hash(notebook) != code_hash(notebook):
        found.append(f"{path.name}: its code changed after its outputs were stored: run it.")
    if not code or code[0].source.strip() != setup_source(root):
        found.append(f"{path.name}: its first code cell is not the setup cell of every chapter.")
    if not any(re.search(r"\bcheck_\w+\(", cell.source) for cell in code):
        found.append(f"{path.name}: it proves nothing with nflib.checks.")
    for number, cell in enumerate(notebook.cells, 1):
        where = f"{path.name}, cell {number} ({cell.get('id', '')})"
        if cell.cell_type == "markdown":
            found += [f"{where} {problem}." for problem in markdown_problems(cell, path.parent)]
        elif cell.cell_type == "code":
            found += [f"{where} {problem}." for problem in code_problems(cell)]
            found += [f"{where} {problem}." for problem in output_problems(cell)]
    return found


def check(paths: list[Path]) -> int:
    found = [problem for path in paths for problem in problems(path)]
    for problem in found:
        print(problem)
    verdict = f"{len(found)} rules broken" if found else "all rules kept"
    print(f"{len(paths)} notebooks looked at, {verdict}.")
    return 1 if found else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Run the chapters and check their rules.")
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="execute the chapters whose code changed")
    runner.add_argument("--chapter", help="the number or name of one chapter: 03")
    runner.add_argument("--all", action="store_true", help="run unchanged chapters, too")
    checker = commands.add_parser("check", help="name each broken rule")
    for command in (runner, checker):
        command.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args(arguments)
    paths = options.files or chapters()
    if not paths:
        print("There are no chapters in chapters/.")
        return 1
    if options.command == "check":
        return check(paths)
    if options.chapter:
        paths = [path for path in paths if path.name.startswith(options.chapter)]
        if not paths:
            print(f"No chapter starts with '{options.chapter}'.")
            return 1
    return run(paths, options.all or bool(options.chapter))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
