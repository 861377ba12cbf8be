"""The site builds without a warning, loads nothing from elsewhere, and shows what the repository has."""

from __future__ import annotations

import doctest
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

import cpinfer
import site_pages
from cards import RESULTS, SAYS, cards
from cpinfer_tools.cli import COMMANDS
from site_pages import linked_file, notebook_page, pages_beside_docs, with_links_of_the_site

# Some seconds of a processor: more where others have it.
pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]
# What a tag loads by itself, without a click; of `link` by what it is for.
LOADING = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "object": "data",
}
LOADING_LINKS = {"stylesheet", "preload", "prefetch", "preconnect", "dns-prefetch", "icon", "modulepreload", "manifest"}
# The theme's script has these addresses in it. The first is loaded where a page has a diagram of Mermaid's, which the
# test below looks for; the second by browsers of before 2020; the others where the config names a repository.
IN_THE_THEME = re.compile(r"[\w.]+/(?:mermaid@|resize-observer-polyfill)|api\.github\.com/|\$\{e\}/api/v4/")


class Page(HTMLParser):
    """What a page would load, and the lines of its paragraphs that look like Markdown."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.unread: list[str] = []
        self.classes: set[str] = set()
        self.ids: set[str] = set()
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.inside = tag
        self.classes |= set(given.get("class", "").split())
        self.ids.add(given.get("id", ""))
        if tag in LOADING and LOADING[tag] in given:
            self.loaded.append(given[LOADING[tag]])
        elif tag == "link" and LOADING_LINKS & set(given.get("rel", "").split()):
            self.loaded.append(given["href"])
        self.loaded += re.findall(r"url\(['\"]?([^'\")]+)", given.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self.inside == "p":
            self.unread += re.findall(r"(?m)^\s*(?:[-*] |\d+\. |\|.*\||```|:::|#+ ).*$", data)


def loaded_by_style(text: str) -> Iterator[str]:
    yield from re.findall(r"url\(\s*['\"]?([^'\")]+)", text)
    yield from re.findall(r"@import\s+['\"]([^'\"]+)", text)


def named_by_script(text: str) -> Iterator[str]:
    """Addresses in a script's strings, but those that name a format of XML."""
    found = re.findall(r"[\"'`]https?://([^\"'`]+)", text)
    yield from (address for address in found if not address.startswith("www.w3.org/"))


def is_elsewhere(address: str) -> bool:
    return re.match(r"(?:https?:)?//", address) is not None


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {str(p.relative_to(site)): Page(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))}


def test_nothing_is_loaded_from_another_host(site: Path, pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        assert page.loaded and not list(filter(is_elsewhere, page.loaded)), name
        assert "mermaid" not in page.classes, name
    styles, scripts = (
        sorted(site.rglob("*.css")),
        [p for p in sorted(site.rglob("*.js")) if p.parent != site / "search"],
    )
    assert styles and scripts
    for path in styles:
        assert not list(filter(is_elsewhere, loaded_by_style(path.read_text(encoding="utf-8")))), path
    for path in scripts:
        assert not [a for a in named_by_script(path.read_text(encoding="utf-8")) if not IN_THE_THEME.match(a)], path


def test_no_markdown_is_left_unread(pages: dict[str, Page]) -> None:
    assert not {name: page.unread for name, page in pages.items() if page.unread}


def test_the_site_has_the_readme_every_card_every_command_and_every_public_name(pages: dict[str, Page]) -> None:
    assert {"index.html", "quickstart.html", "benchmarks.html", "changelog.html"} <= pages.keys()
    assert {f"cards/{path.stem}.html" for path in RESULTS.glob("*.md")} <= pages.keys()
    assert {f"cpinfer.{name}" for name in cpinfer.__all__} <= pages["reference/python.html"].ids
    assert {f"cpinfer-{name}" for name in COMMANDS} <= pages["reference/cli.html"].ids
    assert "source/examples/generate.py.html" in pages


def test_what_is_searched_is_bundled(site: Path) -> None:
    assert "num_kv_heads" in (site / "search" / "search_index.js").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<link rel="preconnect" href="https://fonts.example">',
        '<img alt="" src="https://shields.example/badge.svg">',
        '<p style="background: url(https://example.org/x.png)">x</p>',
    ],
)
def test_what_a_page_would_load_is_noticed(html: str) -> None:
    assert list(filter(is_elsewhere, Page(html).loaded))


def test_links_that_are_clicked_are_no_loads() -> None:
    html = '<a href="https://example.org">x</a><link rel="canonical" href="https://example.org"><img src="a.png">'
    assert not list(filter(is_elsewhere, Page(html).loaded))


def test_what_styles_and_scripts_would_load_is_noticed() -> None:
    assert list(loaded_by_style("@import 'https://a/b'; x { src: url(//c/d) }")) == ["//c/d", "https://a/b"]
    assert list(named_by_script("f('https://a/b'); g(\"http://www.w3.org/2000/svg\")")) == ["a/b"]


