"""Every page in Chromium, as readers meet it: on a desktop, on a phone, in dark mode.

Set SCREENSHOTS to a folder to keep a picture of each page in each of the three.
"""

from __future__ import annotations

import functools
import http.server
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from house import SITE, chapters, tool
from playwright.sync_api import Browser, Page, sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
VIEWS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
}
PAGES = sorted(
    str(path.relative_to(SITE))
    for path in SITE.rglob("*.html")
    if "_static" not in path.parts and "_sources" not in path.parts
)

# Text with a formula's signs in it, outside of code: MathJax has not seen it.
RAW_MATHS = r"""() => {
  const article = document.querySelector("article.bd-article");
  if (!article) return [];
  const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  const skip = "pre, code, script, style, mjx-container, dt.sig, kbd";
  const found = [];
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent;
    if (walker.currentNode.parentElement.closest(skip)) continue;
    if (/\$[^$]+\$|\$\$|\\\(|\\\[|\\(?:frac|log|det|mathbb|left)\b/.test(text)) {
      found.push(text.trim().slice(0, 80));
    }
  }
  return found;
}"""

VISIBLE_SEARCH = """() => [...document.querySelectorAll(
    ".search-button-field, .search-button, form.bd-search")]
  .filter(e => e.checkVisibility({visibilityProperty: true}) && e.getBoundingClientRect().x >= 0)
  .length"""

OVERFLOW = """() => {
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= width) return [];
  return [...document.querySelectorAll("article *")]
    .filter(e => e.getBoundingClientRect().right > width + 1 && !e.closest("table, pre, .math"))
    .slice(-3).map(e => e.outerHTML.slice(0, 100));
}"""

# What the figure of a slider shows: the pictures which are visible, and the text beside them.
SHOWN = """slider => {
  const figure = slider.closest(".cell_output, .output") || slider.parentElement;
  const pictures = [...figure.querySelectorAll("img, svg, canvas")]
    .filter(e => e.checkVisibility({opacityProperty: true, visibilityProperty: true}))
    .map(e => e.currentSrc || e.outerHTML);
  const layers = [...figure.querySelectorAll("*")].map(e => {
    const style = getComputedStyle(e);
    return style.backgroundPosition + style.backgroundImage.length + style.transform;
  });
  return JSON.stringify([pictures, layers]);
}"""


# Plays a sound until its clock moves: the duration, how far it came, and what it is called.
PLAY = """async sound => {
  sound.muted = true;
  await sound.play();
  while (sound.currentTime === 0) await new Promise(done => setTimeout(done, 20));
  sound.pause();
  return {seconds: sound.duration, name: sound.getAttribute("aria-label")};
}"""


# What a page itself brings, without the style and scripts that all pages share, and when a reader
# first sees text, in milliseconds.
COST = """() => {
  const own = performance.getEntriesByType("resource").filter(e => !e.name.includes("/_static/"));
  const bytes = own.concat(performance.getEntriesByType("navigation"))
    .reduce((sum, e) => sum + e.encodedBodySize, 0);
  return [bytes, performance.getEntriesByName("first-contentful-paint")[0].startTime];
}"""


