"""What the models share: their arguments, and the layers that stand in several of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch

from nflib.arguments import ArgumentError, Levels, Size, checked
from nflib.core import Bijection, Flow, Layer, Shape, describe
from nflib.coupling import Coupling, Network, halves
from nflib.dequantization import Logit, UniformDequantization
from nflib.elementwise import Elementwise
from nflib.linear import LU, Dense, Householder, Permutation
from nflib.normalization import ActNorm, BatchNorm

ALPHA = 1e-3  # of the logit behind dequantization
# What the networks of image flows see is clamped, see `Coupling`, far outside of the data.
LIMIT = 12.0

Normalization = Literal["actnorm", "batchnorm"]
LinearMap = Literal["lu", "dense", "householder", "permutation", "none"]
Build = TypeVar("Build", bound=Callable[..., Any])


def model(build: Build) -> Build:
    """A function that builds a flow: its arguments are checked, and it is named in every error.

    What a part has to say about sizes that the function gave it is said of the model.
    """
    inner = checked(build)

    @functools.wraps(build)
    def run(*args: Any, **kwargs: Any) -> Flow:
        try:
            return inner(*args, **kwargs)
        except ValueError as error:
            if str(error).startswith(f"{build.__name__} "):
                raise
            raise ArgumentError(
                f"{build.__name__} expects arguments that fit together, got some that do not: "
                f"{error}"
            ) from error

    return run  # type: ignore[return-value]


def vector(name: str, dim: int | Shape, least: int = 1) -> int:
    """The size of a vector, given as a number or as a shape of one."""
    shape = (dim,) if isinstance(dim, int) else tuple(dim)
    if len(shape) != 1:
        raise ArgumentError(
            f"{name} expects the size of a vector, got the shape {describe(shape)}; flatten "
            "images with x.flatten(1), or take realnvp, glow or mixerflow."
        )
    if shape[0] < least:
        raise ArgumentError(
            f"{name} expects at least {least} dimensions, one part to keep and one to move, "
            f"got {shape[0]}; maf takes 1."
        )
    return shape[0]


def halvings(name: str, shape: Shape, levels: int, times: int) -> None:
    """Refuse an image that a model of so many levels cannot halve so many times."""
    multiple = 2**times
    if shape[1] % multiple or shape[2] % multiple:
        raise ArgumentError(
            f"{name} with {levels} levels expects sides that are multiples of {multiple}, "
            f"got {shape[1]} x {shape[2]}."
        )


def linear_couplings(
    dim: int, layers: int, elementwise: Elementwise, net: Network
) -> list[Bijection]:
    """ActNorm, LU and a coupling, ``layers`` times."""
    steps: list[Bijection] = []
    for k in range(layers):
        mask = halves(dim, flip=k % 2 == 1)
        steps += [ActNorm(dim), LU(dim, bias=False), Coupling(mask, elementwise, net)]
    return steps


def permuted_couplings(
    dim: int,
    layers: int,
    elementwise: Elementwise,
    net: Network,
    normalization: Normalization = "actnorm",
) -> list[Bijection]:
    """A normalization and a coupling, ``layers`` times, with a permutation after each pair."""
    steps: list[Bijection] = []
    for k in range(layers):
        if k % 2 == 0 and k > 0 and dim > 2:
            steps.append(Permutation(dim))
        coupling = Coupling(halves(dim, flip=k % 2 == 1), elementwise, net)
        steps += [normalize(dim, normalization), coupling]
    return steps


def linear_map(dim: int, kind: LinearMap) -> list[Bijection]:
    """The linear layer of that name, without a bias, or none.

    Matrices start at the identity: a number keeps its meaning, and so do neighbours. A random
    rotation would scramble patches before anything is learned.
    """
    eye = torch.eye(dim)
    kinds: dict[str, Callable[[], Bijection]] = {
        "lu": lambda: LU(dim, bias=False, weight=eye),
        "dense": lambda: Dense(dim, bias=False, weight=eye),
        "householder": lambda: Householder(dim, bias=False),
        "permutation": lambda: Permutation(dim),
    }
    if kind == "none":
        return []
    return [kinds[kind]()]


@checked
def dequantize(grey_levels: Levels | None) -> list[Layer]:
    """Uniform dequantization and the logit for integers; nothing for reals."""
    if grey_levels is None:
        return []
    return [UniformDequantization(grey_levels), Logit(ALPHA)]


@checked
def normalize(dim: Size, kind: Normalization) -> Bijection:
    """The normalization layer of that name."""
    return ActNorm(dim) if kind == "actnorm" else BatchNorm(dim)
