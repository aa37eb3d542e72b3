"""The variational autoencoder: a density over x by way of latents z, known up to a bound."""

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflib.arguments import ArgumentError, Count, NonNegative, Rule, Size, checked, show
from nflib.core import (
    Layer,
    Model,
    ShapeError,
    StandardNormal,
    describe,
    fits,
    is_known,
    log_normal,
    require_bijection,
)
from nflib.core.flow import Draws

# Rows that pass the decoder at once when a bound takes many draws; only memory depends on it.
AT_ONCE = 4096


def _layer(value: Any) -> Any:
    if value is not None and not isinstance(value, Layer):
        raise TypeError
    return value


def _density(value: Any) -> Any:
    if value is not None and not isinstance(value, Model):
        raise TypeError
    return value


Moves = Annotated[
    Layer | None, Rule("a bijection of the latents (of a Flow its .bijection) or None", _layer)
]
Prior = Annotated[
    Model | None,
    Rule("a model of the latents, such as Flow(bijection, StandardNormal(D)), or None", _density),
]


class Bound(NamedTuple):
    """The evidence lower bound of each row in its two parts, in nats, each ``(batch,)``.

    Attributes:
        reconstruction: ``E log p(x | z)`` for z from the posterior.
        kl: ``E [log q(z | x) - log p(z)]``, what the posterior costs; one draw of it may be
            negative, its mean is not.
    """

    reconstruction: Tensor
    kl: Tensor

    @property
    def elbo(self) -> Tensor:
        """``reconstruction - kl <= log p(x)``."""
        return self.reconstruction - self.kl


# Mean and scale of z_0, and the context of the posterior's flow, each with a row for each x.
Embedded = tuple[Tensor, Tensor, Tensor | None]


