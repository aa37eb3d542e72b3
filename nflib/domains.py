"""Data that live on a part of R^D: positive numbers, an interval, a simplex.

A density on all of R^D wastes what it puts outside. A bijection from the domain to the reals at
the beginning of a flow keeps every sample inside:

    Flow(Compose(from_domain(constraints.positive), *layers), StandardNormal(4))

torch has these maps and their log-dets as ``torch.distributions.transforms``; any of them is a
layer here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from nflib.arguments import ArgumentError, checked, show
from nflib.cache import is_traced
from nflib.core import (
    Bijection,
    DataError,
    EventShape,
    ShapeError,
    check_finite,
    describe,
    is_known,
    sum_log_det,
    zeros_log_det,
)
from nflib.core.distributions import Held


class TorchTransform(Bijection):
    """Any one-to-one ``torch.distributions`` transform as a bijection from data to noise.

        z = T(x),    log|det| = T.log_abs_det_jacobian(x, T(x)), summed over the event

    ``ExpTransform().inv`` takes positive data to their logarithms. Tensors of the transform that
    want gradients become parameters, the others buffers. Cost: the transform's.

    Args:
        transform: from data to noise; ``.inv`` turns one around.

    Raises:
        ArgumentError: if the transform is not one to one.
        DataError: from ``check_data``, for data outside of the transform's domain.
    """

    @checked
    def __init__(self, transform: Transform) -> None:
        super().__init__()
        if not transform.bijective:
            raise ArgumentError(
                f"TorchTransform expects a transform that is one to one, got {show(transform)}."
            )
        self.held, self.domain = Held(transform), transform.domain
        self.event_shape = (..., *[None] * max(transform.domain.event_dim, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        transform = self.held.build()
        z = transform(x)
        return z, _log_det(transform, x, z)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        transform = self.held.build()
        x = transform.inv(z)
        return x, -_log_det(transform, x, z)

    def check_data(self, x: Tensor) -> None:
        """Refuse data outside of the transform's domain."""
        check_finite(x, "The data of TorchTransform")
        if not bool(self.domain.check(x.cpu()).all()):
            raise DataError(
                f"The data of TorchTransform must lie in its domain {self.domain}, got values from "
                f"{x.min().item():g} to {x.max().item():g}."
            )

    def output_shape(self, shape: EventShape | None) -> EventShape | None:
        return self._mapped(shape, "forward_shape")

    def input_shape(self, shape: EventShape | None) -> EventShape | None:
        return self._mapped(shape, "inverse_shape")

    def _mapped(self, shape: EventShape | None, method: str) -> EventShape | None:
        transform = self.held.build()
        sizes = (torch.Size([7, 7]), torch.Size([6, 6]))
        if shape is None or not is_known(shape):
            # Sizes that stay open pass where the transform keeps them.
            try:
                keeps = all(getattr(transform, method)(size) == size for size in sizes)
            except (ValueError, RuntimeError):  # sizes that a tensor of its own settles
                keeps = False
            return shape if keeps else None
        try:
            return tuple(getattr(transform, method)(torch.Size(shape)))
        except (ValueError, RuntimeError) as error:
            raise ShapeError(
                f"TorchTransform expects a shape that {self.held.kind.__name__} can take, "
                f"got {describe(shape)}: {error}."
            ) from error


def _log_det(transform: Transform, x: Tensor, z: Tensor) -> Tensor:
    if not is_traced() and x.shape[0] == 0:  # torch's own sum over an event takes no empty batch
        return zeros_log_det(x)
    return sum_log_det(transform.log_abs_det_jacobian(x, z))


@checked
def from_domain(constraint: Constraint) -> TorchTransform:
    """The bijection from a set of numbers to all of R^D that torch keeps for it.

    Args:
        constraint: of ``torch.distributions.constraints``: ``positive``, ``unit_interval``,
            ``interval(0.0, 5.0)``, ``simplex``, ``greater_than(2.0)``, ...

    Raises: ArgumentError if torch knows no map for it.
    """
    try:
        layer = TorchTransform(biject_to(constraint).inv)
    except NotImplementedError as error:
        raise ArgumentError(
            f"from_domain expects a constraint with a map to the reals, got {constraint}."
        ) from error
    # Torch composes its maps of parts that know less of where they begin.
    layer.domain = constraint
    return layer
