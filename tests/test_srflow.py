"""SRFlow: injectors, the encoder of the small image, the model, its data and its measures."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor, nn
from torch.nn import functional as F

from nflib import checkpoints, metrics, models, reversible
from nflib.arguments import ArgumentError
from nflib.checks import check_bijection, jacobian, randomize_parameters
from nflib.conditioning import DenseBlock, DenseEncoder, Resize
from nflib.convolution import Invertible1x1Conv
from nflib.core import DataError, Flow, ShapeError
from nflib.coupling import Coupling, Injector
from nflib.data import photographs
from nflib.dequantization import Logit, UniformDequantization
from nflib.elementwise import Additive, Affine, MonotoneNet, RationalQuadraticSpline
from nflib.models.super_resolution import MinusEnlarged
from nflib.multiscale import MultiScale, Squeeze
from nflib.nets import MLP, ConvNet
from nflib.normalization import ActNorm

conv, mlp = partial(ConvNet, hidden=6), partial(MLP, hidden=(8,))

# --- The injector ------------------------------------------------------------------------------

# Each injector with the shapes of an event and of a context.
INJECTORS: dict[str, tuple[Callable[[], Injector], tuple[int, ...], tuple[int, ...]]] = {
    "image": (lambda: Injector(2, Affine(), conv, (3, 2, 4)), (2, 2, 4), (3, 2, 4)),
    "image, spline": (
        lambda: Injector(3, RationalQuadraticSpline(4), conv, (1, 2, 3)),
        (3, 2, 3),
        (1, 2, 3),
    ),
    "vector": (lambda: Injector(4, Affine(), mlp, 3), (4,), (3,)),
}


@pytest.mark.parametrize("name", INJECTORS)
def test_an_injector_is_a_bijection(name: str) -> None:
    torch.manual_seed(0)
    make, event, context = INJECTORS[name]
    layer = make()
    assert layer.event_shape == event
    assert layer.context_shape == context
    check_bijection(layer, torch.randn(4, *event), torch.randn(4, *context))


def test_an_injector_is_its_formula() -> None:
    torch.manual_seed(0)
    layer = Injector(2, Affine(), conv, (3, 2, 4)).double()
    randomize_parameters(layer)
    x, y = torch.randn(2, 2, 2, 4).double(), torch.randn(2, 3, 2, 4).double()
    a, t = layer.conditioner(y).chunk(2, 1)
    s = 3 * torch.tanh(a / 3)
    z, log_det = layer(x, y)
    torch.testing.assert_close(z, x * s.exp() + t)
    torch.testing.assert_close(log_det, s.sum((1, 2, 3)))
    back, log_det_back = layer.inverse(z, y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(log_det_back, -log_det)
    found = jacobian(lambda x: layer(x, y)[0], x)
    torch.testing.assert_close(found, torch.diag_embed(s.exp().flatten(1)))


def test_an_injector_starts_as_the_identity_and_needs_all_of_its_context() -> None:
    layer = Injector(2, Affine(), conv, (3, 2, 4))
    x, y = torch.randn(2, 2, 2, 4), torch.randn(2, 3, 2, 4)
    z, log_det = layer(x, y)
    assert torch.equal(z, x)
    assert not log_det.any()
    randomize_parameters(layer)
    y.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x, y)[0].square().sum(), y)
    assert gradient.flatten(2).any(-1).all()
    assert layer.conditioner.first.inputs == 3


def test_what_no_injector_can_be_is_one_sentence() -> None:
    wide: Any = lambda inputs, outputs: nn.Conv2d(inputs, outputs + 1, 1)  # noqa: E731
    y = torch.randn(2, 3, 2, 4)
    for make, kind, words in [
        (lambda: Injector(2, Affine(), conv, None), ArgumentError, "expects a context_dim, got N"),
        (lambda: Injector(2, Affine(), min, 3), ArgumentError, "Injector expects network to build"),
        (lambda: Injector(0, Affine(), conv, 3), ArgumentError, "channels to be a whole number"),
        (
            lambda: Injector(2, Affine(), wide, (3, 2, 4))(torch.randn(2, 2, 2, 4), y),
            ShapeError,
            r"Injector expects its conditioner to return shape \(2, 4, 2, 4\), got a tensor",
        ),
        (
            lambda: Injector(2, Affine(), conv, (3, 2, 4))(torch.randn(2, 2, 4, 2), y),
            ShapeError,
            r"Injector expects shape \(batch, 2, 2, 4\)",
        ),
        (
            lambda: Injector(2, Affine(), conv, (3, 2, 4))(torch.randn(2, 2, 2, 4)),
            ShapeError,
            r"Injector expects a context of shape \(batch, 3, 2, 4\), got none",
        ),
    ]:
        with pytest.raises(kind, match=words) as caught:
            make()
        assert str(caught.value).count(". ") == 0


def test_a_searched_inverse_is_no_exact_one_and_bfloat16_ends_at_a_wide_network() -> None:
    assert Injector(2, Affine(), conv, (3, 2, 4)).exact_inverse
    assert not Injector(2, MonotoneNet(2, 2), mlp, 3).exact_inverse
    wide, narrow = (
        Injector(2, Affine(), partial(MLP, hidden=(128, 128)), 128),
        Injector(2, Affine(), mlp, 128),
    )
    x, y = torch.randn(2, 2), torch.randn(2, 128)
    for layer, is_rounded in ((wide, True), (narrow, False)):
        randomize_parameters(layer)
        expected = layer.theta(y)
        with torch.autocast("cpu", torch.bfloat16):
            found = layer.theta(y)
            assert layer(x, y)[1].dtype == torch.float32
        assert found.dtype == torch.float32
        assert torch.equal(found, expected) != is_rounded


# --- The encoder -------------------------------------------------------------------------------


def test_resize_to_half_is_the_mean_of_four_and_to_double_keeps_the_mean() -> None:
    image = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(Resize((2, 3))(image), F.avg_pool2d(image, 2))
    wide = Resize((8, 12))(torch.tensor([[0.0, 4.0]]).expand(1, 1, 1, 2))
    assert wide.shape == (1, 1, 8, 12)
    assert Resize((1, 4))(torch.tensor([[[[0.0, 4.0]]]])).flatten().tolist() == [0, 1, 3, 4]
    assert Resize(3)(image).shape == (2, 3, 3, 3)
    assert torch.equal(Resize((4, 6))(image), image)
    assert Resize((2, 3))(image[:0]).shape == (0, 3, 2, 3)


def test_a_dense_block_is_its_formula() -> None:
    torch.manual_seed(0)
    block = DenseBlock(4)
    h = torch.randn(2, 4, 5, 6)
    inner = h
    for k in range(3):
        seen = [inner]
        for i in range(5):
            weight, bias = (getattr(block.parts[k][i], name) for name in ("weight", "bias"))
            c = F.conv2d(torch.cat(seen, 1), weight, bias, padding=1)
            seen.append(F.leaky_relu(c, 0.2) if i < 4 else c)
        assert [s.shape[1] for s in seen] == [4, 2, 2, 2, 2, 4]
        inner = inner + 0.2 * seen[-1]
    torch.testing.assert_close(block(h), h + 0.2 * inner)


def test_the_encoder_keeps_what_stands_behind_each_block() -> None:
    torch.manual_seed(0)
    encoder = DenseEncoder(2, 4, 3)
    image = torch.randn(2, 2, 6, 5)
    found = encoder(image)
    assert found.shape == (2, 12, 6, 5)
    assert encoder.features == 12
    h = encoder.first(image)
    for k, block in enumerate(encoder.blocks):
        h = block(h)
        torch.testing.assert_close(found[:, 4 * k : 4 * k + 4], h)
    assert not any(isinstance(m, nn.BatchNorm2d | nn.GroupNorm) for m in encoder.modules())


def test_each_block_of_the_encoder_sees_15_pixels_further() -> None:
    torch.manual_seed(0)
    encoder = DenseEncoder(1, 2, 2).double()
    image = torch.randn(1, 1, 1, 80).double().requires_grad_()
    for k, reach in ((0, 16), (1, 31)):
        (gradient,) = torch.autograd.grad(encoder(image)[0, 2 * k : 2 * k + 2, 0, 0].sum(), image)
        assert gradient.nonzero()[:, 3].max() == reach


# --- The model ---------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"steps": 1, "hidden": 5, "levels": 2, "features": 4, "blocks": 2}
FLOWS: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "twice": ({"shape": (1, 4, 8), "scale": 2, **SMALL}, (1, 4, 8), (1, 2, 4)),
    "four times": ({"shape": (1, 8, 8), "scale": 4, **SMALL}, (1, 8, 8), (1, 2, 2)),
    "three times": (
        {"shape": (1, 6, 6), "scale": 3, **SMALL, "levels": 1, "transitions": 0},
        (1, 6, 6),
        (1, 2, 2),
    ),
}


def ready(name: str = "twice", rows: int = 3, **options: Any) -> tuple[Flow, Tensor, Tensor]:
    """A flow with random parameters in float64, large images and small ones."""
    torch.manual_seed(0)
    arguments, event, context = FLOWS[name]
    flow = models.srflow(**arguments | options).double()
    randomize_parameters(flow.bijection, scale=0.1)
    return flow, torch.randn(rows, *event).double(), torch.randn(rows, *context).double()


def of_kind(flow: nn.Module, kind: type) -> list[Any]:
    return [module for module in flow.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("name", FLOWS)
def test_srflow_is_a_bijection(name: str) -> None:
    torch.manual_seed(0)
    arguments, event, context = FLOWS[name]
    flow = models.srflow(**arguments)
    assert flow.context_shape == context
    assert flow.likelihood == "exact"
    check_bijection(flow.bijection, torch.randn(3, *event), torch.randn(3, *context))


@pytest.mark.parametrize("name", FLOWS)
def test_srflow_draws_for_each_small_image_and_scores_the_draws(name: str) -> None:
    flow, x, low = ready(name, 2)
    draws = flow.sample((3,), low)
    assert draws.shape == (3, 2, *x.shape[1:])
    assert flow.log_prob(draws, low).shape == (3, 2)
    assert not torch.allclose(draws[0], draws[1])
    cold = flow.sample((2,), low, temperature=0.0)
    assert torch.equal(cold[0], cold[1])
    assert torch.equal(cold[0], flow.decode(torch.zeros(2, x[0].numel()).double(), low))
    near, far = (flow.sample((50,), low, temperature=t).std(0).mean() for t in (0.1, 1.0))
    assert near < 0.5 * far


def test_the_layers_stand_in_the_papers_order() -> None:
    flow, *_ = ready("twice")
    shift, whole = list(flow.bijection)
    assert isinstance(shift.network, MinusEnlarged)
    assert isinstance(shift.layer.elementwise, Additive)
    assert isinstance(whole.network, DenseEncoder)
    mix = [ActNorm, Invertible1x1Conv]
    for k, level in enumerate(whole.layer.levels):
        first, *transition, last = list(level)
        assert isinstance(first, Squeeze)
        assert [type(layer) for layer in transition] == mix * 2
        assert isinstance(last.network, Resize)
        prior = [Coupling] if k == 0 else []
        assert [type(layer) for layer in last.layer] == [*mix, Injector, Coupling, *prior]
    parameters = [p for m in of_kind(flow, ActNorm) for p in m.parameters()]
    assert len({id(p) for p in parameters}) == len(parameters) == 2 * 6
    assert {c.limit for c in of_kind(flow, Coupling)} == {12.0}


def test_what_bicubic_enlargement_gives_is_subtracted() -> None:
    torch.manual_seed(0)
    small, large = torch.randn(2, 3, 4, 2), torch.randn(2, 3, 16, 8)
    (shift, _) = list(models.srflow((3, 16, 8), levels=3).bijection)
    rest, log_det = shift(large, small)
    enlarged = F.interpolate(small, scale_factor=4.0, mode="bicubic")
    torch.testing.assert_close(rest, large - enlarged)
    assert log_det.tolist() == [0.0, 0.0]
    torch.testing.assert_close(shift.inverse(rest, small)[0], large)
    # Of grey levels: an even picture leaves the dequantization noise alone, around zero.
    (dequantization, shift, _) = list(
        models.srflow((1, 8, 8), 2, levels=2, grey_levels=5).bijection
    )
    for level in range(5):
        small = torch.full((1, 1, 4, 4), 2 * level / 4 - 1)
        large = dequantization(torch.full((1, 1, 8, 8), level, dtype=torch.uint8))[0]
        noise = 5 * shift(large, small)[0]
        assert -0.5001 < noise.min() < -0.25 < 0.25 < noise.max() < 0.5001


def test_what_is_asked_for_is_built() -> None:
    flow = models.srflow((3, 16, 16), 4, 3, (7, 5), levels=2, features=6, blocks=3, dropout=0.25)
    (encoder,) = of_kind(flow, DenseEncoder)
    assert encoder.features == 18
    assert len(encoder.blocks) == 3
    assert len(of_kind(flow, Injector)) == 1 + 2 * 3
    nets = of_kind(flow, ConvNet)
    assert len(nets) == 2 * 3 + 2 * 3 + 1
    assert {net.first.conv.out_channels for net in nets} == {7}
    assert {drop.p for drop in of_kind(flow, nn.Dropout)} == {0.25}
    assert len(of_kind(models.srflow((3, 16, 16), transitions=1, levels=2), ActNorm)) == 2 + 2 * 4


def test_the_encoder_runs_once_a_call() -> None:
    flow, x, low = ready()
    (encoder,) = of_kind(flow, DenseEncoder)
    calls: list[int] = []
    encoder.register_forward_hook(lambda *_: calls.append(1))
    flow.log_prob(x, low)
    assert len(calls) == 1
    flow.sample((2,), low)
    assert len(calls) == 2


def test_every_conditional_layer_sees_the_small_image_and_so_do_gradients() -> None:
    flow, x, low = ready("four times")
    low = low[:1].requires_grad_()
    parts = [*of_kind(flow, Injector)[1:], *of_kind(flow, Coupling)]
    assert len(parts) == 2 + 2 + 1
    seen: list[Tensor] = []
    for part in parts:
        net = part.conditioner
        net.register_forward_hook(lambda net, args, out: seen.append(args[-1]))
    flow.log_prob(x[:1], low).backward(retain_graph=True)
    assert low.grad is not None
    assert low.grad.flatten(1).any(1).all()
    (encoder,) = of_kind(flow, DenseEncoder)
    assert all(p.grad is not None and bool(p.grad.any()) for p in encoder.parameters())
    assert len(seen) == len(parts)
    for features in seen:
        assert features.shape[1] == encoder.features
        (gradient,) = torch.autograd.grad(features.square().sum(), low, retain_graph=True)
        assert gradient.any()


def test_one_noise_and_two_small_images_make_two_large_ones() -> None:
    flow, x, low = ready("twice", 2)
    z = torch.randn(1, 32).double().expand(2, -1)
    first, second = flow.decode(z, low)
    assert (first - second).abs().max() > 1e-2


def test_srflow_takes_integers_as_they_are() -> None:
    flow = models.srflow((3, 8, 8), **SMALL, grey_levels=256)
    assert flow.likelihood == "lower bound"
    # Without a logit: of grey levels the small image is a linear map.
    assert len(of_kind(flow, UniformDequantization)) == 1
    assert not of_kind(flow, Logit)
    x, low = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8), torch.randn(3, 3, 2, 2)
    flow.initialize(x, low)
    assert flow.log_prob(x, low).shape == (3,)
    drawn = flow.sample((2,), low)
    assert drawn.shape == (2, 3, 3, 8, 8)
    assert torch.equal(drawn, drawn.round())
    assert 0 <= drawn.min() <= drawn.max() <= 255


def test_weights_serve_every_size(tmp_path: Any) -> None:
    small, large = (models.srflow((1, *sides), 2, **SMALL) for sides in ((8, 8), (16, 24)))
    randomize_parameters(small, scale=0.1)
    checkpoints.save(small, tmp_path / "flow.safetensors")
    checkpoints.load(large, tmp_path / "flow.safetensors")
    with torch.no_grad():
        even = torch.full((1, 1, 4, 4), 0.3), torch.full((1, 1, 8, 12), 0.3)
        draws = [
            f.sample((1,), low, temperature=0.0)
            for f, low in zip((small, large), even, strict=True)
        ]
    assert draws[1].shape == (1, 1, 1, 16, 24)
    for name, value in small.state_dict().items():
        assert torch.equal(large.state_dict()[name], value), name


def test_a_corner_does_not_know_how_large_the_image_is() -> None:
    torch.manual_seed(0)
    options = {**SMALL, "levels": 1, "transitions": 1, "blocks": 1}
    near, far = (models.srflow((1, side, 4), 2, **options).double() for side in (96, 160))
    randomize_parameters(near, scale=0.1)
    far.load_state_dict(near.state_dict())
    low = torch.randn(1, 1, 80, 2).double()
    cut = low[:, :, :48]
    x = torch.randn(1, 1, 160, 4).double()
    found = near.bijection(x[:, :, :96], cut)[0].view(1, 4, 48, 2)
    expected = far.bijection(x, low)[0].view(1, 4, 80, 2)
    torch.testing.assert_close(found[:, :, :16], expected[:, :, :16])


def test_latents_of_a_truth_can_be_normalised_scale_by_scale() -> None:
    flow, x, low = ready("twice", 2)
    (levels,) = of_kind(flow, MultiScale)
    latents = flow.encode(3 * x, low).split(levels.sizes, 1)
    assert [z.shape[1] for z in latents] == [16, 16]
    normal = [(z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True) for z in latents]
    again = flow.encode(flow.decode(torch.cat(normal, 1), low), low)
    torch.testing.assert_close(again, torch.cat(normal, 1))


def test_log_prob_is_the_papers_loss() -> None:
    flow, x, low = ready()
    z, log_det = flow.bijection(x, low)
    expected = log_det - 0.5 * z.square().sum(1) - z.shape[1] / 2 * math.log(2 * math.pi)
    torch.testing.assert_close(flow.log_prob(x, low), expected)


def test_copies_and_memory_that_rebuilds() -> None:
    flow, x, low = ready("twice")
    expected = flow.log_prob(x, low)
    for copied in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(copied.log_prob(x, low), expected)
    rebuilt = reversible.turn_on(copy.deepcopy(flow))
    found = rebuilt.log_prob(x, low)
    torch.testing.assert_close(found, expected)
    expected.sum().backward()
    found.sum().backward()
    for (name, ours), theirs in zip(flow.named_parameters(), rebuilt.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scale": 3}, r"srflow expects sides that are multiples of its scale 3, got 8 x 8"),
        ({"shape": (3, 8, 12)}, "srflow with 3 levels expects sides that are multiples of 8"),
        ({"shape": (3, 8)}, "srflow expects shape to be the shape"),
        ({"scale": 0}, "srflow expects scale to be a whole number of at least 1, got 0"),
        ({"blocks": 0}, "srflow expects blocks to be a whole number"),
        ({"features": -1}, "srflow expects features to be a whole number"),
        ({"transitions": -1}, "srflow expects transitions to be a whole number of at least 0"),
    ],
)
def test_srflow_refuses_in_one_sentence(arguments: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"shape": (3, 8, 8), "scale": 4, **SMALL, "levels": 3} | arguments
    with pytest.raises(ValueError, match=words) as caught:
        models.srflow(**given)
    assert str(caught.value).count(". ") == 0


def test_a_small_image_of_another_size_is_one_sentence() -> None:
    flow = models.srflow((3, 8, 8), **SMALL)
    for low in (torch.randn(1, 3, 4, 4), torch.randn(1, 1, 2, 2), None):
        with pytest.raises(ShapeError, match=r"Flow expects a context of shape \(\w+, 3, 2, 2\)"):
            flow.log_prob(torch.randn(1, 3, 8, 8), low)


def test_srflow_learns_which_small_image_goes_with_which_large_one() -> None:
    torch.manual_seed(0)
    flow = models.srflow((1, 4, 4), 2, steps=2, hidden=8, levels=1, features=4, blocks=1)
    low = torch.randn(256, 1, 2, 2)
    high = F.interpolate(low, scale_factor=2.0) + 0.1 * torch.randn(256, 1, 4, 4)
    flow.initialize(high, low)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        (-flow.log_prob(high, low).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        assert flow.log_prob(high, low).mean() > flow.log_prob(high, low.flip(0)).mean() + 20
        drawn = flow.sample((20,), low).mean(0)
    assert (F.avg_pool2d(drawn, 2) - low).square().mean() < 0.1


# --- The data ----------------------------------------------------------------------------------


def cubic(distance: float) -> float:
    """Keys' cubic with a = -1/2."""
    t = abs(distance)
    if t < 1:
        return 1.5 * t**3 - 2.5 * t**2 + 1
    return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0


