"""Fitting a flow to a density that is known up to its constant."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nflib.arguments import Size, checked, show
from nflib.core import Flow, ShapeError, describe


@checked
def reverse_kl(flow: Flow, log_density: Callable[[Tensor], Tensor], n: Size = 256) -> Tensor:
    """``E_q [log q(z) - log p~(z)] = KL(q || p) - log Z`` in nats, a mean over n draws of the flow.

    ``p~ = Z p`` need not be normalised, so this is a loss for `nflib.train.fit` without data:
    ``fit(flow, None, loss=lambda q: reverse_kl(q, log_density), steps=...)``. The gradient goes
    through the samples (`Flow.rsample_with_log_prob`). Rezende and Mohamed 2015,
    https://arxiv.org/abs/1505.05770, section 6.1.

    Args:
        flow: q, of bijections whose inverse is differentiable.
        log_density: log p~ of rows, ``(n, *event) -> (n,)``, in nats.
        n: draws.
    """
    z, log_q = flow.rsample_with_log_prob(n)
    log_p = log_density(z)
    if not isinstance(log_p, Tensor) or log_p.shape != log_q.shape:
        raise ShapeError(
            f"reverse_kl expects log_density to return a number for each of {n} rows, "
            f"{describe((n,))}, got {show(log_p)}."
        )
    return (log_q - log_p).mean()
