"""The x with ``x + g(x) = z`` for a contraction g: by a fixed point, or by Newton's method.

By Banach's theorem ``x <- z - g(x)`` converges from anywhere: each round multiplies the distance to
the solution by c, g's Lipschitz constant, or less. How far x is from it shows in the residual
``r = z - x - g(x)``: at most ``|r| / (1 - c)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nflib.cache import is_traced
from nflib.residual.log_det import jacobian_matrix
from nflib.residual.pullback import Map, pullback

# From x and its residual to the next x.
Round = Callable[[Tensor, Tensor], Tensor]


class ConvergenceError(ValueError):
    """An inverse that has no formula was not found; the message says for which rows."""


def by_fixed_point(g: Map, z: Tensor) -> Round:
    """``x <- z - g(x)``. Cost of a round: one evaluation of g."""
    return lambda x, residual: x + residual


def by_newton(g: Map, z: Tensor) -> Round:
    """``x <- x + (I + J)^-1 r`` in rows where that halves the residual, else a fixed-point step.

    Cost of a round: two evaluations of g, D products with its Jacobian and O(D^3).
    """

    def better(x: Tensor, residual: Tensor) -> Tensor:
        matrix = jacobian_matrix(pullback(g, x)[1], x)
        eye = torch.eye(matrix.shape[-1], dtype=x.dtype, device=x.device)
        step = torch.linalg.solve_ex(eye + matrix, residual.flatten(1)[..., None])[0]
        trial = x + step[..., 0].view_as(x)
        is_half = size_of(z - trial - g(trial)) <= size_of(residual) / 2
        return torch.where(column(is_half, x), trial, x + residual)

    return better


def solve(
    g: Map,
    z: Tensor,
    kind: Callable[[Map, Tensor], Round],
    tolerance: float,
    rounds: int,
    name: str,
) -> Tensor:
    """The solution, without a graph, with a residual of at most ``tolerance (1 + max |z|)`` a row.

    Under vmap, where nothing can depend on values, all rounds are done and nothing is checked.

    Raises: ConvergenceError that begins with ``name``.
    """
    with torch.no_grad():
        better, x = kind(g, z), z
        limit = tolerance * (1 + size_of(z))
        looks = not is_traced()
        for _ in range(rounds):
            residual = z - x - g(x)
            if looks and bool((size_of(residual) <= limit).all()):
                # One step more costs nothing: its g is known.
                return x + residual
            x = better(x, residual)
        residual = size_of(z - x - g(x))
        if looks:
            refuse(residual, limit, rounds, name)
        return x


def refuse(residual: Tensor, limit: Tensor, rounds: int, name: str) -> None:
    """Raise `ConvergenceError` if a row's residual is above its limit."""
    bad = ~(residual <= limit)
    if not bool(bad.any()):
        return
    rows: list[Any] = bad.nonzero().flatten().tolist()
    some = ", ".join(map(str, rows[:5])) + ", ..." * (len(rows) > 5)
    words = f"row{'s' * (len(rows) > 1)} {some}"
    worst = residual[bad].nan_to_num(torch.inf).max().item()
    raise ConvergenceError(
        f"{name} expects to come within {limit[bad].min().item():.2g} of z in {rounds} rounds, got "
        f"{len(rows)} of {len(residual)} rows that are not there ({words}), the worst {worst:.2g} "
        "away; a network with a Lipschitz constant below 1 converges if it gets enough rounds."
    )


class Adjoint(torch.autograd.Function):
    """The identity, whose gradient goes through a function: the implicit function theorem.

    Of ``x = z - g(x)`` autograd knows ``dx = dz - dg`` with x held fixed inside of g. What is
    missing is the factor ``(I + J)^-1``, which in a backward pass is the solution u of
    ``u + J^T u = gradient``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, through: Map) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Map], output: Tensor) -> None:
        ctx.through = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # torch.func asks for a graph in any case.
        if torch.is_grad_enabled() and not is_traced():
            raise NotImplementedError(
                "ResidualBlock.inverse has first derivatives only, got a backward pass with "
                "create_graph=True."
            )
        return ctx.through(gradient), None


def size_of(x: Tensor) -> Tensor:
    """The largest number of each row, without its sign."""
    return x.flatten(1).abs().amax(1)


def column(values: Tensor, x: Tensor) -> Tensor:
    """One value for each row, in a shape that broadcasts with x."""
    return values.view(-1, *[1] * (x.ndim - 1))
