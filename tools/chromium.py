"""Find Chromium for the browser test, or install it: `python tools/chromium.py` prints its path."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
APPLICATIONS = (
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
WANTED = (
    "The browser test needs Chromium or Chrome, and none is here: install it"
    " ('sudo apt-get install chromium' on Debian) or set CHROMIUM to its path."
)


def find() -> str | None:
    """The path of a Chromium or Chrome, or None."""
    if named := os.environ.get("CHROMIUM"):
        return named
    for command in COMMANDS:
        if path := shutil.which(command):
            return path
    return next((path for path in APPLICATIONS if Path(path).exists()), None)


def ensure() -> str:
    """The path of a Chromium, installed by apt-get where that is possible."""
    if path := find():
        return path
    if not shutil.which("apt-get") or os.geteuid() != 0:
        raise FileNotFoundError(WANTED)
    print("Installing chromium by apt-get for the browser test.", flush=True)
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    for arguments in (["update", "-q"], ["install", "-y", "-q", "chromium", "fonts-dejavu-core"]):
        command = ["apt-get", *arguments]
        if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode:
            raise FileNotFoundError(WANTED)
    if path := find():
        return path
    raise FileNotFoundError(WANTED)


if __name__ == "__main__":
    try:
        print(ensure())
    except FileNotFoundError as problem:
        sys.exit(str(problem))
