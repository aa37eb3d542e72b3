"""Contexts on their way through a flow: images at every scale, features of them, cinn."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nflib import models, reversible
from nflib.arguments import ArgumentError
from nflib.checks import check_bijection, randomize_parameters
from nflib.conditioning import Conditioned, FeaturePyramid, Part, SpaceToDepth
from nflib.core import Compose, Flow, Inverse, Layer, ShapeError, StandardNormal
from nflib.coupling import Coupling, channels, halves
from nflib.dequantization import UniformDequantization
from nflib.elementwise import Affine
from nflib.linear import LU
from nflib.multiscale import Squeeze
from nflib.nets import MLP, ConvNet
from nflib.normalization import ActNorm

IMAGE: dict[str, Any] = {"attention": 2, "context_dim": (2, 4, 4)}

# Each model: how it is built, the shape of an event and of a context.
FLOWS: dict[str, tuple[Callable[[], Flow], tuple[int, ...], tuple[int, ...]]] = {
    "glow": (lambda: models.glow((1, 4, 8), 2, 2, 6, context_dim=(2, 4, 8)), (1, 4, 8), (2, 4, 8)),
    "realnvp": (
        lambda: models.realnvp((1, 4, 8), 4, (6,), levels=2, context_dim=(2, 4, 8)),
        (1, 4, 8),
        (2, 4, 8),
    ),
    "flowpp": (
        lambda: models.flowpp((1, 4, 4), 8, 1, components=3, couplings=(1, 1, 1), **IMAGE),
        (1, 4, 4),
        (2, 4, 4),
    ),
    "cinn, image": (
        lambda: models.cinn((2, 4, 8), (1, 8, 16), 1, 6, levels=2, features=8),
        (2, 4, 8),
        (1, 8, 16),
    ),
    "cinn, image of its own size": (
        lambda: models.cinn((1, 4, 4), (3, 4, 4), 2, 6, levels=1, features=8),
        (1, 4, 4),
        (3, 4, 4),
    ),
    "cinn, class of an image": (lambda: models.cinn((2, 4, 4), 3, 2, 6), (2, 4, 4), (3,)),
    "cinn, vector": (lambda: models.cinn(5, 3, 3, 8), (5,), (3,)),
}


def ready(name: str, rows: int = 4) -> tuple[Flow, Tensor, Tensor]:
    """A flow with random parameters in float64, events and contexts."""
    torch.manual_seed(0)
    make, event, context = FLOWS[name]
    flow = make().double()
    randomize_parameters(flow.bijection, scale=0.1)
    return flow, torch.randn(rows, *event).double(), torch.randn(rows, *context).double()


@pytest.mark.parametrize("name", FLOWS)
def test_a_conditional_flow_is_a_bijection(name: str) -> None:
    torch.manual_seed(0)
    make, event, context = FLOWS[name]
    # On parameters that the check draws.
    check_bijection(make().bijection, torch.randn(4, *event), torch.randn(4, *context))


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_draws_for_each_context_and_scores_the_draws(name: str) -> None:
    flow, x, context = ready(name, 2)
    draws = flow.sample((3,), context)
    assert draws.shape == (3, 2, *x.shape[1:])
    assert flow.log_prob(draws, context).shape == (3, 2)
    # One noise, two contexts: two events.
    z = flow.encode(x, context)[:1].expand(2, *[-1] * (flow.encode(x, context).ndim - 1))
    first, second = flow.decode(z, context)
    assert not torch.allclose(first, second, atol=1e-3)


def couplings(flow: Flow) -> list[Coupling]:
    return [module for module in flow.modules() if isinstance(module, Coupling)]


def reached(name: str, coupling: int) -> Tensor:
    """Gradient by the context of what one coupling's network predicts, its other input fixed."""
    flow, x, context = ready(name, 1)
    found: list[tuple[Tensor, Tensor]] = []
    conditioner = couplings(flow)[coupling].conditioner
    conditioner.register_forward_hook(lambda net, args, out: found.append(args))
    flow.bijection(x, context)
    (kept, own_context) = found[0]
    own_context = own_context.detach().requires_grad_()
    theta = conditioner(kept.detach(), own_context)
    return torch.autograd.grad(theta.square().sum(), own_context)[0]


