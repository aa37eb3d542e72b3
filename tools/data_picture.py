"""Draw _static/datasets.png, the picture of all embedded data sets on the data page.

Run: `python tools/data_picture.py`.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from nflib import data

PICTURE = Path(__file__).resolve().parents[1] / "_static" / "datasets.png"
BLUE = "#0072B2"


def montage(x: Tensor, rows: int, columns: int) -> Tensor:
    """Images (N, C, H, W) side by side as one picture (H, W, C), a pixel of white between them."""
    _, channels, height, width = x.shape
    sheet = x.new_full((channels, rows * (height + 1), columns * (width + 1)), 255)
    for i, image in enumerate(x[: rows * columns]):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        sheet[:, top : top + height, left : left + width] = image
    return sheet[:, :-1, :-1].permute(1, 2, 0)


def points(ax: Axes, x: Tensor, size: float = 1.0) -> None:
    ax.scatter(x[:, 0], x[:, 1], s=size, color=BLUE, alpha=0.4, linewidths=0, rasterized=True)


def draw() -> plt.Figure:
    names = data.names(embedded=True)
    panels = [(name, {}) for name in names] + [("photo_patches", {"size": 32, "channels": 3})]
    order = {"2-D toys": 0, "Tables": 1, "Images": 2}
    panels.sort(key=lambda panel: order[data.card(panel[0]).group])
    figure, axes = plt.subplots(4, 5, figsize=(10, 8.8), layout="constrained", facecolor="white")
    for ax, (name, options) in zip(axes.flat, panels, strict=True):
        ax.set_title(name + (" (colour)" if options else ""), fontsize=11)
        ax.set(xticks=[], yticks=[])
        group = data.card(name).group
        if group == "2-D toys":
            points(ax, data.load(name, n=6000).x)
            ax.set(aspect="equal", xlim=(-4.4, 4.4), ylim=(-4.4, 4.4))
        elif group == "Tables":
            x = data.load(name).x[:6000, 2:4]
            points(ax, x, size=12 if len(x) < 1000 else 1)
        elif name == "pixel_pairs":
            points(ax, data.load(name, n=6000).x)
            ax.set_aspect("equal")
        else:
            x = data.load(name, n=64, **options).x
            x = (16 - x) * 15 if name == "digits" else x
            side = 4 if options else 8
            sheet = montage(x, side, side)
            ax.imshow(sheet.squeeze(-1), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            for edge in ax.spines.values():
                edge.set_visible(False)
    return figure


if __name__ == "__main__":
    figure = draw()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=100, metadata={"Software": None})
    print(f"{PICTURE.name}: {PICTURE.stat().st_size / 1e3:.0f} kB")
