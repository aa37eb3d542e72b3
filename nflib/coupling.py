"""Coupling: one part of the event decides how the other part is moved.

    x = (x_A, x_B),    z_A = x_A,    z_B = tau(x_B; theta(x_A)),    log|det| = sum_j log tau'_j

The Jacobian is triangular in blocks, whatever network computes theta: it is never inverted, only
run again. A mask says which part is which; all masks of nflib are here.
Dinh et al. 2014 (NICE), https://arxiv.org/abs/1410.8516, and 2016 (RealNVP),
https://arxiv.org/abs/1605.08803. `Injector` is the case in which a context decides alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nflib import precision
from nflib.arguments import ArgumentError, ContextShape, Positive, Size, checked, show
from nflib.core import Bijection, EventShape, ShapeError, sum_log_det
from nflib.core.values import within
from nflib.elementwise import Elementwise

# Builds a conditioner for so many inputs and outputs: a class of nflib.nets, or a partial of one.
Network = Callable[[int, int], nn.Module]


class Mask(nn.Module):
    """Which entries a coupling keeps (and shows to its conditioner) and which it moves.

    Attributes:
        event_shape: the events it splits.
        inputs: how many numbers, or channels, the conditioner sees.
        outputs: for how many numbers, or channels, it predicts parameters.
    """

    event_shape: EventShape | None
    inputs: int
    outputs: int

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the conditioner sees, and the entries that are moved."""
        raise TypeError(f"{type(self).__name__} does not define split(x).")

    def select(self, parameters: Tensor) -> Tensor:
        """The conditioner's ``(batch, count, outputs, ...)`` at the entries that are moved."""
        return parameters

    def merge(self, kept: Tensor, moved: Tensor) -> Tensor:
        """The event of these two parts: undoes `split`."""
        raise TypeError(f"{type(self).__name__} does not define merge(kept, moved).")

    def kept(self, *shape: int) -> Tensor:
        """A picture of the mask: a boolean tensor of the event's shape, True where x is kept."""
        kept, moved = self.split(torch.zeros(1, *shape))
        return self.merge(kept, moved + 1)[0] == 0


class DimensionMask(Mask):
    """Keeps some entries along the first event dim: numbers of a vector, or channels of an image.

    Args:
        keep: one truth value for each entry; some, but not all of them true.
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(self, keep: Sequence[bool] | Tensor) -> None:
        super().__init__()
        flags = keep if isinstance(keep, Tensor) else torch.tensor(_flags(keep))
        if flags.dtype != torch.bool or flags.ndim != 1 or flags.all() or not flags.any():
            raise ArgumentError(
                "DimensionMask expects keep to hold a truth value for each dimension, some true "
                f"and some false, got {show(flags.tolist())}."
            )
        self.dim, self.inputs = len(flags), int(flags.sum())
        self.outputs = self.dim - self.inputs
        self.event_shape = (self.dim, ...)
        order = torch.cat([flags.nonzero()[:, 0], (~flags).nonzero()[:, 0]])
        # Two contiguous parts need no indexing; which of the two is kept decides their order.
        self.contiguous = bool((flags[1:] != flags[:-1]).sum() == 1)
        self.first = bool(flags[0])
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("inverse_order", order.argsort(), persistent=False)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim < 2 or x.shape[1] != self.dim:
            raise ShapeError(
                f"DimensionMask expects shape (batch, {self.dim}, ...), got {tuple(x.shape)}."
            )
        if not self.contiguous:
            x = x.index_select(1, self.order)
        if self.contiguous and not self.first:
            moved, kept = x.split_with_sizes([self.outputs, self.inputs], 1)
        else:
            kept, moved = x.split_with_sizes([self.inputs, self.outputs], 1)
        return kept, moved

    def merge(self, kept: Tensor, moved: Tensor) -> Tensor:
        if self.contiguous:
            return torch.cat([kept, moved] if self.first else [moved, kept], 1)
        return torch.cat([kept, moved], 1).index_select(1, self.inverse_order)

    def extra_repr(self) -> str:
        return f"{self.dim}, keeps {self.order[: self.inputs].tolist()}"


class CheckerboardMask(Mask):
    """Keeps every other pixel of an image, all of its channels, like the black squares of a board.

    The conditioner sees the image with zeros where pixels are moved, so that its convolutions keep
    their geometry; only the moved pixels are passed on to the elementwise map. Any height and
    width that give both colours a pixel.

    Args:
        channels, height, width: of the image.
        flip: keep the other colour.
    """

    keep: Tensor
    index: Tensor

    @checked
    def __init__(self, channels: Size, height: Size, width: Size, *, flip: bool = False) -> None:
        super().__init__()
        if height * width < 2:
            raise ArgumentError(
                "CheckerboardMask expects images of at least two pixels, "
                f"got shape {(channels, height, width)}."
            )
        self.event_shape = (channels, height, width)
        self.inputs = self.outputs = channels
        self.flip = flip
        parity = torch.arange(height)[:, None] + torch.arange(width)
        keep = (parity % 2 == 0) != flip
        self.register_buffer("keep", keep.float(), persistent=False)
        index = (~keep).flatten().nonzero()[:, 0]
        self.register_buffer("index", index, persistent=False)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.keep, x.flatten(2).index_select(2, self.index)

    def select(self, parameters: Tensor) -> Tensor:
        return parameters.flatten(3).index_select(3, self.index)

    def merge(self, kept: Tensor, moved: Tensor) -> Tensor:
        return kept.flatten(2).index_copy(2, self.index, moved).view(kept.shape)

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.event_shape or ()))}, flip={self.flip}"


@checked
def halves(dim: Size, flip: bool = False) -> DimensionMask:
    """Keeps the first half of a vector's numbers or an image's channels; flipped, the second.

    Of an odd number the kept part is the larger one.
    """
    _two("halves", dim)
    index = torch.arange(dim)
    return DimensionMask(index >= dim // 2 if flip else index < dim - dim // 2)


@checked
def alternating(dim: Size, flip: bool = False) -> DimensionMask:
    """Keeps the numbers (or channels) 0, 2, 4, ...; flipped, 1, 3, 5, ..."""
    _two("alternating", dim)
    return DimensionMask((torch.arange(dim) % 2 == 0) != flip)


@checked
def channels(count: Size, flip: bool = False) -> DimensionMask:
    """Keeps the first half of an image's channels; flipped, the second. The same as `halves`."""
    _two("channels", count)
    return halves(count, flip)


