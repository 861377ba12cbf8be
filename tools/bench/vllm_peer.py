"""vLLM as a contestant of engine.py: in a process of its own Python, with the same weights from a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from cpinfer_tools.measuring.workloads import Workload

NAME = "vLLM on CPU"
# To load, and to answer a workload.
_WITHIN_S = 1800.0


class VllmPeer:
    """What the first rank asks; for the others it is that rank's turn.

    Each sample of a prompt is a request of its own, since vLLM takes one greedy sample; its prefix cache shares what
    they begin with.
    """

    name = NAME

    def __init__(self, worker: subprocess.Popen[str] | None, version: str) -> None:
        self._worker = worker
        self._version = version

    def run(self, workload: Workload) -> list[list[int]]:
        """New tokens of every sample, on the first rank; none on the others."""
        if self._worker is None:
            return []
        prompts, lens = zip(*workload.samples(), strict=True)
        told = _ask(self._worker, {"prompts": prompts, "max_new_tokens": lens})
        tokens: list[list[int]] = told["tokens"]
        return tokens

    def given(self, workload: Workload) -> str:
        return f"{self._version}, enforce_eager, float32, prefix caching, one thread per rank"


@contextmanager
def vllm_peers(
    python: str | None,
    model: Any,
    folder: Path,
    workloads: Sequence[Workload],
    tp_size: int,
    kv_bytes_per_token: int,
    *,
    is_first: bool,
) -> Iterator[list[VllmPeer]]:
    """vLLM in a process of `python`, on the first rank; no contestant where none was named. Collective over nobody.

    RuntimeError, with what it said last, where it does not start: a peer that was asked for is not left out in silence.
    """
    if python is None:
        yield []
        return
    if not is_first:
        yield [VllmPeer(None, "")]
        return
    model.save_pretrained(folder)
    longest = max(len(p) + n for w in workloads for p, n in w.samples())
    given = {"model": str(folder), "tp_size": tp_size, "max_model_len": longest + 1}
    needed_bytes = max(w.kv_blocks(128) for w in workloads) * 128 * kv_bytes_per_token
    # It starts ranks of its own, and is to know nothing of these.
    outer = ("MASTER_", "RANK", "WORLD_", "LOCAL_", "GROUP_", "TORCHELASTIC_", "PYTHONPATH")
    env = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    env |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    env["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, -(-needed_bytes // 2**30)))
    command = [python, str(Path(__file__).with_name("vllm_worker.py")), json.dumps(given)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env, start_new_session=True) as worker:
        try:
            yield [VllmPeer(worker, f"vLLM {_answer(worker)['version']}")]
        finally:
            with suppress(ProcessLookupError):  # none is left of it
                os.killpg(worker.pid, signal.SIGKILL)  # its engine and ranks, too, which outlive it


def _ask(worker: subprocess.Popen[str], asked: dict[str, Any]) -> dict[str, Any]:
    stdin: IO[str] | None = worker.stdin
    assert stdin is not None, "it is a pipe"
    stdin.write(json.dumps(asked) + "\n")
    stdin.flush()
    return _answer(worker)


def _answer(worker: subprocess.Popen[str]) -> dict[str, Any]:
    assert worker.stdout is not None, "it is a pipe"
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"the process of vLLM has ended with {worker.wait()}; what it said stands above")
    told: dict[str, Any] = json.loads(line)
    return told
