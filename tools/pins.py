"""Write requirements.txt from what is installed: `python tools/pins.py`.

Packages which torch brings along for one platform are left out, so that the same file holds on
Linux, macOS and WSL.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = ("nvidia-", "cuda-", "triton", "appnope", "colorama", "pywin")
HEADER = """\
# The environment which built the stored outputs and builds the site: exact versions, all platforms.
# `make book` installs it; `python tools/pins.py` writes it from what is installed.
# nflib itself needs much less and takes lower bounds only: see pyproject.toml.
"""


def main() -> None:
    command = [sys.executable, "-m", "pip", "freeze", "--exclude-editable"]
    frozen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pins = [line for line in frozen.splitlines() if not line.lower().startswith(PLATFORM)]
    if wrong := [line for line in pins if " @ " in line or "==" not in line]:
        sys.exit(f"Only released versions can be pinned, and this is none: {wrong[0]}.")
    (ROOT / "requirements.txt").write_text(HEADER + "\n".join(pins) + "\n", encoding="utf-8")
    print(f"requirements.txt now pins {len(pins)} packages.")


if __name__ == "__main__":
    main()
