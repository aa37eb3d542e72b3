"""Pictures as small PNG files."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

# Draws one value: draw(value, ax), or draw(value, axes) and draw(value, figure), see `frames`.
Draw = Callable[[Any, Any], Any]
Place = Any


def picture(
    draw: Callable[[Any], Any],
    panels: int,
    size: tuple[float, float],
    dpi: int,
    places: list[Place] | None = None,
) -> tuple[NDArray[np.uint8], list[Place]]:
    """One drawing as an ``(H, W, 3)`` array, and where its axes lie.

    ``places`` of an earlier picture keep the axes still from one to the next, however wide the
    numbers beside them are. The figure never belongs to pyplot: nothing is shown twice or leaks.
    """
    figure = Figure(figsize=size, dpi=dpi, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    if panels == 0:
        draw(figure)
    else:
        axes = figure.subplots(1, panels)
        draw(axes)
    if places is not None and len(places) == len(figure.axes):
        figure.set_layout_engine("none")
        for ax, place in zip(figure.axes, places, strict=True):
            ax.set_position(place)
    canvas.draw()
    found = [ax.get_position(original=True) for ax in figure.axes]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy(), found


def encode(pictures: list[NDArray[np.uint8]], colours: int) -> list[bytes]:
    """Pictures as PNG files of at most ``colours`` colours, the same for all: no flicker."""
    bins = [_bins(each) for each in pictures]
    used, inverse, counts = np.unique(
        np.concatenate([each.ravel() for each in bins]), return_inverse=True, return_counts=True
    )
    pixels = np.concatenate([each.reshape(-1, 3) for each in pictures])
    sums = [np.bincount(inverse, pixels[:, channel]) for channel in range(3)]
    means = np.stack(sums, axis=1) / counts[:, None]
    table = _palette(means, counts, colours)
    nearest = ((means[:, None] - table[None]) ** 2).sum(axis=2).argmin(axis=1)
    lookup = np.zeros(1 << 18, dtype=np.uint8)
    lookup[used] = nearest
    files = []
    for each in bins:
        small = Image.fromarray(lookup[each])
        small.putpalette(table.astype(np.uint8).tobytes())
        file = io.BytesIO()
        small.save(file, "PNG", optimize=True)
        files.append(file.getvalue())
    return files


def _bins(rgb: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Six bits of each channel in one number, so that a table can hold them all."""
    red, green, blue = np.moveaxis(rgb.astype(np.uint32) >> 2, -1, 0)
    return red << 12 | green << 6 | blue


def _palette(means: NDArray[Any], counts: NDArray[Any], colours: int) -> NDArray[Any]:
    """Colours that stand for all, rare ones included, white always among them."""
    # The square root keeps the paper from outvoting the few pixels that carry the picture.
    votes = np.ceil(np.sqrt(counts)).astype(int)
    ballot = np.repeat(means.round().astype(np.uint8), votes, axis=0)
    quantized = Image.fromarray(ballot[None]).quantize(colours, kmeans=1)
    table = np.array(quantized.getpalette(), dtype=int).reshape(-1, 3)[:colours]
    table[np.abs(table - 255).sum(axis=1).argmin()] = 255
    return table
