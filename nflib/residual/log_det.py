"""log det(I + J) of a residual block: exact, as a series cut off, or estimated without bias.

With ``|J| < 1`` the logarithm's series holds for matrices, too, and random signs v estimate traces:

    log det(I + J) = sum_k (-1)^(k+1) tr(J^k) / k,    tr(J^k) = E[v^T J^k v],    E[v v^T] = I

Each power costs one product with J^T, a backward pass through the network.

The gradient is a series of its own, so that no term's graph has to be kept (Chen et al. 2019,
section 3.2, https://arxiv.org/abs/1906.02735):

    d log det(I + J) = tr((I + J)^-1 dJ) = E[w^T dJ v],    w = sum_k (-1)^(k-1) (J^T)^(k-1) v

w is added up on the way, without a graph. What is left for the backward pass is the graph of one
product, ``w^T J v``, however many terms there were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from nflib.arguments import Count, Positive, Size, checked
from nflib.core import log_det_dtype, sum_log_det, zeros_log_det

Pull = Callable[[Tensor], Tensor]

# Rows of a Jacobian that are computed at once.
ROWS_AT_ONCE = 16


class LogDet:
    """A way to find log|det(I + J)|; called with the product ``v -> J^T v`` and the point x.

    Attributes:
        likelihood: what it makes of a flow's ``log_prob``, as of a `nflib.core.Layer`.
    """

    likelihood = "estimate"

    def __call__(self, pull: Pull, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define __call__(pull, x).")

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


class Exact(LogDet):
    """The determinant of the whole Jacobian: D products with it, and O(D^3) for the determinant.

    For tens of dimensions; an image of 3 x 32 x 32 would take 3,072 backward passes.
    """

    likelihood = "exact"

    def __call__(self, pull: Pull, x: Tensor) -> Tensor:
        matrix = jacobian_matrix(pull, x).to(log_det_dtype(x.dtype))
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=x.device)
        return torch.linalg.slogdet(eye + matrix)[1]


class Series(LogDet):
    """The first n terms of the series, traces estimated with one random v: a biased estimate.

    What is cut off is at most ``D (-log(1 - c) - sum_{k <= n} c^k / k)`` nats, c the Lipschitz
    constant. Cost: n + 1 products. Behrmann et al. 2019, https://arxiv.org/abs/1811.00995.

    Args:
        terms: n.
    """

    @checked
    def __init__(self, terms: Size = 20) -> None:
        self.terms = terms

    def __call__(self, pull: Pull, x: Tensor) -> Tensor:
        return weighted_series(pull, x, [1.0] * self.terms)


class Roulette(LogDet):
    """All terms of the series on average, a few of them each time: an unbiased estimate.

    The first b terms always count, then N more. Term b + j is divided by ``P(N >= j)``, which makes
    up for the times when it is left out (Russian roulette). One N serves a whole batch. It is drawn
    where it is needed, on the CPU, so that a training step cannot be recorded as a CUDA graph, nor
    compiled as one; `nflib.train.fit` says so and trains without. Chen et al. 2019.

    ``"geometric"``: ``P(N >= j) = q^j``, ``q = mean / (1 + mean)``; the variance is finite if the
    largest singular value of J is below sqrt(q). ``"poisson"``, which the paper trains with: the
    probabilities fall faster than q^k for every q, so the variance is infinite wherever J has an
    eigenvalue other than zero, by terms so rare that they are hardly ever met. Training that
    scatters too much wants a smaller bound of the network, more exact terms, or in few dimensions
    `Exact`.

    Cost: b + mean + 1 products, on average.

    Args:
        exact_terms: b.
        mean: of N.
        law: of N.
    """

    @checked
    def __init__(
        self,
        exact_terms: Count = 2,
        mean: Positive = 2.0,
        law: Literal["geometric", "poisson"] = "geometric",
    ) -> None:
        self.exact_terms, self.mean, self.law = exact_terms, mean, law

    def __call__(self, pull: Pull, x: Tensor) -> Tensor:
        return weighted_series(pull, x, self.weights(self.draw()))

    def draw(self) -> int:
        """One N."""
        if self.law == "poisson":
            return int(torch.poisson(torch.tensor(self.mean)))
        # 1 - rand is never zero. log(u) / log(q) >= j with probability q^j.
        ratio = self.mean / (1 + self.mean)
        return int(torch.log(1 - torch.rand(())) / torch.tensor(ratio).log())

    def weights(self, n: int) -> list[float]:
        """What the terms count if N = n: b times 1, then ``1 / P(N >= j)`` for j from 1 to n."""
        j = torch.arange(1, n + 1, dtype=torch.float64)
        mean = torch.tensor(self.mean, dtype=torch.float64)
        tails = (
            torch.special.gammainc(j, mean) if self.law == "poisson" else (mean / (1 + mean)).pow(j)
        )
        return [1.0] * self.exact_terms + (1 / tails).tolist()


def weighted_series(pull: Pull, x: Tensor, weights: Sequence[float]) -> Tensor:
    """``sum_k w_k (-1)^(k+1) v^T J^k v / k`` for a random v, with the gradient of its expectation.

    Args:
        pull: ``v -> J^T v``.
        x: the point; only its shape and kind count here.
        weights: w_1, w_2, ...

    Returns: one number a row. Cost: a product for each weight, and one more with a graph.
    """
    v = torch.randn_like(x).sign()
    value, total, power, sign = zeros_log_det(x), torch.zeros_like(x), v, 1.0
    with torch.no_grad():
        for k, weight in enumerate(weights, 1):
            total = total + sign * weight * power
            power = pull(power)
            value = value + sign * weight / k * sum_log_det(power * v)
            sign = -sign
    if not torch.is_grad_enabled():
        return value
    slope = sum_log_det(pull(total) * v)
    # The slope counts for the gradient alone: its value is another series'.
    return value + (slope - slope.detach())


def jacobian_matrix(pull: Pull, x: Tensor) -> Tensor:
    """The Jacobians of all rows, ``(batch, D, D)``, of D products with their transpose."""
    size = x.shape[1:].numel()
    eye = torch.eye(size, dtype=x.dtype, device=x.device)
    units = eye.view(size, 1, *x.shape[1:]).expand(size, *x.shape)
    rows = torch.func.vmap(pull, chunk_size=ROWS_AT_ONCE)(units)
    return rows.flatten(2).transpose(0, 1)