@pytest.mark.parametrize("name", FLOWS)
def test_the_networks_of_every_scale_use_all_of_their_context(name: str) -> None:
    flow, *_ = ready(name)
    for number in range(len(couplings(flow))):
        gradient = reached(name, number)
        assert gradient.flatten(2).any(-1).all() if gradient.ndim > 2 else gradient.any(0).all()


def test_a_context_is_squeezed_as_often_as_the_data() -> None:
    for name in ("glow", "realnvp", "flowpp"):
        flow, x, context = ready(name)
        sizes = {net.context_shape for net in (c.conditioner for c in couplings(flow))}
        (k, height, width) = context.shape[1:]
        levels = {"glow": (1, 2), "realnvp": (0, 1), "flowpp": (0, 1)}[name]
        assert sizes == {(k * 4**n, height >> n, width >> n) for n in levels}
        assert flow.context_shape == (k, height, width)


@pytest.mark.parametrize("name", ["glow", "realnvp", "flowpp"])
@pytest.mark.parametrize("shape", [(2, 2, 4), (2, 8, 4), (2, 4), (4, 4)])
def test_an_image_of_context_has_the_datas_size(name: str, shape: tuple[int, ...]) -> None:
    build = getattr(models, name)
    with pytest.raises(ValueError, match=rf"^{name} expects context_dim .*got \([24], .*\.$"):
        build((1, 4, 4), context_dim=shape)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 2, 4), (4, 2, 4), (8,)])
def test_a_wrong_context_is_one_sentence(shape: tuple[int, ...]) -> None:
    flow, x, context = ready("glow")
    wrong = torch.randn(4, *shape).double()
    for call in (flow.log_prob, flow.encode, flow.decode):
        with pytest.raises(ShapeError, match=r"Flow\S* expects a context of shape \(4, 2, 4, 8\)"):
            call(x if call != flow.decode else flow.encode(x, context), wrong)
    with pytest.raises(ShapeError, match="^Compose expects a context of shape"):
        flow.bijection(x)


def test_a_vector_context_leaves_the_parameters_names_alone() -> None:
    for build in (models.glow, models.realnvp, models.flowpp):
        plain = set(build((1, 4, 4)).state_dict())
        with_vector = set(build((1, 4, 4), context_dim=3).state_dict())
        assert plain <= with_vector
        assert not any("network" in name for name in with_vector)


# --- Conditioned -------------------------------------------------------------------------------


class Counted(nn.Module):
    """A linear network that counts its calls."""

    def __init__(self, inputs: int = 3, outputs: int = 2) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(inputs, outputs), 0

    def forward(self, context: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(context)


def two_couplings(*before: Layer) -> Compose:
    net = lambda i, o: MLP(i, o, (6,), context_dim=2)  # noqa: E731
    return Compose(*before, *(Coupling(halves(4, flip=k == 1), Affine(), net) for k in range(2)))


def test_conditioned_is_its_layers_at_another_context() -> None:
    torch.manual_seed(0)
    network = Counted()
    layer = Conditioned(network, two_couplings(), 3)
    randomize_parameters(layer)
    x, context = torch.randn(5, 4), torch.randn(5, 3)
    network.calls = 0
    z, log_det = layer(x, context)
    assert network.calls == 1
    expected = Compose(*layer.layer)(x, network.linear(context))
    assert torch.equal(z, expected[0])
    assert torch.equal(log_det, expected[1])
    back, _ = layer.inverse(z, context)
    torch.testing.assert_close(back, x)
    assert layer.context_shape == (3,)
    assert layer.event_shape == layer.layer.event_shape == layer.latent_shape
    check_bijection(layer.double(), x.double(), context.double())


def test_conditioned_changes_shapes_and_starts_as_its_layers_do() -> None:
    net = lambda i, o: ConvNet(i, o, 4, context_dim=(4, 2, 2))  # noqa: E731
    layers = [Squeeze(), ActNorm(4), Coupling(channels(4), Affine(), net)]
    layer = Conditioned(SpaceToDepth(), Compose(*layers), (1, 4, 4))
    assert layer.output_shape((1, 4, 4)) == (4, 2, 2)
    assert layer.input_shape((4, 2, 2)) == (1, 4, 4)
    x, context = 5 + 3 * torch.randn(64, 1, 4, 4), torch.randn(64, 1, 4, 4)
    layer.initialize(x, context)
    z, _ = layer(x, context)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=1e-2, rtol=0)
    backwards = Conditioned(SpaceToDepth(), Inverse(ActNorm(1)), (1, 4, 4))
    backwards.initialize_inverse(x, context)
    other, _ = backwards.inverse(x, context)
    torch.testing.assert_close(other.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)


