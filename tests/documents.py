"""The pages of the documentation, and what stands in them as code."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)\n(?P<code>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Fenced code; `language` is empty where none is named, `line` that of the page on which the code begins."""

    language: str
    code: str
    line: int


def pages() -> list[Path]:
    """The README, what contributors read, and every page of docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str, *languages: str) -> list[Block]:
    """The fenced blocks of a page in these languages; of all where none is named."""
    return [
        Block(found["language"], textwrap.dedent(found["code"]), text[: found.start("code")].count("\n") + 1)
        for found in _FENCE.finditer(text)
        if not languages or found["language"] in languages
    ]


def page(name: str) -> str:
    """The text of a page of docs/."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def code_blocks(text: str, language: str = "python") -> list[str]:
    """The code of the fenced blocks of a page in one language, in order; ValueError where there is none."""
    found = [block.code for block in blocks(text, language)]
    if not found:
        raise ValueError(f"the page has no block of {language}")
    return found


def without_blocks(text: str) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", text)


def shell_lines(text: str) -> Iterator[str]:
    """Lines of code in no other language than a shell's, each with those that continue it.

    They stand indented by four, or in fenced blocks without a language, or in that of a shell.
    """
    indented = "\n".join(line[4:] if line.startswith("    ") else "" for line in without_blocks(text).splitlines())
    fenced = [block.code for block in blocks(text, "", "text", "bash", "sh", "shell", "console")]
    for code in (indented, *fenced):
        joined = re.sub(r"\\\n *", " ", code)
        joined = re.sub(r"\n +(?=\[)", " ", joined)  # a synopsis of several lines
        yield from filter(None, map(str.strip, joined.splitlines()))


def inline_code(text: str) -> Iterator[str]:
    """What stands between backticks in the prose of a page, spaces and ends of lines as one space."""
    for found in re.finditer(r"(?<!`)`([^`]+)`(?!`)", without_blocks(text)):
        yield " ".join(found[1].split())
