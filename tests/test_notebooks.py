"""The rules for chapters catch what breaks them, and `make run` stores notebooks in one form."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable
from pathlib import Path

import nbformat
import numpy as np
import pytest
from house import ROOT, tool
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

notebooks = tool("notebooks")

HEADER = """\
# A topic

**You will learn** something. **You need** nothing. **Time:** 20 minutes.
**Papers:** [one](https://arxiv.org/abs/1410.8516)."""
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJ"
    "RU5ErkJggg=="
)


def kept() -> NotebookNode:
    """A small notebook that keeps every rule."""
    picture = new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"})
    solution = new_code_cell(f"{notebooks.SOLUTION}\nanswer = 42")
    solution.metadata = nbformat.from_dict(
        {"tags": ["hide-cell"], "jupyter": {"source_hidden": True}}
    )
    shown = new_code_cell("plot.images(x);", outputs=[picture])
    shown.metadata = nbformat.from_dict({"mystnb": {"image": {"alt": "One blue pixel."}}})
    proof = new_code_cell(
        "checks.check_bijection(layer, x)",
        outputs=[new_output("stream", name="stdout", text="log-det agrees: 1e-15\n")],
    )
    cells = [
        new_markdown_cell(HEADER),
        new_code_cell(notebooks.setup_source()),
        new_markdown_cell("## The idea\n\n$$\nz = f(x)\n$$\n\n```python\nprint('{cite}`x`')\n```"),
        proof,
        shown,
        solution,
    ]
    notebook = new_notebook(cells=cells)
    notebooks.normalise(notebook)
    return notebook


def broken_rules(notebook: NotebookNode, folder: Path) -> list[str]:
    path = folder / "01_topic.ipynb"
    nbformat.write(notebook, path)
    return notebooks.problems(path)


def test_a_good_notebook_breaks_no_rule(tmp_path: Path) -> None:
    assert broken_rules(kept(), tmp_path) == []


def output(text: str) -> NotebookNode:
    return new_output("stream", name="stdout", text=text)


def html(text: str) -> NotebookNode:
    return new_output("display_data", {"text/html": text})


def add(place: int, **changes: object) -> Callable[[NotebookNode], None]:
    """A violation: attributes of one cell set to other values."""

    def change(notebook: NotebookNode) -> None:
        for name, value in changes.items():
            setattr(notebook.cells[place], name, value)

    return change


def with_output(place: int, extra: NotebookNode) -> Callable[[NotebookNode], None]:
    return lambda notebook: notebook.cells[place].outputs.append(extra)


def append_text(place: int, text: str) -> Callable[[NotebookNode], None]:
    def change(notebook: NotebookNode) -> None:
        notebook.cells[place].source += text

    return change


def timed(notebook: NotebookNode) -> None:
    notebook.cells[3].metadata["tags"] = ["nbval-check-output"]
    notebook.cells[3].outputs.append(output("trained in 12.3 s\n"))


def without_outputs(notebook: NotebookNode) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []


def drop_checks(notebook: NotebookNode) -> None:
    notebook.cells[3].source = "print(1)"


def heavy(notebook: NotebookNode) -> None:
    notebook.cells[3].outputs.append(output("0123456789\n" * 100_000))


WIDGET = new_output("display_data", {notebooks.WIDGET_VIEW: {"model_id": "abc"}})
ERROR = new_output("error", ename="ValueError", evalue="no", traceback=[])
STDERR = new_output("stream", name="stderr", text="warning")

