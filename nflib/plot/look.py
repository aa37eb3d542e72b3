"""Colours, sizes and the canvas."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from numpy.typing import NDArray

# Okabe and Ito (2008), https://jfly.uni-koeln.de/color/
DATA = "#0072B2"
NOISE = "#E69F00"
MODEL = "#009E73"
ACCENT = "#CC79A7"
GREY = "#767676"
CYCLE = [DATA, NOISE, MODEL, ACCENT, "#D55E00", "#56B4E9", GREY]

DENSITY = LinearSegmentedColormap.from_list(
    "density", ["#ffffff", "#cbe5f6", "#56B4E9", "#0072B2", "#00264d"]
).with_extremes(bad="#D55E00")
SIGNED = LinearSegmentedColormap.from_list(
    "signed", ["#00436b", "#0072B2", "#ffffff", "#D55E00", "#7a2f00"]
).with_extremes(bad=GREY)

# Two limits serve both axes; two pairs give x and y their own.
Limits = tuple[float, float] | tuple[tuple[float, float], tuple[float, float]]


def style() -> None:
    """Give all later figures the course's look.

    White background (readable in the site's dark mode), the colour-blind-safe cycle, letters large
    enough for a phone, 100 dots per inch (small PNGs), no frame above and to the right.
    """
    mpl.rcParams.update(
        {
            "axes.axisbelow": True,
            "axes.grid": False,
            "axes.prop_cycle": cycler(color=CYCLE),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 12,
            "figure.constrained_layout.use": True,
            "figure.dpi": 100,
            "figure.facecolor": "white",
            "figure.figsize": (5.4, 3.4),
            "font.family": "DejaVu Sans",
            "font.size": 11,
            "image.cmap": DENSITY.name,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "savefig.dpi": 100,
            "savefig.facecolor": "white",
        }
    )


for _colormap in (DENSITY, SIGNED):
    mpl.colormaps.register(_colormap, force=True)


def panels(
    count: int, columns: int = 3, size: float | tuple[float, float] = 2.1, **subplots: Any
) -> NDArray[Any]:
    """A figure of ``count`` axes in rows of at most ``columns``: a flat array of `Axes`.

    ``size`` is the side of one panel in inches, or its (width, height). Three square panels a row
    stay readable on a phone. Further arguments go to ``plt.subplots`` (``sharex=True``, ...).
    """
    if count < 1 or columns < 1:
        raise ValueError(f"panels expects count and columns >= 1, got {count} and {columns}.")
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    width, height = (size, size) if isinstance(size, int | float) else size
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * width, rows * height), squeeze=False, **subplots
    )
    for unused in axes.flat[count:]:
        figure.delaxes(unused)
    return np.asarray(axes.flat[:count])


def one_axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The given axes, or those of a new figure of ``size`` inches."""
    return ax if ax is not None else plt.subplots(figsize=size)[1]


def both_limits(limits: Limits) -> tuple[tuple[float, float], tuple[float, float]]:
    """Limits of x and of y, from one pair for both or from two pairs."""
    values = np.asarray(limits, dtype=float)
    if values.shape not in {(2,), (2, 2)}:
        raise ValueError(f"limits expects (low, high) or two such pairs, got {limits!r}.")
    x, y = values if values.ndim == 2 else (values, values)
    if not (x[0] < x[1] and y[0] < y[1]):
        raise ValueError(f"limits expects low < high, got {limits!r}.")
    return (float(x[0]), float(x[1])), (float(y[0]), float(y[1]))


def place_colours(unit: NDArray[Any]) -> NDArray[Any]:
    """A colour for each place of the unit square: ``(N, 2)`` in [0, 1] to ``(N, 3)`` RGB.

    The corners are blue, orange, green and purple, what lies between is mixed, so that a reader
    follows where a point came from after a map has moved it.
    """
    corners = np.array([[to_rgb(DATA), to_rgb(MODEL)], [to_rgb(ACCENT), to_rgb(NOISE)]])
    unit = np.clip(unit, 0.0, 1.0)
    # Smoothstep leaves less of the grey in the middle, where all four would mix.
    u, v = (unit**2 * (3 - 2 * unit)).T[..., None]
    low = (1 - v) * corners[0, 0] + v * corners[0, 1]
    high = (1 - v) * corners[1, 0] + v * corners[1, 1]
    return (1 - u) * low + u * high