def test_conditioned_refuses_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"its network makes of a context, \(5,\), got .*\(2,\)"):
        Conditioned(Counted(3, 5), two_couplings(), 3)
    with pytest.raises(ArgumentError, match="Conditioned expects a context_dim, got None"):
        Conditioned(Counted(), two_couplings(), None)
    with pytest.raises(ArgumentError, match="Conditioned expects network to be"):
        Conditioned(torch.sin, two_couplings(), 3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"contexts of shape \(batch, 4\), got one that does"):
        Conditioned(Counted(), two_couplings(), 4)
    with pytest.raises(ArgumentError, match="a row for each context, got a tensor of shape"):
        Conditioned(nn.Flatten(0), LU(4), 3)
    layer = Conditioned(Counted(), two_couplings(), 3)
    with pytest.raises(ShapeError, match=r"^Conditioned expects a context of shape \(2, 3\), got"):
        layer(torch.randn(2, 4), torch.randn(2, 2))
    with pytest.raises(ShapeError, match="^Conditioned expects a context .* got none"):
        layer(torch.randn(2, 4))


def test_conditioned_leaves_the_network_as_it_was() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5), nn.BatchNorm1d(2))
    network[1].eval()
    layers = two_couplings()
    before = torch.get_rng_state()
    Conditioned(network, layers, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in network] == [True, False, True]
    assert network[2].num_batches_tracked == 0


def test_conditioned_passes_on_what_its_layers_are() -> None:
    noisy = Conditioned(Counted(), two_couplings(UniformDequantization(8)), 3)
    assert not noisy.bijective
    assert not noisy.exact_inverse
    flow = Flow(noisy, StandardNormal(4))
    assert flow.likelihood == "lower bound"
    with pytest.raises(ValueError, match="whole numbers in 0..7"):
        flow.check_data(torch.full((2, 4), 9))
    with pytest.raises(ValueError, match="Inverse expects a bijection"):
        Inverse(noisy)


