"""Mixing flows: where the numbers of a patch go, what is shared, and what a mixing flow may be."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from nflib import reversible
from nflib.autoregressive import MaskedAutoregressive
from nflib.checks import check_bijection, check_normalized, jacobian, randomize_parameters
from nflib.core import Compose, Flow, Inverse
from nflib.coupling import Coupling, halves
from nflib.elementwise import LogisticMixtureCDF, RationalQuadraticSpline
from nflib.linear import LU
from nflib.mixer import AlongChannels, AlongPatches, Bands, Patches, Shift
from nflib.models import mixerflow
from nflib.multiscale import MultiScale, Squeeze
from nflib.nets import MLP, ResidualMLP
from nflib.normalization import ActNorm, BatchNorm
from nflib.planar import Planar
from nflib.train import fit

SHAPES = {"vector": 12, "grey": (1, 4, 6), "colour": (3, 4, 2)}
OPTIONS = {
    "paper": {},
    "patches": {"extraction": "patches"},
    "bands": {"extraction": "bands"},
    "earlier layer": {"normalization": "batchnorm", "linear": "none"},
    "channels alone": {"mixing": "channels"},
    "patches alone": {"mixing": "patches", "linear": "householder"},
    "spline": {"elementwise": RationalQuadraticSpline(4), "linear": "permutation"},
    "mixture": {"elementwise": LogisticMixtureCDF(3), "linear": "dense"},
    "maf": {"flow": "maf"},
    "residual network": {"network": partial(ResidualMLP, hidden=(8,), context_dim=2)},
}


def small(shape: str, **options: object) -> Flow:
    if SHAPES[shape] == 12 and options.get("extraction") == "bands":
        pytest.skip("a vector has no bands")
    context = 2 if "network" in options else None
    flow = mixerflow(SHAPES[shape], 2, 2, (8,), **{"context_dim": context} | options)  # type: ignore[arg-type]
    randomize_parameters(flow, scale=0.2)
    return flow.eval()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_variant_is_a_bijection(name: str, shape: str) -> None:
    flow = small(shape, **OPTIONS[name])
    size = SHAPES[shape] if isinstance(SHAPES[shape], tuple) else (SHAPES[shape],)
    context = torch.randn(3, 2) if "network" in OPTIONS[name] else None
    compile = shape == "grey" and name in ("paper", "bands", "earlier layer", "maf")
    check_bijection(
        flow.bijection, torch.randn(3, *size), context, randomize=False, compile=compile
    )


@pytest.mark.parametrize("flow", ["coupling", "maf"])
def test_context_reaches_every_patch(flow: str) -> None:
    model = small("grey", context_dim=2, flow=flow)
    check_bijection(model.bijection, torch.randn(3, 1, 4, 6), torch.randn(3, 2), randomize=False)
    x = torch.randn(1, 1, 4, 6)
    one, other = (model.encode(x, torch.full((1, 2), c)) for c in (0.0, 1.0))
    assert bool((one != other).all())


def test_a_mixerflow_of_two_numbers_is_a_density() -> None:
    flow = mixerflow(2, 1, 3, (8,), mixing="patches")
    randomize_parameters(flow, scale=0.2)
    check_normalized(flow)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_is_a_patch_in_reading_order(channels: int) -> None:
    x = torch.arange(channels * 24.0).view(1, channels, 4, 6)
    z, log_det = Patches((channels, 4, 6), (2, 3))(x)
    assert z.shape == (1, 4, 6 * channels)
    assert torch.equal(log_det, torch.zeros(1))
    expected = [x[0, :, i : i + 2, j : j + 3].flatten() for i in (0, 2) for j in (0, 3)]
    assert torch.equal(z[0], torch.stack(expected))


def test_a_row_of_bands_is_a_stripe() -> None:
    x = torch.randn(2, 3, 4, 6)
    z, _ = Bands((3, 4, 6), 2)(x)
    assert torch.equal(z, torch.stack([x[:, :, :2].flatten(1), x[:, :, 2:].flatten(1)], 1))


def test_a_vector_is_cut_into_pieces() -> None:
    z, _ = Patches(6, 2)(torch.arange(6.0)[None])
    assert z.tolist() == [[[0, 1], [2, 3], [4, 5]]]


def test_shift_goes_around_the_edges() -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3)
    z, _ = Shift(1, 1)(x)
    assert z.tolist() == [[[[5, 3, 4], [2, 0, 1]]]]
    assert torch.equal(Shift(1, 1).inverse(z)[0], x)
    assert Shift(2)(torch.arange(4.0)[None])[0].tolist() == [[2, 3, 0, 1]]


def test_along_channels_maps_every_row_alike_and_along_patches_every_column() -> None:
    x = torch.randn(2, 5, 4)
    rows, columns = LU(4), LU(5)
    by_rows = torch.stack([rows(x[:, p])[0] for p in range(5)], 1)
    by_columns = torch.stack([columns(x[:, :, c])[0] for c in range(4)], 2)
    z, log_det = AlongChannels(rows)(x)
    torch.testing.assert_close(z, by_rows)
    torch.testing.assert_close(log_det, 5 * rows.log_abs_det().expand(2))
    z, log_det = AlongPatches(columns)(x)
    torch.testing.assert_close(z, by_columns)
    torch.testing.assert_close(log_det, 4 * columns.log_abs_det().expand(2))


def test_one_layer_reaches_its_row_and_column_and_two_sides_reach_all() -> None:
    along = AlongChannels(LU(4)), AlongPatches(LU(6))
    x = torch.randn(1, 6, 4)

    def reached(layer: torch.nn.Module) -> torch.Tensor:
        flat = jacobian(lambda v: layer(v.view(-1, 6, 4))[0].flatten(1), x.flatten(1))[0]
        return flat.view(6, 4, 6, 4) != 0

    same_patch = torch.eye(6, dtype=torch.bool)[:, None, :, None].expand(6, 4, 6, 4)
    same_channel = torch.eye(4, dtype=torch.bool)[None, :, None, :].expand(6, 4, 6, 4)
    assert torch.equal(reached(along[0]), same_patch)
    assert torch.equal(reached(along[1]), same_channel)
    assert bool(reached(Compose(*along)).all())


def test_initialize_normalizes_every_channel_over_all_patches() -> None:
    x = 3 + 2 * torch.randn(64, 5, 4)
    layer = AlongChannels(ActNorm(4))
    layer.initialize(x)
    z = layer(x)[0].flatten(0, 1)
    torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(4))


def _mlp(dim: int, hidden: tuple[int, ...]) -> int:
    sizes = [dim - dim // 2, *hidden, 2 * (dim // 2)]
    return sum((a + 1) * b for a, b in zip(sizes[:-1], sizes[1:], strict=True))


@pytest.mark.parametrize(("shape", "patch"), [((1, 8, 8), 2), ((3, 6, 4), 2), ((2, 3, 9), 3)])
def test_the_parameters_are_those_of_the_formula(shape: tuple[int, ...], patch: int) -> None:
    hidden = (16, 8)
    cut = Patches(shape, patch)
    flow = mixerflow(shape, patch, 3, hidden)
    expected = 3 * sum(2 * d + d**2 + _mlp(d, hidden) for d in (cut.patches, cut.channels))
    assert sum(p.numel() for p in flow.parameters()) == expected + 2 * cut.channels


def test_what_is_shared_does_not_grow_with_the_image() -> None:
    counts = [
        sum(p.numel() for p in mixerflow((1, s, s), 4, 2, (8,), mixing="channels").parameters())
        for s in (8, 16, 32)
    ]
    assert len(set(counts)) == 1


def test_the_earlier_layer_is_flow_and_batch_norm_in_turn() -> None:
    flow = mixerflow((1, 4, 4), 2, 2, (8,), normalization="batchnorm", linear="none")
    kinds = [type(m).__name__ for m in flow.modules() if isinstance(m, (BatchNorm, Coupling))]
    assert kinds == ["BatchNorm", "Coupling"] * 4 + ["BatchNorm"]


def test_the_grid_moves_between_layers() -> None:
    flow = mixerflow((1, 8, 8), 4, 3, (8,))
    assert [m.steps for m in flow.bijection.bijections if isinstance(m, Shift)] == [(2, 2)] * 2
    still = mixerflow((1, 8, 8), 4, 3, (8,), extraction="patches")
    assert not any(isinstance(m, Shift) for m in still.modules())
    with_one = mixerflow((1, 8, 8), 4, 2, (8,), shift=1)
    assert next(m.steps for m in with_one.modules() if isinstance(m, Shift)) == (1, 1)


def test_what_one_layer_keeps_the_next_one_moves() -> None:
    flow = mixerflow((1, 4, 4), 2, 2, (8,), linear="none")
    masks = [m.mask.kept(4) for m in flow.modules() if isinstance(m, Coupling)]
    assert torch.equal(masks[0], ~masks[2])
    assert torch.equal(masks[1], ~masks[3])
    flow = mixerflow((1, 4, 4), 2, 2, (8,), linear="none", flow="maf")
    orders = [m.made.order.tolist() for m in flow.modules() if isinstance(m, MaskedAutoregressive)]
    assert orders == [[0, 1, 2, 3]] * 2 + [[3, 2, 1, 0]] * 2


def test_a_mixing_flow_of_ones_own() -> None:
    made = []

    def spline(dim: int, k: int) -> Coupling:
        made.append((dim, k))
        return Coupling(halves(dim), RationalQuadraticSpline(4), partial(MLP, hidden=(8,)))

    flow = mixerflow((1, 4, 6), 2, 2, flow=spline)
    assert made == [(4, 0), (6, 0), (4, 1), (6, 1)]
    randomize_parameters(flow, scale=0.2)
    check_bijection(flow.bijection, torch.randn(3, 1, 4, 6), randomize=False)


def test_reversible_memory_gives_the_same_gradients() -> None:
    flow = small("colour").double()
    x = torch.randn(5, 3, 4, 2, dtype=torch.float64)

    def gradients() -> list[torch.Tensor]:
        flow.zero_grad()
        flow(x).sum().backward()
        return [p.grad.clone() for p in flow.parameters()]

    plain = gradients()
    reversible.turn_on(flow)
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_it_learns_and_samples_pixels() -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 17, (64, 1, 4, 4)) // 4
    flow = mixerflow((1, 4, 4), 2, 2, (16,), grey_levels=17)
    before = flow(x).mean().item()
    fit(flow, x, steps=60, lr=5e-3, batch_size=64, progress=False)
    assert flow(x).mean().item() > before + 5
    samples = flow.sample(5)
    assert samples.shape == (5, 1, 4, 4)
    assert samples.min() >= 0
    assert samples.max() <= 16


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Patches((1, 5, 4), 2), "tile the event of shape (1, 5, 4), got 2 x 2"),
        (
            lambda: Patches((4, 4), 2),
            "a patch of at most two sides, got (4, 4) and (2,)",
        ),
        (
            lambda: Bands(8, 2),
            "Bands expects shape to be the shape (channels",
        ),
        (
            lambda: Bands((1, 8, 8), (2, 2)),
            "Bands expects rows to be a whole number",
        ),
        (lambda: Shift(), "how far to move"),
        (lambda: Shift(1, 1)(torch.zeros(2, 3)), "shape (batch, ..., any, any), got (2, 3)"),
        (lambda: AlongChannels(Patches((1, 4, 4), 2)), "a bijection from vectors to vectors"),
        (lambda: AlongChannels(LU(3))(torch.zeros(2, 3)), "shape (batch, any, 3), got (2, 3)"),
        (lambda: AlongPatches(LU(3))(torch.zeros(2, 4, 3)), "(batch, 3, any), got (2, 4, 3)"),
        (lambda: AlongChannels(ActNorm(3))(torch.zeros(2, 3)), "(batch, any, 3), got (2, 3)"),
        (
            lambda: Patches((1, 4, 4), 2).inverse(torch.zeros(1, 4, 5)),
            "Patches.inverse expects shape (batch, 4, 4), got (1, 4, 5)",
        ),
        (lambda: mixerflow((1, 4, 4), 2, extraction="tiles"), "'shifted', got 'tiles'"),
        (lambda: mixerflow((1, 4, 4), 2, mixing="rows"), "got 'rows'"),
        (lambda: mixerflow((1, 4, 4), 2, linear="qr"), "got 'qr'"),
        (lambda: mixerflow((1, 4, 4), 2, flow="iaf"), "got 'iaf'"),
        (lambda: mixerflow((1, 4, 4), 1), "at least two channels to mix, got one: 16 patches"),
        (lambda: mixerflow((1, 4, 4), 4), "at least two patches to mix, got one: 1 patches"),
        (lambda: mixerflow((1, 4), 2), "got (1, 4)"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        build()  # type: ignore[operator]
    assert message in str(caught.value)
    assert str(caught.value).endswith(".")


def test_what_mixes_is_as_exact_as_its_bijection_and_keeps_the_size() -> None:
    assert AlongChannels(LU(3)).exact_inverse
    assert not AlongPatches(Planar(3)).exact_inverse
    flat = Inverse(MultiScale((1, 2, 2), Squeeze()))  # takes vectors and returns images
    with pytest.raises(ValueError, match="^AlongChannels expects a bijection from vectors to vec"):
        AlongChannels(flat)
    for steps in ((1.5,), (1, True), ("1",)):
        with pytest.raises(ValueError, match="^Shift expects steps to be a whole number each, got"):
            Shift(*steps)  # type: ignore[arg-type]
