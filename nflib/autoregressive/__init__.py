"""Autoregressive flows: each dimension is moved by a map that the dimensions before it choose.

    z_i = tau(x_i; theta_i(x_1, ..., x_{i-1})),    log|det| = sum_i log tau'_i

The Jacobian is triangular. One pass of a masked network gives all theta_i at once, so ``forward``
is as parallel as any layer; the way back finds x_1, then x_2, and so on. Read forwards the layer is
a masked autoregressive flow (MAF, quick to evaluate), inside `Inverse` an inverse autoregressive
flow (IAF, quick to sample): the same map, read in two directions.
Germain et al. 2015 (MADE), https://arxiv.org/abs/1502.03509; Kingma et al. 2016 (IAF),
https://arxiv.org/abs/1606.04934; Papamakarios et al. 2017 (MAF), https://arxiv.org/abs/1705.07057.
"""

from nflib.autoregressive.flow import MaskedAutoregressive
from nflib.autoregressive.made import MADE, MaskedLinear, NarrowHiddenWarning

__all__ = ["MADE", "MaskedAutoregressive", "MaskedLinear", "NarrowHiddenWarning"]
