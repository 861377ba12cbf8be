"""Files out: a results file that survives a kill at any moment, and what is written beside it.

OUTPUT                  one line per finished sample
OUTPUT.dp1, .dp2, ...   the same of other dp replicas while they run; joined into OUTPUT at the end
OUTPUT.meta.json        how it was made
OUTPUT.summary.json     what came out; only there when OUTPUT holds every sample
OUTPUT.lock             held while a run writes, see `output_lock`
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from cpinfer.engine.request import RolloutResult
from cpinfer.errors import OutputError, UserError
from cpinfer_tools.results.output_lock import close_unlocked, is_at, take_lock

Existing = Literal["refuse", "resume", "overwrite"]
# Of the names beside an output, also while one is written whole or not at all.
_LONGEST_SUFFIX = ".summary.json.new"


def default_output(config_path: str | Path, now: datetime.datetime) -> Path:
    """A folder of its own for a run that names no output: `runs/<config name>-<UTC time>/results.jsonl`."""
    # A name as long as names may be leaves no room for the time.
    stem = Path(config_path).stem.encode(errors="replace")[:200].decode(errors="ignore")
    folder = Path("runs") / f"{stem}-{now:%Y%m%d-%H%M%S}"
    names = chain([folder], (folder.with_name(f"{folder.name}-{i}") for i in count(2)))
    return next(name for name in names if not name.exists()) / "results.jsonl"


def check_output(path: Path, existing: Existing) -> None:
    """UserError when `path` cannot be written, or exists and nobody said what to do with it. Touches nothing."""
    try:
        if path.name:
            _check_names(path)
        if path.is_dir():
            raise UserError(f"output {path} is a folder; a file was wanted.")
        if path.exists() and not path.is_file():
            raise UserError(f"output {path} is a device or a pipe; a file was wanted.")
        left = [part for part in part_paths(path) if part.stat().st_size > 0]
        if existing == "refuse" and (path.exists() or left):
            found = f"output {path}" if path.exists() else f"output {path}: its part {left[0].name}"
            raise UserError(f"{found} exists. Continue it with --resume, or replace it with --overwrite.")
        parent = _nearest_folder(path)
        target = path if path.exists() else parent
        if not parent.is_dir() or not os.access(target, os.W_OK):
            raise UserError(f"output {path} cannot be written: no write access to {target}.")
    except OSError as error:
        raise UserError(f"output {path} cannot be written: {error.strerror}.") from error


def _nearest_folder(path: Path) -> Path:
    """The one of those above it that is there."""
    for folder in path.absolute().parents:
        with suppress(OSError):  # a name that is too long
            if folder.exists():
                return folder
    return Path("/")


def _check_names(path: Path) -> None:
    """UserError for names that are too long for a file system, here or with what is put behind them."""
    if "\0" in str(path):
        raise UserError(f"output {str(path)!r} holds a zero byte, which no name may.")
    longest = os.pathconf(_nearest_folder(path), "PC_NAME_MAX")
    for name in path.absolute().parts:
        more = len(_LONGEST_SUFFIX) if name == path.name else 0
        length = len(os.fsencode(name))
        if length + more > longest:
            beside = f", and files beside it need {more} more" if more else ""
            raise UserError(
                f"output {path}: the name {name[:40]}... has {length} bytes{beside}; the file system takes {longest}. "
                "Use a shorter one."
            )
    path.with_name(path.name + _LONGEST_SUFFIX).exists()  # OSError where all names together are too long


def open_output(path: Path, existing: Existing, meta: Mapping[str, Any]) -> None:
    """Make place for results: a folder, nothing old when overwriting, no torn line when resuming, and the meta file.

    To be called by one process, which holds the output's lock. UserError when it cannot be done.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for part in (path, *part_paths(path)):
            _check_unwritten(part)
        # A summary speaks of a file that is complete.
        summary_path(path).unlink(missing_ok=True)
        if existing == "overwrite":
            for old in (path, *part_paths(path), meta_path(path)):
                old.unlink(missing_ok=True)
        for part in (path, *part_paths(path)):
            if part.exists():
                os.truncate(part, sum(map(len, whole_lines(part))))
        write_json(meta_path(path), meta)
    except OSError as error:
        raise UserError(f"output {path} cannot be opened: {error.strerror} ({error.filename}).") from error
    except OutputError as error:
        raise UserError(f"output {path} cannot be opened: {error}") from error


def _check_unwritten(part: Path) -> None:
    """UserError when a process still writes a file: one of a run whose other ranks have ended."""
    if part.exists():
        descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
        try:
            take_lock(descriptor, part)
        finally:
            os.close(descriptor)


