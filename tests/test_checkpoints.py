"""Weights on disk: exact, atomic, safetensors only, and every failure one sentence."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nflib import checkpoints
from nflib.checkpoints import CheckpointError, find, load, save
from nflib.core import Compose, Flow, StandardNormal
from nflib.linear import LU, Diagonal

ROOT = Path(__file__).parent.parent


def make(dim: int = 3) -> Flow:
    return Flow(Compose(LU(dim), Diagonal(dim)), StandardNormal(dim))


def test_round_trip_is_exact(tmp_path: Path) -> None:
    one, other = make(), make()
    save(one, tmp_path / "deep" / "m.safetensors", task="digits", nats=-1.5)
    meta = load(other, tmp_path / "deep" / "m.safetensors")
    assert meta == {"task": "digits", "nats": -1.5}
    x = torch.randn(4, 3)
    assert torch.equal(one.log_prob(x), other.log_prob(x))
    # The order of LU's permutation, and what is derived from it, came along.
    assert torch.equal(one.sample(0), other.sample(0))
    torch.testing.assert_close(other.decode(one.encode(x)), x, atol=1e-4, rtol=1e-4)


def test_another_model_is_one_sentence_and_nothing_is_loaded(tmp_path: Path) -> None:
    path = save(make(3), tmp_path / "m.safetensors")
    other = make(4)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(
        CheckpointError,
        match=r"another model: it has .* \(3,\), the model expects \(4,\)\.$",
    ):
        load(other, path)
    with pytest.raises(CheckpointError, match="which the model expects"):
        load(Flow(Compose(LU(3), Diagonal(3), LU(3)), StandardNormal(3)), path)
    with pytest.raises(CheckpointError, match="which the model does not know"):
        load(Flow(Compose(LU(3)), StandardNormal(3)), path)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'exploded'}",)

    torch.save({"a": torch.ones(1)}, tmp_path / "zip.pt")
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb()))
    for name in ("zip.pt", "old.pt", "bomb.pkl"):
        with pytest.raises(CheckpointError, match="is a pickle"):
            load(make(), tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_damaged_and_missing_files_are_one_sentence(tmp_path: Path) -> None:
    path = save(make(), tmp_path / "m.safetensors")
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:5], b"", b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="no readable safetensors file"):
            load(make(), path)
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        load(make(), tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "the folder is read-only")],
)
def test_a_failed_write_keeps_the_old_file(
    number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(make(), tmp_path / "m.safetensors")
    before = path.read_bytes()

    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoints, "save_file", fails)
    with pytest.raises(CheckpointError, match=f"written: {words}. The file .* untouched"):
        save(make(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB, where the test may mount one."""
    where = tmp_path / "disk"
    where.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(where)], capture_output=True
    )
    if done.returncode:
        pytest.skip("may not mount a file system here")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    path = save(make(), small_disk / "m.safetensors")
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"the disk is full\. The file"):
        save(Flow(LU(200), StandardNormal(200)), path)
    assert path.read_bytes() == before
    assert os.listdir(small_disk) == ["m.safetensors"]


def test_a_folder_that_is_really_read_only(small_disk: Path) -> None:
    path = save(make(), small_disk / "m.safetensors")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match="the folder is read-only"):
        save(make(), path)
    load(make(), path)


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(make(), tmp_path / "file" / "m.safetensors")


def test_registry_agrees_with_the_committed_files() -> None:
    registry = json.loads((ROOT / "nflib" / "registry.json").read_text())
    for name, digest in registry.items():
        assert checkpoints.sha256(ROOT / name) == digest, name
        assert find(name) == ROOT / name
    stored = {p.relative_to(ROOT).as_posix() for p in (ROOT / "results").rglob("*.json")}
    assert stored <= registry.keys()
    assert set(checkpoints.names()) == registry.keys()
    assert checkpoints.names("results/") == sorted(n for n in registry if n.startswith("results/"))


def test_an_unknown_name_is_one_sentence() -> None:
    with pytest.raises(CheckpointError, match="There is no file 'results/nothing.json'"):
        find("results/nothing.json")


def test_without_a_clone_the_file_comes_from_the_repository_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import functools
    import http.server
    import threading

    site = tmp_path / "site"
    (site / "raw" / "main" / "results").mkdir(parents=True)
    file = site / "raw" / "main" / "results" / "a.json"
    file.write_text('{"a": 1}')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(checkpoints, "__file__", str(tmp_path / "elsewhere" / "nflib" / "x.py"))
        monkeypatch.setattr(
            checkpoints, "repository", lambda: f"http://127.0.0.1:{server.server_port}"
        )
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        digest = checkpoints.sha256(file)
        monkeypatch.setattr(checkpoints, "_registry", lambda: {"results/a.json": digest})
        assert find("results/a.json").read_text() == '{"a": 1}'
        file.write_text('{"a": 2}')
        assert find("results/a.json").read_text() == '{"a": 1}'  # from the cache
        monkeypatch.setattr(checkpoints, "_registry", lambda: {"results/a.json": "0" * 64})
        with pytest.raises(CheckpointError, match="could not be fetched"):
            find("results/a.json")
        server.shutdown()
    with pytest.raises(CheckpointError, match="neither in a clone nor in the cache"):
        find("results/a.json")
