"""`cpinfer serve` before it serves: what is wrong is said without loading a model, and a dry run loads none."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from cpinfer_tools import serve

SINGLE = str(Path(__file__).parents[2] / "configs" / "single.json")


def test_a_dry_run_says_what_would_be_served_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--config", SINGLE, "--dry-run", "--host", "0.0.0.0", "--port", "81"]) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out.splitlines()[-1])
    assert told["dry_run"] and told["port"] == 81 and told["kv_capacity_tokens"] > 0
    assert "OpenAI's interface at 0.0.0.0, port 81\n" in captured.err  # and no output file


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--config"),
        (["--config", "no/such/file.json"], "no/such/file.json"),
        (["--config", SINGLE, "--port", "99999"], '"port" is 99999'),
        (["--config", SINGLE, "--port", "x"], "--port"),
        (["--config", SINGLE, "--set", "server.prt=1"], '"server.prt"'),
        (["--config", SINGLE, "--output", "x.jsonl"], "--output"),
        (["--config", SINGLE, "--set", "server.max_pause_s=600"], '"server.max_pause_s" is 600; less than'),
    ],
)
def test_bad_input_is_told_before_a_model_loads(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err and "loading" not in captured.err and not captured.out


def test_a_port_that_is_taken_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main(["--config", SINGLE, "--set", "kv_cache_gib=0.01", "--port", str(port)]) == 2
    assert f"the server cannot listen at 127.0.0.1, port {port}" in capsys.readouterr().err
