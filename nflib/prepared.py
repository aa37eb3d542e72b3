"""What the layers of a model need of their parameters, made for all of them at once.

Before a layer sees data it puts its parameters together: an LU multiplies its factors, a MADE
spreads its weights over a masked matrix. These are many small operations on small matrices, as
many again in the backward pass, and a GPU that has 30 layers starts all of them 30 times. Layers of
one size can do it side by side, as a stack of matrices, in as many operations as one of them:

    prepared = Prepared(flow)
    with prepared():
        loss = -flow(x).mean()

An `ActNorm` before an `LU` (or before a 1x1 convolution by one) becomes one affine map with it:

    W ((x + b) e^s) = (W e^s) x + W (b e^s),    log|det| = log|det W| + sum_i s_i

The results are the same up to rounding, gradients included. `nflib.train.fit` trains like this.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflib.arguments import checked
from nflib.autoregressive import MaskedLinear
from nflib.cache import ready
from nflib.convolution import Invertible1x1Conv
from nflib.core import Compose, Layer, expand_log_det, full_precision
from nflib.linear import LU, factors
from nflib.normalization import ActNorm
from nflib.reversible import Reversible


class Prepared:
    """Makes what a model's layers share in making; see this module.

    Layers of a `nflib.reversible.Reversible` are left alone: they compute anew on the way back. So
    are an ActNorm that stands in several places, and layers with hooks, which somebody watches.
    Weights may change and be loaded; a model that moves, or gets other layers, needs a new one.

    Args:
        model: any model; one without such layers has nothing to prepare.
    """

    @checked
    def __init__(self, model: nn.Module) -> None:
        alone = {
            inner for m in model.modules() if isinstance(m, Reversible) for inner in m.modules()
        }
        modules = [module for module in model.modules() if module not in alone]
        masked = [m for m in modules if isinstance(m, MaskedLinear)]
        self.masked = Masked(masked) if len(masked) > 1 else None
        groups: dict[Any, list[tuple[ActNorm, LU]]] = {}
        for norm, lu in pairs(modules):
            groups.setdefault((lu.dim, lu.packed.dtype), []).append((norm, lu))
        self.joints = [Joints(group) for group in groups.values() if len(group) > 1]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside of the block the model's layers take what was made for them.

        Their parameters must not change in it.
        """
        if self.masked is None and not self.joints:
            yield
            return
        made: dict[nn.Module, Any] = {}
        if self.masked is not None:
            made |= self.masked.weights()
        for joints in self.joints:
            made |= joints.maps()
        with ready(made):
            yield


class Masked:
    """The weights of all masked linear layers in one stretch of memory."""

    def __init__(self, layers: list[MaskedLinear]) -> None:
        self.layers = layers
        self.sizes = [layer.outputs * layer.inputs for layer in layers]
        starts = torch.tensor([0, *self.sizes]).cumsum(0).tolist()
        found = [at + layer.position for at, layer in zip(starts, layers, strict=False)]
        self.position = torch.cat(found)

    def weights(self) -> dict[nn.Module, Any]:
        """The matrix of each layer, ``(outputs, inputs)``."""
        taps = torch.cat([layer.taps.view(-1) for layer in self.layers])
        flat = taps.new_zeros(sum(self.sizes)).scatter_(0, self.position, taps)
        return {
            layer: part.view(layer.outputs, layer.inputs)
            for layer, part in zip(self.layers, flat.split(self.sizes), strict=True)
        }


class AffineMap(NamedTuple):
    """``z = W x + c`` on vectors, or on the channel vector of every pixel."""

    weight: Tensor
    shift: Tensor
    log_det: Tensor

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(x):
            if x.ndim == 2:
                z = torch.addmm(self.shift, x, self.weight.T)
                return z, expand_log_det(self.log_det, x)
            z = F.conv2d(x, self.weight[:, :, None, None], self.shift)
            return z, expand_log_det(self.log_det * x.shape[2:].numel(), x)


class Joints:
    """Pairs of an `ActNorm` and an `LU` of one size, each pair as one affine map."""

    def __init__(self, pairs: list[tuple[ActNorm, LU]]) -> None:
        self.norms = [norm for norm, _ in pairs]
        self.lus = [lu for _, lu in pairs]

    def maps(self) -> dict[nn.Module, Any]:
        """For each ActNorm the map of its pair."""
        packed = torch.stack([lu.packed for lu in self.lus])
        log_scale = torch.stack([norm.log_scale for norm in self.norms])
        bias = torch.stack([norm.bias for norm in self.norms])
        # Signs and permutations are part of a state that may be loaded: read anew each time.
        sign, order = (torch.stack([getattr(lu, n) for lu in self.lus]) for n in ("sign", "order"))
        lower, upper = factors(packed, sign)
        with full_precision(packed):
            matrix = torch.baddbmm(upper, lower, upper).gather(
                1, order[:, :, None].expand_as(packed)
            )
            weight = matrix * log_scale.exp().unsqueeze(1)
            shift = torch.bmm(weight, bias.unsqueeze(2)).squeeze(2)
        log_det = (packed.diagonal(dim1=1, dim2=2) + log_scale).sum(1)
        parts = zip(weight.unbind(), shift.unbind(), log_det.unbind(), strict=True)
        return {norm: AffineMap(*part) for norm, part in zip(self.norms, parts, strict=True)}


def pairs(modules: Iterable[nn.Module]) -> Iterator[tuple[ActNorm, LU]]:
    """Each ActNorm right before an LU without a bias, or before a 1x1 convolution by one."""
    compositions = [list(module) for module in modules if isinstance(module, Compose)]
    places = Counter(layer for layers in compositions for layer in layers)
    for layers in compositions:
        for first, second in zip(layers, layers[1:], strict=False):
            lu = _lu(second)
            is_watched = bool(first._forward_hooks or second._forward_hooks)
            if type(first) is ActNorm and lu is not None and places[first] == 1 and not is_watched:
                yield first, lu


def _lu(layer: Layer) -> LU | None:
    inner = layer.linear if type(layer) is Invertible1x1Conv else layer
    return inner if type(inner) is LU and inner.bias is None else None