class Server(http.server.SimpleHTTPRequestHandler):
    """The site as GitHub Pages serves it: 404.html for what is not there."""

    def log_message(self, *arguments: object) -> None:
        pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        if code != 404:
            super().send_error(code, message, explain)
            return
        body = (SITE / "404.html").read_bytes()
        self.send_response(404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@dataclass
class Watched:
    """A browser tab, and everything in it that a reader would call broken."""

    page: Page
    base: str
    name: str
    troubles: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("request", self.on_request)
        self.page.on("requestfailed", lambda r: self.troubles.append(f"failed: {r.url}"))
        self.page.on("response", self.on_response)
        self.page.on("pageerror", lambda error: self.troubles.append(f"error: {error}"))
        self.page.on("console", self.on_console)

    def on_request(self, request: Any) -> None:
        if not request.url.startswith((self.base, "data:", "blob:")):
            self.troubles.append(f"third party: {request.url}")

    def on_response(self, response: Any) -> None:
        if response.status >= 400:
            self.troubles.append(f"{response.status}: {response.url}")

    def on_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.troubles.append(f"console {message.type}: {message.text}")

    def open(self, path: str) -> Page:
        # Leaving a page stops what it was still loading: that is no trouble of the next one.
        self.page.goto("about:blank")
        self.troubles.clear()
        self.page.goto(self.base + path, wait_until="load")
        # MathJax has set every formula once its start-up promise is kept.
        self.page.evaluate("() => window.MathJax?.startup?.promise?.then(() => true)")
        return self.page


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    if not (SITE / "index.html").exists():
        pytest.fail("The site is not built: run 'make book' first.", pytrace=False)
    handler = functools.partial(Server, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = tool("chromium").ensure()
        opened = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def tabs(browser: Browser, base: str) -> dict[str, Watched]:
    """One tab for each view; each is a profile of its own and keeps its cache from page to page."""
    opened = {}
    for name, options in VIEWS.items():
        watched = Watched(browser.new_context(**options).new_page(), base, name)
        watched.watch()
        opened[name] = watched
    return opened


def keep(page: Page, path: str, view: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = path.replace("/", "-").removesuffix(".html")
        page.screenshot(path=Path(folder) / f"{name}.{view}.png", full_page=True)


def test_the_site_is_built() -> None:
    assert len(PAGES) > 10, "The site is not built: run 'make book' first."


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_whole(path: str, tabs: dict[str, Watched]) -> None:
    for view, tab in tabs.items():
        page = tab.open(path)
        keep(page, path, view)
        assert tab.troubles == [], view
        assert page.evaluate(RAW_MATHS) == []
        assert page.locator("mjx-merror, .MathJax_Error").count() == 0
        assert page.locator("article p", has_text=re.compile(r"\|\s*:?-{3,}")).count() == 0
        assert page.locator("img:not([alt]), img[alt='']").count() == 0
        if path == "404.html":
            continue
        assert page.evaluate(OVERFLOW) == [], f"{view}: something is wider than the page"
        # The page of results has a field of its own.
        searches = 2 if path == "search.html" else 1
        assert page.evaluate(VISIBLE_SEARCH) == searches, f"{view}: a second search bar"
        theme = page.evaluate("document.documentElement.dataset.theme")
        assert theme == ("dark" if view == "dark" else "light")


@pytest.mark.parametrize("chapter", [path.stem for path in chapters()])
def test_maths_of_a_chapter_is_set(chapter: str, tabs: dict[str, Watched]) -> None:
    page = tabs["desktop"].open(f"chapters/{chapter}.html")
    formulas = page.locator("article .math").count()
    assert formulas > 0
    assert page.locator("article .math mjx-container").count() >= formulas


@pytest.mark.parametrize("chapter", [path.stem for path in chapters()])
def test_sliders_move_by_keyboard(chapter: str, tabs: dict[str, Watched]) -> None:
    for view in ("desktop", "phone"):
        tab = tabs[view]
        page = tab.open(f"chapters/{chapter}.html")
        sliders = page.locator("article input[type=range]")
        for i in range(sliders.count()):
            slider = sliders.nth(i)
            slider.scroll_into_view_if_needed()
            slider.focus()
            before, value = slider.evaluate(SHOWN), slider.input_value()
            key = "ArrowLeft" if value == slider.get_attribute("max") else "ArrowRight"
            page.keyboard.press(key)
            assert slider.input_value() != value
            page.wait_for_timeout(50)
            assert slider.evaluate(SHOWN) != before, f"slider {i} moves, its picture does not"
        assert tab.troubles == []


def test_some_chapters_have_sliders(tabs: dict[str, Watched]) -> None:
    for chapter in ("02_change_of_variables", "03_composing_flows"):
        page = tabs["desktop"].open(f"chapters/{chapter}.html")
        assert page.locator("article input[type=range]").count() >= 1


@pytest.mark.parametrize("name", [path.stem for path in chapters()])
def test_a_chapter_is_light_and_soon_readable(name: str, browser: Browser, base: str) -> None:
    painted = []
    for _ in range(10):  # a moment's other work on the machine is not the page's
        context = browser.new_context(**VIEWS["desktop"])
        page = context.new_page()
        page.goto(f"{base}chapters/{name}.html", wait_until="load")
        size, milliseconds = page.evaluate(COST)
        context.close()
        assert size < 1_500_000
        painted.append(milliseconds)
        if milliseconds < 1000:
            break
    assert min(painted) < 1000


@pytest.mark.parametrize("chapter", [path.stem for path in chapters()])
def test_sounds_can_be_played(chapter: str, tabs: dict[str, Watched]) -> None:
    tab = tabs["desktop"]
    sounds = tab.open(f"chapters/{chapter}.html").locator("article audio")
    assert sounds.count() > 0 or "wavenet" not in chapter
    for i in range(sounds.count()):
        sound = sounds.nth(i)
        assert sound.is_visible()
        played = sound.evaluate(PLAY)
        assert 0.1 < played["seconds"] < 60
        assert played["name"]
    assert tab.troubles == []


COLUMN = """
    (head) => [...head.closest('table').tBodies[0].rows].map(
      (row) => Number(row.cells[head.cellIndex].dataset.sort))
"""


def test_the_leaderboard_sorts_by_click_and_by_keyboard(tabs: dict[str, Watched]) -> None:
    for view in ("desktop", "phone"):
        page = tabs[view].open("chapters/24_which_flow.html")
        head = page.locator("table.sortable th", has_text="parameters")
        for key in (None, "Enter"):
            before = head.evaluate(COLUMN)
            if key is None:
                head.click()
            else:
                head.press(key)
            page.wait_for_timeout(100)  # the script sorts after the event
            values = head.evaluate(COLUMN)
            assert values in (sorted(before), sorted(before)[::-1])
            assert values != before
        assert head.get_attribute("aria-sort") in ("ascending", "descending")
        assert tabs[view].troubles == []


def test_solutions_are_folded_and_open_by_keyboard(tabs: dict[str, Watched]) -> None:
    page = tabs["desktop"].open("chapters/02_change_of_variables.html")
    folded = page.locator("details.hide")
    assert folded.count() >= 1
    solution = folded.first
    code = solution.locator(".cell_input pre").first
    assert solution.locator("summary").first.inner_text().startswith("Show the solution")
    assert not code.is_visible()
    solution.locator("summary").first.focus()
    page.keyboard.press("Enter")
    code.wait_for(state="visible")
    assert code.inner_text().startswith("# @title Solution")


def test_search_finds_a_page(tabs: dict[str, Watched]) -> None:
    tab = tabs["desktop"]
    page = tab.open("index.html")
    page.keyboard.press("Control+k")
    field_ = page.locator("#pst-search-dialog input[type=search]")
    field_.wait_for(state="visible")
    page.keyboard.type("Householder")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=Householder*")
    page.locator("#search-results li a").first.wait_for(state="visible")
    assert page.locator("#search-results li a", has_text="linear").count() >= 1
    assert tab.troubles == []


def test_the_theme_switch_works(tabs: dict[str, Watched]) -> None:
    page = tabs["desktop"].open("notation.html")
    seen = set()
    for _ in range(3):
        page.locator("button.theme-switch-button").first.click()
        seen.add(page.evaluate("document.documentElement.dataset.theme"))
    assert seen == {"dark", "light"}
    assert tabs["desktop"].troubles == []


def test_the_menu_of_a_phone_opens_and_leads_on(tabs: dict[str, Watched]) -> None:
    page = tabs["phone"].open("index.html")
    page.locator("button.primary-toggle").first.click()
    link = page.get_by_role("link", name="Glossary").first
    link.wait_for(state="visible")
    link.click()
    page.wait_for_url("**/glossary.html")


def test_a_keyboard_reaches_the_text_first(tabs: dict[str, Watched]) -> None:
    page = tabs["desktop"].open("notation.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to main content"
    page.keyboard.press("Enter")
    assert page.url.endswith("#main-content")


def test_a_missing_page_leads_back(tabs: dict[str, Watched]) -> None:
    tab = tabs["desktop"]
    page = tab.open("chapters/no/such/page.html")
    assert [t for t in tab.troubles if "404" not in t] == []
    assert page.locator("h1").inner_text() == "This page is not here"
    page.locator("#home").click()
    page.wait_for_url("**/index.html")
    tab.open("chapters/no/such/page.html").locator("#q").fill("planar")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=planar")
