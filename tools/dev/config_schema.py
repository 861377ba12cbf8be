"""The config's classes as a JSON Schema, by which editors complete keys and mark mistakes.

It knows what one value may be. What values must be together, and where a path leads, only reading the config tells.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

from cpinfer.config import KEY_OF_EDITORS
from cpinfer.schema import MAX_TEXT, Bounds, is_union
from cpinfer_tools.run_config import RunConfig

_PLAIN = {int: "integer", float: "number", bool: "boolean", str: "string"}


def config_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of what a config file may hold: all that tools read, and the schema's own address."""
    schema = _object(RunConfig)
    schema["properties"] = {KEY_OF_EDITORS: {"type": "string"}, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Config of cpinfer", **schema}


def _object(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    properties = {}
    for field in dataclasses.fields(cls):
        about = {"description": field.metadata["help"]}
        if field.default is not dataclasses.MISSING and not dataclasses.is_dataclass(field.default):
            about["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
        properties[field.name] = {**about, **_value(hints[field.name], field.metadata)}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _value(hint: Any, rules: Mapping[str, Any]) -> dict[str, Any]:
    """What a field of type `hint` may be."""
    if is_union(hint):
        return {"anyOf": [_value(kind, rules) for kind in typing.get_args(hint)]}
    if hint is type(None):
        return {"type": "null"}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple:
        return _tuple(args, rules)
    if dataclasses.is_dataclass(hint):
        return _object(hint)
    value = {"type": _PLAIN[hint], **({"maxLength": MAX_TEXT} if hint is str else {})}
    return value if rules.get("within") is None else _within(value, rules["within"])


def _tuple(args: tuple[Any, ...], rules: Mapping[str, Any]) -> dict[str, Any]:
    if args[-1] is not ...:
        halves = [_value(arg, {"within": half}) for arg, half in zip(args, rules["within"], strict=True)]
        return {"type": "array", "prefixItems": halves, "minItems": len(args), "maxItems": len(args)}
    items = _value(args[0], rules)
    either = [{"type": "array", "items": items}]
    if args[0] is str:  # one text stands for a list of it
        either.append(items)
    if typing.get_origin(args[0]) is tuple:  # pairs as an object, whose keys JSON makes texts
        number = {"propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"}, "additionalProperties": items["prefixItems"][1]}
        either.append({"type": "object", **number})
    return either[0] if len(either) == 1 else {"anyOf": either}


def _within(number: dict[str, Any], bounds: Bounds) -> dict[str, Any]:
    low = "exclusiveMinimum" if bounds.above_low else "minimum"
    ranged = {**number, low: bounds.low, "maximum": bounds.high}
    return {"anyOf": [{"const": 0}, ranged]} if bounds.or_zero else ranged
