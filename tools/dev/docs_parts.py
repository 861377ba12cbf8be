"""The parts of the documentation that come from code, by the names that pages mark them with."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cpinfer
from cards import cards_table
from command_reference import command_sections
from cpinfer.config import EngineConfig, JobConfig, LaunchConfig, ParallelConfig
from cpinfer.engine.prompts import LINE_KEYS
from cpinfer.layout.explain import draw_grid
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.heads import HeadPlacement
from cpinfer.models.families import family_table
from cpinfer.refusals import not_yet_table
from cpinfer.schema import Bounds
from cpinfer_tools.run_config import RunConfig

INTEGRATIONS = Path(__file__).resolve().parents[2] / "integrations" / "cpinfer_integrations"
# From what an engine reads to what a tool does: each table has what its class adds, or says otherwise.
CONFIG_CLASSES = (EngineConfig, ParallelConfig, JobConfig, LaunchConfig, RunConfig)
# Public classes whose fields are keys.
KEYED = ("EngineConfig", "JobConfig", "SamplingParams", "ServerConfig")
# The layouts that are drawn: grid, query heads, KV heads.
DRAWN = (
    (RankGrid(tp_size=2, pcp_size=2, dcp_size=2), 8, 2),
    (RankGrid(tp_size=2, pcp_size=2, dcp_size=4), 8, 1),
    (RankGrid(tp_size=2, pcp_size=2, dcp_size=4), 8, 2),
    (RankGrid(tp_size=4, pcp_size=2, dcp_size=2), 8, 2),
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


def _key_table(cls: Any) -> str:
    own = [field for field in dataclasses.fields(cls) if field.name in cls.__annotations__]
    rows = [f"| `{name}` | {default} | {bounds} | {help} |" for name, default, bounds, help in _keys(own, "")]
    caption = f"### {cls.__name__}\n\n{cls.__doc__.splitlines()[0]}"
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


def line_table() -> str:
    """Every key of an input line with its sentence."""
    return "\n".join(["| key | |", "|---|---|", *(f"| `{key}` | {help} |" for key, help in LINE_KEYS.items())])


def python_names() -> str:
    """A directive of mkdocstrings for each public name: of the package, errors last, and of each integration.

    A name that one integration takes over from another stands where users import it from, and there alone.
    """
    errors = sorted(name for name in cpinfer.__all__ if name.endswith("Error"))
    others = [name for name in cpinfer.__all__ if name not in errors]
    sections = [_section("cpinfer", others), _section("Errors of cpinfer", errors, module="cpinfer")]
    paths = sorted(INTEGRATIONS.glob("*.py"))
    moved = {pair for path in paths for pair in taken_over(path)}
    for path in paths:
        module = f"cpinfer_integrations.{path.stem}"
        names = [name for name in public_names(path) if (module, name) not in moved]
        if names:
            sections.append(_section(module, names))
    return "\n\n".join(sections)


def taken_over(path: Path) -> list[tuple[str, str]]:
    """The public names of a module that are another integration's, with that one."""
    names = set(public_names(path))
    return [
        (node.module, alias.name)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cpinfer_integrations.")
        for alias in node.names
        if alias.name in names
    ]


def public_names(path: Path) -> list[str]:
    """The `__all__` of a module, read and not imported; empty without one."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value))
    return []


def _section(title: str, names: Sequence[str], module: str | None = None) -> str:
    return "\n\n".join([f"## {title}", *(_directive(f"{module or title}.{name}") for name in names)])


def _directive(name: str) -> str:
    """That of one name. Of a config's class the fields stand on a page of their own, as keys."""
    lines = [f"::: {name}"]
    if name.rpartition(".")[2] in KEYED:
        options = ("show_signature: false", "separate_signature: false")
        lines += ["    options:", *(f"      {option}" for option in options)]
        lines += ["", "Its fields are [keys of a config](config.md#keys)."]
    return "\n".join(lines)


PARTS: Mapping[str, Callable[[], str]] = {
    "cards": cards_table,
    "commands": command_sections,
    "families": family_table,
    "input-lines": line_table,
    "keys": key_tables,
    "layouts": rank_tables,
    "not-yet": not_yet_table,
    "python-names": python_names,
}
