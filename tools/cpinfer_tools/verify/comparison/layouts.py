"""Layouts by name: `tp4_pcp2_dcp4` is tp=4, pcp=2, dcp=4. What a name leaves out is 1, and dcp what pcp is.

>>> parse_name("tp4_pcp2")
AxisSizes(tp_size=4, pcp_size=2, dcp_size=2, dp_size=1)
>>> parse_name("tp4_pcp2").world_size
8
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpinfer.config import config_to_dict
from cpinfer.engine.attach import config_errors
from cpinfer.errors import UserError
from cpinfer.layout.advice import legal_layouts
from cpinfer.models.spec import ModelSpec
from cpinfer_tools.evaluation.questions import DEFAULTS as EVALUATION_DEFAULTS
from cpinfer_tools.run_config import RunConfig, load_run_config, parse_run_config

AXES = ("tp", "pcp", "dcp", "dp")
# Names are looked for among the legal layouts of machines up to this many ranks.
MAX_RANKS_NAMED = 16
# What a layout is made of in a config: a layout's own file does not inherit these.
LAYOUT_KEYS = (
    "tensor_parallel", "prefill_context_parallel_size", "decode_context_parallel_size", "data_parallel_size",
)  # fmt: skip
# What a layout's own config may not decide: it is the comparison's, and the same for all.
SHARED_KEYS = ("model", "sampling", "input", "output", "wandb", "evaluation", "comparison")


@dataclass(frozen=True)
class AxisSizes:
    """The sizes a layout is named by."""

    tp_size: int
    pcp_size: int
    dcp_size: int
    dp_size: int = 1

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pcp_size * self.dp_size

    @property
    def name(self) -> str:
        """The shortest name; tp is always told."""
        parts = [f"tp{self.tp_size}"]
        parts += [f"pcp{self.pcp_size}"] if self.pcp_size > 1 else []
        parts += [f"dcp{self.dcp_size}"] if self.dcp_size != self.pcp_size else []
        return "_".join(parts + ([f"dp{self.dp_size}"] if self.dp_size > 1 else []))


@dataclass(frozen=True)
class Layout:
    """One column of the comparison: `data` is the whole config of its runs, `config` the same, parsed."""

    name: str
    sizes: AxisSizes
    data: Mapping[str, Any]
    config: RunConfig


def parse_name(name: str) -> AxisSizes:
    """The sizes that a name says. UserError for what is not of the form, and for an axis that is named twice."""
    found: dict[str, int] = {}
    for part in name.split("_"):
        match = re.fullmatch(r"([a-z]+)([1-9][0-9]*)", part)
        if match is None:
            raise UserError(f'"{part}" is no axis with a size; parts such as "tp4", "pcp2", "dcp4", "dp2" were wanted.')
        axis, size = match[1], int(match[2])
        if axis not in AXES:
            near = difflib.get_close_matches(axis, AXES, n=1, cutoff=0.0)[0]
            raise UserError(f'"{axis}" is no axis; the nearest is "{near}" (all: {", ".join(AXES)}).')
        if axis in found:
            raise UserError(f'"{axis}" is named twice.')
        found[axis] = size
    pcp = found.get("pcp", 1)
    return AxisSizes(found.get("tp", 1), pcp, found.get("dcp", pcp), found.get("dp", 1))


def legal_names(spec: ModelSpec, max_ranks: int = MAX_RANKS_NAMED) -> list[str]:
    """Every layout that this model allows on up to so many ranks, by its name."""
    options = [o for n in range(1, max_ranks + 1) for o in legal_layouts(n, spec.num_q_heads, spec.num_kv_heads)]
    sizes = [o.sizes for o in options]
    return [AxisSizes(s.tp_size, s.pcp_size, s.dcp_size, s.dp_size).name for s in sizes]


def resolve_layouts(
    wanted: Sequence[str], base: Mapping[str, Any], folder: Path, spec: ModelSpec, at_least: int = 2
) -> list[Layout]:
    """The layouts of a comparison, in the order they are `wanted`: names, or paths of configs (relative to `folder`).

    `base` is the comparison's config as plain data, without the keys that are its own. A name changes the sizes in it,
    a config file everything but the shared keys. UserError, before anything runs, for a layout that does not exist,
    that this model does not allow, or that comes twice.
    """
    if len(wanted) < at_least:
        raise UserError(f"{len(wanted)} layout(s) to compare; the reference and at least one other were wanted.")
    layouts: list[Layout] = []
    for name in wanted:
        layout = _from_file(name, base, folder) if name.endswith(".json") else _from_name(name, base, spec)
        errors = config_errors(spec, layout.config, layout.sizes.dp_size)
        if errors:
            raise UserError(f'layout "{name}": {" ".join(errors)} {_nearest(layout.sizes.name, spec)}')
        if layout.name in [other.name for other in layouts]:
            raise UserError(f'layout "{name}" comes twice. Leave one out.')
        layouts.append(layout)
    return layouts


def _from_name(name: str, base: Mapping[str, Any], spec: ModelSpec) -> Layout:
    try:
        sizes = parse_name(name)
    except UserError as error:
        raise UserError(f'layout "{name}": {error} {_nearest(name, spec)}') from error
    tensor_parallel = base.get("tensor_parallel") or {}
    data = {
        **base,
        "tensor_parallel": {**tensor_parallel, "tp_size": sizes.tp_size},
        "prefill_context_parallel_size": sizes.pcp_size,
        "decode_context_parallel_size": sizes.dcp_size,
        "data_parallel_size": sizes.dp_size,
    }
    return Layout(name, sizes, data, parse_run_config(data))


def _from_file(name: str, base: Mapping[str, Any], folder: Path) -> Layout:
    path = Path(name) if Path(name).is_file() else folder / name
    asked = load_run_config(path)
    own = json.loads(path.read_text(encoding="utf-8"))
    if asked.model is not None and not _same_model(asked.model, base["model"]):
        raise UserError(
            f'layout "{name}": {path} has model {asked.model}, the comparison {base["model"]}. Layouts of one model '
            "are compared; take the key out."
        )
    kept = {key: value for key, value in base.items() if key not in LAYOUT_KEYS}
    data = {**kept, **{key: value for key, value in own.items() if key not in SHARED_KEYS}}
    data["data_parallel_size"] = data.get("data_parallel_size") or 1
    config = parse_run_config(data)
    sizes = AxisSizes(config.tp_size, config.pcp_size, config.dcp_size, data["data_parallel_size"])
    return Layout(path.stem, sizes, data, config)


def _same_model(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def load_comparison(path: str, overrides: Sequence[str] = ()) -> tuple[RunConfig, dict[str, Any]]:
    """The config of a comparison, and the same as plain data that layouts start from.

    The data can be written anywhere: its paths are absolute. It lacks what is the comparison's own.
    """
    config = load_run_config(path, overrides, EVALUATION_DEFAULTS)
    data = config_to_dict(config)
    for key in ("input", "output", "wandb", "comparison"):
        del data[key]
    if config.model is not None and Path(config.model).is_dir():
        data["model"] = str(Path(config.model).resolve())
    if config.evaluation.task_file is not None:
        data["evaluation"]["task_file"] = str(Path(config.evaluation.task_file).resolve())
    return config, data


def _nearest(name: str, spec: ModelSpec) -> str:
    near = difflib.get_close_matches(name, legal_names(spec), n=3, cutoff=0.0)
    return f"The nearest legal layouts of this model: {', '.join(near)}."