def test_shrink_is_its_formula() -> None:
    torch.manual_seed(0)
    row = torch.randint(60, 190, (40,)).double()
    image = row.expand(8, 40)[None]  # all rows alike, so that the other axis changes nothing
    found = photographs.shrink(image.to(torch.uint8), 4)[0, 0]
    for k in range(10):
        weights = torch.tensor([cubic((i - (4 * k + 1.5)) / 4) for i in range(40)]).double()
        expected = float((weights * row).sum() / weights.sum())
        assert abs(int(found[k]) - expected) <= 0.501


def test_shrink_is_pillows_bicubic() -> None:
    torch.manual_seed(0)
    image = torch.randint(256, (3, 32, 48), dtype=torch.uint8)
    theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
        (12, 8), Image.Resampling.BICUBIC
    )
    ours = photographs.shrink(image, 4)
    assert (ours.int() - torch.from_numpy(np.array(theirs)).permute(2, 0, 1).int()).abs().max() <= 1


def test_shrink_keeps_leading_dims_and_even_areas() -> None:
    assert photographs.shrink(torch.full((2, 5, 3, 8, 12), 77.4)).unique().tolist() == [77]
    draws = torch.randint(256, (2, 5, 3, 8, 12)).float()
    found = photographs.shrink(draws, 2)
    assert found.shape == (2, 5, 3, 4, 6)
    assert found.dtype == torch.uint8
    assert torch.equal(found[1, 2], photographs.shrink(draws[1, 2], 2))
    assert torch.equal(photographs.shrink(draws, 1).float(), draws)
    edge = torch.zeros(1, 16, 16)
    edge[:, :, 8:] = 255  # a cubic overshoots beside an edge
    assert photographs.shrink(edge, 4).unique().tolist()[0] == 0