def part_path(path: Path, dp_rank: int) -> Path:
    """Where a dp replica writes while it runs; replica 0 writes the results file itself."""
    return path if dp_rank == 0 else path.with_name(f"{path.name}.dp{dp_rank}")


def part_paths(path: Path) -> list[Path]:
    """The parts of other dp replicas that lie beside a results file."""
    if not path.parent.is_dir():
        return []
    # Not by glob: a name may hold what that takes for a pattern.
    beside = (p for p in path.parent.iterdir() if p.name.startswith(f"{path.name}.dp"))
    return sorted(p for p in beside if p.name[len(path.name) + 3 :].isdigit())


def join_parts(path: Path, key_of: Callable[[Mapping[str, Any]], Hashable], dp_size: int = 1) -> None:
    """Append the parts of other dp replicas to the results file, and remove them. Done twice, it adds nothing twice.

    Parts of `dp_size` replicas are looked for by their names: a folder's listing may be old on another host.
    OutputError when it cannot be done; what is in a part is then still there.
    """
    named = {part_path(path, dp_rank) for dp_rank in range(1, dp_size)}
    try:
        for part in sorted({*part_paths(path), *(part for part in named if part.exists())}):
            there = {key_of(json.loads(line)) for line in whole_lines(path)} if path.exists() else set[Hashable]()
            with path.open("ab") as out:
                out.writelines(line for line in whole_lines(part) if key_of(json.loads(line)) not in there)
                out.flush()
                os.fsync(out.fileno())
            part.unlink()
    except OSError as error:
        raise OutputError(
            f"output {path}: the parts of the replicas could not be joined ({error.strerror}). What is written is safe "
            "in it and in the files .dp1, .dp2, ... beside it; --resume joins them."
        ) from error


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
    """Write a file whole or not at all. OutputError when it cannot be written."""
    new = path.with_name(path.name + ".new")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(json.dumps(data, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise OutputError(f"{path} could not be written: {error.strerror}.") from error


def whole_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file up to its last newline: a kill in the middle of a write leaves a torn line behind it."""
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


class ResultWriter:
    """Appends results to a file, each at once: after a kill every line but the last is whole.

    OutputError as soon as a line does not reach the file, or the file is no longer at its place.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_written = 0
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(f"output {path} could not be opened: {error.strerror}.") from error
        try:
            take_lock(self._descriptor, path)
        except UserError as error:
            os.close(self._descriptor)
            raise OutputError(str(error)) from error

    def write(self, result: RolloutResult) -> None:
        """A line with the fields of a result, but for those that only some results have."""
        line = dataclasses.asdict(result)
        for field in dataclasses.fields(result):
            if field.default is None and line[field.name] is None:
                del line[field.name]
        if result.sampling is not None:
            line["sampling"] = dict(result.sampling)
        if result.routed_experts is not None:
            line["routed_experts"] = result.routed_experts.tolist()
        if result.prompt_logprobs is not None:  # a token that the model rules out: JSON has no -inf
            line["prompt_logprobs"] = [None if p == -math.inf else p for p in result.prompt_logprobs]
        self.write_line(line)

    def write_line(self, line: Mapping[str, Any]) -> None:
        """A line of any kind, whole or not at all."""
        data = _encoded(line)
        before = os.fstat(self._descriptor).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._descriptor, before)
            raise self._lost(f"a line could not be written ({error.strerror})") from error
        if not is_at(self._descriptor, self._path):
            raise self._lost("it was removed or replaced while it was written", is_there=False)
        self._num_written += 1

    def _lost(self, what: str, *, is_there: bool = True) -> OutputError:
        safe = f"The {self._num_written} line(s) that this run had written there before are safe; --resume goes on."
        return OutputError(
            f"output {self._path}: {what}. " + (safe if is_there else "What this run wrote is not in that file.")
        )

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A file system that is not local may say only now that there was no room.
        late = _error_of(os.fsync, self._descriptor)
        late = _error_of(close_unlocked, self._descriptor) or late
        if error is None and late is not None:
            raise OutputError(
                f"output {self._path}: the last lines may not have reached the disk ({late.strerror}). --resume keeps "
                "those that have."
            ) from late


def _error_of(act: Callable[[int], None], descriptor: int) -> OSError | None:
    try:
        act(descriptor)
    except OSError as error:
        return error
    return None


def _encoded(line: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(line, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return (json.dumps(line) + "\n").encode()
