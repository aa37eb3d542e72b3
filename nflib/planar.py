"""Flows that bend space along few directions: planar, radial and Sylvester maps.

Rezende and Mohamed 2015 (https://arxiv.org/abs/1505.05770) push posterior samples through such
maps and never invert them. Each is a bijection all the same: here it maps data to noise, and
its inverse is exact, by a formula (radial) or by one-dimensional root finding (planar, Sylvester).

What keeps each of them a bijection is one positive number, a softplus or a product of sigmoids, by
which it stretches space where it squeezes most. Log-dets and inverses are written in that number
and sums of positive terms: ``1 + g`` with g close to -1 would round to zero.

With ``context_dim`` the parameters depend on the context through a linear layer, as an amortised
posterior needs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflib.arguments import ArgumentError, ContextShape, Size, checked
from nflib.core import Bijection, sum_event
from nflib.linear import reflect
from nflib.nets import vector_context
from nflib.rootfinding import solve_increasing


class ConditionedParameters(Bijection):
    """Named parameters that a linear function of the context may shift, row by row."""

    @checked
    def __init__(self, dim: Size, context_dim: ContextShape, **start: Tensor) -> None:
        super().__init__()
        self.dim, self.event_shape = dim, (dim,)
        self.context_shape = vector_context(context_dim, type(self).__name__)
        self._names = tuple(start)
        for name, value in start.items():
            self.register_parameter(name, nn.Parameter(value))
        self.conditioner: nn.Linear | None = None
        if self.context_shape is not None:
            size = sum(value.numel() for value in start.values())
            self.conditioner = nn.Linear(*self.context_shape, size)
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

        log|det| = log(m (1 - h^2) + h^2),   h = tanh(w^T x + b),   m = softplus(w^T u)
        u' = u + (m - 1 - w^T u) w / |w|^2

    The second line makes ``w^T u' = m - 1 > -1``, without which the map folds and is no bijection.
    The inverse solves ``s + (m - 1) tanh(s) = w^T z + b`` for ``s = w^T x + b``, one number a row.
    Starts at the identity (u' = 0) with a random w and b, so that a deep stack starts as one, too.

    Shapes: x, z ``(batch, dim)``. Cost: O(D) each way. Paper: Rezende and Mohamed 2015, 4.1.

    Args:
        dim: number of dimensions D.
        context_dim: size of the context that shifts u, w and b, if any.
    """

    exact_inverse = False

    @checked
    def __init__(self, dim: Size, context_dim: ContextShape = None) -> None:
        w = torch.randn(dim) / dim**0.5
        # m = 1 at w^T u = log(e - 1), and u along w leaves nothing else of u'.
        u = math.log(math.e - 1) * w / w.square().sum()
        super().__init__(dim, context_dim, u=u, w=w, b=torch.randn(1))

    def _constrained(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(u', w, b, m)."""
        u, w, b = self.values(context)
        product = (w * u).sum(1, keepdim=True)
        margin = positive(product)
        norm = w.square().sum(1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        return u + (margin - 1 - product) * w / norm, w, b, margin

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, w, b, margin = self._constrained(context)
        s = (w * x).sum(1, keepdim=True) + b
        return x + u * torch.tanh(s), sum_event(log_stretch(margin, s))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, w, b, margin = self._constrained(context)
        # m may be thousands, and as wide is the bracket of the search.
        s = solve_tanh(margin, (w * z).sum(1, keepdim=True) + b, rounds=30)
        return z - u * torch.tanh(s), -sum_event(log_stretch(margin, s))


class Radial(ConditionedParameters):
    """``z = x0 + (gamma + r) / (alpha + r) (x - x0)``, ``r = |x - x0|``.

    Pushes points away from the centre x0 (gamma > alpha) or pulls them in (gamma < alpha). It is
    the paper's ``x + beta (x - x0) / (alpha + r)`` with ``beta = gamma - alpha > -alpha``.

        log|det| = (D - 1) log((gamma + r) / (alpha + r))
                   + log((r (r + 2 alpha) + alpha gamma) / (alpha + r)^2)
        alpha = softplus(a),   gamma = softplus(c)

    The inverse is exact: r solves ``r^2 + (gamma - |z - x0|) r - alpha |z - x0| = 0``.

    Shapes: x, z ``(batch, dim)``. Cost: O(D) each way. Paper: Rezende and Mohamed 2015, section 4.1
    (they attribute the map to Tabak and Turner 2013).

    Args:
        dim: number of dimensions D.
        context_dim: size of the context that shifts x0, a and c, if any.
    """

    @checked
    def __init__(self, dim: Size, context_dim: ContextShape = None) -> None:
        start = {"centre": torch.randn(dim), "a": torch.zeros(1), "c": 0.5 * torch.randn(1)}
        super().__init__(dim, context_dim, **start)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        centre, alpha, gamma = self._constrained(context)
        offset = x - centre
        r = torch.linalg.vector_norm(offset, dim=1, keepdim=True)
        return centre + (gamma + r) / (alpha + r) * offset, self._log_det(alpha, gamma, r)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        centre, alpha, gamma = self._constrained(context)
        offset = z - centre
        rho = torch.linalg.vector_norm(offset, dim=1, keepdim=True)
        p = gamma - rho
        root = torch.sqrt(p.square() + 4 * alpha * rho)
        # Two forms of the positive root: each is free of cancellation where the other is not.
        divisor = torch.where(p > 0, p + root, torch.ones_like(root))
        r = torch.where(p > 0, 2 * alpha * rho / divisor, (root - p) / 2)
        return centre + (alpha + r) / (gamma + r) * offset, -self._log_det(alpha, gamma, r)

    def _constrained(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        centre, a, c = self.values(context)
        return centre, positive(a), positive(c)

    def _log_det(self, alpha: Tensor, gamma: Tensor, r: Tensor) -> Tensor:
        tangential = ((gamma + r) / (alpha + r)).log()
        radial = (r * (r + 2 * alpha) + alpha * gamma).log() - 2 * (alpha + r).log()
        return sum_event((self.dim - 1) * tangential + radial)


class Sylvester(ConditionedParameters):
    """``z = x + Q R tanh(R' Q^T x + b)``: M planar maps at once, along orthonormal directions.

    Q is ``(D, M)`` with orthonormal columns (a product of Householder reflections), R and R' are
    upper triangular with diagonals ``tanh(a_m)`` and ``tanh(c_m)``, so that by Sylvester's
    determinant identity

        log|det| = sum_m log(1 + R'_mm R_mm (1 - h_m^2)) = sum_m log(k_m (1 - h_m^2) + h_m^2)
        h = tanh(R' Q^T x + b)
        k_m = 1 + tanh(a_m) tanh(c_m) = 2 (sigma(2 a_m) sigma(2 c_m) + sigma(-2 a_m) sigma(-2 c_m))

    The inverse solves one increasing equation for each of the M coordinates, the last one first.
    Starts at the identity (R = 0) with a random Q, R' and b.

    Shapes: x, z ``(batch, dim)``. Cost: O(M D + M^2) forward; M root findings back. Paper: van den
    Berg et al. 2018, https://arxiv.org/abs/1803.05649 (their Householder variant).

    Args:
        dim: number of dimensions D.
        rank: number M <= D of directions, by default D.
        context_dim: size of the context that shifts Q, R, R' and b, if any.
    """

    exact_inverse = False

    @checked
    def __init__(
        self, dim: Size, rank: Size | None = None, context_dim: ContextShape = None
    ) -> None:
        m = dim if rank is None else rank
        if m > dim:
            raise ArgumentError(f"Sylvester expects a rank of at most dim = {dim}, got {m}.")
        super().__init__(
            dim,
            context_dim,
            vectors=torch.randn(m, dim),
            # R = 0, and R' is what learns the directions from.
            triangles=torch.randn(m, m).tril(-1) / m**0.5,
            diagonal=torch.randn(m) / m**0.5,
            b=torch.randn(m),
        )
        self.rank = m

    def _factors(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(vectors, R, R', k, b): one matrix carries R above its diagonal and R' below."""
        vectors, triangles, c, b = self.values(context)
        a = torch.diagonal(triangles, dim1=-2, dim2=-1)
        r = triangles.triu(1) + torch.diag_embed(torch.tanh(a))
        r_tilde = triangles.tril(-1).mT + torch.diag_embed(torch.tanh(c))
        alike = torch.sigmoid(2 * a) * torch.sigmoid(2 * c)
        opposite_signs = torch.sigmoid(-2 * a) * torch.sigmoid(-2 * c)
        return vectors, r, r_tilde, at_least(2 * (alike + opposite_signs)), b

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        vectors, r, r_tilde, margin, b = self._factors(context)
        s = times(r_tilde, reflect(x, vectors)[:, : self.rank]) + b
        return x + self._embed(times(r, torch.tanh(s)), vectors), sum_event(log_stretch(margin, s))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        vectors, r, r_tilde, margin, b = self._factors(context)
        target = reflect(z, vectors)[:, : self.rank]
        # Coordinate m of v = Q^T x is known once those after it are: back substitution.
        v, s = torch.zeros_like(target), torch.zeros_like(target)
        for m in reversed(range(self.rank)):
            inside = (r_tilde[:, m] * v).sum(1) + b[:, m]
            right = target[:, m] - (r[:, m] * torch.tanh(s)).sum(1)
            # v + R_mm tanh(s) = right and s = R'_mm v + inside, without v.
            solution = solve_tanh(margin[:, m], r_tilde[:, m, m] * right + inside)
            column = F.one_hot(torch.tensor(m, device=z.device), self.rank).to(z)
            moved = right - r[:, m, m] * torch.tanh(solution)
            v, s = v + moved[:, None] * column, s + solution[:, None] * column
        return z - self._embed(times(r, torch.tanh(s)), vectors), -sum_event(log_stretch(margin, s))

    def _embed(self, v: Tensor, vectors: Tensor) -> Tensor:
        """``Q v``: back from the M coordinates to all D."""
        return reflect(F.pad(v, (0, self.dim - self.rank)), vectors.flip(-2))

    def extra_repr(self) -> str:
        return f"{self.dim}, rank={self.rank}"


def times(matrix: Tensor, x: Tensor) -> Tensor:
    """Matrix-vector products row by row, elementwise so that autocast leaves them alone."""
    return (matrix * x.unsqueeze(-2)).sum(-1)


def positive(a: Tensor) -> Tensor:
    """softplus(a), kept away from zero, where it underflows."""
    return at_least(F.softplus(a))


def at_least(margin: Tensor) -> Tensor:
    """A positive number, at least the dtype's epsilon squared: its reciprocals do not overflow."""
    return margin.clamp_min(torch.finfo(margin.dtype).eps ** 2)


def log_stretch(margin: Tensor, s: Tensor) -> Tensor:
    """``log(m (1 - h^2) + h^2)`` with ``h = tanh(s)``, the log-derivative of ``s + (m - 1) h``.

    Far out, where h rounds to one, ``1 - h^2 = 4 sigma(2 s) sigma(-2 s)`` does not round to zero.
    """
    steepness = 4 * torch.sigmoid(2 * s) * torch.sigmoid(-2 * s)
    return (margin * steepness + torch.tanh(s).square()).log()


def solve_tanh(margin: Tensor, target: Tensor, rounds: int | None = None) -> Tensor:
    """The s with ``s + (m - 1) tanh(s) = target``, for m > 0; rounds of the search for it."""

    def f(s: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(s)
        square = h.square()
        return s + (margin - 1) * h, margin * (1 - square) + square

    # The left side is odd in s, so s has the target's sign, and is at most m - 1 away from it.
    far = (target.abs() - (margin - 1)).clamp_min(0) * target.sign()
    lower, upper = torch.minimum(target, far), torch.maximum(target, far)
    return solve_increasing(f, target, lower, upper, rounds)
