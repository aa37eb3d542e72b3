"""Networks of one number that can only increase."""

from __future__ import annotations

import torch
from torch import Tensor

from nflib.arguments import Positive, Size, checked
from nflib.elementwise.base import Elementwise
from nflib.elementwise.mixture import bounded, invert_logit_mixture, logit_mixture, spread


class MonotoneNet(Elementwise):
    """A network of L layers of K sigmoid units that can only increase: a deep sigmoidal flow.

        h <- logit(sum_k w_k sigmoid(a_k h + b_k)),    a_k > 0,  w_k > 0,  sum_k w_k = 1

    Positive slopes and weights make each layer increase; the logit undoes the squashing, so that
    its image is all of R and the flow is a density. Layers are inverted one after the other, each
    by Newton's method between exact brackets. One layer is `LogisticMixtureCDF` without its outer
    scale and shift. Huang et al. 2018 (Neural Autoregressive Flows, DSF),
    https://arxiv.org/abs/1804.00779.

    Args:
        units: number K of sigmoid units in a layer.
        layers: number L of layers.
        bound: of |log a_k|.

    Raises:
        NotInvertedError: if the search for an inverse misses its tolerance.
    """

    exact_inverse = False

    @checked
    def __init__(self, units: Size = 8, layers: Size = 2, bound: Positive = 3.0) -> None:
        self.units, self.layers, self.bound = units, layers, bound
        self.count = 3 * units * layers

    def _layers(self, parameters: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(log w_k, log a_k, b_k) for each layer."""
        layers = []
        for part in parameters.chunk(self.layers, 1):
            logits, slopes, offsets = part.chunk(3, 1)
            log_weights = torch.log_softmax(logits, 1)
            layers.append((log_weights, bounded(slopes, self.bound), offsets + spread(offsets)))
        return layers

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(x)
        for units in self._layers(parameters):
            x, log_slope = logit_mixture(x, *units)
            total = total + log_slope
        return x, total

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(z)
        for units in reversed(self._layers(parameters)):
            z = invert_logit_mixture(z, *units, name=type(self).__name__)
            total = total - logit_mixture(z, *units)[1]
        return z, total
