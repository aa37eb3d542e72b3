"""Real data that ship inside nflib, scikit-learn and scikit-image: no network, no downloads.

Digits and tables are split by a fixed permutation. The photographs are split by region: each is cut
into three bands of columns, so that no pixel of one split is in another.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from nflib.core import DataError
from nflib.data import uci
from nflib.data.base import Dataset

SPLITS = ("train", "valid", "test")
SPLIT_SEED = 0
"""Seed of the one permutation behind each split; the stream of RandomState never changes."""

PHOTOGRAPHS = {
    "astronaut": ("skimage.data", "astronaut.png"),
    "chelsea": ("skimage.data", "chelsea.png"),
    "coffee": ("skimage.data", "coffee.png"),
    "rocket": ("skimage.data", "rocket.jpg"),
    "china": ("sklearn.datasets.images", "china.jpg"),
    "flower": ("sklearn.datasets.images", "flower.jpg"),
}
SHARES = {"train": (0.0, 0.6), "valid": (0.6, 0.8), "test": (0.8, 1.0)}
"""Columns of each photograph that belong to a split, as fractions of its width."""
SIZES = (8, 16, 32, 64)


def _permuted(n: int, counts: tuple[int, int, int], split: str) -> np.ndarray:
    order = np.random.RandomState(SPLIT_SEED).permutation(n)
    start = sum(counts[: SPLITS.index(split)])
    return order[start : start + counts[SPLITS.index(split)]]


def digits(split: str) -> Dataset:
    """scikit-learn's 8 x 8 digits, 17 grey levels, split 1297 / 200 / 300."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    rows = _permuted(len(bunch.images), (1297, 200, 300), split)
    x = torch.from_numpy(bunch.images[rows].astype(np.uint8))[:, None]
    y = torch.from_numpy(bunch.target[rows].astype(np.int64))
    return Dataset(x, y, levels=17, name="digits", split=split)


def table(name: str, split: str) -> Dataset:
    """A table, split 70 / 15 / 15 %, standardised with the training statistics."""
    values, target = _published(name)
    n = len(values)
    held_out = round(0.15 * n)
    counts = (n - 2 * held_out, held_out, held_out)
    train = torch.from_numpy(values[_permuted(n, counts, "train")])
    mean, std = train.mean(0), train.std(0)
    rows = _permuted(n, counts, split)
    x = ((torch.from_numpy(values[rows]) - mean) / std).float()
    y = torch.from_numpy(target[rows])
    return Dataset(x, y, None, name, split, mean=mean.float(), std=std.float())


def _published(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and target of all rows; a target that counts is int64, another one float32."""
    if name in uci.TABLES:
        rows = uci.rows(name)
        return rows[:, :-1], rows[:, -1].astype(np.float32)
    import sklearn.datasets

    # load_diabetes would standardise with the statistics of all rows, test rows among them.
    options: dict[str, Any] = {"scaled": False} if name == "diabetes" else {}
    bunch = getattr(sklearn.datasets, f"load_{name}")(**options)
    return bunch.data, bunch.target.astype(np.float32 if name == "diabetes" else np.int64)


@cache
def photographs(channels: int) -> tuple[np.ndarray, ...]:
    """The six photographs as uint8 arrays (channels, H, W); grey is ITU-R 601 luma."""
    from PIL import Image

    arrays = []
    for package, file in PHOTOGRAPHS.values():
        with files(package).joinpath(file).open("rb") as stream:
            image = Image.open(stream).convert("RGB" if channels == 3 else "L")
        arrays.append(np.atleast_3d(np.asarray(image)).transpose(2, 0, 1))
    return tuple(arrays)


def _region(photo: np.ndarray, number: int, split: str) -> np.ndarray:
    # Every other photograph is cut in mirror order, so no split sees only left or right halves.
    width = photo.shape[-1]
    low, high = (round(share * width) for share in SHARES[split])
    if number % 2:
        low, high = width - high, width - low
    return photo[..., low:high]


def _windows(
    channels: int, height: int, width: int, split: str, n: int, seed: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """n windows (n, channels, height, width) at distinct places, and the photograph of each."""
    regions = [_region(p, i, split) for i, p in enumerate(photographs(channels))]
    views = [
        sliding_window_view(r, (height, width), axis=(1, 2)).transpose(1, 2, 0, 3, 4)
        for r in regions
    ]
    ends = np.cumsum([v.shape[0] * v.shape[1] for v in views])
    if n > ends[-1]:
        raise DataError(
            f"{name} has {ends[-1]} places for a window of {height} x {width} pixels in its "
            f"{split} regions, got n={n}."
        )
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    places = rng.choice(ends[-1], size=n, replace=False)
    y = np.searchsorted(ends, places, side="right")
    x = np.empty((n, channels, height, width), dtype=regions[0].dtype)
    for i, view in enumerate(views):
        inside = y == i
        row, column = np.divmod(
            places[inside] - (ends[i] - view.shape[0] * view.shape[1]), view.shape[1]
        )
        x[inside] = view[row, column]
    return x, y


def photo_patches(split: str, n: int, seed: int, size: int = 8, channels: int = 1) -> Dataset:
    """Patches of size x size pixels of the photographs; y is the number of the photograph."""
    if size not in SIZES:
        raise DataError(f"photo_patches has size 8, 16, 32 or 64, got size={size!r}.")
    if channels not in (1, 3):
        raise DataError(f"photo_patches has 1 or 3 channels, got channels={channels!r}.")
    x, y = _windows(channels, size, size, split, n, seed, "photo_patches")
    return Dataset(torch.from_numpy(x), torch.from_numpy(y), 256, "photo_patches", split)


def pixel_pairs(split: str, n: int, seed: int) -> Dataset:
    """Grey levels of two neighbouring pixels in a row; y is the number of the photograph."""
    x, y = _windows(1, 1, 2, split, n, seed, "pixel_pairs")
    return Dataset(
        torch.from_numpy(x.reshape(n, 2)), torch.from_numpy(y), 256, "pixel_pairs", split
    )
