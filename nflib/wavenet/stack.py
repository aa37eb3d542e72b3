"""The network of WaveNet: causal convolutions whose reach doubles from layer to layer.

    h_0[t] = A x[t-1]
    a, b   = W_l * h_{l-1} + V_l c                      (a convolution of dilation d_l)
    g_l    = tanh(a) sigmoid(b)
    h_l    = h_{l-1} + R_l g_l,    s = sum_l S_l g_l
    output = E relu(D relu(s))

What comes out at position t has seen ``x[t-1]`` and earlier samples only.
Van den Oord et al. 2016 (WaveNet), https://arxiv.org/abs/1609.03499; activations kept from step to
step: Le Paine et al. 2016 (Fast WaveNet), https://arxiv.org/abs/1611.09482.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflib.arguments import ContextShape, Count, Size, checked, show, whole
from nflib.core import ShapeError
from nflib.nets import vector_context

# Of one tap a layer would see nothing new.
Taps = Annotated[int, whole(2)]


class CausalStack(nn.Module):
    """``(batch, inputs, length) -> (batch, outputs, length)``; output t sees inputs before t.

    Layer l has dilation 1, 2, 4, ..., 2^(layers-1), and this ``blocks`` times over. Before the
    beginning all activations are zero. Cost: one pass, all positions at once.

    Args:
        inputs, outputs: numbers a position.
        channels: width of the residual path; the gates have twice as many.
        skip: width of the sum over the layers and of the output network.
        layers: layers in a block.
        blocks: how often the dilations start again at 1.
        kernel: taps of each dilated convolution, at least 2.
        context_dim: size of a context vector, which shifts both halves of every gate at all
            positions.
    """

    @checked
    def __init__(
        self,
        inputs: Size,
        outputs: Size,
        channels: Size = 32,
        skip: Size = 64,
        layers: Size = 10,
        blocks: Size = 1,
        kernel: Taps = 2,
        context_dim: ContextShape = None,
    ) -> None:
        super().__init__()
        self.inputs, self.channels, self.kernel = inputs, channels, kernel
        self.context_shape = vector_context(context_dim, "CausalStack")
        self.dilations = [2**layer for layer in range(layers)] * blocks
        depth = len(self.dilations)
        self.first = nn.Conv1d(inputs, channels, 1)
        self.gates = nn.ModuleList(
            nn.Conv1d(channels, 2 * channels, kernel, dilation=d) for d in self.dilations
        )
        # The last layer's residual would lead nowhere.
        self.residuals = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(depth - 1))
        self.skip = nn.Conv1d(depth * channels, skip, 1)
        self.last = nn.Sequential(
            nn.ReLU(), nn.Conv1d(skip, skip, 1), nn.ReLU(), nn.Conv1d(skip, outputs, 1)
        )
        self.context: nn.Linear | None = None
        if self.context_shape is not None:
            self.context = nn.Linear(*self.context_shape, depth * 2 * channels, bias=False)

    @property
    def receptive_field(self) -> int:
        """How many samples before t reach the output at t: ``1 + (kernel - 1) sum_l d_l``."""
        return 1 + (self.kernel - 1) * sum(self.dilations)

    def shifts(self, context: Tensor | None) -> list[Tensor | None]:
        """What the context adds to each layer's gates, ``(batch, 2 channels)`` each."""
        if self.context is None:
            return [None] * len(self.dilations)
        if context is None or context.ndim != 2 or context.shape[1:] != self.context_shape:
            got = "none" if context is None else tuple(context.shape)
            raise ShapeError(
                f"CausalStack expects a context of shape (batch, {self.context.in_features}), "
                f"got {got}."
            )
        return list(self.context(context).chunk(len(self.dilations), 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if x.ndim != 3 or x.shape[1] != self.inputs or x.shape[2] < 1:
            raise ShapeError(
                f"CausalStack expects shape (batch, {self.inputs}, length), got {tuple(x.shape)}."
            )
        # Delayed by one sample: what is predicted is not among what is seen.
        h = self.first(F.pad(x, (1, 0))[..., :-1])
        gated: list[Tensor] = []
        for layer, (dilation, shift) in enumerate(
            zip(self.dilations, self.shifts(context), strict=True)
        ):
            both = self.gates[layer](F.pad(h, ((self.kernel - 1) * dilation, 0)))
            if shift is not None:
                both = both + shift.unsqueeze(2)
            a, b = both.chunk(2, 1)
            gated.append(torch.tanh(a) * torch.sigmoid(b))
            if layer < len(self.residuals):
                h = h + self.residuals[layer](gated[-1])
        # The sum of all skip connections is one convolution of the gates' outputs side by side.
        return self.last(self.skip(torch.cat(gated, 1)))


class CachedSteps:
    """A `CausalStack` position by position, each activation computed once.

    ``step(x)`` takes the samples at t-1, ``(inputs, batch)``, and returns the outputs at t,
    ``(outputs, batch)``; the first call takes zeros.

    Everything is allocated, and every weight reshaped, when the object is made; a step writes into
    what is there. Features come first, ``(features, batch)``, so that no product needs a
    transposition. Without gradients. Cost: one position's share of `CausalStack.forward` a step.

    Args:
        stack: the network; its weights are copied, later changes have no effect.
        batch: rows that are computed together.
        context: ``(batch, K)`` if the stack is conditional.
    """

    @torch.no_grad()
    @checked
    def __init__(self, stack: CausalStack, batch: Count, context: Tensor | None = None) -> None:
        if context is not None and stack.context is not None and len(context) != batch:
            raise ShapeError(
                f"CachedSteps expects a row of context for each of the {batch} rows of its batch, "
                f"got {show(context)}."
            )
        self.first, self.first_bias = _matrix(stack.first, batch)
        channels, depth = stack.channels, len(stack.dilations)
        # What the gates return lies side by side, for one product serves all skip connections. A
        # row of ones under each takes the residual's bias into the residual's product.
        gated = self.first_bias.new_ones(depth, channels + 1, batch)
        self.all_gated, self.gated = gated.flatten(0, 1), gated.unbind()
        sums = self.first_bias.new_zeros(2 * channels, batch)
        self.gates = [
            _GateSteps(gate, dilation, shift, sums, rows[:channels])
            for gate, dilation, shift, rows in zip(
                stack.gates, stack.dilations, stack.shifts(context), gated, strict=True
            )
        ]
        self.residuals = [torch.cat(_matrix(r, 1), 1) for r in stack.residuals]
        skip, self.skip_bias = _matrix(stack.skip, batch)
        spaced = skip.new_zeros(len(skip), depth, channels + 1)  # nothing of the rows of ones
        spaced[:, :, :channels] = skip.unflatten(1, (depth, channels))
        self.skip = spaced.flatten(1)
        self.output = [_matrix(layer, batch) for layer in (stack.last[1], stack.last[3])]
        self.hidden = [torch.zeros_like(bias) for bias in (self.skip_bias, self.output[0][1])]
        self.result = torch.zeros_like(self.output[1][1])
        self.h = [torch.zeros_like(self.first_bias) for _ in range(2)]
        self.t = 0

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """Outputs at the next position, ``(outputs, batch)``, valid until the next step."""
        h, spare = self.h
        torch.addmm(self.first_bias, self.first, x, out=h)
        for layer, gate in enumerate(self.gates):
            gate.step(self.t, h)
            if layer < len(self.residuals):
                torch.addmm(h, self.residuals[layer], self.gated[layer], out=spare)
                h, spare = spare, h
        self.t += 1
        (middle, middle_bias), (last, last_bias) = self.output
        torch.addmm(self.skip_bias, self.skip, self.all_gated, out=self.hidden[0]).relu_()
        torch.addmm(middle_bias, middle, self.hidden[0], out=self.hidden[1]).relu_()
        return torch.addmm(last_bias, last, self.hidden[1], out=self.result)


class _GateSteps:
    """One dilated convolution with its gate, position by position: a part of `CachedSteps`.

    When h[t] comes it is multiplied once by all taps, for now and for later. A ring of places keeps
    the products until their time has come. With two taps, W_0 (now) and W_1, and dilation d = 2:

        place                  t % 3            (t-1) % 3        (t-2) % 3
        first rows             W_0 h[t] *       W_0 h[t-1]       W_0 h[t-2]
        following rows         W_1 h[t]         W_1 h[t-1]       W_1 h[t-2] *

    The sum of the two with a star goes to the gate. Position t+1 overwrites the last place, which
    nobody needs any more: ``(kernel - 1) d + 1`` places are enough.

    Args:
        conv: the convolution.
        dilation: d.
        shift: what the context adds, ``(batch, 2 channels)``.
        sums: place for the sum, ``(2 channels, batch)``, which all layers may share.
        gated: place for the result, ``(channels, batch)``.
    """

    def __init__(
        self, conv: nn.Module, dilation: int, shift: Tensor | None, sums: Tensor, gated: Tensor
    ) -> None:
        weight, bias = _weights(conv)
        taps, (rows, batch) = weight.shape[2], sums.shape
        # All taps under one another, that for now first; its rows have the bias.
        self.taps = weight.flip(2).permute(2, 0, 1).flatten(0, 1).contiguous()
        now = bias[:, None] + (0 if shift is None else shift.T)
        later = now.new_zeros((taps - 1) * rows, batch)
        self.bias = torch.cat([now.expand(-1, batch), later])
        # Each place: the whole product, and its part for each tap.
        places = now.new_zeros((taps - 1) * dilation + 1, taps * rows, batch)
        self.ring = [(place, place.split(rows)) for place in places]
        self.dilation, self.sums, self.gated = dilation, sums, gated
        self.a, self.b = sums.split(rows // 2)

    def step(self, t: int, h: Tensor) -> None:
        """Write the gate's result at t, for h at t."""
        ring, dilation = self.ring, self.dilation
        product, parts = ring[t % len(ring)]
        torch.addmm(self.bias, self.taps, h, out=product)
        torch.add(parts[0], ring[(t - dilation) % len(ring)][1][1], out=self.sums)
        for tap in range(2, len(parts)):
            self.sums.add_(ring[(t - tap * dilation) % len(ring)][1][tap])
        torch.mul(self.a.tanh_(), self.b.sigmoid_(), out=self.gated)


def _weights(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight ``(out, in, taps)`` and bias ``(out,)`` of a convolution."""
    assert isinstance(layer, nn.Conv1d)
    assert layer.bias is not None
    return layer.weight.detach(), layer.bias.detach()


def _matrix(layer: nn.Module, columns: int) -> tuple[Tensor, Tensor]:
    """Weight ``(out, in)`` and bias ``(out, columns)`` of a convolution with one tap."""
    weight, bias = _weights(layer)
    return weight[:, :, 0].contiguous(), bias[:, None].expand(-1, columns).contiguous()
