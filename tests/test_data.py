"""nflib.data: what is loaded, how it is split, and what happens when a download goes wrong."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import math
import os
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import wave
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from nflib import data
from nflib.data import archives, downloads, embedded, toys
from nflib.data.cards import CARDS
from nflib.data.downloads import File

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = data.names(embedded=True)
TABLES = ["iris", "wine", "breast_cancer", "diabetes"]  # of scikit-learn
PHOTOS = ["photo_patches", "pixel_pairs"]


def grid(cells: int, limit: float = 5.0) -> tuple[torch.Tensor, float]:
    """Midpoints of a square grid on [-limit, limit]^2, float64, and the area of a cell."""
    width = 2 * limit / cells
    line = (torch.arange(cells, dtype=torch.float64) + 0.5) * width - limit
    return torch.cartesian_prod(line, line), width**2


# What is embedded


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_sets_match_their_card(name: str) -> None:
    card = data.card(name)
    dtype = getattr(torch, card.x.split()[0])
    for split, n in card.splits.items():
        d = data.load(name, split)
        assert len(d) == len(d.x) == n
        assert d.x.dtype == dtype
        assert (d.name, d.split, d.levels) == (name, split, card.levels)
        assert (d.y is None) == (card.y == "none")
        assert d.y is None or d.y.shape == (n,)
        data.check(d.x, name, d.levels)
        assert name in repr(d)
        assert len(repr(d)) < 120
        assert str(tuple(d.shape)) in repr(d)


@pytest.mark.parametrize("name", EMBEDDED)
def test_loading_is_deterministic(name: str) -> None:
    a, b = data.load(name, "test"), data.load(name, "test")
    assert torch.equal(a.x, b.x)
    assert a.y is None or (b.y is not None and torch.equal(a.y, b.y))


@pytest.mark.parametrize("name", [*PHOTOS, *toys.TOYS])
def test_draws_depend_on_split_and_seed(name: str) -> None:
    first = data.load(name, "train", n=500).x
    assert first.shape[0] == 500
    assert not torch.equal(first, data.load(name, "test", n=500).x)
    assert not torch.equal(first, data.load(name, "train", n=500, seed=1).x)


def test_n_takes_the_first_examples_of_a_fixed_split() -> None:
    whole, part = data.load("digits", "valid"), data.load("digits", "valid", n=7)
    assert torch.equal(part.x, whole.x[:7])
    assert torch.equal(part.y, whole.y[:7])


def sorted_rows(x: torch.Tensor) -> np.ndarray:
    rows = x.reshape(len(x), -1).numpy()
    return rows[np.lexsort(rows.T)]


def test_splits_of_digits_are_a_partition() -> None:
    from sklearn.datasets import load_digits

    parts = [data.load("digits", split) for split in embedded.SPLITS]
    labelled = [torch.cat([p.x.flatten(1).double(), p.y[:, None].double()], 1) for p in parts]
    original = np.c_[load_digits().data, load_digits().target]
    assert np.array_equal(sorted_rows(torch.cat(labelled)), sorted_rows(torch.tensor(original)))
    assert [len(p) for p in parts] == [1297, 200, 300]
    # The split itself is a published fact of the course: pin it.
    assert parts[0].y[:10].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5]


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_a_partition_standardised_by_train(name: str) -> None:
    import sklearn.datasets

    options = {"scaled": False} if name == "diabetes" else {}
    raw = torch.tensor(getattr(sklearn.datasets, f"load_{name}")(**options).data)
    parts = [data.load(name, split) for split in embedded.SPLITS]
    counts = tuple(map(len, parts))
    order = np.concatenate([embedded._permuted(len(raw), counts, s) for s in embedded.SPLITS])
    assert np.array_equal(np.sort(order), np.arange(len(raw)))
    undone = torch.cat([p.x * p.std + p.mean for p in parts]).double()
    assert torch.allclose(undone, raw[order], rtol=1e-4, atol=1e-5)
    assert torch.allclose(parts[0].x.mean(0), torch.zeros(raw.shape[1]), atol=1e-5)
    assert torch.allclose(parts[0].x.std(0), torch.ones(raw.shape[1]), atol=1e-5)
    assert parts[2].x.mean(0).abs().max() > 1e-3


@pytest.fixture
def numbered_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs in which every pixel has a number of its own."""
    shapes = [p.shape[1:] for p in embedded.photographs(1)]
    starts = np.cumsum([0, *(h * w for h, w in shapes)])
    numbered = tuple(
        (start + np.arange(h * w)).reshape(1, h, w)
        for start, (h, w) in zip(starts, shapes, strict=False)
    )
    monkeypatch.setattr(embedded, "photographs", lambda channels: numbered)


