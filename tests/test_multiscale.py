"""Squeeze and several scales: nothing is lost, and all of it is where it should be."""

from __future__ import annotations

import pytest
import torch
from layers import conv, two_scales

from nflib.checks import check_inverse, randomize_parameters
from nflib.core import Bijection, Compose, Flow, Inverse, ShapeError, StandardNormal
from nflib.coupling import Coupling, channels, checkerboard
from nflib.dequantization import UniformDequantization
from nflib.elementwise import Affine, LogisticMixtureCDF
from nflib.linear import Permutation
from nflib.multiscale import MultiScale, Squeeze
from nflib.normalization import ActNorm


def test_squeeze_turns_each_square_into_four_channels() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    z, log_det = Squeeze()(x)
    expected = [
        [[0, 2], [8, 10]],  # the top left pixels
        [[1, 3], [9, 11]],  # top right
        [[4, 6], [12, 14]],  # bottom left
        [[5, 7], [13, 15]],  # bottom right
    ]
    assert z[0].tolist() == expected
    assert not log_det.any()
    assert torch.equal(Squeeze().inverse(z)[0], x)


def test_squeeze_keeps_the_channels_of_an_image_apart() -> None:
    x = torch.arange(48.0).view(1, 3, 4, 4)
    for c in range(3):
        alone = Squeeze()(x[:, c : c + 1])[0]
        assert torch.equal(Squeeze()(x)[0][:, 4 * c : 4 * c + 4], alone)
    assert torch.equal(Squeeze()(x)[0], torch.nn.functional.pixel_unshuffle(x, 2))


@pytest.mark.parametrize("size", [(3, 4), (4, 3), (5, 5), (1, 2)])
def test_squeeze_of_odd_sizes_is_one_sentence(size: tuple[int, int]) -> None:
    with pytest.raises(ShapeError, match=r"^Squeeze expects .* multiples of 2, got .*\.$"):
        Squeeze()(torch.randn(2, 1, *size))
    with pytest.raises(ShapeError, match=r"^Squeeze expects .* multiples of 2, got .*\.$"):
        MultiScale((1, *size), Squeeze())


def test_squeezes_other_errors_are_one_sentence() -> None:
    with pytest.raises(ShapeError, match=r"^Squeeze.inverse expects a multiple of 4 channels"):
        Squeeze().inverse(torch.randn(2, 6, 2, 2))
    with pytest.raises(ValueError, match="factor to be a whole number of at least 1, got 0"):
        Squeeze(0)
    with pytest.raises(ShapeError, match=r"Squeeze expects shape \(batch, any, any, any\)"):
        Squeeze()(torch.randn(2, 4))


def three_scales() -> MultiScale:
    """(1, 8, 12) -> 2 of 4 channels at 4 x 6 -> 4 of 8 at 2 x 3 -> the rest."""
    levels = [
        Compose(ActNorm(1), Squeeze(), Coupling(channels(4), Affine(), conv)),
        Compose(ActNorm(2), Squeeze(), Coupling(channels(8), Affine(), conv)),
        Compose(ActNorm(4), Coupling(checkerboard(4, 2, 3), Affine(), conv)),
    ]
    return MultiScale((1, 8, 12), *levels)


def test_all_latents_come_out_in_one_vector_and_go_back_in() -> None:
    for layer, shape, sizes in (
        (two_scales(), (1, 4, 6), [12, 12]),
        (three_scales(), (1, 8, 12), [48, 24, 24]),
        (MultiScale((1, 2, 2), Squeeze()), (1, 2, 2), [4]),
    ):
        randomize_parameters(layer)
        x = torch.randn(3, *shape)
        z, log_det = layer(x)
        assert layer.sizes == sizes
        assert z.shape == (3, sum(sizes)) == (3, *(layer.output_shape(shape) or ()))
        assert log_det.shape == (3,)
        check_inverse(layer, x)


