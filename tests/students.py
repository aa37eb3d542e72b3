"""Layers as students write them: right ones, and one for each mistake they make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nflib.core import Bijection, Stochastic

Pair = tuple[Tensor, Tensor]


class Scale(Bijection):
    """As in a chapter: ten lines, right."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x * self.s.exp(), self.s.sum().expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Pair:
        return z * (-self.s).exp(), -self.s.sum().expand(len(z))


class Shift(Bijection):
    """Without parameters."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x + 1, torch.zeros(len(x), dtype=x.dtype)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Pair:
        return z - 1, torch.zeros(len(z), dtype=z.dtype)


class NoContext(Bijection):
    def forward(self, x: Tensor) -> Pair:  # type: ignore[override]
        return x + 1, torch.zeros(len(x), dtype=x.dtype)

    def inverse(self, z: Tensor) -> Pair:  # type: ignore[override]
        return z - 1, torch.zeros(len(z), dtype=z.dtype)


class Sinh(Bijection):
    """Without parameters, with a log_det that depends on x."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x.sinh(), x.cosh().log().sum(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Pair:
        return z.asinh(), -0.5 * (1 + z**2).log().sum(1)


class Move(Bijection):
    """With a network of the context."""

    context_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 6)

    def forward(self, x: Tensor, context: Tensor) -> Pair:  # type: ignore[override]
        s, t = self.net(context).to(x.dtype).chunk(2, 1)
        return x * s.exp() + t, s.sum(1)

    def inverse(self, z: Tensor, context: Tensor) -> Pair:  # type: ignore[override]
        s, t = self.net(context).to(z.dtype).chunk(2, 1)
        return (z - t) * (-s).exp(), -s.sum(1)


class Couple(Bijection):
    """A coupling by hand, whose network stays in bfloat16 where autocast says so."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        s, t = self.net(x[:, :1]).to(x.dtype).chunk(2, 1)
        return torch.cat([x[:, :1], x[:, 1:] * s.exp() + t], 1), s.sum(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Pair:
        s, t = self.net(z[:, :1]).to(z.dtype).chunk(2, 1)
        return torch.cat([z[:, :1], (z[:, 1:] - t) * (-s).exp()], 1), -s.sum(1)


class Standardise(Bijection):
    """Constants in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x / self.scale, -self.scale.log().sum().expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Pair:
        return z * self.scale, self.scale.log().sum().expand(len(z))


# One class for each mistake; what they share with `Scale` is right.


