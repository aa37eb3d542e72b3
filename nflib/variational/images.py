"""Encoders and decoders of images, and the image VAE that they make."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nflib.arguments import (
    ArgumentError,
    Count,
    ImageShape,
    Levels,
    NonNegative,
    Size,
    Widths,
    checked,
)
from nflib.core import (
    Flow,
    Model,
    Shape,
    StandardNormal,
    check_levels,
    log_det_dtype,
    sum_event,
)
from nflib.core.flow import Draws
from nflib.discrete import Bernoulli, Head, LogisticMixture, check_integers
from nflib.models.parts import model
from nflib.multiscale import Squeeze
from nflib.variational.model import VAE
from nflib.variational.posteriors import Kind, posterior_flow


class ToPatches(nn.Module):
    """`nn.PixelUnshuffle`, which loses the shape of an empty batch."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.squeeze = Squeeze(patch)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.squeeze(x)[0]
        return patches


class ConvEncoder(nn.Module):
    """Patches, two 3x3 convolutions, fully connected: ``(batch, C, H, W) -> (batch, outputs)``.

    Each square of p x p pixels becomes one place with C p^2 channels, so that the first
    convolution is one of 3p x 3p pixels in steps of p.

    Args:
        shape: channels, height and width of an image.
        outputs: numbers a row; of a `VAE` twice the latents, and its flow's context.
        patch: p, a divisor of both sides.
        width: channels of the convolutions.
        hidden: width of the fully connected layer.
        levels: number k of grey levels; 0 .. k-1 are spread over [-1, 1] before the first layer.
    """

    @checked
    def __init__(
        self,
        shape: ImageShape,
        outputs: Size,
        patch: Size = 4,
        width: Size = 32,
        hidden: Size = 256,
        levels: Levels = 2,
    ) -> None:
        super().__init__()
        self.shape, self.levels = shape, levels
        channels, height, across = _patches("ConvEncoder", shape, patch)
        self.layers = nn.Sequential(
            ToPatches(patch),
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(width * height * across, hidden),
            nn.SiLU(),
            nn.Linear(hidden, outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        like = next(self.parameters())
        check_integers(type(self).__name__, x, self.shape, like)
        return self.layers(x.to(like.dtype) * (2 / (self.levels - 1)) - 1)


class ConvDecoder(Model):
    """``p(x | z) = prod_i p(x_i | z)`` over pixels; the mirror image of a `ConvEncoder`.

    Fully connected layers, a 3x3 convolution, and one whose channels become the pixels of each
    patch: the same map as a transposed convolution of 3p x 3p pixels in steps of p (Shi et al.
    2016, https://arxiv.org/abs/1609.07009). log p(x | z) is exact, in nats; given z the pixels are
    independent.

    Args:
        shape: channels, height and width of an image.
        latent_dim: size of z, which is this model's context.
        patch, width, hidden: see `ConvEncoder`.
        head: the distribution of a pixel, by default `nflib.discrete.Bernoulli`.
    """

    @checked
    def __init__(
        self,
        shape: ImageShape,
        latent_dim: Size,
        patch: Size = 4,
        width: Size = 32,
        hidden: Size = 256,
        head: Head | None = None,
    ) -> None:
        super().__init__()
        self.head = Bernoulli(shape[0]) if head is None else head
        if self.head.channels != shape[0]:
            raise ArgumentError(
                f"ConvDecoder expects a head of {shape[0]} channels, as shape has, got {head}."
            )
        self.shape = self.event_shape = shape
        self.context_shape = (latent_dim,)
        _, height, across = _patches("ConvDecoder", shape, patch)
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, width * height * across),
            nn.SiLU(),
            nn.Unflatten(1, (width, height, across)),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, self.head.count * patch**2, 3, padding=1),
            nn.PixelShuffle(patch),
        )

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x | z) of each row, z given as the context ``(batch, latent_dim)``, in nats."""
        check_integers(type(self).__name__, x, self.shape, next(self.parameters()))
        z = self.rows_of_context(context, len(x))
        return sum_event(self.head.log_prob(x, self.layers(z)))

    def sample(
        self,
        n: Draws,
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw images for latents ``(batch, latent_dim)``: ``(n, C, H, W)``."""
        shape, z = self._plan("sample", n, context)
        with torch.no_grad():
            parameters = self._at(z)
            sizes = (len(parameters), self.head.uniforms, *parameters.shape[2:])
            u = torch.rand(
                sizes, generator=generator, dtype=parameters.dtype, device=parameters.device
            )
            x = self.head.sample(parameters, u)
        return x.reshape(*shape, *x.shape[1:])

    def mean(self, z: Tensor) -> Tensor:
        """``E[x | z]`` of each pixel, ``(batch, C, H, W)``, on the scale of the grey levels."""
        return self.head.mean(self._at(self.rows_of_context(z, z.shape[0] if z.ndim > 1 else 1)))

    def _at(self, z: Tensor | None) -> Tensor:
        """The head's parameters for latents z, in full precision also under autocast."""
        parameters: Tensor = self.layers(z)
        return parameters.to(log_det_dtype(parameters.dtype))

    def check_data(self, x: Tensor) -> None:
        """Raise a `ValueError` unless all values are whole numbers of the head's levels."""
        check_levels(x, "x", self.head.levels)


