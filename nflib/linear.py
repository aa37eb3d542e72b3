"""Linear flows ``z = W x + b``: one contract, a row of the cost table for each structure of W.

    layer          inverse              log|det W|     parameters of W
    Dense          O(D^3)               O(D^3)         D^2
    Diagonal       O(D)                 O(D)           D
    Triangular     O(D^2)               O(D)           D (D + 1) / 2
    BlockDiagonal  O(c^2 D)             O(c^2 D)       c D            (blocks of size c)
    LU             O(D^2)               O(D)           D^2
    Permutation    O(D)                 0              none
    Householder    O(M D)               0              M D            (M reflections)

Costs are for one vector; every ``forward`` is a product with W, O(D^2) or the cost of its inverse
if that is less. A batch pays once for putting W together: O(D^2) for Triangular, O(D^3) for the
product L U. Composition adds nothing: a product of matrices is a matrix.
Tutorial table: Brubaker and Koethe, CVPR 2021; review: Kobyzev et al. 2019,
https://arxiv.org/abs/1908.09257.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflib.arguments import ArgumentError, Size, checked, integer, show
from nflib.cache import is_traced, kept
from nflib.core import (
    Bijection,
    ShapeError,
    SingularMatrixError,
    expand_log_det,
    full_precision,
    zeros_log_det,
)


class Linear(Bijection):
    """Base of the linear flows ``z = W x + b`` over vectors of size ``dim``.

    A subclass gives ``weight()``, ``log_abs_det()`` and ``solve(rhs)``; the rest is here.

    Shapes: x, z ``(batch, dim)``; W ``(dim, dim)``; log_det ``(batch,)``, the same for every row.

    Args:
        dim: number of dimensions D.
        bias: whether to add a learned b, zero at first.
    """

    @checked
    def __init__(self, dim: Size, bias: bool = True) -> None:
        super().__init__()
        self.dim = dim
        self.event_shape = (dim,)
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def weight(self) -> Tensor:
        """The matrix W, ``(dim, dim)``."""
        raise TypeError(f"{type(self).__name__} does not define weight().")

    def log_abs_det(self) -> Tensor:
        """``log|det W|``, a single number in nats."""
        raise TypeError(f"{type(self).__name__} does not define log_abs_det().")

    def apply_weight(self, x: Tensor) -> Tensor:
        """``W x`` for each row of x, ``(batch, dim)``."""
        return x @ self.weight().T

    def solve(self, rhs: Tensor) -> Tensor:
        """``W^-1 rhs`` for each row of rhs, ``(batch, dim)``."""
        raise TypeError(f"{type(self).__name__} does not define solve(rhs).")

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with full_precision(x):
            z = self.apply_weight(x)
            log_det = expand_log_det(self.log_abs_det(), x)
        return (z if self.bias is None else z + self.bias), log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with full_precision(z):
            x = self.solve(z if self.bias is None else z - self.bias)
            log_det = expand_log_det(-self.log_abs_det(), z)
        return x, log_det

    def extra_repr(self) -> str:
        return f"{self.dim}"


class Dense(Linear):
    """Any matrix: forward O(D^2) a vector, log|det| and inverse O(D^3).

    W starts as a random rotation, so that no direction is lost, or as a given matrix.

    Args:
        dim: number of dimensions D.
        bias: whether to add a learned b.
        weight: a ``(dim, dim)`` matrix to start from.

    Raises:
        SingularMatrixError: if W has no inverse, at construction or in ``inverse``.
    """

    @checked
    def __init__(self, dim: Size, bias: bool = True, weight: Tensor | None = None) -> None:
        super().__init__(dim, bias)
        if weight is not None:
            check_invertible(weight, dim, "Dense")
        start = random_rotation(dim) if weight is None else weight.detach().clone()
        self.matrix = nn.Parameter(start)

    def weight(self) -> Tensor:
        return self.matrix

    def log_abs_det(self) -> Tensor:
        return torch.linalg.slogdet(self.matrix)[1]

    def solve(self, rhs: Tensor) -> Tensor:
        return solve_matrix(self.matrix, rhs.T, "Dense").T


class Diagonal(Linear):
    """``z_i = s_i x_i + b_i`` with ``s_i = exp(a_i) > 0``: everything O(D).

    ``log|det| = sum_i a_i``. NICE ends with this layer; its learned scales rank the latent
    dimensions by importance (Dinh et al. 2014, https://arxiv.org/abs/1410.8516).
    """

    @checked
    def __init__(self, dim: Size, bias: bool = True) -> None:
        super().__init__(dim, bias)
        self.log_scale = nn.Parameter(torch.zeros(dim))

    def weight(self) -> Tensor:
        return torch.diag(self.log_scale.exp())

    def log_abs_det(self) -> Tensor:
        return self.log_scale.sum()

    def apply_weight(self, x: Tensor) -> Tensor:
        return x * self.log_scale.exp()

    def solve(self, rhs: Tensor) -> Tensor:
        return rhs * (-self.log_scale).exp()


class Triangular(Linear):
    """Lower (or upper) triangular W with positive diagonal ``exp(a_i)``.

    ``log|det| = sum_i a_i`` in O(D); the inverse is a substitution, O(D^2). With the order of the
    dimensions this is the linear autoregressive flow. Starts at the identity.

    Args:
        dim: number of dimensions D.
        upper: the upper triangle instead of the lower.
        weight: a triangular ``(dim, dim)`` matrix with positive diagonal to start from.
    """

    position: Tensor

    @checked
    def __init__(
        self, dim: Size, bias: bool = True, upper: bool = False, weight: Tensor | None = None
    ) -> None:
        super().__init__(dim, bias)
        self.upper = upper
        start = torch.eye(dim) if weight is None else weight.detach()
        keep = torch.triu if upper else torch.tril
        if start.shape != (dim, dim) or not (
            torch.equal(keep(start), start) and bool((start.diagonal() > 0).all())
        ):
            raise ShapeError(
                f"Triangular expects weight to be {'an upper' if upper else 'a lower'} triangular "
                f"matrix of shape {(dim, dim)} with positive diagonal, "
                f"got another of shape {tuple(start.shape)}."
            )
        indices = torch.triu_indices if upper else torch.tril_indices
        rows, columns = indices(dim, dim, 1 if upper else -1)
        self.log_scale = nn.Parameter(start.diagonal().log())
        self.rest = nn.Parameter(start[rows, columns])
        self.register_buffer("position", rows * dim + columns, persistent=False)

    @kept
    def weight(self) -> Tensor:
        rest = place(self.rest, self.position, (self.dim, self.dim))
        return rest + torch.diag(self.log_scale.exp())

    def log_abs_det(self) -> Tensor:
        return self.log_scale.sum()

    def solve(self, rhs: Tensor) -> Tensor:
        return solve_triangle(self.weight(), rhs, upper=self.upper)


class BlockDiagonal(Linear):
    """D / c square blocks of size c on the diagonal: inverse and log|det| O(c^3) a block.

    That is O(c^2 D) altogether, without any mixing between blocks. Blocks start as random
    rotations.

    Args:
        dim: number of dimensions D.
        block: size c of a block; it must divide ``dim``.
    """

    @checked
    def __init__(self, dim: Size, block: Size, bias: bool = True) -> None:
        super().__init__(dim, bias)
        if dim % block:
            raise ShapeError(f"BlockDiagonal expects block to divide dim = {dim}, got {block}.")
        self.block = block
        blocks = [random_rotation(block) for _ in range(dim // block)]
        self.blocks = nn.Parameter(torch.stack(blocks))

    def weight(self) -> Tensor:
        return torch.block_diag(*self.blocks.unbind())

    def log_abs_det(self) -> Tensor:
        return torch.linalg.slogdet(self.blocks)[1].sum()

    def apply_weight(self, x: Tensor) -> Tensor:
        return torch.einsum("gij,ngj->ngi", self.blocks, self._split(x)).flatten(1)

    def solve(self, rhs: Tensor) -> Tensor:
        columns = self._split(rhs).permute(1, 2, 0)
        return solve_matrix(self.blocks, columns, "BlockDiagonal").permute(2, 0, 1).flatten(1)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.dim // self.block, self.block))

    def extra_repr(self) -> str:
        return f"{self.dim}, block={self.block}"


class LU(Linear):
    """``W = P L U`` with P a fixed permutation, L unit lower and U upper triangular.

    ``log|det| = sum_i log|u_ii|`` in O(D); the inverse is two substitutions, O(D^2). The diagonal
    of U keeps the sign it starts with and learns its logarithm, so W is never singular. Starts as a
    random rotation. Kingma and Dhariwal 2018, https://arxiv.org/abs/1807.03039.

    Args:
        dim: number of dimensions D.
        weight: an invertible ``(dim, dim)`` matrix to start from instead.
    """

    order: Tensor
    inverse_order: Tensor
    sign: Tensor

    @checked
    def __init__(self, dim: Size, bias: bool = True, weight: Tensor | None = None) -> None:
        super().__init__(dim, bias)
        if weight is not None:
            check_invertible(weight, dim, "LU")
        start = random_rotation(dim) if weight is None else weight.detach()
        p, lower, upper = torch.linalg.lu(start)
        diagonal = upper.diagonal()
        # One matrix holds L below its diagonal, U above it and log|u_ii| on it: D^2 numbers, as W.
        packed = lower.tril(-1) + upper.triu(1) + torch.diag(diagonal.abs().log())
        self.packed = nn.Parameter(packed)
        self.register_buffer("sign", diagonal.sign())
        # (P y)_i = y_order[i]: indexing is cheaper than a product with P.
        order = p.argmax(1)
        self.register_buffer("order", order)
        self.register_buffer("inverse_order", order.argsort(), persistent=False)
        self.register_load_state_dict_post_hook(refresh_inverse_order)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The triangular factors (L, U), each ``(dim, dim)``."""
        return factors(self.packed, self.sign)

    @kept
    def weight(self) -> Tensor:
        lower, upper = self.factors()
        return torch.addmm(upper, lower, upper).index_select(0, self.order)

    def log_abs_det(self) -> Tensor:
        return self.packed.diagonal().sum()

    def solve(self, rhs: Tensor) -> Tensor:
        lower, upper = self.factors()
        y = rhs.index_select(1, self.inverse_order)
        y = solve_triangle(lower, y, upper=False, unitriangular=True)
        return solve_triangle(upper, y, upper=True)


def factors(packed: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """L without its ones and U of an `LU`, or of a stack of them, ``(..., dim, dim)`` each."""
    diagonal = sign * packed.diagonal(dim1=-2, dim2=-1).exp()
    upper = torch.diagonal_scatter(packed.triu(), diagonal, dim1=-2, dim2=-1)
    return packed.tril(-1), upper


class Permutation(Bijection):
    """``z_i = x_{order_i}`` along the first event dim; log|det| 0, cost O(D), nothing learned.

    Between coupling or autoregressive layers it decides which dimension sees which. Works on
    vectors ``(batch, dim)`` and on images ``(batch, channels, height, width)`` alike.

    Args:
        order: a permutation of 0..D-1 as a sequence, or an int D for a random one.
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(self, order: int | Tensor | Sequence[int]) -> None:
        super().__init__()
        indices = permutation(order, "Permutation")
        self.dim = len(indices)
        self.event_shape = (self.dim, ...)
        self.register_buffer("order", indices)
        self.register_buffer("inverse_order", indices.argsort(), persistent=False)
        self.register_load_state_dict_post_hook(refresh_inverse_order)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.index_select(1, self.order), zeros_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z.index_select(1, self.inverse_order), zeros_log_det(z)

    def extra_repr(self) -> str:
        return f"{self.dim}"


class Householder(Linear):
    """A product of M reflections ``H_m = I - 2 v_m v_m^T / |v_m|^2``: orthogonal, log|det| 0.

    Forward and inverse O(M D) a vector; M = D reaches every orthogonal matrix of the same
    determinant's sign. A zero v_m gives no reflection. Tomczak and Welling 2016,
    https://arxiv.org/abs/1611.09630.

    Args:
        dim: number of dimensions D.
        reflections: number M of reflections, by default ``dim``.
    """

    @checked
    def __init__(self, dim: Size, reflections: Size | None = None, bias: bool = True) -> None:
        super().__init__(dim, bias)
        count = dim if reflections is None else reflections
        self.vectors = nn.Parameter(torch.randn(count, dim))

    def apply_weight(self, x: Tensor) -> Tensor:
        return reflect(x, self.vectors)

    def weight(self) -> Tensor:
        eye = torch.eye(self.dim, device=self.vectors.device, dtype=self.vectors.dtype)
        return self.apply_weight(eye).T

    def log_abs_det(self) -> Tensor:
        return self.vectors.new_zeros(())

    def solve(self, rhs: Tensor) -> Tensor:
        return reflect(rhs, self.vectors.flip(0))


def reflect(x: Tensor, vectors: Tensor) -> Tensor:
    """Reflect rows of x, ``(batch, D)``, in each of the vectors, ``(M, D)``, in turn.

    ``vectors`` may also be ``(batch, M, D)``: then each row has its own reflections.
    """
    units = F.normalize(vectors, dim=-1)
    for unit in units.unbind(-2):
        x = x - 2 * (x * unit).sum(-1, keepdim=True) * unit
    return x


def place(values: Tensor, position: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of zeros with values at flat positions: masked matrices store only what they use."""
    return values.new_zeros(math.prod(shape)).scatter_(0, position, values).view(shape)


def refresh_inverse_order(module: nn.Module, _: object) -> None:
    """After a load: the inverse permutation follows from the one that was stored."""
    module.inverse_order.copy_(module.order.argsort())  # type: ignore[operator]


def random_rotation(dim: int) -> Tensor:
    """A random orthogonal ``(dim, dim)`` matrix, uniform in the Haar measure."""
    q, r = torch.linalg.qr(torch.randn(dim, dim))
    return q * r.diagonal().sign()


def solve_triangle(
    matrix: Tensor, rhs: Tensor, *, upper: bool, unitriangular: bool = False
) -> Tensor:
    """``matrix^-1 rhs`` for each row of rhs, ``(batch, D)``, by substitution."""
    # Rows times the inverse of the transpose: half the time of columns, which torch would copy.
    solved = torch.linalg.solve_triangular(
        matrix.T, rhs, upper=not upper, left=False, unitriangular=unitriangular
    )
    return solved.contiguous()


def solve_matrix(matrix: Tensor, rhs: Tensor, name: str) -> Tensor:
    """``matrix^-1 rhs`` for (stacks of) square matrices; `SingularMatrixError` names the layer."""
    solution, info = torch.linalg.solve_ex(matrix, rhs)
    # A compiled graph cannot branch on values; there a singular matrix gives inf or NaN.
    if not is_traced() and bool(info.any()):
        raise SingularMatrixError(f"{name} expects an invertible matrix, got a singular one.")
    return solution


def permutation(order: int | Tensor | Sequence[int], name: str) -> Tensor:
    """The indices of a permutation: those given, or random ones of so many numbers."""
    try:
        if not isinstance(order, Tensor | Sequence) or isinstance(order, str):
            size = integer(order)
            return torch.randperm(size if size > 0 else -1)
        indices = torch.as_tensor(order)
        if indices.ndim == 1 and len(indices) and not indices.is_floating_point():
            if torch.equal(indices.sort().values, torch.arange(len(indices))):
                return indices
    except (TypeError, ValueError, RuntimeError):
        pass
    raise ArgumentError(
        f"{name} expects the order as each of 0..D-1 once, or as a number D of dimensions, "
        f"got {show(order.tolist() if isinstance(order, Tensor) else order)}."
    )


def check_invertible(matrix: Tensor, dim: int, name: str) -> None:
    """Raise `SingularMatrixError` unless the square matrix can be inverted in its own precision."""
    if matrix.shape != (dim, dim) or not matrix.is_floating_point():
        raise ShapeError(
            f"{name} expects weight as a matrix of shape {(dim, dim)} of real numbers, "
            f"got {matrix.dtype} of shape {tuple(matrix.shape)}."
        )
    condition = torch.linalg.cond(matrix.detach()).item()
    if not math.isfinite(condition) or condition > 1 / torch.finfo(matrix.dtype).eps:
        raise SingularMatrixError(
            f"{name} expects an invertible matrix, got one with condition number {condition:.1e}."
        )
