"""MADE: one network for all the conditionals of an autoregressive model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflib.arguments import (
    ArgumentError,
    ContextShape,
    Share,
    Size,
    Widths,
    checked,
    show,
)
from nflib.cache import kept
from nflib.core import ShapeError
from nflib.linear import place
from nflib.nets import equal_widths, vector_context, widths


class NarrowHiddenWarning(UserWarning):
    """Hidden layers too narrow for every output to see the input just before it."""


class MaskedLinear(nn.Module):
    """``W x + b`` with W zero wherever a mask is false; only the other weights are stored.

    They start uniform within ``1/sqrt(n)``, n the number of inputs that the mask leaves to an
    output, as the weights of `torch.nn.Linear` do with all inputs; or at zero.

    Args:
        mask: which weights there are, boolean, ``(outputs, inputs)``.
        zero: start at zero.
    """

    position: Tensor

    @checked
    def __init__(self, mask: Tensor, zero: bool = False) -> None:
        super().__init__()
        if mask.ndim != 2 or mask.dtype != torch.bool:
            raise ShapeError(
                f"{type(self).__name__} expects a boolean mask of shape (outputs, inputs), "
                f"got {mask.dtype} of shape {tuple(mask.shape)}."
            )
        self.outputs, self.inputs = mask.shape
        bound = torch.zeros(self.outputs) if zero else mask.sum(1).clamp_min(1).rsqrt()
        start = bound[:, None] * (2 * torch.rand(self.outputs, self.inputs + 1) - 1)
        # A row, not a vector: what initialises or shakes weights then sees a fan-in.
        self.taps = nn.Parameter(start[:, :-1][mask][None])
        self.bias = nn.Parameter(start[:, -1].clone())
        self.register_buffer("position", mask.flatten().nonzero()[:, 0], persistent=False)

    @kept
    def weight(self) -> Tensor:
        """The matrix W, ``(outputs, inputs)``."""
        return place(self.taps.view(-1), self.position, (self.outputs, self.inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.outputs}, weights={self.taps.numel()}"


class MADE(nn.Module):
    """A network whose outputs for a dimension see only the dimensions before it.

    Every dimension has a rank in the order, 0 .. D-1, every unit of the network a degree, and one
    rule says what is connected: a unit of degree m sees the units of degree at most m.

        an input of rank r      has degree r + 1
        hidden units            have degrees 1 .. D-1, in equal shares  (0 .. D-1 with a context)
        the outputs of rank r   have degree r

    So what an output of rank r sees are inputs of rank below r. Weights against the rule do not
    exist; a context is seen by all units of the first hidden layer. Units are sorted by degree.
    The last layer starts at zero, as all conditioners of nflib do. Cost: one pass of the network.
    Germain et al. 2015, https://arxiv.org/abs/1502.03509 (there degrees are drawn at random).

    The input just before it, of rank r - 1, reaches an output only through units of degree r in
    every hidden layer. Where the narrowest has w < D - 1 units, all layers share the same w
    degrees, so that w outputs see it; the others see nothing newer than the degree below theirs,
    which a `NarrowHiddenWarning` says. (With a context D units are needed, not D - 1.)

    Shapes: x ``(batch, dim)``, context ``(batch, K)``; output ``(batch, count, dim)``.

    Args:
        dim: number D of dimensions.
        count: how many numbers to predict for each dimension.
        hidden: widths of the hidden layers.
        context_dim: size K of a context vector.
        order: the rank of each dimension, ``"random"``, or None for 0, 1, 2, ...
        residual: a first layer, then one block ``h + W2 a(W1 a(h))`` for each entry of ``hidden``,
            all of the same width, as in `nflib.nets.ResidualMLP`.
        dropout: share of hidden units that are dropped in training.
    """

    order: Tensor
    position: Tensor
    natural: bool

    @checked
    def __init__(
        self,
        dim: Size,
        count: Size = 1,
        hidden: Widths = (128, 128),
        context_dim: ContextShape = None,
        order: Sequence[int] | Tensor | str | None = None,
        residual: bool = False,
        dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.count, self.residual = dim, count, residual
        self.context_shape = vector_context(context_dim, type(self).__name__)
        self.register_buffer("order", ranks(dim, order))
        self.register_buffer("position", self.order.argsort(), persistent=False)
        self.register_load_state_dict_post_hook(_refresh_order)
        _refresh_order(self, None)

        self.degrees = self.degrees_of(widths(hidden))
        self._warn_if_narrow(min(widths(hidden)))
        masks = self.masks()
        self.layers = nn.ModuleList(MaskedLinear(mask) for mask in masks[:-1])
        # Output c * D + r is number c of the dimension of rank r.
        self.last = MaskedLinear(masks[-1].repeat(count, 1), zero=True)
        size = self.context_shape[0] if self.context_shape else 0
        self.context = nn.Linear(size, widths(hidden)[0], bias=False) if size else None
        self.dropout = nn.Dropout(dropout)
        # For the walk: how many units of each layer belong to rank 0, 1, ..., D-1.
        inner = [torch.bincount(d, minlength=dim).tolist() for d in self.degrees[1:-1]]
        self.sizes = [[1] * dim, *inner, [count] * dim]

    def _first_degree(self) -> int:
        """Without a context units of degree 0 see nothing; one dimension has no others."""
        return 0 if self.context_shape or self.dim == 1 else 1

    def degrees_of(self, hidden: Sequence[int]) -> list[Tensor]:
        """The degrees of the inputs (by rank), of each hidden layer and of the outputs."""
        sizes = list(hidden)
        if self.residual:
            sizes = [equal_widths(hidden, type(self).__name__)] * (2 * len(sizes) + 1)
        first = self._first_degree()
        span = self.dim - first
        # All layers have the same degrees: one that another lacks would be no way through it.
        few = min(span, *sizes)
        inner = [first + torch.arange(w) * few // w * span // few for w in sizes]
        rank = torch.arange(self.dim)
        return [rank + 1, *inner, rank]

    def _warn_if_narrow(self, width: int) -> None:
        needed = self.dim - self._first_degree()
        if width < needed:
            warnings.warn(
                f"{type(self).__name__} expects hidden layers of at least {needed} units for "
                f"{self.dim} dimensions, got {width}: {needed - width} of {self.dim - 1} outputs "
                "do not see the input just before them.",
                NarrowHiddenWarning,
                stacklevel=4,
            )

    def masks(self) -> list[Tensor]:
        """What is connected in each layer, ``(outputs, inputs)``, dimensions by rank."""
        return [before <= after[:, None] for before, after in pairwise(self.degrees)]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self._check(x, context)
        return self.from_rank(self.by_rank(self.to_rank(x), context))

    def to_rank(self, x: Tensor) -> Tensor:
        """The dimensions, which come last, sorted by rank."""
        return x if self.natural else x.index_select(-1, self.position)

    def from_rank(self, x: Tensor) -> Tensor:
        """The dimensions, which come last and are sorted by rank, in their own places."""
        return x if self.natural else x.index_select(-1, self.order)

    def by_rank(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`forward` for dimensions that are sorted by rank, in and out."""
        seen, stream = x, x
        for k, layer in enumerate(self.layers):
            sums = layer(seen)
            if k == 0 and self.context is not None and context is not None:
                sums = sums + self.context(context)
            seen, stream = self.activate(k, sums, stream)
        return self.last(seen).unflatten(1, (self.count, self.dim))

    def activate(self, k: int, sums: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """What the units of hidden layer k pass on, and the sum that runs along the shortcuts."""
        if self.residual and k % 2 == 0:
            stream = stream + sums if k > 0 else sums
            return F.relu(stream), stream
        seen = F.relu(sums)
        return (self.dropout(seen) if self.training else seen), stream

    def _check(self, x: Tensor, context: Tensor | None) -> None:
        name = type(self).__name__
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ShapeError(f"{name} expects shape (batch, {self.dim}), got {tuple(x.shape)}.")
        if self.context_shape is None:
            return
        expected = (x.shape[0], *self.context_shape)
        if context is None or tuple(context.shape) != expected:
            found = "none" if context is None else tuple(context.shape)
            raise ShapeError(f"{name} expects a context of shape {expected}, got {found}.")

    def extra_repr(self) -> str:
        return f"{self.dim}, count={self.count}"


def ranks(dim: int, order: Sequence[int] | Tensor | str | None, name: str = "MADE") -> Tensor:
    """The rank of each dimension, from what `MADE` takes as an order."""
    if order is None:
        return torch.arange(dim)
    if isinstance(order, str):
        if order == "random":
            return torch.randperm(dim)
        raise ArgumentError(
            f"{name} expects order to be 'random' or a list of ranks, got {order!r}."
        )
    try:
        found = torch.as_tensor(order)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.ndim != 1 or sorted(found.tolist()) != list(range(dim)):
        raise ArgumentError(
            f"{name} expects order to hold each of 0..{dim - 1} once, got {show(order)}."
        )
    return found.to("cpu", torch.long)


def _refresh_order(made: MADE, _: object) -> None:
    """After a load: what follows from the order that was stored."""
    made.position.copy_(made.order.argsort())
    # An order of 0, 1, 2, ... needs no indexing.
    made.natural = bool((made.order[1:] > made.order[:-1]).all())
