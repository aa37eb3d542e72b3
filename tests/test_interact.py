"""Figures with a slider: their HTML, their size, the keyboard, and what a stored notebook keeps."""

from __future__ import annotations

import io
import math
import re
import shutil

import matplotlib
import nbformat
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from nbclient import NotebookClient
from PIL import Image

from nflib import interact, plot
from nflib.core import Compose, Flow, StandardNormal
from nflib.interact import figures
from nflib.interact.render import encode, picture
from nflib.linear import Dense

matplotlib.use("Agg")
plot.style()


def draw(t, ax):
    ax.plot([0, 1], [0, t], color=plot.DATA)
    ax.set_ylim(-1, 1)


@pytest.fixture
def captured(monkeypatch):
    """The arguments with which a ready-made figure calls `frames`."""
    calls = []

    def spy(draw, values, **options):
        calls.append((draw, values, options))
        return interact.frames(draw, values, **options)

    monkeypatch.setattr(figures, "frames", spy)
    return calls


def test_frames_show_one_picture_and_describe_all():
    shown = interact.frames(
        draw, [0.0, 0.5, 1.0], label="a<b", alt=lambda t: f'A "line" to {t}', start=-1
    )
    html = shown._repr_mimebundle_()["text/html"]
    images = re.findall(r"<img [^>]*>", html)
    assert [" hidden " in image for image in images] == [True, True, False]
    assert ["display:none" in image for image in images] == [True, True, False]
    assert 'alt="A &quot;line&quot; to 0.5"' in images[1]
    assert 'max="2"' in html
    assert 'value="2"' in html
    assert 'aria-label="a&lt;b"' in html
    assert 'aria-valuetext="1.00"' in html
    assert "a<b" not in html
    for file, image in zip(shown.files, images, strict=True):
        assert Image.open(io.BytesIO(file)).format == "PNG"
        assert "data:image/png;base64," in image
    assert len(set(shown.files)) == 3


def test_frames_need_nothing_from_outside():
    html = interact.frames(draw, [0.0, 1.0], alt="A line").html
    without_data = re.sub(r"base64,[^\"]*", "", html)
    assert "<script" not in without_data
    assert "http" not in without_data
    assert not re.search(r"\sid=", without_data)


def test_text_plain_describes_the_figure():
    shown = interact.frames(draw, [0.0, 0.5, 1.0], label="t", alt="A line.", format="{:.1f}")
    assert repr(shown) == shown._repr_mimebundle_()["text/plain"]
    assert repr(shown) == (
        "Figure with a slider: t from 0.0 to 1.0 in 3 pictures. At t = 0.0: A line, t = 0.0."
    )


def test_frames_are_small():
    def gaussian(s, ax):
        plot.density(lambda x: -0.5 * (x / s).square().sum(1) - 2 * math.log(s), ax, vmax=1)

    shown = interact.frames(gaussian, np.linspace(0.5, 2, 20), alt="A Gaussian")
    assert len(shown.html) < 250_000
    assert shown.width <= 480


def test_palette_is_shared_and_keeps_white():
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    pictures = [np.stack([ramp, ramp, ramp[::-1]], axis=-1), np.full((64, 64, 3), 255, np.uint8)]
    # Nearly white pixels must not drag the paper along.
    pictures[0][:, :32] = 253
    first, second = (Image.open(io.BytesIO(file)) for file in encode(pictures, 64))
    assert first.getpalette() == second.getpalette()
    assert np.asarray(second.convert("RGB")).min() == 255
    assert len(first.getcolors()) <= 64
    error = np.abs(np.asarray(first.convert("RGB")).astype(int) - pictures[0]).mean()
    assert error < 8


def test_axes_stay_still_when_tick_labels_grow():
    def ticks(text, ax):
        ax.set_yticks([0.5], [text])

    _, first = picture(lambda ax: ticks("1", ax), 1, (3, 3), 50)
    _, free = picture(lambda ax: ticks("1000000", ax), 1, (3, 3), 50)
    _, held = picture(lambda ax: ticks("1000000", ax), 1, (3, 3), 50, first)
    assert free[0].x0 > first[0].x0 + 0.05
    np.testing.assert_allclose(held[0].bounds, first[0].bounds)


