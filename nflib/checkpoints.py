"""Weights on disk: safetensors only, written atomically, and found by name from anywhere.

A pickle can run any code when it is loaded, so nothing here reads one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nflib.arguments import checked


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read, or used for this model."""


@checked
def save(model: nn.Module, path: str | Path, **meta: Any) -> Path:
    """Write the model's state_dict, and any JSON-able facts about it, to a safetensors file.

    How many grey levels the model knows is added to the facts, as ``levels``.
    """
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    return write(path, tensors, facts_of(model) | meta)


@checked
def load(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Load weights into the model; returns the facts stored with them.

    Reads files of `save` and training checkpoints of `nflib.train.fit`, of which it takes the best
    weights, or the averaged ones, or the last.

    Raises:
        CheckpointError: if the file is missing, damaged, a pickle, or of another model, also one
            for another number of grey levels; the model then keeps the weights it had.
    """
    tensors, meta = read(path)
    theirs, ours = meta.get("levels"), _levels(model)
    if isinstance(theirs, int) and ours not in (None, theirs):
        raise CheckpointError(
            f"{path} is a checkpoint of another model: it is for {theirs} grey levels, "
            f"the model expects {ours}."
        )
    for kind in ("best", "ema", "model"):
        state = {
            k.removeprefix(f"{kind}."): v for k, v in tensors.items() if k.startswith(f"{kind}.")
        }
        if state:
            break
    load_state(model, state, path)
    return meta


def load_state(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """``model.load_state_dict(state)``, or one sentence on the first thing that does not fit.

    A layer may complete the state of an older file when it is loaded, as `ActNorm` does.
    """
    own = model.state_dict()
    for name in sorted(own.keys() & state.keys()):
        if own[name].shape != state[name].shape:
            raise _misfit(
                path,
                f"has {name!r} of shape {tuple(state[name].shape)}, "
                f"the model expects {tuple(own[name].shape)}",
            )
    # Only the layers know what they can do without: they try, and it is undone if they cannot.
    before = {k: v.clone() for k, v in own.items()} if own.keys() != state.keys() else own
    missing, unknown = model.load_state_dict(state, strict=False)
    if not missing and not unknown:
        return
    model.load_state_dict(before)
    if missing:
        raise _misfit(path, f"has no tensor {min(missing)!r}, which the model expects")
    raise _misfit(path, f"has a tensor {min(unknown)!r}, which the model does not know")


def _misfit(path: str | Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path} is a checkpoint of another model: it {problem}.")


def _text(meta: dict[str, Any]) -> str:
    for name, fact in meta.items():
        try:
            json.dumps(fact)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"A checkpoint expects facts that JSON can hold, got {name} of "
                f"type {type(fact).__name__}."
            ) from error
    return json.dumps(meta)


def facts_of(model: nn.Module) -> dict[str, Any]:
    """What a file says of the model beside its weights: for how many grey levels it is."""
    levels = _levels(model)
    return {} if levels is None else {"levels": levels}


def _levels(model: nn.Module) -> int | None:
    """The number of grey levels that the model, or the first part that has one, is made for."""
    found = (getattr(module, "levels", None) for module in model.modules())
    return next((levels for levels in found if isinstance(levels, int)), None)


def write(path: str | Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """Write tensors and JSON-able facts to a safetensors file, all or nothing.

    The file is written beside its place and moved there when complete, so a process killed at any
    moment leaves the old file or the new one.
    """
    path = Path(path)
    facts = _text(meta)
    # Tensors that share memory (tied weights) are stored apart.
    ready = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        save_file(ready, temporary, {"nflib": facts})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        reason = _reason(error)
        kept = " The file that was there is untouched." if path.is_file() else ""
        raise CheckpointError(
            f"The checkpoint {path} could not be written: {reason}.{kept}"
        ) from error
    return path


@checked
def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a safetensors file."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}.")
    with open(path, "rb") as file:
        start = file.read(2)
    # A zip archive (torch.save) or the start of a bare pickle of protocol 2 and later.
    if start == b"PK" or start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        raise CheckpointError(
            f"{path} is a pickle, which can run any code when it is loaded; "
            "nflib reads safetensors files only."
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            meta = json.loads((file.metadata() or {}).get("nflib", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file: {error}.") from error
    return tensors, meta


@checked
def find(name: str) -> Path:
    """A file of the course (``"results/linear_cost.json"``, ``"data/..."``), wherever we run.

    Looked for in the clone that nflib is installed from, then in the user's cache, then fetched
    from the course's repository, as it was at the installed commit or release; checked by sha256
    unless it comes from the clone.
    """
    registry = _registry()
    if name not in registry:
        raise CheckpointError(
            f"There is no file {name!r} in the course; it has "
            f"{', '.join(sorted(registry)) or 'none'}."
        )
    clone = Path(__file__).resolve().parent.parent
    if (clone / "_config.yml").is_file() and (clone / name).is_file():
        return clone / name
    import pooch

    address = f"{repository()}/raw/{_revision()}/{name}"
    try:
        got = pooch.retrieve(
            address, f"sha256:{registry[name]}", fname=name, path=pooch.os_cache("nflib")
        )
    except Exception as error:
        # pooch's word for another sha256; what goes wrong with the network is an OSError, too.
        if isinstance(error, ValueError) and not isinstance(error, OSError):
            raise CheckpointError(
                f"{address} has changed since this nflib ({_installed()}) was installed; update "
                f"nflib: pip install --upgrade --force-reinstall --no-deps "
                f'"git+{repository()}", and start Python anew.'
            ) from error
        raise CheckpointError(
            f"{name} is neither in a clone nor in the cache and could not be fetched from "
            f"{address}: {error}."
        ) from error
    return Path(got)


def _revision() -> str:
    """What git calls the installed state: a commit, the tag of a release, or the branch."""
    found = list(metadata.distributions(name="nflib"))
    # pip notes where a package came from, unless that was an index of releases. A clone that was
    # built from may lie beside the installed package, without a note.
    notes = [json.loads(each.read_text("direct_url.json") or "{}") for each in found]
    origin: dict[str, Any] = next(filter(None, notes), {})
    if commit := origin.get("vcs_info", {}).get("commit_id"):
        return commit
    return f"v{found[0].version}" if found and not origin else "main"


def _installed() -> str:
    revision = _revision()
    commit = f", commit {revision[:7]}" if re.fullmatch("[0-9a-f]{40}", revision) else ""
    return f"version {metadata.version('nflib')}{commit}"


@checked
def names(prefix: str = "") -> list[str]:
    """The names that `find` knows, in order: all, or those that begin with a prefix."""
    return sorted(name for name in _registry() if name.startswith(prefix))


def repository() -> str:
    """The address of the course's repository, as the installed package states it."""
    urls = metadata.metadata("nflib").get_all("Project-URL") or []
    return next(u.split(", ", 1)[1] for u in urls if u.startswith("Repository, "))


@checked
def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _registry() -> dict[str, str]:
    return json.loads(resources.files("nflib").joinpath("registry.json").read_text())


def _reason(error: Exception) -> str:
    number = getattr(error, "errno", None)
    # safetensors has the operating system's number in its text: "(os error 28)", or "code: 28".
    if number is None and (found := re.search(r"\b(?:os error|code:) (\d+)", str(error))):
        number = int(found[1])
    if number == errno.ENOSPC:
        return "the disk is full"
    if number in (errno.EACCES, errno.EROFS, errno.EPERM):
        return "the folder is read-only"
    return str(error).rstrip(".")


def rng_state() -> dict[str, Tensor]:
    """The state of torch's random numbers, as tensors that can be stored."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
