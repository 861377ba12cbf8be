"""Rewrite what comes from code: docs/reference/reports.md, the rank grid's picture, the JSON Schema of configs, parts.

Parts stand between `<!-- begin NAME -->` and its end, in README.md or any page of docs/; `docs_parts` has them by name.

python tools/dev/docs.py            # rewrite
python tools/dev/docs.py --check    # exit 1 when something is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from config_schema import config_schema
from docs_parts import PARTS
from public_reports import reports_page
from rank_picture import rank_picture

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / "docs" / "reference" / "reports.md"
PICTURE = ROOT / "docs" / "images" / "rank_grid.svg"
SCHEMA = ROOT / "configs" / "schema" / "cpinfer.schema.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 when something is out of date")
    args = parser.parse_args(argv)
    before = {path: path.read_text(encoding="utf-8") for path in (*pages(ROOT), PICTURE, SCHEMA) if path.exists()}
    after = {path: refreshed(before[path]) for path in pages(ROOT) if path != REPORTS}
    after[REPORTS] = reports_page()
    after[PICTURE] = rank_picture()
    after[SCHEMA] = json.dumps(config_schema(), indent=2) + "\n"
    stale = sorted(str(path.relative_to(ROOT)) for path in after if after[path] != before.get(path))
    if args.check:
        print(json.dumps({"up_to_date": not stale, "stale": stale}))
        return 1 if stale else 0
    for name in stale:
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_text(after[ROOT / name], encoding="utf-8")
    print(json.dumps({"changed": stale}))
    return 0


def pages(root: Path) -> list[Path]:
    """The README, and every page of docs/."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def refreshed(text: str) -> str:
    """The text with every marked part written anew. KeyError for a part that no code makes."""
    return re.sub(
        r"(<!-- begin ([\w-]+) -->\n).*?(<!-- end \2 -->)",
        lambda found: f"{found[1]}{_part(found[2])}\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


@cache
def _part(name: str) -> str:
    return PARTS[name]()


if __name__ == "__main__":
    sys.exit(main())