def test_low_and_high_of_a_photograph_of_any_size() -> None:
    torch.manual_seed(0)
    photograph = torch.randint(256, (1, 3, 41, 50), dtype=torch.uint8)
    low, high = photographs.low_and_high(photograph)
    assert torch.equal(high, photograph[..., :40, :48])
    assert low.shape == (1, 3, 10, 12)
    assert low.dtype == torch.float32
    torch.testing.assert_close((low + 1) * 127.5, photographs.shrink(high, 4).float())
    low, high = photographs.low_and_high(photograph, 3, 4)
    assert high.shape[2:] == (36, 48)
    assert low.shape[2:] == (12, 16)
    ends = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 8, 8)
    assert photographs.low_and_high(ends)[0].flatten(1).unique(dim=1).tolist() == [[-1], [1]]


def test_images_that_cannot_be_made_smaller_are_one_sentence() -> None:
    image = torch.zeros(1, 3, 8, 12, dtype=torch.uint8)
    for call, words in [
        (lambda: photographs.shrink(image, 3), "shrink expects sides that are multiples of .* 3"),
        (lambda: photographs.shrink(image.int(), 2), r"shrink expects uint8 or float.*, got int32"),
        (lambda: photographs.shrink(image[0, 0]), r"got uint8 \(8, 12\)"),
        (lambda: photographs.low_and_high(image.float()), "low_and_high expects uint8 of shape"),
        (lambda: photographs.low_and_high(image[:, :2]), "low_and_high expects uint8 of shape"),
        (lambda: photographs.low_and_high(image, 4, 16), "at least 16 pixels a side, got 8 x 12"),
        (lambda: photographs.shrink(image, 0), "factor to be a whole number of at least 1"),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert isinstance(caught.value, DataError | ArgumentError)
        assert str(caught.value).count(". ") == 0


# --- The measures ------------------------------------------------------------------------------


def test_psnr_of_errors_that_are_known() -> None:
    truth = torch.full((3, 4, 5), 100, dtype=torch.uint8)
    assert float(metrics.psnr(truth + 1, truth)) == pytest.approx(20 * math.log10(255), abs=1e-4)
    assert float(metrics.psnr(truth - 10, truth)) == pytest.approx(28.1308, abs=1e-4)
    assert metrics.psnr(truth, truth) == math.inf
    uniform = (torch.arange(400.0) + 0.5).view(1, 20, 20) / 400 - 0.5  # what rounding leaves
    assert float(metrics.psnr(uniform, 0 * uniform)) == pytest.approx(58.92, abs=0.01)
    torch.manual_seed(0)
    one, other = torch.randint(256, (2, 3, 6, 7), dtype=torch.uint8)
    theirs = peak_signal_noise_ratio(one.numpy(), other.numpy(), data_range=255)
    assert float(metrics.psnr(other, one)) == pytest.approx(theirs, abs=1e-4)


def test_measures_broadcast_draws_over_the_truth() -> None:
    torch.manual_seed(0)
    draws, truth = 255 * torch.rand(2, 3, 1, 12, 11), 255 * torch.rand(3, 1, 12, 11)
    for measure in (metrics.psnr, metrics.ssim):
        found = measure(draws, truth)
        assert found.shape == (2, 3)
        assert found.dtype == torch.float32
        assert found[1, 2] == measure(draws[1, 2], truth[2])
        assert measure(draws[0, 0], truth[0]).shape == ()


def test_ssim_of_images_that_are_known() -> None:
    torch.manual_seed(0)
    image = 255 * torch.rand(3, 16, 16)
    assert float(metrics.ssim(image, image)) == pytest.approx(1)
    assert float(metrics.ssim(255 - image, image)) < -0.5
    # Of even areas a and b there are only means: (2 a b + C) / (a^2 + b^2 + C), C = (0.01 255)^2.
    a, b, c = 100.0, 150.0, (0.01 * 255) ** 2
    found = metrics.ssim(torch.full((1, 16, 16), a), torch.full((1, 16, 16), b))
    assert float(found) == pytest.approx((2 * a * b + c) / (a**2 + b**2 + c), abs=1e-5)


def test_ssim_is_the_papers_formula_at_one_pixel() -> None:
    """An image of 11 x 11 pixels has one window that lies inside of it."""
    torch.manual_seed(0)
    x, y = (255 * torch.rand(2, 11, 11)).double()
    t = torch.arange(-5, 6).double()
    w = torch.exp(-0.5 * (t / 1.5).square())
    w = torch.outer(w, w) / w.sum() ** 2
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy = (w * x * x).sum() - mx**2, (w * y * y).sum() - my**2
    both = (w * x * y).sum() - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert float(metrics.ssim(x[None], y[None])) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("name", ["psnr", "ssim"])
def test_images_that_cannot_be_compared_are_one_sentence(name: str) -> None:
    measure = getattr(metrics, name)
    image = torch.zeros(2, 3, 12, 12)
    small = image[..., : 0 if name == "psnr" else 10]
    for one, other in [(image, image[..., :11]), (image[0, 0], image[0, 0]), (small, small)]:
        with pytest.raises(ValueError, match=rf"^{name} expects images and truth of one shape"):
            measure(one, other)
    with pytest.raises(ValueError, match=f"^{name} expects leading dims .* broadcast"):
        measure(image, torch.zeros(3, 3, 12, 12))
