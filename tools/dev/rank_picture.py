"""The picture of the README: the ranks of one layout, what each computes of a prompt, and where the KV of it lies.

Drawn from the layout floor, as `cpinfer explain` prints it; `make docs` writes docs/images/rank_grid.svg. It has a
background of its own, light or dark, so it can be read on any page.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from xml.sax.saxutils import escape

import numpy as np

from cpinfer.layout.explain import RankPlace, rank_places
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.heads import HeadPlacement
from cpinfer.layout.prefill import zigzag_split
from cpinfer.layout.shards import KVSharding

# The layout of `make rollout`.
GRID = RankGrid(tp_size=4, pcp_size=2, dcp_size=2)
HEADS = HeadPlacement(num_q_heads=8, num_kv_heads=2, tp_size=4)
PROMPT_TOKENS, INTERLEAVE = 128, 16

WIDTH, MARGIN, LABEL = 800, 20, 52
CELL_HEIGHT, GAP = 78, 8
STRIP_HEIGHT = 34
INNER = WIDTH - 2 * MARGIN - LABEL

STYLE = """\
  text { font-family: system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; font-size: 14px; }
  .paper { fill: #ffffff; stroke: #d0d7de; } .ink { fill: #24292f; } .soft { fill: #57606a; }
  .of0 { fill: #1f5fa8; } .of1 { fill: #b4530f; } .on { fill: #ffffff; } .head { font-weight: 600; }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #161b22; stroke: #30363d; } .ink { fill: #e6edf3; } .soft { fill: #9aa4af; }
    .of0 { fill: #2f6fbd; } .of1 { fill: #bf5b12; }
  }"""


def rank_picture() -> str:
    """The whole picture, as SVG."""
    body = [*_grid(top=MARGIN + 24)]
    grid_end = MARGIN + 24 + GRID.pcp_size * (CELL_HEIGHT + GAP)
    body += _strip(
        grid_end + 34,
        f"Prefill of {PROMPT_TOKENS} tokens: each pcp rank has a piece from the head and one from the tail (zigzag)",
        _prefill_runs(),
        "piece",
    )
    body += _strip(
        grid_end + 34 + STRIP_HEIGHT + 44,
        f"KV cache of the same tokens, dealt {INTERLEAVE} at a time: in decode a rank reads the shard that it holds",
        _shard_runs(),
        "tokens",
    )
    height = grid_end + 34 + 2 * STRIP_HEIGHT + 44 + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="title">',
        f'<title id="title">Eight ranks as TP{GRID.tp_size} x PCP{GRID.pcp_size}, KV in {GRID.dcp_size} shards</title>',
        f"<style>\n{STYLE}\n</style>",
        f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        *body,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _grid(top: int) -> Iterator[str]:
    """The rank grid: a row for each pcp rank, a column for each tp rank, in the colour of the KV shard."""
    width = (INNER - (GRID.tp_size - 1) * GAP) / GRID.tp_size
    for tp_rank in range(GRID.tp_size):
        yield _text(MARGIN + LABEL + tp_rank * (width + GAP) + width / 2, top - 10, f"tp{tp_rank}", "soft", middle=True)
    for place in rank_places(GRID, HEADS):
        x, y = MARGIN + LABEL + place.tp_rank * (width + GAP), top + place.pcp_rank * (CELL_HEIGHT + GAP)
        if place.tp_rank == 0:
            yield _text(MARGIN, y + CELL_HEIGHT / 2 + 5, f"pcp{place.pcp_rank}", "soft")
        yield _rect(x, y, width, CELL_HEIGHT, place.kv_shard)
        yield _text(x + 12, y + 23, f"rank {place.rank}", "on head")
        for i, line in enumerate(_said(place)):
            yield _text(x + 12, y + 44 + 19 * i, line, "on")


def _said(place: RankPlace) -> tuple[str, str]:
    """What a cell says of its rank, in two lines."""
    queries = f"{place.q_heads[0]}-{place.q_heads[-1]}"
    keys = ", ".join(map(str, place.kv_heads))
    return f"Q heads {queries}", f"KV head {keys}, shard {place.kv_shard}"


def _prefill_runs() -> list[tuple[int, int, int]]:
    """Runs of a prompt's tokens `[start, end)`, with the pcp rank that computes them."""
    split = zigzag_split([PROMPT_TOKENS], GRID.pcp_size)
    return sorted((piece.start, piece.end, piece.pcp_rank) for piece in split.pieces)


def _shard_runs() -> list[tuple[int, int, int]]:
    """Runs of its tokens, with the shard that stores them."""
    owners = KVSharding(GRID.dcp_size, INTERLEAVE, block_size=INTERLEAVE).owner(np.arange(PROMPT_TOKENS)).tolist()
    runs, start = [], 0
    for owner, same in groupby(owners):
        end = start + len(list(same))
        runs.append((start, end, owner))
        start = end
    return runs


def _strip(top: int, title: str, runs: list[tuple[int, int, int]], what: str) -> Iterator[str]:
    """A prompt from its first token to its last, each run in its owner's colour."""
    yield _text(MARGIN, top - 10, title, "ink")
    scale = (WIDTH - 2 * MARGIN) / PROMPT_TOKENS
    for i, (start, end, owner) in enumerate(runs):
        yield _rect(MARGIN + start * scale, top, (end - start) * scale - 2, STRIP_HEIGHT, owner)
        said = f"piece {i}: pcp{owner}" if what == "piece" else f"shard {owner}"
        yield _text(MARGIN + (start + end) / 2 * scale - 1, top + 22, said, "on", middle=True)


def _rect(x: float, y: float, width: float, height: float, owner: int) -> str:
    return f'<rect class="of{owner}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"/>'


def _text(x: float, y: float, words: str, style: str, *, middle: bool = False) -> str:
    anchor = ' text-anchor="middle"' if middle else ""
    return f'<text class="{style}" x="{x:g}" y="{y:g}"{anchor}>{escape(words)}</text>'
