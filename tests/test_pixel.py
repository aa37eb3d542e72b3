"""Pixel models: only earlier pixels are seen, probabilities sum to one, samplers agree."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tape import Tape
from torch import Tensor
from torch.nn import functional as F

from nflib import graphs
from nflib.arguments import ArgumentError
from nflib.checks import AutoregressiveError, check_autoregressive, jacobian, randomize_parameters
from nflib.core import Shape, ShapeError
from nflib.discrete import LogisticMixture, Softmax
from nflib.graphs import WARM_UP, HostReads
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
from nflib.pixel.cursor import Cursor, DeviceCursor, Line
from nflib.pixel.rnn import DiagonalBiLSTM, RowLSTM, lstm_cell, skew, unskew
from nflib.train import fit

Make = Callable[..., PixelModel]


def mixture(kind: type[PixelModel]) -> Make:
    """The same network with a logistic mixture, which predicts whole pixels."""

    def make(shape: Shape, levels: int, *sizes: object, **options: object) -> PixelModel:
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
    "Diagonal BiLSTM, mixture": lambda s, k, **o: mixture(PixelRNN)(s, k, "diagonal", 6, 2, **o),
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
    if model.groups == 1:  # all channels of a pixel come together, so they are moved together
        weights = torch.rand(channels, 1, 1, dtype=torch.float64) + 0.5

        def by_pixel(flat: Tensor) -> Tensor:
            x = flat.view(-1, 1, height, width) * weights
            return model.parameters_of(x, context).flatten(2).transpose(1, 2)

        check_autoregressive(by_pixel, images(model)[:, 0].flatten(1))
        return
    position = model.order.argsort()
    rank = torch.arange(height * width)[None] * channels + position[:, None]

    def by_channel(flat: Tensor) -> Tensor:
        found = model.parameters_of(flat.view(-1, *model.shape), context)
        found = found.unflatten(1, (channels, -1)).index_select(1, position)
        return found.movedim(2, -1).flatten(1, 3)

    check_autoregressive(by_channel, images(model).flatten(1), rank.flatten().tolist())


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


def as_on_a_cpu(draw: Callable[[], Tensor]) -> Tensor:
    """Samples of a device that has no graphs, whatever the fixture says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "recorder_for", lambda device: None)
        return draw()


def watched(model: PixelModel) -> HostReads:
    """What a walk of this model reads back from the device."""
    reads, walk = HostReads(), model._walk_cached

    def watch(*inputs: object) -> None:
        with reads:
            walk(*inputs)

    model._walk_cached = watch
    return reads


def kinds_of(model: PixelModel) -> int:
    """How many kinds of pixels a model has: one for each size of its images."""
    return model.horizontal.sizes if isinstance(model, PixelCNNPP) else 1


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("shape", [(1, 4, 6), (3, 4, 4)])
@pytest.mark.parametrize("context_dim", [None, 2])
@pytest.mark.parametrize("completed", [False, True])
def test_a_recorded_pixel_draws_the_same(
    name: str, shape: Shape, context_dim: int | None, completed: bool, recorded: list[object]
) -> None:
    model = build(name, shape, 5, context_dim=context_dim)
    context = contexts(model, 3)
    options: dict[str, Tensor] = {}
    if completed:
        options = {"given": images(model, 1), "known": torch.rand(shape[1:]) < 0.5}
    u = torch.rand(3, model.head.uniforms, *shape[1:], dtype=torch.float64)
    plain = as_on_a_cpu(lambda: model.sample(3, context, u=u, **options))
    calls, network, reads = [], model.pixels, watched(model)
    model.pixels = lambda *inputs: calls.append(inputs) or network(*inputs)
    assert torch.equal(model.sample(3, context, u=u, **options), plain)
    assert reads.found == []
    assert len(recorded) == kinds_of(model)
    assert len(calls) == kinds_of(model) * model.groups * (WARM_UP + 1)


def test_each_size_has_a_recording(recorded: list[object]) -> None:
    model = PixelCNNPP((1, 8, 12), 4, 4, 1, 3, components=2).double()
    randomize_parameters(model)
    u = torch.rand(2, 2, 8, 12, dtype=torch.float64)
    drawn = model.sample(2, u=u, temperature=0.7)
    assert len(recorded) == 3
    assert torch.equal(as_on_a_cpu(lambda: model.sample(2, u=u, temperature=0.7)), drawn)


