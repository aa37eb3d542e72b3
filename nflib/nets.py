"""Conditioners: the networks inside a coupling. They need no inverse, so any network will do.

All are built as ``Net(inputs, outputs, ...)`` and called as ``net(x)`` or, with a context,
``net(x, context)``. The last layer starts at zero, so that the parameters which it predicts start
at zero and the coupling near the identity. A context is a vector of ``context_shape = (K,)`` or,
for the convolutional networks, an image ``(K, H, W)`` of the input's height and width.

Dropout acts while a model trains. Each call then draws another network, so ``inverse`` undoes
``forward`` in evaluation mode only, which is how `nflib.train.fit` leaves a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflib.arguments import (
    ArgumentError,
    ContextShape,
    Count,
    Rule,
    Share,
    Sides,
    Size,
    Widths,
    checked,
)
from nflib.core import EventShape, ShapeError, describe


def _activation(value: Any) -> Any:
    # Tried once: a layer of torch.nn that wants sizes says so far from here.
    if isinstance(value, nn.Module) or not isinstance(value(), nn.Module):
        raise TypeError
    return value


Activation = Annotated[
    Callable[[], nn.Module],
    Rule("a class of torch.nn, or a function, that makes an activation", _activation),
]


class MLP(nn.Module):
    """Fully connected: ``(batch, inputs) -> (batch, outputs)``.

    Args:
        inputs, outputs: numbers a row.
        hidden: widths of the hidden layers.
        context_dim: size of a context vector, which is appended to the input.
        dropout: share of hidden units that are dropped in training.
        activation: between the layers.
        weight_norm: learn direction and length of each unit's weights separately (Salimans and
            Kingma 2016, https://arxiv.org/abs/1602.07868).
    """

    @checked
    def __init__(
        self,
        inputs: Size,
        outputs: Size,
        hidden: Widths = (128, 128),
        context_dim: ContextShape = None,
        dropout: Share = 0.0,
        activation: Activation = nn.ReLU,
        weight_norm: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.inputs = "MLP", inputs
        self.context_shape = vector_context(context_dim, self.name)
        sizes = [inputs + (self.context_shape[0] if self.context_shape else 0), *widths(hidden)]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            linear = NormedLinear if weight_norm else nn.Linear
            layers += [linear(before, after), in_place(activation)]
            layers += [nn.Dropout(dropout)] if dropout else []
        self.layers = nn.Sequential(*layers, zero_init(nn.Linear(sizes[-1], outputs)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layers(_input(self, x, context, 2))


class ResidualMLP(nn.Module):
    """Fully connected with shortcuts: blocks ``h + W2 a(W1 a(h))`` of equal width.

    The conditioner of the neural spline flows (Durkan et al. 2019,
    https://arxiv.org/abs/1906.04032).

    Args:
        inputs, outputs: numbers a row.
        hidden: one block for each entry, all of the same width.
        context_dim, dropout, activation: as in `MLP`.
    """

    @checked
    def __init__(
        self,
        inputs: Size,
        outputs: Size,
        hidden: Widths = (128, 128),
        context_dim: ContextShape = None,
        dropout: Share = 0.0,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        width = equal_widths(hidden, "ResidualMLP")
        self.name, self.inputs = "ResidualMLP", inputs
        self.context_shape = vector_context(context_dim, self.name)
        self.first = nn.Linear(inputs + (self.context_shape[0] if self.context_shape else 0), width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                activation(),
                nn.Linear(width, width),
                activation(),
                nn.Dropout(dropout),
                nn.Linear(width, width),
            )
            for _ in widths(hidden)
        )
        self.last = nn.Sequential(activation(), zero_init(nn.Linear(width, outputs)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.first(_input(self, x, context, 2))
        for block in self.blocks:
            h = h + block(h)
        return self.last(h)


class _ImageInput(nn.Module):
    """The first convolution of a network, which also takes the context in.

    An image of context becomes further input channels, a vector shifts the hidden channels.
    """

    def __init__(
        self,
        name: str,
        inputs: int,
        width: int,
        shape: EventShape | None,
        weight_norm: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.inputs = name, inputs
        if shape is not None and len(shape) not in (1, 3):
            raise ArgumentError(
                f"{name} expects context_dim to be K or (K, height, width), got {tuple(shape)}."
            )
        self.context_shape = shape
        self.is_image = shape is not None and len(shape) == 3
        size = (shape[0] if shape else 0) or 0
        conv = NormedConv2d if weight_norm else nn.Conv2d
        self.conv = conv(inputs + (size if self.is_image else 0), width, 3, padding=1)
        self.shift = nn.Linear(size, width) if shape is not None and not self.is_image else None

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        if self.shift is None:
            return self.conv(_input(self, x, context, 4))
        h = self.conv(_input(self, x, None, 4))
        return h + self.shift(_context(self, context))[:, :, None, None]


class ConvNet(nn.Module):
    """Convolutions, 3x3 - 1x1 - 3x3, with ReLU between: ``(batch, inputs, H, W)``.

    The conditioner of Glow (Kingma and Dhariwal 2018, https://arxiv.org/abs/1807.03039).

    Args:
        inputs, outputs: channels.
        hidden: channels in between; each width after the first adds a 1x1 convolution.
        context_dim: size of a context vector, or shape ``(K, H, W)`` of an image of context.
        dropout: share of hidden values that are dropped in training.
    """

    @checked
    def __init__(
        self,
        inputs: Size,
        outputs: Size,
        hidden: Widths = 128,
        context_dim: ContextShape = None,
        dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        channels = widths(hidden)
        self.first = _ImageInput("ConvNet", inputs, channels[0], shape_of(context_dim))
        self.context_shape = self.first.context_shape
        layers: list[nn.Module] = [in_place(nn.ReLU)]
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 1), in_place(nn.ReLU)]
        last = zero_init(nn.Conv2d(channels[-1], outputs, 3, padding=1))
        self.rest = nn.Sequential(*layers, nn.Dropout(dropout), last)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.rest(self.first(x, context))


class ResidualConvNet(nn.Module):
    """Convolutional with shortcuts: blocks ``h + conv(relu(conv(relu(h))))``, 3x3, weight norm.

    The conditioner of RealNVP (Dinh et al. 2016, https://arxiv.org/abs/1605.08803), without the
    batch norm inside of it.

    Args:
        inputs, outputs: channels.
        hidden: one block for each entry, all of the same number of channels.
        context_dim, dropout: as in `ConvNet`.
        weight_norm: as in `MLP`.
    """

    @checked
    def __init__(
        self,
        inputs: Size,
        outputs: Size,
        hidden: Widths = (64, 64),
        context_dim: ContextShape = None,
        dropout: Share = 0.0,
        weight_norm: bool = True,
    ) -> None:
        super().__init__()
        width = equal_widths(hidden, "ResidualConvNet")
        shape = shape_of(context_dim)
        self.first = _ImageInput("ResidualConvNet", inputs, width, shape, weight_norm)
        self.context_shape = self.first.context_shape

        def conv() -> nn.Module:
            kind = NormedConv2d if weight_norm else nn.Conv2d
            return kind(width, width, 3, padding=1)

        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReLU(), conv(), nn.ReLU(), nn.Dropout(dropout), conv())
            for _ in widths(hidden)
        )
        self.last = nn.Sequential(nn.ReLU(), zero_init(nn.Conv2d(width, outputs, 1)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.first(x, context)
        for block in self.blocks:
            h = h + block(h)
        return self.last(h)


class GatedConvNet(nn.Module):
    """Blocks of a gated convolution and gated self-attention over all pixels, each normalised.

        h <- norm(h + a * sigmoid(b)),    (a, b) = conv(elu2(conv(elu2(h))))
        h <- norm(h + a * sigmoid(b)),    (a, b) = project(attention(h + positions))

    elu2 is ELU of h and of -h side by side. Cost of the attention: O((H W)^2). The conditioner of
    Flow++ (Ho et al. 2019, https://arxiv.org/abs/1902.00275).

    Args:
        inputs, outputs: channels.
        hidden: channels in between, a multiple of ``heads``; of a sequence all are equal, and each
            entry is a block.
        blocks: number of blocks.
        heads: of the attention; 0 leaves the attention out.
        size: height and width, if the attention shall know where a pixel is.
        context_dim, dropout: as in `ConvNet`.
    """

    @checked
    def __init__(
        self,
        inputs: Size,
        outputs: Size,
        hidden: Widths = 64,
        blocks: Size | None = None,
        heads: Count = 4,
        size: Sides | None = None,
        context_dim: ContextShape = None,
        dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        width = equal_widths(hidden, "GatedConvNet")
        if heads and width % heads:
            raise ArgumentError(
                f"GatedConvNet expects hidden to be a multiple of heads, got {width} and {heads}."
            )
        self.first = _ImageInput("GatedConvNet", inputs, width, shape_of(context_dim))
        self.context_shape = self.first.context_shape
        layers: list[nn.Module] = []
        for _ in range(blocks or len(widths(hidden))):
            layers.append(GatedConv(width, dropout))
            if heads:
                layers.append(GatedAttention(width, heads, size))
        self.blocks = nn.Sequential(*layers)
        self.last = zero_init(nn.Conv2d(width, outputs, 3, padding=1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.last(self.blocks(self.first(x, context)))


class GatedConv(nn.Module):
    """``norm(h + a * sigmoid(b))``, a and b from two 3x3 convolutions of h."""

    @checked
    def __init__(self, width: Size, dropout: Share = 0.0) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2 * width, width, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Conv2d(2 * width, 2 * width, 1)
        self.norm = nn.GroupNorm(1, width)

    def forward(self, h: Tensor) -> Tensor:
        inner = self.dropout(elu2(self.inner(elu2(h))))
        return self.norm(h + F.glu(self.outer(inner), 1))


class GatedAttention(nn.Module):
    """``norm(h + a * sigmoid(b))``, a and b from self-attention between all pixels."""

    @checked
    def __init__(self, width: Size, heads: Size, size: Sides | None = None) -> None:
        super().__init__()
        if width % heads:
            raise ArgumentError(
                f"GatedAttention expects width to be a multiple of heads, got {width} and {heads}."
            )
        self.heads = heads
        sides = () if size is None else widths(size)
        self.position = nn.Parameter(0.01 * torch.randn(1, width, *sides)) if sides else None
        self.query_key_value = nn.Conv2d(width, 3 * width, 1)
        self.outer = nn.Conv2d(width, 2 * width, 1)
        self.norm = nn.GroupNorm(1, width)

    def forward(self, h: Tensor) -> Tensor:
        placed = h if self.position is None else h + self.position
        # (batch, 3, heads, width / heads, pixels) -> three of (batch, heads, pixels, width / heads)
        parts = self.query_key_value(placed).flatten(2).unflatten(1, (3, self.heads, -1))
        query, key, value = parts.transpose(3, 4).unbind(1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(2, 3).flatten(1, 2).unflatten(2, h.shape[2:])
        return self.norm(h + F.glu(self.outer(mixed), 1))


class NormedLinear(nn.Linear):
    """A linear layer of which direction and length of each unit's weights are learned apart.

    Not torch's parametrization, of which no model can be pickled.
    """

    @checked
    def __init__(self, inputs: Size, outputs: Size) -> None:
        super().__init__(inputs, outputs)
        _take_weight_apart(self)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, normed_weight(self), self.bias)


class NormedConv2d(nn.Conv2d):
    """The same for a convolution: one length for each output channel."""

    @checked
    def __init__(self, inputs: Size, outputs: Size, kernel: Size, padding: Count = 0) -> None:
        super().__init__(inputs, outputs, kernel, padding=padding)
        _take_weight_apart(self)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, normed_weight(self), self.bias)


def _take_weight_apart(layer: nn.Linear | nn.Conv2d) -> None:
    weight = layer.weight.detach()
    del layer.weight
    layer.length = nn.Parameter(torch.norm_except_dim(weight))
    layer.direction = nn.Parameter(weight)


def normed_weight(layer: nn.Module) -> Tensor:
    """``W = g v / |v|``, |v| over the inputs of each output."""
    return torch._weight_norm(layer.direction, layer.length)  # type: ignore[arg-type]


# Networks that take a context in at their first layer, and say their name when it does not fit.
_First = MLP | ResidualMLP | _ImageInput


def _input(net: _First, x: Tensor, context: Tensor | None, dims: int) -> Tensor:
    """x of so many dims, with a context of as many beside it."""
    if x.ndim != dims or x.shape[1] != net.inputs:
        expected = ("batch", net.inputs, "height", "width")[:dims]
        raise ShapeError(f"{net.name} expects shape {describe(expected)}, got {tuple(x.shape)}.")
    if net.context_shape is None or len(net.context_shape) != dims - 1:
        return x
    context = _context(net, context)
    if context.shape[2:] != x.shape[2:]:
        raise ShapeError(
            f"{net.name} expects an image of context of its input's size {tuple(x.shape[2:])}, "
            f"got {tuple(context.shape[2:])}."
        )
    return torch.cat([x, context], 1)


def _context(net: _First, context: Tensor | None) -> Tensor:
    shape = ("batch", *(net.context_shape or ()))
    if context is None:
        raise ShapeError(f"{net.name} expects a context of shape {describe(shape)}, got none.")
    return context


def in_place(activation: Activation) -> nn.Module:
    """An activation right behind a linear layer, which needs its own output no more."""
    return nn.ReLU(inplace=True) if activation is nn.ReLU else activation()


def elu2(h: Tensor) -> Tensor:
    """ELU of h and of -h, twice the channels: no direction of h is flattened."""
    return F.elu(torch.cat([h, -h], 1))


def zero_init(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    """The layer with weights and bias set to zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def widths(hidden: int | Sequence[int]) -> tuple[int, ...]:
    """What `Widths` stands for: of one number two hidden layers."""
    return (hidden, hidden) if isinstance(hidden, int) else tuple(hidden)


def shape_of(context_dim: int | EventShape | None) -> EventShape | None:
    """The shape of one row of context, of its size or its shape."""
    return (context_dim,) if isinstance(context_dim, int) else context_dim


def vector_context(context_dim: int | EventShape | None, name: str) -> tuple[int] | None:
    """The shape of a context vector, from its size or its shape."""
    shape = shape_of(context_dim)
    if shape is None:
        return None
    if len(shape) != 1:
        raise ArgumentError(f"{name} expects context_dim to be the size of a vector, got {shape}.")
    return (shape[0],)


def equal_widths(hidden: int | Sequence[int], name: str) -> int:
    """The common width of the hidden layers of a residual network."""
    found = set(widths(hidden))
    if len(found) != 1:
        raise ArgumentError(f"{name} expects hidden layers of one width, got {widths(hidden)}.")
    return found.pop()
