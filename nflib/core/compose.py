"""How layers combine: one after the other, and read backwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nflib.arguments import ArgumentError, show
from nflib.cache import made_ready
from nflib.core.layer import Layer, Result
from nflib.core.shapes import EventShape, NoCommonShape, ShapeError, describe, meet, zeros_log_det


class Compose(Layer):
    """Layers one after another: ``f = f_K o ... o f_1``, ``log_det = sum_k log_det_k``.

    Each log-det is taken at the point where its layer is applied. ``inverse`` runs the layers in
    reverse order. Bijections compose to a bijection; a stochastic layer among them, such as
    dequantization, makes the whole stochastic. Cost: the sum of the layers'. An empty composition
    is the identity.

    Args:
        layers: f_1 to f_K.

    Raises:
        ArgumentError: for what is no layer.
        ShapeError: if a layer does not take what the one before it returns, or if two of them
            expect contexts of different shapes.
    """

    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        for position, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise ArgumentError(
                    f"{type(self).__name__} expects layers (bijections or stochastic layers), "
                    f"got {show(layer)} at position {position}."
                )
        # Whoever goes through the layers takes this list: dynamo of torch 2.6 knows no other.
        self.bijections: Any = nn.ModuleList(layers)
        name = type(self).__name__
        self.event_shape, self._latent_shape = chain_shapes(name, layers)
        self.context_shape = common_context(name, layers)
        self.bijective = all(layer.bijective for layer in layers)
        self.exact_inverse = all(layer.exact_inverse for layer in layers)
        self.likelihood = weakest(self.bijections)

    @property
    def latent_shape(self) -> EventShape | None:
        return self._latent_shape

    def forward(self, x: Tensor, context: Tensor | None = None) -> Result:
        return in_turn(self.bijections, x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        return in_turn(self.bijections, z, context, inverse=True)

    def output_shape(self, shape: EventShape | None) -> EventShape | None:
        for layer in self.bijections:
            shape = layer.shape_after(shape)
        return shape

    def input_shape(self, shape: EventShape | None) -> EventShape | None:
        for layer in reversed(list(self.bijections)):
            shape = layer.shape_before(shape)
        return shape

    def check_data(self, x: Tensor) -> None:
        for first in list(self.bijections)[:1]:
            first.check_data(x)

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        for layer in self.bijections:
            layer.initialize(x, context)
            x, _ = layer(x, context)

    @torch.no_grad()
    def initialize_inverse(self, z: Tensor, context: Tensor | None = None) -> None:
        for layer in reversed(list(self.bijections)):
            layer.initialize_inverse(z, context)
            z, _ = layer.inverse(z, context)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.bijections)

    def __len__(self) -> int:
        return len(self.bijections)

    def __getitem__(self, index: int | slice) -> Layer:
        """One layer, or for a slice the `Compose` of those layers, sharing their parameters."""
        layers = list(self.bijections)
        return Compose(*layers[index]) if isinstance(index, slice) else layers[index]


class Inverse(Layer):
    """A bijection read backwards: its ``forward`` is the other's ``inverse``.

    Args:
        bijection: any layer that is one to one, a `Compose` of such layers included.

    Raises: ArgumentError for a stochastic layer, which has no inverse map.
    """

    def __init__(self, bijection: Layer) -> None:
        super().__init__()
        self.bijection = require_bijection("Inverse", bijection)
        self.event_shape = bijection.latent_shape
        self.context_shape = bijection.context_shape
        self.exact_inverse = bijection.exact_inverse
        self.likelihood = weakest(bijection)

    @property
    def latent_shape(self) -> EventShape | None:
        return self.bijection.event_shape

    def forward(self, x: Tensor, context: Tensor | None = None) -> Result:
        return self.bijection.inverse(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Result:
        return self.bijection(z, context)

    def output_shape(self, shape: EventShape | None) -> EventShape | None:
        return self.bijection.shape_before(shape)

    def input_shape(self, shape: EventShape | None) -> EventShape | None:
        return self.bijection.shape_after(shape)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        self.bijection.initialize_inverse(x, context)

    def initialize_inverse(self, z: Tensor, context: Tensor | None = None) -> None:
        self.bijection.initialize(z, context)


def in_turn(
    layers: Iterable[Layer], x: Tensor, context: Tensor | None, inverse: bool = False
) -> Result:
    """Apply layers one after the other, or their inverses in reverse order."""
    log_det = None
    joints = None if inverse else made_ready()
    after_joint = False
    for layer in reversed(list(layers)) if inverse else layers:
        if after_joint:
            after_joint = False  # the layer before did the work of both
            continue
        if joints is not None and layer in joints:
            layer.check_input(x, context)
            x, term = joints[layer](x)
            after_joint = True
        else:
            x, term = layer.inverse(x, context) if inverse else layer(x, context)
        log_det = term if log_det is None else log_det + term
    return x, zeros_log_det(x) if log_det is None else log_det


def weakest(*parts: nn.Module) -> str:
    """What a likelihood through all parts is: an estimate spoils a bound, that an exact value."""
    found = {getattr(module, "likelihood", "exact") for part in parts for module in part.modules()}
    return next(word for word in ("estimate", "lower bound", "exact") if word in found | {"exact"})


def require_bijection(name: str, layer: Layer) -> Layer:
    """The layer, if it is one to one; ``name`` is what asks for it."""
    if not isinstance(layer, Layer):
        raise ArgumentError(f"{name} expects a bijection, got {show(layer)}.")
    if not layer.bijective:
        stochastic = [m for m in layer.modules() if isinstance(m, Layer) and not m.bijective][-1]
        raise ArgumentError(
            f"{name} expects a bijection, got {type(layer).__name__}: "
            f"{type(stochastic).__name__} is stochastic and has no inverse map."
        )
    return layer


def chain_shapes(name: str, layers: Iterable[Layer]) -> tuple[EventShape | None, EventShape | None]:
    """The events that layers one after the other take, and what they make of them.

    Raises: ShapeError in one sentence at the first layer that does not take what reaches it.
    """
    layers = list(layers)
    shape: EventShape | None = None
    for position, layer in enumerate(layers):
        try:
            shape = meet(shape, layer.event_shape)
        except NoCommonShape:
            raise ShapeError(
                f"{name} expects each layer to take what the one before it returns, got "
                f"{type(layer).__name__} at position {position}, which takes "
                f"{describe(layer.event_shape)}, behind {describe(shape)}."
            ) from None
        shape = layer.shape_after(shape)
    latent = shape
    # Backwards what a later layer knows reaches the first one.
    for layer in reversed(layers):
        shape = meet(layer.shape_before(shape), layer.event_shape)
    return shape, latent


def common_context(name: str, parts: Iterable[object]) -> EventShape | None:
    """The shape of context that all parts which use one agree on.

    Raises: ShapeError if they do not agree.
    """
    found: EventShape | None = None
    first: object = None
    for part in parts:
        shape = getattr(part, "context_shape", None)
        if shape is None:
            continue
        try:
            found = meet(found, shape)
        except NoCommonShape:
            raise ShapeError(
                f"{name} expects one context for all of its parts, got {type(first).__name__} "
                f"for {describe(found)} and {type(part).__name__} for {describe(shape)}."
            ) from None
        first = first or part
    return found
