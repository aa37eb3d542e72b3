"""What all elementwise maps share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ElementwiseMap = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Elementwise:
    """Base of the elementwise maps.

    A subclass sets ``count``, how many parameters each entry needs, and writes ``forward`` and
    ``inverse``. All parameters zero, which is how a network whose last layer starts at zero begins,
    give the identity; the mixture and the monotone network give a smooth curve flatter than it.

    Attributes:
        count: numbers that each entry needs.
        exact_inverse: whether each direction undoes the other up to rounding, by a formula.
    """

    count: int
    exact_inverse = True

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """``x -> (z, log|dz/dx|)``, each ``(batch, *event)``."""
        raise TypeError(f"{type(self).__name__} does not define forward(x, parameters).")

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """``z -> (x, log|dx/dz|)``, each ``(batch, *event)``."""
        raise TypeError(f"{type(self).__name__} does not define inverse(z, parameters).")

    def rebuild(
        self, y: Tensor, parameters: Tensor, inverse: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The entries of which ``forward`` (or ``inverse``) made y, and its outputs once more.

        The entries are a leaf without a graph, the outputs have one: this is how a backward pass
        goes on that has kept y alone (`nflib.reversible`). A map overrides it if what it makes of
        its parameters serves both directions.
        """
        return rebuilt(self.forward, self.inverse, inverse, y, parameters)

    def __repr__(self) -> str:
        inner = ", ".join(f"{k}={v}" for k, v in vars(self).items() if k != "count")
        return f"{type(self).__name__}({inner})"


def rebuilt(
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor]],
    inverse: bool,
    y: Tensor,
    *given: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The x with ``forward(x, *given)[0] = y``, a leaf, and ``forward(x, *given)`` with a graph.

    With ``inverse`` it is the x of which ``backward`` makes y.
    """
    there, back = (backward, forward) if inverse else (forward, backward)
    with torch.no_grad():
        x = back(y, *given)[0].detach()
    x.requires_grad_()
    return x, there(x, *given)
