"""Flows for a posterior: what moves z_0, drawn from a normal, to the shape of q(z | x)."""

from __future__ import annotations

from functools import partial
from typing import Literal

from nflib.arguments import ContextShape, Count, Size, Widths
from nflib.autoregressive import MaskedAutoregressive
from nflib.core import Bijection, Compose
from nflib.coupling import Coupling, halves
from nflib.elementwise import Affine
from nflib.linear import Permutation
from nflib.models.parts import model
from nflib.nets import MLP
from nflib.normalization import BatchNorm
from nflib.planar import Planar, Radial, Sylvester

Kind = Literal["planar", "radial", "sylvester", "realnvp", "iaf"]


@model
def posterior_flow(
    kind: Kind,
    dim: Size,
    steps: Count,
    *,
    context_dim: ContextShape = None,
    hidden: Widths = (64, 64),
    rank: Size | None = None,
    batch_norm: bool = False,
    weight_norm: bool = False,
) -> Compose | None:
    """Steps that a `VAE` applies in their ``forward`` direction; None for no steps.

        planar, radial    steps maps, one direction or one centre each
        sylvester         steps maps of ``rank`` directions each
        realnvp           steps pairs of affine couplings: each step moves every latent once
        iaf               steps masked autoregressive maps, each order the reverse of the last

    ``forward`` of each is one pass of its networks. Rezende and Mohamed 2015 (planar, radial),
    van den Berg et al. 2018 (Sylvester), Dinh et al. 2016 (RealNVP), Kingma et al. 2016 (IAF).

    Args:
        kind: of the steps.
        dim: number of latents.
        steps: number k of transformations.
        context_dim: numbers of the encoder that the steps' parameters depend on, if any.
        hidden: widths of the networks of realnvp and iaf.
        rank: directions of a Sylvester map, by default all.
        batch_norm: a batch-norm layer before each step.
        weight_norm: in the networks of realnvp.
    """
    if steps == 0:
        return None
    layers: list[Bijection] = []
    for k in range(steps):
        layers += [BatchNorm(dim)] if batch_norm else []
        layers += _step(kind, dim, k, context_dim, hidden, rank, weight_norm)
    return Compose(*layers)


def _step(
    kind: Kind,
    dim: int,
    k: int,
    context_dim: ContextShape,
    hidden: Widths,
    rank: int | None,
    weight_norm: bool,
) -> list[Bijection]:
    if kind == "planar":
        return [Planar(dim, context_dim)]
    if kind == "radial":
        return [Radial(dim, context_dim)]
    if kind == "sylvester":
        return [Sylvester(dim, rank, context_dim)]
    if kind == "iaf":
        order = range(dim) if k % 2 == 0 else range(dim - 1, -1, -1)
        return [MaskedAutoregressive(dim, Affine(), hidden, context_dim, order=order)]
    net = partial(MLP, hidden=hidden, context_dim=context_dim, weight_norm=weight_norm)
    mixing: list[Bijection] = [Permutation(dim)] if k and dim > 2 else []
    pair = [Coupling(halves(dim, flip), Affine(), net) for flip in (False, True)]
    return [*mixing, *pair]
