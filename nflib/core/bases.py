"""Base densities: where a flow's noise comes from."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nflib.arguments import EventSizes, checked
from nflib.core.shapes import EventShape, ShapeError, describe, sum_event


class BaseDensity(Protocol):
    """What `Flow` asks of a base: a flow, a mixture or any other model serves as well.

    ``rsample`` beside ``sample`` makes the flow's samples differentiable; an ``event_shape`` lets
    the flow check what it is given. A base that learns is an ``nn.Module``.
    """

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor: ...

    def sample(self, n: int, context: Tensor | None = None) -> Tensor: ...


class Base(nn.Module):
    """A base density over events of a given shape; it follows the model's device and dtype.

    A subclass writes ``log_prob(z, context)`` in nats, ``(batch,)``, and ``draw(n, generator)``.

    Args:
        shape: of an event, or the size of a vector.
    """

    anchor: Tensor
    context_shape: EventShape | None = None

    @checked
    def __init__(self, shape: EventSizes) -> None:
        super().__init__()
        assert isinstance(shape, tuple)  # which `checked` makes of it
        self.event_shape = shape
        self.register_buffer("anchor", torch.zeros(()), persistent=False)

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define log_prob(z, context).")

    def draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        """n events at temperature 1."""
        raise NotImplementedError(f"{type(self).__name__} does not define draw(n, generator).")

    def rsample(
        self,
        n: int,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw n events, ``(n, *event)``, all distances from the centre times the temperature."""
        z = self.draw(n, generator)
        return z if temperature == 1 else temperature * z

    def sample(self, n: int, context: Tensor | None = None, **options: Any) -> Tensor:
        """`rsample` without a graph."""
        with torch.no_grad():
            return self.rsample(n, context, **options)

    def check_input(self, z: Tensor) -> None:
        if tuple(z.shape[1:]) != self.event_shape:
            raise ShapeError(
                f"{type(self).__name__} expects shape {describe(('batch', *self.event_shape))}, "
                f"got {tuple(z.shape)}."
            )

    def extra_repr(self) -> str:
        return describe(self.event_shape) if len(self.event_shape) > 1 else f"{self.event_shape[0]}"


class StandardNormal(Base):
    """``log p(z) = -1/2 (|z|^2 + D log 2 pi)`` in nats, z ``(batch, *shape)``; cost O(D)."""

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_input(z)
        return log_normal(z)

    def draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        where, dtype = self.anchor.device, self.anchor.dtype
        shape = (n, *self.event_shape)
        return torch.randn(shape, generator=generator, device=where, dtype=dtype)


class StandardLogistic(Base):
    """Independent logistic coordinates: ``log p(z) = sum_i (-z_i - 2 softplus(-z_i))``; cost O(D).

    The base of NICE (Dinh et al. 2014, https://arxiv.org/abs/1410.8516).
    """

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_input(z)
        # |z| by symmetry: softplus then never sees a large positive argument.
        return -sum_event(z.abs() + 2 * nn.functional.softplus(-z.abs()))

    def draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        where, dtype = self.anchor.device, self.anchor.dtype
        shape = (n, *self.event_shape)
        u = torch.rand(shape, generator=generator, device=where, dtype=dtype)
        return u.clamp_min(torch.finfo(u.dtype).tiny).log() - (-u).log1p()


def log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I) of each row, in nats."""
    return -0.5 * (sum_event(z.square()) + z.shape[1:].numel() * math.log(2 * math.pi))
