"""The JSON file of a part: read, added to row by row, and never half written. Needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def read(path: Path) -> Json:
    """What a file holds; nothing if there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write(path: Path, content: Json) -> None:
    """All or nothing: whoever is killed here leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(beside, path)


def failed(row: Any) -> bool:
    return isinstance(row, dict) and "error" in row


def complete(content: Json) -> bool:
    """Whether nothing of the part is left to do."""
    rows = content.get("rows", {})
    return bool(rows) and "error" not in content and not content.get("missing")


def note_error(path: Path, error: str) -> None:
    """Write down what ended a part; what it has measured stays."""
    write(path, read(path) | {"error": error})


class Store:
    """The rows of a part.

    Args:
        path: of the file.
        facts: command, hardware and so on of this run. If rows of an earlier one were measured on
            other hardware, the rows of this run say theirs.
    """

    def __init__(self, path: Path, facts: Json) -> None:
        self.path, old = path, read(path)
        self.rows: Json = old.get("rows", {})
        self.before = float(old.get("seconds", 0.0))
        self.own: Json = {}
        if self.rows and old.get("hardware") != facts["hardware"]:
            self.own = {"hardware": facts["hardware"]}
            facts = facts | {name: old[name] for name in ("hardware", "threads") if name in old}
        self.facts = facts
        self.names: list[str] = []

    def expect(self, names: Iterable[str], leave_errors: bool = False) -> list[str]:
        """Say which rows there are to be; returns those to measure, failed ones among them."""
        self.names = list(names)
        settled = {name for name, row in self.rows.items() if leave_errors or not failed(row)}
        return [name for name in self.names if name not in settled]

    def add(self, name: str, row: Any, seconds: float) -> None:
        """A row, and how long this run has taken so far."""
        self.rows[name] = row | self.own if isinstance(row, dict) else row
        self.save(seconds)

    def save(self, seconds: float) -> None:
        done = [name for name in self.names if name in self.rows]
        missing = [n for n in self.names if n not in self.rows or failed(self.rows[n])]
        write(
            self.path,
            {
                **self.facts,
                "seconds": round(self.before + seconds, 1),
                # In the order of the plan, and without rows that are no longer in it.
                "rows": {name: self.rows[name] for name in done},
                "missing": missing,
            },
        )
