"""Pixel models: only earlier pixels are seen, probabilities sum to one, samplers agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nflib.checks import AutoregressiveError, check_autoregressive, jacobian, randomize_parameters
from nflib.core import Shape, ShapeError
from nflib.discrete import LogisticMixture, Softmax
from nflib.metrics import evaluate
from nflib.pixel import (
    GatedPixelCNN,
    PixelCNN,
    PixelCNNPP,
    PixelModel,
    PixelRNN,
    WindowConv,
    channel_mask,
    masked_conv,
)
from nflib.pixel.rnn import DiagonalBiLSTM, RowLSTM, lstm_cell, skew, unskew
from nflib.train import fit

Make = Callable[..., PixelModel]


def mixture(kind: type[PixelModel]) -> Make:
    """The same network with a logistic mixture, which predicts whole pixels."""

    def make(shape: Shape, levels: int, *sizes: int, **options: object) -> PixelModel:
        return kind(shape, levels, *sizes, head=LogisticMixture(levels, shape[0], 2), **options)

    return make


MODELS: dict[str, Make] = {
    "PixelCNN": lambda s, k, **o: PixelCNN(s, k, 12, 2, kernel=5, **o),
    "Gated PixelCNN": lambda s, k, **o: GatedPixelCNN(s, k, 6, 3, first_kernel=5, **o),
    "Row LSTM": lambda s, k, **o: PixelRNN(s, k, "row", 6, 2, kernel=5, **o),
    "Diagonal BiLSTM": lambda s, k, **o: PixelRNN(s, k, "diagonal", 6, 2, kernel=5, **o),
    "PixelCNN++": lambda s, k, **o: PixelCNNPP(s, k, 6, 1, 2, components=2, **o),
    "PixelCNN++, one size": lambda s, k, **o: PixelCNNPP(s, k, 6, 2, 1, components=2, **o),
    "PixelCNN, mixture": lambda s, k, **o: mixture(PixelCNN)(s, k, 6, 2, **o),
    "Gated PixelCNN, mixture": lambda s, k, **o: mixture(GatedPixelCNN)(s, k, 6, 2, **o),
    "Diagonal BiLSTM, mixture": lambda s, k, **o: mixture(PixelRNN)(s, k, **o),
}
every = pytest.mark.parametrize("name", MODELS)
CACHED = [name for name in MODELS if "LSTM" not in name]


def build(name: str, shape: Shape, levels: int = 3, **options: object) -> PixelModel:
    torch.manual_seed(0)
    model = MODELS[name](shape, levels, **options).double()
    randomize_parameters(model)
    return model


def images(model: PixelModel, n: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, model.head.levels, (n, *model.shape)).double()


def contexts(model: PixelModel, n: int = 2) -> Tensor | None:
    return None if model.context_shape is None else torch.randn(n, 2, dtype=torch.float64)


def check_order(model: PixelModel) -> None:
    """No parameter sees its own or a later value: pixels in raster order, channels in theirs."""
    channels, height, width = model.shape
    context = contexts(model)
    pixel = torch.arange(height * width)
    position = model.order.argsort()
    if model.groups > 1:
        rank = (pixel[None] * channels + position[:, None]).flatten()
    else:  # all channels of a pixel come together
        rank = pixel.repeat(channels)

    def parameters(flat: Tensor) -> Tensor:
        found = model.parameters_of(flat.view(-1, *model.shape), context)
        if model.groups > 1:
            found = found.unflatten(1, (channels, -1)).index_select(1, position)
        else:
            found = found.unsqueeze(1).expand(-1, channels, -1, -1, -1)
        return found.movedim(2, -1).flatten(1, 3)

    check_autoregressive(parameters, images(model).flatten(1), rank.tolist())


@every
@pytest.mark.parametrize("context_dim", [None, 2])
def test_no_parameter_sees_a_later_pixel(name: str, context_dim: int | None) -> None:
    check_order(build(name, (1, 4, 6), context_dim=context_dim))


@every
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_no_parameter_sees_a_later_channel(name: str, order: tuple[int, ...]) -> None:
    check_order(build(name, (3, 2, 4), order=order))


def off_by_one(model: PixelModel) -> WindowConv:
    """An entrance of the network that also reads the pixel itself."""
    entrance = model.entrances[-1]
    if isinstance(model, PixelCNNPP):
        return WindowConv(entrance.inputs, entrance.outputs, (-1, 0), (-1, 0))
    if isinstance(model, GatedPixelCNN):
        return WindowConv(entrance.inputs, entrance.outputs, (0, 0), (-1, 0))
    return masked_conv(entrance.inputs, entrance.outputs, 5, model.groups, strict=False)


@every
@pytest.mark.parametrize("channels", [1, 3])
def test_a_mask_off_by_one_is_found(name: str, channels: int) -> None:
    model = build(name, (channels, 2, 4))
    wrong = off_by_one(model).double()
    for owner in model.modules():
        for key, child in owner.named_children():
            if child is model.entrances[-1]:
                setattr(owner, key, wrong)
    with pytest.raises(AutoregressiveError, match="which is not before it"):
        check_order(model)


def test_a_vertical_stack_that_reads_its_own_row_is_found() -> None:
    model = build("Gated PixelCNN", (1, 3, 4))
    model.layers[0].vertical = WindowConv(1, 12, (-2, 0), (-2, 2)).double()
    with pytest.raises(AutoregressiveError):
        check_order(model)


def seen(model: PixelModel) -> Tensor:
    """Which pixels the parameters of the last pixel see, ``(H, W)``."""

    def last(flat: Tensor) -> Tensor:
        return model.parameters_of(flat.view(-1, *model.shape))[:, :, -1, -3]

    found = jacobian(last, images(model).flatten(1)).abs().amax((0, 1))
    return found.view(model.shape[1:]) > 0


def test_only_pixelcnn_has_a_blind_spot() -> None:
    shape = (1, 6, 7)
    before = torch.ones(6, 7, dtype=torch.bool)
    before[-1, -3:] = False
    torch.manual_seed(0)
    blind = PixelCNN(shape, 3, 8, 12, kernel=3)
    assert not seen(blind.double())[-2, -1]  # up one row and two to the right
    gated = GatedPixelCNN(shape, 3, 8, 8, first_kernel=3)
    assert torch.equal(seen(gated.double()), before)
    assert torch.equal(seen(PixelRNN(shape, 3, "diagonal", 8, 2).double()), before)
    triangle = seen(PixelRNN(shape, 3, "row", 8, 1, kernel=3).double())
    assert triangle[0].all()
    assert not triangle[-2, -1]


@every
@pytest.mark.parametrize("context_dim", [None, 2])
def test_all_images_of_four_pixels_sum_to_one(name: str, context_dim: int | None) -> None:
    model = build(name, (1, 2, 2), 2, context_dim=context_dim)
    x = torch.cartesian_prod(*[torch.arange(2)] * 4).view(16, 1, 2, 2)
    context = None if context_dim is None else torch.ones(16, 2, dtype=torch.float64)
    total = model.log_prob(x, context).exp().sum()
    torch.testing.assert_close(total, torch.ones((), dtype=torch.float64))


@every
def test_all_colours_of_two_pixels_sum_to_one(name: str) -> None:
    shape = (3, 2, 2) if name == "PixelCNN++" else (3, 1, 2)
    model = build(name, shape, 2, order=(1, 2, 0))
    size = 3 * shape[1] * shape[2]
    x = torch.cartesian_prod(*[torch.arange(2)] * size).view(-1, *shape)
    total = model.log_prob(x).exp().sum()
    torch.testing.assert_close(total, torch.ones((), dtype=torch.float64))


@every
def test_values_of_the_last_pixel_sum_to_one(name: str) -> None:
    model = build(name, (1, 4, 4), 7)
    x = images(model, 1).repeat(7, 1, 1, 1)
    x[:, 0, -1, -1] = torch.arange(7)
    others = images(model, 1).repeat(7, 1, 1, 1)
    # log P(x) - log P(all but the last) is the last conditional.
    conditional = model.head.log_prob(x, model.parameters_of(others))[:, -1, -1]
    torch.testing.assert_close(conditional.exp().sum(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("shape", [(1, 4, 6), (3, 4, 2)])
@pytest.mark.parametrize("context_dim", [None, 2])
def test_cached_and_naive_samples_are_the_same(
    name: str, shape: Shape, context_dim: int | None
) -> None:
    model = build(name, shape, 5, context_dim=context_dim)
    context = contexts(model, 3)
    u = torch.rand(3, model.head.uniforms, *shape[1:], dtype=torch.float64)
    cached = model.sample(3, context, u=u)
    assert torch.equal(cached, model.sample(3, context, u=u, cached=False))
    assert not torch.equal(cached[0], cached[1])
    # Nothing of the walk is left behind.
    torch.testing.assert_close(model.log_prob(cached, context), model(cached, context))


def test_three_sizes_are_walked_in_step() -> None:
    model = PixelCNNPP((1, 8, 8), 4, 4, 1, 3, components=2).double()
    u = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    assert torch.equal(model.sample(2, u=u), model.sample(2, u=u, cached=False))


@every
def test_draws_follow_the_model(name: str) -> None:
    """Frequencies of all 16 images against their probabilities."""
    model, n = build(name, (1, 2, 2), 2), 20_000
    x = torch.cartesian_prod(*[torch.arange(2)] * 4)
    p = model.log_prob(x.view(16, 1, 2, 2)).exp()
    torch.manual_seed(2)
    drawn = model.sample(n).flatten(1) @ torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    found = torch.bincount(drawn.long(), minlength=16) / n
    assert (found - p).abs().max() < 5 * (0.25 / n) ** 0.5


@every
def test_known_pixels_are_kept_and_conditioned_on(name: str) -> None:
    model = build(name, (3, 2, 4), 5, order=(2, 0, 1))
    given = images(model, 1)
    known = torch.zeros(2, 4, dtype=torch.bool)
    known[0] = True
    u = torch.rand(50, model.head.uniforms, 2, 4, dtype=torch.float64)
    completed = model.sample(50, given=given, known=known, u=u)
    assert torch.equal(completed[:, :, 0], given[:, :, 0].expand(50, -1, -1))
    # The same noise below another upper half gives another lower half.
    other = model.sample(50, given=4 - given, known=known, u=u)
    assert not torch.equal(completed[:, :, 1], other[:, :, 1])
    # All pixels of a free sample given back: nothing is left to draw.
    free = model.sample(50, u=u)
    same = model.sample(50, given=free, known=torch.ones(2, 4, dtype=torch.bool))
    assert torch.equal(same, free)


@every
def test_a_context_changes_the_model(name: str) -> None:
    model = build(name, (1, 4, 4), context_dim=2)
    x = images(model)
    a, b = (model.log_prob(x, torch.full((2, 2), v, dtype=torch.float64)) for v in (0.0, 1.0))
    assert not torch.allclose(a, b)


@every
@pytest.mark.parametrize("rows", [0, 1])
def test_small_batches(name: str, rows: int) -> None:
    model = build(name, (1, 4, 4))
    assert model.log_prob(images(model, rows)).shape == (rows,)
    assert model.sample(rows).shape == (rows, 1, 4, 4)


@every
def test_log_prob_compiles_whole(name: str) -> None:
    model = build(name, (1, 4, 4)).float()
    x = images(model).float()
    torch._dynamo.reset()
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(x), model(x))


def test_integers_of_any_dtype_give_the_same() -> None:
    model = build("PixelCNN", (1, 4, 4))
    x = images(model)
    torch.testing.assert_close(model.log_prob(x.to(torch.uint8)), model.log_prob(x))


def test_a_resumed_run_equals_one_without_a_pause(tmp_path: Path) -> None:
    def run(*budgets: int) -> list[Tensor]:
        model = build("PixelCNN", (1, 4, 4), dropout=0.2).float()
        x = images(model, 64)
        file = tmp_path / f"{len(budgets)}.safetensors"
        for k, steps in enumerate(budgets):
            fit(model, x, steps=steps, batch_size=16, schedule="constant", checkpoint=file,
                resume=k > 0, progress=False)  # fmt: skip
        return [p.detach() for p in model.parameters()]

    for whole, resumed in zip(run(8), run(4, 8), strict=True):
        assert torch.equal(whole, resumed)


def test_a_model_learns_what_it_is_shown() -> None:
    """Stripes: the first pixel costs one bit, all others nothing."""
    torch.manual_seed(0)
    x = torch.randint(0, 2, (64, 1, 1, 1)).repeat(1, 1, 4, 4)
    for name in ("PixelCNN", "Gated PixelCNN", "Diagonal BiLSTM"):
        model = build(name, (1, 4, 4), 2).float()
        fit(model, x, steps=150, lr=1e-2, batch_size=64, progress=False)
        assert -evaluate(model, x).nats < 0.693 + 0.05


def test_a_window_stores_only_the_weights_it_uses() -> None:
    conv = masked_conv(3, 6, 5, groups=3, strict=True)
    # Two rows of five and two pixels to the left; at the centre green sees red, blue both.
    assert conv.weight_.numel() == 6 * 3 * 12 + 2 * 1 + 2 * 2
    whole = conv.weight()
    assert whole.shape == (6, 3, 3, 5)
    assert (whole != 0).sum() == conv.weight_.numel()
    assert not whole[:, :, -1, 3:].any()


def test_masks_a_and_b_of_the_channels() -> None:
    assert channel_mask(3, 3, 3, strict=True).tolist() == [
        [False, False, False],
        [True, False, False],
        [True, True, False],
    ]
    assert channel_mask(3, 6, 3, strict=False).sum(1).tolist() == [1, 1, 2, 2, 3, 3]
    assert not channel_mask(4, 8, 1, strict=True).any()


def test_a_window_convolution_is_a_correlation() -> None:
    conv = WindowConv(1, 1, (-1, 0), (-1, 1))
    x = torch.randn(1, 1, 4, 5)
    expected = F.conv2d(F.pad(x, (1, 1, 1, 0)), conv.weight(), conv.bias)
    torch.testing.assert_close(conv(x), expected)
    above = WindowConv(1, 1, (-3, -1), (0, 0))
    changed = x.clone()
    changed[:, :, 2:] += 1
    torch.testing.assert_close(above(changed)[:, :, :3], above(x)[:, :, :3])
    assert not torch.allclose(above(changed)[:, :, 3], above(x)[:, :, 3])


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (1, 5), (5, 1)])
def test_skewing_moves_rows_and_back(shape: tuple[int, int]) -> None:
    height, width = shape
    x = torch.arange(1.0, 1 + height * width).view(1, 1, height, width)
    skewed = skew(x)
    assert skewed.shape == (1, 1, height, width + height - 1)
    for row in range(height):
        assert torch.equal(skewed[0, 0, row, row : row + width], x[0, 0, row])
    assert skewed.sum() == x.sum()
    assert torch.equal(unskew(skewed), x)


def test_the_row_lstm_is_its_recurrence() -> None:
    torch.manual_seed(0)
    layer = RowLSTM(4, 3, groups=1)
    x = torch.randn(2, 4, 3, 5)
    gates = layer.input(x)
    h = torch.zeros(2, 5 + 2, 3)
    c = torch.zeros(2, 5, 3)
    for row in range(3):
        new = []
        for col in range(5):
            g = gates[:, :, row, col] + h[:, col : col + 3].flatten(1) @ layer.state
            state, c[:, col] = lstm_cell(g, c[:, col])
            new.append(state)
        h = F.pad(torch.stack(new, 1), (0, 0, 1, 1))
        torch.testing.assert_close(layer(x)[:, :, row].transpose(1, 2), h[:, 1:-1])


def test_the_diagonal_lstm_is_its_recurrence() -> None:
    """Pixel by pixel: from the left and from above; the mirrored one a row later.

    Outside of the image the states are those of a walk over zeros; with an odd state at the first
    pixel the recurrence is checked inside.
    """
    torch.manual_seed(0)
    layer = DiagonalBiLSTM(4, 3, groups=1)
    with torch.no_grad():
        for conv in layer.inputs:
            conv.bias.zero_()  # then states outside of the image are zero
    x = torch.randn(2, 4, 3, 5)

    def walk(x: Tensor, k: int) -> Tensor:
        gates = layer.inputs[k](x)
        h, c = torch.zeros(2, 3, 3 + 1, 5 + 1), torch.zeros(2, 3, 3 + 1, 5 + 1)
        for row in range(3):
            for col in range(5):
                near = torch.cat([h[:, :, row + 1, col], h[:, :, row, col + 1]], 1)
                g = gates[:, :, row, col] + near @ layer.state[k]
                new = lstm_cell(g, c[:, :, row + 1, col])
                h[:, :, row + 1, col + 1], c[:, :, row + 1, col + 1] = new
        return h[:, :, 1:, 1:]

    right = F.pad(walk(x.flip(3), 1).flip(3)[:, :, :-1], (0, 0, 1, 0))
    torch.testing.assert_close(layer(x), walk(x, 0) + right)


def test_wrong_input_is_one_sentence() -> None:
    model = PixelCNN((1, 4, 4), 3, 4, 1, context_dim=2)
    one = torch.zeros(2, 1, 4, 4)
    with pytest.raises(
        ShapeError, match=r"^PixelCNN expects shape \(batch, 1, 4, 4\), got \(2, 1, 4, 5\)\.$"
    ):
        model.log_prob(torch.zeros(2, 1, 4, 5), torch.zeros(2, 2))
    with pytest.raises(ShapeError, match=r"^PixelCNN expects a context of shape \(2, 2\), got non"):
        model.log_prob(one)
    with pytest.raises(ShapeError, match=r"expects a context of shape \(2, 2\), got \(2, 3\)\.$"):
        model.log_prob(one, torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"^PixelCNN\.sample expects images `given` together with"):
        model.sample(2, torch.zeros(2, 2), given=one)
    with pytest.raises(ValueError, match="PixelCNN"):
        fit(model, (one + 3, torch.zeros(2, 2)), steps=1, progress=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PixelCNN((4, 4)), r"^PixelCNN expects a shape \(channels, height, width\), got"),
        (lambda: PixelCNN((3, 4, 4), order=(0, 0, 1)), "expects an order that names each channel"),
        (lambda: PixelCNN((1, 4, 4), head=Softmax(4, 3)), "expects a head of 1 channels, got Soft"),
        (lambda: PixelCNN((1, 4, 4), kernel=4), "^masked_conv expects an odd kernel, got 4"),
        (lambda: GatedPixelCNN((1, 4, 4), kernel=2), "^GatedPixelCNN expects odd kernels"),
        (lambda: PixelRNN((1, 4, 4), kind="column"), "^PixelRNN expects kind 'row' or 'diagonal'"),
        (lambda: PixelCNNPP((1, 6, 6), sizes=3), "expects sides that are multiples of 4, got 6 x"),
        (lambda: PixelCNNPP((3, 4, 4), head=Softmax(4, 3)), "^PixelCNNPP predicts whole pixels"),
    ],
)
def test_wrong_sizes_are_one_sentence(make: Callable[[], PixelModel], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