class NoLogDet(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Any:
        return x * self.s.exp()


class NoReturn(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Any:
        x * self.s.exp(), self.s.sum().expand(len(x))  # noqa: B018


class AList(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Any:
        return [x * self.s.exp(), self.s.sum().expand(len(x))]


class ThreeThings(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Any:
        return x * self.s.exp(), self.s.sum().expand(len(x)), None


class AFloat(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Any:
        return x * self.s.exp(), 0.0


class WrongSign(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x * self.s.exp(), -self.s.sum().expand(len(x))


class SameSign(Scale):
    def inverse(self, z: Tensor, context: Tensor | None = None) -> Pair:
        return z * (-self.s).exp(), self.s.sum().expand(len(z))


class Scalar(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x * self.s.exp(), self.s.sum()


class OverDims(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x * self.s.exp(), self.s.expand_as(x)


class Column(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x * self.s.exp(), self.s.sum().expand(len(x), 1)


class OverBatch(Sinh):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x.sinh(), x.cosh().log().sum(0)


class SummedOverBatch(Sinh):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x.sinh(), x.cosh().log().sum().expand(len(x))


class Mean(Sinh):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x.sinh(), x.cosh().log().mean(1)


class NoLogarithm(Sinh):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x.sinh(), x.cosh().prod(1)


class InPlace(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        x *= self.s.exp()
        return x, self.s.sum().expand(len(x))


class InPlaceBack(Scale):
    def inverse(self, z: Tensor, context: Tensor | None = None) -> Pair:
        z[:, 0] = z[:, 0] + 0.5
        return super().inverse(z)


class PlainTensor(Scale):
    def __init__(self) -> None:
        Bijection.__init__(self)
        self.s = torch.full((3,), 0.3)  # type: ignore[assignment]


class NoLogDetEither(PlainTensor):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Any:
        return x * self.s.exp()


class MadeAtConstruction(Scale):
    def __init__(self) -> None:
        super().__init__()
        self.factor = self.s.exp()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x * self.factor, self.factor.log().sum().expand(len(x))


class ListOfModules(Scale):
    def __init__(self) -> None:
        super().__init__()
        self.nets = [nn.Linear(3, 3)]


class GlobalTensor(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x * self.s.exp() * FACTOR, (self.s + FACTOR.log()).sum().expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Pair:
        return z * (-self.s).exp() / FACTOR, -(self.s + FACTOR.log()).sum().expand(len(z))


FACTOR = torch.tensor([0.3])


class OtherArguments(Scale):
    def forward(self, x: Tensor, context: Tensor, factor: float) -> Pair:  # type: ignore[override]
        return x * self.s.exp(), self.s.sum().expand(len(x))


class NoSelf(Scale):
    def forward(x: Tensor, context: Tensor | None = None) -> Pair:  # type: ignore[override] # noqa: N805
        return x, torch.zeros(len(x))


class NoInverse(Bijection):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x, torch.zeros(len(x), dtype=x.dtype)


class RaisesForward(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x @ torch.ones(5, 5), self.s.sum().expand(len(x))


class RaisesInverse(Scale):
    def inverse(self, z: Tensor, context: Tensor | None = None) -> Pair:
        return z * self.t, -self.s.sum().expand(len(z))


class Infinite(Bijection):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x.log(), -x.log().sum(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Pair:
        return z.exp(), z.sum(1)


class Detached(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return (x * self.s.exp()).detach(), self.s.sum().expand(len(x))


class DetachedLogDet(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x * self.s.exp(), self.s.sum().detach().expand(len(x))


class Unused(Scale):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.zeros(1))


class Random(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x * self.s.exp() + 0.1 * torch.randn_like(x), self.s.sum().expand(len(x))


class Narrow(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x.float() * self.s.exp().float(), self.s.sum().expand(len(x))


class WholeBatch(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x * self.s.exp() + x.flip(0) * 0.1, self.s.sum().expand(len(x))


class NotOfOneRow(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        if len(x) == 1:
            raise RuntimeError("two rows or more")
        return super().forward(x)


class View(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x.view(-1).view(len(x), 3) * self.s.exp(), self.s.sum().expand(len(x))


class ForgetsInput(Scale):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return torch.cat([x[:, :2], x[:, :1]], 1) * self.s.exp(), self.s.sum().expand(len(x))


class WrongInverse(Scale):
    def inverse(self, z: Tensor, context: Tensor | None = None) -> Pair:
        return z * (-self.s).exp() - 1, -self.s.sum().expand(len(z))


class Noise(Stochastic):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return x + torch.rand_like(x), torch.zeros(len(x), dtype=x.dtype)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Pair:
        return z.floor(), torch.zeros(len(z), dtype=z.dtype)


class PlainModule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Causal(nn.Module):
    """Three outputs, each of which sees the inputs before it; it starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.tril(-1).T


class BoxCox(Bijection):
    """Onto z > -1 / 2 only; its inverse gives NaN beyond."""

    power = 2.0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        return (x**self.power - 1) / self.power, (self.power - 1) * x.log().sum(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Pair:
        x = (self.power * z + 1) ** (1 / self.power)
        return x, -(self.power - 1) * x.log().sum(1)


class Saturated(BoxCox):
    """The same where the inverse gives a wrong number in place of NaN."""

    power = 0.5


class Refuses(BoxCox):
    def inverse(self, z: Tensor, context: Tensor | None = None) -> Pair:
        if bool((z < -0.5).any()):
            raise ValueError("z is out of reach.")
        return super().inverse(z)


class ZeroAtTheEnd(nn.Sequential):
    """No mask at all, and no derivative either before it is trained."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 5))
        nn.init.zeros_(self[2].weight)  # type: ignore[arg-type]
