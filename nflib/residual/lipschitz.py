"""Networks with a Lipschitz constant below a bound c: ``|g(x) - g(y)| <= c |x - y|``.

A composition's constant is at most the product of its parts'. That of a linear map is its largest
singular value, which each layer here keeps below a bound of its own; that of `LipSwish` is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflib.arguments import ContextShape, ImageShape, Odd, Positive, Size, Widths, checked, number
from nflib.cache import kept
from nflib.core import ShapeError, describe
from nflib.nets import vector_context, widths

# Rounds of the power iteration where nothing trains.
ROUNDS = 200

Contraction = Annotated[float, number("a number between 0 and 1", lambda v: 0 < v < 1)]

# The weights that `weights_made` has made, by layer.
_made: ContextVar[dict[nn.Module, Tensor] | None] = ContextVar("made", default=None)


class LipSwish(nn.Module):
    """``x sigma(b x) / 1.1`` with a learned b > 0: smooth, and of slope at most 1.

    The slope of ``x sigma(b x)`` is at most 1.0998 whatever b is. ReLU would do for the bound, but
    its second derivative is zero, and gradients of a log-det go through second derivatives.
    Chen et al. 2019, section 3.3, https://arxiv.org/abs/1906.02735.
    """

    def __init__(self) -> None:
        super().__init__()
        self.raw_b = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(F.softplus(self.raw_b) * x) / 1.1


class SpectralNorm(nn.Module):
    """A linear map whose weight is shrunk where its norm is above a bound: ``W min(1, c / |W|)``.

    ``|W|``, the largest singular value, is found by power iteration: ``v <- W^T W v``, divided by
    its length, turns v towards the direction that W stretches most, and then ``|W| = |W v|``. The
    direction is a buffer. In training every step turns it by one round (`iterate`), for weights
    change little in a step; in evaluation each use goes 200 rounds from where it stands. The norm
    is found from below; by how little the bound can then be missed is measured in the tests. Its
    gradient is ``(W v) v^T / |W v|``, with v held fixed.

    A subclass writes ``apply_to(v, weight)`` and its transpose ``apply_back(u, weight)``.
    Miyato et al. 2018, https://arxiv.org/abs/1802.05957; for convolutions Gouk et al. 2018,
    https://arxiv.org/abs/1804.04368.

    Args:
        weight: at the start.
        shape: of one input.
        bound: largest norm.
    """

    direction: Tensor

    def __init__(self, weight: Tensor, shape: tuple[int, ...], bound: float) -> None:
        super().__init__()
        self.bound = bound
        self.raw = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight)))
        start = torch.randn(shape)
        self.register_buffer("direction", start / torch.linalg.vector_norm(start))
        self.iterate(ROUNDS)

    def apply_to(self, v: Tensor, weight: Tensor) -> Tensor:
        """W v for a batch of v."""
        raise NotImplementedError(f"{type(self).__name__} does not define apply_to(v, weight).")

    def apply_back(self, u: Tensor, weight: Tensor) -> Tensor:
        """W^T u for a batch of u."""
        raise NotImplementedError(f"{type(self).__name__} does not define apply_back(u, weight).")

    @torch.no_grad()
    def iterate(self, rounds: int = 1) -> None:
        """Turn the direction by so many rounds of the power iteration."""
        self.direction.copy_(self._turned(rounds))

    @torch.no_grad()
    def _turned(self, rounds: int) -> Tensor:
        v = self.direction[None]
        for _ in range(rounds):
            new = self.apply_back(self.apply_to(v, self.raw), self.raw)
            length = torch.linalg.vector_norm(new)
            # A weight of zero stretches no direction.
            v = torch.where(length > 0, new / length, v)
        return v[0]

    def norm(self) -> Tensor:
        """The largest singular value of the weight, as far as it is known."""
        # A copy, for the next step turns the direction before this one's backward pass may be over.
        v = self.direction.clone() if self.training else self._turned(ROUNDS)
        return torch.linalg.vector_norm(self.apply_to(v[None], self.raw))

    @kept
    def weight(self) -> Tensor:
        """The weight, shrunk to a norm of at most ``bound``."""
        return self.raw * (self.bound / self.norm().clamp_min(self.bound))

    def forward(self, x: Tensor) -> Tensor:
        check_event(self, x, tuple(self.direction.shape))
        made = None if torch.compiler.is_compiling() else _made.get()
        weight = self.weight() if made is None or self not in made else made[self]
        bias = self.bias.view(-1, *[1] * (x.ndim - 2))
        return self.apply_to(x, weight) + bias


class SpectralLinear(SpectralNorm):
    """``W x + b`` with ``|W| <= bound``: ``(batch, inputs) -> (batch, outputs)``.

    In evaluation the norm is exact: the matrix is there, and torch finds its singular values.
    """

    @checked
    def __init__(self, inputs: Size, outputs: Size, bound: Positive = 1.0) -> None:
        super().__init__(nn.Linear(inputs, outputs).weight.detach(), (inputs,), bound)

    def norm(self) -> Tensor:
        return super().norm() if self.training else torch.linalg.matrix_norm(self.raw, 2)

    def apply_to(self, v: Tensor, weight: Tensor) -> Tensor:
        return v @ weight.mT

    def apply_back(self, u: Tensor, weight: Tensor) -> Tensor:
        return u @ weight


class SpectralConv2d(SpectralNorm):
    """A convolution of images of one size, with zeros around them, of norm at most ``bound``.

    The norm is that of the convolution as a map from images to images, found with a convolution and
    its transpose. The kernel reshaped to a matrix ``(outputs, inputs k^2)`` has another norm, which
    may be up to k times smaller.

    Shapes: ``(batch, inputs, height, width) -> (batch, outputs, height, width)``.

    Args:
        shape: channels, height and width of the input.
        outputs: channels.
        kernel: side of the kernel.
        bound: largest norm.
    """

    @checked
    def __init__(
        self, shape: ImageShape, outputs: Size, kernel: Odd = 3, bound: Positive = 1.0
    ) -> None:
        start = nn.Conv2d(shape[0], outputs, kernel).weight.detach()
        super().__init__(start, shape, bound)

    def apply_to(self, v: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(v, weight, padding=weight.shape[-1] // 2)

    def apply_back(self, u: Tensor, weight: Tensor) -> Tensor:
        return F.conv_transpose2d(u, weight, padding=weight.shape[-1] // 2)


class LipschitzMLP(nn.Module):
    """Fully connected, with a Lipschitz constant of at most ``bound``: the g of a residual block.

    Linear layers, each of norm at most ``bound^(1 / layers)``, and `LipSwish` between them.

    Shapes: ``(batch, dim) -> (batch, dim)``.

    Args:
        dim: number of dimensions.
        hidden: widths of the hidden layers.
        bound: of the Lipschitz constant.
        context_dim: size of a context vector, which shifts the first hidden layer; how strongly the
            output depends on it is not bounded.
    """

    @checked
    def __init__(
        self,
        dim: Size,
        hidden: Widths = (128, 128),
        bound: Contraction = 0.97,
        context_dim: ContextShape = None,
    ) -> None:
        super().__init__()
        self.event_shape = (dim,)
        self.context_shape = vector_context(context_dim, "LipschitzMLP")
        sizes = [dim, *widths(hidden), dim]
        each = bound ** (1 / (len(sizes) - 1))
        self.layers = nn.ModuleList(SpectralLinear(a, b, each) for a, b in pairwise(sizes))
        self.activations = nn.ModuleList(LipSwish() for _ in sizes[1:-1])
        self.shift = context_shift(self.context_shape, sizes[1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_event(self, x, self.event_shape)
        return in_layers(self.layers, self.activations, x, shift_by(self, context))


class LipschitzConvNet(nn.Module):
    """Convolutions, 3x3 - 1x1 - 3x3, with a Lipschitz constant of at most ``bound``.

    Each is of norm at most ``bound^(1 / layers)``, with `LipSwish` between them.

    Shapes: ``(batch, *shape) -> (batch, *shape)``.

    Args:
        shape: channels, height and width.
        hidden: channels in between; each width after the first adds a 1x1 convolution.
        bound, context_dim: as in `LipschitzMLP`.
    """

    @checked
    def __init__(
        self,
        shape: ImageShape,
        hidden: Widths = (64, 64),
        bound: Contraction = 0.97,
        context_dim: ContextShape = None,
    ) -> None:
        super().__init__()
        self.event_shape = shape
        self.context_shape = vector_context(context_dim, "LipschitzConvNet")
        sizes = [shape[0], *widths(hidden), shape[0]]
        kernels = [3, *[1] * (len(sizes) - 3), 3]
        each = bound ** (1 / len(kernels))
        self.layers = nn.ModuleList(
            SpectralConv2d((a, *shape[1:]), b, kernel, each)
            for (a, b), kernel in zip(pairwise(sizes), kernels, strict=True)
        )
        self.activations = nn.ModuleList(LipSwish() for _ in sizes[1:-1])
        self.shift = context_shift(self.context_shape, sizes[1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_event(self, x, self.event_shape)
        shift = shift_by(self, context)
        shift = None if shift is None else shift[:, :, None, None]
        return in_layers(self.layers, self.activations, x, shift)


def in_layers(
    layers: nn.ModuleList, activations: nn.ModuleList, x: Tensor, shift: Tensor | None
) -> Tensor:
    """Layers with activations between them; the first one's output is shifted."""
    h = layers[0](x)
    h = h if shift is None else h + shift
    for layer, activation in zip(layers[1:], activations, strict=True):
        h = layer(activation(h))
    return h


