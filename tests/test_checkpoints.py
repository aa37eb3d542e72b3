"""Weights on disk: exact, atomic, safetensors only, and every failure one sentence."""

from __future__ import annotations

import errno
import functools
import http.server
import json
import os
import pickle
import subprocess
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

from nflib import checkpoints
from nflib.checkpoints import CheckpointError, find, load, save
from nflib.core import Compose, Flow, StandardNormal
from nflib.dequantization import UniformDequantization
from nflib.linear import LU, Diagonal
from nflib.models import glow
from nflib.normalization import ActNorm

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


def test_files_from_before_actnorm_stored_its_flag_are_read(tmp_path: Path) -> None:
    model = Flow(Compose(ActNorm(3), LU(3)), StandardNormal(3))
    model.bijection.initialize(torch.randn(64, 3) * 4)
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    old = {k: v for k, v in state.items() if not k.endswith(".initialized")}
    assert len(old) == len(state) - 1
    checkpoints.write(tmp_path / "old.safetensors", old, {})
    other = Flow(Compose(ActNorm(3), LU(3)), StandardNormal(3))
    load(other, tmp_path / "old.safetensors")
    x = torch.randn(4, 3)
    assert torch.equal(other.log_prob(x), model.log_prob(x))
    # What only the flag completes is no checkpoint of the model, and leaves no trace.
    del old["model.bijection.bijections.0.bias"]
    checkpoints.write(tmp_path / "cut.safetensors", old, {})
    untouched = Flow(Compose(ActNorm(3), LU(3)), StandardNormal(3))
    before = {k: v.clone() for k, v in untouched.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"no tensor '.*\.bias', which the model expects"):
        load(untouched, tmp_path / "cut.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in untouched.state_dict().items())


def test_another_number_of_grey_levels_is_one_sentence(tmp_path: Path) -> None:
    def images(levels: int) -> Flow:
        return Flow(Compose(UniformDequantization(levels), LU(3)), StandardNormal(3))

    path = save(images(17), tmp_path / "m.safetensors", task="digits")
    assert load(images(17), path) == {"levels": 17, "task": "digits"}
    with pytest.raises(
        CheckpointError, match=r"another model: it is for 17 grey levels, the model expects 256\.$"
    ):
        load(images(256), path)
    # A file that says nothing, and a model that knows of none, fit as far as one can tell.
    checkpoints.write(path, checkpoints.read(path)[0], {})
    load(images(256), path)


def test_the_weights_of_the_course_fit_its_models() -> None:
    load(
        glow((1, 28, 28), levels=2, steps=8, hidden=64, grey_levels=256),
        find("data/mnist_glow.safetensors"),
    )


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
    # What the last run with planted faults found is for the next one; no page reads it.
    assert stored - {"results/mutants.json"} <= registry.keys()
    assert set(checkpoints.names()) == registry.keys()
    assert checkpoints.names("results/") == sorted(n for n in registry if n.startswith("results/"))


def test_an_unknown_name_is_one_sentence() -> None:
    with pytest.raises(CheckpointError, match="There is no file 'results/nothing.json'"):
        find("results/nothing.json")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that a server shows in place of the repository, to an nflib without a clone."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(checkpoints, "__file__", str(tmp_path / "elsewhere" / "nflib" / "x.py"))
        monkeypatch.setattr(
            checkpoints, "repository", lambda: f"http://127.0.0.1:{server.server_port}"
        )
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield folder
        server.shutdown()


def installed_from(monkeypatch: pytest.MonkeyPatch, origin: dict[str, object] | None) -> None:
    """Let pip have noted this origin of nflib; None as for a release from an index."""

    class Distribution:
        version = "0.1.0"

        def read_text(self, name: str) -> str | None:
            return json.dumps(origin) if origin and name == "direct_url.json" else None

    monkeypatch.setattr(metadata, "distributions", lambda name: [Distribution()])


def publish(monkeypatch: pytest.MonkeyPatch, site: Path, revision: str, content: str) -> Path:
    """Put results/a.json on the server and its sha256 into the registry."""
    file = site / "raw" / revision / "results" / "a.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    digest = checkpoints.sha256(file)
    monkeypatch.setattr(checkpoints, "_registry", lambda: {"results/a.json": digest})
    return file


FROM_GIT = {"url": "https://host/it", "vcs_info": {"vcs": "git", "commit_id": COMMIT}}
EDITABLE = {"url": "file:///home/ada/it", "dir_info": {"editable": True}}


@pytest.mark.parametrize(
    ("origin", "revision"), [(FROM_GIT, COMMIT), (None, "v0.1.0"), (EDITABLE, "main")]
)
def test_what_is_fetched_belongs_to_what_is_installed(
    origin: dict[str, object] | None,
    revision: str,
    site: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed_from(monkeypatch, origin)
    publish(monkeypatch, site, revision, '{"a": 1}')
    if revision != "main":
        newest = site / "raw" / "main" / "results" / "a.json"
        newest.parent.mkdir(parents=True)
        newest.write_text('{"a": 2}')
    assert find("results/a.json").read_text() == '{"a": 1}'


def test_a_fetched_file_stays_in_the_cache(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed_from(monkeypatch, EDITABLE)
    file = publish(monkeypatch, site, "main", '{"a": 1}')
    found = find("results/a.json")
    file.write_text('{"a": 2}')
    assert find("results/a.json") == found
    assert found.read_text() == '{"a": 1}'


@pytest.mark.parametrize(
    ("origin", "words"),
    [(EDITABLE, r"\(version 0\.1\.0\)"), (FROM_GIT, r"\(version 0\.1\.0, commit 0123456\)")],
)
def test_a_file_that_has_changed_says_to_update(
    origin: dict[str, object], words: str, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed_from(monkeypatch, origin)
    file = publish(monkeypatch, site, COMMIT if origin is FROM_GIT else "main", '{"a": 1}')
    file.write_text('{"a": 2}')
    with pytest.raises(
        CheckpointError,
        match=rf"a\.json has changed since this nflib {words} was installed; update nflib: "
        r'pip install --upgrade .* "git\+http://[\d.:]+", and start Python anew\.$',
    ):
        find("results/a.json")


def test_a_file_that_cannot_be_fetched_is_one_sentence(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed_from(monkeypatch, EDITABLE)
    file = publish(monkeypatch, site, "main", '{"a": 1}')
    file.unlink()
    with pytest.raises(CheckpointError, match=r"could not be fetched from .*main.*: 404"):
        find("results/a.json")
    monkeypatch.setattr(checkpoints, "repository", lambda: "http://127.0.0.1:1")
    with pytest.raises(CheckpointError, match="neither in a clone nor in the cache"):
        find("results/a.json")


def test_a_fact_that_json_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="that JSON can hold, got centre of type Tensor"):
        save(Diagonal(1), tmp_path / "x.safetensors", centre=torch.zeros(2))