def test_conditioned_ends_bfloat16_where_the_network_ends() -> None:
    network = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    layer = Conditioned(network, two_couplings(), 128)
    assert layer.is_wide
    context = torch.randn(3, 128)
    with torch.autocast("cpu", torch.bfloat16):
        seen = layer.seen(context)
    assert seen.dtype == torch.float32
    assert not torch.equal(seen, layer.seen(context))  # it was rounded on its way
    narrow = Conditioned(Counted(), two_couplings(), 3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = narrow.seen(context[:, :3])
    assert torch.equal(inside, narrow.seen(context[:, :3]))


def test_space_to_depth_is_the_squeeze_of_an_image_and_takes_no_rows() -> None:
    image = torch.randn(3, 2, 4, 8)
    assert torch.equal(SpaceToDepth(2)(image), Squeeze()(image)[0])
    assert SpaceToDepth(4)(image[:0]).shape == (0, 32, 1, 2)
    with pytest.raises(ValueError, match="factor to be a whole number of at least 1"):
        SpaceToDepth(0)


# --- The conditioning network ------------------------------------------------------------------


def test_the_pyramid_holds_every_scale_in_one_vector() -> None:
    pyramid = FeaturePyramid((1, 16, 32), [(4, 8), (2, 4)], 3)
    packed = pyramid(torch.randn(2, 1, 16, 32))
    assert packed.shape == (2, 3 * 32 + 3 * 8)
    fine, coarse = pyramid.part(0)(packed), pyramid.part(1)(packed)
    assert fine.shape == (2, 3, 4, 8)
    assert coarse.shape == (2, 3, 2, 4)
    assert torch.equal(torch.cat([fine.flatten(1), coarse.flatten(1)], 1), packed)
    with torch.no_grad():
        pyramid.up[0].weight.zero_()
        pyramid.up[0].bias.zero_()
    packed = pyramid(torch.randn(2, 1, 16, 32))
    assert not pyramid.part(0)(packed).any()
    assert pyramid.part(1)(packed).any()
    assert torch.equal(Part(1, (1, 1, 2))(torch.arange(6.0)[None]), torch.tensor([[[[1.0, 2.0]]]]))


def test_fine_features_see_what_only_the_coarse_scale_can_reach() -> None:
    torch.manual_seed(0)
    pyramid = FeaturePyramid((1, 64, 64), [(64, 64), (32, 32), (16, 16), (8, 8)], 8).double()
    for module in pyramid.modules():  # a norm over the picture would let everything reach
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda h: h  # type: ignore[method-assign]
    image = torch.randn(1, 1, 64, 64).double().requires_grad_()
    fine = pyramid.part(0)(pyramid(image))
    (gradient,) = torch.autograd.grad(fine[0, :, 0, 0].sum(), image)
    far = gradient[0, 0].nonzero().max().item()
    assert far > 20  # two 3 x 3 convolutions at this scale alone would reach 2 pixels


def test_each_row_of_the_pyramid_is_by_itself() -> None:
    pyramid = FeaturePyramid((1, 8, 8), [(4, 4), (2, 2)], 4).double()
    images = torch.randn(3, 1, 8, 8).double()
    torch.testing.assert_close(pyramid(images)[1:2], pyramid(images[1:2]))


@pytest.mark.parametrize("sizes", [[(3, 4)], [(8, 8), (8, 4)], [(4, 4), (8, 8)], [(16, 16)]])
def test_the_pyramid_halves(sizes: list[tuple[int, int]]) -> None:
    with pytest.raises(ShapeError, match=r"FeaturePyramid expects sizes .* by halving, got \("):
        FeaturePyramid((1, 8, 8), sizes, 2)
    with pytest.raises(ShapeError, match=r"by halving, got \(1, 1\) behind \(3, 3\)"):
        FeaturePyramid((1, 6, 6), [(1, 1)], 2)


@pytest.mark.parametrize("sizes", [(), 3, [4, 2], [(4,)], [(4, 0)], [(4.5, 4)]])
def test_what_are_no_sizes_is_one_sentence(sizes: Any) -> None:
    with pytest.raises(ArgumentError, match="sizes to be a sequence of heights and widths"):
        FeaturePyramid((1, 8, 8), sizes, 2)


# --- cinn --------------------------------------------------------------------------------------


def test_the_conditioning_network_runs_once_a_call() -> None:
    flow, x, context = ready("cinn, image")
    (pyramid,) = (m for m in flow.modules() if isinstance(m, FeaturePyramid))
    calls: list[int] = []
    pyramid.register_forward_hook(lambda *_: calls.append(1))
    flow.log_prob(x, context)
    assert len(calls) == 1
    flow.decode(flow.encode(x, context), context)
    assert len(calls) == 3
    assert len(couplings(flow)) == 3


def test_cinn_is_the_papers_loss() -> None:
    flow, x, context = ready("cinn, vector")
    z, log_det = flow.bijection(x, context)
    expected = 0.5 * z.square().sum(1) - log_det + 2.5 * torch.tensor(2 * torch.pi).log()
    torch.testing.assert_close(-flow.log_prob(x, context), expected)


def test_cinns_scales_are_clamped() -> None:
    for name in ("cinn, vector", "cinn, image"):
        flow, *_ = ready(name)
        inner = [c.elementwise for c in couplings(flow) if isinstance(c.elementwise, Affine)]
        assert 1.5 in {tau.bound for tau in inner}


def test_cinn_takes_integers() -> None:
    flow = models.cinn((2, 4, 4), (1, 8, 8), 1, 6, levels=1, features=4, grey_levels=256)
    assert flow.likelihood == "lower bound"
    x = torch.randint(256, (3, 2, 4, 4))
    assert flow.log_prob(x, torch.randn(3, 1, 8, 8)).shape == (3,)
    drawn = flow.sample((2,), torch.randn(3, 1, 8, 8))
    assert drawn.shape == (2, 3, 2, 4, 4)
    assert torch.equal(drawn, drawn.round())
    assert 0 <= drawn.min() <= drawn.max() <= 255


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"context_dim": None}, "cinn expects a context_dim, got None"),
        ({"context_dim": (1, 12, 12)}, "times a power of two, got \\(1, 12, 12\\)"),
        ({"context_dim": (1, 2, 2)}, "times a power of two"),
        ({"context_dim": (1, 8, 16)}, "times a power of two"),
        ({"context_dim": (8, 8)}, "times a power of two, got \\(8, 8\\)"),
        ({"shape": 4}, "cinn expects the size of a context vector .* got \\(1, 8, 8\\)"),
        ({"shape": 1, "context_dim": 2}, "cinn expects at least 2 dimensions"),
        ({"shape": (4, 4), "context_dim": 2}, "cinn expects the size of a vector or the shape"),
        ({"levels": 3}, "cinn with 3 levels expects sides that are multiples of 8"),
        ({"features": 0}, "cinn expects features to be a whole number"),
    ],
)
def test_cinn_refuses_in_one_sentence(arguments: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"shape": (2, 4, 4), "context_dim": (1, 8, 8)} | arguments
    with pytest.raises(ValueError, match=words) as caught:
        models.cinn(**given)
    assert str(caught.value).count(". ") == 0


