"""A tool as a user meets it, in one process: a folder with a config, its files, and what a run leaves there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

Outcome = tuple[int, str, str]


class ToolFolder:
    """`data` is the config, its output out.jsonl; a test changes single keys of it for a run."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str], tool: Any, data: Mapping[str, Any]) -> None:
        self.path, self.capsys, self.tool = path, capsys, tool
        self.data = {"output": "out.jsonl", **data}

    @property
    def output(self) -> Path:
        return self.path / "out.jsonl"

    def file(self, name: str, *lines: Any) -> str:
        """A file of these lines, JSON but for those that are texts; its name."""
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        (self.path / name).write_text(text, encoding="utf-8")
        return name

    def run(self, *argv: str, tool: Any = None, **config: Any) -> Outcome:
        """(exit code, stdout, stderr) of the tool on this config; a key set to None is taken away."""
        data = {key: value for key, value in {**self.data, **config}.items() if value is not None}
        self.file("run.json", json.dumps(data))
        code = (tool or self.tool).main(["--config", str(self.path / "run.json"), *argv])
        return code, *self.capsys.readouterr()

    def lines(self, path: Path | None = None) -> list[dict[str, Any]]:
        """What stands in the output, or in another results file."""
        return [json.loads(line) for line in (path or self.output).read_text(encoding="utf-8").splitlines()]

    def meta(self) -> dict[str, Any]:
        """What stands beside the output."""
        found: dict[str, Any] = json.loads((self.path / "out.jsonl.meta.json").read_text(encoding="utf-8"))
        return found


def summary_of(out: str) -> dict[str, Any]:
    """The last line of stdout."""
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def assert_refused(outcome: Outcome, *words: str, tool: str) -> None:
    """Exit 2, nothing on stdout, and on stderr one complaint, in one line, that holds the words."""
    code, out, err = outcome
    assert code == 2
    assert out == ""
    assert err.startswith(f"{tool}: ") and err.count(f"{tool}: ") == 1 and len(err.strip().splitlines()) == 1
    for word in words:
        assert word in err
