"""JSON as it is meant to be read: what the standard library lets pass, and nobody wants, is refused.

Of two equal keys the second would win in silence; NaN, Infinity and numbers that no float holds are no JSON.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cpinfer.errors import UserError, quoted


class NotJSONError(UserError):
    """A text that is no JSON."""


def parse_json(text: str) -> Any:
    """The value that a JSON text holds. UserError, as `NotJSONError` where the text is no JSON at all.

    >>> parse_json('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
    """
    not_finite: list[str] = []

    def number(written: str) -> float:
        value = float(written)
        if not math.isfinite(value):
            not_finite.append(written)
        return value

    try:
        data = json.loads(text, object_pairs_hook=_object, parse_float=number, parse_constant=number)
    except UserError:
        raise
    except ValueError as error:
        raise NotJSONError(f"not valid JSON: {error}.") from error
    except RecursionError as error:
        raise UserError("the JSON is nested too deeply; a few levels were wanted.") from error
    if not_finite:
        where = _first_not_finite(data, "")
        found = f"{quoted(where, limit=120)} is " if where else ""
        raise NotJSONError(f"not valid JSON: {found}{quoted(not_finite[0])[1:-1]}; a finite number was wanted.")
    return data


def require_finite(data: Any) -> None:
    """UserError where plain data of another notation has NaN or Infinity in it, which JSON has no word for."""
    where = _first_not_finite(data, "")
    if where is not None:
        raise UserError(f"{quoted(where, limit=120)} is not finite; a finite number was wanted.")


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, without the mark that some editors put before it. OSError, UnicodeDecodeError."""
    return Path(path).read_text(encoding="utf-8-sig")


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON may spell halves of surrogate pairs, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UserError(f"the key {quoted(twice)} stands twice in one object; once was wanted.")
    return found


def _first_not_finite(data: Any, where: str) -> str | None:
    """Where the first number that is not finite stands; None when there is none."""
    if isinstance(data, dict):
        inner = [(value, f"{where}.{key}" if where else key) for key, value in data.items()]
    elif isinstance(data, list):
        inner = [(value, f"{where}[{i}]") for i, value in enumerate(data)]
    else:
        return where if isinstance(data, float) and not math.isfinite(data) else None
    return next((place for value, at in inner if (place := _first_not_finite(value, at)) is not None), None)
