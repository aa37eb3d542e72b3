"""Build the site into _build/html from the stored outputs: `python tools/build.py`."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"


def build() -> int:
    """Build from fresh doctrees: an incremental build forgets the warnings of the last one."""
    shutil.rmtree(ROOT / "_build" / ".doctrees", ignore_errors=True)
    shutil.rmtree(SITE, ignore_errors=True)
    book = Path(sys.executable).with_name("jupyter-book")
    command = [str(book), "build", str(ROOT)]
    command += ["-n", "-W", "--keep-going", "--quiet"]
    environment = dict(os.environ, MPLBACKEND="agg", PYTHONWARNINGS="ignore")
    result = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    if result.returncode:
        print(result.stdout + result.stderr)
    return result.returncode


def main() -> int:
    start = time.perf_counter()
    print("Building the site from the stored outputs.", flush=True)
    code = build()
    pages = len(list(SITE.rglob("*.html")))
    if code or not pages:
        print("The site was not built: each warning above is an error to mend.")
        code = code or 1
    else:
        print(f"Built {pages} pages in {time.perf_counter() - start:.0f} s.")
    return code


if __name__ == "__main__":
    sys.exit(main())
