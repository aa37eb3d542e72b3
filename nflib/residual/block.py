"""The residual block."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from nflib.arguments import Positive, Size, checked
from nflib.cache import is_traced
from nflib.core import Bijection, full_precision
from nflib.residual.lipschitz import spectral_layers, weights_made
from nflib.residual.log_det import Exact, LogDet, Roulette
from nflib.residual.pullback import in_inference_mode, pullback, without_graph
from nflib.residual.solve import Adjoint, by_fixed_point, by_newton, column, size_of, solve

SOLVERS = {"fixed point": by_fixed_point, "newton": by_newton}


class ResidualBlock(Bijection):
    """``z = x + g(x)`` for a network g with a Lipschitz constant below 1; ``log|det(I + J)|``.

    It is one to one: from ``x + g(x) = y + g(y)`` follows ``|x - y| = |g(x) - g(y)| <= c |x - y|``,
    so that x = y. Every z is reached, for ``x <- z - g(x)`` converges.

    The log-det is found in one of three ways, see `nflib.residual.log_det`: one in training, where
    an unbiased estimate will do, and one in evaluation, where ``likelihood`` says what it makes of
    ``log_prob``. The log-det of `inverse` is minus that of `forward` at the solution; estimates of
    both draw anew, so they cancel on average only.

    Gradients go through the inverse by the implicit function theorem, once: a backward pass through
    ``inverse`` with ``create_graph=True`` is refused.

    Under autocast the network stays in float32, for an inverse is no better than its g. ``forward``
    compiles as one graph with `Exact` and `Series`; the search for an inverse, which ends by its
    values, is left out of any graph. Under ``torch.func.vmap`` it does all of its rounds and checks
    nothing.

    Shapes: x, z ``(batch, *event)``. Cost: forward, one pass of g and the log-det's; inverse, tens
    of passes of g (fixed point), or a few Jacobians (Newton).
    Behrmann et al. 2019 (i-ResNet), https://arxiv.org/abs/1811.00995; Chen et al. 2019 (Residual
    Flow), https://arxiv.org/abs/1906.02735.

    Args:
        net: g: `LipschitzMLP`, `LipschitzConvNet`, or another network that keeps rows apart and
            shapes, and has a Lipschitz constant below 1; nobody checks that.
        log_det: in evaluation, by default `Exact`.
        train_log_det: in training, by default `Roulette`.
        solver: ``"fixed point"`` or ``"newton"``.
        tolerance: of the inverse's residual ``z - x - g(x)``, relative to 1 + max |z|; by default
            1e-11 in float64 and 1e-5 in float32.
        rounds: of the search for the inverse at most.

    Raises: ConvergenceError from ``inverse``, for rows that did not converge.
    """

    exact_inverse = False

    @checked
    def __init__(
        self,
        net: nn.Module,
        log_det: LogDet | None = None,
        train_log_det: LogDet | None = None,
        solver: Literal["fixed point", "newton"] = "fixed point",
        tolerance: Positive | None = None,
        rounds: Size = 1000,
    ) -> None:
        super().__init__()
        self.net = net
        self.log_det, self.train_log_det = log_det or Exact(), train_log_det or Roulette()
        self.likelihood = self.log_det.likelihood
        self.solver, self.tolerance, self.rounds = solver, tolerance, rounds
        self.event_shape = getattr(net, "event_shape", None)
        self.context_shape = getattr(net, "context_shape", None)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if in_inference_mode():
            return without_graph(self.forward, x, context)
        self._turn()
        with full_precision(x), weights_made(self.net):
            value, pull = pullback(lambda a: self._g(a, context), x)
            return x + value, self._log_det(pull, x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if in_inference_mode():
            return without_graph(self.inverse, z, context)
        return self._found(z, context)

    @torch.compiler.disable
    def _found(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        with full_precision(z):
            with torch.no_grad(), weights_made(self.net):
                x = self._solve(lambda a: self._g(a, context), z, self.solver)
            with weights_made(self.net):
                if torch.is_grad_enabled():
                    x = self._attached(x, z, context)
                _, pull = pullback(lambda a: self._g(a, context), x)
                return x, -self._log_det(pull, x)

    def _attached(self, solution: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        """The solution with the gradients that the implicit function theorem says."""

        def through(gradient: Tensor) -> Tensor:
            with torch.no_grad(), full_precision(z), weights_made(self.net):
                _, pull = pullback(lambda a: self._g(a, context), solution)
                # The tolerance is made for numbers around 1.
                scale = column(size_of(gradient), gradient)
                scale = torch.where(scale > 0, scale, torch.ones_like(scale))
                return scale * self._solve(pull, gradient / scale, "fixed point")

        return Adjoint.apply(z - self._g(solution, context), through)

    def _g(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.net(x) if self.context_shape is None else self.net(x, context)

    def _log_det(self, pull: Any, x: Tensor) -> Tensor:
        return (self.train_log_det if self.training else self.log_det)(pull, x)

    def _solve(self, g: Any, z: Tensor, solver: str) -> Tensor:
        tolerance = self.tolerance or torch.finfo(z.dtype).eps ** 0.7
        name = "ResidualBlock.inverse"
        return solve(g, z, SOLVERS[solver], tolerance, self.rounds, name)

    def _turn(self) -> None:
        """In training, one round of the power iterations: the weights have changed since."""
        if self.training and (torch.compiler.is_compiling() or not is_traced()):
            for layer in spectral_layers(self.net):
                layer.iterate()

    def extra_repr(self) -> str:
        return f"log_det={self.log_det}, train_log_det={self.train_log_det}, solver={self.solver!r}"
