"""The tables of the UCI repository that nflib ships: all of each, packed, split, and attributed."""

from __future__ import annotations

import os
import tomllib
from importlib.resources import files
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from nflib import data
from nflib.data import embedded, uci

ROOT = Path(__file__).resolve().parents[1]
TABLES = list(uci.TABLES)
PUBLISHED = {"power_plant": 9_568, "protein": 45_730}


def numbers(name: str) -> np.ndarray:
    """Everything that the file holds, as whole numbers."""
    content = files("nflib.data").joinpath("tables", f"{name}.xz").read_bytes()
    return uci.unpack(content, len(uci.TABLES[name].columns))


def whole(name: str) -> np.ndarray:
    """The three splits in the published units, target last."""
    parts = [data.load(name, split) for split in embedded.SPLITS]
    columns = [torch.cat([p.x.double() * p.std + p.mean, p.y[:, None].double()], 1) for p in parts]
    return torch.cat(columns).numpy()


@pytest.mark.parametrize("name", TABLES)
def test_the_files_hold_the_whole_tables(name: str) -> None:
    found = numbers(name)
    assert len(found) == PUBLISHED[name]
    assert f"{PUBLISHED[name]:,}" in data.card(name).how_split
    assert found.min() >= 0
    assert (np.lexsort(found.T[::-1]) == np.arange(len(found))).all()


def test_statistics_are_the_published_ones() -> None:
    # Ranges as the repository's pages give them.
    scale = 10.0 ** np.array(uci.TABLES["power_plant"].decimals)
    plant = numbers("power_plant") / scale
    assert plant.min(0).tolist() == [1.81, 25.36, 992.89, 25.56, 420.26]
    assert plant.max(0).tolist() == [37.11, 81.56, 1033.30, 100.16, 495.76]
    protein = numbers("protein") / 10.0 ** np.array(uci.TABLES["protein"].decimals)
    assert protein.min(0)[[0, 7, 9]].tolist() == [2392.05, 0, 0]
    assert protein.max(0)[[0, 7, 9]].tolist() == [40034.9, 350, 20.999]


@pytest.mark.parametrize("name", TABLES)
def test_they_equal_the_published_files(name: str) -> None:
    """With the files of the repository in NFLIB_DATA, every number is compared."""
    published = {"power_plant": "power-plant", "protein": "protein-tertiary-structure"}
    path = Path(os.environ.get("NFLIB_DATA", "-"), "UCI")
    if not path.is_dir():
        pytest.skip("NFLIB_DATA has no folder UCI")
    values = np.loadtxt(path / f"{published[name]}.txt.gz")
    values = values[np.lexsort(values.T[::-1])]
    assert np.array_equal(values, numbers(name) / 10.0 ** np.array(uci.TABLES[name].decimals))


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (500, 4)])
def test_packing_loses_nothing(shape: tuple[int, int]) -> None:
    rows = np.random.RandomState(0).randint(0, 2**40, shape)
    assert np.array_equal(uci.unpack(uci.pack(rows), shape[1]), rows[np.lexsort(rows.T[::-1])])


@pytest.mark.parametrize("name", TABLES)
def test_no_row_is_in_two_splits(name: str) -> None:
    identity = uci.TABLES[name].identity
    found = whole(name)
    assert len(found) == sum(data.card(name).splits.values())
    # float32 is too coarse for columns of many digits: compare the rows that it stands for.
    rows = uci.rows(name)
    order = np.random.RandomState(embedded.SPLIT_SEED).permutation(len(rows))
    np.testing.assert_allclose(found, rows[order], rtol=1e-5, atol=2e-3)
    ends = np.cumsum(list(data.card(name).splits.values()))[:-1]
    splits = [set(map(tuple, part[:, :identity])) for part in np.split(rows[order], ends)]
    for a, b in combinations(splits, 2):
        assert not a & b
    # What is left out repeats something that is kept.
    first = numbers(name)[:, :identity]
    assert len(np.unique(first, axis=0)) == len(rows)


def test_of_rows_that_agree_no_particular_one_is_kept() -> None:
    name, table = "protein", uci.TABLES["protein"]
    held = numbers(name)
    _, group, counts = np.unique(
        held[:, : table.identity], axis=0, return_inverse=True, return_counts=True
    )
    several = counts > 1
    target = held[:, -2] / 10.0 ** table.decimals[-2]
    means = np.bincount(group.ravel(), target) / counts
    kept = uci.rows(name)[:, -2]
    spread = (kept - means)[several]
    assert abs(spread.mean()) < 4 * spread.std() / several.sum() ** 0.5


@pytest.mark.parametrize("name", TABLES)
def test_they_are_standardised_by_train(name: str) -> None:
    train, test = data.load(name), data.load(name, "test")
    assert (train.x.dtype, train.y.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(train.x.mean(0), torch.zeros(train.x.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.x.std(0), torch.ones(train.x.shape[1]), atol=1e-5, rtol=0)
    assert torch.equal(train.mean, test.mean)
    assert test.x.mean(0).abs().max() > 1e-3
    assert data.load(name, n=100).x.equal(train.x[:100])
    with pytest.raises(data.DataError, match=f"{name} has {len(test)} test examples, got n=10000"):
        data.load(name, "test", n=10_000)


@pytest.mark.parametrize("name", TABLES)
def test_small_subsets_are_like_the_whole(name: str) -> None:
    whole, part = data.load(name).x, data.load(name, n=500).x
    assert part.mean(0).abs().max() < 4 / 500**0.5
    assert (part.std(0) - whole.std(0)).abs().max() < 0.3


def test_the_splits_stay_what_they_are() -> None:
    assert data.load("power_plant").y[:4].tolist() == pytest.approx([486.83, 468.3, 437.21, 452.64])
    assert data.load("protein").y[:4].tolist() == pytest.approx([16.797, 4.615, 2.388, 2.018])


@pytest.mark.parametrize("name", TABLES)
def test_the_card_counts_repeated_values(name: str) -> None:
    rows = uci.rows(name)
    for values, repeated in zip(rows.T, uci.TABLES[name].repeated, strict=True):
        counts = np.unique(values, return_counts=True)[1]
        assert round(100 * counts[counts > 1].sum() / len(rows)) == repeated
    text = repr(data.card(name))
    for column, repeated in zip(uci.TABLES[name].columns, uci.TABLES[name].repeated, strict=True):
        assert f"{column} {repeated} %" in text
    assert "CC BY 4.0" in text
    assert "doi:10.24432/" in text


def test_the_licence_stands_beside_the_files_and_in_the_wheel() -> None:
    folder = files("nflib.data").joinpath("tables")
    licence = folder.joinpath("LICENCE.md").read_text(encoding="utf-8")
    for name in TABLES:
        assert f"{name}.xz" in licence
        assert data.card(name).cite.split(", doi")[0].split(" (")[0] in licence
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "data/tables/*" in settings["tool"]["setuptools"]["package-data"]["nflib"]
    assert "nflib/data/tables/LICENCE.md" in settings["project"]["license-files"]
    assert settings["project"]["license"] == "BSD-3-Clause AND CC-BY-4.0"


def test_a_file_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uci, "files", lambda package: tmp_path)
    with pytest.raises(data.DataError, match=r"power_plant needs the file .*power_plant.xz, which"):
        data.load("power_plant")
