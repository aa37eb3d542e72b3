"""Write nflib/registry.json: the sha256 of every file that `nflib.checkpoints.find` may fetch."""

from __future__ import annotations

import json
from pathlib import Path

from nflib.checkpoints import sha256

ROOT = Path(__file__).parent.parent


def main() -> None:
    files = [*(ROOT / "results").rglob("*.json"), *(ROOT / "data").rglob("*.safetensors")]
    files.remove(ROOT / "results" / "mutants.json")  # of the tests, for no page
    registry = {path.relative_to(ROOT).as_posix(): sha256(path) for path in sorted(files)}
    (ROOT / "nflib" / "registry.json").write_text(json.dumps(registry, indent=1) + "\n")
    print(f"{len(registry)} files registered")


if __name__ == "__main__":
    main()
