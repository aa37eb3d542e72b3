"""Where files of a data set come from: a data folder, the clone, the cache, or a mirror.

A file is used only after its sha256 was checked. Downloads go to a temporary name first and get
their own name in one step, so that a reader sees the whole file or none, and so do two processes
that download at once.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from nflib.core import DataError

TIMEOUT = 30.0
"""Seconds without an answer after which the next mirror is tried."""


@dataclass(frozen=True)
class File:
    """One file of a data set.

    path: where it lies below a data folder (torchvision's layout).
    size: bytes, as published; for archives that are packed anew, about.
    sha256: of the file, or None when `check` looks at the content.
    urls: mirrors, tried in this order.
    check: called with the path of a file without sha256, raises ValueError if it is damaged.
    instead: another form of the same data that the loader reads from a data folder.
    """

    path: str
    size: int
    sha256: str | None
    urls: tuple[str, ...] = ()
    check: Callable[[Path], object] | None = None
    instead: str = ""

    def verify(self, path: Path) -> None:
        """Raise ValueError unless the file at `path` is this one."""
        if self.sha256 is not None:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != self.sha256:
                    raise ValueError("sha256 differs")
        elif self.check is not None:
            self.check(path)


def cache_folder() -> Path:
    """The user's cache, for example ~/.cache/nflib."""
    try:
        import pooch
    except ImportError:  # which a machine without a network, with all data in a folder, can spare
        return Path.home() / ".cache" / "nflib"
    return Path(pooch.os_cache("nflib"))


def clone_folder() -> Path | None:
    """`data/` of the clone that nflib runs from, None when it was installed without one."""
    root = Path(__file__).resolve().parents[2]
    return root / "data" if (root / "pyproject.toml").is_file() else None


def folders() -> list[Path]:
    """The data folders in the order they are searched: NFLIB_DATA, the clone, the cache."""
    named = os.environ.get("NFLIB_DATA")
    found = [Path(named).expanduser() if named else None, clone_folder(), cache_folder()]
    return [folder for folder in found if folder is not None]


def fetch(file: File, name: str, *, download: bool = True, damaged: Iterable[Path] = ()) -> Path:
    """The path of an intact copy of `file` of data set `name`, downloaded if there is none.

    A damaged copy in the cache is replaced by an intact one; elsewhere it is left alone.
    `damaged` are copies that the caller has rejected already. Raises DataError in one sentence
    that says where the file was looked for and what to do.
    """
    rejected = list(damaged)
    for path in (folder / file.path for folder in folders()):
        if path.is_file():
            try:
                file.verify(path)
            except (ValueError, OSError):
                rejected.append(path)
            else:
                return path
    reasons = []
    for url in file.urls if download else ():
        try:
            return _download(file, url, name)
        except (OSError, ValueError) as error:
            reasons.append(f"{urlsplit(url).hostname}: {_reason(error)}")
    raise DataError(_missing(file, name, rejected, reasons))


def _missing(file: File, name: str, damaged: list[Path], reasons: list[str]) -> str:
    named = os.environ.get("NFLIB_DATA")
    where = ["NFLIB_DATA (not set)"] if not named else []
    where += [
        f"{folder} (NFLIB_DATA)" if i == 0 and named else str(folder)
        for i, folder in enumerate(folders())
    ]
    wanted = f"{file.path} (or {file.instead})" if file.instead else file.path
    text = f"{name} needs {wanted}, looked for in {', '.join(where)}"
    if damaged:
        text += f", found damaged at {', '.join(map(str, damaged))}"
    if reasons:
        text += f", could not be downloaded ({'; '.join(reasons)})"
    todo = "set NFLIB_DATA to a folder that holds it"
    if not file.urls:
        return f"{text}, and has no address to download it from: {todo}."
    return f"{text}: connect to the network, or {todo}, or put it at {cache_folder() / file.path}."


def _download(file: File, url: str, name: str) -> Path:
    import pooch

    path = cache_folder() / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    print(
        f"nflib.data: {name}, {file.size / 1e6:.1f} MB from {urlsplit(url).hostname}",
        file=sys.stderr,
    )
    handle, part = tempfile.mkstemp(prefix=".part-", dir=path.parent)
    os.close(handle)
    try:
        pooch.HTTPDownloader(timeout=TIMEOUT)(url, part, None)
        file.verify(Path(part))
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)
    return path


def _sweep(folder: Path) -> None:
    # A killed process leaves its part behind; one that is a day old belongs to nobody.
    for part in folder.glob(".part-*"):
        try:
            if time.time() - part.stat().st_mtime > 86400:
                part.unlink()
        except OSError:
            continue


def _reason(error: Exception) -> str:
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"HTTP {error.response.status_code}"
    if isinstance(error, requests.RequestException):
        return "no connection" if isinstance(error, requests.ConnectionError) else "no answer"
    if isinstance(error, OSError):
        return f"{error.strerror or error} {error.filename or ''}".strip()
    return str(error)
