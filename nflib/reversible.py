"""Training without keeping activations: the backward pass rebuilds them by the layers' inverses.

The memory of back-propagation is that of the activations of all layers. A bijection does not need
them: from the output of a layer its inverse gives the input, from that one more pass gives the
layer's graph, and its gradient is the output gradient of the layer before. Only one layer's graph
is alive at a time, so that the memory does not grow with the number of layers; the price is about
one more pass through each conditioner. Double back-propagation is not possible.

    flow = Flow(Compose(*layers, memory="reversible"), base)      layers of one's own
    reversible.turn_on(models.glow(...))                          a model that stands already

Gomez et al. 2017 (the reversible residual network), https://arxiv.org/abs/1707.04585.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from nflib.core import Bijection


class NotReversibleError(ValueError):
    """A layer whose inverse does not give back its input to rounding; the message names it."""


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


def replay(layer: Bijection, y: Tensor, context: Tensor | None, inverse: bool) -> Replay:
    """What any layer can do: one pass back without a graph, then one pass with it."""
    x, outputs = undo(layer.forward, layer.inverse, inverse, y, context)
    return Replay(x, outputs, (x,), lambda gradient: gradient)


def undo(
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor]],
    inverse: bool,
    y: Tensor,
    *given: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The x with ``forward(x, *given)[0] = y``, a leaf, and ``forward(x, *given)`` with a graph.

    Read backwards, with ``inverse``, it is the x of which ``backward`` makes y.
    """
    there, back = (backward, forward) if inverse else (forward, backward)
    with torch.no_grad():
        x = back(y, *given)[0].detach()
    x.requires_grad_()
    return x, there(x, *given)


def obstacle(layer: nn.Module) -> str | None:
    """Why a layer cannot rebuild its input, in one sentence, or None if it can."""
    for module in layer.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return "its conditioner's dropout draws another network at each call"
        if not getattr(module, "exact_inverse", True):
            return f"{type(module).__name__} has no inverse that is exact to rounding"
    return None


def check_reversible(layers: Iterable[nn.Module]) -> None:
    """Raise `NotReversibleError` at the first layer that cannot rebuild its input."""
    for layer in layers:
        if reason := obstacle(layer):
            raise NotReversibleError(
                "memory='reversible' expects layers that are undone by their inverses, "
                f"got {type(layer).__name__}: {reason}."
            )


def turn_on(model: nn.Module) -> nn.Module:
    """Make a model's compositions reversible, in place: all that hold no several-scale part.

    Dequantization at the start of a composition, which nothing can undo, runs as it always does.

    Raises: NotReversibleError if a layer cannot rebuild its input, or if there is no composition.
    """
    from nflib.core import Compose
    from nflib.multiscale import MultiScale

    found: list[Compose] = []

    def visit(module: nn.Module) -> None:
        scales = any(isinstance(inner, MultiScale) for inner in module.modules())
        if isinstance(module, Compose) and not scales:
            found.append(module)
        else:
            for child in module.children():
                visit(child)

    visit(model)
    if not found:
        raise NotReversibleError(
            f"turn_on expects a model with a Compose in it, got {type(model).__name__}."
        )
    for composition in found:
        composition.set_memory("reversible")
    return model


def let_compiler_trace() -> None:
    """Let ``torch.compile`` see through the backward pass below; before torch had this setting it
    leaves the compiled graph for a reversible composition once and comes back."""
    from torch._dynamo import config

    if hasattr(config, "trace_autograd_ops"):
        config.trace_autograd_ops = True


def run(
    layers: Sequence[Bijection], x: Tensor, context: Tensor | None, inverse: bool = False
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
        steps: list[tuple[Bijection, list[nn.Parameter]]],
        inverse: bool,
        x: Tensor,
        context: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        from nflib.core import in_turn

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
                again = layer.replay(y, context, ctx.inverse)
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
