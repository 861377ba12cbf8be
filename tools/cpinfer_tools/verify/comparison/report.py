"""The report: one HTML file with everything in it, that needs nothing from anywhere, by day and by night."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --page: #ffffff; --faint: #57606a; --line: #d0d7de;
        --head: #f2f4f7; --good: #116329; --bad: #a40e26; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --page: #15191f; --faint: #9aa6b2; --line: #3a424d; --head: #21272f;
          --good: #6fdd8b; --bad: #ff8a80; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
       max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { border: 1px solid var(--line); padding: .3rem .6rem; vertical-align: top; text-align: left; }
th { background: var(--head); }
td:not(.number) { min-width: 7rem; }
.number { text-align: right; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1rem 0; } figcaption, .faint { color: var(--faint); font-size: .9rem; }
img { max-width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line); }
pre { background: var(--head); padding: .7rem; overflow-x: auto; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
"""


@dataclass(frozen=True)
class Section:
    """A part of the report: a heading, a sentence that says how to read it, and a Markdown table or plain lines."""

    title: str
    text: str
    table: str | None = None
    lines: tuple[str, ...] = ()


def html_report(
    title: str, verdict: str, is_good: bool, sections: Sequence[Section], pictures: Mapping[str, Path]
) -> str:
    """The whole page. Pictures are inlined; no other file, address or script is named in it."""
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="{"good" if is_good else "bad"}">{html.escape(verdict)}</p>',
    ]
    for section in sections:
        parts += [f"<h2>{html.escape(section.title)}</h2>", f"<p>{html.escape(section.text)}</p>"]
        if section.table is not None:
            parts.append(html_table(section.table))
        if section.lines:
            parts.append(f"<pre>{html.escape(chr(10).join(section.lines))}</pre>")
    if pictures:
        parts.append("<h2>Pictures</h2>")
    for caption, path in pictures.items():
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        text = html.escape(caption)
        parts.append(
            f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
        )
    return "\n".join([*parts, "</body></html>", ""])


def markdown_report(title: str, verdict: str, sections: Sequence[Section]) -> str:
    """The same without pictures, to be pasted."""
    parts = [f"# {title}", verdict]
    for section in sections:
        parts += [f"## {section.title}", section.text]
        parts += [section.table] if section.table is not None else []
        parts += ["```text\n" + "\n".join(section.lines) + "\n```"] if section.lines else []
    return "\n\n".join(parts) + "\n"


def html_table(table: str) -> str:
    """A Markdown table as HTML; columns that its rule aligns right hold numbers."""
    header, rule, *body = [
        [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        for line in table.splitlines()
    ]

    def cells(row: Sequence[str], tag: str) -> str:
        kinds = [" class=number" if aligned.endswith(":") else "" for aligned in rule]
        return "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in zip(row, kinds, strict=True))

    head, lines = cells(header, "th"), "".join(f"<tr>{cells(row, 'td')}</tr>" for row in body)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
