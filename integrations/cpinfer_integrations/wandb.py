"""Weights & Biases: what a run or a comparison gives, beside the local files that hold the same and more.

Who has no `wandb` in the config logs nothing. Mode `auto` is online with an API key and offline without. Where W&B
cannot be reached a run is logged offline instead, and what was returned says so: nothing that was computed is lost for
want of a network. What is logged is what is handed over here: not the console, the code or the state of a git
repository.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cpinfer.packages import named
from cpinfer_integrations.wandb_config import WandbConfig

try:
    import wandb
except ModuleNotFoundError as error:
    raise named(error, __name__) from error

Mode = Literal["online", "offline"]
# How long W&B may take to answer before a run is logged offline.
INIT_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Table:
    """Rows for a W&B table."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class LayoutLog:
    """What one layout's run in W&B shows. Images are PNG files, by the name they get there."""

    name: str
    meta: Mapping[str, Any]
    summary: Mapping[str, Any]
    tables: Mapping[str, Table] = field(default_factory=dict)
    images: Mapping[str, Path] = field(default_factory=dict)


def may_go_online(environ: Mapping[str, str]) -> bool:
    """Whether mode `auto` is online: with an API key, where W&B's own variables do not say otherwise."""
    is_off = environ.get("WANDB_MODE", "online") not in ("online", "shared")
    is_off |= environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes")
    return bool(environ.get("WANDB_API_KEY")) and not is_off


def log_run(
    config: WandbConfig,
    meta: Mapping[str, Any],
    summary: Mapping[str, Any],
    output: Path,
    *,
    has_api_key: bool,
    history: Sequence[Mapping[str, Any]] = (),
    images: Mapping[str, Path] | None = None,
) -> str | None:
    """One W&B run with the resolved config and the summary; its files lie beside `output`.

    `history` are lines with a `step`, which become its curves; `images` are PNG files by the name they get there.

    Returns a sentence for people when W&B could not be reached, else None.
    """
    name = config.name or output.parent.name
    run, complaint = _start(replace(config, name=name), _mode(config, has_api_key), meta, output.parent)
    try:
        for line in history:
            run.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])
        if images:
            run.log({name: wandb.Image(str(path)) for name, path in images.items()})
        run.summary.update(_plain(summary))
        run.finish()
    except (wandb.Error, OSError) as error:  # the network went away in the middle
        complaint = _not_taken(name, error)
    return complaint


def log_comparison(
    config: WandbConfig, layouts: Sequence[LayoutLog], report: Path, files: Sequence[Path], *, has_api_key: bool
) -> str | None:
    """One group with a run per layout: summary, tables, images, the HTML `report`, and all `files` as an artifact.

    The group is the config's, else named after the folder of `report`, where W&B's own files go too. Returns a sentence
    for people, once, when W&B could not be reached: that run and those after it are then logged offline.
    """
    folder = report.parent
    config = replace(config, group=config.group or folder.name)
    mode = _mode(config, has_api_key)
    said: str | None = None
    for layout in layouts:
        run, complaint = _start(replace(config, name=layout.name), mode, layout.meta, folder)
        if complaint is not None:
            mode = "offline"
        try:
            _log_layout(run, layout, report, files)
        except (wandb.Error, OSError) as error:  # the network went away in the middle
            complaint = _not_taken(layout.name, error)
        said = said or complaint
    return said


def _log_layout(run: Any, layout: LayoutLog, report: Path, files: Sequence[Path]) -> None:
    run.summary.update(_plain(layout.summary))
    run.log({name: _table(table) for name, table in layout.tables.items()})
    run.log({name: wandb.Image(str(path)) for name, path in layout.images.items()})
    run.log({"report": wandb.Html(report.read_text(encoding="utf-8"), inject=False)})
    # The same name and content in every run of the group: W&B keeps one version of it.
    artifact = wandb.Artifact(_artifact_name(run.group), type="comparison")
    for path in files:
        artifact.add_file(str(path), name=path.relative_to(report.parent).as_posix())
    run.log_artifact(artifact)
    run.finish()


def _mode(config: WandbConfig, has_api_key: bool) -> Mode:
    if config.mode == "auto":
        return "online" if has_api_key else "offline"
    return config.mode


def _start(config: WandbConfig, mode: Mode, meta: Mapping[str, Any], folder: Path) -> tuple[Any, str | None]:
    """A run in `mode`; offline, with a complaint, where W&B does not let it be online."""
    try:
        return _init(config, mode, meta, folder), None
    except (wandb.Error, OSError) as error:
        if mode == "offline":
            raise
        complaint = (
            f"W&B cannot be reached ({_first_line(error)}); logged offline, `wandb sync {folder}/wandb/*` sends it"
        )
        return _init(config, "offline", meta, folder), complaint


def _init(config: WandbConfig, mode: Mode, meta: Mapping[str, Any], folder: Path) -> Any:
    return wandb.init(
        project=config.project,
        name=config.name,
        group=config.group,
        mode=mode,
        dir=str(folder),
        config=dict(meta),
        settings=wandb.Settings(
            silent=True, init_timeout=INIT_TIMEOUT_S, console="off", save_code=False, disable_git=True
        ),
    )


def _not_taken(name: str, error: BaseException) -> str:
    return f"W&B did not take all of {name} ({_first_line(error)}); the local files have it"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _plain(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if not isinstance(value, dict)}


def _table(table: Table) -> Any:
    rows = [[None if isinstance(v, float) and math.isnan(v) else v for v in row] for row in table.rows]
    return wandb.Table(columns=list(table.columns), data=rows, allow_mixed_types=True)


def _artifact_name(group: str) -> str:
    """W&B takes letters, digits, `-`, `_` and `.` in it, up to 128."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in f"{group}-report")[:128]
