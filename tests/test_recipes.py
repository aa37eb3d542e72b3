"""The page of recipes: its blocks run from top to bottom, print what it says, and claim the truth.

``torch.compile`` runs here without its last stage, which writes and compiles C++ for a minute:
what can fail in a flow is that it is not taken as one graph. `check_compile` tests the rest.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from house import ROOT

PAGE = ROOT / "own_work.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
HEADING = re.compile(r"^## (.+)$", re.M)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


@dataclass(frozen=True)
class Block:
    """A piece of code of the page, what the page says it prints, and where it stands."""

    code: str
    printed: str | None
    heading: str
    line: int


def blocks() -> list[Block]:
    text = PAGE.read_text(encoding="utf-8")
    fences = list(FENCE.finditer(text))
    found = []
    for k, fence in enumerate(fences):
        if fence[1] != "python":
            continue
        after = fences[k + 1] if k + 1 < len(fences) else None
        is_output = after is not None and after[1] == "text"
        is_behind = is_output and not text[fence.end() : after.start()].strip()
        heading = HEADING.findall(text[: fence.start()])[-1]
        line = text[: fence.start()].count("\n") + 1
        found.append(Block(fence[2], after[2] if is_behind else None, heading, line))
    return found


def differences(printed: str, page: str) -> str | None:
    """Where an output is another than the page's, or None; decimals may differ by rounding."""
    if NUMBER.sub("#", printed).split() != NUMBER.sub("#", page).split():
        return "other words"
    for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(page), strict=True):
        is_whole = not re.search(r"[.e]", theirs)
        tolerance = 0 if is_whole else 0.05 + 0.02 * abs(float(theirs))
        if abs(float(ours) - float(theirs)) > tolerance:
            return f"{ours} where the page has {theirs}"
    return None


def run(block: Block, session: dict[str, Any]) -> str:
    """Execute one block as it stands; errors point at its line of the page."""
    tree = ast.increment_lineno(ast.parse(block.code), block.line)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(tree, str(PAGE), "exec"), session)
    return out.getvalue()


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A Python session in an empty folder."""
    monkeypatch.chdir(tmp_path)
    traced = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", traced)
    with torch.random.fork_rng():
        yield {"__name__": "recipes"}
    torch._dynamo.reset()


def test_the_page_runs_and_tells_the_truth(session: dict[str, Any]) -> None:
    for block in blocks():
        printed = run(block, session)
        place = f"{PAGE.name}, line {block.line} ({block.heading})"
        assert bool(printed) == (block.printed is not None), f"{place} prints {printed!r}"
        if block.printed is not None:
            problem = differences(printed, block.printed)
            assert problem is None, f"{place}: {problem}. It prints:\n{printed}"
    check_claims(session)


def check_claims(session: dict[str, Any]) -> None:
    """What the page says beside its code."""
    flow, x, y = session["flow"], session["x"], session["y"]
    # Samples have no graph, those of rsample do.
    assert not session["draws"].requires_grad
    assert flow.rsample((2,), x).requires_grad
    assert flow.sample(len(x), x).shape == y.shape
    assert flow.sample(4, x[0]).shape == (4, 1)
    # A density in the units of the table is lower by log(spread).
    normal = torch.distributions.Normal(session["centre"], session["spread"])
    standard = torch.distributions.Normal(0.0, 1.0)
    shifted = normal.log_prob(y * session["spread"] + session["centre"])
    difference = standard.log_prob(y) - shifted
    torch.testing.assert_close(difference, torch.full_like(y, math.log(session["spread"])))
    # Tensors of a torch distribution are parameters of the flow, and have been trained.
    learned = dict(session["density"].base.named_parameters())
    assert {tuple(each.shape) for each in learned.values()} == {(16, 2)}
    assert any(each is session["means"] for each in learned.values())
    # The context reaches a base and a conditioner of one's own.
    one, other = (session["regression"].log_prob(y, given) for given in (x, x + 1))
    assert not torch.allclose(one, other)
    assert session["moons"].context_shape is None
    # All samples are in the domain, and data outside of it are refused by name.
    assert session["body"].sample(1000).min() > 0
    with pytest.raises(ValueError, match="must lie in its domain"):
        session["body"].check_data(-session["measured"](session["test"]))
    # Members differ from the start, and nothing set torch's seed.
    starts = [torch.cat([p.flatten() for p in session["build"]().parameters()]) for _ in range(2)]
    assert not torch.equal(*starts)
    torch.testing.assert_close(session["twin"].log_prob(y, x), flow.log_prob(y, x))


def test_what_the_page_prints_is_compared() -> None:
    assert differences("-0.99 +- 0.10 nats (66 rows)", "-0.993 +- 0.101 nats (66 rows)") is None
    assert differences("a 1.00", "a 1.04") is None
    assert differences("a 1.00", "a 1.20") == "1.00 where the page has 1.20"
    assert differences("a 66", "a 67") == "66 where the page has 67"
    assert differences("a 66", "b 66") == "other words"


def test_the_recipes_are_short() -> None:
    found = blocks()
    assert len(found) >= 12
    for block in found:
        lines = block.code.splitlines()
        assert len(lines) <= 24, f"line {block.line}: {len(lines)} lines"
        assert max(map(len, lines)) <= 88, f"line {block.line} is wider than a page"


def test_each_output_stands_behind_its_code() -> None:
    kinds = [fence[1] for fence in FENCE.finditer(PAGE.read_text(encoding="utf-8"))]
    assert set(kinds) <= {"python", "text", "console"}
    assert kinds.count("text") == sum(block.printed is not None for block in blocks())


def test_the_page_is_found_from_the_others() -> None:
    for name in ("index.md", "api.md"):
        assert "](own_work.md)" in (ROOT / name).read_text(encoding="utf-8"), name
    assert "file: own_work\n" in (ROOT / "_toc.yml").read_text(encoding="utf-8")
