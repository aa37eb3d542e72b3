"""Contexts that change on their way: smaller ones for coarser scales, learned features of them.

A context is one tensor for the whole model. A part of the model may want it otherwise: at a coarser
scale, as the features that a network finds in it. `Conditioned` stands around this part and hands
it ``network(context)``. The network is asked once a call, however many couplings read the answer.
Ardizzone et al. 2019 call it the conditioning network, https://arxiv.org/abs/1907.02392.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflib import precision
from nflib.arguments import (
    ArgumentError,
    ContextShape,
    Count,
    ImageShape,
    Rule,
    Sides,
    Size,
    checked,
    integer,
    show,
)
from nflib.core import EventShape, Layer, Shape, ShapeError, describe, fits
from nflib.multiscale import Squeeze
from nflib.nets import in_place, shape_of, widths


def _scales(value: Any) -> tuple[tuple[int, int], ...]:
    found = tuple((integer(height), integer(width)) for height, width in value)
    if not found or min(map(min, found)) < 1:
        raise ValueError
    return found


Scales = Annotated[
    Sequence[tuple[int, int]], Rule("a sequence of heights and widths, each at least 1", _scales)
]


class Conditioned(Layer):
    """A layer that sees ``network(context)`` in the place of the context; log|det| is its own.

    Any network will do, for it is never inverted: `SpaceToDepth` rearranges an image of context to
    half of its size without a loss and without parameters, a learned one finds features. Cost: the
    network's, once in each direction, and the layer's.

    Args:
        network: called with the context, ``(batch, *context_dim)``.
        layer: any layer, such as a `Compose` or a `MultiScale` of several; its context is the
            network's output.
        context_dim: size of the context vector, or shape of the image, that the network takes.

    Raises:
        ArgumentError: for what is no network, and where there is no context_dim.
        ShapeError: if the layer expects another context than the network returns.
    """

    @checked
    def __init__(self, network: nn.Module, layer: Layer, context_dim: ContextShape) -> None:
        super().__init__()
        if context_dim is None:
            raise ArgumentError("Conditioned expects a context_dim, got None.")
        self.network, self.layer = network, layer
        self.context_shape = shape_of(context_dim)
        self.event_shape = self.layer.event_shape
        self.bijective, self.exact_inverse = self.layer.bijective, self.layer.exact_inverse
        self.is_wide = precision.is_wide(precision.matrices_of(network))
        seen = _shape_behind(network, self.context_shape or ())
        if not fits(seen, self.layer.context_shape):
            raise ShapeError(
                "Conditioned expects a layer that takes what its network makes of a context, "
                f"{describe(seen)}, got one for {describe(layer.context_shape)}."
            )

    @property
    def latent_shape(self) -> EventShape | None:
        return self.layer.latent_shape

    def output_shape(self, shape: EventShape | None) -> EventShape | None:
        return self.layer.shape_after(shape)

    def input_shape(self, shape: EventShape | None) -> EventShape | None:
        return self.layer.shape_before(shape)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.layer(x, self.seen(context))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.layer.inverse(z, self.seen(context))

    def seen(self, context: Tensor | None) -> Tensor:
        """What the layer sees of a context. The network's bfloat16, if any, ends here."""
        assert context is not None  # the check of the input asked for it
        with precision.of_network(self.is_wide, context):
            return self.network(context).to(context.dtype)

    def check_data(self, x: Tensor) -> None:
        self.layer.check_data(x)

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        self.layer.initialize(x, self.seen(context))

    @torch.no_grad()
    def initialize_inverse(self, z: Tensor, context: Tensor | None = None) -> None:
        self.layer.initialize_inverse(z, self.seen(context))


