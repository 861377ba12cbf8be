"""A config in TOML is the config that the same keys are in JSON, and is refused for the same reasons."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpinfer.config import load_config
from cpinfer.config_file import read_config_file
from cpinfer.errors import UserError

TOML = """
block_size = 8
[sampling]
temperature = 1e-3
stop = ["a", "b"]
[sampling.logit_bias]
7 = 1.5
"""
JSON = (
    '{"block_size": 8, "sampling": {"temperature": 1e-3, "stop": ["a", "b"], "logit_bias": {"7": 1.5}},'
    ' "$schema": "schema/cpinfer.schema.json"}'
)


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_toml_says_what_json_says(tmp_path: Path) -> None:
    configs = [load_config(written(tmp_path, *file)) for file in (("a.toml", TOML), ("a.json", JSON), ("B.TOML", TOML))]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].sampling.logit_bias == ((7, 1.5),)
    assert load_config(tmp_path / "a.toml", ["sampling.top_k=3"]).sampling.top_k == 3


@pytest.mark.parametrize(
    "text, words",
    [
        ("block_size = ", "not valid TOML"),
        ("block_size = 8\nblock_size = 9", "not valid TOML"),
        ("block_size = " + "9" * 5000, "not valid TOML"),
        ("[sampling]\ntemperature = nan", '"sampling.temperature" is not finite'),
        ("[sampling]\ntemperature = inf", '"sampling.temperature" is not finite'),
        ("block_size = 2020-01-01", '"block_size" is .*a whole number was wanted'),
        ("bolck_size = 8", '"block_size"'),
    ],
)
def test_toml_that_is_no_config_is_refused_and_named(tmp_path: Path, text: str, words: str) -> None:
    path = written(tmp_path, "run.toml", text)
    with pytest.raises(UserError, match=f"config {path}: .*{words}"):
        load_config(path)


def test_an_empty_toml_is_the_default_and_a_missing_one_is_named(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "empty.toml", "")) == load_config(written(tmp_path, "empty.json", "{}"))
    with pytest.raises(UserError, match="A TOML file with config keys was wanted"):
        read_config_file(tmp_path / "missing.toml")
