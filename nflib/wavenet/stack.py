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

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflib.core import ShapeError
from nflib.nets import Context, vector_context


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
        kernel: taps of each dilated convolution.
        context: size of a context vector, which shifts both halves of every gate at all positions.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        channels: int = 32,
        skip: int = 64,
        layers: int = 10,
        blocks: int = 1,
        kernel: int = 2,
        context: Context = None,
    ) -> None:
        super().__init__()
        sizes = {
            "channels": channels,
            "skip": skip,
            "layers": layers,
            "blocks": blocks,
            "kernel - 1": kernel - 1,
        }
        if min(sizes.values()) < 1:
            raise ValueError(
                "CausalStack expects at least 1 of channels, skip, layers and blocks, and a kernel "
                f"of at least 2, got {channels}, {skip}, {layers}, {blocks} and {kernel}."
            )
        self.inputs, self.channels, self.kernel = inputs, channels, kernel
        self.context_shape = vector_context(context, "CausalStack")
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
        size = self.context_shape[0] if self.context_shape else 0
        self.context = nn.Linear(size, depth * 2 * channels, bias=False) if size else None

    @property
    def receptive_field(self) -> int:
        """How many samples before t reach the output at t: ``1 + (kernel - 1) sum_l d_l``."""
        return 1 + (self.kernel - 1) * sum(self.dilations)

    def shifts(self, context: Tensor | None) -> list[Tensor | None]:
        """What the context adds to each layer's gates, ``(batch, 2 channels)`` each."""
        if self.context is None or context is None:
            return [None] * len(self.dilations)
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
    ``(outputs, batch)``; the first call takes zeros. An activation is multiplied once by all taps
    of its layer, for now and for later: a ring of ``(kernel - 1) d + 1`` places keeps the products
    until their time has come.

    Everything is allocated, and every weight reshaped, when the object is made; a step writes into
    what is there. Features come first, ``(features, batch)``, so that no product needs a
    transposition. Without gradients. Cost: one position's share of `CausalStack.forward` a step.

    Args:
        stack: the network; its weights are copied, later changes have no effect.
        batch: rows that are computed together.
        context: ``(batch, K)`` if the stack is conditional.
    """

    @torch.no_grad()
    def __init__(self, stack: CausalStack, batch: int, context: Tensor | None = None) -> None:
        self.first, first_bias = _matrix(stack.first, batch)
        channels, depth = stack.channels, len(stack.dilations)
        self.taps, self.biases = [], []
        for gate, shift in zip(stack.gates, stack.shifts(context), strict=True):
            weight, bias = _weights(gate)
            # All taps under one another, the newest first; what the newest adds to has the bias.
            self.taps.append(weight.flip(2).permute(2, 0, 1).flatten(0, 1).contiguous())
            now = bias[:, None] + (0 if shift is None else shift.T)
            later = now.new_zeros((stack.kernel - 1) * 2 * channels, batch)
            self.biases.append(torch.cat([now.expand(-1, batch), later]))
        self.first_bias = first_bias
        # A row of ones under each gate's output takes the residual's bias into the product.
        self.residuals = [torch.cat(_matrix(r, 1), 1) for r in stack.residuals]
        gated = first_bias.new_ones(depth, channels + 1, batch)
        self.gated = [(rows, rows[:channels]) for rows in gated]
        self.all_gated = gated.flatten(0, 1)
        skip, self.skip_bias = _matrix(stack.skip, batch)
        spaced = skip.new_zeros(len(skip), depth, channels + 1)
        spaced[:, :, :channels] = skip.unflatten(1, (depth, channels))
        self.skip = spaced.flatten(1)
        self.output = [_matrix(layer, batch) for layer in (stack.last[1], stack.last[3])]
        self.hidden = [torch.zeros_like(bias) for bias in (self.skip_bias, self.output[0][1])]
        self.result = torch.zeros_like(self.output[1][1])
        # Each place of a ring: the whole product, and its part for the same, the next, ... tap.
        self.rings = [
            [(place, place.split(2 * channels)) for place in places]
            for places in (
                first_bias.new_zeros((stack.kernel - 1) * d + 1, len(bias), batch)
                for d, bias in zip(stack.dilations, self.biases, strict=True)
            )
        ]
        self.dilations = stack.dilations
        both = first_bias.new_zeros(2 * channels, batch)
        self.both, self.halves = both, both.split(channels)
        self.h = [torch.zeros_like(first_bias) for _ in range(2)]
        self.t = 0

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """Outputs at the next position, ``(outputs, batch)``, valid until the next step."""
        (a, b), (h, spare) = self.halves, self.h
        torch.addmm(self.first_bias, self.first, x, out=h)
        for layer, (ring, dilation) in enumerate(zip(self.rings, self.dilations, strict=True)):
            product, parts = ring[self.t % len(ring)]
            torch.addmm(self.biases[layer], self.taps[layer], h, out=product)
            past = ring[(self.t - dilation) % len(ring)][1][1]
            torch.add(parts[0], past, out=self.both)
            for tap in range(2, len(parts)):
                self.both.add_(ring[(self.t - tap * dilation) % len(ring)][1][tap])
            ones, gated = self.gated[layer]
            torch.mul(a.tanh_(), b.sigmoid_(), out=gated)
            if layer < len(self.residuals):
                torch.addmm(h, self.residuals[layer], ones, out=spare)
                h, spare = spare, h
        self.t += 1
        (middle, middle_bias), (last, last_bias) = self.output
        torch.addmm(self.skip_bias, self.skip, self.all_gated, out=self.hidden[0]).relu_()
        torch.addmm(middle_bias, middle, self.hidden[0], out=self.hidden[1]).relu_()
        return torch.addmm(last_bias, last, self.hidden[1], out=self.result)


def _weights(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight ``(out, in, taps)`` and bias ``(out,)`` of a convolution."""
    assert isinstance(layer, nn.Conv1d)
    assert layer.bias is not None
    return layer.weight.detach(), layer.bias.detach()


def _matrix(layer: nn.Module, columns: int) -> tuple[Tensor, Tensor]:
    """Weight ``(out, in)`` and bias ``(out, columns)`` of a convolution with one tap."""
    weight, bias = _weights(layer)
    return weight[:, :, 0].contiguous(), bias[:, None].expand(-1, columns).contiguous()
