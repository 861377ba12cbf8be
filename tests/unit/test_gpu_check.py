"""The GPU check itself, on CPU at tiny sizes: its code runs, and it says what it should. No figure comes from here."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cpinfer.attention.backends.flashinfer.kernels import Chip, kernel_modules, refused
from cpinfer_tools.gpu import gpu_check
from cpinfer_tools.gpu.stage import Figure, Found, Setting, median_s

ROOT = Path(__file__).parents[2]


def check(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    code = gpu_check.main(list(argv))
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("stage", ["parity", "model", "deterministic", "rollouts", "throughput", "plan"])
def test_a_stage_runs_alone_on_cpu_and_says_that_it_is_no_measurement(
    stage: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = gpu_check.main(["--device", "cpu", "--only", stage], results=tmp_path)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0 and told["is_smoke"] and list(told["stages"]) == [stage]
    found = told["stages"][stage]
    assert found["error"] is None and found["ok"] is not False and len(found["figures"]) >= 3
    assert all(math.isfinite(figure["value"]) for figure in found["figures"])
    assert not list(tmp_path.iterdir()), "cards are for what a GPU has shown"


def test_stages_that_need_what_is_not_there_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, told = check(capsys, "--device", "cpu", "--only", "graphs", "--only", "comm")
    assert code == 0
    assert told["stages"]["graphs"]["notes"] == ["needs CUDA"] and told["stages"]["graphs"]["ok"] is None
    assert "torchrun" in told["stages"]["comm"]["notes"][0] and told["stages"]["comm"]["figures"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--only", "parity"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "--device cpu" in shown.err


@pytest.mark.parametrize(("capability", "num_modules"), [((8, 0), 12), ((9, 0), 19), ((10, 0), 12)], ids=str)
def test_what_the_stages_ask_of_flashinfer_is_known_before_they_begin(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], num_modules: int
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    setting, chip = Setting(torch.device("cuda"), is_smoke=False), Chip(capability, has_fa3_prefill=True)
    needs = {name: list(of(setting)) for name, of in gpu_check.NEEDS.items()}
    assert all(refused(each, capability, "it") is None for asked in needs.values() for each in asked)
    modules = {name: {m for each in asked for m in kernel_modules(each, chip)} for name, asked in needs.items()}
    assert len(modules["parity"]) == num_modules == max(map(len, modules.values()))


@pytest.mark.parametrize("only_builds", [True, False])
def test_kernels_are_compiled_before_the_stages_that_ask_for_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, only_builds: bool
) -> None:
    begun: list[Any] = []

    def build(setting: Setting, needs: list[Any]) -> Found:
        begun.append(len(needs))
        return Found((Figure("compiled it", 61.0, "s"),))

    def stage(setting: Setting) -> Found:
        begun.append(setting.backend_name)
        return Found((Figure("error", 0.0, "", target=1.0),))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(gpu_check.build, "run", build)
    monkeypatch.setattr(gpu_check, "STAGES", {**gpu_check.STAGES, "graphs": stage})
    monkeypatch.setattr(gpu_check.Launch, "device", torch.device("cuda"))
    arguments = ["--smoke", "--no-card", "--only", "graphs", *["--build"] * only_builds]
    code, told = check(capsys, *arguments)
    assert code == 0 and begun == ([1] if only_builds else [1, "flashinfer"])
    assert list(told["stages"]) == (["build"] if only_builds else ["build", "graphs"])


def test_a_missed_target_or_a_failing_stage_is_an_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(setting: Setting) -> Found:
        raise ValueError("broken")

    def misses(setting: Setting) -> Found:
        return Found((Figure("speed", 1.0, "x", target=2.0, higher_is_better=True),))

    monkeypatch.setattr(gpu_check, "STAGES", {**gpu_check.STAGES, "parity": fails, "model": misses})
    code, told = check(capsys, "--device", "cpu", "--only", "parity", "--only", "model", "--only", "graphs")
    assert code == 1
    assert [told["stages"][name]["ok"] for name in ("parity", "model", "graphs")] == [False, False, None]
    assert told["stages"]["parity"]["error"] == "ValueError: broken"


def test_figures_know_their_side_of_target_and_bound() -> None:
    assert Figure("error", 1e-3, "", target=1e-2).ok and not Figure("error", 1e-1, "", target=1e-2).ok
    assert Figure("speed", 3.0, "x", target=2.0, higher_is_better=True).ok
    assert Figure("error", math.nan, "", target=1e-2).ok is False
    assert Figure("error", 1.0, "").ok is None and Found((Figure("error", 1.0, ""),)).ok is None
    assert Figure("speed", 3.0, "x", bound=4.0, higher_is_better=True).share_of_bound == 0.75
    assert Figure("time", 4.0, "us", bound=3.0).share_of_bound == 0.75


def test_a_card_names_the_gpu_and_holds_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_device_name", lambda device: "NVIDIA Test 9")
    figure = Figure("decode", 3.5, "GB/s", bound=4.0, target=3.4, higher_is_better=True)
    told = {"figures": [figure.as_json()], "notes": ["as it was"], "wall_s": 1.0}
    setting = Setting(torch.device("cuda"), is_smoke=False)
    path = gpu_check._write_card("throughput", told, "cpinfer gpu-check", setting, tmp_path)
    text = path.read_text(encoding="utf-8")
    assert path.name == "gpu_throughput_nvidia_test_9.md"
    assert "| decode | 3.5 GB/s | 4 | 87.5% | 3.4 | yes |" in text and "as it was" in text and "Test 9" in text


def test_timing_warms_up_first() -> None:
    calls: list[int] = []
    assert median_s(lambda: calls.append(1), torch.device("cpu"), 3) >= 0
    assert len(calls) == 5


@pytest.mark.slow
def test_the_exchanges_are_right_over_real_processes() -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29631"),
        *(str(ROOT / "tools" / "gpu_check.py"), "--device", "cpu", "--only", "comm"),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])["stages"]["comm"]
    assert found["ok"] is True and len(found["figures"]) == 4