@pytest.mark.parametrize(
    "text", ["words\n- item", "words\n| a | b |", "words\n1. one", "::: cpinfer.attach", "words\n## title"]
)
def test_markdown_that_is_left_is_noticed(text: str) -> None:
    assert Page(f"<p>{text}</p>").unread
    assert not Page("<p>a - b, 1.5 and a | b</p><pre>- x</pre>").unread


def test_a_link_out_of_docs_leads_to_the_same_file_within_the_site() -> None:
    text = (
        "[a](../../examples/score.py) [b](../quickstart.md#next) ![c](../images/rank_grid.svg)\n"
        "```sh\n[d](../../LICENSE)\n```\n"
    )
    assert with_links_of_the_site(text, "docs/guides/trl.md") == (
        "[a](../source/examples/score.py.md) [b](../quickstart.md#next) ![c](../images/rank_grid.svg)\n"
        "```sh\n[d](../../LICENSE)\n```\n"
    )
    assert with_links_of_the_site("[a](docs/quickstart.md) [b](tools/bench/results)", "README.md") == (
        "[a](quickstart.md) [b](benchmarks.md)"
    )
    assert "source/LICENSE.md" not in pages_beside_docs([]) and "examples/score.py" in pages_beside_docs([])


def test_a_link_to_what_does_not_exist_is_left_for_the_build_to_complain_of() -> None:
    for link in ("../nothing.py", "../../../outside.md", "nothing.md"):
        assert linked_file("docs/quickstart.md", link) is None
        assert with_links_of_the_site(f"[a]({link})", "docs/quickstart.md") == f"[a]({link})"


def test_a_notebook_is_a_page_of_its_cells_and_what_they_printed_and_drew() -> None:
    drawn = {"output_type": "display_data", "data": {"image/png": "QUJD\nRA==\n", "text/plain": ["<Figure>"]}}
    printed = {"output_type": "stream", "text": ["1\n", "2\n"]}
    nothing = {"output_type": "execute_result", "data": {"text/html": "<b>x</b>"}}
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "words"]},
        {"cell_type": "code", "source": ["f(1)\n", "f(2)"], "outputs": [printed, drawn, nothing]},
    ]
    assert notebook_page(json.dumps({"cells": cells})) == (
        "# Title\nwords\n\n```python\nf(1)\nf(2)\n```\n\n```text\n1\n2\n```\n\n"
        "![drawn by the cell above](data:image/png;base64,QUJDRA==)\n"
    )
    assert not is_elsewhere(Page('<img src="data:image/png;base64,QUJDRA==">').loaded[0])


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# T\n\n[a](../README.md)\n", encoding="utf-8")
    shutil.copy(ROOT / "README.md", tmp_path)
    config = "site_name: x\nplugins: []\n" + re.search(r"(?ms)^validation:\n.*", (ROOT / "mkdocs.yml").read_text())[0]
    (tmp_path / "mkdocs.yml").write_text(config, encoding="utf-8")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and "not found among documentation files" in done.stderr


def figures(text: str) -> set[str]:
    """The numbers of a text, but those in the names of things (pcp2, sm_80)."""
    return set(re.findall(r"(?<![\w.=-])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w])", text))


def test_every_figure_of_a_card_s_sentence_stands_in_the_card() -> None:
    assert [card.path.stem for card in cards()] == list(SAYS)
    for card in cards():
        there = figures(card.path.read_text(encoding="utf-8"))
        assert not figures(card.says) - there, (card.path.name, figures(card.says) - there)


def not_on_its_cards(text: str) -> set[str]:
    """Figures of two decimals and more in a section that links to cards, and that none of these has."""
    found: set[str] = set()
    for section in re.split(r"(?m)^#+ ", text.partition("<!-- end cards -->")[2] or text):
        names = set(re.findall(r"bench/results/(\w+)\.md\)", section))
        there = {n for name in names for n in figures((RESULTS / f"{name}.md").read_text(encoding="utf-8"))}
        found |= {n for n in figures(section) if re.search(r"\.\d\d", n)} - there if names else set()
    return found


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_the_figures_of_a_section_stand_on_the_cards_that_it_links_to(page: str) -> None:
    assert not not_on_its_cards((ROOT / page).read_text(encoding="utf-8"))


def test_a_figure_that_is_not_on_its_card_is_noticed() -> None:
    card = "tools/bench/results/engine_amd_epyc_2_cores.md"
    on_card, two_decimals = figures((ROOT / card).read_text(encoding="utf-8")), {f"{x / 100:.2f}" for x in range(900)}
    on_it, not_on_it = min(two_decimals & on_card), min(two_decimals - on_card)
    link = f"([card]({card}))"
    assert not_on_its_cards(f"## One\n{on_it} x {link}\n## Two\n9.99, by no card") == set()
    assert not_on_its_cards(f"## One\n{on_it} x\n## Two\n{not_on_it} x {link}") == {not_on_it}


def test_a_figure_that_no_card_has_is_noticed() -> None:
    assert figures("3.22 times, 16k, pcp=2, 1,555,712 bytes, 3.3e-06, 19%") == {"3.22", "1,555,712", "3.3e-06", "19"}


def test_the_examples_of_the_hook_are_true() -> None:
    result = doctest.testmod(site_pages)
    assert result.attempted and not result.failed
