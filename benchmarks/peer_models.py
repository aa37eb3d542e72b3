"""The models that `benchmarks.peers` compares: the same architecture, once in each library.

A builder returns a module whose call is ``log_prob`` and a function that draws n samples. All maps
have the same conditioners, ReLU networks of which each layer starts as torch draws it. zuko and
nflib bring conditioners of their own; nflows, normflows and FrEIA take any, and get the plain ones
below. How a predicted number becomes a scale is each library's own choice.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from nflib.autoregressive import MADE, MaskedAutoregressive, MaskedLinear
from nflib.convolution import Invertible1x1Conv
from nflib.core import Bijection, Compose, Flow, Inverse, StandardNormal
from nflib.coupling import Coupling, channels, halves
from nflib.elementwise import Affine, RationalQuadraticSpline
from nflib.models.parts import LIMIT
from nflib.multiscale import MultiScale, Squeeze
from nflib.nets import MLP, ConvNet
from nflib.normalization import ActNorm
from nflib.planar import Planar

HIDDEN = (128, 128)
BINS, TAIL_BOUND = 8, 4.0

Sample = Callable[[int], Tensor]
Built = tuple[nn.Module, Sample]
Builder = Callable[[], Built]


class Density(nn.Module):
    """A library's model, called as ``log_prob``: what is trained, timed and compiled."""

    def __init__(self, flow: nn.Module, log_prob: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.flow, self.log_prob = flow, log_prob

    def forward(self, x: Tensor) -> Tensor:
        return self.log_prob(self.flow, x)


class Plain(nn.Sequential):
    """A conditioner for the libraries that take any; they call it with a context, here none."""

    # nflows and normflows divide what a spline's softmax sees by the root of this.
    hidden_features = HIDDEN[-1]

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return super().forward(x)


def plain_mlp(inputs: int, outputs: int) -> nn.Module:
    """The network of nflib's `MLP`."""
    first, second = HIDDEN
    layers = nn.Linear(inputs, first), nn.Linear(first, second), nn.Linear(second, outputs)
    return Plain(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def plain_convolutions(hidden: int, inputs: int, outputs: int) -> nn.Module:
    """The network of nflib's `ConvNet`."""
    return Plain(
        nn.Conv2d(inputs, hidden, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(hidden, hidden, 1),
        nn.ReLU(),
        nn.Conv2d(hidden, outputs, 3, padding=1),
    )


def upper_half(dim: int, flip: bool) -> Tensor:
    """Which entries a coupling moves: the second half, flipped the first."""
    return (torch.arange(dim) >= dim // 2) != flip


# nflib


def nflib_flow(dim: int, steps: Sequence[Bijection]) -> Built:
    flow = Flow(Compose(*steps), StandardNormal(dim))
    return draw_last_layers(flow), flow.sample


def draw_last_layers(flow: Flow) -> Flow:
    """What nflib starts at zero is drawn, as the other libraries draw it."""
    for part in flow.modules():
        if isinstance(part, MLP):
            part.layers[-1].reset_parameters()
        elif isinstance(part, ConvNet):
            part.rest[-1].reset_parameters()
        elif isinstance(part, MADE):
            part.last = MaskedLinear(part.masks()[-1].repeat(part.count, 1))
        elif isinstance(part, Planar):
            nn.init.uniform_(part.u, -math.sqrt(2), math.sqrt(2))
    return flow


def nflib_coupling(dim: int, layers: int, spline: bool) -> Built:
    tau = RationalQuadraticSpline(BINS, TAIL_BOUND) if spline else Affine()
    net = partial(MLP, hidden=HIDDEN)
    return nflib_flow(dim, [Coupling(halves(dim, k % 2 == 1), tau, net) for k in range(layers)])


def nflib_maf(dim: int, layers: int) -> Built:
    orders = [None, range(dim - 1, -1, -1)]
    make = partial(MaskedAutoregressive, dim, Affine(), HIDDEN)
    return nflib_flow(dim, [make(order=orders[k % 2]) for k in range(layers)])


def nflib_glow(shape: tuple[int, int, int], levels: int, steps: int, hidden: int) -> Built:
    # `nflib.models.glow` without its learned priors, which the other libraries do not have.
    net = partial(ConvNet, hidden=hidden)
    scales, c = [], shape[0]
    for _ in range(levels):
        c *= 4
        parts: list[Bijection] = [Squeeze()]
        for _ in range(steps):
            parts += [ActNorm(c), Invertible1x1Conv(c)]
            parts.append(Coupling(channels(c), Affine(), net, limit=LIMIT))
        scales.append(Compose(*parts))
        c //= 2
    return nflib_flow(math.prod(shape), [MultiScale(shape, *scales)])


def nflib_planar(dim: int, layers: int) -> Built:
    flow = Flow(Compose(*[Inverse(Planar(dim)) for _ in range(layers)]), StandardNormal(dim))
    draw_last_layers(flow)
    return Density(flow, lambda f, x: objective(*f.rsample_with_log_prob(len(x)))), flow.sample


# zuko


def zuko_flow(dim: int, transforms: Sequence[nn.Module]) -> Built:
    from zuko.distributions import DiagNormal
    from zuko.lazy import Flow as ZukoFlow
    from zuko.lazy import UnconditionalDistribution

    base = UnconditionalDistribution(DiagNormal, torch.zeros(dim), torch.ones(dim), buffer=True)
    flow = ZukoFlow(transforms, base)
    return Density(flow, lambda f, x: f().log_prob(x)), lambda n: flow().sample((n,))


def zuko_coupling(dim: int, layers: int, spline: bool) -> Built:
    from zuko.flows.coupling import GeneralCouplingTransform
    from zuko.transforms import MonotonicRQSTransform

    tau = {
        "univariate": partial(MonotonicRQSTransform, bound=TAIL_BOUND),
        "shapes": [(BINS,), (BINS,), (BINS - 1,)],
    }
    make = partial(GeneralCouplingTransform, dim, hidden_features=HIDDEN, **(tau if spline else {}))
    # Its mask says what is kept.
    return zuko_flow(dim, [make(mask=~upper_half(dim, k % 2 == 1)) for k in range(layers)])


def zuko_maf(dim: int, layers: int) -> Built:
    from zuko.flows import MaskedAutoregressiveTransform

    orders = [torch.arange(dim), torch.arange(dim).flip(0)]
    make = partial(MaskedAutoregressiveTransform, dim, hidden_features=HIDDEN)
    return zuko_flow(dim, [make(order=orders[k % 2]) for k in range(layers)])


# nflows


def nflows_flow(shape: Sequence[int], transform: nn.Module) -> Built:
    from nflows.distributions import StandardNormal as NflowsNormal
    from nflows.flows import Flow as NflowsFlow

    flow = NflowsFlow(transform, NflowsNormal(list(shape)))
    return Density(flow, lambda f, x: f.log_prob(x)), flow.sample


def nflows_coupling(dim: int, layers: int, spline: bool) -> Built:
    from nflows import transforms as T

    def layer(k: int) -> nn.Module:
        mask = upper_half(dim, k % 2 == 1).int()
        if not spline:
            return T.AffineCouplingTransform(mask, plain_mlp)
        return T.PiecewiseRationalQuadraticCouplingTransform(
            mask, plain_mlp, num_bins=BINS, tails="linear", tail_bound=TAIL_BOUND
        )

    return nflows_flow([dim], T.CompositeTransform([layer(k) for k in range(layers)]))


def nflows_maf(dim: int, layers: int) -> Built:
    from nflows import transforms as T

    steps: list[nn.Module] = []
    for _ in range(layers):
        steps += [
            T.MaskedAffineAutoregressiveTransform(
                dim, HIDDEN[0], num_blocks=len(HIDDEN) - 1, use_residual_blocks=False
            ),
            T.ReversePermutation(dim),
        ]
    return nflows_flow([dim], T.CompositeTransform(steps[:-1]))


def nflows_glow(shape: tuple[int, int, int], levels: int, steps: int, hidden: int) -> Built:
    from nflows import transforms as T

    whole = T.MultiscaleCompositeTransform(levels)
    c, height, width = shape
    for _ in range(levels):
        parts: list[nn.Module] = [T.SqueezeTransform()]
        c, height, width = 4 * c, height // 2, width // 2
        for _ in range(steps):
            net = partial(plain_convolutions, hidden)
            mask = upper_half(c, False).int()
            parts += [T.ActNorm(c), T.OneByOneConvolution(c), T.AffineCouplingTransform(mask, net)]
        rest = whole.add_transform(T.CompositeTransform(parts), (c, height, width))
        c, height, width = rest or (c, height, width)
    return nflows_flow([math.prod(shape)], whole)


# normflows


def normflows_flow(dim: int, layers: Sequence[nn.Module]) -> Built:
    import normflows as nf

    # Its lists run from noise to data.
    base = nf.distributions.DiagGaussian(dim, trainable=False)
    flow = nf.NormalizingFlow(base, list(layers)[::-1])
    return Density(flow, lambda f, x: f.log_prob(x)), lambda n: flow.sample(n)[0]


def normflows_coupling(dim: int, layers: int, spline: bool) -> Built:
    import normflows as nf
    from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling

    def layer(k: int) -> nn.Module:
        if not spline:
            net = plain_mlp(dim // 2, dim)
            return nf.flows.AffineCouplingBlock(net, split_mode=("channel", "channel_inv")[k % 2])
        # Its public class has residual networks only, and a second spline for the other half.
        coupling = PiecewiseRationalQuadraticCoupling(
            upper_half(dim, k % 2 == 1).int(),
            plain_mlp,
            num_bins=BINS,
            tails="linear",
            tail_bound=TAIL_BOUND,
        )
        return nf.flows.Reverse(coupling)

    return normflows_flow(dim, [layer(k) for k in range(layers)])


def normflows_maf(dim: int, layers: int) -> Built:
    import normflows as nf

    steps: list[nn.Module] = []
    for _ in range(layers):
        layer = nf.flows.MaskedAffineAutoregressive(
            dim, HIDDEN[0], num_blocks=len(HIDDEN) - 1, use_residual_blocks=False
        )
        # Without residual blocks its network has no activation after the first layer.
        made = layer.autoregressive_net
        made.initial_layer = nn.Sequential(made.initial_layer, nn.ReLU())
        reverse = nf.flows.Permute(dim)
        reverse.perm = reverse.inv_perm = torch.arange(dim).flip(0)
        steps += [nf.flows.Reverse(layer), reverse]
    return normflows_flow(dim, steps[:-1])


def normflows_glow(shape: tuple[int, int, int], levels: int, steps: int, hidden: int) -> Built:
    import normflows as nf

    bases, flows, merges = [], [], []
    for level in range(levels):  # the last one of the way to the noise first
        scale = 2 ** (levels - level)
        c, height, width = shape[0] * 2 * scale, shape[1] // scale, shape[2] // scale
        block = partial(nf.flows.GlowBlock, c, hidden, scale_map="exp", init_zeros=False)
        flows.append([*(block() for _ in range(steps)), nf.flows.Squeeze()])
        if level == 0:
            latent = (c, height, width)
        else:
            merges.append(nf.flows.Merge())
            latent = (c // 2, height, width)
        bases.append(nf.distributions.DiagGaussian(latent, trainable=False))
    flow = nf.MultiscaleFlow(bases, flows, merges, class_cond=False)
    return Density(flow, lambda f, x: f.log_prob(x, None)), lambda n: flow.sample(n)[0]


def normflows_planar(dim: int, layers: int) -> Built:
    import normflows as nf

    flow, sample = normflows_flow(dim, [nf.flows.Planar((dim,)) for _ in range(layers)])
    return Density(flow.flow, lambda f, x: objective(*f.sample(len(x)))), sample


# FrEIA


class FreiaFlow(nn.Module):
    """FrEIA has no base density: a standard normal for it."""

    def __init__(self, network: nn.Module, dim: int) -> None:
        super().__init__()
        self.network, self.dim = network, dim

    def forward(self, x: Tensor) -> Tensor:
        z, log_det = self.network(x)
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(1) + log_det

    def sample(self, n: int) -> Tensor:
        z = torch.randn(n, self.dim, device=next(self.parameters()).device)
        return self.network(z, rev=True)[0]


def freia_coupling(dim: int, layers: int) -> Built:
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import GLOWCouplingBlock

    network = SequenceINN(dim)
    for _ in range(layers // 2):  # each block moves one half and then the other
        network.append(GLOWCouplingBlock, subnet_constructor=plain_mlp)
    flow = FreiaFlow(network, dim)
    return flow, flow.sample


def objective(x: Tensor, log_q: Tensor) -> Tensor:
    """``log p(x) - log q(x)`` for samples x of q: minus its mean is the reverse KL divergence.

    log p is a normal density about (1, ..., 1) of standard deviation 1/2, up to a constant.
    """
    return -2 * (x - 1).square().sum(1) - log_q


@dataclass(frozen=True)
class Configuration:
    """An architecture: the event's shape, the batch, and how each library builds it.

    A library that cannot build it has a reason in the place of a builder.
    """

    shape: tuple[int, ...]
    batch: int
    build: dict[str, Builder | str]
    notes: dict[str, str] = field(default_factory=dict)
    reverse_kl: bool = False


def couplings(dim: int, layers: int, spline: bool = False) -> Configuration:
    size = (dim, layers)
    build: dict[str, Builder | str] = {
        "nflib": partial(nflib_coupling, *size, spline),
        "zuko": partial(zuko_coupling, *size, spline),
        "nflows": partial(nflows_coupling, *size, spline),
        "normflows": partial(normflows_coupling, *size, spline),
        "FrEIA": "its release has no spline" if spline else partial(freia_coupling, *size),
    }
    notes = {
        "zuko": "GeneralCouplingTransform with masks of halves",
        "normflows": "PiecewiseRationalQuadraticCoupling, without the spline of the other half",
    }
    blocks = {"FrEIA": f"{layers // 2} blocks, each of which moves both halves in turn"}
    return Configuration((dim,), 512, build, notes if spline else blocks)


NO_IMAGES = "it has no image layers"
NO_PLANAR = "it has no planar layer"
CONFIGURATIONS: dict[str, Configuration] = {
    "affine coupling, 2-D": couplings(2, 8),
    "affine coupling, 64-D": couplings(64, 8),
    "MAF, 64-D": Configuration(
        (64,),
        512,
        {
            "nflib": partial(nflib_maf, 64, 5),
            "zuko": partial(zuko_maf, 64, 5),
            "nflows": partial(nflows_maf, 64, 5),
            "normflows": partial(normflows_maf, 64, 5),
            "FrEIA": "it has no masked autoregressive layer",
        },
        {
            "nflib": "the weights that the masks leave, the others store all",
            "normflows": "layers in Reverse: as shipped, log_prob takes 64 passes; the activation "
            "that its network lacks after the first layer is put in",
        },
    ),
    "RQ-spline coupling, 64-D": couplings(64, 5, spline=True),
    "Glow, 3x32x32": Configuration(
        (3, 32, 32),
        32,
        {
            "nflib": partial(nflib_glow, (3, 32, 32), 3, 4, 128),
            "zuko": NO_IMAGES,
            "nflows": partial(nflows_glow, (3, 32, 32), 3, 4, 128),
            "normflows": partial(normflows_glow, (3, 32, 32), 3, 4, 128),
            "FrEIA": "it has no learned 1x1 convolution but a product of reflections",
        },
        {
            "nflib": "models.glow without its learned priors, with its clamp of what networks see",
            "nflows": "its 1x1 convolution has a bias and a fixed permutation",
            "normflows": "L and U are stored as full matrices",
        },
    ),
    "planar, 2-D": Configuration(
        (2,),
        512,
        {
            "nflib": partial(nflib_planar, 2, 16),
            "zuko": NO_PLANAR,
            "nflows": NO_PLANAR,
            "normflows": partial(normflows_planar, 2, 16),
            "FrEIA": NO_PLANAR,
        },
        {"nflib": "Inverse(Planar): from noise to data by the formula, as normflows has it"},
        reverse_kl=True,
    ),
}
LIBRARIES = ("nflib", "zuko", "nflows", "normflows", "FrEIA")


def quiet() -> None:
    """Keeps the peers' warnings, and torch's about functions that they call, out of the table."""
    warnings.filterwarnings("ignore", module="nflows|normflows|FrEIA|zuko")
    warnings.filterwarnings("ignore", message=r"torch\.(lu|triangular_solve) is deprecated")
    # torch.compile gives up two graphs of nflows' and normflows' splines, which then run eagerly.
    warnings.filterwarnings("ignore", message="Error detected in IndexPutBackward")
