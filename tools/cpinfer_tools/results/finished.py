"""What a results file holds already, and whether it is of this run: nothing is continued that was made otherwise.

A run's meta file says what its results are made of, part by part: small values as they are, large ones (prompts,
weights, ...) as hashes of their contents. Paths are no part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cpinfer.config import config_to_dict
from cpinfer.engine.request import Prompt
from cpinfer.errors import OutputError, UserError, quoted
from cpinfer_tools.results.output import meta_path, part_paths, read_meta, whole_lines
from cpinfer_tools.run_config import RunConfig

SampleKey = tuple[int, int]
Line = Mapping[str, Any]
Key = TypeVar("Key", bound=Hashable)
_INSTEAD = "Use another --output, or --overwrite."
_HASH = "sha256:"


def content_hash(items: Iterable[Any]) -> str:
    """A hash of plain data, item by item in their order."""
    found = hashlib.sha256()
    for item in items:
        found.update(json.dumps(item, sort_keys=True).encode() + b"\n")
    return _HASH + found.hexdigest()


def numbers_of(config: RunConfig) -> dict[str, Any]:
    """The part of a config that decides which numbers come out, beside model and prompts; layouts do not."""
    wire = config.dtype if config.cp_wire_dtype == "auto" else config.cp_wire_dtype
    values = {"dtype": config.dtype, "kv_cache_dtype": config.kv_cache_dtype, "cp_wire_dtype": wire}
    return {**values, "sampling": config_to_dict(config)["sampling"]}


def whole_number(line: Line, name: str) -> int:
    """A number that counts, of a line. ValueError for anything else, `5.0`, `"5"` and `true` among them."""
    if name not in line:
        raise ValueError(f'"{name}" is missing')
    value = line[name]
    if type(value) is not int or value < 0:
        raise ValueError(f'"{name}" is {quoted(value)}; a whole number of at least 0 was wanted')
    return value


def rollout_key(line: Line) -> SampleKey:
    """What tells one line of a rollout from the others."""
    return whole_number(line, "prompt_index"), whole_number(line, "sample_index")


def rollout_lines(prompts: Iterable[tuple[Prompt, int]]) -> dict[SampleKey, Line]:
    """The lines that a rollout of prompts, each with its number of samples, is to leave, by key, with what is known."""
    lines: dict[SampleKey, Line] = {}
    for prompt, n in prompts:
        known = {"id": prompt.id, "prompt_token_ids": list(prompt.token_ids)}
        lines |= {(prompt.index, sample): known for sample in range(n)}
    return lines


def prompts_hash(prompts: Iterable[Prompt]) -> str:
    """A hash of prompts, with what they say of their own sampling."""
    return content_hash(
        [prompt.index, prompt.id, prompt.token_ids, *([dict(prompt.sampling)] if prompt.sampling else [])]
        for prompt in prompts
    )


def read_finished(
    path: Path, meta: Mapping[str, Any], expected: Mapping[Key, Line], key_of: Callable[[Line], Key]
) -> frozenset[Key]:
    """The samples that an earlier run left in `path` and its dp parts; none when there was no run. Touches nothing.

    `expected`: the lines of this run by key, with fields that they must have. `key_of` reads a line's key; ValueError
    says why it is none. UserError when that run was another one (`meta` is this run's), or when it cannot be known:
    its results must not be mixed with these.
    """
    parts = [part for part in (path, *part_paths(path)) if part.exists()]
    if not meta_path(path).exists():
        if any(next(whole_lines(part), None) is not None for part in parts):
            raise UserError(
                f"output {path} has no {meta_path(path).name} beside it: what it was made of is not known. {_INSTEAD}"
            )
        return frozenset()
    _check_made_of(path, read_meta(path).get("made_of"), meta["made_of"])
    found: dict[Key, bytes] = {}
    for part in parts:
        for key, line in _read_lines(part, expected, key_of).items():
            # A kill may come between the joining of a part and its removal.
            if found.setdefault(key, line) != line:
                raise UserError(f"output {path} and {part.name} hold different lines for one sample, {key}. {_INSTEAD}")
    return frozenset(found)


def check_complete(path: Path, expected: Mapping[Key, Line], key_of: Callable[[Line], Key]) -> int:
    """The number of samples that a results file holds: all of them. OutputError when one is missing, or is none."""
    try:
        found = _read_lines(path, expected, key_of)
    except (OSError, UserError) as error:
        raise OutputError(f"output {path} does not hold what was generated: {error}") from error
    missing = [key for key in expected if key not in found]
    if missing:
        raise OutputError(
            f"output {path} holds {len(found)} of {len(expected)} samples; missing are {missing[0]} and "
            f"{len(missing) - 1} more. --resume generates them."
        )
    return len(found)


def _check_made_of(path: Path, before: Any, now: Mapping[str, Any]) -> None:
    if not isinstance(before, dict):
        raise UserError(
            f"output {path} is of a version that did not write down what its results are made of, so it cannot be "
            f"known whether this run would continue them. {_INSTEAD}"
        )
    before, now = flat(before), flat(now)
    for name in (*now, *(name for name in before if name not in now)):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if str(new or old).startswith(_HASH):
            raise UserError(
                f"the {name.replace('_', ' ')} differ from those that output {path} was made of. {_INSTEAD}"
            )
        raise UserError(
            f"output {path} was made with {name}={json.dumps(old)}, this run has {json.dumps(new)}. Use the same, "
            "another --output, or --overwrite."
        )


def flat(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Objects within objects as one, by keys as a config has them: `sampling.seed`.

    >>> flat({"a": 1, "b": {"c": 2, "d": {}}})
    {'a': 1, 'b.c': 2}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{where}{name}.") if isinstance(value, Mapping) else {f"{where}{name}": value}
    return found


def _read_lines(path: Path, expected: Mapping[Key, Line], key_of: Callable[[Line], Key]) -> dict[Key, bytes]:
    """Hashes of the lines of one file by key. UserError, with its number, for a line that is none of `expected`."""
    found: dict[Key, bytes] = {}
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            key = _checked_key(json.loads(line), expected, key_of)
            if key in found:
                raise ValueError(f"the sample {key} stands there a second time")
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"output {path} holds lines that are not results (line {number}: {error}). {_INSTEAD}"
            ) from error
        found[key] = hashlib.sha256(line).digest()
    return found


def _checked_key(line: Any, expected: Mapping[Key, Line], key_of: Callable[[Line], Key]) -> Key:
    if not isinstance(line, dict):
        raise ValueError(f"found {quoted(line)}; an object was wanted")
    key = key_of(line)
    if key not in expected:
        raise ValueError(f"{key} is no sample of this run")
    for name, wanted in expected[key].items():
        if line.get(name) != wanted:
            raise ValueError(f'"{name}" is {quoted(line.get(name))}; {quoted(wanted)} was wanted')
    if not isinstance(line.get("token_ids"), list) or not line["token_ids"]:
        raise ValueError('it has no "token_ids"')
    return key