@pytest.mark.parametrize("name", ["cinn, image", "glow"])
def test_copies_and_memory_that_rebuilds(name: str) -> None:
    flow, x, context = ready(name)
    expected = flow.log_prob(x, context)
    for copied in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(copied.log_prob(x, context), expected)
    rebuilt = reversible.turn_on(copy.deepcopy(flow))
    found = rebuilt.log_prob(x, context)
    torch.testing.assert_close(found, expected)
    for model, value in ((flow, expected), (rebuilt, found)):
        value.sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    pairs = zip(flow.named_parameters(), rebuilt.parameters(), strict=True)
    for (where, ours), theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, msg=where)


def test_a_flow_learns_which_context_goes_with_what() -> None:
    torch.manual_seed(0)
    flow = models.cinn(2, 1, 3, 16)
    side = torch.randint(2, (512, 1)).float()
    x = torch.cat([4 * side - 2, -(4 * side - 2)], 1) + 0.3 * torch.randn(512, 2)
    flow.initialize(x, side)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        (-flow.log_prob(x, side).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        right, wrong = flow.log_prob(x, side).mean(), flow.log_prob(x, 1 - side).mean()
        exact = -(1 + torch.log(torch.tensor(2 * torch.pi * 0.09)))
        drawn = flow.sample((500,), torch.tensor([[0.0], [1.0]])).mean(0)
    assert right > wrong + 5
    assert abs(right - exact) < 0.25
    torch.testing.assert_close(drawn, torch.tensor([[-2.0, 2.0], [2.0, -2.0]]), atol=0.2, rtol=0)
