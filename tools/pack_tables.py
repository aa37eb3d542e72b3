"""Pack the UCI tables of nflib.data from the published text files.

Run: `python tools/pack_tables.py FOLDER`, with `power-plant.txt.gz` and
`protein-tertiary-structure.txt.gz` in FOLDER: rows of numbers with spaces between them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from nflib.data.uci import TABLES, pack

TARGET = Path(__file__).resolve().parents[1] / "nflib" / "data" / "tables"
PUBLISHED = {
    "power_plant": "power-plant.txt.gz",
    "protein": "protein-tertiary-structure.txt.gz",
}


def whole_numbers(path: Path, decimals: tuple[int, ...]) -> np.ndarray:
    """Every value times a power of ten, without rounding any."""
    scale = 10.0 ** np.array(decimals)
    values = np.loadtxt(path)
    numbers = np.rint(values * scale).astype(np.int64)
    if not (numbers / scale == values).all() or numbers.min() < 0:
        raise SystemExit(f"{path} has values below 0 or of more digits than {decimals}.")
    return numbers


if __name__ == "__main__":
    for name, file in PUBLISHED.items():
        numbers = whole_numbers(Path(sys.argv[1]) / file, TABLES[name].decimals)
        content = pack(numbers)
        (TARGET / f"{name}.xz").write_bytes(content)
        print(f"{name}: {len(numbers)} rows, {len(content)} bytes")
