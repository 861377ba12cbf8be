"""Files out: a results file that survives a kill at any moment, and what is written beside it.

OUTPUT                  one line per finished sample
OUTPUT.dp1, .dp2, ...   the same of other dp replicas while they run; joined into OUTPUT at the end
OUTPUT.meta.json        how it was made
OUTPUT.summary.json     what came out
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

from cpinfer.engine.request import RolloutResult
from cpinfer.errors import UserError

Existing = Literal["refuse", "resume", "overwrite"]
SampleKey = tuple[int, int]


def default_output(config_path: str | Path, now: datetime.datetime) -> Path:
    """A folder of its own for a run that names no output: `runs/<config name>-<UTC time>/results.jsonl`."""
    return Path("runs") / f"{Path(config_path).stem}-{now:%Y%m%d-%H%M%S}" / "results.jsonl"


def check_output(path: Path, existing: Existing) -> None:
    """UserError when `path` cannot be written, or exists and nobody said what to do with it. Touches nothing."""
    if path.is_dir():
        raise UserError(f"output {path} is a folder; a file was wanted.")
    if path.exists() and existing == "refuse":
        raise UserError(f"output {path} exists. Continue it with --resume, or replace it with --overwrite.")
    parent = next(p for p in path.absolute().parents if p.exists())
    target = path if path.exists() else parent
    if not parent.is_dir() or not os.access(target, os.W_OK):
        raise UserError(f"output {path} cannot be written: no write access to {target}.")


def check_resumable(path: Path, meta: Mapping[str, Any]) -> None:
    """UserError when the run that `path` belongs to was another one: its results must not be mixed with these."""
    old = meta_path(path)
    if not path.exists() or not old.exists():
        return
    before = json.loads(old.read_text(encoding="utf-8"))
    for key in ("model", "dtype", "sampling", "input"):
        if before["config"].get(key) != meta["config"].get(key):
            raise UserError(
                f"output {path} was made with {key}={json.dumps(before['config'].get(key))}, this run has "
                f"{json.dumps(meta['config'].get(key))}. Use the same, another --output, or --overwrite."
            )


def read_finished(path: Path) -> frozenset[SampleKey]:
    """The samples that a results file and its dp parts hold. A torn last line, left by a kill, is cut off the file."""
    finished: set[SampleKey] = set()
    for part in (path, *part_paths(path)):
        if part.exists():
            finished.update(_read_keys(part))
    return frozenset(finished)


def part_path(path: Path, dp_rank: int) -> Path:
    """Where a dp replica writes while it runs; replica 0 writes the results file itself."""
    return path if dp_rank == 0 else path.with_name(f"{path.name}.dp{dp_rank}")


def part_paths(path: Path) -> list[Path]:
    """The parts of other dp replicas that lie beside a results file."""
    return sorted(p for p in path.parent.glob(f"{path.name}.dp*") if p.suffix[3:].isdigit())


def join_parts(path: Path) -> None:
    """Append the parts of other dp replicas to the results file, and remove them."""
    for part in part_paths(path):
        with path.open("a", encoding="utf-8") as out:
            out.write(part.read_text(encoding="utf-8"))
        part.unlink()


def remove_results(path: Path) -> None:
    """Forget an earlier run: its results, parts, meta and summary."""
    for old in (path, *part_paths(path), meta_path(path), summary_path(path)):
        old.unlink(missing_ok=True)


def meta_path(path: Path) -> Path:
    return path.with_name(path.name + ".meta.json")


def summary_path(path: Path) -> Path:
    return path.with_name(path.name + ".summary.json")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


class ResultWriter:
    """Appends results to a file, each at once: after a kill every line but the last is whole."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, result: RolloutResult) -> None:
        self._file.write(json.dumps(dataclasses.asdict(result), ensure_ascii=False) + "\n")
        self._file.flush()

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _read_keys(path: Path) -> list[SampleKey]:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    try:
        lines = [json.loads(line) for line in data[:whole].splitlines()]
        return [(line["prompt_index"], line["sample_index"]) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"output {path} holds lines that are not results ({error}). Use another --output.") from error
