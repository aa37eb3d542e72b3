"""Conditioners: shapes, the start at zero, context, dropout, weight norm and attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nflib.checks import jacobian, randomize_parameters
from nflib.nets import MLP, ConvNet, GatedConvNet, ResidualConvNet, ResidualMLP

VECTOR = {
    "mlp": MLP,
    "residual mlp": ResidualMLP,
}
IMAGE = {
    "conv": ConvNet,
    "residual conv": ResidualConvNet,
    "gated conv": GatedConvNet,
}
HIDDEN = {MLP: (8, 8), ResidualMLP: (8, 8), ConvNet: 8, ResidualConvNet: (8, 8), GatedConvNet: 8}
EVERY = {**VECTOR, **IMAGE}
every = pytest.mark.parametrize("name", EVERY)
Net = Callable[..., nn.Module]


def build(name: str, inputs: int = 3, outputs: int = 5, **options: object) -> nn.Module:
    kind: Net = EVERY[name]
    return kind(inputs, outputs, HIDDEN[kind], **options)


def inputs(name: str, rows: int = 4, count: int = 3) -> Tensor:
    return torch.randn(rows, count, *((3, 5) if name in IMAGE else ()))


@every
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_outputs_have_their_shape_and_start_at_zero(name: str, rows: int) -> None:
    net, x = build(name), inputs(name, rows)
    out = net(x)
    assert out.shape == (rows, 5, *x.shape[2:])
    assert not out.any()
    assert net.context_shape is None
    randomize_parameters(net)
    assert rows == 0 or net(x).any()


@every
def test_rows_do_not_see_one_another(name: str) -> None:
    net, x = build(name), inputs(name)
    randomize_parameters(net)
    torch.testing.assert_close(net(x)[:1], net(x[:1]))


@every
def test_a_vector_of_context_changes_the_output(name: str) -> None:
    net, x, context = build(name, context_dim=2), inputs(name), torch.randn(4, 2)
    assert net.context_shape == (2,)
    assert not net(x, context).any()
    randomize_parameters(net)
    changed = (net(x, context) != net(x, context + 1)).flatten(1).any(1)
    assert changed.all()
    # Each row sees its own context only.
    other = torch.cat([context[:1], context[1:] + 1])
    torch.testing.assert_close(net(x, context)[:1], net(x, other)[:1])


@pytest.mark.parametrize("name", IMAGE)
def test_an_image_of_context_changes_the_output(name: str) -> None:
    net, x, context = build(name, context_dim=(2, 3, 5)), inputs(name), torch.randn(4, 2, 3, 5)
    assert net.context_shape == (2, 3, 5)
    assert not net(x, context).any()
    randomize_parameters(net)
    assert (net(x, context) != net(x, context + 1)).flatten(1).any(1).all()


@every
def test_dropout_acts_in_training_only(name: str) -> None:
    net, x = build(name, dropout=0.5), inputs(name)
    randomize_parameters(net)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
    assert sum(isinstance(m, nn.Dropout) for m in net.modules()) >= 1
    without = build(name)
    randomize_parameters(without)
    assert torch.equal(without(x), without(x))


@pytest.mark.parametrize("name", ["mlp", "residual conv"])
def test_weight_norm_learns_length_and_direction_apart(name: str) -> None:
    torch.manual_seed(1)
    net = build(name, weight_norm=True)
    torch.manual_seed(1)
    plain = build(name, weight_norm=False)
    names = [n for n, _ in net.named_parameters()]
    assert any("length" in n for n in names)
    assert not any("length" in n for n, _ in plain.named_parameters())
    # At the start both compute the same; the last layer is set alike to see it.
    x = inputs(name)
    for one in (net, plain):
        last = [m for m in one.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
        nn.init.ones_(last.weight)
    torch.testing.assert_close(net(x), plain(x))
    # Twice the direction is the same weight: only its length counts.
    before = net(x)
    with torch.no_grad():
        for n, p in net.named_parameters():
            if "direction" in n:
                p.mul_(2)
    torch.testing.assert_close(net(x), before)


def influence(net: nn.Module, size: tuple[int, int]) -> Tensor:
    """Whether an output pixel depends on an input pixel, ``(pixels, pixels)``."""
    net = net.double()
    randomize_parameters(net)
    x = torch.randn(1, 1, *size, dtype=torch.float64)
    return jacobian(lambda a: net(a).sum(1), x)[0] != 0


def test_only_attention_sees_the_whole_image_at_once() -> None:
    size = (1, 12)
    with_attention = GatedConvNet(1, 2, 8, blocks=1, heads=2)
    assert influence(with_attention, size).all()
    # Group norm shares a mean and a spread over the image; what it shares is switched off here.
    without = GatedConvNet(1, 2, 8, blocks=1, heads=0)
    for block in without.blocks:
        block.norm = nn.Identity()
    seen = influence(without, size)
    reach = (torch.arange(12)[:, None] - torch.arange(12)).abs()
    assert seen[reach <= 3].all()
    assert not seen[reach > 3].any()


def test_attention_can_be_left_out_and_know_positions() -> None:
    def parts(**options: object) -> list[str]:
        net = GatedConvNet(1, 2, 8, blocks=2, **options)
        return [type(block).__name__ for block in net.blocks]

    assert parts(heads=2) == ["GatedConv", "GatedAttention"] * 2
    assert parts(heads=0) == ["GatedConv"] * 2
    placed = GatedConvNet(1, 2, 8, heads=2, size=(3, 5))
    assert [n for n, _ in placed.named_parameters() if "position" in n]
    assert not [n for n, _ in GatedConvNet(1, 2, 8, heads=2).named_parameters() if "position" in n]
    # Without positions, attention treats all pixels of a constant image alike.
    for net, alike in ((placed.blocks[1], False), (GatedConvNet(1, 2, 8).blocks[1], True)):
        randomize_parameters(net)
        out = net(torch.ones(1, 8, 3, 5))
        assert torch.allclose(out, out[:, :, :1, :1].expand_as(out), atol=1e-5) == alike


def test_attention_equals_its_formula() -> None:
    net = GatedConvNet(1, 2, 8, heads=2).blocks[1].double()
    randomize_parameters(net)
    h = torch.randn(1, 8, 2, 3, dtype=torch.float64)
    query, key, value = net.query_key_value(h)[0].flatten(1).split(8)
    mixed = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = (query[head].T @ key[head] / 2).softmax(1)  # pixels by pixels
        mixed.append(value[head] @ weights.T)
    a, b = net.outer(torch.cat(mixed).view(1, 8, 2, 3)).chunk(2, 1)
    torch.testing.assert_close(net(h), net.norm(h + a * b.sigmoid()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: MLP(2, 2, context_dim=0),
        lambda: MLP(2, 2, context_dim=(3, 4, 4)),
        lambda: ResidualMLP(2, 2, hidden=(8, 9)),
        lambda: ResidualMLP(2, 2, hidden=()),
        lambda: ResidualConvNet(2, 2, hidden=(8, 9)),
        lambda: ConvNet(2, 2, context_dim=(3, 4)),
        lambda: ConvNet(2, 2, context_dim=0),
        lambda: GatedConvNet(2, 2, hidden=6, heads=4),
    ],
)
def test_bad_arguments_are_one_sentence(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"^\w+ expects .*, got .*\.$"):
        make()


@every
def test_inputs_of_the_wrong_shape_are_one_sentence(name: str) -> None:
    net, x = build(name), inputs(name)
    other = inputs("conv" if name in VECTOR else "mlp")
    for wrong in (x[0], torch.cat([x, x], 1), other):
        with pytest.raises(ValueError, match=r"^[\w.]+ expects shape \(batch, 3.*\), got .*\.$"):
            net(wrong)


@pytest.mark.parametrize("kind", [ResidualMLP, ResidualConvNet])
def test_a_residual_network_adds_one_block_for_each_width(kind: Net) -> None:
    name = next(n for n, k in EVERY.items() if k is kind)
    net, x = kind(3, 5, (8, 8, 8)), inputs(name)
    randomize_parameters(net)
    assert len(net.blocks) == 3
    h = net.first(x, None) if name in IMAGE else net.first(x)
    for block in net.blocks:
        h = h + block(h)
    torch.testing.assert_close(net(x), net.last(h))


def test_a_gated_convolution_equals_its_formula() -> None:
    layer = GatedConvNet(1, 2, 6, blocks=1, heads=0).blocks[0]
    randomize_parameters(layer)
    h = torch.randn(2, 6, 3, 4)
    both = nn.functional.elu(torch.cat([h, -h], 1))
    inner = layer.inner(both)
    a, b = layer.outer(nn.functional.elu(torch.cat([inner, -inner], 1))).chunk(2, 1)
    torch.testing.assert_close(layer(h), layer.norm(h + a * b.sigmoid()))


@pytest.mark.parametrize("kind", [MLP, ResidualMLP])
def test_the_activation_is_the_one_that_was_asked_for(kind: Net) -> None:
    net = kind(3, 5, (8, 8), activation=nn.Tanh)
    kinds = {type(part) for part in net.modules()}
    assert nn.Tanh in kinds
    assert nn.ReLU not in kinds


@every
def test_a_context_that_is_missing_or_of_another_size_is_one_sentence(name: str) -> None:
    x = inputs(name)
    with pytest.raises(ValueError, match=r"^\w+ expects a context of shape .*, got none\.$"):
        build(name, context_dim=2)(x)
    if name in IMAGE:
        net = build(name, context_dim=(2, 3, 5))
        with pytest.raises(ValueError, match=r"^\w+ expects an image of context of .* \(3, 5\)"):
            net(x, torch.randn(4, 2, 5, 3))


def test_heads_that_leave_a_rest_are_one_sentence() -> None:
    with pytest.raises(ValueError, match="^GatedConvNet expects hidden to be a multiple of heads"):
        GatedConvNet(2, 2, hidden=6, heads=4)
