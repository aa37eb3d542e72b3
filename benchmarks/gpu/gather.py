"""What came of the parts, in one folder that is small enough to keep. Needs no torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.plan import WORTH, Part
from benchmarks.gpu.store import Json, complete, failed, read, write

MAX_FILE, MAX_TOTAL = 8_000_000, 16_000_000  # bytes


def gather(out: Path, runs: Path) -> dict[str, str]:
    """Copy the weights of finished trainings, the most worthy first, as long as there is room.

    Returns: those that stay behind, and why.
    """
    room = MAX_TOTAL - sum(path.stat().st_size for path in out.glob("*.json"))
    left_out = {}
    for name in WORTH:
        found = next(runs.glob(f"*/{name}.safetensors"), None)
        kept = out / f"{name}.safetensors"
        # On another machine there is only what an earlier run has kept.
        path = found or (kept if kept.is_file() else None)
        if path is None:
            continue
        size = path.stat().st_size
        if size > MAX_FILE or size > room:
            left_out[name] = f"{size:,} bytes, where there is room for {min(room, MAX_FILE):,}"
            kept.unlink(missing_ok=True)
            continue
        room -= size
        if path != kept:
            shutil.copyfile(path, kept)
    return left_out


def summarize(out: Path, parts: Sequence[Part], left_out: dict[str, str], facts: Json) -> None:
    """Write what is there, what is missing, what went wrong and what was left out."""
    table = {}
    for part in parts:
        found = read(out / f"{part.name}.json")
        rows = found.get("rows", {})
        errors = {name: row["error"] for name, row in rows.items() if failed(row)}
        if "error" in found:
            errors["the part"] = found["error"]
        facts |= {name: found[name] for name in ("hardware", "torch") if name in found}
        table[part.name] = {
            "seconds": found.get("seconds", 0),
            "measured": len(rows) - sum(map(failed, rows.values())),
            "missing": found.get("missing", ["all"]),
            "errors": errors,
        }
        done = "complete" if complete(found) else "not complete"
        print(f"{part.name:12} {done}, {table[part.name]['measured']} rows, {len(errors)} errors")
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")
    what = "what each part has measured so far, and weights that were too large to keep"
    write(out / "summary.json", {"what": what, **facts, "rows": table, "left out": left_out})