@model
def vae(
    shape: ImageShape,
    latent_dim: Size = 40,
    *,
    flow: Kind = "realnvp",
    steps: Count = 0,
    prior_steps: Count = 0,
    amortised: bool = True,
    features: Size = 64,
    patch: Size = 4,
    width: Size = 32,
    hidden: Size = 256,
    flow_hidden: Widths = (64, 64),
    rank: Size | None = None,
    batch_norm: bool = False,
    weight_norm: bool = False,
    warm_up: Count = 0,
    free_bits: NonNegative = 0.0,
    grey_levels: Levels = 2,
) -> VAE:
    """A VAE of images: convolutions, a posterior of so many flow steps, transposed convolutions.

    Args:
        shape: channels, height and width.
        latent_dim: number of latents.
        flow, steps: of the posterior, see `posterior_flow`; no steps make it a diagonal normal.
        prior_steps: RealNVP steps of the prior; none make it a standard normal.
        amortised: let the posterior's flow see ``features`` numbers of the encoder, so that each
            image has a map of its own; without, all images share one.
        features: how many.
        patch, width, hidden: of encoder and decoder.
        flow_hidden, rank, batch_norm, weight_norm: of the posterior, see `posterior_flow`.
        warm_up, free_bits: see `VAE`.
        grey_levels: 2 for binary pixels; for more a pixel is a mixture of three logistics.
    """
    context = features if amortised and steps else None
    posterior = posterior_flow(
        flow,
        latent_dim,
        steps,
        context_dim=context,
        hidden=flow_hidden,
        rank=rank,
        batch_norm=batch_norm,
        weight_norm=weight_norm,
    )
    head = Bernoulli(shape[0]) if grey_levels == 2 else LogisticMixture(grey_levels, shape[0], 3)
    prior = posterior_flow("realnvp", latent_dim, prior_steps, hidden=flow_hidden)
    return VAE(
        ConvEncoder(shape, 2 * latent_dim + (context or 0), patch, width, hidden, grey_levels),
        ConvDecoder(shape, latent_dim, patch, width, hidden, head),
        posterior,
        None if prior is None else Flow(prior, StandardNormal(latent_dim)),
        warm_up=warm_up,
        free_bits=free_bits,
    )


def _patches(name: str, shape: Shape, patch: int) -> Shape:
    """Channels, height and width of an image of which each place is a patch."""
    channels, height, width = shape
    if height % patch or width % patch:
        raise ArgumentError(
            f"{name} expects a patch that divides both sides of {height} x {width}, got {patch}."
        )
    return channels * patch**2, height // patch, width // patch