def test_panels_hand_over_axes_or_the_figure():
    seen = []
    interact.frames(lambda t, axes: seen.append(axes), [0], alt="two", panels=2)
    interact.frames(lambda t, figure: seen.append(figure), [0], alt="free", panels=0)
    assert seen[0].shape == (2,)
    assert isinstance(seen[1], Figure)


@pytest.mark.parametrize("values", [np.linspace(0, 1, 2), torch.linspace(0, 1, 2), [0.0, 1.0]])
def test_values_arrive_as_python_numbers(values):
    seen = []
    shown = interact.frames(lambda t, ax: seen.append(type(t)), values, alt="x")
    assert seen == [float, float]
    assert shown.names == ["0.00", "1.00"]


def test_warped_grid_prints_the_area_of_the_filled_cell(captured):
    def shear_and_stretch(t):
        matrix = torch.tensor([[1 + t, 0.7], [0.0, 2.0]], dtype=torch.float32)
        return lambda x: x @ matrix.T

    interact.warped_grid(shear_and_stretch, [0.0, 1.0])
    draw, _, options = captured[0]
    for t, wanted in ((0.0, "2.00"), (1.0, "4.00")):
        ax = Figure(figsize=options["size"]).subplots()
        draw(t, ax)
        assert ax.get_title() == f"filled cell: area × {wanted}"


def test_warped_grid_leads_from_the_identity_to_a_bijection(captured):
    torch.manual_seed(0)
    layer = Dense(2)
    torch.nn.init.normal_(next(layer.parameters()))
    interact.warped_grid(layer, [0.0, 1.0])
    draw, _, _ = captured[0]
    for t, fn in ((0.0, lambda x: x), (1.0, layer)):
        ax = Figure().subplots()
        draw(t, ax)
        wanted = plot.grid(fn, Figure().subplots(), lines=11).collections[0].get_segments()
        np.testing.assert_allclose(ax.collections[0].get_segments(), wanted, atol=1e-5)


def test_layer_by_layer_has_a_picture_for_every_step(captured):
    flow = Flow(Compose(Dense(2), Dense(2), Dense(2)), StandardNormal(2))
    shown = interact.layer_by_layer(flow, 100, "inverse")
    assert shown.names == ["0", "1", "2", "3"]
    assert "from noise to data" in shown.alts[0]
    ax = Figure().subplots()
    captured[0][0](3, ax)
    assert ax.get_title() == "data x"
    assert ax.collections[0].get_offsets().shape == (100, 2)


def test_push_point_keeps_the_mass_in_the_bin(captured):
    interact.push_point(lambda x: torch.sinh(x), [0.0, 1.0], width=0.5)
    draw, _, _ = captured[0]
    normal = torch.distributions.Normal(0.0, 1.0)
    for x in (0.0, 1.0):
        figure = Figure()
        draw(x, figure)
        (text,) = (text.get_text() for ax in figure.axes for text in ax.texts)
        masses = re.findall(r"= (\d\.\d+)", text)
        exact = normal.cdf(torch.tensor(x + 0.25)) - normal.cdf(torch.tensor(x - 0.25))
        assert masses == [f"{float(exact):.3f}"] * 2
        # The z bin's width is f(x + w/2) - f(x - w/2).
        assert f"z bin  {math.sinh(x + 0.25) - math.sinh(x - 0.25):.2f} ×" in text


