"""One dimension after the other through a MADE, each unit of it evaluated once.

What an output predicts for rank r depends on the inputs before r alone, and so do the hidden units
of degree r. Hence step r of the walk evaluates the units of degree r, layer by layer, finds x_r
from the outputs, and is done with all of them: the steps together cost the arithmetic of one pass.

Sorted by degree, the weights of each layer are lower triangular. Ranks go in blocks, as in a
blocked triangular solve:

                      what the layer sees, by degree
                     earlier blocks     this block     later
                   +-----------------+------------+-----------+
    earlier units  |      done       |            |           |
                   +-----------------+------------+           |
    units of       |                 | r          |   there   |
    this block,    |   one product   | r  r+1     |  are no   |
    by degree      |   when it is    | r  r+1 r+2 |  weights  |
                   |     entered     | r  r+1 r+2 |           |
                   +-----------------+------------+-----------+

Within the block the columns marked r are added to the sums as soon as step r has found what they
multiply; the rows of the next degree are then complete. Small blocks copy less, large ones have
larger matrix products.

Activations are feature-major, ``(units, batch)``: the units of a degree are consecutive rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nflib.autoregressive.made import MADE
from nflib.cache import is_traced

BLOCK = 8


class Listener:
    """A layer during the walk: what it has heard, and the sums of the block's units so far.

    Args:
        weight: ``(units, inputs)``, both sorted by degree.
        bias: ``(units, 1)``, or ``(units, batch)`` if a context is part of it.
        inputs, units: how many of them each degree has.
        like: ``(any, batch)``, of the sums' dtype and device.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        inputs: Sequence[int],
        units: Sequence[int],
        like: Tensor,
    ) -> None:
        self.weight, self.bias, self.inputs, self.units = weight, bias, inputs, units
        self.heard = [like[:0]]
        self.row = self.column = 0  # where the next block begins
        # In place if no gradient needs the sums that were; autocast and vmap do not know how.
        plain = not torch.is_autocast_enabled(like.device.type) and not is_traced()
        self.add = Tensor.addmm_ if plain and not torch.is_grad_enabled() else Tensor.addmm

    def enter(self, block: slice) -> None:
        """All that the block's units owe to earlier blocks, in one product."""
        widths, self.sizes = self.inputs[block], self.units[block]
        rows = slice(self.row, self.row + sum(self.sizes))
        earlier, own = self.weight[rows, : self.column + sum(widths)].split(
            [self.column, sum(widths)], 1
        )
        self.sums = torch.addmm(self.bias[rows], earlier, torch.cat(self.heard))
        self.columns = own.split(widths, 1)
        self.row, self.column, self.done = rows.stop, self.column + sum(widths), 0

    def complete(self, i: int) -> Tensor:
        """The sums of the units of the block's degree i, which lacks nothing any more."""
        start, self.done = self.done, self.done + self.sizes[i]
        return self.sums[start : self.done]

    def hear(self, i: int, values: Tensor) -> None:
        """Add what the inputs of the block's degree i contribute."""
        self.sums = self.add(self.sums, self.columns[i], values)
        self.heard.append(values)


def in_order(
    made: MADE,
    choose: Callable[[int, Tensor], Tensor],
    like: Tensor,
    context: Tensor | None = None,
) -> None:
    """Let ``x_r = choose(r, theta_r)`` fill in one rank after the other, r = 0 .. D-1.

    Args:
        made: predicts theta_r, ``(count, batch)``, from the x before it.
        choose: finds x_r, ``(1, batch)``.
        like: ``(any, batch)``, of the dtype and device of x.
        context: ``(batch, K)``.
    """
    layers = listeners(made, like, context)
    last = len(layers) - 1
    for first in range(0, made.dim, BLOCK):
        for layer in layers:
            layer.enter(slice(first, first + BLOCK))
        for i, rank in enumerate(range(first, min(first + BLOCK, made.dim))):
            stream = like
            for k, layer in enumerate(layers):
                sums = layer.complete(i)
                if k == last:
                    layers[0].hear(i, choose(rank, sums))
                elif layer.sizes[i] > 0:
                    seen, stream = made.activate(k, sums, stream)
                    layers[k + 1].hear(i, seen)


def listeners(made: MADE, like: Tensor, context: Tensor | None) -> list[Listener]:
    """The layers of the network, from the input on."""
    layers = [*made.layers, made.last]
    weights, biases = [layer.weight() for layer in layers], [layer.bias for layer in layers]
    # The outputs of one rank side by side.
    weights[-1] = weights[-1].unflatten(0, (made.count, made.dim)).transpose(0, 1).flatten(0, 1)
    biases[-1] = biases[-1].view(made.count, made.dim).T.flatten()
    biases = [bias[:, None] for bias in biases]
    if made.context is not None and context is not None:
        biases[0] = biases[0] + made.context(context).T
    sizes = zip(made.sizes[:-1], made.sizes[1:], strict=True)
    return [
        Listener(weight, bias, *size, like)
        for weight, bias, size in zip(weights, biases, sizes, strict=True)
    ]
