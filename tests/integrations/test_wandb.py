"""W&B gets the summary; without a key the run stays offline and nothing is sent."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from matplotlib.figure import Figure

from cpinfer_integrations.wandb import LayoutLog, Table, log_comparison, log_run, may_go_online
from cpinfer_integrations.wandb_config import WandbConfig


def test_without_a_key_the_summary_is_logged_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    summary = {"num_prompts": 3, "tokens_per_s": 1.5, "layout": {"tp": 1}}
    log_run(WandbConfig(project="p"), {"config": {}}, summary, tmp_path / "results.jsonl", has_api_key=False)
    [run] = offline_runs(tmp_path)
    assert_logged(run, b"tokens_per_s", b"num_prompts")


def test_the_steps_of_a_training_run_become_curves_beside_its_picture(tmp_path: Path) -> None:
    steps = [{"step": 1, "reward": 0.0625}, {"step": 2, "reward": 0.8125}]
    picture = tmp_path / "curve.png"
    Figure(figsize=(1, 1)).savefig(picture)
    output = tmp_path / "output.jsonl"
    log_run(WandbConfig(project="p"), {}, {}, output, has_api_key=False, history=steps, images={"curve": picture})
    [run] = offline_runs(tmp_path)
    assert_logged(run, b"0.0625", b"0.8125")
    assert list(run.glob("files/media/images/curve_*.png"))


def test_automatic_is_online_with_a_key_alone_and_not_where_wandbs_own_variables_say_no() -> None:
    key = {"WANDB_API_KEY": "0" * 40}
    assert may_go_online(key) and may_go_online({**key, "WANDB_MODE": "online"})
    for environ in ({}, {"WANDB_API_KEY": ""}, *({**key, "WANDB_MODE": m} for m in ("offline", "disabled", "dryrun"))):
        assert not may_go_online(environ)
    assert not may_go_online({**key, "WANDB_DISABLED": "true"})


def test_a_run_holds_what_it_was_given_and_nothing_of_the_console_or_a_repository(tmp_path: Path) -> None:
    print("what a model was asked")
    log_run(WandbConfig(project="p"), {}, {"tokens_per_s": 1.5}, tmp_path / "results.jsonl", has_api_key=False)
    [run] = offline_runs(tmp_path)
    assert_logged(run, b"tokens_per_s")
    assert b"what a model was asked" not in logged(run)
    assert not [p for p in run.rglob("*") if p.suffix == ".patch" or p.name == "output.log"]


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A key, and a server that nobody listens for."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("cpinfer_integrations.wandb.INIT_TIMEOUT_S", 3.0)
    wandb.teardown()  # it has read the environment, once and for all
    yield
    monkeypatch.undo()
    wandb.teardown()


def a_comparison(folder: Path) -> tuple[list[LayoutLog], Path, list[Path]]:
    report, picture = folder / "report.html", folder / "plots" / "agreement.png"
    picture.parent.mkdir()
    Figure(figsize=(1, 1)).savefig(picture)
    report.write_text("<p>what was compared</p>", encoding="utf-8")
    table = Table(("task", "layout", "score"), [("vt", "tp1", 0.5), ("vt", "pcp2", math.nan), ("vt", "gone", None)])
    layouts = [
        LayoutLog(
            name, {"config": {"dtype": "float32"}}, {"tokens_per_s": speed}, {"accuracy": table}, {"heat": picture}
        )
        for name, speed in (("tp1", 12345.5), ("pcp2", 67890.5))
    ]
    return layouts, report, [report, picture]


def offline_runs(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


def logged(run: Path) -> bytes:
    """Its transaction log, which is written behind our back."""
    wandb.teardown()  # waits for the writer
    return next(run.glob("*.wandb")).read_bytes()


def assert_logged(run: Path, *wanted: bytes) -> None:
    data = logged(run)
    assert not [text for text in wanted if text not in data]


def assert_holds_the_comparison(folder: Path) -> None:
    """Two runs of one group, each with its figures, the table, the picture, the report and the artifact."""
    runs = offline_runs(folder)
    assert len(runs) == 2
    group = folder.name.encode()
    speeds = [[speed in logged(run) for speed in (b"12345.5", b"67890.5")] for run in runs]
    assert sorted(speeds) == [[False, True], [True, False]], "each run has its own figures"
    for run in runs:
        assert_logged(run, group, group + b"-report", b"plots/agreement.png")
        [table] = run.glob("files/media/table/accuracy_*.table.json")
        assert json.loads(table.read_text())["data"] == [["vt", "tp1", 0.5], ["vt", "pcp2", None], ["vt", "gone", None]]
        assert list(run.glob("files/media/images/heat_*.png"))
        [report] = run.glob("files/media/html/report_*.html")
        assert "what was compared" in report.read_text()


def test_a_comparison_without_a_key_is_a_group_of_offline_runs_with_tables_and_artifact(tmp_path: Path) -> None:
    layouts, report, files = a_comparison(tmp_path)
    assert log_comparison(WandbConfig(project="p"), layouts, report, files, has_api_key=False) is None
    assert_holds_the_comparison(tmp_path)


@pytest.mark.usefixtures("unreachable")
def test_where_wandb_cannot_be_reached_it_is_said_once_and_logged_offline(tmp_path: Path) -> None:
    layouts, report, files = a_comparison(tmp_path)
    said = log_comparison(WandbConfig(project="p"), layouts, report, files, has_api_key=True)
    assert said is not None and "cannot be reached" in said and "wandb sync" in said
    assert_holds_the_comparison(tmp_path)


@pytest.mark.usefixtures("unreachable")
def test_a_run_survives_an_unreachable_wandb_too(tmp_path: Path) -> None:
    said = log_run(WandbConfig(project="p"), {}, {"tokens_per_s": 1.5}, tmp_path / "results.jsonl", has_api_key=True)
    assert said is not None and "cannot be reached" in said
    assert_logged(offline_runs(tmp_path)[-1], b"tokens_per_s")
