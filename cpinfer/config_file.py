"""The file of a config: JSON, or TOML by its ending, and the paths in it.

What either notation lets pass and no config wants is refused.
"""

from __future__ import annotations

import tomllib
from os import PathLike
from pathlib import Path
from typing import Any, overload

from cpinfer.errors import UserError, quoted
from cpinfer.strict_json import parse_json, read_text, require_finite


def read_config_file(path: str | PathLike[str]) -> dict[str, Any]:
    """The keys and values that a config file holds. UserError for what cannot be read, or is no object.

    A file that ends in `.toml` is TOML, any other JSON.
    """
    is_toml = Path(path).suffix.lower() == ".toml"
    form = "TOML" if is_toml else "JSON"
    try:
        text = read_text(Path(path))
    except OSError as error:
        raise UserError(f"{error.strerror}. A {form} file with config keys was wanted.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"not valid {form}: {error}.") from error
    data = parse_toml(text) if is_toml else parse_json(text)
    if not isinstance(data, dict):
        raise UserError(f"the file holds a {type(data).__name__}, an object with config keys was wanted.")
    return data


def parse_toml(text: str) -> dict[str, Any]:
    """The table that a TOML text holds. UserError where it is none, or has numbers that are not finite.

    >>> parse_toml("dtype = 'float32'\\n[sampling]\\ntemperature = 1e-3")
    {'dtype': 'float32', 'sampling': {'temperature': 0.001}}
    """
    try:
        data = tomllib.loads(text)
    except ValueError as error:  # of whole numbers that are too long too
        raise UserError(f"not valid TOML: {error}.") from error
    except RecursionError as error:
        raise UserError("the TOML is nested too deeply; a few levels were wanted.") from error
    require_finite(data)
    return data


@overload
def path_from(folder: Path, path: str) -> str: ...
@overload
def path_from(folder: Path, path: None) -> None: ...
def path_from(folder: Path, path: str | None) -> str | None:
    """A path as it is meant in a file that lies in `folder`. UserError for a `~somebody` whom nobody knows."""
    if path is None:
        return None
    try:
        return str(folder / Path(path).expanduser())
    except RuntimeError as error:
        raise UserError(f"{quoted(path)} is no path: {error}.") from error
