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

    Everything is allocated, and every weight reshaped, when the object is made. A step does the
    same operations on the same memory each time, and t stands on the device: a GPU can record it,
    see `nflib.graphs`. Features come first, ``(features, batch)``, so that no product needs a
    transposition; with a row of ones under them, a product takes its bias along as a last column.
    Without gradients. Cost: one position's share of `CausalStack.forward` a step.

    Args:
        stack: the network; its weights are copied, later changes have no effect.
        batch: rows that are computed together.
        context: ``(batch, K)`` if the stack is conditional.

    Attributes:
        t: the position of the latest outputs, counted from 0: ``(1,)``, int64.
        outputs: the latest ones, ``(outputs, batch)``.
        h: where the residual path begins, ``(channels, batch)``.
    """

    @torch.no_grad()
    @checked
    def __init__(self, stack: CausalStack, batch: Count, context: Tensor | None = None) -> None:
        if context is not None and stack.context is not None and len(context) != batch:
            raise ShapeError(
                f"CachedSteps expects a row of context for each of the {batch} rows of its batch, "
                f"got {show(context)}."
            )
        channels, depth = stack.channels, len(stack.dilations)
        weight, bias = _weights(stack.first)
        self.first = weight[:, :, 0].contiguous()
        self.first_bias = bias[:, None].expand(-1, batch).contiguous()
        self.h = torch.zeros_like(self.first_bias)
        shifts = stack.shifts(context)
        gates = [_gate(gate, shift) for gate, shift in zip(stack.gates, shifts, strict=True)]
        biases = torch.stack([bias.expand(-1, batch) for _, bias in gates])
        self.rings = _Rings(biases, stack.dilations, stack.kernel)
        self.t = self.rings.t
        # What the gates return lies side by side, for one product serves all skip connections.
        gated = bias.new_ones(depth, channels + 1, batch)
        self.all_gated, self.gated = gated.flatten(0, 1), gated.unbind()
        self.gates = [
            (taps, sums.flatten(0, 1), sums[0], *sums[0].chunk(2), rows)
            for (taps, _), sums, rows in zip(
                gates, self.rings.sums, gated[:, :channels], strict=True
            )
        ]
        self.residuals = [_matrix(residual) for residual in stack.residuals]
        skip = _matrix(stack.skip)
        spaced = skip.new_zeros(len(skip), depth, channels + 1)
        spaced[:, :, :channels] = skip[:, :-1].unflatten(1, (depth, channels))
        spaced[:, -1, -1] = skip[:, -1]  # of all the rows of ones the last one serves
        middle, last = _matrix(stack.last[1]), _matrix(stack.last[3])
        self.output = [_with_ones(spaced.flatten(1)), _with_ones(middle), last]
        results = [matrix.new_zeros(len(matrix), batch) for matrix in self.output]
        *self.hidden, self.outputs = results

    def step(self, x: Tensor) -> Tensor:
        """Outputs at the next position, ``(outputs, batch)``, in the same memory each time."""
        torch.addmm(self.first_bias, self.first, x.detach(), out=self.h)
        return self.go_on()

    def go_on(self) -> Tensor:
        """`step` for an x of which h already holds what the first layer makes."""
        h = self.h
        self.rings.fetch()
        for layer, (taps, sums, both, a, b, gated) in enumerate(self.gates):
            sums.addmm_(taps, h)
            both.sigmoid_()
            torch.addcmul(b, a, b, value=-2, out=gated)
            if layer < len(self.residuals):
                h.addmm_(self.residuals[layer], self.gated[layer])
        self.rings.store()
        (skip, middle, last), (first, second) = self.output, self.hidden
        torch.mm(skip, self.all_gated, out=first).relu_()
        torch.mm(middle, first, out=second).relu_()
        return torch.mm(last, second, out=self.outputs)


class _Rings:
    """What the dilated convolutions keep for later positions: a part of `CachedSteps`.

    When h[t] comes it is multiplied once by all taps, for now and for later. Each layer has a ring
    of places, where sums wait until they are complete. With three taps, W_0 (now), W_1 and W_2,
    bias b and dilation 1:

        place     before step t                        after step t
        of t      b + W_2 h[t-2] + W_1 h[t-1] *        b + W_2 h[t]
        of t+1    b + W_2 h[t-1]                       b + W_2 h[t-1] + W_1 h[t]

    The sum with a star gets W_0 h[t] and goes to the gate. Nobody needs its place any more, which
    is then that of t+2: ``(kernel - 1) d`` places are enough for dilation d. Sums that start get
    their bias from one more place, behind the ring, where nothing is ever added.

    The rings of all layers stand in one tensor, and which places a step needs is computed from t
    on the device: one operation fetches all sums, one stores what is left of them.

    Args:
        bias: of each layer, with what the context adds, ``(layers, features, batch)``.
        dilations: of each layer.
        taps: of each convolution.

    Attributes:
        t: the position at hand, ``(1,)``, int64.
        sums: those at t and the later ones, ``(layers, taps, features, batch)``.
    """

    def __init__(self, bias: Tensor, dilations: list[int], taps: int) -> None:
        depth, lengths = len(dilations), [(taps - 1) * dilation for dilation in dilations]
        self.places = torch.cat(
            [row.expand(n + 1, -1) for row, n in zip(bias.flatten(1), lengths, strict=True)]
        )
        starts = [sum(lengths[:layer]) + layer for layer in range(depth)]
        rings = list(zip(dilations, lengths, starts, strict=True))
        # Each place: how far from t, how many its ring has, where this begins.
        fetched = [
            (tap * dilation, length, start) if tap < taps - 1 else (0, 1, start + length)
            for dilation, length, start in rings
            for tap in range(taps)
        ]
        stored = [
            (tap * dilation, length, start)
            for tap in range(1, taps)
            for dilation, length, start in rings
        ]
        # With them goes t itself, in a ring that it never gets round.
        table = torch.tensor([(0, 2**62, 0), *fetched, *stored], device=bias.device)
        self.turns, self.lengths, self.starts = (column.clone() for column in table.unbind(1))
        self.turns -= 1
        self.found = torch.zeros_like(self.turns)
        self.t, self.fetched, *self.stored = self.found.split(
            [1, len(fetched), *[depth] * (taps - 1)]
        )
        self.sums = bias.new_zeros(depth, taps, *bias.shape[1:])
        self.flat = self.sums.flatten(2).flatten(0, 1)
        self.later = self.sums.flatten(2).unbind(1)[1:]

    def fetch(self) -> None:
        """Go on to the next position and fetch its sums."""
        torch.add(self.turns.add_(1).remainder_(self.lengths), self.starts, out=self.found)
        torch.index_select(self.places, 0, self.fetched, out=self.flat)

    def store(self) -> None:
        """Store the sums for later positions."""
        for places, sums in zip(self.stored, self.later, strict=True):
            self.places.index_copy_(0, places, sums)


def _gate(layer: nn.Module, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """All taps under one another, that for now first, ``(taps rows, in)``; bias ``(rows, ...)``.

    The first half of the rows, a, is replaced by -2a: since ``tanh(a) = 1 - 2 sigmoid(-2a)``, the
    gate ``tanh(a) sigmoid(b) = sigmoid(b) - 2 sigmoid(-2a) sigmoid(b)`` takes one function of all
    rows.
    """
    weight, bias = _weights(layer)
    now = bias[:, None] + (0 if shift is None else shift.T)
    factor = torch.ones_like(bias[:, None])
    factor[: len(bias) // 2] = -2
    return (weight.flip(2).permute(2, 0, 1) * factor).flatten(0, 1), now * factor


def _weights(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight ``(out, in, taps)`` and bias ``(out,)`` of a convolution."""
    assert isinstance(layer, nn.Conv1d)
    assert layer.bias is not None
    return layer.weight.detach(), layer.bias.detach()


def _matrix(layer: nn.Module) -> Tensor:
    """Weight and, as the last column, bias of a convolution with one tap, ``(out, in + 1)``."""
    weight, bias = _weights(layer)
    return torch.cat([weight[:, :, 0], bias[:, None]], 1)


def _with_ones(matrix: Tensor) -> Tensor:
    """With one more row, which gives the result a row of ones, too."""
    row = torch.zeros_like(matrix[:1])
    row[:, -1] = 1
    return torch.cat([matrix, row])