@pytest.mark.usefixtures("numbered_photographs")
@pytest.mark.parametrize(
    ("name", "options"),
    [("photo_patches", {"size": 8}), ("photo_patches", {"size": 64}), ("pixel_pairs", {})],
)
def test_no_pixel_is_in_two_splits(name: str, options: dict[str, int]) -> None:
    pixels = {}
    for split in embedded.SPLITS:
        x = data.load(name, split, n=1000, **options).x
        corners = x.reshape(len(x), -1)[:, 0]
        assert len(corners.unique()) == len(x), "two windows lie at one place"
        if name == "pixel_pairs":
            assert (x[:, 1] - x[:, 0] == 1).all(), "a pair is not of neighbours"
        pixels[split] = x.unique()
    for a, b in combinations(pixels, 2):
        assert not torch.isin(pixels[a], pixels[b]).any(), f"{a} and {b} share pixels"


@pytest.mark.usefixtures("numbered_photographs")
def test_patches_come_from_the_photograph_that_y_names() -> None:
    ends = np.cumsum([p.size for p in embedded.photographs(1)])
    d = data.load("photo_patches", n=3000)
    assert torch.equal(
        d.y, torch.tensor(np.searchsorted(ends, d.x[:, 0, 0, 0].numpy(), side="right"))
    )
    assert d.y.unique().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("size", embedded.SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_patch_sizes_and_channels(size: int, channels: int) -> None:
    d = data.load("photo_patches", "test", n=50, size=size, channels=channels)
    assert d.x.shape == (50, channels, size, size)
    assert d.x.dtype == torch.uint8


def test_grey_patches_are_the_luma_of_the_colour_patches() -> None:
    colour = data.load("photo_patches", n=300, channels=3).x.double()
    grey = data.load("photo_patches", n=300).x.double()
    luma = 0.299 * colour[:, :1] + 0.587 * colour[:, 1:2] + 0.114 * colour[:, 2:]
    assert (grey - luma).abs().max() <= 1


def test_neighbouring_pixels_are_alike() -> None:
    x = data.load("pixel_pairs").x.double()
    assert torch.corrcoef(x.T)[0, 1] > 0.95


# The toys and their densities


@lru_cache
def probabilities(name: str) -> torch.Tensor:
    """Probability of each of the 200 x 200 cells of [-5, 5]^2 by the midpoint rule."""
    x, area = grid(200)
    return data.log_density(name)(x).exp() * area


@pytest.mark.parametrize("name", toys.TOYS)
def test_toy_density_is_normalised(name: str) -> None:
    assert abs(probabilities(name).sum() - 1) < 2e-3


@pytest.mark.parametrize("name", toys.TOYS)
def test_toy_samples_follow_the_density(name: str) -> None:
    p = probabilities(name).reshape(20, 10, 20, 10).sum((1, 3)).flatten()
    n = 20_000
    bins = ((data.load(name, n=n).x + 5) / 0.5).floor().clamp(0, 19).long()
    counts = torch.bincount(bins[:, 0] * 20 + bins[:, 1], minlength=400).double()
    large = n * p >= 5
    chi2 = (((counts - n * p) ** 2 / (n * p))[large]).sum()
    degrees = int(large.sum()) - 1
    assert chi2 < degrees + 6 * math.sqrt(2 * degrees)
    rest, expected = float(counts[~large].sum()), float(n * p[~large].sum())
    assert abs(rest - expected) < 6 * math.sqrt(expected) + 10


@pytest.mark.parametrize("name", toys.TOYS)
def test_toys_are_centred_and_in_range(name: str) -> None:
    x = data.load(name).x
    assert x.abs().max() < 4.5
    if name not in ("u3", "u4"):
        assert x.mean(0).abs().max() < 0.1


@pytest.mark.parametrize("name", toys.TOYS)
def test_log_density_keeps_the_dtype(name: str) -> None:
    x = data.load(name, n=20).x
    single, double = data.log_density(name)(x), data.log_density(name)(x.double())
    assert single.shape == double.shape == (20,)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert torch.allclose(single.double(), double, atol=1e-3)
    assert torch.isfinite(double).all()


def test_circles_against_the_bessel_function() -> None:
    # A circle of radius R with Gaussian noise has p(r) = exp(-(r-R)^2/2s^2) I0e(rR/s^2) / 2 pi s^2.
    x = torch.linspace(0.0, 4.0, 50, dtype=torch.float64)
    points = torch.stack([0.6 * x, -0.8 * x], 1)
    variance = 0.15**2
    p = sum(
        (-((x - r) ** 2) / (2 * variance)).exp() * torch.special.i0e(x * r / variance)
        for r in (3.0, 1.5)
    )
    expected = (p / (4 * math.pi * variance)).log()
    assert torch.allclose(data.log_density("circles")(points), expected, atol=1e-9)


@pytest.mark.parametrize("name", ["moons", "circles", "spirals"])
def test_quadrature_of_curves_has_converged(name: str) -> None:
    toy = toys.TOYS[name]
    x = data.load(name, n=300).x.double()
    assert isinstance(toy, toys.Curves)
    fine = replace(toy, nodes=1024).log_density(x)
    assert torch.allclose(toy.log_density(x), fine, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "point", "energy"),
    [
        ("u1", (2.0, 0.0), 0.0),
        ("u1", (0.0, 2.0), 50 / 9 - math.log(2)),
        ("u2", (1.0, 1.0), 0.0),
        ("u2", (1.0, 0.0), 3.125),
        ("u2", (-1.0, 0.0), 3.125),
        ("u3", (1.0, -2.0), 0.0),
        ("u3", (-3.0, 1.0), -math.log(2)),
        ("u4", (-3.0, 1.0), -math.log(2)),
        ("u4", (1.0, -0.5), 0.0),
        ("u4", (4.0, -3.0), 0.0),
    ],
)
def test_potentials_at_points_worked_by_hand(
    name: str, point: tuple[float, float], energy: float
) -> None:
    x = torch.tensor([point], dtype=torch.float64)
    assert data.potential(name)(x).item() == pytest.approx(energy, abs=2e-3)


