"""Draw the landing page's picture with the course's own code: `_static/landing.png`.

A flow of Sylvester and LU layers is trained by maximum likelihood on the two moons; samples of
its base density are then followed block by block into the data. One to two minutes on one core:

    python tools/landing_picture.py
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from nflib import data, plot
from nflib.core import Compose, Flow, StandardNormal
from nflib.linear import LU
from nflib.planar import Sylvester
from nflib.train import fit

TARGET = Path(__file__).parents[1] / "_static" / "landing.png"
BLOCKS, STEPS, POINTS, STREAMS = 12, 2000, 3500, 110
SHOWN = (0, 4, 8, 12)
# Where a panel's centre lies from the one before it, and how far below the picture's middle.
APART, LOWEST = 9.0, -4.6
COLOURS = 128


def trained_flow() -> Flow:
    torch.manual_seed(0)
    blocks = [(LU(2, weight=torch.eye(2)), Sylvester(2)) for _ in range(BLOCKS)]
    flow = Flow(Compose(*(layer for block in blocks for layer in block)), StandardNormal(2))
    history = fit(
        flow,
        data.load("moons"),
        data.load("moons", "test"),
        steps=STEPS,
        batch_size=512,
        lr=5e-3,
        ema=0.99,
    )
    print(history)
    return flow


def streams(ax: Axes, stages: list[NDArray[np.float64]], colours: NDArray[np.float64]) -> None:
    """Curves that lead some of the points from each panel to the next."""
    t = np.linspace(0, 1, 30)[:, None, None]
    for start, end in zip(stages, stages[1:], strict=False):
        half = (end[:, 0] - start[:, 0])[:, None] * [0.5, 0.0]
        # A cubic Bezier curve that leaves and arrives horizontally.
        curves = (
            (1 - t) ** 3 * start
            + 3 * (1 - t) ** 2 * t * (start + half)
            + 3 * (1 - t) * t**2 * (end - half)
            + t**3 * end
        )
        ax.add_collection(
            LineCollection(
                list(curves.swapaxes(0, 1)), colors=colours, linewidths=0.8, alpha=0.32, zorder=1
            )
        )


def middle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The centre of the box that holds all but a few of the points."""
    return np.quantile(x, (0.01, 0.99), axis=0).mean(axis=0)


def draw(flow: Flow) -> Image.Image:
    torch.manual_seed(1)
    steps = plot.path(flow, POINTS, "inverse")
    colours = plot.rank_colours(steps[0])
    shown = [np.asarray(steps[2 * block], dtype=float) for block in SHOWN]
    stages = [x - middle(x) + [APART * k, 0.0] for k, x in enumerate(shown)]
    figure = Figure(figsize=(12, 3.8), dpi=200, facecolor="white")
    figure.set_layout_engine("none")
    ax = figure.add_axes((0, 0, 1, 1))
    streams(ax, [stage[:STREAMS] for stage in stages], colours[:STREAMS])
    names = ["noise z", *(f"after {block} blocks" for block in SHOWN[1:-1]), "samples x"]
    for stage, name, k in zip(stages, names, range(len(stages)), strict=True):
        ax.scatter(stage[:, 0], stage[:, 1], s=5, c=colours, linewidths=0, alpha=0.9, zorder=2)
        ax.text(APART * k, LOWEST, name, ha="center", va="center", fontsize=14, color="#333333")
    ax.set(xlim=(-4.1, APART * (len(stages) - 1) + 4), ylim=(LOWEST - 0.6, 4.6))
    ax.set_aspect("equal", adjustable="box")
    ax.set_axis_off()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200)
    large = Image.open(file).convert("RGB")
    return large.resize((1200, 380), Image.Resampling.LANCZOS)


def main() -> None:
    torch.set_num_threads(1)
    plot.style()
    picture = draw(trained_flow()).quantize(COLOURS, dither=Image.Dither.NONE)
    TARGET.parent.mkdir(exist_ok=True)
    picture.save(TARGET, optimize=True)
    print(f"{TARGET.name}: {TARGET.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
