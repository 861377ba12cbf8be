"""The reference of commands, from the parsers that the commands themselves use."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from cpinfer_tools import cli


class _FoundError(Exception):
    """Thrown in place of parsing; carries the parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__(parser.prog)
        self.parser = parser


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that `cpinfer COMMAND` makes. Its tool is imported, and stops where it would parse."""

    def stop(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        raise _FoundError(parser)

    try:
        with patch.object(argparse.ArgumentParser, "parse_args", stop):
            cli.run(command, [], prog=f"cpinfer {command}")
    except _FoundError as found:
        return found.parser
    raise ValueError(f"cpinfer {command} parses nothing")


def command_sections() -> str:
    """A section for each command, in Markdown: what it does, and its flags."""
    return "\n\n".join(section(name) for name in cli.COMMANDS)


def section(command: str) -> str:
    """That of one command."""
    parser = parser_of(command)
    extra = cli.COMMANDS[command].extra
    lines = [f"## cpinfer {command}", "", *map(_prose, (parser.description or "").strip().splitlines()), ""]
    if extra is not None:
        lines += [f'It needs `pip install "cpinfer[{extra}]"`.', ""]
    return "\n".join([*lines, "| argument | |", "|---|---|", *_rows(parser)])


def _prose(line: str) -> str:
    """A line of a help text, which is Markdown but for angle brackets; what is indented is code."""
    return line if line.startswith("    ") else line.replace("<", "&lt;")


def _rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if action.help is argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        words = (action.help or "").replace("|", r"\|") % {"default": action.default, "prog": parser.prog}
        yield f"| {_name(action)} | {words}{' (required)' if action.required and action.option_strings else ''} |"


def _name(action: argparse.Action) -> str:
    """A flag as it is written, with what it takes."""
    takes = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.choices is not None:
        takes = f"{{{','.join(map(str, action.choices))}}}"
    if action.nargs in ("+", "*"):
        takes = f"{takes} ..."
    if not action.option_strings:
        return f"`{takes}`"
    flags = ", ".join(action.option_strings)
    return f"`{flags}`" if action.nargs == 0 else f"`{flags} {takes}`"
