"""A frozen dataclass as a schema: what its fields say is what JSON and callers in Python alike are held to.

    @dataclass(frozen=True)
    class Sizes(Checked):
        tp_size: int = key("ranks that share the weights", 1, within=Bounds(1, 64))

    Sizes(tp_size=0)                          UserError: "tp_size" is 0; it must be at least 1 and at most 64.
    parse_object(Sizes, {"tp_sise": 2})       UserError: unknown key "tp_sise"; the nearest known key is "tp_size".

A field is a number within its bounds, a text, a bool, one of a few literals, a number or one of those, a schema again,
or a tuple of these. What numpy and torch made of numbers becomes Python's, a list becomes a tuple, and one text stands
for a tuple of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from cpinfer.errors import UserError, quoted, unknown_word
from cpinfer.strict_json import is_unicode

T = TypeVar("T")

# Of one text: a path or a name is shorter, and a message has to show it.
MAX_TEXT = 4096
_NUMBERS = (int, float)
_PLAIN = (int, float, bool, str, list, tuple, dict, type(None))


@dataclass(frozen=True)
class Bounds:
    """From where to where a number goes. `above_low`: `low` itself is out; `or_zero`: 0 is in, wherever `low` is.

    >>> str(Bounds(0, 1, above_low=True)), 0 in Bounds(0, 1, above_low=True), 1 in Bounds(0, 1)
    ('above 0 and at most 1', False, True)
    >>> Bounds(1, 2**20).short
    '1 to 2^20'
    """

    low: float
    high: float
    above_low: bool = False
    or_zero: bool = False

    def __contains__(self, number: float) -> bool:
        if self.or_zero and number == 0:
            return True
        return (self.low < number if self.above_low else self.low <= number) and number <= self.high

    def __str__(self) -> str:
        zero = "0, or " if self.or_zero else ""
        return f"{zero}{'above' if self.above_low else 'at least'} {self.low} and at most {self.high}"

    @property
    def short(self) -> str:
        """The same for a table."""
        zero, above = "0, " if self.or_zero else "", "above " if self.above_low else ""
        return f"{zero}{above}{_power(self.low)} to {_power(self.high)}"


def key(
    help: str,
    default: Any = dataclasses.MISSING,
    factory: Any = dataclasses.MISSING,
    *,
    within: Bounds | tuple[Bounds, ...] | None = None,
    any_text: bool = False,
) -> Any:
    """A field with the sentence that docs/reference/config.md prints for it, and what its numbers are held to.

    Of a tuple the bounds are those of each item, of pairs those of either half. `any_text` may hold NUL, which no
    path and no name can.
    """
    metadata = {"help": help, "within": within, "any_text": any_text}
    return field(default=default, default_factory=factory, metadata=metadata)


class Checked:
    """What a schema inherits: whoever makes one, from JSON or in Python, has its fields checked and made plain."""

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for name, (hint, rules) in _fields_of(cls).items():
            given = getattr(self, name)
            value = conform(hint, given, name, rules)
            if value is not given:
                object.__setattr__(self, name, value)


def require(ok: bool, name: str, value: Any, wanted: str) -> None:
    """UserError unless `ok`: for what fields of a schema must be together."""
    if not ok:
        raise UserError(f'"{name}" is {quoted(value)}; it must be {wanted}.')


def parse_object(cls: type[T], data: Mapping[Any, Any], where: str = "") -> T:
    """A `cls` from plain data. UserError for an unknown key, a wrong type or an illegal value, with its place."""
    if not where and issubclass(typing.cast("type[Any]", cls), Checked):
        _known(cls, data, where)
        return cls(**data)  # which looks at each value itself, under the same name
    return cls(**conform_keys(cls, data, where))


def conform_keys(cls: Any, data: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Some of the keys of a `cls`, as its fields hold them. UserError as `parse_object` has it.

    What values must be together is asked where a `cls` is made.
    """
    known = _known(cls, data, where)
    return {name: conform(known[name][0], value, where + name, known[name][1]) for name, value in data.items()}


def conform(hint: Any, value: Any, where: str, rules: Mapping[str, Any] = types.MappingProxyType({})) -> Any:
    """`value` as a field of type `hint` holds it. UserError, naming `where`, when it is no such thing."""
    if type(value) is hint and hint in _NUMBERS:  # most are, and need no look at the kinds below
        return _conform_number(hint, value, where, rules.get("within"))
    if type(value) not in _PLAIN and hasattr(value, "tolist"):  # of numpy or torch: numbers and arrays
        value = value.tolist()
    hint = _kind_of(value, _without_none(hint)) if value is not None else hint
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if value is None and type(None) in args:
        return None
    if origin is Literal:
        # 1 == True == 1.0, but only one of them was meant.
        if any(type(value) is type(arg) and value == arg for arg in args):
            return value
    elif origin is tuple:
        return _conform_tuple(args, value, where, rules)
    elif dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast("type[Any]", hint)):
            return value
        if isinstance(value, Mapping):
            return parse_object(typing.cast("type[Any]", hint), value, where + ".")
    elif hint is bool or hint is str:
        if isinstance(value, bool) and hint is bool:
            return value
        if isinstance(value, str) and hint is str:
            return _conform_text(value, where, rules)
    elif isinstance(value, numbers.Integral if hint is int else numbers.Real) and not isinstance(value, bool):
        return _conform_number(hint, value, where, rules.get("within"))
    raise UserError(f'"{where}" is {quoted(value)}; {_wanted(hint)} was wanted.')


