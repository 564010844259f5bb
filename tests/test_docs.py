"""The pages build without a warning or a network, no link inside leads nowhere, and no public name is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import lightning_otrt

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """Links, and what they may lead to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value and tag != "base":
                self.links.append(value)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    # No proxy leads out, so that whatever asked for a network would fail.
    run = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", folder / "trees", DOCS, folder / "html"],
        capture_output=True,
        text=True,
        env={"PATH": "", "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "HOME": str(folder)},
    )
    assert run.returncode == 0, run.stderr
    return folder / "html"


def test_links(built: Path) -> None:
    pages = {path.resolve(): Page(path) for path in built.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append(f"{path.relative_to(built.resolve())}: {link}")
    assert not broken
    assert len(pages) > 15


def test_every_page_is_built(built: Path) -> None:
    sources = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md") if "_build" not in path.parts}
    assert sources <= {path.relative_to(built) for path in built.rglob("*.html")}


def test_every_public_name_is_in_the_reference(built: Path) -> None:
    anchors = Page(built / "api.html").anchors
    assert {f"lightning_otrt.{name}" for name in lightning_otrt.__all__} <= anchors


def test_every_example_has_a_page() -> None:
    shared = {"__init__", "digits", "files", "glyphs", "image_data", "networks", "report", "study", "text_data"}
    examples = {path.stem for path in (ROOT / "examples").glob("*.py")} - shared
    assert examples | {"cli"} == {path.stem for path in (DOCS / "gallery").glob("*.md")}


def test_links_of_the_readme() -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / "README.md").read_text()):
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.M) if anchor else []
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], link


@pytest.mark.parametrize(("page", "most"), [("README.md", 180), ("benchmarks/RESULTS.md", 120)])
def test_pages_that_are_read_first_are_short(page: str, most: int) -> None:
    assert len((ROOT / page).read_text().splitlines()) <= most


def test_figures_are_small() -> None:
    sizes = {path: path.stat().st_size for path in DOCS.rglob("*") if path.suffix in (".png", ".svg")}
    sizes = {path: size for path, size in sizes.items() if "_build" not in path.parts}
    assert len(sizes) > 10
    assert max(sizes.values()) < 180_000, sizes  # a page has few of them, and each comes for light or for dark pages
