"""Pictures of what was measured: training, images, matrices, scaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from nflib.plot.arrays import array
from nflib.plot.look import ACCENT, CYCLE, DATA, GREY, NOISE, SIGNED, one_axes


def history(history: Any, ax: Axes | None = None, units: str = "nats") -> Axes:
    """Training curves: negative log-likelihood against the step, lower is better.

    Blue is the loss on training data, orange that on validation data, and the purple dot the best
    step on validation data. Curves that part, orange rising while blue still falls, are
    overfitting.

    Args:
        history: what `nflib.train.fit` returns, or its ``.records``: dicts with ``step``,
            ``train`` and ``valid`` (either may be missing or ``None`` in a record).
        units: of the loss, for the label: ``"nats"``, ``"bits/dim"``.
    """
    records = list(getattr(history, "records", history))
    if not records:
        raise ValueError("history expects at least one record, got none.")
    ax = one_axes(ax, (5.0, 3.0))
    for key, color, label in (("train", DATA, "training"), ("valid", NOISE, "validation")):
        found = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        if not found:
            continue
        steps, losses = np.array(found, dtype=float).T
        ax.plot(steps, losses, color=color, label=label)
        if key == "valid" and np.isfinite(losses).any():
            best = int(np.nanargmin(losses))
            ax.plot(
                steps[best],
                losses[best],
                "o",
                color=ACCENT,
                label=f"best: {losses[best]:.3f} at step {steps[best]:.0f}",
            )
    ax.set_xlabel("step")
    ax.set_ylabel(f"negative log-likelihood\n({units})")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.legend()
    return ax


def images(
    x: Any, ax: Axes | None = None, columns: int = 8, levels: int | None = None, scale: int = 4
) -> Axes:
    """A sheet of images, row by row, each pixel a sharp square.

    Args:
        x: images ``(N, C, H, W)`` with C = 1 (grey) or 3 (colour), or a `nflib.data` data set of
            them, whose number of levels is then used.
        columns: images a row.
        levels: number of grey levels k: values run from 0 (black) to k - 1 (white). By default
            256 for integers, while floating-point numbers run from 0 to 1.
        scale: dots of the screen for one pixel, in a figure of its own.

    Values outside the range are shown as black or white.
    """
    levels = getattr(x, "levels", None) if levels is None else levels
    values = array(getattr(x, "x", x))
    if values.ndim != 4 or values.shape[1] not in {1, 3} or not len(values):
        raise ValueError(
            f"images expects shape (N, C, H, W) with N >= 1 and C = 1 or 3, got {values.shape}."
        )
    if levels is None and not np.issubdtype(values.dtype, np.floating):
        levels = 256
    shown = np.clip(values.astype(float) / (1 if levels is None else levels - 1), 0, 1)
    sheet = _sheet(shown, min(columns, len(shown)))
    height, width = sheet.shape[:2]
    zoom = min(scale * width, 640) / width / 100
    ax = one_axes(ax, (width * zoom, height * zoom))
    ax.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    return ax


def matrix(m: Any, ax: Axes | None = None, title: str | None = None, numbers: bool = True) -> Axes:
    """A matrix, entry by entry: blue is negative, white zero, vermilion positive.

    A Jacobian whose upper half is white is triangular: its determinant is the product of its
    diagonal. Matrices of at most 6 by 6 show their numbers too, unless ``numbers`` is False.

    Args:
        m: shape ``(rows, columns)``; row i, column j of a Jacobian is dz_i / dx_j.
    """
    values = array(m)
    if values.ndim != 2:
        raise ValueError(f"matrix expects shape (rows, columns), got {values.shape}.")
    ax = one_axes(ax, (3.6, 3.0))
    finite = np.abs(values[np.isfinite(values)])
    most = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    shown = np.ma.masked_invalid(values.astype(float))
    picture = ax.imshow(shown, cmap=SIGNED, vmin=-most, vmax=most, interpolation="nearest")
    if max(values.shape) <= 6:
        ax.set_xticks(range(values.shape[1]), [str(j + 1) for j in range(values.shape[1])])
        ax.set_yticks(range(values.shape[0]), [str(i + 1) for i in range(values.shape[0])])
        ax.tick_params(length=0)
        for (i, j), value in np.ndenumerate(values):
            if numbers:
                color = "white" if abs(value) > 0.6 * most else "black"
                ax.text(j, i, f"{value:.2g}", ha="center", va="center", color=color, fontsize=9)
    ax.spines[:].set_visible(False)
    ax.figure.colorbar(picture, ax=ax, shrink=0.9, aspect=18)
    if title is not None:
        ax.set_title(title)
    return ax


def fitted_slope(sizes: Sequence[float], times: Sequence[float], upper: float = 0.5) -> float:
    """The exponent p of ``time ~ size^p``, by least squares in logarithms.

    Only the ``upper`` part of the sizes counts (half of them, and at least two): below it constant
    costs hide the growth. p = 1 is linear, 3 cubic.
    """
    x, y = np.asarray(sizes, dtype=float), np.asarray(times, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise ValueError(
            f"fitted_slope expects as many times as sizes and at least 2, got {y.shape} times "
            f"for {x.shape} sizes."
        )
    if not (np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)).all():
        raise ValueError("fitted_slope expects finite sizes and times above 0, got others.")
    kept = np.argsort(x)[-max(2, round(upper * len(x))) :]
    return float(np.polyfit(np.log(x[kept]), np.log(y[kept]), 1)[0])


def loglog(
    sizes: Sequence[float],
    times: Mapping[str, Sequence[float]],
    ax: Axes | None = None,
    theory: Mapping[str, float] | None = None,
    xlabel: str = "D",
    ylabel: str = "seconds",
    upper: float = 0.5,
) -> Axes:
    """How cost grows with size: on two logarithmic axes a power D^p is a straight line of slope p.

    Each curve's legend gives the slope fitted to the ``upper`` part of its sizes (`fitted_slope`).
    A dashed line shows the slope that theory predicts, through the curve's last point: measured
    and predicted agree where both run in parallel.

    Args:
        sizes: shared by all curves.
        times: from a curve's name to its measured values, one for each size.
        theory: from some of those names to the predicted exponent.
    """
    unknown = set(theory or {}) - set(times)
    if unknown:
        raise ValueError(f"loglog expects theory for {sorted(times)}, got {sorted(unknown)}.")
    ax = one_axes(ax, (5.4, 4.2))
    x = np.asarray(sizes, dtype=float)
    order = np.argsort(x)
    x = x[order]
    for index, (name, values) in enumerate(times.items()):
        slope = fitted_slope(sizes, values, upper)
        y = np.asarray(values, dtype=float)[order]
        color, marker = CYCLE[index % len(CYCLE)], "osD^vPX"[index % 7]
        label = f"{name}: slope {slope:.2f}"
        if theory and name in theory:
            label += f" (theory {theory[name]:g})"
            reach = x[len(x) // 3 :]
            ax.plot(reach, y[-1] * (reach / x[-1]) ** theory[name], "--", color=color, lw=1.1)
        ax.plot(x, y, color=color, marker=marker, markersize=5, label=label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(color=GREY, alpha=0.2, linewidth=0.6)
    ax.legend(fontsize=9)
    return ax


def _sheet(x: NDArray[Any], columns: int) -> NDArray[Any]:
    """``(N, C, H, W)`` to one ``(H', W')`` or ``(H', W', 3)`` with a white line between images."""
    n, channels, height, width = x.shape
    rows = -(-n // columns)
    padded = np.ones((rows * columns, channels, height + 1, width + 1))
    padded[:n, :, :height, :width] = x
    tiled = padded.reshape(rows, columns, channels, height + 1, width + 1)
    sheet = tiled.transpose(0, 3, 1, 4, 2).reshape(rows * (height + 1), columns * (width + 1), -1)
    sheet = sheet[:-1, :-1]
    return sheet[..., 0] if channels == 1 else sheet
