"""The code that pages of docs/ show, for tests that run it."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def page(name: str) -> str:
    """The text of a page of docs/."""
    return (DOCS / name).read_text(encoding="utf-8")


def code_blocks(text: str, language: str = "python") -> list[str]:
    """The fenced blocks of a page in one language, in order; ValueError where there is none."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, flags=re.DOTALL | re.MULTILINE)
    if not found:
        raise ValueError(f"the page has no block of {language}")
    return [textwrap.dedent(code) for _, code in found]
