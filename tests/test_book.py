"""The book: it builds from what is stored, leads nowhere dead, says its figures in words and needs no network."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import nbformat
import pytest
from bs4 import BeautifulSoup
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parents[1]
PUBLISHED = {"GITHUB_REPOSITORY": "someone/a-copy", "GITHUB_SHA": "0123abc"}
WORDS = ["-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Built as GitHub builds it; a warning of Sphinx, such as one of a page that no contents name, is an error."""
    folder = tmp_path_factory.mktemp("book")
    run = subprocess.run(
        [sys.executable, *WORDS, "-d", str(folder / "trees"), ".", str(folder / "html")],
        cwd=ROOT,
        env=os.environ | PUBLISHED | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def pages(folder):
    return {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in folder.rglob("*.html")}


def targets(page, soup):
    """What a page leads to or shows: the path and the anchor where it is part of the book, else an address."""
    for tag in soup.find_all(["a", "img", "link", "script", "video"]):
        address = tag.get("href") or tag.get("src") or ""
        if address and not address.startswith("data:"):
            path, anchor = re.fullmatch(r"([^?#]*)[^#]*#?(.*)", address).groups()
            yield tag, address, (page.parent / unquote(path)).resolve() if path else page, unquote(anchor)


def test_every_page_and_notebook_is_in_the_book(folder):
    sources = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb")]
    names = {path.relative_to(ROOT).with_suffix(".html").as_posix() for path in sources}
    names |= {"data/README.html", "reports/REPORT.html", "index.html"}
    assert len(names) > 15 and not [name for name in names if not (folder / name).is_file()]


def test_no_link_of_the_book_is_dead(pages):
    """Of the book's own every file and anchor is there; other addresses, which are not asked, are whole."""
    anchors = {page: {tag["id"] for tag in soup.find_all(id=True)} for page, soup in pages.items()}
    found = [(page, *target) for page, soup in pages.items() for target in targets(page, soup)]
    dead = []
    for page, _, address, path, anchor in found:
        if re.match(r"[a-z]+:", address):
            ok = re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/[\w./?=%:;,#&()~+@-]*)?", address)
        else:
            ok = path.is_file() and (not anchor or path not in pages or anchor in anchors[path])
        dead += [] if ok else [f"{page.name}: {address}"]
    assert len(found) > 2000 and not dead


def test_every_figure_of_the_book_is_told_in_words(pages):
    pictures = [(page, tag) for page, soup in pages.items() for tag in soup.find_all(["img", "video"])]
    told = [tag.get("alt") or tag.get("aria-label") or "" for _, tag in pictures]
    assert len(pictures) > 30 and min(len(words.split()) for words in told) >= 4


def test_the_book_needs_no_network(pages):
    """Nothing is loaded from elsewhere, and no formula waits for a script."""
    loaded = [address for p, soup in pages.items() for tag, address, *_ in targets(p, soup) if tag.name != "a"]
    assert loaded and not [address for address in loaded if re.match(r"(https?:)?//", address)]
    formulas = sum(len(soup.find_all("math")) for soup in pages.values())
    text = "\n".join(soup.get_text() for soup in pages.values())
    written = sum(path.read_text(encoding="utf-8").count("$$") for path in ROOT.glob("notebooks/*.ipynb")) // 2
    assert formulas > written > 10 and "$$" not in text and "\\frac" not in text


def test_a_published_notebook_opens_elsewhere_at_the_commit_of_its_page(folder, pages, monkeypatch):
    """For Colab a first cell gets repository and packages, there and nowhere else; all other cells are the stored."""
    name = "notebooks/02_mask_construction"
    page = folder / f"{name}.html"
    links = " ".join(address for _, address, *_ in targets(page, pages[page]))
    assert f"mybinder.org/v2/gh/someone/a-copy/0123abc?labpath={name}.ipynb" in links
    assert f"/github/someone/a-copy/blob/pages/colab/{Path(name).name}.ipynb" in links
    first, *rest = nbformat.read(folder / "colab" / f"{Path(name).name}.ipynb", as_version=4).cells
    assert rest == nbformat.read(ROOT / f"{name}.ipynb", as_version=4).cells
    code, told = TransformerManager().transform_cell(first.source), []
    shell = SimpleNamespace(system=told.append, run_line_magic=lambda *words: told.append(" ".join(words)))
    monkeypatch.setattr(sys, "path", [])
    exec(code, {"get_ipython": lambda: shell})
    assert not told and not sys.path
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    exec(code, {"get_ipython": lambda: shell})
    assert re.search(r"someone/a-copy .*checkout -q 0123abc.*pip install -q anywidget==", " ".join(told)) and sys.path
