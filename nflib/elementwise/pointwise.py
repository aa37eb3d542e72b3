"""An elementwise map as a layer of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nflib.arguments import EventSizes, checked
from nflib.core import Bijection, sum_log_det
from nflib.elementwise.base import Elementwise, ElementwiseMap


class Pointwise(Bijection):
    """An elementwise map with parameters of its own for each entry, the same for all rows.

    Args:
        elementwise: any `Elementwise` map.
        shape: size or sizes of the event.
    """

    @checked
    def __init__(self, elementwise: Elementwise, shape: EventSizes) -> None:
        super().__init__()
        assert isinstance(shape, tuple)  # which `checked` makes of it
        self.elementwise, self.event_shape = elementwise, shape
        # A row, not a vector: what initialises or shakes weights then sees their fan-in.
        self.theta = nn.Parameter(torch.zeros(1, elementwise.count, *shape))
        self.exact_inverse = elementwise.exact_inverse

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(self.elementwise.forward, x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(self.elementwise.inverse, z)

    def _map(self, function: ElementwiseMap, x: Tensor) -> tuple[Tensor, Tensor]:
        z, terms = function(x, self.theta.expand(x.shape[0], *self.theta.shape[1:]))
        return z, sum_log_det(terms)

    def extra_repr(self) -> str:
        return f"{self.elementwise}, {self.event_shape}"
