"""Blocks of a page that a test runs: shell and Python, each below a comment that says so.

    <!-- run -->                     in a folder that all blocks of the page share
    <!-- run in the clone -->        in the repository's root
    <!-- run slow -->                the same, where it takes long; also `run slow in the clone`

A block without such a comment is only read.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import documents

# A comment that begins like a mark but is none is an error, so that no misspelt one leaves its block unread.
MARK = re.compile(r"<!-- run\b(?P<how>.*?)-->\n", re.DOTALL)
HOW = re.compile(r"(?P<slow> slow)?(?P<clone> in the clone)? ")


@dataclass(frozen=True)
class Block:
    """A block to run: `kind` is sh or python; `line` is where its page has it."""

    page: str
    line: int
    kind: str
    text: str
    is_slow: bool
    in_clone: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str) -> list[Block]:
    """The marked blocks of a page, in order. ValueError for a mark that is misspelt or has no code below it."""
    fenced = {block.line: block for block in documents.blocks(text, "sh", "python")}
    found = []
    for mark in MARK.finditer(text):
        line = text.count("\n", 0, mark.start()) + 1
        how = HOW.fullmatch(mark["how"])
        below = fenced.get(text.count("\n", 0, mark.end()) + 2)  # the line behind that of its fence
        if how is None or below is None:
            raise ValueError(f"{page}:{line}: a mark is `run`, `slow` or `in the clone`, above a block of sh or python")
        is_slow, in_clone = (how[group] is not None for group in ("slow", "clone"))
        found.append(Block(page, line, below.language, below.code, is_slow, in_clone))
    return found


def run(block: Block, folder: Path, clone: Path, env: Mapping[str, str], timeout_s: float) -> str:
    """Run a block; what it printed. AssertionError with its errors where it, or one of its commands, fails."""
    command = [sys.executable, "-c"] if block.kind == "python" else ["bash", "-euo", "pipefail", "-c"]
    done = subprocess.run(
        [*command, block.text],
        cwd=clone if block.in_clone else folder,
        env=dict(env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"{block} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout
