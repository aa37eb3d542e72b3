"""Variational inference: posteriors that one can only score, and autoencoders trained by a bound.

VAE            a latent-variable model p(x) = int p(x | z) p(z) dz, trained by its ELBO
vae            an image VAE as a composition: convolutions, a flow as posterior or prior
posterior_flow planar, radial, Sylvester, RealNVP and IAF steps for a posterior
reverse_kl     fits a flow to a density that is known up to its constant
"""

from nflib.variational.divergence import reverse_kl
from nflib.variational.images import ConvDecoder, ConvEncoder, vae
from nflib.variational.model import VAE, Bound
from nflib.variational.posteriors import posterior_flow

__all__ = [
    "VAE",
    "Bound",
    "ConvDecoder",
    "ConvEncoder",
    "posterior_flow",
    "reverse_kl",
    "vae",
]