class VAE(Model):
    """``p(x) = int p(x | z) p(z) dz``, trained together with a posterior ``q(z | x)``.

        q:      z_0 = mean(x) + scale(x) e,  e ~ N(0, I),     z = f(z_0; x)
                log q(z | x) = log N(z_0; mean, scale^2) - log|det df/dz_0|
        ELBO:   log p(x) >= E_q [log p(x | z) + log p(z) - log q(z | x)]

    ``log_prob`` is the number in the brackets for one draw of z, a lower bound of log p(x) in
    expectation. The mean of exp of K such numbers gives the tighter importance-weighted bound:
    ``nflib.metrics.evaluate(vae, x, samples=K)``. While the model trains, *calling* it gives the
    ELBO with the weight of the KL rising and with the free bits, which ``fit`` maximises then.

    Kingma and Welling 2014, https://arxiv.org/abs/1312.6114; flows as posteriors: Rezende and
    Mohamed 2015, https://arxiv.org/abs/1505.05770; as priors: Chen et al. 2017,
    https://arxiv.org/abs/1611.02731; K draws: Burda et al. 2016, https://arxiv.org/abs/1509.00519.

    Args:
        encoder: a network that maps x, converted to the parameters' dtype, to ``(batch, 2 D + K)``
            numbers: the mean of z_0, its scale before a softplus, and K numbers that the
            posterior's flow gets as its context.
        decoder: p(x | z), any model with ``log_prob(x, z)`` and ``sample((k,), z)`` whose
            ``context_shape`` is (D,): a `ConvDecoder`, a conditional flow, a `PixelCNN`.
        posterior_flow: a bijection f that is applied in its ``forward`` direction to z_0: planar
            maps, couplings, IAF as `MaskedAutoregressive`; without one q is a diagonal normal.
            With a context of K numbers its parameters depend on x.
        prior_flow: p(z), a `Flow` over vectors of D numbers; the standard normal without one.
        warm_up: training steps, that is calls in training mode, over which the weight of the KL
            rises from 0 to 1 (Bowman et al. 2016, https://arxiv.org/abs/1511.06349). The buffer
            ``steps_seen`` counts them.
        free_bits: nats of KL, of the mean over a batch, that cost nothing in training (Kingma et
            al. 2016, https://arxiv.org/abs/1606.04934, with all latents as one group).

    Raises:
        ArgumentError: for parts that do not fit together.
    """

    likelihood = "lower bound"
    steps_seen: Tensor
    decoder: Any
    prior: Any

    @checked
    def __init__(
        self,
        encoder: nn.Module,
        decoder: Model,
        posterior_flow: Moves = None,
        prior_flow: Prior = None,
        *,
        warm_up: Count = 0,
        free_bits: NonNegative = 0.0,
    ) -> None:
        super().__init__()
        shape = decoder.context_shape
        if shape is None or len(shape) != 1 or not is_known(shape):
            raise ArgumentError(
                "VAE expects a decoder with a context, a vector of latents, got one with a context "
                f"of {'no shape' if shape is None else describe(shape)}."
            )
        self.latent_dim: int = shape[0]
        if posterior_flow is not None:
            require_bijection("VAE", posterior_flow)
        _check_latents("posterior_flow", posterior_flow, self.latent_dim)
        _check_latents("prior_flow", prior_flow, self.latent_dim)
        if prior_flow is not None and prior_flow.context_shape is not None:
            raise ArgumentError(
                "VAE expects a prior_flow without a context, got one with a context of "
                f"{describe(prior_flow.context_shape)}."
            )
        extra = None if posterior_flow is None else posterior_flow.context_shape
        if extra is not None and (len(extra) != 1 or not is_known(extra)):
            raise ArgumentError(
                f"VAE expects a posterior_flow whose context is a vector, got {describe(extra)}."
            )
        self.encoder, self.decoder, self.posterior_flow = encoder, decoder, posterior_flow
        self.prior = StandardNormal(self.latent_dim) if prior_flow is None else prior_flow
        self.event_shape = decoder.event_shape
        self.outputs = 2 * self.latent_dim + (extra[0] if extra else 0)
        self.warm_up, self.free_bits = warm_up, free_bits
        self.register_buffer("steps_seen", torch.zeros(()))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`log_prob`; in training what is maximised then, ``(batch,)``."""
        if not self.training or not (self.warm_up or self.free_bits):
            return self.log_prob(x, context)
        reconstruction, kl = self._one_draw(x, context)
        if self.free_bits:
            kl = kl.mean().clamp_min(self.free_bits)
        return reconstruction - self._weight() * kl

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``log p(x, z) - log q(z | x)`` of each row for one draw of z, in nats, ``(batch,)``."""
        return self._one_draw(x, context).elbo

    @checked
    def bound(self, x: Tensor, draws: Size = 1) -> Bound:
        """The ELBO in its parts, each the mean over so many draws."""
        terms = self._terms(x, draws)
        return Bound(terms.reconstruction.mean(0), terms.kl.mean(0))

    @checked
    def log_weights(self, x: Tensor, draws: Size = 1) -> Tensor:
        """``log p(x, z_k) - log q(z_k | x)`` for K draws of z, in nats, ``(K, batch)``.

        The encoder runs once, the decoder once a draw. ``logsumexp(0) - log K`` of them is the
        importance-weighted bound.
        """
        return self._terms(x, draws).elbo

    @checked
    def posterior(self, x: Tensor, draws: Size = 1) -> tuple[Tensor, Tensor]:
        """z from q(z | x), ``(K, batch, D)``, and log q(z | x), ``(K, batch)``; reparameterised."""
        return self._draw(self._embed(x), draws)

    def encode(self, x: Tensor) -> Tensor:
        """One point of the latent space for each row, ``(batch, D)``: z at the mean of z_0."""
        mean, _, context = self._embed(x)
        return self._push(mean.unsqueeze(0), context)[0][0]

    def sample(
        self,
        n: Draws,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw z from the prior and x from p(x | z), ``(n, *event)``; temperature is the prior's.

        ``decoder.sample(n, z)`` draws x for latents of one's own.
        """
        shape, _ = self._plan("sample", n, context)
        given: dict[str, Any] = {} if generator is None else {"generator": generator}
        cooler = {} if temperature == 1 else {"temperature": temperature}
        with torch.no_grad():
            count = shape.numel()
            z = self.prior.sample(count, None, **cooler, **given)
            x = self.decoder.sample(count, z, **given)
        return x.reshape(*shape, *x.shape[1:])

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set data-dependent parameters of the flows from the latents of a first batch."""
        mean, scale, features = self._embed(x)
        z = mean + scale * torch.randn_like(mean)
        flow = self.posterior_flow
        if flow is not None:
            flow.initialize(z, features)
            z, _ = flow(z, features)
        initialize = getattr(self.prior, "initialize", None)
        if callable(initialize):
            initialize(z)

    def check_data(self, x: Tensor) -> None:
        """Raise a `ValueError` for data that the decoder cannot have made."""
        check = getattr(self.decoder, "check_data", None)
        if check is not None:
            check(x)

    def _one_draw(self, x: Tensor, context: Tensor | None) -> Bound:
        """`bound` with one draw, in the way that every step of training goes."""
        if context is not None:
            self.rows_of_context(context, 1)
        terms = self._terms(x, 1)
        return Bound(terms.reconstruction[0], terms.kl[0])

    def _terms(self, x: Tensor, draws: int) -> Bound:
        """The parts of each draw, ``(draws, batch)``."""
        embedded = self._embed(x)
        count = max(1, AT_ONCE // max(1, len(x)))
        parts = [
            self._weigh(x, *self._draw(embedded, min(count, draws - first)))
            for first in range(0, draws, count)
        ]
        return parts[0] if len(parts) == 1 else Bound(*map(torch.cat, zip(*parts, strict=True)))

    def _weigh(self, x: Tensor, z: Tensor, log_q: Tensor) -> Bound:
        """log p(x | z) and log q(z | x) - log p(z) of draws ``(draws, batch, D)``."""
        sizes, flat = z.shape[:2], z.flatten(0, 1)
        rows = x if len(z) == 1 else x.expand(len(z), *x.shape).flatten(0, 1)
        log_x, log_z = self.decoder.log_prob(rows, flat), self.prior.log_prob(flat)
        return Bound(log_x.unflatten(0, sizes), log_q - log_z.unflatten(0, sizes))

    def _draw(self, embedded: Embedded, draws: int) -> tuple[Tensor, Tensor]:
        mean, scale, context = embedded
        noise = torch.randn(draws, *mean.shape, dtype=mean.dtype, device=mean.device)
        log_q = log_normal(noise.flatten(0, 1)).unflatten(0, noise.shape[:2]) - scale.log().sum(1)
        z, log_det = self._push(mean + scale * noise, context)
        return z, log_q - log_det

    def _check(self, x: Tensor) -> None:
        """Refuse what is no batch of events; reads shape, dtype and device only."""
        name = type(self).__name__
        if not isinstance(x, Tensor):
            raise ShapeError(f"{name} expects a tensor, got {show(x)}; torch.as_tensor makes one.")
        if x.ndim == 0 or not fits(tuple(x.shape[1:]), self.event_shape):
            shape = ("batch", ...) if self.event_shape is None else ("batch", *self.event_shape)
            raise ShapeError(f"{name} expects shape {describe(shape)}, got {tuple(x.shape)}.")
        if x.dtype == torch.bool or x.is_complex():
            raise ShapeError(f"{name} expects numbers, whole or real, got {x.dtype}.")
        if x.device != self.steps_seen.device:
            raise ShapeError(
                f"{name} expects its input on its own device {self.steps_seen.device}, got "
                f"{x.device}; move the input with .to(device), or the model."
            )

    def _embed(self, x: Tensor) -> Embedded:
        """Mean and scale of z_0, and the context of the posterior's flow."""
        self._check(x)
        dtype = next(self.parameters(), self.steps_seen).dtype
        out = self.encoder(x.to(dtype))
        if not isinstance(out, Tensor) or out.shape != (len(x), self.outputs):
            raise ShapeError(
                f"VAE expects an encoder that returns {describe(('batch', self.outputs))}, "
                f"2 x {self.latent_dim} for mean and scale and the rest for the posterior_flow, "
                f"got {tuple(out.shape) if isinstance(out, Tensor) else show(out)}."
            )
        d = self.latent_dim
        # An encoder in bfloat16 ends here: densities are computed in the parameters' dtype.
        mean, raw, context = out.to(dtype).split([d, d, self.outputs - 2 * d], 1)
        # Scale 1 where the encoder says 0.
        scale = F.softplus(raw + math.log(math.e - 1)).clamp_min(torch.finfo(raw.dtype).eps)
        return mean, scale, context if self.outputs > 2 * d else None

    def _push(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """z_0 of shape ``(draws, batch, D)`` through the flow, and its log-det."""
        if self.posterior_flow is None:
            return z, z.new_zeros(())
        draws, batch = z.shape[:2]
        if context is not None:
            context = context.expand(draws, *context.shape).flatten(0, 1)
        z, log_det = self.posterior_flow(z.flatten(0, 1), context)
        return z.unflatten(0, (draws, batch)), log_det.unflatten(0, (draws, batch))

    def _weight(self) -> Tensor:
        """The weight of the KL in this step, which is counted."""
        self.steps_seen.add_(1)
        return (self.steps_seen / max(self.warm_up, 1)).clamp(max=1)


def _check_latents(name: str, part: Any, dim: int) -> None:
    """Refuse a flow over other latents than the decoder's."""
    for which in ("event_shape", "latent_shape"):
        shape = getattr(part, which, None)
        if not fits((dim,), shape):
            raise ArgumentError(
                f"VAE expects a {name} over the decoder's {dim} latents, got one over "
                f"{describe(shape)}."
            )