def test_push_point_takes_a_falling_bijection_and_a_model():
    layer = Dense(1)
    with torch.no_grad():
        next(layer.parameters()).fill_(-2.0)
    base = StandardNormal(1)
    assert len(interact.push_point(layer, [0.0], log_prob=Flow(Dense(1), base))) == 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: interact.frames(draw, [], alt="x"), "at least one value"),
        (lambda: interact.frames(draw, [1], alt="x", start=1), "start among 1 values"),
        (lambda: interact.frames(draw, [1], alt="x", panels=-1), "panels >= 0"),
        (lambda: interact.frames(draw, [1], alt="x", colours=300), "2 to 256 colours"),
        (lambda: interact.push_point(lambda x: x.square()), "strictly monotone"),
        (lambda: interact.push_point(lambda x: x.sum(1)), "to the same shape"),
        (lambda: interact.warped_grid(lambda t: lambda x: x, cell=(99, 0)), "10 columns"),
        (lambda: interact.live(draw), "at least one range"),
        (lambda: interact.live(draw, t=3), "low, high"),
    ],
)
def test_errors_say_in_one_sentence_what_was_expected(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call()
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message


def run_live_notebook(monkeypatch, static: str | None, session: str | None = None):
    for name, value in (("NFLIB_STATIC", static), ("JPY_SESSION_NAME", session)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    code = "from nflib import interact\ninteract.live(lambda t, ax: ax.plot([0, t]), t=(0.0, 1.0))"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    return notebook


@pytest.mark.parametrize(("static", "session"), [("1", "chapter.ipynb"), (None, None)])
def test_live_leaves_nothing_in_a_notebook_that_is_only_executed(monkeypatch, static, session):
    notebook = run_live_notebook(monkeypatch, static, session)
    assert notebook.cells[0].outputs == []
    assert "widgets" not in notebook.metadata


@pytest.mark.parametrize(("static", "session"), [("0", None), (None, "chapter.ipynb")])
def test_live_shows_sliders_where_a_reader_is(monkeypatch, static, session):
    notebook = run_live_notebook(monkeypatch, static, session)
    (output,) = notebook.cells[0].outputs
    assert "application/vnd.jupyter.widget-view+json" in output.data
    states = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    assert "FloatSliderModel" in {state["model_name"] for state in states.values()}


def test_moving_a_live_slider_draws_again(monkeypatch):
    ipywidgets = pytest.importorskip("ipywidgets")
    shown = []
    monkeypatch.setenv("NFLIB_STATIC", "0")
    monkeypatch.setattr("IPython.display.display", shown.append)
    seen = []
    interact.live(lambda value, ax: seen.append(value), k=(1, 4), name=["a", "b"])
    whole, choice, image = shown[0].children
    assert isinstance(whole, ipywidgets.IntSlider)
    assert bytes(image.value).startswith(b"\x89PNG")
    whole.value = 3
    choice.value = "b"
    assert seen == [{"k": 1, "name": "a"}, {"k": 3, "name": "a"}, {"k": 3, "name": "b"}]


def test_slider_moves_by_keyboard_among_several_figures(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("chromium is not installed")
    one = interact.frames(draw, [0.0, 0.5, 1.0], alt="One", pause=0.01)
    two = interact.frames(draw, [1.0, 0.5, 0.0], alt="Two", start=1, pause=0.01)
    page_file = tmp_path / "page.html"
    page_file.write_text(f"<!doctype html><meta charset='utf-8'>{one.html}{two.html}", "utf-8")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 390, "height": 800})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.goto(page_file.as_uri())

        def visible():
            images = page.locator("img:visible").all()
            assert page.locator("img:not([hidden])").count() == len(images)
            return [image.get_attribute("alt") for image in images]

        assert visible() == ["One, t = 0.00.", "Two, t = 0.50."]
        page.locator("input").nth(0).focus()
        page.keyboard.press("ArrowRight")
        assert visible() == ["One, t = 0.50.", "Two, t = 0.50."]
        assert page.locator("output").nth(0).text_content() == "0.50"
        assert page.locator("input").nth(0).get_attribute("aria-valuetext") == "0.50"
        page.keyboard.press("End")
        assert visible() == ["One, t = 1.00.", "Two, t = 0.50."]
        page.locator("input").nth(1).focus()
        page.keyboard.press("ArrowLeft")
        assert visible() == ["One, t = 1.00.", "Two, t = 1.00."]
        page.locator("button").nth(1).click()
        page.locator("img:visible[alt='Two, t = 0.00.']").wait_for(timeout=5000)
        page.locator("button").nth(1).and_(page.get_by_label("Play")).wait_for(timeout=5000)
        assert visible() == ["One, t = 1.00.", "Two, t = 0.00."]
        wide = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.close()
    assert wide
    assert problems == []
