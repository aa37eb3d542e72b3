"""Data sets by name: ``load("digits")``, ``names()``, ``card("digits")``.

Embedded sets (toys, digits, tables, patches of photographs) need neither network nor files. The
others are searched in the folder that the environment variable NFLIB_DATA names, then in ``data/``
of the clone, then in the user's cache, and are downloaded last, checked by sha256.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nflib.arguments import Count, Size, checked
from nflib.core import DataError, check_finite
from nflib.core import check_values as check
from nflib.data import archives, embedded, toys
from nflib.data.base import Dataset
from nflib.data.cards import CARDS, Card

__all__ = [
    "Card",
    "DataError",
    "Dataset",
    "card",
    "check",
    "check_finite",
    "load",
    "log_density",
    "names",
    "potential",
]


@checked
def load(
    name: str,
    split: str = "train",
    *,
    n: Size | None = None,
    seed: Count = 0,
    download: bool = True,
    **options: Any,
) -> Dataset:
    """One split of a data set, as a `Dataset` with fields x, y, levels, name and split.

    name: one of `names()`. split: "train", "valid" or "test".
    n: number of examples. Sets that are drawn (toys, photo_patches, pixel_pairs) draw n, by
        default as many as their card says; the others give the first n of the split.
    seed: of the draw; splits of the same seed have independent streams. Without effect on sets
        that are not drawn.
    download: False never uses the network.
    options: `size` (8, 16, 32, 64) and `channels` (1, 3) of photo_patches.

    Raises DataError (a ValueError) for an unknown name, split or option, for n out of range, and
    when files are missing or damaged and cannot be downloaded.
    """
    facts = card(name)
    if split not in facts.splits:
        raise DataError(
            f"load expects a split that {name} has, {_listed(facts.splits)}, got {split!r}."
        )
    for option in options:
        if option not in facts.options:
            known = _listed(facts.options) if facts.options else "none"
            raise DataError(f"{name} has no option {option!r}; its options: {known}.")
    if facts.drawn:
        return _draw(name, split, n or facts.splits[split], seed, options)
    if n is not None and n > facts.splits[split]:
        raise DataError(f"{name} has {facts.splits[split]} {split} examples, got n={n}.")
    return _first(_read(facts, split, download), n)


def _draw(name: str, split: str, n: int, seed: int, options: dict[str, Any]) -> Dataset:
    if name == "photo_patches":
        return embedded.photo_patches(split, n, seed, **options)
    if name == "pixel_pairs":
        return embedded.pixel_pairs(split, n, seed)
    stream = zlib.crc32(f"{name} {split} {seed}".encode())
    x, y = toys.TOYS[name].sample(n, torch.Generator().manual_seed(stream))
    return Dataset(x, y, None, name, split)


def _read(facts: Card, split: str, download: bool) -> Dataset:
    if facts.name == "digits":
        return embedded.digits(split)
    if facts.embedded:
        return embedded.table(facts.name, split)
    if facts.name in ("mnist", "fashion_mnist"):
        return archives.idx_images(facts.name, list(facts.files), split, download)
    read: Callable[[str, bool], Dataset] = getattr(archives, facts.name)
    return read(split, download)


def _first(data: Dataset, n: int | None) -> Dataset:
    if n is None:
        return data
    return replace(
        data,
        x=data.x[:n],
        y=None if data.y is None else data.y[:n],
        lengths=None if data.lengths is None else data.lengths[:n],
    )


@checked
def names(embedded: bool | None = None) -> list[str]:
    """Names that `load` knows; with True or False only those that are embedded or are not."""
    return [c.name for c in CARDS.values() if embedded is None or c.embedded is embedded]


@checked
def card(name: str) -> Card:
    """The facts about a data set: shape, splits, licence, source, files; prints as a text."""
    if name not in CARDS:
        close = difflib.get_close_matches(str(name), CARDS, n=3)
        hint = f"did you mean {_listed(close, 'or')}?" if close else f"known: {_listed(CARDS)}."
        raise DataError(f"There is no data set {name!r}; {hint}")
    return CARDS[name]


@checked
def potential(name: str) -> Callable[[Tensor], Tensor]:
    """The energy U of "u1" .. "u4" (Rezende & Mohamed 2015): x (N, 2) -> U(x) (N,), in nats.

    The data set has density exp(-U(x)) / Z on [-4, 4]^2; `log_density` includes log Z.
    """
    if name not in toys.POTENTIALS:
        raise DataError(
            f"potential expects name to be one of {_listed(toys.POTENTIALS)}, got {name!r}."
        )
    return _on_points(name, toys.POTENTIALS[name])


@checked
def log_density(name: str) -> Callable[[Tensor], Tensor]:
    """The exact log density of a 2-D toy: x (N, 2) -> log p(x) (N,), in nats.

    Known for all toys. -inf outside the support of checkerboard and of u1 .. u4.
    """
    if name not in toys.TOYS:
        raise DataError(
            f"log_density expects name to be one of {_listed(toys.TOYS)}, got {name!r}."
        )
    return _on_points(name, toys.TOYS[name].log_density)


def _on_points(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def on_points(x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != 2 or not x.is_floating_point():
            raise DataError(
                f"{name} lives in the plane: expected floating point x of shape (N, 2), got "
                f"{x.dtype} {tuple(x.shape)}."
            )
        return function(x)

    return on_points


def _listed(items: Any, last: str = "and") -> str:
    *head, tail = list(items)
    return f"{', '.join(head)} {last} {tail}" if head else str(tail)
