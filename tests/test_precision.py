"""Which networks run in bfloat16: those with matrices large enough."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from nflib.autoregressive import MaskedAutoregressive
from nflib.core import Bijection
from nflib.coupling import Coupling, channels, halves
from nflib.elementwise import Affine
from nflib.nets import MLP, ConvNet
from nflib.precision import WIDE, is_wide, matrices_of


def coupling(hidden: tuple[int, ...]) -> Coupling:
    return Coupling(halves(4), Affine(), partial(MLP, hidden=hidden))


def conv(hidden: int) -> Coupling:
    return Coupling(channels(4), Affine(), partial(ConvNet, hidden=hidden))


def maf(dim: int, hidden: tuple[int, ...]) -> MaskedAutoregressive:
    return MaskedAutoregressive(dim, Affine(), hidden)


LAYERS: dict[str, tuple[Bijection, Tensor, bool]] = {
    "a wide MLP": (coupling((WIDE, WIDE)), torch.randn(3, 4), True),
    "one wide layer on few numbers": (coupling((WIDE,)), torch.randn(3, 4), False),
    "narrow": (coupling((WIDE - 1, WIDE - 1)), torch.randn(3, 4), False),
    "convolutions": (conv(WIDE), torch.randn(2, 4, 4, 4), True),
    "narrow convolutions": (conv(16), torch.randn(2, 4, 4, 4), False),
    "a wide MADE": (maf(4, (WIDE, WIDE)), torch.randn(3, 4), True),
    "a narrow MADE": (maf(4, (WIDE,)), torch.randn(3, 4), False),
    "a MADE of many numbers": (maf(WIDE, (WIDE,)), torch.randn(3, WIDE), True),
}


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", LAYERS)
def test_wide_networks_follow_autocast_and_narrow_ones_do_not(name: str, direction: str) -> None:
    layer, x, is_wide = LAYERS[name]
    for p in layer.parameters():
        nn.init.normal_(p, std=0.1)
    call = getattr(layer, direction)
    with torch.no_grad():
        exact, exact_log_det = call(x)
        with torch.autocast("cpu", torch.bfloat16):
            z, log_det = call(x)
            assert torch.is_autocast_enabled("cpu")
    assert z.dtype == log_det.dtype == torch.float32
    assert torch.equal(log_det, exact_log_det) != is_wide
    torch.testing.assert_close(z, exact, atol=0.1, rtol=0.1)


@pytest.mark.filterwarnings("ignore:MADE expects hidden layers")
def test_each_matrix_of_a_network_counts() -> None:
    assert not is_wide([(WIDE, 1), (1, WIDE), (WIDE - 1, WIDE - 1)])
    assert is_wide([(1, 1), (WIDE, WIDE)])
    # Numbers under a 3x3 kernel: 16 channels make 144 of them.
    network = nn.Sequential(nn.Linear(5, 7), nn.Conv2d(16, WIDE, 3))
    assert matrices_of(network) == [(7, 5), (WIDE, 144)]
    # The first matrix of the first MADE is wide, the last one of the second, which has two outputs
    # for each number.
    assert maf(WIDE, (WIDE, 2)).is_wide
    assert maf(WIDE // 2, (WIDE,)).is_wide
    assert not maf(WIDE // 2, (WIDE // 2,)).is_wide
