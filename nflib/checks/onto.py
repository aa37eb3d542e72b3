"""Is every z reached? The one question that a test at given x cannot ask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nflib.arguments import Count, Positive, Size, checked
from nflib.checks.bijection import prepare
from nflib.checks.calls import call
from nflib.checks.errors import CheckError, OntoError, Report
from nflib.checks.subject import Rows, Subject
from nflib.checks.tools import rows, show_row
from nflib.core import Layer


@checked
def check_onto(
    layer: Subject,
    x: Tensor | tuple[int, ...] | int,
    context: Rows | None = None,
    report: Report | None = None,
    *,
    radius: Positive = 10.0,
    draws: Size = 64,
    tolerance: Positive = 1e-4,
    randomize: bool = True,
    seed: Count = 0,
) -> Report:
    """Noise z far out comes of some finite x: ``forward(inverse(z)) = z`` for base samples.

    A density integrates to one only if all of R^D is reached, else the base has mass where no x
    is. Box-Cox, ``z = (x^l - 1) / l`` for x > 0, passes `check_bijection` though it reaches only
    ``z > -1 / l``. The draws of a standard normal are stretched so that their largest coordinate
    goes evenly up to ``radius`` standard deviations. It is a test at these points: what is missing
    farther out, or in a small gap between them, goes unseen. Nor does it apply to a layer that
    only has to reach a part, such as the inverse of `Logit`; therefore it is no part of
    `check_bijection`. Cost: one ``inverse`` and one ``forward`` of ``draws`` rows, in float64.

    Args:
        layer: any bijective `Layer`; it is copied and left as it is.
        x: a batch of data points, of which only shape and device count; or the event's shape.
        context: rows of context, if the layer uses it; they are taken in turn.
        radius: the largest coordinate of z, in standard deviations.
        draws: how many z are tried.
        tolerance: allowed for ``forward(inverse(z)) - z``, relative to 1 + |z|.
        randomize: shake the parameters first, as in `check_bijection`.
        seed: of the parameters and of the draws.

    Raises:
        OntoError: if an x is not finite, not found, or not mapped to z.
        CheckError: as `check_bijection`, for what is no layer.
        ValueError: if radius, draws, x or context cannot be used.
    """
    points = _batch(layer, x, context)
    layer, x64, context = prepare("check_onto", layer, points, context, randomize, seed)
    layer = layer.double()
    with torch.no_grad():
        like = call(layer, "forward", x64, context)[0]
        z = _far_out(like, radius, draws, seed)
        if context is not None:
            context = rows(
                context.repeat(-(-draws // len(context)), *[1] * (context.ndim - 1)), slice(draws)
            )
        _compare(layer, z, context, tolerance)
    report = report or Report(f"{type(layer).__name__}, event {tuple(points.shape[1:])}: onto")
    reached = f"{draws} z with coordinates up to {radius:g}, error < {tolerance:g}"
    report.add("forward(inverse(z)) = z far out", reached)
    return report


def _batch(layer: Any, x: Any, context: Tensor | None) -> Tensor:
    """Two data points of a shape, if no points were given; anything else is left as it is."""
    count = 2 if not isinstance(context, Tensor) else len(context)
    if isinstance(x, int) and not isinstance(x, bool):
        x = (x,)
    is_shape = isinstance(x, tuple) and x and all(isinstance(n, int) and n > 0 for n in x)
    # One half is in the domain of any layer, of those for numbers in (0, 1) too.
    if not is_shape:
        given: Tensor = x
        return given
    like = torch.zeros(())
    if isinstance(layer, nn.Module):
        like = next(layer.parameters(), like)
    return torch.full((count, *x), 0.5, device=like.device)


def _far_out(like: Tensor, radius: float, draws: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(draws, like[0].numel(), generator=generator, dtype=torch.float64)
    reach = radius * torch.arange(1, draws + 1, dtype=torch.float64) / draws
    z = z * (reach / z.abs().amax(1))[:, None]
    return z.reshape(draws, *like.shape[1:]).to(like)


def _compare(layer: Layer, z: Tensor, context: Tensor | None, tolerance: float) -> None:
    name = type(layer).__name__
    try:
        x, _ = call(layer, "inverse", z, context)
    except CheckError as error:
        largest = z.abs().max().item()
        words = str(error).removeprefix(f"{name}.inverse ").rstrip(".")
        raise OntoError(
            f"{name}.inverse fails for noise with coordinates up to {largest:.3g}: {words}."
        ) from (error.__cause__ or error)
    lost = ~torch.isfinite(x).flatten(1).all(1)
    if bool(lost.any()):
        row = int(lost.nonzero()[0])
        raise OntoError(
            f"{name} is not onto: inverse finds no finite x for z = {show_row(z, row)}."
        )
    there, _ = call(layer, "forward", x, context)
    error_of = ((there - z).abs() / (1 + z.abs())).flatten(1).amax(1).nan_to_num(nan=torch.inf)
    if float(error_of.max()) > tolerance:
        row = int((error_of > tolerance).nonzero()[0])
        raise OntoError(
            f"{name} is not onto, or its inverse is wrong far out: forward(inverse(z)) is "
            f"{show_row(there, row)} for z = {show_row(z, row)}."
        )
