"""Flows that bend space along few directions: planar, radial and Sylvester maps.

Rezende and Mohamed 2015 (https://arxiv.org/abs/1505.05770) push posterior samples through such
maps and never invert them. Each is a bijection all the same: here it maps data to noise, and
its inverse is exact, by a formula (radial) or by one-dimensional root finding (planar, Sylvester).

With ``context_dim`` the parameters depend on the context through a linear layer, as an amortised
posterior needs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflib.core import Bijection, ShapeError, sum_event
from nflib.linear import reflect
from nflib.rootfinding import solve_increasing


class ConditionedParameters(Bijection):
    """Named parameters that a linear function of the context may shift, row by row."""

    def __init__(self, dim: int, context_dim: int | None, **start: Tensor) -> None:
        super().__init__()
        if dim < 1:
            raise ShapeError(f"{type(self).__name__} expects a positive dim, got {dim!r}.")
        self.dim = dim
        self.event_shape = (dim,)
        self._names = tuple(start)
        for name, value in start.items():
            self.register_parameter(name, nn.Parameter(value))
        self.conditioner: nn.Linear | None = None
        if context_dim is not None:
            self.context_shape = (context_dim,)
            self.conditioner = nn.Linear(context_dim, sum(v.numel() for v in start.values()))
            nn.init.normal_(self.conditioner.weight, std=0.01)
            nn.init.zeros_(self.conditioner.bias)

    def values(self, context: Tensor | None) -> list[Tensor]:
        """The parameters, each with a leading dim of 1, or of the batch if context shifts them."""
        own = [self.get_parameter(name) for name in self._names]
        if self.conditioner is None or context is None:
            return [value.unsqueeze(0) for value in own]
        shifts = self.conditioner(context).to(own[0].dtype)
        parts = shifts.split([value.numel() for value in own], dim=1)
        return [
            value + part.unflatten(1, value.shape) for value, part in zip(own, parts, strict=True)
        ]

    def extra_repr(self) -> str:
        return f"{self.dim}"


class Planar(ConditionedParameters):
    """``z = x + u' tanh(w^T x + b)``: moves every point along u', by how far it is along w.

        log|det| = log(1 + w^T u' (1 - tanh^2(w^T x + b)))
        u' = u + (m(w^T u) - w^T u) w / |w|^2,   m(a) = softplus(a) - 1

    The second line keeps ``w^T u' > -1``, without which the map folds and is no bijection. The
    inverse solves ``a + w^T u' tanh(a + b) = w^T z`` for ``a = w^T x``, one number a row. Starts at
    the identity (u' = 0) with a random w and b, so that a deep stack starts as one, too.

    Shapes: x, z ``(batch, dim)``. Cost: O(D) each way. Paper: Rezende and Mohamed 2015, 4.1.

    Args:
        dim: number of dimensions D.
        context_dim: size of the context that shifts u, w and b, if any.
    """

    exact_inverse = False

    def __init__(self, dim: int, context_dim: int | None = None) -> None:
        w = torch.randn(dim) / max(dim, 1) ** 0.5
        # m(w^T u) = 0 at w^T u = log(e - 1), and u along w leaves nothing else of u'.
        u = math.log(math.e - 1) * w / w.square().sum()
        super().__init__(dim, context_dim, u=u, w=w, b=torch.randn(1))

    def _constrained(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u, w, b = self.values(context)
        product = (w * u).sum(1, keepdim=True)
        gain = F.softplus(product) - 1  # w^T u' > -1
        norm = w.square().sum(1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        return u + (gain - product) * w / norm, w, b, gain

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_input(x, context)
        u, w, b, gain = self._constrained(context)
        h = torch.tanh((w * x).sum(1, keepdim=True) + b)
        return x + u * h, sum_event(torch.log1p(gain * (1 - h.square())))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_input(z, context)
        u, w, b, gain = self._constrained(context)
        along = (w * z).sum(1, keepdim=True)

        def f(a: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(a + b)
            return a + gain * h, 1 + gain * (1 - h.square())

        a = solve_increasing(f, along, along - gain.abs(), along + gain.abs())
        h = torch.tanh(a + b)
        return z - u * h, -sum_event(torch.log1p(gain * (1 - h.square())))


class Radial(ConditionedParameters):
    """``z = x + beta h(r) (x - x0)``, ``h(r) = 1 / (alpha + r)``, ``r = |x - x0|``.

    Pushes points away from the centre x0 (beta > 0) or pulls them in (beta < 0).

        log|det| = (D - 1) log(1 + beta h) + log(1 + alpha beta h^2)
        alpha = softplus(a) > 0,   beta = softplus(c) - alpha > -alpha

    The inverse is exact: r solves ``r^2 + (alpha + beta - |z - x0|) r - alpha |z - x0| = 0``.

    Shapes: x, z ``(batch, dim)``. Cost: O(D) each way. Paper: Rezende and Mohamed 2015, section 4.1
    (they attribute the map to Tabak and Turner 2013).

    Args:
        dim: number of dimensions D.
        context_dim: size of the context that shifts x0, a and c, if any.
    """

    def __init__(self, dim: int, context_dim: int | None = None) -> None:
        super().__init__(
            dim, context_dim, centre=torch.randn(dim), a=torch.zeros(1), c=0.5 * torch.randn(1)
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_input(x, context)
        centre, a, c = self.values(context)
        alpha, beta = F.softplus(a), F.softplus(c) - F.softplus(a)
        offset = x - centre
        h = 1 / (alpha + torch.linalg.vector_norm(offset, dim=1, keepdim=True))
        return x + beta * h * offset, self._log_det(alpha, beta, h)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_input(z, context)
        centre, a, c = self.values(context)
        alpha, beta = F.softplus(a), F.softplus(c) - F.softplus(a)
        offset = z - centre
        rho = torch.linalg.vector_norm(offset, dim=1, keepdim=True)
        p = alpha + beta - rho
        root = torch.sqrt(p.square() + 4 * alpha * rho)
        # Two forms of the positive root: each is free of cancellation where the other is not.
        divisor = torch.where(p > 0, p + root, torch.ones_like(root))
        r = torch.where(p > 0, 2 * alpha * rho / divisor, (root - p) / 2)
        h = 1 / (alpha + r)
        return centre + offset / (1 + beta * h), -self._log_det(alpha, beta, h)

    def _log_det(self, alpha: Tensor, beta: Tensor, h: Tensor) -> Tensor:
        tangential = (self.dim - 1) * torch.log1p(beta * h)
        return sum_event(tangential + torch.log1p(alpha * beta * h.square()))


class Sylvester(ConditionedParameters):
    """``z = x + Q R tanh(R' Q^T x + b)``: M planar maps at once, along orthonormal directions.

    Q is ``(D, M)`` with orthonormal columns (a product of Householder reflections), R and R' are
    upper triangular with diagonals in (-1, 1), so that by Sylvester's determinant identity

        log|det| = sum_m log(1 + R'_mm R_mm (1 - tanh^2(.)_m)).

    The inverse solves one increasing equation for each of the M coordinates, the last one first.

    Shapes: x, z ``(batch, dim)``. Cost: O(M D + M^2) forward; M root findings back. Paper: van den
    Berg et al. 2018, https://arxiv.org/abs/1803.05649 (their Householder variant).

    Args:
        dim: number of dimensions D.
        rank: number M <= D of directions, by default D.
        context_dim: size of the context that shifts Q, R, R' and b, if any.
    """

    exact_inverse = False

    def __init__(self, dim: int, rank: int | None = None, context_dim: int | None = None) -> None:
        m = dim if rank is None else rank
        if not 1 <= m <= dim:
            raise ShapeError(f"Sylvester expects a rank between 1 and {dim}, got {m}.")
        super().__init__(
            dim,
            context_dim,
            vectors=torch.randn(m, dim),
            triangles=torch.randn(m, m) / m**0.5,
            diagonal=torch.randn(m) / m**0.5,
            b=torch.randn(m),
        )
        self.rank = m

    def _factors(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(vectors, R, R', b): one matrix carries R above its diagonal and R' below."""
        vectors, triangles, diagonal, b = self.values(context)
        inner = torch.diag_embed(torch.tanh(torch.diagonal(triangles, dim1=-2, dim2=-1)))
        r = triangles.triu(1) + inner
        r_tilde = triangles.tril(-1).mT + torch.diag_embed(torch.tanh(diagonal))
        return vectors, r, r_tilde, b

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_input(x, context)
        vectors, r, r_tilde, b = self._factors(context)
        v = reflect(x, vectors)[:, : self.rank]
        h = torch.tanh(times(r_tilde, v) + b)
        return x + self._embed(times(r, h), vectors), self._log_det(r, r_tilde, h)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_input(z, context)
        vectors, r, r_tilde, b = self._factors(context)
        target = reflect(z, vectors)[:, : self.rank]
        # Column m of v and h is known once the columns after it are: back substitution.
        v, h = torch.zeros_like(target), torch.zeros_like(target)
        for m in reversed(range(self.rank)):
            gain, slope = r[:, m, m], r_tilde[:, m, m]
            inside = (r_tilde[:, m] * v).sum(1) + b[:, m]
            right = target[:, m] - (r[:, m] * h).sum(1)
            solution = solve_coordinate(gain, slope, inside, right)
            column = F.one_hot(torch.tensor(m), self.rank).to(z)
            v = v + solution.unsqueeze(1) * column
            h = h + torch.tanh(slope * solution + inside).unsqueeze(1) * column
        return z - self._embed(times(r, h), vectors), -self._log_det(r, r_tilde, h)

    def _embed(self, v: Tensor, vectors: Tensor) -> Tensor:
        """``Q v``: back from the M coordinates to all D."""
        return reflect(F.pad(v, (0, self.dim - self.rank)), vectors.flip(-2))

    def _log_det(self, r: Tensor, r_tilde: Tensor, h: Tensor) -> Tensor:
        diagonals = torch.diagonal(r * r_tilde, dim1=-2, dim2=-1)
        return sum_event(torch.log1p(diagonals * (1 - h.square())))

    def extra_repr(self) -> str:
        return f"{self.dim}, rank={self.rank}"


def times(matrix: Tensor, x: Tensor) -> Tensor:
    """Matrix-vector products row by row, elementwise so that autocast leaves them alone."""
    return (matrix * x.unsqueeze(-2)).sum(-1)


def solve_coordinate(gain: Tensor, slope: Tensor, inside: Tensor, right: Tensor) -> Tensor:
    """The t with ``t + gain tanh(slope t + inside) = right``, given ``gain slope > -1``."""

    def f(t: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(slope * t + inside)
        return t + gain * h, 1 + gain * slope * (1 - h.square())

    return solve_increasing(f, right, right - gain.abs(), right + gain.abs())
