"""What has to be the same on every rank, as named values: one number that stands for all of it, and the first of the
values in which ranks differ.

    {"call": "generate", "sampling": SamplingParams(seed=1, ...), "prompts": (Prompt(...), ...)}

    leaves      call = "generate"   sampling.temperature = 1.0   ...   prompts.count = 2   prompts[0].token_ids = [...]
    digest      64 bits of all names and values
    difference  "rank 1 has sampling.seed 2, rank 0 has 1"
"""

from __future__ import annotations

import array
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import NamedTuple

# Characters of a value that a message shows.
_SHOWN = 60


class Entry(NamedTuple):
    """A leaf as it travels: a digest stands for its value."""

    name: str
    digest: str
    shown: str


_NOTHING = Entry("", "", "nothing more")


def digest_of(same: Mapping[str, object]) -> int:
    """64 bits of all names and values, as a signed whole number.

    >>> digest_of({"block_size": 16}) == digest_of({"block_size": 16})
    True
    >>> digest_of({"block_size": 16}) == digest_of({"block_size": 32})
    False
    """
    found = hashlib.blake2b(digest_size=8)
    for name, value in leaves(same):
        packed = _packed(value)
        # With its length, so that no value can pass for the name behind it.
        found.update(f"{name} {len(packed)} ".encode())
        found.update(packed)
    return int.from_bytes(found.digest(), signed=True)


def leaves(same: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """What cannot be taken apart further, in order and by dotted name; taken apart are dataclasses, mappings, and
    sequences of such or of sequences.
    """
    for name, value in same.items():
        yield from _leaves(name, value)


def table_of(same: Mapping[str, object]) -> str:
    """All leaves as text that travels."""
    return json.dumps([Entry(name, _hex(_packed(value)), _show(value)) for name, value in leaves(same)])


def difference(tables: Sequence[str], ranks: Sequence[int], references: Sequence[int]) -> str | None:
    """Where the first rank that differs does so first, in words; None when all agree.

    `tables[i]` is what `ranks[i]` has, to be compared with what `tables[references[i]]` says.

    >>> tables = [table_of({"dtype": "float32", "block_size": size}) for size in (16, 32, 16, 32)]
    >>> difference(tables, ranks=[4, 5, 6, 7], references=[0, 0, 0, 0])
    'ranks 5, 7 have block_size 32, rank 4 has 16'
    """
    read = [[Entry(*entry) for entry in json.loads(table)] for table in tables]
    found = [_first_unequal(own, read[reference]) for own, reference in zip(read, references, strict=True)]
    places = [place for place in found if place is not None]
    if not places:
        return None
    at = min(places)
    reference = references[found.index(at)]
    wanted = _at(read[reference], at)
    others: dict[Entry, list[int]] = {}
    for i, own in enumerate(read):
        if found[i] == at and references[i] == reference:
            others.setdefault(_at(own, at), []).append(ranks[i])
    told = [f"{_subject(its_ranks)} {_words(entry, wanted)}" for entry, its_ranks in others.items()]
    same_name = all(entry.name == wanted.name for entry in others)
    told_wanted = _words(wanted, next(iter(others))).removeprefix(f"{wanted.name} " if same_name else "")
    return f"{', '.join(told)}, rank {ranks[reference]} has {told_wanted}"


def _first_unequal(own: Sequence[Entry], other: Sequence[Entry]) -> int | None:
    for at in range(max(len(own), len(other))):
        if _at(own, at)[:2] != _at(other, at)[:2]:
            return at
    return None


def _at(table: Sequence[Entry], at: int) -> Entry:
    return table[at] if at < len(table) else _NOTHING


def _subject(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"


def _words(entry: Entry, other: Entry) -> str:
    """Name and value; of values too long to show, at least that they differ."""
    digest = f"(digest {entry.digest})" if (entry.name, entry.shown) == (other.name, other.shown) else ""
    return " ".join(filter(None, (entry.name, entry.shown, digest)))


def _leaves(name: str, value: object) -> Iterator[tuple[str, object]]:
    if is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _leaves(f"{name}.{field.name}", getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}", item)
    elif isinstance(value, (tuple, list)) and value and _is_composed(value[0]):
        yield f"{name}.count", len(value)
        for i, item in enumerate(value):
            yield from _leaves(f"{name}[{i}]", item)
    else:
        yield name, value


def _is_composed(value: object) -> bool:
    return isinstance(value, (Mapping, tuple, list)) or is_dataclass(value)


def _packed(value: object) -> bytes:
    """A value as bytes, the same for equal values in every process."""
    if isinstance(value, (tuple, list)) and value and type(value[0]) is int:
        with suppress(TypeError, OverflowError):  # token ids: a tenth of the time that their text takes
            return array.array("q", value).tobytes()
    return repr(value).encode(errors="surrogatepass")


def _hex(packed: bytes) -> str:
    return hashlib.blake2b(packed, digest_size=8).hexdigest()


def _show(value: object) -> str:
    if isinstance(value, bytes):
        return _hex(value)
    if isinstance(value, (tuple, list)) and len(value) > 8:
        return f"{_show(list(value[:8]))[:-1]}, ...] ({len(value)} in all)"
    shown = repr(list(value) if isinstance(value, tuple) else value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
