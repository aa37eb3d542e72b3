"""Two-dimensional pictures: points, densities, and what a map does to the plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from numpy.typing import NDArray
from torch import Tensor

from nflib.core import Compose, Flow, Inverse, Layer
from nflib.plot.arrays import Map, apply, like_model, log_density, looking, points
from nflib.plot.look import (
    DATA,
    DENSITY,
    Limits,
    both_limits,
    one_axes,
    panels,
    place_colours,
)

Direction = Literal["forward", "inverse"]


def samples(
    x: Any,
    ax: Axes | None = None,
    color: Any = DATA,
    label: str | None = None,
    limits: Limits | None = None,
    size: float | None = None,
) -> Axes:
    """Points in the plane; where they crowd, the density is high.

    Args:
        x: points, shape ``(N, 2)``.
        color: one colour for all, or one for each point.
        label: an entry for the legend, which is then drawn.
        limits: ``(low, high)`` of both axes or a pair of pairs; by default all points are in.
        size: area of a dot in square points; by default smaller the more points there are.

    One unit is as long across as upwards, so that distances and areas can be read.
    """
    xy = points(x, "samples")
    ax = one_axes(ax, (3.6, 3.6))
    area = float(np.clip(6000 / max(len(xy), 1), 2, 18)) if size is None else size
    ax.scatter(xy[:, 0], xy[:, 1], s=area, c=color, alpha=0.7, linewidths=0, label=label)
    _square(ax, limits)
    if label is not None:
        ax.legend(markerscale=max(1.0, (18 / area) ** 0.5), loc="upper right")
    return ax


def density(
    model: Any,
    ax: Axes | None = None,
    limits: Limits = (-4.0, 4.0),
    points: int = 200,
    vmax: float | None = None,
) -> Axes:
    """The density exp(log p) over a part of the plane: white is 0, the darkest blue the highest.

    Args:
        model: anything with ``log_prob(x)`` in nats, or a callable that returns log p; x has shape
            ``(points * points, 2)``, the result ``(points * points,)``. It is evaluated in one
            batch, in evaluation mode and without gradients.
        points: number of grid points along each axis.
        vmax: the density shown darkest; set it where several panels share one scale.

    Where log p is not a number the picture is vermilion.
    """
    (left, right), (low, high) = both_limits(limits)
    u = torch.linspace(left, right, points)
    v = torch.linspace(low, high, points)
    x = torch.cartesian_prod(u, v)
    values = log_density(model, x, "density")
    ax = one_axes(ax, (3.6, 3.6))
    ax.imshow(
        np.ma.masked_invalid(np.exp(values)).reshape(points, points).T,
        extent=(left, right, low, high),
        origin="lower",
        cmap=DENSITY,
        vmin=0,
        vmax=vmax,
        interpolation="bilinear",
    )
    _square(ax, limits)
    return ax


def grid(
    fn: Map,
    ax: Axes | None = None,
    limits: Limits = (-2.0, 2.0),
    lines: int = 17,
    view: Limits | None = None,
) -> Axes:
    """What a map of the plane does to a square grid.

    Each bit of line has the colour of the place where it started. Where cells grow, the map
    stretches areas (|det J| > 1); where they shrink, it squeezes them (|det J| < 1). Straight
    lines that stay straight mean a linear map; lines that cross mean that the map is no bijection.

    Args:
        fn: takes ``(N, 2)``, returns ``(N, 2)`` or a pair that starts with it (a `Layer`).
        limits: the square on which the grid starts.
        lines: lines in each direction.
        view: the part of the plane that is shown; by default all of the image.
    """
    if lines < 2:
        raise ValueError(f"grid expects at least 2 lines, got {lines}.")
    start, unit = _grid_points(limits, lines)
    moved = points(apply(fn, torch.from_numpy(start)), "grid's map").reshape(2 * lines, -1, 2)
    unit = unit.reshape(moved.shape)
    pieces = np.stack([moved[:, :-1], moved[:, 1:]], axis=2).reshape(-1, 2, 2)
    middles = ((unit[:, :-1] + unit[:, 1:]) / 2).reshape(-1, 2)
    ax = one_axes(ax, (3.6, 3.6))
    ax.add_collection(
        LineCollection(
            list(pieces), colors=place_colours(middles), linewidths=1.3, capstyle="round"
        ),
        autolim=True,
    )
    ax.autoscale_view()
    _square(ax, view)
    return ax


def layers(
    flow: Any,
    x: Any,
    direction: Direction = "forward",
    context: Tensor | None = None,
    count: int = 6,
    columns: int = 3,
    limits: Limits | None = None,
    titles: bool = True,
) -> NDArray[Any]:
    """The points after each layer of a flow, one panel after another.

    A point keeps the colour of the place where it started, so that neighbours can be followed:
    a flow bends and stretches, but it never tears or mixes them.

    Args:
        flow: a `Flow`, a `Compose` or one `Layer`.
        x: points ``(N, 2)`` to start from, or how many to draw: from the flow itself for
            ``direction="forward"``, from its base for ``"inverse"``.
        direction: ``"forward"`` shows data becoming noise, ``"inverse"`` noise becoming data.
        count: at most so many panels, evenly chosen, the first and the last always among them.
        limits: of all panels, by default `view` of the points of every step.

    Returns a flat array of `Axes`. `path` gives the points themselves.
    """
    steps = path(flow, x, direction, context)
    chosen = np.unique(np.linspace(0, len(steps) - 1, max(2, count)).round().astype(int))
    colours = rank_colours(steps[0])
    limits = view(steps) if limits is None else limits
    axes = panels(len(chosen), columns)
    for ax, step in zip(axes, chosen, strict=True):
        samples(steps[step], ax, color=colours, limits=limits)
        if titles:
            ax.set_title(step_name(step, len(steps) - 1, direction))
    return axes


def path(
    flow: Any, x: Any, direction: Direction = "forward", context: Tensor | None = None
) -> list[Tensor]:
    """Where points are before the first layer, after it, ..., after the last of K: K + 1 tensors.

    The arguments are those of `layers`. Cost: one forward or one inverse, and for a number of
    points a sample before it.
    """
    if direction not in ("forward", "inverse"):
        raise ValueError(f'path expects direction "forward" or "inverse", got {direction!r}.')
    bijection = flow.bijection if isinstance(flow, Flow) else flow
    if not isinstance(bijection, Layer):
        raise ValueError(f"path expects a Flow or a layer, got {type(flow).__name__}.")
    forward = direction == "forward"
    with looking(flow):
        if isinstance(x, int):
            if not isinstance(flow, Flow):
                raise ValueError(
                    f"path expects a Flow to draw {x} points from, got {type(flow).__name__}."
                )
            x = flow.sample(x, context) if forward else flow.base.sample(x, context)
        points(x, "path")
        x = like_model(flow, torch.as_tensor(x))
        steps = [x]
        for layer, way in _unrolled(bijection, forward):
            x = (layer(x, context) if way else layer.inverse(x, context))[0]
            steps.append(x)
    return [step.cpu() for step in steps]


def gallery(
    named: Mapping[str, Any], columns: int = 3, limits: Limits | None = None, count: int = 2000
) -> NDArray[Any]:
    """Named sets of points side by side, each under its name; a flat array of `Axes`.

    Args:
        named: from names to points ``(N, 2)``, or to a `nflib.data` data set with such ``.x``.
        count: at most so many points of each, the first ones.
    """
    axes = panels(len(named), columns)
    for ax, (name, x) in zip(axes, named.items(), strict=True):
        samples(getattr(x, "x", x)[:count], ax, limits=limits)
        ax.set_title(name)
    return axes


def view(sets: Sequence[Any], share: float = 0.99) -> Limits:
    """The square in the plane that holds ``share`` of the points of each set, and a margin."""
    ends = (0.5 - share / 2, 0.5 + share / 2)
    low, high = zip(*(np.quantile(points(x, "view"), ends, axis=0) for x in sets), strict=True)
    start, stop = np.min(low, axis=0), np.max(high, axis=0)
    middle, reach = (start + stop) / 2, 0.56 * float(np.max(stop - start))
    (left, bottom), (right, top) = middle - reach, middle + reach
    return (float(left), float(right)), (float(bottom), float(top))


def step_name(step: int, last: int, direction: Direction) -> str:
    """What to call the points after ``step`` of ``last`` layers."""
    first, final = ("data x", "noise z") if direction == "forward" else ("noise z", "data x")
    return first if step == 0 else final if step == last else f"after layer {step}"


def rank_colours(x: Any) -> NDArray[Any]:
    """A colour for each point by its rank along both axes, so that all colours are used."""
    order = points(x, "colours").argsort(axis=0).argsort(axis=0)
    return place_colours(order / max(len(order) - 1, 1))


def _unrolled(bijection: Layer, forward: bool) -> list[tuple[Layer, bool]]:
    """The layers in the order in which they are applied, and which way each of them runs."""
    if isinstance(bijection, Inverse):
        return _unrolled(bijection.bijection, not forward)
    if not isinstance(bijection, Compose):
        return [(bijection, forward)]
    inner = list(bijection) if forward else list(bijection)[::-1]
    return [step for layer in inner for step in _unrolled(layer, forward)]


def _grid_points(limits: Limits, lines: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Points along all lines of a grid, upright ones first, and the same on the unit square."""
    (left, right), (low, high) = both_limits(limits)
    fixed, along = np.linspace(0, 1, lines), np.linspace(0, 1, 10 * (lines - 1) + 1)
    upright = np.stack(np.meshgrid(fixed, along, indexing="ij"), axis=-1)
    unit = np.concatenate([upright, upright[..., ::-1]]).reshape(-1, 2)
    return unit * [right - left, high - low] + [left, low], unit


def _square(ax: Axes, limits: Limits | None) -> None:
    if limits is not None:
        x, y = both_limits(limits)
        ax.set_xlim(*x)
        ax.set_ylim(*y)
    ax.set_aspect("equal", adjustable="box" if limits is not None else "datalim")