def test_three_scales_equal_factoring_out_by_hand() -> None:
    layer = three_scales()
    randomize_parameters(layer)
    x = torch.randn(2, 1, 8, 12)
    first, second, third = layer.levels
    h, a = first(x)
    h, y1 = h[:, :2], h[:, 2:]
    h, b = second(h)
    h, y2 = h[:, :4], h[:, 4:]
    h, c = third(h)
    z, log_det = layer(x)
    assert torch.equal(z, torch.cat([y1.flatten(1), y2.flatten(1), h.flatten(1)], 1))
    torch.testing.assert_close(log_det, a + b + c)


def test_only_a_levels_own_latents_change_with_it() -> None:
    # What the first level hands over does not pass through the second.
    layer, x = three_scales(), torch.randn(2, 1, 8, 12)
    before = layer(x)[0].split(layer.sizes, 1)
    randomize_parameters(layer.levels[2])
    after = layer(x)[0].split(layer.sizes, 1)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False]


def test_initialize_reaches_the_layers_of_every_level() -> None:
    layer, x = three_scales(), 5 + 3 * torch.randn(64, 1, 8, 12)
    Flow(layer, StandardNormal(96)).initialize(x)
    norms = [m for m in layer.modules() if isinstance(m, ActNorm)]
    assert len(norms) == 3
    h = x
    for level, norm in zip(layer.levels, norms, strict=True):
        out = norm(h)[0].transpose(0, 1).flatten(1)
        torch.testing.assert_close(out.mean(1), torch.zeros(len(out)), atol=1e-4, rtol=0)
        torch.testing.assert_close(out.std(1), torch.ones(len(out)), atol=1e-2, rtol=0)
        h = level(h)[0]
        h = h[:, : h.shape[1] // 2]


@pytest.mark.parametrize(
    ("shape", "levels"),
    [
        ((1, 4, 4), (Permutation(1), Squeeze())),  # one channel cannot be halved
        ((3, 4, 4), (Permutation(3), Squeeze())),
        ((4, 4), (Squeeze(),)),
        ((1, 4, 4), ()),
    ],
)
def test_levels_that_do_not_fit_are_one_sentence(
    shape: tuple[int, ...], levels: tuple[Bijection, ...]
) -> None:
    with pytest.raises(ValueError, match=r"^MultiScale expects .*, got .*\.$"):
        MultiScale(shape, *levels)


@pytest.mark.parametrize("shape", [(2, 23), (2, 25), (24,), (2, 1, 4, 6)])
def test_latents_of_the_wrong_size_are_one_sentence(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"^MultiScale.inverse expects shape \(batch, 24\), got"):
        two_scales().inverse(torch.randn(shape))
    with pytest.raises(ShapeError, match=r"^MultiScale expects shape \(batch, 1, 4, 6\), got"):
        two_scales()(torch.randn(2, 1, 6, 4))


def test_squeeze_knows_its_shapes_both_ways() -> None:
    assert Squeeze().output_shape((1, 4, 6)) == (4, 2, 3)
    assert Squeeze().input_shape((4, 2, 3)) == (1, 4, 6)
    assert Squeeze(3).input_shape((9, None, 2)) == (1, None, 6)


def test_a_level_must_take_its_image_and_give_it_back() -> None:
    with pytest.raises(ShapeError, match=r"level 1, where \(3, 4, 4\) arrives"):
        MultiScale((3, 4, 4), Permutation(2))
    with pytest.raises(ValueError, match="^MultiScale expects a bijection, got UniformDequ"):
        MultiScale((1, 4, 4), UniformDequantization(4))
    searched = Coupling(channels(4), LogisticMixtureCDF(2), conv)
    assert not MultiScale((1, 4, 4), Compose(Squeeze(), searched), Permutation(2)).exact_inverse
    assert two_scales().exact_inverse


def test_read_backwards_every_level_is_initialized() -> None:
    layer, z = three_scales(), 5 + 3 * torch.randn(64, 96)
    Inverse(layer).initialize(z)
    norms = [m for m in layer.modules() if isinstance(m, ActNorm)]
    assert all(bool(norm.initialized) for norm in norms)
    # The first layer of all is the last to see the noise on its way back.
    pixels = layer.inverse(z)[0].flatten()
    torch.testing.assert_close(pixels.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(pixels.std(), torch.tensor(1.0), atol=1e-2, rtol=0)
