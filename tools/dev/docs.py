"""Rewrite what comes from code: docs/reports.md, the JSON Schema of configs, and parts of README.md.

The parts stand between `<!-- begin NAME -->` and its end.

python tools/dev/docs.py            # rewrite
python tools/dev/docs.py --check    # exit 1 when something is out of date
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from config_schema import config_schema
from cpinfer.config import EngineConfig, JobConfig, LaunchConfig, ParallelConfig
from cpinfer.engine.prompts import LINE_KEYS
from cpinfer.layout.explain import draw_grid
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.heads import HeadPlacement
from cpinfer.models.families import family_table
from cpinfer.refusals import not_yet_table
from cpinfer.schema import Bounds
from cpinfer_tools.run_config import RunConfig
from public_reports import reports_page

README = Path(__file__).resolve().parents[2] / "README.md"
REPORTS = README.parent / "docs" / "reports.md"
SCHEMA = README.parent / "configs" / "schema" / "cpinfer.schema.json"
# From what an engine reads to what a tool does: each table has what its class adds, or says otherwise.
CONFIG_CLASSES = (EngineConfig, ParallelConfig, JobConfig, LaunchConfig, RunConfig)
# The layouts that the README draws: grid, query heads, KV heads.
DRAWN = (
    (RankGrid(tp_size=2, pcp_size=2, dcp_size=2), 8, 2),
    (RankGrid(tp_size=2, pcp_size=2, dcp_size=4), 8, 1),
    (RankGrid(tp_size=2, pcp_size=2, dcp_size=4), 8, 2),
    (RankGrid(tp_size=4, pcp_size=2, dcp_size=2), 8, 2),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 when something is out of date")
    args = parser.parse_args(argv)
    before = {page: page.read_text(encoding="utf-8") for page in (README, REPORTS, SCHEMA) if page.exists()}
    schema = json.dumps(config_schema(), indent=2) + "\n"
    after = {README: refreshed(before[README]), REPORTS: reports_page(), SCHEMA: schema}
    if args.check:
        print(json.dumps({"up_to_date": before == after}))
        return 0 if before == after else 1
    for page, text in after.items():
        page.write_text(text, encoding="utf-8")
    print(json.dumps({"changed": before != after}))
    return 0


def refreshed(text: str) -> str:
    """The text with every marked part written anew. KeyError for a part that no code makes."""
    parts = {
        "layouts": rank_tables(),
        "keys": key_tables(),
        "input-lines": line_table(),
        "families": family_table(),
        "not-yet": not_yet_table(),
    }
    return re.sub(
        r"(<!-- begin ([\w-]+) -->\n).*?(<!-- end \2 -->)",
        lambda found: f"{found[1]}{parts[found[2]]}\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


def rank_tables() -> str:
    """The rank tables of a few layouts, with their DCP groups in shard order."""
    blocks = []
    for grid, num_q_heads, num_kv_heads in DRAWN:
        heads = HeadPlacement(num_q_heads, num_kv_heads, grid.tp_size)
        groups = json.dumps(grid.dcp_groups)
        title = (
            f"TP{grid.tp_size} PCP{grid.pcp_size} DCP{grid.dcp_size}, {num_q_heads} query and {num_kv_heads} KV heads"
        )
        blocks.append(f"{title}; DCP groups {groups}\n\n{draw_grid(grid, heads)}")
    return "```text\n" + "\n\n".join(blocks) + "\n```"


def key_tables() -> str:
    """Every config key with its default and its sentence, below its class; nested keys as `parent.key`."""
    return "\n\n".join(_key_table(cls) for cls in CONFIG_CLASSES)


def line_table() -> str:
    """Every key of an input line with its sentence."""
    return "\n".join(["| key | |", "|---|---|", *(f"| `{key}` | {help} |" for key, help in LINE_KEYS.items())])


def _key_table(cls: Any) -> str:
    own = [field for field in dataclasses.fields(cls) if field.name in cls.__annotations__]
    rows = [f"| `{name}` | {default} | {bounds} | {help} |" for name, default, bounds, help in _keys(own, "")]
    caption = f"`{cls.__name__}`: {cls.__doc__.splitlines()[0]}"
    return "\n".join([caption, "", "| key | default | from, to | |", "|---|---|---|---|", *rows])


def _keys(fields: Sequence[dataclasses.Field[Any]], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for field in fields:
        nested: Any = field.default_factory
        if isinstance(nested, type):
            yield from _keys(dataclasses.fields(nested), f"{prefix}{field.name}.")
            continue
        default = "" if field.default is None else f"`{json.dumps(field.default)}`"
        within = field.metadata["within"]
        bounds = within.short if isinstance(within, Bounds) else ""
        yield prefix + field.name, default, bounds, field.metadata["help"]


if __name__ == "__main__":
    sys.exit(main())
