"""Two-dimensional toys with a known density: each can be sampled and evaluated exactly.

`sample(n, generator)` returns float32 points (n, 2) and the component each came from;
`log_density(x)` returns log p(x) in nats, shape (n,), in the dtype of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Generator, Tensor

LIMIT = 4.0
"""Half the side of the square [-4, 4]^2 in which the toys live."""


class Toy(Protocol):
    def sample(self, n: int, generator: Generator) -> tuple[Tensor, Tensor | None]: ...

    def log_density(self, x: Tensor) -> Tensor: ...


def _log_normal(squared_distance: Tensor, std: float) -> Tensor:
    return -0.5 * squared_distance / std**2 - math.log(2 * math.pi * std**2)


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * x[..., 0] - sin * x[..., 1], sin * x[..., 0] + cos * x[..., 1]], -1)


@dataclass(frozen=True)
class Curves:
    """x = c_k(t) + noise: k one of K curves, t in (0, 1) of density w(t), noise N(0, std^2 I).

    p(x) = 1/K sum_k int_0^1 w(t) N(x; c_k(t), std^2 I) dt, by Gauss-Legendre quadrature:
    the nodes lie closer than `std`, so that the rule is exact to rounding.
    Cost: one Gaussian for each point, curve and node.
    """

    curve: Callable[[Tensor], Tensor]
    """t (n,) -> points on each curve, (K, n, 2)."""
    std: float
    outward: bool = False
    """t has density 2t (more points further out on a spiral) instead of 1."""
    nodes: int = 256

    def sample(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        t = torch.rand(n, generator=generator)
        points = self.curve(t.sqrt() if self.outward else t)
        y = torch.randint(len(points), (n,), generator=generator)
        noise = torch.randn(n, 2, generator=generator)
        return points[y, torch.arange(n)] + self.std * noise, y

    def log_density(self, x: Tensor) -> Tensor:
        nodes, weights = _legendre(self.nodes)
        t = ((nodes + 1) / 2).to(x)
        weights = (weights / 2).to(x) * (2 * t if self.outward else 1)
        centres = self.curve(t)
        log_weights = (weights / len(centres)).log().repeat(len(centres))
        centres = centres.flatten(0, 1)
        # In parts, so that a fine grid does not ask for gigabytes.
        logs = [
            (self._log_noise(part, centres) + log_weights).logsumexp(1) for part in x.split(2048)
        ]
        return torch.cat(logs)

    def _log_noise(self, x: Tensor, centres: Tensor) -> Tensor:
        a = x[:, :1] - centres[:, 0]
        b = x[:, 1:] - centres[:, 1]
        return _log_normal(a * a + b * b, self.std)


@cache
def _legendre(n: int) -> tuple[Tensor, Tensor]:
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


def _moons(t: Tensor) -> Tensor:
    a = math.pi * t
    upper = torch.stack([2 * a.cos() - 1, 2 * a.sin() - 0.5], -1)
    return torch.stack([upper, -upper])


def _circles(t: Tensor) -> Tensor:
    circle = torch.stack([(2 * math.pi * t).cos(), (2 * math.pi * t).sin()], -1)
    return torch.stack([3.0 * circle, 1.5 * circle])


def _spirals(t: Tensor) -> Tensor:
    a = 3 * math.pi * t
    arm = (a / 3)[:, None] * torch.stack([-a.cos(), a.sin()], -1)
    return torch.stack([arm, -arm])


@dataclass(frozen=True)
class EightGaussians:
    """Eight Gaussians with std 0.3 and equal weights, on a circle of radius 3.

    p(x) = 1/8 sum_k N(x; 3 (cos k pi/4, sin k pi/4), 0.3^2 I).
    """

    radius: float = 3.0
    std: float = 0.3

    def _centres(self) -> Tensor:
        a = torch.arange(8, dtype=torch.float64) * math.pi / 4
        return self.radius * torch.stack([a.cos(), a.sin()], -1)

    def sample(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        y = torch.randint(8, (n,), generator=generator)
        return self._centres().float()[y] + self.std * torch.randn(n, 2, generator=generator), y

    def log_density(self, x: Tensor) -> Tensor:
        squared = ((x[:, None] - self._centres().to(x)) ** 2).sum(-1)
        return _log_normal(squared, self.std).logsumexp(1) - math.log(8)


@dataclass(frozen=True)
class Pinwheel:
    """Five Gaussian arms, twisted (after Johnson et al. 2016, arXiv:1603.06277).

    f ~ N((1, 0), diag(0.3^2, 0.1^2)), x = 2 R(2 pi k/5 + exp(|f|)/4) f with k uniform in 0..4.
    The angle depends on |f| (Johnson et al. use the first coordinate of f), so the twist keeps
    areas: its log-det is 0 and p(x) = 1/5 sum_k N(f_k) / 4 with f_k = R(-angle_k) x/2 is exact.
    """

    arms: int = 5
    scale: float = 2.0
    std: tuple[float, float] = (0.3, 0.1)

    def _angle(self, k: Tensor, radius: Tensor) -> Tensor:
        return 2 * math.pi * k / self.arms + radius.exp() / 4

    def sample(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        y = torch.randint(self.arms, (n,), generator=generator)
        f = torch.randn(n, 2, generator=generator) * torch.tensor(self.std)
        f[:, 0] += 1
        return self.scale * _rotate(f, self._angle(y, f.norm(dim=1))), y

    def log_density(self, x: Tensor) -> Tensor:
        f = (x / self.scale)[:, None]
        k = torch.arange(self.arms, device=x.device)
        f = _rotate(f, -self._angle(k, f.norm(dim=-1)))
        a, b = self.std
        log_p = -0.5 * ((f[..., 0] - 1) / a) ** 2 - 0.5 * (f[..., 1] / b) ** 2
        constant = math.log(2 * math.pi * a * b) + math.log(self.arms) + 2 * math.log(self.scale)
        return log_p.logsumexp(1) - constant


@dataclass(frozen=True)
class Checkerboard:
    """Uniform on every other cell of a 4 x 4 board with cells of side 2: p(x) = 1/32 or 0."""

    def sample(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        y = torch.randint(8, (n,), generator=generator)
        column = y // 2
        row = 2 * (y % 2) + column % 2
        cell = torch.stack([column, row], -1)
        return 2 * (cell + torch.rand(n, 2, generator=generator)) - LIMIT, y

    def log_density(self, x: Tensor) -> Tensor:
        cell = ((x + LIMIT) / 2).floor()
        inside = ((x >= -LIMIT) & (x < LIMIT)).all(1) & (cell.sum(1) % 2 == 0)
        zero = torch.full_like(x[:, 0], -math.inf)
        return torch.where(inside, torch.full_like(zero, -math.log(32)), zero)


def _w1(x: Tensor) -> Tensor:
    return (2 * math.pi * x[:, 0] / 4).sin()


def _w2(x: Tensor) -> Tensor:
    return 3 * (-0.5 * ((x[:, 0] - 1) / 0.6) ** 2).exp()


def _w3(x: Tensor) -> Tensor:
    return 3 * ((x[:, 0] - 1) / 0.3).sigmoid()


def _minus_log_sum(*squares: Tensor) -> Tensor:
    return -torch.stack([-0.5 * square for square in squares]).logsumexp(0)


def u1(x: Tensor) -> Tensor:
    """U1(x) = ((|x| - 2) / 0.4)^2 / 2 - log(e^{-((x_1-2)/0.6)^2/2} + e^{-((x_1+2)/0.6)^2/2})."""
    sides = _minus_log_sum(((x[:, 0] - 2) / 0.6) ** 2, ((x[:, 0] + 2) / 0.6) ** 2)
    return 0.5 * ((x.norm(dim=1) - 2) / 0.4) ** 2 + sides


def u2(x: Tensor) -> Tensor:
    """U2(x) = ((x_2 - w_1(x)) / 0.4)^2 / 2 with w_1(x) = sin(2 pi x_1 / 4)."""
    return 0.5 * ((x[:, 1] - _w1(x)) / 0.4) ** 2


def u3(x: Tensor) -> Tensor:
    """U3(x) = -log(e^{-((x_2-w_1)/0.35)^2/2} + e^{-((x_2-w_1+w_2)/0.35)^2/2}).

    w_1(x) = sin(2 pi x_1 / 4), w_2(x) = 3 exp(-((x_1 - 1) / 0.6)^2 / 2).
    """
    d = x[:, 1] - _w1(x)
    return _minus_log_sum((d / 0.35) ** 2, ((d + _w2(x)) / 0.35) ** 2)


def u4(x: Tensor) -> Tensor:
    """U4(x) = -log(e^{-((x_2-w_1)/0.4)^2/2} + e^{-((x_2-w_1+w_3)/0.35)^2/2}).

    w_1(x) = sin(2 pi x_1 / 4), w_3(x) = 3 sigmoid((x_1 - 1) / 0.3).
    """
    d = x[:, 1] - _w1(x)
    return _minus_log_sum((d / 0.4) ** 2, ((d + _w3(x)) / 0.35) ** 2)


@dataclass(frozen=True)
class Potential:
    """p(x) = exp(-U(x)) / Z on [-4, 4]^2, U one of Rezende & Mohamed 2015 (arXiv:1505.05770).

    U2, U3 and U4 do not decay along x_1, so the density exists only on a bounded set: the square
    that the paper draws. Samples are exact, by rejection from the uniform distribution on the
    square, since exp(-U) <= 2. Z is the midpoint sum over 1600 x 1600 cells.
    """

    energy: Callable[[Tensor], Tensor]

    def sample(self, n: int, generator: Generator) -> tuple[Tensor, None]:
        kept: list[Tensor] = []
        while sum(map(len, kept)) < n:
            x = LIMIT * (2 * torch.rand(max(1024, 16 * n), 2, generator=generator) - 1)
            threshold = torch.rand(len(x), generator=generator)
            kept.append(x[2 * threshold < (-self.energy(x)).exp()])
        return torch.cat(kept)[:n], None

    def log_density(self, x: Tensor) -> Tensor:
        inside = (x.abs() <= LIMIT).all(1)
        return torch.where(inside, -self.energy(x) - _log_z(self.energy), -math.inf)


@cache
def _log_z(energy: Callable[[Tensor], Tensor], cells: int = 1600) -> float:
    width = 2 * LIMIT / cells
    line = (torch.arange(cells, dtype=torch.float64) + 0.5) * width - LIMIT
    columns = (torch.cartesian_prod(part, line) for part in line.split(100))
    logs = torch.stack([(-energy(x)).logsumexp(0) for x in columns])
    return float(logs.logsumexp(0)) + 2 * math.log(width)


POTENTIALS: dict[str, Callable[[Tensor], Tensor]] = {"u1": u1, "u2": u2, "u3": u3, "u4": u4}

TOYS: dict[str, Toy] = {
    "moons": Curves(_moons, std=0.2),
    "circles": Curves(_circles, std=0.15),
    "spirals": Curves(_spirals, std=0.1, outward=True),
    "pinwheel": Pinwheel(),
    "checkerboard": Checkerboard(),
    "eight_gaussians": EightGaussians(),
    **{name: Potential(energy) for name, energy in POTENTIALS.items()},
}