VIOLATIONS: dict[str, tuple[Callable[[NotebookNode], None], str]] = {
    "no outputs": (without_outputs, "stores no outputs"),
    "counts": (add(4, execution_count=7), "execution counts are not 1..4"),
    "no count": (add(3, execution_count=None), "execution counts are not 1..4"),
    "error": (with_output(3, ERROR), "stores an error"),
    "stderr": (with_output(3, STDERR), "stores output on stderr"),
    "widget": (with_output(3, WIDGET), "stores a live widget"),
    "absolute path": (with_output(3, output("saved to /home/ada/x.pt")), "path /home/ada"),
    "windows path": (with_output(3, output(r"saved to C:\Users\ada")), "absolute path C:"),
    "this clone": (with_output(3, output(f"in {ROOT}/x")), "absolute path"),
    "memory address": (with_output(3, output("<Line at 0x7f3a2b4c5d6e>")), "memory address 0x7f"),
    "size": (heavy, "more than 1048576"),
    "no alt": (lambda nb: nb.cells[4].metadata.clear(), "without alt text in cell.metadata"),
    "blank alt": (
        lambda nb: nb.cells[4].metadata.mystnb.image.update(alt=" "),
        "without alt text in cell.metadata",
    ),
    "html image": (with_output(3, html('<img src="data:x">')), "HTML image without alt text"),
    "stale": (append_text(3, "\nprint(2)"), "its code changed after its outputs were stored"),
    "directive": (append_text(2, "\n\n```{note}\nHm.\n```"), "a directive of MyST"),
    "colon directive": (append_text(2, "\n\n:::{note}\nHm.\n:::"), "a directive of MyST"),
    "role": (append_text(2, "\n\nSee {cite}`dinh2015nice`."), "a role of MyST"),
    "target": (append_text(2, "\n\n(here)=\n"), "a target of MyST"),
    "label": (append_text(2, "\n\n$$\nx\n$$ (eq-1)"), "an equation label of MyST"),
    "image": (append_text(2, "\n\n![](picture.png)"), "an image without alt text"),
    "link": (append_text(2, "\n\nSee [later](99_never.ipynb)."), "links to 99_never.ipynb, which"),
    "setup": (append_text(1, "\nimport os"), "is not the setup cell"),
    "address": (
        add(1, source=notebooks.SETUP.format(address="https://github.com/another/fork")),
        "is not the setup cell",
    ),
    "solution tag": (lambda nb: nb.cells[5].metadata.pop("tags"), "without the tag 'hide-cell'"),
    "solution hidden": (lambda nb: nb.cells[5].metadata.pop("jupyter"), "source_hidden"),
    "solution title": (
        add(5, source="answer = 42"),
        "does not start with '# @title Solution'",
    ),
    "other folds": (
        lambda nb: nb.cells[3].metadata.update(tags=["hide-input"]),
        "is tagged 'hide-input'",
    ),
    "no check": (drop_checks, "proves nothing with nflib.checks"),
    "long cell": (append_text(3, "\nx = 1" * 45), "has 46 lines, and 45 is the most"),
    "no title": (add(0, source=HEADER.replace("# A topic", "")), "does not give a title"),
    "no goals": (add(0, source=HEADER.replace("will learn", "see")), "what the reader will learn"),
    "no needs": (add(0, source=HEADER.replace("You need", "Hm")), "what the reader needs"),
    "no minutes": (add(0, source=HEADER.replace("20 minutes", "a while")), "the minutes it takes"),
    "no papers": (add(0, source=HEADER.split("**Papers")[0]), "does not give its papers"),
    "editor": (lambda nb: nb.metadata.update(colab={}), "its metadata holds 'colab'"),
    "cell editor": (lambda nb: nb.cells[3].metadata.update(vscode={}), "metadata holds 'vscode'"),
    "kernel": (lambda nb: nb.metadata.kernelspec.update(name="mine"), "its kernelspec is not"),
    "timing": (timed, "the timing '12.3 s' in an output that is compared"),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_each_violation_is_one_sentence(name: str, tmp_path: Path) -> None:
    change, words = VIOLATIONS[name]
    notebook = kept()
    change(notebook)
    found = broken_rules(notebook, tmp_path)
    assert any(words in sentence for sentence in found), found
    for sentence in found:
        assert sentence.startswith("01_topic.ipynb")
        assert sentence.endswith(".")
        assert "\n" not in sentence


def test_what_looks_like_a_violation_and_is_none(tmp_path: Path) -> None:
    notebook = kept()
    notebook.cells[
        2
    ].source += "\n\nCost $O(D^2)$, a set $\\{x\\}$, and/or, `{role}` in code, 0x10."
    notebook.cells[3].outputs.append(output("ratio 3/4 and https://example.org/home/page, 5 steps"))
    notebook.cells[3].outputs.append(
        html('<img alt="A circle." src="data:image/png;base64,/home/aa">')
    )
    assert broken_rules(notebook, tmp_path) == []


# --- make run --------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A notebook as an editor saves it: random ids, no counts, other metadata."""
    for name in ("MPLBACKEND", "TQDM_DISABLE", "NFLIB_STATIC", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    cells = [
        new_markdown_cell("# A topic"),
        new_code_cell("print('a', end='', flush=True)\nprint('b')"),
        new_markdown_cell("## Part one"),
        new_code_cell("x=40+2\nx", metadata={"vscode": {"languageId": "python"}}),
    ]
    notebook = new_notebook(cells=cells, metadata={"colab": {"provenance": []}})
    path = tmp_path / "07_topic.ipynb"
    nbformat.write(notebook, path)
    return path


def test_run_stores_one_form_and_leaves_it_alone_then(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert notebooks.is_stale(fresh)
    assert notebooks.run([fresh], everything=False) == 0
    stored = notebooks.read(fresh)
    code = notebooks.code_cells(stored)
    assert [cell.execution_count for cell in code] == [1, 2]
    assert code[0].outputs == [output("ab\n")]
    assert code[1].source == "x = 40 + 2\nx"
    assert code[1].outputs[0].data["text/plain"] == "42"
    assert [cell.id for cell in stored.cells] == ["a-topic", "a-topic-1", "part-one", "part-one-1"]
    assert set(stored.metadata) == {"kernelspec", "language_info", "nflib"}
    assert all(not cell.metadata for cell in stored.cells)
    assert "slowest cells" in capsys.readouterr().out

    before = fresh.read_bytes()
    assert notebooks.run([fresh], everything=False) == 0
    assert "nothing to run" in capsys.readouterr().out
    assert notebooks.run([fresh], everything=True) == 0
    assert fresh.read_bytes() == before

    stored.cells[3].source = "x = 1"
    notebooks.write(stored, fresh)
    assert notebooks.is_stale(fresh)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import sys\nprint('hm', file=sys.stderr)", "prints on stderr, so the notebook was not"),
        ("1 / 0", "raised ZeroDivisionError, so the notebook was not stored"),
    ],
)
def test_run_refuses_errors_and_stderr(
    fresh: Path, source: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = notebooks.read(fresh)
    notebook.cells[3].source = source
    notebooks.write(notebook, fresh)
    before = notebooks.read(fresh)
    assert notebooks.run([fresh], everything=False) == 1
    assert words in capsys.readouterr().out
    assert notebooks.read(fresh).cells[1].outputs == before.cells[1].outputs == []


def test_widgets_are_dropped_and_chosen_ids_kept() -> None:
    notebook = kept()
    notebook.cells[2]["id"] = "my-own-name"
    notebook.cells[3].outputs.append(WIDGET)
    notebooks.normalise(notebook)
    assert notebook.cells[2].id == "my-own-name"
    assert all(notebooks.WIDGET_VIEW not in o.get("data", {}) for o in notebook.cells[3].outputs)


def test_an_unknown_chapter_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert notebooks.main(["run", "--chapter", "99"]) == 1
    assert "no" in capsys.readouterr().out.lower()


def png(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def test_plots_get_a_palette_and_photographs_keep_their_colours() -> None:
    generator = np.random.default_rng(0)
    plot = np.full((200, 300, 3), 255, np.uint8)
    plot[50:150, 100:200] = generator.integers(0, 200, (100, 100, 1))  # greys: at most 201 colours
    noise = generator.integers(0, 256, (200, 300, 3), dtype=np.uint8)
    small, large = (png(Image.fromarray(pixels)) for pixels in (plot, noise))
    shrunk = notebooks.shrink(small)
    assert len(shrunk) < 0.8 * len(small)
    with Image.open(io.BytesIO(base64.b64decode(shrunk))) as picture:
        assert np.array_equal(np.asarray(picture.convert("RGB")), plot)
    assert notebooks.shrink(shrunk) == shrunk
    assert notebooks.shrink(large) == large
