"""MkDocs hook: what the site shows beside docs/, and where links lead that leave it.

Pages link to files of the repository by relative paths, as in `[a card](../tools/bench/results/x.md)`, so that they can
be followed where the repository is read. In the site the README is the front page, cards and other Markdown are pages,
and any other file that is linked to is a page with its text, or a notebook's cells. A link to what does not exist stays
as it is: MkDocs reports it.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
CARDS = "tools/bench/results"
# Pages of the site that lie outside docs/ in the repository, by their paths there.
MOVED = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
# A folder that is linked to: the page that stands for it.
FOLDERS = {CARDS: "docs/benchmarks.md"}
IMAGES = (".png", ".svg")
TEXTS = ("", ".md", ".sh", ".sbatch", ".txt")
LEXERS = {".py": "python", ".json": "json", ".jsonl": "json", ".toml": "toml", ".yml": "yaml", ".cpp": "cpp"}
# In a link's target: no scheme, no bare anchor, nothing absolute.
LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)\s#]+)(#[\w.-]*)?(?=[)\s])")
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
# Where a word stands on several pages, these come first.
SEARCHED_FIRST = {"reference/config.md": 8.0, "reference/cli.md": 4.0, "quickstart.md": 2.0}
# Pages of one wide table, which has the room of the table of contents.
WIDE = ("reference/glossary.md", "reference/refusals.md")
NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n"


def site_path(path: str) -> str:
    """Where a file of the repository stands in the site, as the path of its source below docs/.

    >>> site_path("docs/guides/trl.md"), site_path("README.md"), site_path("tools/bench/results/engine.md")
    ('guides/trl.md', 'index.md', 'cards/engine.md')
    >>> site_path("examples/score.py"), site_path("configs/recall-tiny/README.md")
    ('source/examples/score.py.md', 'source/configs/recall-tiny/README.md')
    """
    if path in MOVED:
        return MOVED[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith(f"{CARDS}/"):
        return path.replace(CARDS, "cards", 1)
    return f"source/{path}" if path.endswith((".md", *IMAGES)) else f"source/{path}.md"


def linked_file(page: str, target: str) -> str | None:
    """The file or folder of the repository that `target`, a link in the file `page`, leads to; None without one.

    A folder with a README.md is that; others have a page that stands for them.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    path = FOLDERS.get(path, path)
    if (ROOT / path / "README.md").is_file() and path != ".":
        path = f"{path}/README.md"
    return path if not path.startswith("..") and (ROOT / path).exists() else None


def links(text: str) -> Iterator[str]:
    """The relative targets of a text's links, without their anchors; fenced code has none."""
    yield from (found[2] for found in LINK.finditer(FENCE.sub("", text)))


def with_links_of_the_site(text: str, page: str) -> str:
    """The text of `page`, a file or folder of the repository; its links lead to the same files within the site."""
    here = posixpath.dirname(site_path(page))

    def moved(found: re.Match[str]) -> str:
        path = linked_file(page, found[2])
        target = found[2] if path is None else posixpath.relpath(site_path(path), here or ".")
        return f"{found[1]}{target}{found[3] or ''}"

    parts, end = [], 0
    for fence in FENCE.finditer(text):
        parts += [LINK.sub(moved, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(moved, text[end:])])


def pages_beside_docs(docs: list[str]) -> dict[str, str]:
    """What is shown of files outside docs/: a page's text, by the file's path.

    Args:
        docs: the pages of docs/, as paths of the repository.

    Returns:
        The pages of `MOVED`, all cards, and every file that one of them or of `docs` links to.
    """
    cards = [f"{CARDS}/{path.name}" for path in sorted((ROOT / CARDS).glob("*.md"))]
    found: dict[str, str] = {}
    seen: set[str] = set()
    ahead = [*docs, *MOVED, *cards]
    while ahead:
        path = ahead.pop()
        if path in seen or path.endswith(IMAGES):
            continue
        seen.add(path)
        text = _listing(path) if (ROOT / path).is_dir() else (ROOT / path).read_text(encoding="utf-8")
        if path.endswith(".md") or (ROOT / path).is_dir():
            ahead += [linked for target in links(text) if (linked := linked_file(path, target)) is not None]
        if not path.startswith("docs/"):
            found[path] = _shown(path, text)
    return found


def _listing(folder: str) -> str:
    """The page of a folder: a link to each of its files of text."""
    name = posixpath.basename(folder)
    there = (path for path in (ROOT / folder).iterdir() if path.is_file())
    files = sorted(path.name for path in there if path.suffix in (*LEXERS, *TEXTS))
    return "\n".join([f"# {folder}", "", *(f"- [{file}]({name}/{file})" for file in files), ""])


def notebook_page(text: str) -> str:
    """A notebook as Markdown: its words, its code, and what this printed and drew."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [shown for output in cell.get("outputs", ()) if (shown := _output(output)) is not None]
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str | None:
    """One output of a cell; None of a kind that is not shown."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![drawn by the cell above](data:image/png;base64,{''.join(data['image/png'].split())})"
    printed = "".join(output.get("text", data.get("text/plain", ()))).rstrip()
    return f"```text\n{printed}\n```" if printed else None


def _shown(path: str, text: str) -> str:
    if path.endswith(".ipynb"):
        return NOT_SEARCHED + notebook_page(text)
    if path.endswith(".md") or (ROOT / path).is_dir():
        return text if path in MOVED or path.startswith(CARDS) else NOT_SEARCHED + text
    fence = "`" * (3 + max((len(ticks) for ticks in re.findall(r"`{3,}", text)), default=0))
    return f"{NOT_SEARCHED}# {path}\n\n{fence}{LEXERS.get(Path(path).suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is shown beside docs/."""
    docs = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    for path, text in pages_beside_docs(docs).items():
        file = File.generated(config, site_path(path), content=text)
        file.repository_path = path  # type: ignore[attr-defined]
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Its links, as they are within the site; how far up it stands in searches; what stands beside it."""
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    if page.file.src_uri in SEARCHED_FIRST:
        page.meta["search"] = {"boost": SEARCHED_FIRST[page.file.src_uri]}
    path = getattr(page.file, "repository_path", f"docs/{page.file.src_uri}")
    return with_links_of_the_site(markdown, path)
