"""Kernel machines as conditioners: a coupling is steered by its likeness to learned points.

    f(x) = sum_i V_i k(x, w_i),    |f|^2 = sum_ij k(w_i, w_j) <V_i, V_j>

A kernel k is 1 where its two vectors are equal and falls to 0 with their distance. The auxiliary
points w_i start at rows of the data, and are learned like the weights V_i. |f| is the norm of f in
the reproducing kernel Hilbert space (RKHS) of k: small for a function that changes slowly.
English, Kirchler and Lippert 2023, https://arxiv.org/abs/2307.14839.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from nflib.arguments import ArgumentError, ContextShape, NonNegative, Rule, Size, checked
from nflib.core import ShapeError, describe, full_precision
from nflib.nets import vector_context
from nflib.normalization import centre_and_spread


class Kernel(nn.Module):
    """``k(x, w) = g(r^2)`` with ``r^2 = sum_j (x_j - w_j)^2 / l_j^2``, of every x with every w.

    Rows ``(n, dim)`` and ``(m, dim)`` become a matrix ``(n, m)``; cost O(n m dim). A subclass
    writes the profile g. The length scales l are learned, one for each dimension, so that one that
    does not matter can get a large scale. They start at ``sqrt(dim)``, about the distance of a row
    from the mean of all rows if each dimension has spread 1.

    The distances of all pairs are a matrix product, ``|a - b|^2 = |a|^2 - 2 a.b + |b|^2``. What
    this loses to rounding is kept small by taking a and b from the mean of the points. r^2 is
    kept above zero, so that its root has a finite slope where x = w, and far below infinity.

    Args:
        dim: numbers in a vector.
    """

    @checked
    def __init__(self, dim: Size) -> None:
        super().__init__()
        self.log_length = nn.Parameter(torch.full((dim,), 0.5 * math.log(dim)))

    def profile(self, r2: Tensor) -> Tensor:
        """g of squared distances: 1 at 0, and falling."""
        raise NotImplementedError(f"{type(self).__name__} does not define profile(r2).")

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        scale, centre = (-self.log_length).exp(), w.mean(0)
        a, b = (x - centre) * scale, (w - centre) * scale
        with full_precision(x):
            r2 = a.square().sum(1, keepdim=True) - 2 * a @ b.mT + b.square().sum(1)
        limits = torch.finfo(r2.dtype)
        return self.profile(r2.clamp(limits.tiny, limits.max**0.5))

    def extra_repr(self) -> str:
        return f"{len(self.log_length)}"


class SquaredExponential(Kernel):
    """``k = exp(-r^2 / 2)``: the functions it makes have derivatives of every order."""

    def profile(self, r2: Tensor) -> Tensor:
        return (-0.5 * r2).exp()


class Matern32(Kernel):
    """``k = (1 + s) exp(-s)``, ``s = sqrt(3) r``: the functions it makes have two derivatives.

    (Matern 1/2, ``exp(-r)``, is left out: it has a kink at each point, and points start on data.)
    """

    def profile(self, r2: Tensor) -> Tensor:
        s = (3**0.5) * r2.sqrt()
        return (1 + s) * (-s).exp()


class Matern52(Kernel):
    """``k = (1 + s + s^2 / 3) exp(-s)``, ``s = sqrt(5) r``: the functions have four derivatives."""

    def profile(self, r2: Tensor) -> Tensor:
        s = (5**0.5) * r2.sqrt()
        return (1 + s + s * s / 3) * (-s).exp()


def _maker(value: Any) -> Any:
    if isinstance(value, nn.Module) or not isinstance(value(1), Kernel):
        raise TypeError
    return value


MakesKernel = Annotated[
    Callable[[int], Kernel],
    Rule("a class of nflib.kernels, or a function, that makes a kernel", _maker),
]


class KernelConditioner(nn.Module):
    """``f(x) = sum_i V_i k(x, w_i)``: ``(batch, inputs) -> (batch, outputs)``, a kernel machine.

    V starts at zero, so that a coupling starts near the identity. Far from all points f is zero,
    and a coupling stays near the identity there. For this f has no bias; the ActNorm before a
    coupling scales and shifts. Before `initialize` the points are standard normal noise.

    With N points, d inputs (those of a context included) and m outputs it has ``N (d + m) + G d``
    parameters, of G groups. Cost: O(batch N (G d + m)).

    Args:
        inputs, outputs: numbers a row.
        points: number N of auxiliary points.
        kernel: makes the kernel for so many dimensions, e.g. `Matern52`.
        groups: the outputs in so many equal parts, each with length scales of its own; the points
            serve all. With 2 the scales and the shifts of an affine coupling have their own.
        context_dim: size of a context vector, which is appended to the input.
    """

    initialized: Tensor

    @checked
    def __init__(
        self,
        inputs: Size,
        outputs: Size,
        points: Size = 150,
        kernel: MakesKernel = SquaredExponential,
        groups: Size = 1,
        context_dim: ContextShape = None,
    ) -> None:
        super().__init__()
        if outputs % groups:
            raise ArgumentError(
                "KernelConditioner expects outputs to be a multiple of groups, "
                f"got {outputs} and {groups}."
            )
        self.inputs, self.outputs = inputs, outputs
        self.context_shape = vector_context(context_dim, "KernelConditioner")
        dim = inputs + (self.context_shape[0] if self.context_shape else 0)
        self.kernels: Any = nn.ModuleList(kernel(dim) for _ in range(groups))
        self.points = nn.Parameter(torch.randn(points, dim))
        self.weights = nn.Parameter(torch.zeros(points, outputs))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        seen = self._seen(x, context)
        return torch.cat([k(seen, self.points) @ v for k, v in self._groups()], 1)

    def penalty(self) -> Tensor:
        """``|f|^2 = tr(V^T K V)``, K the kernel of the points with each other; one number.

        The squared RKHS norms of all outputs together. Cost: O(N^2 (G d + m)).
        """
        norms = [(v * (k(self.points, self.points) @ v)).sum() for k, v in self._groups()]
        return torch.stack(norms).sum()

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Points become random rows of the data, length scales fit the data's spread.

        Of fewer different rows than points the other points are noise of the data's mean and
        spread, for two points at one place would stay together. It acts once: whether it has is
        part of the state. `Coupling.initialize` calls it, and so does `nflib.train.fit`.
        """
        seen = self._seen(x, context)
        if not len(seen) or bool(self.initialized):
            return
        mean, log_spread = centre_and_spread(seen)
        for kernel in self.kernels:
            kernel.log_length.add_(log_spread)
        self.points.mul_(log_spread.exp()).add_(mean)
        rows = seen.unique(dim=0)
        order = torch.randperm(len(rows), device=rows.device)[: len(self.points)]
        self.points[: len(order)] = rows[order]
        self.initialized.fill_(True)

    def _groups(self) -> Iterator[tuple[Kernel, Tensor]]:
        """Each kernel with its part of the weights."""
        return zip(self.kernels, self.weights.chunk(len(self.kernels), 1), strict=True)

    def _seen(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The input, with the context appended."""
        if x.ndim != 2 or x.shape[1] != self.inputs:
            wanted, got = ("batch", self.inputs), tuple(x.shape)
            raise ShapeError(
                f"KernelConditioner expects an input of shape {describe(wanted)}, got {got}."
            )
        if self.context_shape is None:
            return x
        if context is None or context.shape != (len(x), *self.context_shape):
            row = describe(("batch", *self.context_shape))
            found = "none" if context is None else tuple(context.shape)
            raise ShapeError(f"KernelConditioner expects a context of shape {row}, got {found}.")
        return torch.cat([x, context], 1)

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.outputs}, points={len(self.points)}"


@checked
def with_rkhs_penalty(weight: NonNegative) -> Callable[..., Tensor]:
    """``fit(flow, x, loss=with_rkhs_penalty(1e-4))``: maximum likelihood with smooth conditioners.

        loss = -mean log p(x) + weight * sum of the penalties |f|^2 of all kernel machines

    Weight decay as it is meant for kernels: of many f that fit the data alike, the one that changes
    least is preferred. In evaluation the loss is ``-mean log p(x)`` alone, so that validation stays
    in nats.

    Args:
        weight: of the penalties; of n training rows and a prior ``exp(-c |f|^2)`` it is ``c / n``.
    """

    def loss(model: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
        log_prob = model(x) if context is None else model(x, context)
        value = -log_prob.mean()
        for part in model.modules():
            if isinstance(part, KernelConditioner) and part.training:
                value = value + weight * part.penalty()
        return value

    return loss
