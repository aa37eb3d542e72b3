"""Figures show what they say: positions, colours and numbers are read back from the axes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from nflib import plot
from nflib.core import Compose, Flow, Inverse, StandardNormal
from nflib.linear import Dense, Triangular

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _no_figures_left():
    plot.style()
    yield
    plt.close("all")


@pytest.fixture
def flow() -> Flow:
    torch.manual_seed(0)
    bijection = Compose(Dense(2), Triangular(2), Inverse(Compose(Dense(2), Triangular(2))))
    for parameter in bijection.parameters():
        nn.init.normal_(parameter, std=0.5)
    return Flow(bijection, StandardNormal(2))


def gaussian(x):
    """Mean (1, -2), standard deviations 0.5 and 1."""
    z = (x - torch.tensor([1.0, -2.0])) / torch.tensor([0.5, 1.0])
    return -0.5 * z.square().sum(1) - math.log(2 * math.pi) - math.log(0.5)


def test_style_is_white_small_and_colour_blind_safe():
    assert plt.rcParams["figure.facecolor"] == "white"
    assert plt.rcParams["figure.dpi"] == 100
    assert plt.rcParams["figure.constrained_layout.use"]
    cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    assert cycle[:4] == [plot.DATA, plot.NOISE, plot.MODEL, plot.ACCENT]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_samples_draws_every_point(dtype):
    x = torch.tensor([[0.0, 1.0], [2.0, -3.0]], dtype=dtype, requires_grad=True)
    ax = plot.samples(x, label="two")
    np.testing.assert_allclose(ax.collections[0].get_offsets(), [[0, 1], [2, -3]])
    assert ax.get_aspect() == 1
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["two"]


def test_samples_uses_the_axes_it_is_given():
    ax = plot.panels(1)[0]
    assert plot.samples(torch.zeros(3, 2), ax, limits=(-1, 1)) is ax
    assert ax.get_xlim() == ax.get_ylim() == (-1, 1)


def test_density_puts_the_mode_where_it_is_and_has_mass_one():
    ax = plot.density(gaussian, limits=((-2, 4), (-6, 3)), points=121)
    image = ax.images[0].get_array()
    row, column = np.unravel_index(image.argmax(), image.shape)
    assert math.isclose(-2 + column * 6 / 120, 1.0, abs_tol=1e-6)
    assert math.isclose(-6 + row * 9 / 120, -2.0, abs_tol=0.04)
    assert ax.images[0].origin == "lower"
    assert ax.images[0].get_extent() == [-2, 4, -6, 3]
    assert math.isclose(image.sum() * (6 / 120) * (9 / 120), 1, abs_tol=1e-3)


def test_density_evaluates_models_without_changing_them(flow):
    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Dropout().eval()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def log_prob(self, x):
            self.seen = (x.dtype, self.training, torch.is_grad_enabled(), len(x))
            return -self.scale * x.square().sum(1)

    model = Spy().train()
    model.frozen.eval()
    plot.density(model, points=10)
    assert model.seen == (torch.float64, False, False, 100)
    assert model.training
    assert not model.frozen.training
    plot.density(flow, points=10)


def test_density_marks_what_is_not_a_number():
    ax = plot.density(lambda x: torch.where(x[:, 0] > 0, torch.nan, 0.0), points=10)
    assert ax.images[0].get_array().mask.sum() == 50


def test_grid_moves_lines_as_the_map_does():
    turn = torch.tensor([[0.0, -1.0], [2.0, 0.0]])
    ax = plot.grid(lambda x: x @ turn.T, limits=(-1, 1), lines=3)
    segments = np.array(ax.collections[0].get_segments())
    assert len(segments) == 2 * 3 * 20
    ends = segments.reshape(-1, 2)
    np.testing.assert_allclose(ends.min(axis=0), [-1, -2])
    np.testing.assert_allclose(ends.max(axis=0), [1, 2])
    # The first upright line, x = -1, becomes the lower horizontal one, y = -2.
    np.testing.assert_allclose(segments[:20, :, 1], -2)


def test_grid_takes_a_bijection_and_keeps_colours_of_the_start(flow):
    layer = Dense(2)
    by_bijection = plot.grid(layer).collections[0]
    by_function = plot.grid(lambda x: layer(x)[0]).collections[0]
    np.testing.assert_allclose(by_bijection.get_segments(), by_function.get_segments())
    np.testing.assert_allclose(by_bijection.get_colors(), by_function.get_colors())
    corners = plot.place_colours(np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    wanted = [plot.DATA, plot.MODEL, plot.ACCENT, plot.NOISE]
    np.testing.assert_allclose(corners, [matplotlib.colors.to_rgb(c) for c in wanted])


def test_path_visits_every_layer_both_ways(flow):
    x = torch.randn(5, 2)
    there = plot.path(flow, x)
    assert len(there) == 5
    torch.testing.assert_close(there[0], x)
    torch.testing.assert_close(there[-1], flow.encode(x).detach())
    torch.testing.assert_close(there[2], flow.bijection[:2](x)[0].detach())
    back = plot.path(flow, there[-1], "inverse")
    for here, again in zip(there, reversed(back), strict=True):
        torch.testing.assert_close(here, again, atol=1e-4, rtol=1e-4)


def test_path_draws_its_own_points(flow):
    torch.manual_seed(1)
    z = plot.path(flow, 4000, "inverse")[0]
    assert z.shape == (4000, 2)
    assert abs(float(z.std()) - 1) < 0.05
    assert plot.path(flow, 7)[-1].shape == (7, 2)


def test_layers_shows_first_and_last_and_shares_limits(flow):
    axes = plot.layers(flow, 50, count=3)
    assert [ax.get_title() for ax in axes] == ["data x", "after layer 2", "noise z"]
    assert len({ax.get_xlim() for ax in axes}) == 1
    colours = [ax.collections[0].get_facecolors() for ax in axes]
    np.testing.assert_allclose(colours[0], colours[-1])
    assert len(np.unique(colours[0], axis=0)) > 40
    titles = [ax.get_title() for ax in plot.layers(flow, 50, "inverse")]
    assert titles[0] == "noise z"
    assert titles[-1] == "data x"


def test_view_holds_most_points():
    x = torch.randn(2000, 2) * torch.tensor([1.0, 3.0]) + torch.tensor([10.0, 0.0])
    (left, right), (low, high) = plot.view([x])
    assert math.isclose(right - left, high - low)
    inside = (x[:, 0] > left) & (x[:, 0] < right) & (x[:, 1] > low) & (x[:, 1] < high)
    assert 0.97 < float(inside.float().mean()) < 1


def test_gallery_names_its_panels():
    axes = plot.gallery({"a": torch.zeros(2, 2), "b": SimpleNamespace(x=torch.ones(2, 2))})
    assert [ax.get_title() for ax in axes] == ["a", "b"]
    np.testing.assert_allclose(axes[1].collections[0].get_offsets(), 1)


def test_panels_removes_what_is_not_used():
    axes = plot.panels(4)
    assert len(axes) == len(axes[0].figure.axes) == 4


def test_history_marks_the_best_step():
    records = [
        {"step": 0, "train": 5.0, "valid": 5.5, "seconds": 0.0, "lr": 1e-3},
        {"step": 10, "train": 3.0, "valid": None, "seconds": 1.0, "lr": 1e-3},
        {"step": 20, "train": 2.0, "valid": 3.25, "seconds": 2.0, "lr": 1e-3},
        {"step": 30, "train": 1.0, "valid": 4.0, "seconds": 3.0, "lr": 1e-3},
    ]
    ax = plot.history(SimpleNamespace(records=records), units="bits/dim")
    train, valid, best = ax.lines
    np.testing.assert_allclose(train.get_xydata(), [[0, 5], [10, 3], [20, 2], [30, 1]])
    np.testing.assert_allclose(valid.get_xydata(), [[0, 5.5], [20, 3.25], [30, 4]])
    np.testing.assert_allclose(best.get_xydata(), [[20, 3.25]])
    assert "bits/dim" in ax.get_ylabel()
    assert best.get_label() == "best: 3.250 at step 20"
    only_train = plot.history([{"step": 0, "train": 1.0}])
    assert len(only_train.lines) == 1


def test_images_lie_row_by_row_at_their_grey_level():
    x = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    x[1] = 16
    x[2] = 8
    sheet = plot.images(x, columns=2, levels=17).images[0].get_array()
    assert sheet.shape == (5, 5)
    np.testing.assert_allclose(sheet[:2, :2], 0)
    np.testing.assert_allclose(sheet[:2, 3:], 1)
    np.testing.assert_allclose(sheet[3:, :2], 0.5)
    np.testing.assert_allclose(sheet[2], 1)
    data_set = SimpleNamespace(x=x, levels=17)
    np.testing.assert_allclose(plot.images(data_set, columns=2).images[0].get_array(), sheet)
    default = plot.images(x, columns=2).images[0].get_array()
    assert math.isclose(default[0, 3], 16 / 255)


def test_images_shows_colour_and_clips_floats():
    x = torch.stack([torch.full((4, 4), value) for value in (-1.0, 0.25, 2.0)])[None]
    sheet = plot.images(x).images[0].get_array()
    assert sheet.shape == (4, 4, 3)
    np.testing.assert_allclose(sheet[0, 0], [0, 0.25, 1])


def test_matrix_is_white_at_zero():
    ax = plot.matrix(torch.tensor([[0.0, -4.0], [1.0, 0.0]]))
    picture = ax.images[0]
    assert picture.get_clim() == (-4, 4)
    np.testing.assert_allclose(picture.to_rgba(0.0), [1, 1, 1, 1], atol=0.01)
    assert [text.get_text() for text in ax.texts] == ["0", "-4", "1", "0"]
    assert not plot.matrix(torch.zeros(9, 9)).texts


def test_fitted_slope_finds_the_exponent_behind_a_constant():
    sizes = [2.0**k for k in range(3, 13)]
    assert math.isclose(plot.fitted_slope(sizes, [3e-9 * n**3 for n in sizes]), 3, rel_tol=1e-9)
    with_constant = [1e-3 + 1e-9 * n**2 for n in sizes]
    assert plot.fitted_slope(sizes, with_constant) > plot.fitted_slope(sizes, with_constant, 1.0)
    shuffled = [sizes[i] for i in (5, 2, 9, 0, 7, 1, 8, 3, 6, 4)]
    assert math.isclose(
        plot.fitted_slope(shuffled, [1e-3 + 1e-9 * n**2 for n in shuffled]),
        plot.fitted_slope(sizes, with_constant),
    )


def test_loglog_draws_theory_through_the_last_point():
    sizes = [8, 16, 32, 64]
    ax = plot.loglog(sizes, {"dense": [n**2.5 for n in sizes]}, theory={"dense": 3})
    dashed, measured = ax.lines
    assert measured.get_label() == "dense: slope 2.50 (theory 3)"
    (x0, y0), (x1, y1) = dashed.get_xydata()[[0, -1]]
    assert math.isclose(math.log(y1 / y0) / math.log(x1 / x0), 3)
    np.testing.assert_allclose(dashed.get_xydata()[-1], measured.get_xydata()[-1])
    assert ax.get_xscale() == ax.get_yscale() == "log"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: plot.samples(torch.zeros(4, 3)), r"\(N, 2\), got \(4, 3\)"),
        (lambda: plot.samples(torch.zeros(4, 2), limits=(1, 0)), "low < high"),
        (lambda: plot.density(lambda x: x), r"\(40000,\), got \(40000, 2\)"),
        (lambda: plot.density(gaussian, limits=(1, 2, 3)), "limits expects"),
        (lambda: plot.grid(lambda x: x[:, :1]), r"\(N, 2\)"),
        (lambda: plot.grid(lambda x: x, lines=1), "at least 2 lines"),
        (lambda: plot.path(lambda x: x, torch.zeros(1, 2)), "Flow or a layer"),
        (lambda: plot.path(Dense(2), 10), "to draw 10 points from"),
        (lambda: plot.path(Dense(2), torch.zeros(1, 2), "back"), "direction"),
        (lambda: plot.layers(Dense(3), torch.zeros(1, 3)), r"\(N, 2\), got \(1, 3\)"),
        (lambda: plot.history([]), "at least one record"),
        (lambda: plot.images(torch.zeros(8, 8)), r"\(N, C, H, W\)"),
        (lambda: plot.images(torch.zeros(1, 2, 8, 8)), "C = 1 or 3"),
        (lambda: plot.matrix(torch.zeros(3)), "rows, columns"),
        (lambda: plot.fitted_slope([1, 2], [1]), "as many times as sizes"),
        (lambda: plot.fitted_slope([1, 2], [1, 0]), "above 0"),
        (lambda: plot.loglog([1, 2], {"a": [1, 2]}, theory={"b": 1}), r"got \['b'\]"),
        (lambda: plot.panels(0), "count and columns"),
    ],
)
def test_errors_say_in_one_sentence_what_was_expected(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call()
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
