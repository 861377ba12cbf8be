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
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO, TypeVar

from cpinfer.engine.request import RolloutResult
from cpinfer.errors import UserError

Existing = Literal["refuse", "resume", "overwrite"]
SampleKey = tuple[int, int]
Key = TypeVar("Key", bound=Hashable)
# What must be the same in a run and in the one it continues.
ROLLOUT_MUST_AGREE = ("model", "dtype", "kv_cache_dtype", "sampling", "input")


def rollout_key(line: Mapping[str, Any]) -> SampleKey:
    """What tells one line of a rollout from the others."""
    return int(line["prompt_index"]), int(line["sample_index"])


def default_output(config_path: str | Path, now: datetime.datetime) -> Path:
    """A folder of its own for a run that names no output: `runs/<config name>-<UTC time>/results.jsonl`."""
    folder = Path("runs") / f"{Path(config_path).stem}-{now:%Y%m%d-%H%M%S}"
    names = chain([folder], (folder.with_name(f"{folder.name}-{i}") for i in count(2)))
    return next(name for name in names if not name.exists()) / "results.jsonl"


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


def read_finished(
    path: Path,
    meta: Mapping[str, Any],
    key_of: Callable[[Mapping[str, Any]], Key] = rollout_key,  # type: ignore[assignment]
    must_agree: Sequence[str] = ROLLOUT_MUST_AGREE,
) -> frozenset[Key]:
    """The samples that an earlier run left in `path` and its dp parts; none when there was no run. Touches nothing.

    `key_of` reads a line's key; ValueError, KeyError or TypeError say that it is no such line. UserError when that run
    was another one (`meta` is this run's): its results must not be mixed with these.
    """
    if meta_path(path).exists():
        # Runs from before there was this key kept all bits.
        before = {"kv_cache_dtype": "auto", **read_meta(path)["config"]}
        for key in must_agree:
            if before.get(key) != meta["config"].get(key):
                raise UserError(
                    f"output {path} was made with {key}={json.dumps(before.get(key))}, this run has "
                    f"{json.dumps(meta['config'].get(key))}. Use the same, another --output, or --overwrite."
                )
    return frozenset(key for part in (path, *part_paths(path)) if part.exists() for key in _read_keys(part, key_of))


def open_output(path: Path, existing: Existing, meta: Mapping[str, Any]) -> None:
    """Make place for results: a folder, nothing old when overwriting, no torn line when resuming, and the meta file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if existing == "overwrite":
        for old in (path, *part_paths(path), meta_path(path), summary_path(path)):
            old.unlink(missing_ok=True)
    for part in (path, *part_paths(path)):
        if part.exists():
            os.truncate(part, len(_whole_lines(part)))
    write_json(meta_path(path), meta)


def part_path(path: Path, dp_rank: int) -> Path:
    """Where a dp replica writes while it runs; replica 0 writes the results file itself."""
    return path if dp_rank == 0 else path.with_name(f"{path.name}.dp{dp_rank}")


def part_paths(path: Path) -> list[Path]:
    """The parts of other dp replicas that lie beside a results file."""
    return sorted(p for p in path.parent.glob(f"{path.name}.dp*") if p.suffix[3:].isdigit())


def join_parts(path: Path, key_of: Callable[[Mapping[str, Any]], Hashable] = rollout_key) -> None:
    """Append the parts of other dp replicas to the results file, and remove them. Done twice, it adds nothing twice."""
    for part in part_paths(path):
        there = set(_read_keys(path, key_of)) if path.exists() else set()
        lines = zip(_read_keys(part, key_of), _whole_lines(part).splitlines(keepends=True), strict=True)
        with path.open("ab") as out:
            out.writelines(line for key, line in lines if key not in there)
        part.unlink()


def meta_path(path: Path) -> Path:
    return path.with_name(path.name + ".meta.json")


def summary_path(path: Path) -> Path:
    return path.with_name(path.name + ".summary.json")


def read_meta(path: Path) -> dict[str, Any]:
    """The meta file beside a results file. UserError when it cannot be read or holds no config."""
    try:
        meta = json.loads(meta_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{meta_path(path)} cannot be read: {error}. Use another --output, or --overwrite.") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("config"), dict):
        raise UserError(f"{meta_path(path)} holds no config. Use another --output, or --overwrite.")
    return meta


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    new.replace(path)


class ResultWriter:
    """Appends results to a file, each at once: after a kill every line but the last is whole."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, result: RolloutResult) -> None:
        """A line with the fields of a result."""
        line = dataclasses.asdict(result)
        if result.top_logprobs is None:
            del line["top_logprobs"]
        self.write_line(line)

    def write_line(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _whole_lines(path: Path) -> bytes:
    """What a file holds up to its last newline: a kill in the middle of a write leaves a torn line behind it."""
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1]


def _read_keys(path: Path, key_of: Callable[[Mapping[str, Any]], Key]) -> list[Key]:
    try:
        return [key_of(json.loads(line)) for line in _whole_lines(path).splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"output {path} holds lines that are not results ({error}). Use another --output.") from error
