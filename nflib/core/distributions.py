"""Any ``torch.distributions.Distribution`` as a base that moves, saves, learns and reparameterises.

A distribution holds plain tensors, which no module knows of. Here they become parameters (those
that want gradients) and buffers (the others), and the distribution is put together anew from them
for each use: its constructor computes from its arguments, a Cholesky factor say, and must see
their present values.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import (
    Distribution,
    Independent,
    MixtureSameFamily,
    TransformedDistribution,
    constraints,
)
from torch.distributions.transforms import ComposeTransform, Transform

from nflib.arguments import ArgumentError, checked
from nflib.core.shapes import ShapeError


class TorchBase(nn.Module):
    """A distribution over one event, seen as a base density.

    What of it is learned, are the leaf tensors with ``requires_grad`` that it was made of. One
    that has to stay in some range (a scale above zero) is learned through torch's map to it from
    all numbers, ``torch.distributions.biject_to``; one that may be any number is learned itself.

    Args:
        distribution: with an empty batch shape.

    Raises:
        ShapeError: if its batch shape is not empty.
        ArgumentError: if one of its tensors was computed from another that wants gradients.
    """

    @checked
    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        if distribution.batch_shape != torch.Size():
            raise ShapeError(
                "Flow expects a base with an empty batch shape (wrap it in "
                f"torch.distributions.Independent), got {tuple(distribution.batch_shape)}."
            )
        self.parts = Held(distribution)
        self.event_shape = tuple(distribution.event_shape)
        self.context_shape = None
        self.has_rsample = distribution.has_rsample

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.parts.build().log_prob(z)

    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        return self.parts.build().sample(torch.Size([n]))

    def rsample(self, n: int, context: Tensor | None = None) -> Tensor:
        if not self.has_rsample:
            raise ArgumentError(
                "Flow.rsample expects a base that can be reparameterised, got "
                f"{self.parts.extra_repr()}; sample draws from it without gradients."
            )
        return self.parts.build().rsample(torch.Size([n]))


class Held(nn.Module):
    """A distribution or transform whose tensors are a module's, and which is rebuilt from them."""

    def __init__(self, held: Distribution | Transform) -> None:
        super().__init__()
        self.kind = type(held)
        # What is no tensor and holds none.
        self.plain: dict[str, Any] = {}
        self.ranges: dict[str, Any] = {}
        self.template = None if isinstance(held, Distribution) else copy.copy(held)
        for name, value in _arguments(held).items():
            self._hold(name, value, getattr(held, "arg_constraints", {}).get(name))
        try:
            self.build()
        except Exception as error:
            raise ArgumentError(
                f"Flow expects a base that torch can make anew from its arguments, got "
                f"{self.kind.__name__} ({error}); write it as an nn.Module with log_prob, sample."
            ) from error

    def _hold(self, name: str, value: Any, constraint: Any) -> None:
        if isinstance(value, Distribution | Transform):
            self.add_module(name, Held(value))
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Transform):
            self.add_module(name, nn.ModuleList(Held(part) for part in value))
        elif not isinstance(value, Tensor):
            self.plain[name] = value
        elif not value.requires_grad:
            self.register_buffer(name, value.clone())
        else:
            leaf = self._leaf(name, value)
            if constraint is None or _is_free(constraint):
                # The user's own tensor, which then holds what was learned.
                leaf._is_param = True
                self.register_parameter(name, leaf)  # type: ignore[arg-type]
            else:
                free = _to_range(constraint).inv(leaf.detach())
                self.ranges[name] = constraint
                self.register_parameter(name, nn.Parameter(free))

    def _leaf(self, name: str, value: Tensor) -> Tensor:
        """The tensor that the user made, which the constructor may have expanded."""
        if value.is_leaf:
            return value
        origin = value._base
        if value._is_view() and origin is not None and origin.is_leaf:
            return origin
        if name in ("probs", "logits"):
            # The constructor normalises what it is given; to do so again changes nothing.
            return value.detach().clone().requires_grad_()
        raise ArgumentError(
            f"Flow expects a base whose learned tensors are leaves, got {self.kind.__name__} with "
            f"{name} computed from others; write the base as an nn.Module with log_prob and sample."
        )

    def build(self) -> Any:
        """The distribution (or transform) with the tensors as they are now."""
        found: dict[str, Any] = dict(self.plain)
        for name, tensor in (
            *self.named_parameters(recurse=False),
            *self.named_buffers(recurse=False),
        ):
            at = self.ranges.get(name)
            found[name] = tensor if at is None else _to_range(at)(tensor)
        for name, inner in self.named_children():
            found[name] = _built(inner)
        if self.template is not None:
            again = copy.copy(self.template)
            vars(again).update({"_inv": None} | found)
            return again
        make: Any = self.kind
        return make(**found, validate_args=False)

    def extra_repr(self) -> str:
        return self.kind.__name__


def _built(inner: nn.Module) -> Any:
    """What a `Held` holds, or what each of a list of them does."""
    if isinstance(inner, nn.ModuleList):
        return [_built(part) for part in inner]
    assert isinstance(inner, Held)  # nothing else is put there
    return inner.build()


# Where torch's combinations keep what their constructors were given.
_PLACES = {
    Independent: {
        "base_distribution": "base_dist",
        "reinterpreted_batch_ndims": "reinterpreted_batch_ndims",
    },
    MixtureSameFamily: {
        "mixture_distribution": "_mixture_distribution",
        "component_distribution": "_component_distribution",
    },
    TransformedDistribution: {"base_distribution": "base_dist", "transforms": "transforms"},
}

# Ways to say one thing, of which a constructor takes one.
_ONE_OF = (("probs", "logits"), ("covariance_matrix", "precision_matrix", "scale_tril"))


def _arguments(held: Distribution | Transform) -> dict[str, Any]:
    """What the constructor was given, as far as it is a tensor or holds one."""
    kind = type(held)
    if kind in _PLACES:
        return {name: getattr(held, place) for name, place in _PLACES[kind].items()}
    if isinstance(held, ComposeTransform):
        return {"parts": held.parts}
    if isinstance(held, Transform):
        # One that was turned around by .inv holds the other; the other only remembers it.
        back = "" if type(held).__name__ == "_InverseTransform" else "_inv"
        own = {k: v for k, v in vars(held).items() if k != back}
        return {k: v for k, v in own.items() if isinstance(v, Tensor | Transform)}
    own = vars(held)
    found = {name: own[name] for name in held.arg_constraints if name in own}
    for names in _ONE_OF:
        # The object holds the one that it was given, and others if somebody asked for them.
        given = [name for name in names if name in found]
        chosen = [n for n in given if found[n] is own.get("_param")] or given[:1]
        for name in given:
            if name not in chosen:
                del found[name]
    return found


def _to_range(constraint: Any) -> Transform:
    """torch's map from all numbers to those that a constraint allows."""
    try:
        return torch.distributions.biject_to(constraint)
    except NotImplementedError:  # of positive definite matrices, which a triangle makes
        return torch.distributions.transform_to(constraint)


def _is_free(constraint: Any) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint is constraints.real
