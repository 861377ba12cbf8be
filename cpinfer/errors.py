"""The errors a user can meet. Each message says what is, what was wanted, and what to do."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from typing import Any

MAX_QUOTED = 60
# So many known words are still listed where none of them is near.
MAX_LISTED_CHARS = 160


class UserError(ValueError):
    """Bad config or input, found before any model is loaded. Tools print its message without a traceback and exit 2.

    Where a call was given many things and one of them is bad, `place` is its number there, from 0, else None; `reason`
    is the message without that number, for callers who know the thing by another name.
    """

    place: int | None = None

    @property
    def reason(self) -> str:
        return str(self) if self.place is None else str(self.__cause__)


class UnsupportedError(UserError):
    """Something listed in the table of what is refused (`cpinfer.refusals`)."""


class PeerLostError(RuntimeError):
    """A collective failed because another rank ended. That rank's error is the cause; this one is only its echo."""


class RanksMissingError(PeerLostError):
    """Some ranks did not come to what others waited for. The message names them, their hosts and the step.

    `ranks` are those, of the world; empty where it is not known who.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class BackendFaultError(RuntimeError):
    """An attention backend does not compute what it should, on a few tokens at start-up. Nothing was run with it."""


class EngineFaultError(RuntimeError):
    """A step produced something that cannot be right (NaN logits, leaked blocks). Raised on every rank alike."""


class NoTokenError(EngineFaultError):
    """A step left a request no token to choose: its parameters and the model rule out all of them."""


class RanksDifferError(RuntimeError):
    """Ranks of one replica did not make the same call. Raised on every rank alike, before anything ran."""


class StreamEndedError(RanksDifferError):
    """Some ranks stopped taking the results of a stream while others went on. Raised on every rank at the next step.

    `places` are those ranks, by their place in the replica.
    """

    def __init__(self, message: str, places: tuple[int, ...]) -> None:
        super().__init__(message)
        self.places = places


class OutputError(RuntimeError):
    """Results cannot be written, or are not all where they were written. The message says what is safe; exit 1."""


class ModelChangedError(RuntimeError):
    """A model became another one while an engine was attached to it (dtype, device, modules, mode). Nothing was run."""


def quoted(value: Any, limit: int = MAX_QUOTED) -> str:
    """A value as a message shows it: as JSON, cut to `limit` characters; what is no data by its type.

    >>> quoted({"a": None}), quoted("x" * 100, limit=12)
    ('{"a": null}', '"xxxxxxxx...')
    """
    try:
        text = json.dumps(value, default=str)
    except (TypeError, ValueError, RecursionError):  # odd keys, cycles or numbers of many digits, deep nesting
        text = f"of type {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def unknown_word(kind: str, word: object, known: Collection[str], where: str = "") -> str:
    """That a word is not among the known ones: the nearest if one is near, else all of them if they are few.

    >>> unknown_word("key", "modle", ["model", "dtype"])
    'unknown key "modle"; the nearest known key is "model".'
    """
    name = quoted(where + word if isinstance(word, str) else word, limit=120)
    near = difflib.get_close_matches(word, known, n=1) if isinstance(word, str) else []
    if near:
        return f'unknown {kind} {name}; the nearest known {kind} is "{where}{near[0]}".'
    listed = ", ".join(known)
    if len(listed) <= MAX_LISTED_CHARS:
        return f"unknown {kind} {name}; the known ones are {listed}."
    return f"unknown {kind} {name}; no known {kind} is near it."