def test_a_walk_that_is_not_recorded_reads_nothing_back_either() -> None:
    for name in CACHED:
        model = build(name, (3, 2, 4))
        reads = watched(model)
        model.sample(1, given=images(model, 1), known=torch.arange(8).view(2, 4) % 3 == 0)
        assert reads.found == []


@pytest.mark.parametrize("name", ["Row LSTM", "Diagonal BiLSTM"])
def test_what_walks_over_rows_is_not_recorded(name: str, recorded: list[object]) -> None:
    model = build(name, (1, 4, 6))
    u = torch.rand(2, 1, 4, 6, dtype=torch.float64)
    assert torch.equal(model.sample(2, u=u), as_on_a_cpu(lambda: model.sample(2, u=u)))
    assert recorded == []


@pytest.mark.parametrize("rows", [0, 1])
def test_a_recorded_walk_takes_small_batches_and_any_memory(
    rows: int, recorded: list[object]
) -> None:
    model = build("Gated PixelCNN", (3, 4, 6))
    given = images(model, rows).to(memory_format=torch.channels_last)
    options = {"given": given, "known": torch.arange(24).view(4, 6) % 2 == 0}
    u = torch.rand(4, 6, 3, rows, dtype=torch.float64).permute(3, 2, 0, 1)
    plain = as_on_a_cpu(lambda: model.sample(rows, u=u, **options))
    assert torch.equal(model.sample(rows, u=u, **options), plain)
    assert len(recorded) == 1


