"""vLLM as a contestant of the benchmark, with another library of that name: what is asked and answered."""

import json
import os
import stat
import sys

import pytest

from cpinfer_tools.measuring.workloads import QUICK_SHAPE, Workload, make_model
from vllm_peer import vllm_peers

# Each sample is continued by the length of its prompt, then by what the engine was made with.
STUB = """
import json, sys
from types import SimpleNamespace as Some
__version__ = "0.0-stub"
SamplingParams = Some

class LLM:
    def __init__(self, **given):
        print("noise on stdout")
        self.given = given

    def generate(self, prompts, sampling, use_tqdm):
        assert all(s.temperature == 0 and s.ignore_eos for s in sampling)
        assert "RANK" not in __import__("os").environ
        last = self.given["max_model_len"]
        lens = [len(p["prompt_token_ids"]) for p in prompts]
        answers = [[n] * (s.max_tokens - 1) + [last] for n, s in zip(lens, sampling)]
        return [Some(outputs=[Some(token_ids=answer)]) for answer in answers]

    def reset_prefix_cache(self): ...
"""
WORKLOAD = Workload("w", ((1, 2, 3), (4,)), (2, 3), num_samples=2)


@pytest.fixture
def python(tmp_path):
    """A Python that finds the stub, whatever its environment says."""
    (tmp_path / "vllm.py").write_text(STUB, encoding="utf-8")
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n', encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


def test_every_sample_is_asked_for_and_comes_back_in_order(python, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    folder = tmp_path / "model"
    with vllm_peers(python, make_model(QUICK_SHAPE), folder, [WORKLOAD], 1, 1024, is_first=True) as (peer,):
        assert peer.run(WORKLOAD) == [[3, 6], [3, 6], [1, 1, 6], [1, 1, 6]]
        assert "0.0-stub" in peer.given(WORKLOAD)
        pid = peer._worker.pid
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "qwen2"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_python_without_vllm_is_an_error_and_without_one_there_is_no_contestant(tmp_path):
    model = make_model(QUICK_SHAPE)
    with (
        pytest.raises(RuntimeError, match="has ended with 1"),
        vllm_peers("/usr/bin/false", model, tmp_path / "model", [WORKLOAD], 1, 1024, is_first=True),
    ):
        pass
    with vllm_peers(None, model, tmp_path, [WORKLOAD], 1, 1024, is_first=True) as peers:
        assert peers == []
    with vllm_peers("python", model, tmp_path, [WORKLOAD], 1, 1024, is_first=False) as (peer,):
        assert peer.run(WORKLOAD) == []