@checked
def checkerboard(
    channels: Size, height: Size, width: Size, *, flip: bool = False
) -> CheckerboardMask:
    """Keeps every other pixel of an image, see `CheckerboardMask`."""
    return CheckerboardMask(channels, height, width, flip=flip)


def _two(name: str, dim: int) -> None:
    if dim < 2:
        raise ArgumentError(
            f"{name} expects at least 2 numbers, to keep some and move some, got 1."
        )


def _flags(keep: Sequence[bool]) -> list[bool]:
    if not isinstance(keep, Sequence) or isinstance(keep, str):
        raise ArgumentError(
            f"DimensionMask expects keep to be a sequence of truth values, got {show(keep)}."
        )
    return list(keep)


class Coupling(Bijection):
    """``z_A = x_A, z_B = tau(x_B; theta(x_A, context))``: any mask, map and conditioner.

        log|det| = sum over B of log tau'

    Both directions cost one pass of the conditioner and one of the elementwise map. Works on
    vectors and images alike: what the mask splits, the conditioner must take.

    Args:
        mask: `halves`, `alternating`, `channels` or `checkerboard`.
        elementwise: the map tau, e.g. `nflib.elementwise.Affine()`.
        network: builds the conditioner from its numbers of inputs and outputs: `nflib.nets.MLP`,
            ``partial(ConvNet, hidden=64)``, or a function of your own. The conditioner is called
            as ``net(x_A)``, or ``net(x_A, context)`` if it has a ``context_shape``.
        limit: the conditioner sees ``x_A`` clamped to [-limit, limit]. Data that are normalized
            before the coupling never come near it, and the map stays as invertible as it was; but
            a rare noise vector whose image leaves the range of the data can no longer be thrown
            further out by one coupling after the other.

    Raises:
        ShapeError: if the conditioner returns another shape than the map's parameters have.
    """

    @checked
    def __init__(
        self, mask: Mask, elementwise: Elementwise, network: Network, *, limit: Positive = math.inf
    ) -> None:
        super().__init__()
        self.mask, self.elementwise, self.limit = mask, elementwise, limit
        outputs = elementwise.count * mask.outputs
        self.conditioner = _built("Coupling", network, mask.inputs, outputs)
        self.is_wide = precision.is_wide(precision.matrices_of(self.conditioner))
        self.event_shape = mask.event_shape
        self.context_shape = getattr(self.conditioner, "context_shape", None)
        self.exact_inverse = elementwise.exact_inverse

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, moved = self.mask.split(x)
        moved, terms = self.elementwise.forward(moved, self.theta(kept, context))
        return self.mask.merge(kept, moved), sum_log_det(terms)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, moved = self.mask.split(z)
        moved, terms = self.elementwise.inverse(moved, self.theta(kept, context))
        return self.mask.merge(kept, moved), sum_log_det(terms)

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Hand what the conditioner sees to its own ``initialize``, if it has one.

        A `nflib.kernels.KernelConditioner` has; it is called as the conditioner is.
        """
        self._initialize(x, context)

    @torch.no_grad()
    def initialize_inverse(self, z: Tensor, context: Tensor | None = None) -> None:
        # Kept is kept: the conditioner sees the same part in both directions.
        self._initialize(z, context, inverse=True)

    def _initialize(self, x: Tensor, context: Tensor | None, inverse: bool = False) -> None:
        initialize = getattr(self.conditioner, "initialize", None)
        if initialize is not None:
            self.check_input(x, context, inverse)
            seen = within(self.mask.split(x)[0], self.limit)
            initialize(seen, *([] if self.context_shape is None else [context]))

    def extra_repr(self) -> str:
        limit = "" if math.isinf(self.limit) else f", limit={self.limit:g}"
        return f"{self.elementwise!r}{limit}"

    def theta(self, kept: Tensor, context: Tensor | None) -> Tensor:
        """What the conditioner makes of the kept part, ``(batch, count, *moved)``.

        The conditioner's bfloat16, if any, ends here, see `nflib.precision`.
        """
        net, count = self.conditioner, self.elementwise.count
        seen = within(kept, self.limit)
        with precision.of_network(self.is_wide, kept):
            raw = net(seen) if self.context_shape is None else net(seen, context)
        shape = kept.shape[0], count, self.mask.outputs, *kept.shape[2:]
        return self.mask.select(_parameters("Coupling", raw, kept, shape))


class Injector(Bijection):
    """``z = tau(x; theta(context))``: every entry is moved, and the context alone says how.

        log|det| = sum over all entries of log tau'

    A coupling can use a context only by way of a network that also reads half of x, and only for
    the other half. Here what the context knows, a mean and a spread say, reaches all entries at
    once. Both directions cost one pass of the conditioner and one of the elementwise map. Lugmayr
    et al. 2020 (SRFlow, the affine injector: tau is `Affine`), https://arxiv.org/abs/2006.14200.

    Args:
        channels: of an image that has the height and width of an image of context; of a vector,
            if the context is one, its size.
        elementwise: the map tau, e.g. `nflib.elementwise.Affine()`.
        network: builds the conditioner from its numbers of inputs (of the context) and outputs,
            as for a `Coupling`; it is called as ``net(context)``.
        context_dim: size of the context vector, or shape ``(K, H, W)`` of the image of context.

    Raises:
        ArgumentError: if there is no context_dim, or network builds no module.
        ShapeError: if the conditioner returns another shape than the map's parameters have.
    """

    @checked
    def __init__(
        self, channels: Size, elementwise: Elementwise, network: Network, context_dim: ContextShape
    ) -> None:
        super().__init__()
        if context_dim is None:
            raise ArgumentError("Injector expects a context_dim, got None.")
        shape = (context_dim,) if isinstance(context_dim, int) else context_dim
        self.elementwise, self.context_shape = elementwise, shape
        self.event_shape = (channels, *shape[1:])
        self.conditioner = _built("Injector", network, shape[0], elementwise.count * channels)
        self.is_wide = precision.is_wide(precision.matrices_of(self.conditioner))
        self.exact_inverse = elementwise.exact_inverse

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, terms = self.elementwise.forward(x, self.theta(context))
        return z, sum_log_det(terms)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, terms = self.elementwise.inverse(z, self.theta(context))
        return x, sum_log_det(terms)

    def extra_repr(self) -> str:
        return f"{self.elementwise!r}"

    def theta(self, context: Tensor | None) -> Tensor:
        """What the conditioner makes of the context, ``(batch, count, *event)``."""
        assert context is not None  # the check of the input asked for it
        with precision.of_network(self.is_wide, context):
            raw = self.conditioner(context)
        shape = context.shape[0], self.elementwise.count, *(self.event_shape or ())
        return _parameters("Injector", raw, context, shape)


def _built(name: str, network: Network, inputs: int, outputs: int) -> nn.Module:
    """The conditioner that a function builds, which is a module."""
    conditioner: Any = network(inputs, outputs)
    if not isinstance(conditioner, nn.Module):
        raise ArgumentError(
            f"{name} expects network to build an nn.Module from its numbers of inputs and "
            f"outputs, got {show(conditioner)} from it."
        )
    return conditioner


def _parameters(name: str, raw: Any, like: Tensor, shape: tuple[Any, ...]) -> Tensor:
    """What a conditioner returned, ``(batch, count outputs, ...)``, with a dim for the count."""
    n, count, outputs, *rest = shape
    if not isinstance(raw, Tensor) or raw.shape != (n, count * outputs, *rest):
        raise ShapeError(
            f"{name} expects its conditioner to return shape {(n, count * outputs, *rest)}, "
            f"got {show(raw)}."
        )
    return raw.to(like.dtype).reshape(shape)
