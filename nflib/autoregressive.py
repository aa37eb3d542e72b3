"""Autoregressive flows: each dimension is moved by a map that the dimensions before it choose.

    z_i = tau(x_i; theta_i(x_1, ..., x_{i-1})),    log|det| = sum_i log tau'_i

The Jacobian is triangular. One pass of a masked network gives all theta_i at once, so ``forward``
is as parallel as any layer; the way back finds x_1, then x_2, and so on. Read forwards the layer is
a masked autoregressive flow (MAF, quick to evaluate), inside `Inverse` an inverse autoregressive
flow (IAF, quick to sample): the same map, read in two directions.
Germain et al. 2015 (MADE), https://arxiv.org/abs/1502.03509; Kingma et al. 2016 (IAF),
https://arxiv.org/abs/1606.04934; Papamakarios et al. 2017 (MAF), https://arxiv.org/abs/1705.07057.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflib.cache import is_traced, kept
from nflib.core import Bijection, ShapeError, sum_log_det
from nflib.elementwise import Elementwise
from nflib.linear import place
from nflib.nets import equal_widths, vector_context
Context = object

# Dimensions that the incremental inverse takes together, see `MADE.in_order`: the fewer, the less
# is copied, the more, the larger are the matrix products.
BLOCK = 8
# The Jacobi inverse starts from guesses. What it feeds to the network is kept within +-GUESS where
# it is not final yet: an overflow there would spread, for zero times infinity is not a number.
GUESS = 1e4
# Rounds of the Jacobi inverse between two looks at whether anything still changes; each look makes
# the host wait for an accelerator.
ROUNDS = 4


class MaskedLinear(nn.Module):
    """``W x + b`` with W zero wherever a mask is false; only the other weights are stored.

    They start uniform within ``1/sqrt(n)``, n the number of inputs that the mask leaves to an
    output, as the weights of `torch.nn.Linear` do with all inputs; or at zero.

    Args:
        mask: which weights there are, boolean, ``(outputs, inputs)``.
        zero: start at zero.
    """

    position: Tensor

    def __init__(self, mask: Tensor, zero: bool = False) -> None:
        super().__init__()
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
        return place(self.taps[0], self.position, (self.outputs, self.inputs))

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

    Shapes: x ``(batch, dim)``, context ``(batch, context)``; output ``(batch, count, dim)``.

    Args:
        dim: number D of dimensions.
        count: how many numbers to predict for each dimension.
        hidden: widths of the hidden layers.
        context: size of a context vector.
        order: the rank of each dimension, ``"random"``, or None for 0, 1, 2, ...
        residual: a first layer, then one block ``h + W2 a(W1 a(h))`` for each entry of ``hidden``,
            all of the same width, as in `nflib.nets.ResidualMLP`.
        dropout: share of hidden units that are dropped in training.
    """

    order: Tensor
    position: Tensor
    natural: bool

    def __init__(
        self,
        dim: int,
        count: int = 1,
        hidden: Sequence[int] = (128, 128),
        context: Context = None,
        order: Sequence[int] | Tensor | str | None = None,
        residual: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim < 1 or count < 1 or not hidden or min(hidden) < 1:
            raise ShapeError(
                "MADE expects a positive dim, count and width of each of its hidden layers, "
                f"got dim={dim}, count={count}, hidden={tuple(hidden)}."
            )
        self.dim, self.count, self.residual = dim, count, residual
        self.context_shape = vector_context(context, "MADE")
        self.register_buffer("order", ranks(dim, order))
        self.register_buffer("position", self.order.argsort(), persistent=False)
        self.register_load_state_dict_post_hook(_refresh_order)
        _refresh_order(self, None)

        self.degrees = self.degrees_of(hidden)
        masks = self.masks()
        self.layers = nn.ModuleList(MaskedLinear(mask) for mask in masks[:-1])
        # Output c * D + r is number c of the dimension of rank r.
        self.last = MaskedLinear(masks[-1].repeat(count, 1), zero=True)
        size = self.context_shape[0] if self.context_shape else 0
        self.context = nn.Linear(size, hidden[0], bias=False) if size else None
        self.dropout = nn.Dropout(dropout)
        # For `in_order`: how many units of each layer belong to rank 0, 1, ..., D-1.
        inner = [torch.bincount(d, minlength=dim).tolist() for d in self.degrees[1:-1]]
        self.sizes = [[1] * dim, *inner, [count] * dim]

    def degrees_of(self, hidden: Sequence[int]) -> list[Tensor]:
        """The degrees of the inputs (by rank), of each hidden layer and of the outputs."""
        widths = list(hidden)
        if self.residual:
            widths = [equal_widths(hidden, "MADE")] * (2 * len(widths) + 1)
        # Without a context units of degree 0 see nothing; one dimension has no others.
        lowest = 0 if self.context_shape or self.dim == 1 else 1
        inner = [lowest + torch.arange(w) * (self.dim - lowest) // w for w in widths]
        rank = torch.arange(self.dim)
        return [rank + 1, *inner, rank]

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
            seen, stream = self._activate(k, sums, stream)
        return self.last(seen).unflatten(1, (self.count, self.dim))

    def _activate(self, k: int, sums: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """What the units of hidden layer k pass on, and the sum that runs along the shortcuts."""
        if self.residual and k % 2 == 0:
            stream = stream + sums if k > 0 else sums
            return F.relu(stream), stream
        seen = F.relu(sums)
        return (self.dropout(seen) if self.training else seen), stream

    def in_order(
        self, choose: Callable[[int, Tensor], Tensor], like: Tensor, context: Tensor | None = None
    ) -> None:
        """Lets ``x_r = choose(r, theta_r)`` fill in one rank after the other, r = 0 .. D-1.

        theta_r, ``(count, batch)``, is what the network predicts for rank r from the x before it;
        x_r is ``(1, batch)``. Step r evaluates the units of degree r, as the last input that they
        see is known, and no unit again: all steps together cost the arithmetic of one pass.

        Activations are feature-major, ``(units, batch)``, so that the units of one degree are
        consecutive rows. Ranks go in blocks, as in a blocked triangular solve: all that a block's
        units owe to earlier blocks is one product a layer, and within a block each new activation
        is added at once to what the next layer's units of the block have received.

        Args:
            choose: finds x_r.
            like: ``(any, batch)``, of the dtype and device of x.
            context: ``(batch, context)``.
        """
        layers = [*self.layers, self.last]
        depth = len(layers)
        weights, biases = [layer.weight() for layer in layers], [layer.bias for layer in layers]
        # The outputs of one rank side by side.
        weights[-1] = weights[-1].unflatten(0, (self.count, self.dim)).transpose(0, 1).flatten(0, 1)
        biases[-1] = biases[-1].view(self.count, self.dim).T.flatten()
        biases = [bias[:, None] for bias in biases]
        if self.context is not None and context is not None:
            biases[0] = biases[0] + self.context(context).T

        known = [[like[:0]] for _ in layers]  # what each layer sees, from earlier blocks first
        # In place if no gradient needs the sums that were; autocast and vmap do not know how.
        plain = not torch.is_autocast_enabled(like.device.type) and not is_traced()
        add = Tensor.addmm_ if plain and not torch.is_grad_enabled() else Tensor.addmm
        rows, columns = [0] * len(layers), [0] * len(layers)
        for first in range(0, self.dim, BLOCK):
            block = slice(first, first + BLOCK)
            sizes = [size[block] for size in self.sizes]  # units of each degree, input first
            sums, weight = [], []
            for k, (before, after) in enumerate(pairwise(sizes)):
                new = slice(rows[k], rows[k] + sum(after))
                old, own = weights[k][new, : columns[k] + sum(before)].split(
                    [columns[k], sum(before)], 1
                )
                sums.append(torch.addmm(biases[k][new], old, torch.cat(known[k])))
                weight.append(own.split(before, 1))
                rows[k], columns[k] = new.stop, columns[k] + sum(before)
            done = [0] * len(layers)
            for i in range(len(sizes[0])):
                stream = like
                for k in range(depth):
                    size = sizes[k + 1][i]
                    if size == 0:
                        continue
                    at, done[k] = done[k], done[k] + size
                    y = sums[k][at : done[k]]
                    if k < depth - 1:
                        y, stream = self._activate(k, y, stream)
                    else:
                        y = choose(first + i, y)
                    to = (k + 1) % depth  # the outputs lead to the next input
                    sums[to] = add(sums[to], weight[to][i], y)
                    known[to].append(y)

    def _check(self, x: Tensor, context: Tensor | None) -> None:
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ShapeError(f"MADE expects shape (batch, {self.dim}), got {tuple(x.shape)}.")
        if self.context_shape is None:
            return
        expected = (x.shape[0], *self.context_shape)
        if context is None or tuple(context.shape) != expected:
            found = "none" if context is None else tuple(context.shape)
            raise ShapeError(f"MADE expects a context of shape {expected}, got {found}.")

    def extra_repr(self) -> str:
        return f"{self.dim}, count={self.count}"


def ranks(dim: int, order: Sequence[int] | Tensor | str | None) -> Tensor:
    """The rank of each dimension, from what `MADE` takes as an order."""
    if order is None:
        return torch.arange(dim)
    if isinstance(order, str):
        if order == "random":
            return torch.randperm(dim)
        raise ValueError(f"MADE expects the order 'random' or a list of ranks, got {order!r}.")
    found = torch.as_tensor(order).tolist()
    if not isinstance(found, list) or sorted(found) != list(range(dim)):
        raise ShapeError(f"MADE expects an order with each of 0..{dim - 1} once, got {found}.")
    return torch.tensor(found, dtype=torch.long)


def _refresh_order(made: MADE, _: object) -> None:
    """After a load: what follows from the order that was stored."""
    made.position.copy_(made.order.argsort())
    # An order of 0, 1, 2, ... needs no indexing.
    made.natural = bool((made.order[1:] > made.order[:-1]).all())


class MaskedAutoregressive(Bijection):
    """``z_i = tau(x_i; theta_i(x_<i, context))``, theta from a `MADE`: one layer of a MAF.

        log|det| = sum_i log tau'_i

    x_<i are the dimensions before i in the order. ``forward`` costs one pass of the network.
    ``inverse`` is exact, by one of two solvers:

        "incremental"  one dimension after the other, D short steps in which each unit of the
                       network is evaluated once: the arithmetic of about one pass
        "jacobi"       x <- tau^-1(z; theta(x)) for all dimensions at once. Round k makes rank
                       k - 1 final, so D rounds are enough; it stops when nothing changes any
                       more, often much earlier. Good on accelerators, where it looks every 4
                       rounds only, for a look makes the host wait. Compiled it takes all D.

    Gradients flow through both. `Inverse` of this layer is IAF, with the two costs exchanged.
    Papamakarios et al. 2017 (MAF), https://arxiv.org/abs/1705.07057; Kingma et al. 2016 (IAF),
    https://arxiv.org/abs/1606.04934.

    Args:
        dim: number D of dimensions.
        elementwise: the map tau, e.g. `nflib.elementwise.Affine()`.
        hidden, context, order, residual, dropout: of the `MADE`.
        solver: ``"incremental"`` or ``"jacobi"``.
        limit: the network sees x clamped to [-limit, limit], as in a `Coupling`: a rare noise
            vector cannot be thrown further out by each dimension that follows another.
    """

    def __init__(
        self,
        dim: int,
        elementwise: Elementwise,
        hidden: Sequence[int] = (128, 128),
        context: Context = None,
        order: Sequence[int] | Tensor | str | None = None,
        residual: bool = False,
        dropout: float = 0.0,
        solver: str = "incremental",
        limit: float = math.inf,
    ) -> None:
        super().__init__()
        if not limit > 0:
            raise ValueError(f"MaskedAutoregressive expects a positive limit, got {limit!r}.")
        if solver not in ("incremental", "jacobi"):
            raise ValueError(
                "MaskedAutoregressive expects the solver 'incremental' or 'jacobi', "
                f"got {solver!r}."
            )
        self.elementwise, self.solver, self.limit = elementwise, solver, limit
        self.exact_inverse = elementwise.exact_inverse
        self.made = MADE(dim, elementwise.count, hidden, context, order, residual, dropout)
        self.event_shape, self.context_shape = (dim,), self.made.context_shape

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_input(x, context)
        ranked = self.made.to_rank(x)
        z, terms = self.elementwise.forward(ranked, self._theta(ranked, context))
        return self.made.from_rank(z), sum_log_det(terms)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_input(z, context)
        solve = self._incremental if self.solver == "incremental" else self._jacobi
        x, terms = solve(self.made.to_rank(z), context)
        return self.made.from_rank(x), sum_log_det(terms)

    def _theta(self, x: Tensor, context: Tensor | None) -> Tensor:
        """theta, ``(batch, count, dim)``, by rank; the network's bfloat16, if any, ends here."""
        return self.made.by_rank(self._seen(x), context).to(x.dtype)

    def _seen(self, x: Tensor) -> Tensor:
        return x if math.isinf(self.limit) else x.clamp(-self.limit, self.limit)

    def _incremental(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        columns = z.T.split(1)  # of (1, batch) each
        found: list[tuple[Tensor, Tensor]] = []

        def choose(rank: int, theta: Tensor) -> Tensor:
            found.append(self.elementwise.inverse(columns[rank], theta.to(z.dtype).unsqueeze(0)))
            return self._seen(found[-1][0])

        self.made.in_order(choose, z.T, context)
        x, terms = zip(*found, strict=True)
        return torch.cat(x).T, torch.cat(terms).T

    def _jacobi(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        dim = z.shape[1]
        rank = torch.arange(dim, device=z.device)
        guess = z.clamp(-GUESS, GUESS)
        for k in range(dim):
            x, terms = self.elementwise.inverse(z, self._theta(guess, context))
            if not torch.compiler.is_compiling() and (z.device.type == "cpu" or k % ROUNDS == 3):
                if torch.equal(x, guess):
                    break
            guess = torch.where(rank <= k, x, x.clamp(-GUESS, GUESS))
        return x, terms
