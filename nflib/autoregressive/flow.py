"""The masked autoregressive layer of a flow, and its two ways back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from nflib import graphs, precision
from nflib.arguments import ContextShape, Positive, Share, Size, Widths, checked
from nflib.autoregressive.made import MADE, ranks
from nflib.autoregressive.walk import in_order
from nflib.cache import is_traced
from nflib.core import Bijection, sum_log_det
from nflib.core.values import within
from nflib.elementwise import Elementwise
from nflib.nets import widths

# The Jacobi inverse starts from guesses. What it feeds to the network is kept within +-GUESS where
# it is not final yet: an overflow there would spread, for zero times infinity is not a number.
GUESS = 1e4
# Rounds of the Jacobi inverse between two looks at whether anything still changes; each look makes
# the host wait for an accelerator.
ROUNDS = 4


class MaskedAutoregressive(Bijection):
    """``z_i = tau(x_i; theta_i(x_<i, context))``, theta from a `MADE`: one layer of a MAF.

        log|det| = sum_i log tau'_i

    x_<i are the dimensions before i in the order. ``forward`` costs one pass of the network.
    ``inverse`` is exact, by one of two solvers:

        "incremental"  one dimension after the other, D short steps in which each unit of the
                       network is evaluated once: the arithmetic of about one pass
        "jacobi"       x <- tau^-1(z; theta(x)) for all dimensions at once. Round k makes rank
                       k - 1 final, so D rounds are enough; it stops when nothing changes any
                       more, often much earlier. Good on accelerators, where it looks every 4
                       rounds only, for a look makes the host wait. Compiled it takes all D.

    Gradients flow through both. On a GPU ``with nflib.graphs.captured(flow):`` replays the short
    steps of the incremental solver. `Inverse` of this layer is IAF, with the two costs exchanged.
    Papamakarios et al. 2017 (MAF), https://arxiv.org/abs/1705.07057; Kingma et al. 2016 (IAF),
    https://arxiv.org/abs/1606.04934.

    Args:
        dim: number D of dimensions.
        elementwise: the map tau, e.g. `nflib.elementwise.Affine()`.
        hidden, context_dim, order, residual, dropout: of the `MADE`, which warns if its hidden
            layers are too narrow for D.
        solver: ``"incremental"`` or ``"jacobi"``.
        limit: the network sees x clamped to [-limit, limit], as in a `Coupling`: a rare noise
            vector cannot be thrown further out by each dimension that follows another.
    """

    @checked
    def __init__(
        self,
        dim: Size,
        elementwise: Elementwise,
        hidden: Widths = (128, 128),
        context_dim: ContextShape = None,
        order: Sequence[int] | Tensor | str | None = None,
        residual: bool = False,
        dropout: Share = 0.0,
        solver: Literal["incremental", "jacobi"] = "incremental",
        limit: Positive = math.inf,
    ) -> None:
        super().__init__()
        self.elementwise, self.solver, self.limit = elementwise, solver, limit
        self.exact_inverse = elementwise.exact_inverse
        found = ranks(dim, order, type(self).__name__)
        self.made = MADE(dim, elementwise.count, hidden, context_dim, found, residual, dropout)
        self.is_wide = precision.is_wide(pairwise([dim, *widths(hidden), elementwise.count * dim]))
        self.event_shape, self.context_shape = (dim,), self.made.context_shape

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ranked = self.made.to_rank(x)
        z, terms = self.elementwise.forward(ranked, self._theta(ranked, context))
        return self.made.from_rank(z), sum_log_det(terms)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ranked = self.made.to_rank(z)
        if self.solver == "jacobi":
            x, terms = self._jacobi(ranked, context)
        else:
            given = [] if context is None or self.context_shape is None else [context]
            x, terms = graphs.replayed(self, self._incremental, ranked, *given)
        return self.made.from_rank(x), sum_log_det(terms)

    def _theta(self, x: Tensor, context: Tensor | None) -> Tensor:
        """theta, ``(batch, count, dim)``, by rank; the network's bfloat16, if any, ends here."""
        with precision.of_network(self.is_wide, x):
            return self.made.by_rank(self._seen(x), context).to(x.dtype)

    def _seen(self, x: Tensor) -> Tensor:
        return within(x, self.limit)

    def _incremental(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        columns = z.T.split(1)  # of (1, batch) each
        found: list[tuple[Tensor, Tensor]] = []

        def choose(rank: int, theta: Tensor) -> Tensor:
            found.append(self.elementwise.inverse(columns[rank], theta.to(z.dtype).unsqueeze(0)))
            return self._seen(found[-1][0])

        with precision.of_network(self.is_wide, z):
            in_order(self.made, choose, z.T, context)
        x, terms = zip(*found, strict=True)
        return torch.cat(x).T, torch.cat(terms).T

    def _jacobi(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        dim = z.shape[1]
        rank = torch.arange(dim, device=z.device)
        guess = z.clamp(-GUESS, GUESS)
        for k in range(dim):
            x, terms = self.elementwise.inverse(z, self._theta(guess, context))
            if not is_traced() and (z.device.type == "cpu" or k % ROUNDS == 3):
                if torch.equal(x, guess):
                    break
            guess = torch.where(rank <= k, x, x.clamp(-GUESS, GUESS))
        return x, terms

    def extra_repr(self) -> str:
        limit = "" if math.isinf(self.limit) else f", limit={self.limit:g}"
        return f"{self.elementwise}, solver={self.solver!r}{limit}"
