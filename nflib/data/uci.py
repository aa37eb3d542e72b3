"""Two tables of the UCI Machine Learning Repository that ship inside of nflib, CC BY 4.0.

A file holds whole numbers, each the value times a power of ten, so that nothing is rounded: rows in
ascending order (theirs says nothing), byte by byte, packed by LZMA. `tables/LICENCE.md` names the
authors. ``python tools/pack_tables.py`` makes the files of the published ones.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from nflib.core import DataError


@dataclass(frozen=True)
class Table:
    """What is known of a table.

    columns: name and unit of each; the last is the target.
    decimals: digits behind the point.
    repeated: per cent of the rows whose value occurs in another row, too.
    identity: rows that agree in so many first columns are of one thing; one of them is kept, so
        that none is in two splits.
    """

    columns: tuple[str, ...]
    decimals: tuple[int, ...]
    repeated: tuple[int, ...]
    identity: int


TABLES = {
    "power_plant": Table(
        (
            "temperature (°C)",
            "exhaust vacuum (cm Hg)",
            "ambient pressure (mbar)",
            "relative humidity (%)",
            "electrical power (MW)",
        ),
        decimals=(2, 2, 2, 2, 2),
        repeated=(95, 100, 93, 80, 77),
        identity=5,
    ),
    "protein": Table(
        (
            "surface area",
            "non-polar exposed area",
            "fraction of exposed area that is non-polar",
            "fraction of exposed non-polar part",
            "mass-weighted exposed area",
            "mean deviation of the exposed area",
            "Euclidean distance",
            "secondary structure penalty (whole numbers)",
            "spatial distribution constraints",
            "distance from the native structure (Å)",
        ),
        decimals=(2, 2, 5, 4, 4, 4, 2, 0, 4, 3),
        repeated=(9, 9, 79, 7, 0, 12, 12, 100, 25, 86),
        identity=6,
    ),
}


def rows(name: str) -> np.ndarray:
    """The rows of a table in ascending order, each thing once, float64 ``(n, columns)``."""
    table = TABLES[name]
    numbers = unpack(_content(name), len(table.columns))
    # Which of several rows stays is left to chance: the first would be that of the least values.
    numbers = numbers[np.random.RandomState(0).permutation(len(numbers))]
    _, first = np.unique(numbers[:, : table.identity], axis=0, return_index=True)
    distinct: np.ndarray = numbers[first] / 10.0 ** np.array(table.decimals)
    return distinct


def pack(numbers: np.ndarray) -> bytes:
    """Whole numbers ``(n, columns)`` of at least 0 as bytes, rows in ascending order."""
    import lzma

    ordered = numbers[np.lexsort(numbers.T[::-1])].astype("<i8")
    ordered[1:, 0] -= ordered[:-1, 0]  # so small that their upper bytes are zeros
    planes = ordered.T.copy().view(np.uint8).reshape(numbers.shape[1], -1, 8).transpose(0, 2, 1)
    return lzma.compress(planes.tobytes(), preset=9 | lzma.PRESET_EXTREME)


def unpack(content: bytes, columns: int) -> np.ndarray:
    """The whole numbers ``(n, columns)`` that `pack` made bytes of, rows in ascending order."""
    import lzma

    planes = np.frombuffer(lzma.decompress(content), np.uint8).reshape(columns, 8, -1)
    numbers = np.ascontiguousarray(planes.transpose(0, 2, 1)).view("<i8")[..., 0].T.copy()
    numbers[:, 0] = numbers[:, 0].cumsum()
    return numbers


def _content(name: str) -> bytes:
    path = files("nflib.data").joinpath("tables", f"{name}.xz")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{name} needs the file {path}, which this installation of nflib lacks; install "
            f"nflib anew: {sys.executable} -m pip install --force-reinstall nflib."
        ) from error
