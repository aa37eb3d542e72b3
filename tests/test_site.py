"""The built site, read as files: links, launch buttons, the API, nothing from a third party."""

from __future__ import annotations

import json
import pkgutil
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from house import ROOT, SITE, chapters, tool

import nflib

ADDRESS = tool("repository").address()


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    if not (SITE / "index.html").exists():
        pytest.fail("The site is not built: run 'make book' first.", pytrace=False)


class Page(HTMLParser):
    """The ids, links and resources of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.lang = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if identifier := found.get("id"):
            self.ids.add(identifier)
        if tag == "html":
            self.lang = found.get("lang") or ""
        if tag == "a" and (href := found.get("href")):
            self.links.append(href)
        if tag == "link" and (href := found.get("href")):
            self.resources.append(href)
        if source := found.get("src"):
            self.resources.append(source)
        if tag == "img":
            self.images.append(found)


@pytest.fixture(scope="module")
def pages() -> dict[Path, Page]:
    paths = [path for path in sorted(SITE.rglob("*.html")) if "_static" not in path.parts]
    return {path: Page(path) for path in paths}


def test_every_page_of_the_contents_is_built(pages: dict[Path, Page]) -> None:
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [contents["root"]]
    for part in contents["parts"]:
        files += [chapter["file"] for chapter in part["chapters"]]
    for name in files:
        assert SITE / f"{name}.html" in pages
    listed = {Path(name).name for name in files if name.startswith("chapters/")}
    assert listed == {path.stem for path in chapters()}


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for resource in page.resources:
            assert not re.match(r"(?:\w+:)?//", resource), f"{path.name} loads {resource}"
    for sheet in SITE.rglob("*.css"):
        text = re.sub(r"/\*.*?\*/", "", sheet.read_text(encoding="utf-8"), flags=re.S)
        found = re.findall(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")]+)", text)
        assert not found, f"{sheet.name} loads {found}"


def test_every_link_inside_the_site_leads_somewhere(pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target = target / "index.html"
            if not target.exists():
                broken.append(f"{path.name} -> {link}")
            elif parts.fragment and target in pages:
                if unquote(parts.fragment) not in pages[target].ids:
                    broken.append(f"{path.name} -> {link}")
    assert not broken


def test_every_image_has_alt_text(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for image in page.images:
            alt, source = image.get("alt") or "", image.get("src") or ""
            assert alt.strip(), f"{path.name}: {source[:60]}"
            # Sphinx puts the file's name where no alt text was given.
            assert not re.fullmatch(r"\S+\.(?:png|svg|jpg)", alt), f"{path.name}: {alt}"


def test_every_chapter_has_its_colab_button(pages: dict[Path, Page]) -> None:
    for chapter in chapters():
        page = pages[SITE / "chapters" / f"{chapter.stem}.html"]
        place = ADDRESS.replace("https://github.com/", "") + f"/blob/main/chapters/{chapter.name}"
        assert f"https://colab.research.google.com/github/{place}" in page.links


def test_pages_call_chapters_by_their_titles() -> None:
    for chapter in chapters():
        title = json.loads(chapter.read_text())["cells"][0]["source"]
        title = "".join(title).splitlines()[0].removeprefix("# ")
        for name in ("index.md", "teaching.md", "README.md"):
            assert title in (ROOT / name).read_text(), f"{name} calls '{title}' something else"


def test_pages_that_are_no_notebooks_have_no_colab_button(pages: dict[Path, Page]) -> None:
    for name in ("index", "notation", "glossary", "house"):
        assert not [link for link in pages[SITE / f"{name}.html"].links if "colab" in link]


def test_each_module_has_its_api_page(pages: dict[Path, Page]) -> None:
    modules = [each.name for each in pkgutil.iter_modules(nflib.__path__)]
    contents = (ROOT / "api.md").read_text()
    for module in modules:
        if module.startswith("_"):
            continue
        page = pages[SITE / "api" / f"{module}.html"]
        assert [name for name in page.ids if name.startswith(f"nflib.{module}")]
        assert f"api/{module}.md" in contents
    assert "nflib.core.Flow.log_prob" in pages[SITE / "api" / "core.html"].ids


def test_every_reference_is_listed_and_found() -> None:
    keys = re.findall(r"^@\w+\{([^,]+),", (ROOT / "references.bib").read_text(), re.M)
    assert len(keys) == len(set(keys))
    text = (SITE / "bibliography.html").read_text(encoding="utf-8")
    assert len(re.findall(r'<div class="citation"', text)) == len(keys)


def test_the_pages_name_their_language(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert page.lang == "en", path.name


def test_the_page_for_missing_pages_needs_no_other_file(pages: dict[Path, Page]) -> None:
    page = pages[SITE / "404.html"]
    assert page.resources == ["data:,"]


def test_the_site_speaks_of_no_machine(pages: dict[Path, Page]) -> None:
    for path in pages:
        assert str(ROOT) not in path.read_text(encoding="utf-8"), path.name