def test_a_recorded_walk_goes_along_with_autocast(recorded: list[object]) -> None:
    model = build("PixelCNN++", (1, 4, 6)).float()
    u = torch.rand(2, model.head.uniforms, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        plain = as_on_a_cpu(lambda: model.sample(2, u=u))
        assert torch.equal(model.sample(2, u=u), plain)
    assert len(recorded) == 2


def test_a_recording_that_fails_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops in the middle of a pixel, as on a GPU with nothing computed."""
    model = build("PixelCNN", (1, 4, 6), 5)
    u = torch.rand(2, 1, 4, 6, dtype=torch.float64)
    plain = as_on_a_cpu(lambda: model.sample(2, u=u))
    tries, write = [], model.first.write

    def fail(function: Callable[[], object]) -> None:
        def stop(x: Tensor) -> None:
            raise RuntimeError("no")

        with Tape(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.first, "write", stop)
            tries.append(function)
            function()

    monkeypatch.setattr(graphs, "recorder_for", lambda device: fail)
    assert torch.equal(model.sample(2, u=u), plain)
    assert len(tries) == 1
    assert model.first.write == write


@pytest.mark.parametrize("scale", [0, 1])
def test_both_cursors_cut_and_write_the_same(scale: int) -> None:
    """Padding, windows, and a buffer of two rows that holds the last ones."""
    x = torch.zeros(2, 1, 4, 6)
    cursors = [Cursor(x, None), DeviceCursor(x, None)]
    buffer = torch.randn(2, 3, 6, 10)
    last = torch.randn(2, 3, 2, 8)
    for row in range(4):
        for col in range(6):
            found = []
            value = torch.randn(2, 3, 1, 2)
            for cursor in cursors:
                cursor.move(row, col)
                cursor.arrive()
                mine, two = buffer.clone(), last.clone()
                cursor.put(mine, value, scale, 2, 3)
                cursor.put(two, value, scale)
                window = cursor.cut(mine, scale, (3, 4))
                found.append([window, cursor.cut(two, scale), mine, two])
                if row:  # a kind of window that the first pixels did not have
                    found[-1].append(cursor.cut(mine, scale, (1, 3)))
                cursor.leave()
            for a, b in zip(*found, strict=True):
                assert torch.equal(a, b)
            down, over = row >> scale, col >> scale
            window, one, mine, two, *_ = found[0]
            assert torch.equal(mine[:, :, down + 2, over + 3 : over + 5], value[:, :, 0])
            assert torch.equal(window, mine[:, :, down : down + 3, over : over + 4])
            assert torch.equal(one, value[..., :1])
            assert torch.equal(two[:, :, down % 2, over], value[:, :, 0, 0])


def test_features_of_a_row_stay_where_they_are() -> None:
    cursor, line = Cursor(torch.zeros(1, 1, 4, 4), None), Line()
    for row in range(4):
        whole, half = torch.randn(2, 1, 3, 1, 4), torch.randn(1, 2, 1, 2)
        cursor.move(row)
        line.keep(cursor, [whole[0], None if row % 2 else half, whole[1], None])
        where = {scale: joined.data_ptr() for scale, (_, _, joined) in line.held.items()}
        if row == 0:
            first = where
        assert where == first
        for col in range(4):
            cursor.move(row, col)
            a, low, b, nothing = line.at(cursor)
            assert torch.equal(a, whole[0][..., col : col + 1])
            assert torch.equal(b, whole[1][..., col : col + 1])
            assert nothing is None
            assert (low is None) == bool(row % 2 or col % 2)
            if low is not None:
                assert torch.equal(low, half[..., col // 2 : col // 2 + 1])


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


@every
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32])
def test_integers_of_any_dtype_give_the_same(name: str, dtype: torch.dtype) -> None:
    model = build(name, (1, 4, 4), 256)
    x = images(model)
    assert torch.equal(model.log_prob(x.to(dtype)), model.log_prob(x))


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
    one, c = torch.zeros(2, 1, 4, 4), torch.zeros(2, 2)
    for wrong, message in (
        (torch.zeros(2, 1, 4, 5), r"shape \(batch, 1, 4, 4\), got \(2, 1, 4, 5\)"),
        (torch.zeros(()), r"shape \(batch, 1, 4, 4\), got \(\)"),
        (one.numpy(), "a tensor, got .*; torch.as_tensor makes one"),
        (one.bool(), "whole numbers, of any dtype for numbers, got torch.bool"),
        (one.to("meta"), "its input on its own device cpu, got meta; move .*"),
    ):
        for call in (model.log_prob, model, model.parameters_of):
            with pytest.raises(ShapeError, match=rf"^PixelCNN expects {message}\.$"):
                call(wrong, c)
    with pytest.raises(ValueError, match="PixelCNN"):
        fit(model, (one + 3, c), steps=1, progress=False)


@pytest.mark.parametrize("call", ["log_prob", "parameters_of", "sample"])
def test_a_context_is_checked_and_one_row_serves_all(call: str) -> None:
    model, free = (PixelCNN((1, 4, 4), 3, 4, 1, context_dim=k) for k in (2, None))
    u = torch.rand(2, 1, 4, 4)

    def ask(model: PixelModel, context: object) -> Tensor:
        if call == "sample":
            return model.sample(2, context, u=u)
        return getattr(model, call)(torch.zeros(2, 1, 4, 4), context)

    row = torch.randn(2)
    every = ask(model, row.expand(2, 2))
    assert torch.equal(ask(model, row), every)
    assert torch.equal(ask(model, row[None]), every)
    one_hot = F.one_hot(torch.tensor([0, 1]), 2)
    for wrong, message in (
        (None, r"a context of shape \(batch, 2\), got none"),
        (torch.zeros(2, 3), r"a context of shape \(2, 2\), or one row for all, got \(2, 3\)"),
        (one_hot, "a context of its parameters' dtype torch.float32, got torch.int64; .*"),
        (one_hot.double(), "a context of its parameters' dtype torch.float32, got .*float64; .*"),
    ):
        with pytest.raises(ShapeError, match=rf"^PixelCNN expects {message}\.$"):
            ask(model, wrong)
    with pytest.raises(ShapeError, match=r"^PixelCNN.* expects .* or one row for all, got .*3"):
        ask(model, torch.zeros(3, 2))
    with pytest.raises(ShapeError, match=r"^PixelCNN expects no context, .*, got a tensor of"):
        ask(free, torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": -1}, r"^PixelCNN\.sample expects a number of draws of at least 0, .*, got -1\.$"),
        ({"n": 2.0}, r"^PixelCNN\.sample expects a number of draws of at least 0, .*, got 2\.0\.$"),
        ({"given": torch.zeros(2, 1, 4, 4)}, r"expects images `given` together with a boolean"),
        (
            {"given": torch.zeros(3, 1, 4, 4), "known": torch.ones(4, 4)},
            r"^PixelCNN\.sample expects given of shape \(2, 1, 4, 4\), or one for all, got \(3, 1,",
        ),
        (
            {"given": torch.full((1, 4, 4), 3), "known": torch.ones(4, 4)},
            r"^What PixelCNN\.sample is given must hold whole numbers in 0\.\.2, got values from 3",
        ),
        ({"u": torch.rand(2, 1, 4, 5)}, r"expects u of shape \(2, 1, 4, 4\), or one for all, got"),
        ({"temperature": 0}, "expects temperature to be a number above 0, got 0"),
        ({"generator": 3}, "expects generator to be a Generator or None, got 3"),
        ({"cached": 1}, "expects cached to be True or False, got 1"),
    ],
)
def test_wrong_requests_are_one_sentence(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelCNN((1, 4, 4), 3, 4, 1).sample(**{"n": 2} | options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PixelCNN((4, 4)), r"^PixelCNN expects shape to be the shape \(channels, height,"),
        (lambda: PixelRNN(4), r"^PixelRNN expects shape to be .* of an image, got 4\.$"),
        (lambda: GatedPixelCNN((1, 4, 0)), r"^GatedPixelCNN expects shape .*, got \(1, 4, 0\)\.$"),
        (lambda: PixelCNNPP("144"), "^PixelCNNPP expects shape to be .*, got '144'"),
        (lambda: PixelCNN((1, 4, 4), 1), "^PixelCNN expects levels to be .* at least 2, got 1"),
        (lambda: PixelCNN((1, 4, 4), width=(8, 8)), r"^PixelCNN expects width .*, got \(8, 8\)"),
        (lambda: PixelCNN((1, 4, 4), width=1), "^PixelCNN expects a width of at least 2, for its"),
        (lambda: PixelCNN((1, 4, 4), blocks=0), "^PixelCNN expects blocks to be .*, got 0"),
        (lambda: PixelCNN((1, 4, 4), dropout=1), "^PixelCNN expects dropout to be .*, got 1"),
        (lambda: PixelCNN((1, 4, 4), context_dim=0), "^PixelCNN expects context_dim to be"),
        (lambda: PixelCNN((1, 4, 4), context_dim=(1, 4, 4)), "context_dim to be the size of"),
        (lambda: PixelCNN((1, 4, 4), head=Softmax), "^PixelCNN expects head .* the class Softmax"),
        (lambda: PixelCNN((3, 4, 4), order=(0, 0, 1)), "expects order to name each channel 0..2"),
        (lambda: PixelCNN((3, 4, 4), order=2), "expects order to name each channel 0..2 once, got"),
        (lambda: PixelCNN((1, 4, 4), head=Softmax(4, 3)), "expects a head of 1 channels, got Soft"),
        (lambda: PixelCNN((1, 4, 4), kernel=4), "^PixelCNN expects kernel to be an odd .*, got 4"),
        (lambda: masked_conv(1, 2, 4), "^masked_conv expects kernel to be an odd .*, got 4"),
        (lambda: GatedPixelCNN((1, 4, 4), kernel=2), "^GatedPixelCNN expects kernel to be an odd"),
        (lambda: PixelRNN((1, 4, 4), kind="column"), "^PixelRNN expects kind to be 'row' or 'diag"),
        (lambda: PixelCNNPP((1, 6, 6), sizes=3), "expects sides that are multiples of 4, got 6 x"),
        (lambda: PixelCNNPP((3, 4, 4), head=Softmax(4, 3)), "^PixelCNNPP predicts whole pixels"),
        (lambda: WindowConv(0, 2), "^WindowConv expects inputs to be .* at least 1, got 0"),
        (lambda: WindowConv(1, 2, (1, 0)), r"^WindowConv expects rows to be the first .* \(1, 0\)"),
        (lambda: WindowConv(1, 2, stride=3), "^WindowConv expects stride to be 1 or 2, got 3"),
        (lambda: WindowConv(1, 2, mask=torch.ones(2, 1)), "^WindowConv expects a mask of shape"),
        (lambda: RowLSTM(1, 0, 1), "^RowLSTM expects width to be .*, got 0"),
        (lambda: channel_mask(1, 1, 0, True), "^channel_mask expects groups to be .*, got 0"),
    ],
)
def test_wrong_sizes_are_one_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_sizes_from_numpy_serve() -> None:
    one, four = np.int64(1), np.int32(4)
    model = PixelCNN([one, four, four], np.int64(3), four, one, context_dim=np.int64(2))
    assert model.event_shape == (1, 4, 4)
    assert model.context_shape == (2,)
    assert model.sample(np.int64(2), torch.zeros(2)).shape == (2, 1, 4, 4)


@every
def test_draws_for_each_of_some_contexts(name: str) -> None:
    model = build(name, (1, 2, 4), 5, context_dim=2)
    c = contexts(model, 3)
    assert c is not None
    u = torch.rand(2, 3, model.head.uniforms, 2, 4, dtype=torch.float64)
    drawn = model.sample((2,), c, u=u)
    assert drawn.shape == (2, 3, 1, 2, 4)
    for k in range(2):
        for m in range(3):
            assert torch.equal(drawn[k, m], model.sample(1, c[m], u=u[k, m])[0])
    assert model.sample((2, 3), c[0]).shape == (2, 3, 1, 2, 4)
    # Of each given image so many completions.
    known = torch.ones(2, 4, dtype=torch.bool)
    known[1] = False
    done = model.sample((2,), c, given=images(model, 3), known=known)
    assert torch.equal(done[:, :, :, 0], images(model, 3)[:, :, 0].expand(2, 3, 1, 4))


@pytest.mark.parametrize("model", ["PixelCNN", "Diagonal BiLSTM", "PixelCNN++"])
def test_samples_are_ordinary_tensors_and_leave_the_model_as_it_was(model: str) -> None:
    net = build(model, (1, 4, 4), dropout=0.5)
    net.train()
    frozen = next(layer for layer in net.modules() if isinstance(layer, torch.nn.Dropout))
    frozen.eval()
    x = net.sample(2)
    assert (x.requires_grad, x.is_inference()) == (False, False)
    x.div_(2).requires_grad_().sum().backward()
    assert x.detach().numpy().shape == (2, 1, 4, 4)
    modes = [layer.training for layer in net.modules() if layer is not frozen]
    assert all(modes)
    assert not frozen.training
    # Nor are buffers of the walk left, which a pickle would carry along.
    kept = [
        vars(layer).get(name) for layer in net.modules() for name in ("_buffer", "_flat", "cursor")
    ]
    assert kept.count(None) == len(kept)


def test_a_generator_and_a_temperature() -> None:
    for name in ("PixelCNN", "PixelCNN++"):
        model = build(name, (1, 4, 4), 8)
        seeded = [model.sample(3, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
        assert torch.equal(seeded[0], seeded[1])
        assert not torch.equal(seeded[0], seeded[2])
        before = torch.get_rng_state()
        model.sample(1, generator=torch.Generator().manual_seed(1))
        assert torch.equal(torch.get_rng_state(), before)
        # Next to absolute zero every draw is the likeliest value, whatever u is.
        cold = model.sample(20, temperature=1e-3)
        assert torch.equal(cold, cold[:1].expand_as(cold))
        # The first pixel follows the head's own distribution at that temperature.
        first = model.sample(400, temperature=0.5)[:, 0, 0, 0]
        p = model.parameters_of(images(model, 8))[:, :, 0, 0]
        levels = torch.arange(8.0, dtype=torch.float64)[:, None]
        cooled = model.head.log_prob(levels, model.head.cooled(p, 0.5)).exp()
        found = torch.bincount(first.long(), minlength=8) / 400
        assert (found - cooled).abs().max() < 5 * (0.25 / 400) ** 0.5


@every
@pytest.mark.parametrize("context_dim", [None, 2])
def test_a_model_can_be_copied_pickled_and_converted(name: str, context_dim: int | None) -> None:
    model = build(name, (3, 2, 4), 5, context_dim=context_dim).float()
    x, c = images(model).long(), None if context_dim is None else torch.randn(2, 2)
    model.sample(1, c if c is None else c[0])
    expected = model.log_prob(x, c)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.log_prob(x, c), expected)
        u = torch.rand(2, model.head.uniforms, 2, 4)
        assert torch.equal(twin.sample(2, c, u=u), model.sample(2, c, u=u))
    double = copy.deepcopy(model).double()
    wide = None if c is None else c.double()
    found = double.log_prob(x, wide)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-4)
    fresh = MODELS[name]((3, 2, 4), 5, context_dim=context_dim)
    fresh.load_state_dict(double.state_dict(), assign=True)
    assert torch.equal(fresh.log_prob(x, wide), found)
    fresh.log_prob(x, wide).sum().backward()
    assert all(p.is_leaf for p in fresh.parameters())
    assert all(p.grad is not None for p in fresh.last.parameters())
    assert fresh.sample(1, wide if wide is None else wide[0]).dtype == torch.float64
