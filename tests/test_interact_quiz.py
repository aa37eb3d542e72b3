"""The figure that asks: its HTML gives nothing away, and a browser answers clicks and keys."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from house import tool
from PIL import Image

from nflib import interact


def four(height: int = 40, width: int = 60) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (3, height, width), dtype=np.uint8) for _ in range(4)]


def ask(right: int = 2, **options) -> interact.Quiz:
    return interact.quiz(
        "Which <is> real?", four(), right, answer="It was C & no other.", **options
    )


def test_the_figure_needs_nothing_from_outside_and_describes_itself():
    html = ask()._repr_mimebundle_()["text/html"]
    bare = re.sub(r"base64,[^\"]*", "", html)
    assert "<script" not in bare
    assert "http" not in bare
    assert not re.search(r"\sid=", bare)
    assert "Which &lt;is&gt; real?" in bare
    assert 'aria-live="polite"' in bare
    assert bare.count("<button") == 4
    assert repr(ask()) == "Question with 4 pictures to choose from: Which <is> real?"


def test_no_description_tells_which_is_right():
    buttons = [re.findall(r"<button.*?</button>", ask(k).html) for k in range(4)]
    assert buttons[0] == buttons[1] == buttons[2] == buttons[3]
    assert re.findall(r'alt="([^"]*)"', ask().html) == [f"Picture {c}" for c in "ABCD"]
    assert re.findall(r">(Picture .)<", ask().html) == [f"Picture {c}" for c in "ABCD"]
    assert str(ask(0)) == str(ask(3))


def test_pictures_are_stored_alike_and_small():
    shown = interact.quiz("Which?", four(400, 600), 0, width=300)
    for file in shown.files:
        with Image.open(io.BytesIO(file)) as image:
            assert image.format == "JPEG"
            assert image.size == (300, 200)
    flat = [torch.full((3, 30, 30), level, dtype=torch.uint8) for level in (10, 200)]
    light = interact.quiz("Which?", flat, 1, quality=95)
    with Image.open(io.BytesIO(light.files[1])) as image:
        assert abs(np.asarray(image).astype(int) - 200).max() <= 2
    assert len(interact.quiz("?", four(), 0, quality=10).files[0]) < len(light.html)


@pytest.mark.parametrize(
    ("pictures", "right"),
    [
        (four()[:1], 0),
        ([p.transpose(1, 2, 0) for p in four()], 0),
        ([p / 255 for p in four()], 0),
        (3, 0),
        (four(), 4),
        (four(), -1),
    ],
)
def test_what_is_no_question_is_one_sentence(pictures, right):
    with pytest.raises(ValueError, match=r"^quiz expects (pictures|right) to be .*, got .*\.$"):
        interact.quiz("Which?", pictures, right)


def test_a_browser_answers_clicks_touch_and_keys(tmp_path: Path):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = tool("chromium").find()
    if chromium is None:
        pytest.skip("no Chromium is here")
    ask().save(tmp_path / "quiz.html")
    flags = ["--no-sandbox", "--disable-gpu"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=flags)
        context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
        page = context.new_page()
        page.goto(f"file://{tmp_path / 'quiz.html'}")
        output, buttons = page.locator("output"), page.locator("button")
        assert output.inner_text() == "Choose a picture."
        buttons.nth(0).click()
        assert output.inner_text() == "Picture A: no, try another one."
        assert buttons.nth(0).get_attribute("aria-pressed") == "true"
        buttons.nth(2).tap()
        assert output.inner_text() == "Picture C: yes. It was C & no other."
        pressed = [button.get_attribute("aria-pressed") for button in buttons.all()]
        assert pressed == ["false", "false", "true", "false"]
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert output.inner_text() == "Picture D: no, try another one."
        buttons.nth(2).focus()
        page.keyboard.press("Space")
        assert "yes" in output.inner_text()
        # Legible on a phone: two in a row, nothing beside the page.
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert buttons.nth(0).bounding_box()["width"] > 150
        browser.close()
