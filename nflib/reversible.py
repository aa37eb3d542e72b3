"""Training without keeping activations: the backward pass rebuilds them by the layers' inverses.

The memory of back-propagation is that of the activations of all layers. A bijection does not need
them: from the output of a layer its inverse gives the input, from that one more pass gives the
layer's graph, and its gradient is the output gradient of the layer before. Only one layer's graph
is alive at a time, so that the memory does not grow with the number of layers; the price is about
one more pass through each conditioner. Double back-propagation is not possible.

    flow = Flow(Reversible(*layers), base)      layers of one's own
    reversible.turn_on(models.glow(...))        a model that stands already

Gomez et al. 2017 (the reversible residual network), https://arxiv.org/abs/1707.04585.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nflib.arguments import checked
from nflib.core import Compose, Inverse, Layer, in_turn, sum_log_det
from nflib.coupling import Coupling
from nflib.mixer import AlongChannels
from nflib.multiscale import MultiScale


class NotReversibleError(ValueError):
    """A layer whose inverse does not give back its input to rounding; the message names it."""


class Reversible(Compose):
    """A `Compose` that keeps no activations for the backward pass but rebuilds them.

    Gradients are the same up to rounding, and so are the parameters' names. Dequantization and
    other stochastic layers at its beginning, which nothing can undo, run as they always do.

    Args:
        layers: as of `Compose`.

    Raises: NotReversibleError if a layer's inverse is not exact.
    """

    def __init__(self, *layers: Layer) -> None:
        super().__init__(*layers)
        steps = parts(self)
        count = next((k for k, layer in enumerate(steps) if layer.bijective), len(steps))
        for layer in steps[count:]:
            if reason := obstacle(layer):
                raise NotReversibleError(
                    "Reversible expects layers that are undone by their inverses, "
                    f"got {type(layer).__name__}: {reason}."
                )
        # Lists, and no modules of this one: they share the layers' parameters.
        self._noise, self._steps = steps[:count], steps[count:]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return in_turn(self.bijections, x, context)
        x, log_det = in_turn(self._noise, x, context)
        z, term = run(self._steps, x, context)
        return z, log_det + term

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return in_turn(self.bijections, z, context, inverse=True)
        x, log_det = run(self._steps, z, context, inverse=True)
        x, term = in_turn(self._noise, x, context, inverse=True)
        return x, log_det + term


class Replay(NamedTuple):
    """A layer's input, rebuilt from its output, and the layer's graph on it.

    Attributes:
        x: the input.
        outputs: the layer's output and log_det once more, now with a graph.
        leaves: the tensors at which this graph begins, besides parameters and context.
        join: makes the gradient for x from the gradients for the leaves.
    """

    x: Tensor
    outputs: tuple[Tensor, Tensor]
    leaves: tuple[Tensor, ...]
    join: Callable[..., Tensor]


def replay(layer: Layer, y: Tensor, context: Tensor | None, inverse: bool) -> Replay:
    """Rebuild the input of which ``forward`` (or ``inverse``) made y, and the graph on it.

    What any layer can do is one pass back without a graph, then one pass with it. Couplings and
    mixing layers do both together for less.
    """
    if isinstance(layer, Inverse):
        return replay(layer.bijection, y, context, not inverse)
    if isinstance(layer, Coupling):
        return _replay_coupling(layer, y, context, inverse)
    if isinstance(layer, AlongChannels):
        return _replay_along(layer, y, context, inverse)
    there, back = (layer.inverse, layer.forward) if inverse else (layer.forward, layer.inverse)
    with torch.no_grad():
        x = back(y, context)[0].detach()
    x.requires_grad_()
    return Replay(x, there(x, context), (x,), lambda gradient: gradient)


def _replay_coupling(layer: Coupling, y: Tensor, context: Tensor | None, inverse: bool) -> Replay:
    # The conditioner runs once for both ways: what it sees is the same before and after.
    kept, moved = layer.mask.split(y.detach())
    kept = kept.detach().requires_grad_()
    theta = layer.theta(kept, context)
    before, (moved, terms) = layer.elementwise.rebuild(moved, theta, inverse)
    outputs = layer.mask.merge(kept, moved), sum_log_det(terms)
    x = layer.mask.merge(kept.detach(), before.detach())
    # Of an image on a checkerboard what is kept has all pixels: merging drops the others.
    return Replay(x, outputs, (kept, before), layer.mask.merge)


def _replay_along(layer: AlongChannels, y: Tensor, context: Tensor | None, inverse: bool) -> Replay:
    again = replay(layer.bijection, *layer.rows(y, context), inverse)

    def join(*gradients: Tensor) -> Tensor:
        return layer.matrix(y, again.join(*gradients))

    return Replay(layer.matrix(y, again.x), layer.gather(y, *again.outputs), again.leaves, join)


def parts(layer: Layer) -> list[Layer]:
    """The layers that this one applies one after the other, compositions taken apart."""
    if isinstance(layer, Compose):
        return [part for inner in layer for part in parts(inner)]
    if isinstance(layer, AlongChannels):
        inner = parts(layer.bijection)
        return [type(layer)(part) for part in inner] if len(inner) > 1 else [layer]
    return [layer]


def obstacle(layer: nn.Module) -> str | None:
    """Why a layer cannot rebuild its input, in one sentence, or None if it can."""
    for module in layer.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return "its conditioner's dropout draws another network at each call"
        if not getattr(module, "exact_inverse", True):
            return f"{type(module).__name__} has no inverse that is exact to rounding"
    return None


@checked
def turn_on(model: nn.Module) -> nn.Module:
    """Make a model's compositions reversible, in place: all that hold no several-scale part.

    Raises: NotReversibleError if a layer cannot rebuild its input, or if there is no composition.
    """
    made: list[Reversible] = []

    def visit(parent: nn.Module) -> None:
        for name, child in parent.named_children():
            scales = any(isinstance(inner, MultiScale) for inner in child.modules())
            if isinstance(child, Compose) and not scales:
                made.append(Reversible(*child))
                setattr(parent, name, made[-1])
            else:
                visit(child)

    visit(model)
    if not made:
        raise NotReversibleError(
            f"turn_on expects a model with a Compose in it, got {type(model).__name__}."
        )
    return model


@contextmanager
def compiled_whole(is_on: bool = True) -> Iterator[None]:
    """Inside of the block ``torch.compile`` sees through the backward pass below.

    The first call of a compiled model belongs into it as well, for that is when torch compiles.
    Outside of it, and before torch had this setting, a compiled graph is left for a reversible
    composition once and entered again. `nflib.train.fit` does it where it compiles.
    """
    if not is_on:
        yield
        return
    from torch._dynamo import config

    known = hasattr(config, "trace_autograd_ops")
    with config.patch(trace_autograd_ops=True) if known else nullcontext():
        yield


def run(
    layers: Sequence[Layer], x: Tensor, context: Tensor | None, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """`nflib.core.in_turn`, whose backward pass rebuilds what it needs."""
    steps = [(layer, [p for p in layer.parameters() if p.requires_grad]) for layer in layers]
    unique = dict.fromkeys(p for _, parameters in steps for p in parameters)
    return _Rebuilt.apply(steps, inverse, x, context, *unique)


class _Rebuilt(torch.autograd.Function):
    """Layers as one operation, which keeps its output and nothing in between."""

    @staticmethod
    def forward(
        ctx: Any,
        steps: list[tuple[Layer, list[nn.Parameter]]],
        inverse: bool,
        x: Tensor,
        context: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        y, log_det = in_turn([layer for layer, _ in steps], x, context, inverse)
        ctx.steps, ctx.inverse, ctx.parameters = steps, inverse, parameters
        device = x.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.autocast = {"device_type": device, "dtype": dtype, "enabled": enabled}
        ctx.save_for_backward(y, context)
        return y, log_det

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, log_det_gradient: Tensor) -> tuple[Any, ...]:
        y, context = ctx.saved_tensors
        wants_context = context is not None and ctx.needs_input_grad[3]
        if context is not None:
            context = context.detach().requires_grad_(wants_context)
        sums: dict[Tensor, Tensor | None] = dict.fromkeys(ctx.parameters)
        context_gradient: Tensor | None = None
        for layer, parameters in ctx.steps if ctx.inverse else reversed(ctx.steps):
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                again = replay(layer, y, context, ctx.inverse)
            pairs = zip(again.outputs, (gradient, log_det_gradient), strict=True)
            # A log-det may be a constant, which has no graph.
            outputs = [(out, g) for out, g in pairs if out.requires_grad]
            asked = [*again.leaves, *([context] if wants_context else []), *parameters]
            found = list(
                torch.autograd.grad(
                    [out for out, _ in outputs], asked, [g for _, g in outputs], allow_unused=True
                )
            )
            at_leaves = [
                torch.zeros_like(leaf) if g is None else g
                for leaf, g in zip(again.leaves, found, strict=False)
            ]
            gradient, y = again.join(*at_leaves), again.x.detach()
            rest = found[len(again.leaves) :]
            if wants_context:
                context_gradient = _add(context_gradient, rest.pop(0))
            for parameter, g in zip(parameters, rest, strict=True):
                sums[parameter] = _add(sums[parameter], g)
        wanted = gradient if ctx.needs_input_grad[2] else None
        return None, None, wanted, context_gradient, *sums.values()


def _add(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    if total is None or term is None:
        return term if total is None else total
    return total + term
