"""Invertible convolutions: what each pixel sees, and that they are torch's own convolutions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nflib.checks import jacobian, randomize_parameters
from nflib.convolution import CausalConv, EmergingConv, Invertible1x1Conv, PeriodicConv
from nflib.core import Layer

SHAPE = (2, 4, 5)


def sees(layer: Layer) -> torch.Tensor:
    """Which outputs see which inputs, each as (channel, row, column)."""
    randomize_parameters(layer)
    found = jacobian(lambda x: layer(x)[0], torch.randn(1, *SHAPE))[0] != 0
    return found.view(*SHAPE, *SHAPE)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_causal_pixel_sees_its_window_as_far_as_it_comes_before(
    kernel: int, reverse: bool
) -> None:
    c, i, j = torch.meshgrid(*map(torch.arange, SHAPE), indexing="ij")
    out = [index.reshape(*SHAPE, 1, 1, 1) for index in (c, i, j)]
    near = ((out[1] - i).abs() <= kernel // 2) & ((out[2] - j).abs() <= kernel // 2)
    # The place in raster order, channels last.
    place = (i * SHAPE[2] + j) * SHAPE[0] + c
    mine = (out[1] * SHAPE[2] + out[2]) * SHAPE[0] + out[0]
    expected = near & ((place >= mine) if reverse else (place <= mine))
    assert torch.equal(sees(CausalConv(2, kernel, reverse=reverse)), expected)


def test_an_emerging_pixel_sees_all_around_it() -> None:
    found = sees(EmergingConv(2, 3))[0, 1, 2]
    assert found[:, :3, 1:4].all()
    assert len(EmergingConv(2, 5)) == 2
    assert [part.kernel_size for part in EmergingConv(2, 5)] == [5, 5]  # type: ignore[union-attr]


def test_they_are_torchs_convolutions() -> None:
    x = torch.randn(3, *SHAPE)
    one, periodic = Invertible1x1Conv(2, bias=True), PeriodicConv(2)
    for layer in (one, periodic):
        randomize_parameters(layer)
    weight = one.linear.weight()[:, :, None, None]
    torch.testing.assert_close(one(x)[0], F.conv2d(x, weight, one.linear.bias))
    around = F.pad(x, (1, 1, 1, 1), mode="circular")
    torch.testing.assert_close(periodic(x)[0], F.conv2d(around, periodic.weight, periodic.bias))


@pytest.mark.parametrize("size", [(2, 5), (5, 2)])
def test_an_image_smaller_than_the_kernel_is_one_sentence(size: tuple[int, int]) -> None:
    for function in (PeriodicConv(1), PeriodicConv(1).inverse):
        with pytest.raises(ValueError, match=r"^PeriodicConv expects .* at least 3 pixels .*got"):
            function(torch.randn(2, 1, *size))
