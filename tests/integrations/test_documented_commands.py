"""What the README and the quickstart tell to run does run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import documented_commands
from documented_commands import Block, blocks

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/quickstart.md")
ALL = [block for page in PAGES for block in blocks(page, (ROOT / page).read_text(encoding="utf-8"))]
# What its command or its code prints, besides ending well.
PRINTED = {
    "README.md": " wants hammers (-0.0",
    "cpinfer init": '"num_prompts": 64',
    "explain": "0: q0-3/k0/s0/p0",
    "mine.jsonl": '"num_samples": 1',
}


def run(block: Block, folder: Path, timeout_s: float) -> str:
    paths = [str(ROOT), str(ROOT / "integrations"), str(ROOT / "tools")]
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return documented_commands.run(block, folder, ROOT, env, timeout_s)


@pytest.mark.timeout(300)
def test_what_is_quick_runs_as_it_is_written(tmp_path: Path) -> None:
    quick = [block for block in ALL if not block.is_slow]
    assert {block.page for block in quick} == set(PAGES)
    printed = [run(block, tmp_path, timeout_s=100) for block in quick]
    for words, wanted in PRINTED.items():
        assert any(
            wanted in text for block, text in zip(quick, printed, strict=True) if words in f"{block}{block.text}"
        )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_takes_longer_runs_as_it_is_written(tmp_path: Path) -> None:
    assert any(block.is_slow for block in ALL)
    for block in ALL:
        run(block, tmp_path, timeout_s=900)


def test_a_command_that_fails_is_noticed(tmp_path: Path) -> None:
    for kind, text in (
        ("sh", "false\ntrue\n"),
        ("sh", "cpinfer nothing | cat\n"),
        ("python", "import nothing_at_all\n"),
    ):
        with pytest.raises(AssertionError, match=r"page\.md:3 ended with"):
            run(Block("page.md", 3, kind, text, is_slow=False, in_clone=False), tmp_path, timeout_s=60)


def test_only_marked_blocks_are_run_and_a_misspelt_mark_is_an_error() -> None:
    page = (
        "```sh\nnot this\n```\n<!-- run slow in the clone -->\n```python\nthis\n```\n"
        "<!-- run -->\n```sh\nand this\n```\n"
    )
    assert [(b.line, b.kind, b.text, b.is_slow, b.in_clone) for b in blocks("p", page)] == [
        (4, "python", "this\n", True, True),
        (8, "sh", "and this\n", False, False),
    ]
    for wrong in ("<!-- run slowly -->\n```sh\n```\n", "<!-- run -->\nwords\n", "<!-- run -->\n```text\nx\n```\n"):
        with pytest.raises(ValueError, match="a mark is"):
            blocks("p", wrong)
