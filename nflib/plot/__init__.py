"""One look for every figure of the course.

``plot.style()`` sets it once, in a notebook's setup cell. The functions take tensors (on any
device, with or without gradients), draw into ``ax=`` or into a figure of their own, and return
the matplotlib ``Axes`` they drew into. End the last line of a cell with a semicolon, so that the
notebook shows the figure and not the name of its axes.

Colours are Okabe and Ito's, which colour-blind readers tell apart: `DATA` blue, `NOISE` orange,
`MODEL` green, `ACCENT` purple and `GREY`; `DENSITY` runs from white (0) to dark blue, `SIGNED`
from blue (negative) over white (0) to vermilion (positive).
"""

from nflib.plot.look import (
    ACCENT,
    DATA,
    DENSITY,
    GREY,
    MODEL,
    NOISE,
    SIGNED,
    panels,
    place_colours,
    style,
)
from nflib.plot.measured import fitted_slope, history, images, loglog, matrix
from nflib.plot.plane import density, gallery, grid, layers, path, rank_colours, samples, view

__all__ = [
    "ACCENT",
    "DATA",
    "DENSITY",
    "GREY",
    "MODEL",
    "NOISE",
    "SIGNED",
    "density",
    "fitted_slope",
    "gallery",
    "grid",
    "history",
    "images",
    "layers",
    "loglog",
    "matrix",
    "panels",
    "path",
    "place_colours",
    "rank_colours",
    "samples",
    "style",
    "view",
]