@torch.no_grad()
def _shape_behind(network: nn.Module, shape: EventShape) -> Shape:
    """The shape of the network's output for one row of context; evaluation draws no numbers."""
    like = next(network.parameters(), torch.empty(0))
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        seen = network(like.new_zeros(1, *shape))
    except (RuntimeError, ValueError) as error:
        raise ArgumentError(
            f"Conditioned expects network to take contexts of shape {describe(('batch', *shape))}, "
            f"got one that does not: {' '.join(str(error).split()).rstrip('.')}."
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
    if not isinstance(seen, Tensor) or seen.ndim < 2:
        raise ArgumentError(
            "Conditioned expects network to return a tensor with a row for each context, "
            f"got {show(seen)}."
        )
    return tuple(seen.shape[1:])


class SpaceToDepth(nn.Module):
    """`Squeeze` for a context: ``(batch, K, H, W) -> (batch, K f^2, H / f, W / f)``, no parameters.

    Args:
        factor: f, the side of the square whose pixels become channels.
    """

    @checked
    def __init__(self, factor: Size = 2) -> None:
        super().__init__()
        self.squeeze = Squeeze(factor)

    def forward(self, image: Tensor) -> Tensor:
        return self.squeeze(image)[0]


class Resize(nn.Module):
    """An image of context at another size: ``(batch, K, H, W) -> (batch, K, *size)``.

    Bilinear, without parameters. To half of the size each pixel is the mean of four.

    Args:
        size: height and width.
    """

    @checked
    def __init__(self, size: Sides) -> None:
        super().__init__()
        self.size = widths(size)

    def forward(self, image: Tensor) -> Tensor:
        return F.interpolate(image, self.size, mode="bilinear")


class DenseEncoder(nn.Module):
    """Features of an image at its own size, ``(batch, K, H, W) -> (batch, blocks features, H, W)``.

    A convolution and a chain of `DenseBlock`; what stands behind each block is kept, and all of it
    side by side is the answer, so that both simple and composed features are at hand. The encoder
    of SRFlow (Lugmayr et al. 2020, https://arxiv.org/abs/2006.14200).

    Args:
        channels: K of the image.
        features: channels behind each block.
        blocks: number of blocks; each sees 15 pixels further.
    """

    @checked
    def __init__(self, channels: Size, features: Size = 32, blocks: Size = 2) -> None:
        super().__init__()
        self.channels, self.features = channels, blocks * features
        self.first = nn.Conv2d(channels, features, 3, padding=1)
        self.blocks = nn.ModuleList(DenseBlock(features) for _ in range(blocks))

    def forward(self, image: Tensor) -> Tensor:
        h, found = self.first(image), []
        for block in self.blocks:
            h = block(h)
            found.append(h)
        return torch.cat(found, 1)


class DenseBlock(nn.Module):
    """A residual-in-residual dense block (RRDB): three dense parts inside of one more shortcut.

        d(h) = h + 0.2 c_5,    c_i = conv_i([h, c_1, ..., c_{i-1}]),    h <- h + 0.2 d(d(d(h)))

    The convolutions are 3x3 with a leaky ReLU behind the first four of each part. There is no
    normalization, so that brightness and contrast of the image survive. Wang et al. 2018 (ESRGAN),
    https://arxiv.org/abs/1809.00219.

    Args:
        width: channels of h; c_1 to c_4 have half of them.
    """

    @checked
    def __init__(self, width: Size) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_dense(width, max(1, width // 2)) for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        inner = h
        for part in self.parts:
            seen, convs = inner, list(part.children())
            for conv in convs[:-1]:
                seen = torch.cat([seen, F.leaky_relu(conv(seen), 0.2)], 1)
            inner = inner + 0.2 * convs[-1](seen)
        return h + 0.2 * inner


def _dense(width: int, growth: int) -> nn.ModuleList:
    """Convolutions each of which sees the outputs of all before it."""
    outputs = [growth] * 4 + [width]
    return nn.ModuleList(
        nn.Conv2d(width + k * growth, out, 3, padding=1) for k, out in enumerate(outputs)
    )


class FeaturePyramid(nn.Module):
    """Features of an image at several scales, all found in one pass.

    On the way down strided convolutions halve the image, until each of the sizes has been met. On
    the way up the features of a coarse scale, which see most of the picture, are enlarged and
    added to those of the next finer one (Lin et al. 2016, https://arxiv.org/abs/1612.03144). A
    context is one tensor, so the features leave as one vector; `part` cuts one scale out of it.

    Args:
        shape: of the image, ``(K, H, W)``.
        sizes: heights and widths of the scales, each half of the one before; H and W are these
            times a power of two.
        features: channels at each scale.
    """

    @checked
    def __init__(self, shape: ImageShape, sizes: Scales, features: Size = 32) -> None:
        super().__init__()
        self.shapes = [(features, height, width) for height, width in sizes]
        channels, height, width = shape
        stages: list[nn.Module] = []
        for wanted in sizes:
            steps: list[nn.Module] = []
            while (height, width) != wanted:
                if height % 2 or width % 2 or height <= wanted[0] or width <= wanted[1]:
                    raise ShapeError(
                        "FeaturePyramid expects sizes that its image reaches by halving, got "
                        f"{wanted} behind {(height, width)}."
                    )
                steps += _halve(channels, features)
                channels, height, width = features, height // 2, width // 2
            steps += _keep(channels, features)
            channels = features
            stages.append(nn.Sequential(*steps))
        self.down = nn.ModuleList(stages)
        self.up = nn.ModuleList(nn.Conv2d(features, features, 3, padding=1) for _ in sizes)

    def forward(self, image: Tensor) -> Tensor:
        """``(batch, K, H, W) -> (batch, N)``, N the numbers of all scales together."""
        found = []
        for stage in self.down:
            image = stage(image)
            found.append(image)
        coarse: Tensor | None = None
        seen = []
        for here, smooth in zip(reversed(found), reversed(list(self.up)), strict=True):
            # Each pixel of the coarser scale lies over four of this one.
            above = 0 if coarse is None else F.interpolate(coarse, scale_factor=2.0)
            coarse = here + above
            seen.append(F.relu(smooth(coarse)).flatten(1))
        return torch.cat(seen[::-1], 1)

    def part(self, number: int) -> nn.Module:
        """A network without parameters that cuts scale ``number`` out of the vector."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        return Part(sum(sizes[:number]), self.shapes[number])


class Part(nn.Module):
    """The image of a shape that begins at one place of a vector: ``(batch, N) -> (batch, *shape)``.

    Args:
        start: place of its first number.
        shape: (channels, height, width).
    """

    @checked
    def __init__(self, start: Count, shape: ImageShape) -> None:
        super().__init__()
        self.start, self.shape = start, shape
        self.stop = start + torch.Size(shape).numel()

    def forward(self, packed: Tensor) -> Tensor:
        return packed[:, self.start : self.stop].unflatten(1, self.shape)


def _halve(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), *_norm_and_relu(outputs)]


def _keep(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), *_norm_and_relu(outputs)]


def _norm_and_relu(channels: int) -> list[nn.Module]:
    # One group: each picture by itself, so that a row does not depend on the rest of its batch.
    return [nn.GroupNorm(1, channels), in_place(nn.ReLU)]
