"""The course's figures with a slider."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from numpy.typing import NDArray
from torch import Tensor, nn

from nflib import plot
from nflib.interact.slider import Frames, frames, plain
from nflib.plot.arrays import Map, apply, array, like_model, log_density, points
from nflib.plot.look import Limits, both_limits
from nflib.plot.plane import Direction, rank_colours, samples, step_name


def warped_grid(
    maps: nn.Module | Callable[[float], Map],
    values: Sequence[float] | None = None,
    *,
    label: str = "t",
    limits: Limits = (-2.0, 2.0),
    view: Limits | None = None,
    lines: int = 11,
    cell: tuple[int, int] | None = None,
    alt: str | Callable[[float], str] = "A square grid as a map deforms it",
    **options: Any,
) -> Frames:
    """A square grid that a map deforms further and further.

    One cell is filled; above the picture stands its area over the area it had. For small cells
    that is |det J|, the change of volume. The axes are the coordinates z_1 and z_2 of the image.

    Args:
        maps: from a value t to a map of the plane (``(N, 2)`` to ``(N, 2)``, or a `Bijection`);
            or one `Bijection` f, shown as (1 - t) x + t f(x): those maps in between only guide
            the eye, they need not be invertible.
        values: of the slider, by default 17 from 0 to 1.
        label: of the slider.
        limits, lines: of the grid before the map.
        view: the part of the plane that is shown, by default all that is ever needed.
        cell: column and row of the filled cell, by default right and above the middle.
        options: further arguments of `frames`.
    """
    values = plain(np.linspace(0, 1, 17) if values is None else values)
    (left, right), (low, high) = both_limits(limits)
    across, upward = (right - left) / (lines - 1), (high - low) / (lines - 1)
    column, row = ((lines - 1) // 2 + 1, (lines - 1) // 2 + 1) if cell is None else cell
    if not (0 <= column < lines - 1 and 0 <= row < lines - 1):
        raise ValueError(
            f"warped_grid expects a cell in {lines - 1} columns and rows, got {(column, row)}."
        )
    corner = np.array([left + column * across, low + row * upward])
    outline = corner + _around(40) * [across, upward]

    def at(value: float) -> Map:
        if not isinstance(maps, nn.Module):
            return maps(value)
        module = maps
        return lambda x: (1 - value) * x + value * apply(module, x).to(x)

    if view is None:
        edge = np.array([left, low]) + _around(40) * [right - left, high - low]
        reached = np.concatenate([_moved(at(value), edge) for value in values] + [edge])
        margin = 0.03 * np.ptp(reached, axis=0)
        start, stop = reached.min(axis=0) - margin, reached.max(axis=0) + margin
        view = ((float(start[0]), float(stop[0])), (float(start[1]), float(stop[1])))

    (left, right), (low, high) = both_limits(view)
    size = (4.0, float(np.clip(3.6 * (high - low) / (right - left) + 0.5, 2.0, 5.0)))
    cell_area = across * upward

    def draw(value: float, ax: Axes) -> None:
        now = at(value)
        plot.grid(now, ax, limits, lines, view)
        moved = _moved(now, outline)
        ax.add_patch(Polygon(moved, facecolor="black", alpha=0.75, edgecolor="none"))
        ratio = _area(moved) / cell_area
        ax.set_title(f"filled cell: area × {ratio:.2f}", fontsize=11)
        ax.set(xlabel="$z_1$", ylabel="$z_2$")

    return frames(draw, values, label=label, alt=alt, **{"size": size, "colours": 32, **options})


def layer_by_layer(
    flow: Any,
    x: Any,
    direction: Direction = "forward",
    *,
    context: Tensor | None = None,
    limits: Limits | None = None,
    label: str = "layers",
    alt: str | Callable[[int], str] | None = None,
    **options: Any,
) -> Frames:
    """Points after k = 0, 1, ..., K layers of a flow; a point keeps its colour.

    The arguments are those of `plot.layers`, further ones those of `frames`.
    """
    steps = plot.path(flow, x, direction, context)
    colours = rank_colours(steps[0])
    last = len(steps) - 1
    limits = plot.view(steps) if limits is None else limits
    start, end = ("data", "noise") if direction == "forward" else ("noise", "data")

    def describe(k: int) -> str:
        return f"The points after {k} of {last} layers, on the way from {start} to {end}."

    def draw(k: int, ax: Axes) -> None:
        samples(steps[k], ax, color=colours, limits=limits)
        ax.set_title(step_name(k, last, direction))

    return frames(
        draw,
        range(last + 1),
        label=label,
        alt=describe if alt is None else alt,
        **{"format": "{:d}", "size": (4.0, 4.0), **options},
    )


def push_point(
    fn: Map,
    values: Sequence[float] | None = None,
    *,
    log_prob: Any = None,
    width: float = 0.4,
    limits: tuple[float, float] = (-3.0, 3.0),
    label: str = "x",
    alt: str | Callable[[float], str] = (
        "A point x pushed through a map to z, with the densities of both and a bin around each"
    ),
    **options: Any,
) -> Frames:
    """A point of a line, the bin around it and its density pushed through a monotone map.

    Below the map z = f(x) stands the density of x, left of it that of z. Where the map is steep
    the bin on the z axis is wide and its density low, where it is flat narrow and high: the mass
    in the bin, its width times its mean height, stays the same. The density is
    p_Z(f(x)) = p_X(x) / |f'(x)|, with the derivative from autograd.

    Args:
        fn: takes ``(N, 1)``, returns ``(N, 1)`` or a pair that starts with it (a `Bijection`).
        values: the slider's points x, by default 21 across the limits.
        log_prob: of x, in nats: a model with ``log_prob`` or a callable, ``(N, 1)`` to ``(N,)``;
            by default the standard normal.
        width: of the bin around x.
        limits: of x in the picture.

    Raises ValueError if the map is not strictly monotone between the limits.
    """
    low, high = limits
    values = plain(np.linspace(low, high, 23)[1:-1] if values is None else values)
    x, z, p_x, p_z = _pushed(fn, log_prob, np.linspace(low, high, 401))

    def draw(value: float, figure: Figure) -> None:
        bin_x, bin_z, bin_p, bin_q = _pushed(
            fn, log_prob, np.linspace(value - width / 2, value + width / 2, 201)
        )
        axes = figure.subplot_mosaic(
            [["pz", "map"], ["sum", "px"]],
            gridspec_kw={"width_ratios": [1, 1.6], "height_ratios": [1.6, 1]},
        )
        _draw_map(axes["map"], x, z, bin_x, bin_z)
        axes["px"].plot(x, p_x, color=plot.DATA)
        axes["px"].fill_between(bin_x, bin_p, color=plot.DATA, alpha=0.45, linewidth=0)
        axes["px"].set(xlim=limits, ylim=(0, 1.15 * p_x.max()), xlabel="x", ylabel="$p_X$")
        axes["pz"].plot(p_z, z, color=plot.NOISE)
        axes["pz"].fill_betweenx(bin_z, bin_q, color=plot.NOISE, alpha=0.6, linewidth=0)
        axes["pz"].set(xlim=(1.15 * p_z.max(), 0), ylim=_span(z), xlabel="$p_Z$", ylabel="z")
        axes["sum"].set_axis_off()
        rows = [
            f"{name} bin  {np.ptp(at):.2f} × {_mass(p, at) / np.ptp(at):.2f} = {_mass(p, at):.3f}"
            for name, at, p in (("x", bin_x, bin_p), ("z", bin_z, bin_q))
        ]
        text = "\n".join(["width × height = mass", *rows])
        axes["sum"].text(-0.35, 0.2, text, fontsize=9, linespacing=1.6)

    return frames(
        draw,
        values,
        label=label,
        alt=alt,
        **{"panels": 0, "start": len(values) // 2, "size": (4.8, 4.2), "colours": 16, **options},
    )


def _draw_map(
    ax: Axes, x: NDArray[Any], z: NDArray[Any], bin_x: NDArray[Any], bin_z: NDArray[Any]
) -> None:
    ax.plot(x, z, color="black")
    ax.set(xlim=(x[0], x[-1]), ylim=_span(z))
    bottom, left, top = ax.get_ylim()[0], ax.get_xlim()[0], max(bin_z[0], bin_z[-1])
    # Two bands meet on the curve: from the bin of x upwards, from there to the bin of z.
    ax.add_patch(
        Rectangle((bin_x[0], bottom), np.ptp(bin_x), top - bottom, color=plot.DATA, alpha=0.15)
    )
    ax.add_patch(
        Rectangle((left, bin_z.min()), bin_x[-1] - left, np.ptp(bin_z), color=plot.NOISE, alpha=0.2)
    )
    middle = len(bin_x) // 2
    ax.plot(bin_x[middle], bin_z[middle], "o", color="black", markersize=5)
    ax.set_title("z = f(x)", fontsize=11)


def _pushed(
    fn: Map, log_prob: Any, at: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """x, z = f(x), p_X(x) and p_Z(z), all of shape ``(N,)``."""
    x = torch.as_tensor(at, dtype=torch.float64)[:, None]
    result = fn(moving := like_model(fn, x).requires_grad_())
    z = result[0] if isinstance(result, tuple) else result
    if z.shape != x.shape:
        raise ValueError(
            f"push_point expects a map from {tuple(x.shape)} to the same shape, "
            f"got {tuple(z.shape)}."
        )
    (slope,) = torch.autograd.grad(z.sum(), moving)
    if not ((slope > 0).all() or (slope < 0).all()):
        raise ValueError(
            "push_point expects a strictly monotone map, got one whose derivative changes sign "
            "or vanishes."
        )
    base = torch.distributions.Independent(
        torch.distributions.Normal(torch.zeros(1), torch.ones(1)), 1
    )
    p_x = np.exp(log_density(base if log_prob is None else log_prob, x, "push_point"))
    return array(x)[:, 0], array(z)[:, 0], p_x, p_x / np.abs(array(slope)[:, 0])


def _mass(p: NDArray[Any], at: NDArray[Any]) -> float:
    """The area under a density, by the trapezoid rule."""
    return abs(float(((p[1:] + p[:-1]) / 2) @ np.diff(at)))


def _span(z: NDArray[Any]) -> tuple[float, float]:
    return float(z.min()), float(z.max())


def _around(count: int) -> NDArray[Any]:
    """Points around the unit square, ``count`` on each side."""
    t = np.arange(count) / count
    low, high = np.zeros(count), np.ones(count)
    sides = ([t, low], [high, t], [1 - t, high], [low, 1 - t])
    return np.concatenate([np.stack(side, axis=1) for side in sides])


def _moved(fn: Map, at: NDArray[Any]) -> NDArray[Any]:
    return points(apply(fn, torch.from_numpy(at)), "warped_grid's map")


def _area(corners: NDArray[Any]) -> float:
    """The area inside a polygon, by the shoelace formula."""
    x, y = corners.T
    return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))