def test_normalisers_of_the_potentials() -> None:
    def log_z(name: str) -> float:
        x = torch.tensor([[2.0, 0.1]], dtype=torch.float64)
        return float(-data.potential(name)(x) - data.log_density(name)(x))

    # U2 is a Gaussian in x_2 for each x_1 in [-4, 4]; its mass lies inside the square.
    assert log_z("u2") == pytest.approx(math.log(8 * 0.4 * math.sqrt(2 * math.pi)), abs=1e-8)
    # U3 and U4 are two Gaussians in x_2, so the square cuts an erf out of each.
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 2500 - 4
    w1 = (math.pi * t / 2).sin()
    w2 = 3 * (-0.5 * ((t - 1) / 0.6) ** 2).exp()
    w3 = 3 * ((t - 1) / 0.3).sigmoid()

    def mass(mean: torch.Tensor, std: float) -> float:
        cdf = torch.special.ndtr
        inside = cdf((4 - mean) / std) - cdf((-4 - mean) / std)
        return float(inside.mean()) * 8 * std * math.sqrt(2 * math.pi)

    assert log_z("u3") == pytest.approx(math.log(mass(w1, 0.35) + mass(w1 - w2, 0.35)), abs=1e-4)
    assert log_z("u4") == pytest.approx(math.log(mass(w1, 0.4) + mass(w1 - w3, 0.35)), abs=1e-4)
    # U1 by another rule: the mean of exp(-U1) over uniform points in the square.
    x = 8 * torch.rand(400_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = (-data.potential("u1")(x - 4)).exp()
    assert math.exp(log_z("u1")) == pytest.approx(64 * float(p.mean()), rel=0.02)


def test_densities_far_away_stay_finite_or_say_zero() -> None:
    x = torch.tensor([[30.0, 30.0], [0.0, 100.0]])
    for name in ("moons", "circles", "spirals", "pinwheel", "eight_gaussians"):
        assert torch.isfinite(data.log_density(name)(x)).all()
    for name in ("checkerboard", "u1", "u2", "u3", "u4"):
        assert (data.log_density(name)(x) == -math.inf).all()
    x.requires_grad_()
    data.potential("u1")(x).sum().backward()
    assert torch.isfinite(x.grad).all()


# Wrong use: one sentence


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: data.load("digit"), "'digit'; did you mean digits"),
        (lambda: data.load("imagenet_64"), "'imagenet_64'; known: digits"),
        (lambda: data.load("digits", "validation"), "train, valid and test, got 'validation'"),
        (lambda: data.load("cifar10_subset", "valid"), "train and test, got 'valid'"),
        (lambda: data.load("digits", n=5000), "1297 train examples, got n=5000"),
        (lambda: data.load("digits", n=0), "at least 1 or None, got 0"),
        (lambda: data.load("moons", n=2.5), "at least 1 or None, got 2.5"),
        (lambda: data.load("moons", seed=-1), "at least 0, got -1"),
        (lambda: data.load("digits", size=8), "no option 'size'; its options: none"),
        (lambda: data.load("photo_patches", width=8), "no option 'width'; its options: size"),
        (lambda: data.load("photo_patches", size=9), "size 8, 16, 32 or 64, got size=9"),
        (lambda: data.load("photo_patches", channels=2), "1 or 3 channels, got channels=2"),
        (lambda: data.load("photo_patches", n=10**7), "got n=10000000"),
        (lambda: data.card("wines"), "did you mean wine"),
        (lambda: data.potential("u5"), "u1, u2, u3 and u4, got 'u5'"),
        (lambda: data.log_density("digits"), "got 'digits'"),
        (lambda: data.log_density("moons")(torch.zeros(3, 4)), "expected floating point x"),
        (lambda: data.potential("u1")(torch.zeros(3, 2).long()), "got torch.int64 (3, 2)"),
        (lambda: data.check(np.zeros((2, 2)), "train"), "train must be a torch.Tensor"),
        (lambda: data.check(torch.zeros(0, 2)), "x is empty: it has shape (0, 2)"),
        (lambda: data.check(torch.zeros(3)), "got shape (3,)"),
        (lambda: data.check(torch.zeros(3, 2).bool()), "got torch.bool"),
        (lambda: data.check(torch.tensor([[0.0], [math.nan]])), "the first in row 1"),
        (lambda: data.check(torch.tensor([[0, 17]]), "digits", 17), "0..16, got values from 0"),
        (lambda: data.check(torch.tensor([[0.5]]), levels=17), "with fractions"),
        (lambda: data.check_finite(torch.tensor([math.inf])), "1 of its 1 values"),
    ],
)
def test_wrong_use_is_told_in_one_sentence(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=".") as error:
        call()
    message = str(error.value)
    assert words in message
    assert "\n" not in message
    assert message[-1] in ".?"