def _conform_tuple(args: tuple[Any, ...], value: Any, where: str, rules: Mapping[str, Any]) -> tuple[Any, ...]:
    is_list = args[-1] is ...
    if is_list and typing.get_origin(args[0]) is tuple and isinstance(value, Mapping):
        # Pairs are written as an object, whose keys JSON makes texts.
        value = [(_number_of(name), item) for name, item in value.items()]
    if is_list and args[0] is str and isinstance(value, str):
        value = (value,)
    if not isinstance(value, (list, tuple)) or not (is_list or len(value) == len(args)):
        raise UserError(f'"{where}" is {quoted(value)}; {_wanted_tuple(args)} was wanted.')
    if is_list:
        items = tuple(conform(args[0], item, f"{where}[{i}]", rules) for i, item in enumerate(value))
    else:
        halves = rules.get("within") or [None] * len(args)
        items = tuple(
            conform(arg, item, where, {**rules, "within": half})
            for arg, item, half in zip(args, value, halves, strict=True)
        )
    # The same object where nothing changed: a schema that is made anew of another is not copied.
    return value if type(value) is tuple and all(a is b for a, b in zip(items, value, strict=True)) else items


def _conform_text(value: str, where: str, rules: Mapping[str, Any]) -> str:
    if len(value) > MAX_TEXT:
        raise UserError(f'"{where}" is {quoted(value)}, of {len(value)} characters; at most {MAX_TEXT} were wanted.')
    if not is_unicode(value) or ("\0" in value and not rules.get("any_text")):
        raise UserError(f'"{where}" is {quoted(value)}; a text without NUL and halves of surrogate pairs was wanted.')
    return value if type(value) is str else str.__str__(value)


def _conform_number(hint: Any, value: Any, where: str, within: Bounds | None) -> Any:
    try:
        number = value if type(value) is hint else hint(value)
    except OverflowError:  # whole numbers that no float holds
        number = math.inf
    if within is not None and number not in within:
        raise UserError(f'"{where}" is {quoted(value)}; it must be {within}.')
    return number


def _number_of(name: Any) -> Any:
    """What a key of a JSON object stands for where keys are numbers: digits as JSON itself would write them."""
    if isinstance(name, str) and name.isascii() and name.isdigit() and len(name) < 20 and str(int(name)) == name:
        return int(name)
    return name


def _wanted(hint: Any) -> str:
    hint = _without_none(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if is_union(hint):
        return " or ".join(map(_wanted, args))
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(quoted, args))
    if origin is tuple:
        return _wanted_tuple(args)
    if dataclasses.is_dataclass(hint):
        return "an object with keys " + ", ".join(f.name for f in dataclasses.fields(hint))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[hint]


def _wanted_tuple(args: tuple[Any, ...]) -> str:
    if args[-1] is ...:
        return f"a list, each item {_wanted(args[0])},"
    return "a pair of " + " and ".join(map(_wanted, args))


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _without_none(hint: Any) -> Any:
    """What a hint allows beside None: a type, or several where one is a word."""
    if not is_union(hint):
        return hint
    kinds = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return kinds[0] if len(kinds) == 1 else typing.Union[tuple(kinds)]  # noqa: UP007


def _kind_of(value: Any, hint: Any) -> Any:
    """Of a number or a word, whichever a text, or anything else, was meant as; the hint where it allows one kind."""
    if not is_union(hint):
        return hint
    kinds = typing.get_args(hint)
    is_word = isinstance(value, str)
    wanted = next(kind for kind in kinds if (typing.get_origin(kind) is Literal) == is_word)
    if is_word and value not in typing.get_args(wanted):
        return hint  # neither: refused as what may be either
    return wanted


def _known(cls: Any, data: Mapping[Any, Any], where: str) -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """Type and rules of each field. UserError for a key of `data` that is none of them."""
    known = _fields_of(cls)
    for name in data:
        if not isinstance(name, str) or name not in known:
            raise UserError(unknown_word("key", name, known, where))
    return known


def _power(number: float) -> str:
    """A number for a table: powers of two as such from 2^16 on, one less than these too.

    >>> _power(1), _power(2**20), _power(2**64 - 1), _power(1e20)
    ('1', '2^20', '2^64 - 1', '1e+20')
    """
    if isinstance(number, int) and number >= 2**16:
        if number & (number - 1) == 0:
            return f"2^{number.bit_length() - 1}"
        if number & (number + 1) == 0:
            return f"2^{number.bit_length()} - 1"
    return str(number)


@functools.cache
def _fields_of(cls: Any) -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """Type and rules of each field: reading them from annotations takes longer than checking an object."""
    hints = typing.get_type_hints(cls)
    return {f.name: (hints[f.name], f.metadata) for f in dataclasses.fields(cls)}