def context_shift(shape: tuple[int] | None, width: int) -> nn.Module | None:
    """The linear layer that makes a shift of the first hidden layer from a context."""
    return None if shape is None else nn.Linear(shape[0], width, bias=False)


def shift_by(net: LipschitzMLP | LipschitzConvNet, context: Tensor | None) -> Tensor | None:
    """The shift for each row, or None."""
    if net.shift is None:
        return None
    if context is None:
        expected = describe(("batch", *(net.context_shape or ())))
        raise ShapeError(f"{type(net).__name__} expects a context of shape {expected}, got none.")
    return net.shift(context)


def check_event(net: nn.Module, x: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse rows of another shape: a convolution's norm is that for images of one size."""
    if tuple(x.shape[1:]) != shape:
        raise ShapeError(
            f"{type(net).__name__} expects shape {describe(('batch', *shape))}, "
            f"got {tuple(x.shape)}."
        )


def spectral_layers(net: nn.Module) -> list[SpectralNorm]:
    """All layers of a network whose norm is bounded."""
    return [module for module in net.modules() if isinstance(module, SpectralNorm)]


@contextmanager
def weights_made(net: nn.Module) -> Iterator[None]:
    """Inside of the block the network's bounded weights are made once, not at every call."""
    if torch.compiler.is_compiling():
        yield
        return
    token = _made.set({layer: layer.weight() for layer in spectral_layers(net)})
    try:
        yield
    finally:
        _made.reset(token)