def test_check_returns_good_data() -> None:
    x = torch.tensor([[0, 3], [16, 2]], dtype=torch.uint8)
    assert data.check(x, levels=17) is x
    assert data.check_finite(x) is x


# Cards and the page


@pytest.mark.parametrize("name", data.names())
def test_cards_are_complete(name: str) -> None:
    card = data.card(name)
    for label, text in card.rows():
        assert text.strip(), label
    assert card.source.startswith("https://")
    assert card.load in repr(card)
    assert "train" in card.splits
    for file in card.files:
        assert file.size > 1000
        assert file.sha256 is None or len(file.sha256) == 64
        assert file.sha256 or file.check
        assert file.urls or name == "cifar10_subset"


def test_names() -> None:
    assert data.names() == list(CARDS)
    by_name = {"mnist", "fashion_mnist", "cifar10", "binarized_mnist", "spoken_digits", "svhn"}
    assert set(data.names(embedded=False)) == by_name | {"cifar10_subset", "bsds500", "celeba"}


def test_the_data_page_is_made_from_the_cards() -> None:
    spec = importlib.util.spec_from_file_location("data_page", ROOT / "tools" / "data_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "datasets.md").read_text(encoding="utf-8")
    assert written == module.page(), "datasets.md is stale: run `python tools/data_page.py`"
    assert (ROOT / "_static" / "datasets.png").stat().st_size < 500_000


def test_importing_loads_nothing_heavy() -> None:
    code = """
        import sys, nflib.data
        heavy = {"sklearn", "skimage", "torchvision", "pooch", "requests", "PIL", "matplotlib"}
        print(sorted(heavy & set(sys.modules)))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


# Downloads


class Mirror:
    """A server on this machine whose answers a test writes down: path -> (status, body, length)."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes, int]] = {}
        self.asked: list[str] = []
        self.meet: threading.Barrier | None = None
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.asked.append(self.path)
                status, body, length = mirror.answers.get(self.path, (404, b"", 0))
                if mirror.meet is not None:
                    mirror.meet.wait(timeout=60)
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                half = len(body) // 2
                self.wfile.write(body[:half])
                self.wfile.flush()
                if mirror.meet is not None:
                    time.sleep(0.2)
                self.wfile.write(body[half:])

            def log_message(self, *args: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # A client that was killed on purpose breaks its pipe: nothing to report.
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server.server_port}{path}"

    def put(self, path: str, body: bytes, *, status: int = 200, length: int | None = None) -> str:
        self.answers[path] = (status, body, len(body) if length is None else length)
        return self.url(path)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    # A proxy of the machine would otherwise be asked for 127.0.0.1.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Mirror()
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.delenv("NFLIB_DATA", raising=False)
    monkeypatch.setattr(downloads, "cache_folder", lambda: folder)
    monkeypatch.setattr(downloads, "clone_folder", lambda: None)
    return folder


CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def a_file(*urls: str) -> File:
    return File("set/file.bin", len(CONTENT), SHA256, urls)


def parts(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.is_file() and p.name != "file.bin"]


def test_a_good_download_is_cached(mirror: Mirror, cache: Path) -> None:
    file = a_file(mirror.put("/good", CONTENT))
    path = downloads.fetch(file, "set")
    assert path == cache / "set" / "file.bin"
    assert path.read_bytes() == CONTENT
    assert downloads.fetch(file, "set") == path
    assert mirror.asked == ["/good"]
    assert parts(cache) == []


@pytest.mark.parametrize("fault", ["corrupted", "truncated", "short", "404", "500", "no server"])
def test_a_bad_mirror_is_left_for_the_next(mirror: Mirror, cache: Path, fault: str) -> None:
    bad = {
        "corrupted": lambda: mirror.put("/bad", CONTENT[:-1] + b"?"),
        "truncated": lambda: mirror.put("/bad", CONTENT[:-100]),
        "short": lambda: mirror.put("/bad", CONTENT[:-100], length=len(CONTENT)),
        "404": lambda: mirror.put("/bad", b"", status=404),
        "500": lambda: mirror.put("/bad", CONTENT, status=500),
        "no server": lambda: "http://127.0.0.1:9/bad",
    }[fault]()
    file = a_file(bad, mirror.put("/good", CONTENT))
    assert downloads.fetch(file, "set").read_bytes() == CONTENT
    assert parts(cache) == []


def test_when_all_mirrors_fail_nothing_is_left_and_one_sentence_says_why(
    mirror: Mirror, cache: Path
) -> None:
    urls = (mirror.put("/bad", b"x" * 99), mirror.url("/gone"), "http://127.0.0.1:9/none")
    with pytest.raises(data.DataError) as error:
        downloads.fetch(a_file(*urls), "set")
    message = str(error.value)
    for words in ("set needs set/file.bin", "sha256 differs", "HTTP 404", "no connection"):
        assert words in message
    for words in ("NFLIB_DATA (not set)", "set NFLIB_DATA to a folder", str(cache)):
        assert words in message
    assert "\n" not in message
    assert [p for p in cache.rglob("*") if p.is_file()] == []


def test_download_false_asks_nobody(mirror: Mirror, cache: Path) -> None:
    with pytest.raises(data.DataError, match="looked for in"):
        downloads.fetch(a_file(mirror.put("/good", CONTENT)), "set", download=False)
    assert mirror.asked == []


def test_a_damaged_cached_file_is_replaced(mirror: Mirror, cache: Path) -> None:
    path = cache / "set" / "file.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:5000])
    assert downloads.fetch(a_file(mirror.put("/good", CONTENT)), "set").read_bytes() == CONTENT


def test_the_data_folder_comes_first_and_is_never_written(
    mirror: Mirror, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    path = folder / "set" / "file.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    monkeypatch.setenv("NFLIB_DATA", str(folder))
    file = a_file(mirror.put("/good", CONTENT))
    assert downloads.fetch(file, "set") == path
    assert mirror.asked == []
    path.write_bytes(b"damaged")
    assert downloads.fetch(file, "set") == cache / "set" / "file.bin"
    assert path.read_bytes() == b"damaged"
    (cache / "set" / "file.bin").unlink()
    with pytest.raises(data.DataError, match="found damaged at .*mine"):
        downloads.fetch(a_file(), "set")


def test_the_clone_comes_before_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "clone_folder", lambda: tmp_path / "clone")
    for folder in (cache, tmp_path / "clone"):
        (folder / "set").mkdir(parents=True)
        (folder / "set" / "file.bin").write_bytes(CONTENT)
    assert downloads.fetch(a_file(), "set") == tmp_path / "clone" / "set" / "file.bin"


def test_clone_folder_is_that_of_this_clone() -> None:
    assert downloads.clone_folder() == ROOT / "data"


def test_a_cache_that_cannot_be_written(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.delenv("NFLIB_DATA", raising=False)
    monkeypatch.setattr(downloads, "cache_folder", lambda: tmp_path / "cache")
    with pytest.raises(data.DataError, match="could not be downloaded .*(directory|exists)"):
        downloads.fetch(a_file(mirror.put("/good", CONTENT)), "set")


def test_a_full_disk(mirror: Mirror, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pooch

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", full)
    with pytest.raises(data.DataError, match="No space left on device"):
        downloads.fetch(a_file(mirror.put("/good", CONTENT)), "set")
    assert parts(cache) == []


def test_parts_of_killed_processes_are_swept_after_a_day(mirror: Mirror, cache: Path) -> None:
    folder = cache / "set"
    folder.mkdir(parents=True)
    for name, age in ((".part-old", 2 * 86400), (".part-new", 60)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age,) * 2)
    downloads.fetch(a_file(mirror.put("/good", CONTENT)), "set")
    assert parts(cache) == [".part-new"]


def test_two_processes_may_download_at_once(mirror: Mirror, cache: Path) -> None:
    mirror.meet = threading.Barrier(2)  # no answer before both have asked
    url = mirror.put("/good", CONTENT)
    code = f"""
        import hashlib
        from pathlib import Path
        from nflib.data import downloads
        downloads.cache_folder = lambda: Path({str(cache)!r})
        downloads.clone_folder = lambda: None
        file = downloads.File("set/file.bin", {len(CONTENT)}, {SHA256!r}, ({url!r},))
        path = downloads.fetch(file, "set")
        print(hashlib.sha256(path.read_bytes()).hexdigest())
    """
    environment = {k: v for k, v in os.environ.items() if k != "NFLIB_DATA"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for _ in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert out.strip() == SHA256, err
    assert mirror.asked == ["/good", "/good"]
    assert parts(cache) == []


# The sets loaded by name, on files made here


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return gzip.compress(header + array.tobytes(), compresslevel=1)


def test_mnist_is_read_and_split(mirror: Mirror, cache: Path) -> None:
    images = np.zeros((60_000, 1, 2), dtype=np.uint8)
    images[:, 0] = np.stack(np.divmod(np.arange(60_000), 256), 1)  # the number of the image
    contents = [idx(images), idx((np.arange(60_000) % 10).astype(np.uint8))]
    contents += [idx(images[:10_000] + 1), idx(np.full(10_000, 3, dtype=np.uint8))]
    files = [
        File(f"M/raw/{i}", 1, hashlib.sha256(c).hexdigest(), (mirror.put(f"/{i}", c),))
        for i, c in enumerate(contents)
    ]
    split = {s: archives.idx_images("mnist", files, s, True) for s in embedded.SPLITS}
    number = {s: d.x[:, 0, 0, 0].long() * 256 + d.x[:, 0, 0, 1] for s, d in split.items()}
    assert torch.equal(number["train"], torch.arange(50_000))
    assert torch.equal(number["valid"], torch.arange(50_000, 60_000))
    assert torch.equal(split["valid"].y, torch.arange(50_000, 60_000) % 10)
    assert split["test"].x.shape == (10_000, 1, 1, 2)
    assert (split["test"].y == 3).all()


def test_cifar10_is_read_by_torchvision_and_split(
    mirror: Mirror, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle

    from torchvision.datasets import CIFAR10

    def batch(first: int) -> bytes:
        pixels = np.repeat(np.arange(first, first + 4, dtype=np.uint8)[:, None], 3072, 1)
        pixels[:, 1024:2048] = 100
        return pickle.dumps({"data": pixels, "labels": [first] * 4})

    members = {"data_batch_1": batch(0), "data_batch_2": batch(4), "test_batch": batch(8)}
    members["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")})
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in members.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[k, md5[k]] for k in list(md5)[:2]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setitem(CIFAR10.meta, "md5", md5["batches.meta"])
    monkeypatch.setattr(archives, "HELD_OUT", 3)
    content = stream.getvalue()
    sha256 = hashlib.sha256(content).hexdigest()
    file = replace(archives.CIFAR10, sha256=sha256, urls=(mirror.put("/c", content),))
    monkeypatch.setattr(archives, "CIFAR10", file)
    train, valid, test = (archives.cifar10(split, True) for split in embedded.SPLITS)
    assert train.x.shape == (5, 3, 32, 32)
    assert train.x[:, 0, 5, 7].tolist() == [0, 1, 2, 3, 4]
    assert (train.x[:, 1] == 100).all()
    assert valid.x[:, 2, 0, 0].tolist() == [5, 6, 7]
    assert valid.y.tolist() == [4, 4, 4]
    assert test.x[:, 0, 0, 0].tolist() == [8, 9, 10, 11]


def mat(first: int, rows: int) -> bytes:
    """A file of SVHN whose images hold their number, then 100 and 200; 10 stands for digit 0."""
    from scipy.io import savemat

    x = np.zeros((32, 32, 3, rows), dtype=np.uint8)
    x[:, :, 0], x[:, :, 1], x[:, :, 2] = np.arange(first, first + rows), 100, 200
    x[31, 0, 0] = 255  # bottom left
    stream = io.BytesIO()
    savemat(stream, {"X": x, "y": (1 + np.arange(rows) % 10)[:, None].astype(np.uint8)})
    return stream.getvalue()


def test_svhn_is_read_by_torchvision_and_split(
    mirror: Mirror, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import SVHN

    lists, files = {}, {}
    for split, content in (("train", mat(0, 12)), ("test", mat(50, 4))):
        file = archives.SVHN[split]
        sha256 = hashlib.sha256(content).hexdigest()
        files[split] = replace(file, sha256=sha256, urls=(mirror.put(f"/{split}", content),))
        lists[split] = ["", file.path, hashlib.md5(content).hexdigest()]
        assert SVHN.split_list[split][:2] == [file.urls[0], file.path]
    monkeypatch.setattr(SVHN, "split_list", lists)
    monkeypatch.setattr(archives, "SVHN", files)
    monkeypatch.setattr(archives, "HELD_OUT", 3)
    train, valid, test = (archives.svhn(split, True) for split in embedded.SPLITS)
    assert train.x.shape == (9, 3, 32, 32)
    assert train.x[:, 0, 5, 7].tolist() == list(range(9))
    assert train.x[0, :, 31, 0].tolist() == [255, 100, 200]
    assert train.x[0, :, 0, 31].tolist() == [0, 100, 200]
    assert valid.x[:, 0, 0, 0].tolist() == [9, 10, 11]
    assert valid.y.tolist() == [0, 1, 2]
    assert test.x[:, 0, 0, 0].tolist() == [50, 51, 52, 53]
    assert (train.levels, train.name, train.y.dtype) == (256, "svhn", torch.int64)

    damaged = cache / files["train"].path
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(data.DataError, match=r"^svhn needs train_32x32.mat.*, found damaged at"):
        archives.svhn("valid", False)
    assert torch.equal(archives.svhn("valid", True).x, valid.x)


def face(number: int, side: tuple[int, int] = (178, 218)) -> bytes:
    """A grey picture, the brighter the higher its number, with a frame that the crop removes."""
    from PIL import Image

    pixels = np.full((side[1], side[0], 3), 255, dtype=np.uint8)
    pixels[35:-35, 15:-15] = 20 * number
    pixels[35:109, 15:-15, 0] = 0  # no red in the upper half
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=100, subsampling=0)
    return stream.getvalue()


def test_celeba_is_cropped_made_smaller_and_split(
    mirror: Mirror, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as zipped:
        for number in (6, 5, 4, 3, 2, 1):  # the order in the archive says nothing
            zipped.writestr(f"img_align_celeba/{number:06}.jpg", face(number))
    content = stream.getvalue()
    sha256 = hashlib.sha256(content).hexdigest()
    file = replace(archives.CELEBA, sha256=sha256, urls=(mirror.put("/zip", content),))
    monkeypatch.setattr(archives, "CELEBA", file)
    splits = {"train": (1, 3), "valid": (4, 5), "test": (6, 6)}
    monkeypatch.setattr(archives, "CELEBA_SPLITS", splits)
    train, valid, test = (archives.celeba(split, True) for split in embedded.SPLITS)
    assert (train.x.shape, train.x.dtype) == ((3, 3, 64, 64), torch.uint8)
    assert [len(d) for d in (train, valid, test)] == [3, 2, 1]
    for d, numbers in ((train, (1, 2, 3)), (valid, (4, 5)), (test, (6,))):
        expected = torch.tensor([20 * n for n in numbers]).view(-1, 1, 1, 1)
        # The middle alone is left: no white of the frame, red in the lower half only.
        assert (d.x[:, 1:].long() - expected).abs().max() <= 3
        assert (d.x[:, :1, 34:].long() - expected).abs().max() <= 3
        assert d.x[:, 0, :30].max() <= 3
        assert d.y is None
    assert mirror.asked == ["/zip"]

    (cache / file.path).unlink()
    mine = tmp_path / "mine"
    (mine / "celeba").mkdir(parents=True)
    (mine / file.path).write_bytes(content[:-30])
    monkeypatch.setenv("NFLIB_DATA", str(mine))
    with pytest.raises(data.DataError, match="celeba needs .*, found damaged at .*mine"):
        archives.celeba("test", False)
    (mine / file.path).write_bytes(content)
    assert torch.equal(archives.celeba("test", False).x, test.x)


def test_celebas_splits_are_their_cards() -> None:
    counts = {split: b - a + 1 for split, (a, b) in archives.CELEBA_SPLITS.items()}
    assert counts == data.card("celeba").splits
    assert sum(counts.values()) == archives.CELEBA_SPLITS["test"][1] == 202_599


def test_binarized_mnist_from_text_and_packed(
    mirror: Mirror, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = np.random.RandomState(0).randint(0, 2, (6, 784)).astype(np.uint8)
    text = "".join(" ".join(map(str, row)) + "\n" for row in bits).encode()
    sha256 = hashlib.sha256(text).hexdigest()
    file = replace(archives.BINARIZED["test"], sha256=sha256, urls=(mirror.put("/b", text),))
    monkeypatch.setitem(archives.BINARIZED, "test", file)
    expected = torch.from_numpy(bits).reshape(6, 1, 28, 28)
    assert torch.equal(archives.binarized_mnist("test", True).x, expected)

    (cache / file.path).unlink()
    packed = tmp_path / "mine" / file.instead
    packed.parent.mkdir(parents=True)
    np.savez(packed, test=np.packbits(bits, axis=1))
    monkeypatch.setenv("NFLIB_DATA", str(tmp_path / "mine"))
    assert torch.equal(archives.binarized_mnist("test", False).x, expected)
    np.savez(packed, test=np.packbits(1 - bits, axis=1))
    with pytest.raises(data.DataError, match="found damaged at"):
        archives.binarized_mnist("test", False)


def recording(samples: np.ndarray) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(samples.astype("<i2").tobytes())
    return stream.getvalue()


@pytest.mark.parametrize("form", ["tar", "zip", "folder"])
def test_spoken_digits_from_each_form(
    form: str,
    mirror: Mirror,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waves = {
        name: np.full(5 + i % 7, i - 500, dtype=np.int16)
        for i, name in enumerate(archives._recording_names())
    }
    monkeypatch.setattr(archives, "RECORDINGS_SHA256", archives._digest(waves))
    members = {f"fsdd-1/recordings/{name}": recording(w) for name, w in waves.items()}
    members["fsdd-1/recordings/0_someone_0.wav"] = recording(np.ones(3))
    stream = io.BytesIO()
    if form == "folder":
        (tmp_path / "FSDD").mkdir()
        for name, content in members.items():
            (tmp_path / "FSDD" / name.rsplit("/", 1)[-1]).write_bytes(content)
        monkeypatch.setenv("NFLIB_DATA", str(tmp_path))
    elif form == "zip":
        with zipfile.ZipFile(stream, "w") as zipped:
            for name, content in members.items():
                zipped.writestr(name, content)
    else:
        with tarfile.open(fileobj=stream, mode="w:gz") as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    cut = stream.getvalue()[: len(stream.getvalue()) // 2]
    urls = (mirror.put("/cut", cut), mirror.put("/whole", stream.getvalue()))
    monkeypatch.setattr(archives, "SPOKEN_DIGITS", replace(archives.SPOKEN_DIGITS, urls=urls))
    d = archives.spoken_digits("test", download=True)
    assert mirror.asked == ([] if form == "folder" else ["/cut", "/whole"])
    assert d.x.shape == (100, 11)
    assert d.x.dtype == torch.int16
    assert torch.bincount(d.y).tolist() == [10] * 10
    for row, (x, length) in enumerate(zip(d.x, d.lengths, strict=True)):
        assert (x[length:] == 0).all()
        name = f"{int(d.y[row])}_{archives.SPEAKERS[row // 50]}_{row % 5}.wav"
        assert np.array_equal(x[:length].numpy(), waves[name])
    assert len(archives.spoken_digits("train", True)) == 800
    assert len(archives.spoken_digits("valid", True)) == 100


def test_no_network_and_no_files(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pooch
    import requests

    def offline(*args: object, **kwargs: object) -> None:
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", offline)
    for name in data.names(embedded=False):
        with pytest.raises(data.DataError) as error:
            data.load(name)
        message = str(error.value)
        assert name in message
        assert "NFLIB_DATA" in message
        assert "\n" not in message
        assert ("connect to the network" in message) == (name != "cifar10_subset")


# The real files, when they are there

needs_data = pytest.mark.skipif("NFLIB_DATA" not in os.environ, reason="NFLIB_DATA is not set")


@needs_data
@pytest.mark.parametrize("name", data.names(embedded=False))
def test_real_files(name: str) -> None:
    card = data.card(name)
    for split, n in card.splits.items():
        try:
            d = data.load(name, split, download=False)
        except data.DataError as error:
            pytest.skip(str(error))
        assert len(d) == n
        data.check(d.x, name, d.levels)
        assert str(tuple(d.shape[1:]))[1:-1].rstrip(",") in card.x
        assert (d.y is None) == (card.y == "none")
        assert d.y is None or len(d.y.unique()) == 10
        if name == "mnist" and split == "test":
            assert d.y[:5].tolist() == [7, 2, 1, 0, 4]
        if name == "binarized_mnist":
            assert 0.1 < float(d.x.float().mean()) < 0.15
        if d.lengths is not None:
            assert d.lengths.min() > 1000
            assert (d.x[0, d.lengths[0] :] == 0).all()


def test_data_in_a_folder_need_no_downloader(tmp_path: Path) -> None:
    """On a machine without a network nobody has to install what downloads."""
    code = f"""
        import sys
        sys.modules["pooch"] = None  # an import of it fails
        from pathlib import Path
        from nflib.data import downloads
        content = bytes(range(64))
        path = Path({str(tmp_path)!r}) / "some" / "file"
        path.parent.mkdir()
        path.write_bytes(content)
        import hashlib
        wanted = downloads.File("some/file", 64, hashlib.sha256(content).hexdigest())
        assert downloads.fetch(wanted, "some") == path
        path.write_bytes(content[1:])
        try:
            downloads.fetch(wanted, "some")
        except downloads.DataError as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | {"NFLIB_DATA": str(tmp_path)},
    )
    assert run.returncode == 0, run.stderr
    assert "found damaged at" in run.stdout
