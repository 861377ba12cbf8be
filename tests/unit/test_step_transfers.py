"""What a step costs at the border of host and device, counted on tensors that say they lie on a GPU, and kernel calls.

Copies to the device, times that the host waits for it, calls of attention kernels: numbers that a change may not raise
unnoticed. Nothing is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import cpinfer
from cpinfer.config import SamplingParams
from cpinfer.engine import logits_reader
from cpinfer.engine.step import Step
from cpinfer.engine.step_runner import StepRunner
from cpinfer.ops import row_copies, states
from cpinfer.ops.staging import Staging
from interpreted_cuda.tensors import CUDA, on_cuda, to_cuda
from interpreted_cuda.transfers import Transfers, counted, pretended
from tiny_models import FAMILIES, make_model, prompts_of

# Long enough for each row to be a call of its own over keys that lie behind each other.
LENS = (70, 90, 80)
NUM_NEW = 4


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU, as far as tensors go, without Triton's kernels, which take no part in transfers."""
    for module in (row_copies, states):
        monkeypatch.setattr(module, "triton_module", lambda name: None)
    with pretended(), on_cuda(), torch.no_grad():
        yield


def transfers_of(monkeypatch: pytest.MonkeyPatch, **sampling: Any) -> tuple[list[Transfers], list[Transfers]]:
    """Of each prefill step, and of each decode step."""
    model = copy.deepcopy(make_model(FAMILIES["llama"])).eval()
    to_cuda(model)
    steps: tuple[list[Transfers], list[Transfers]] = ([], [])
    run = StepRunner.run
    with counted() as transfers:

        def counted_run(runner: StepRunner, step: Step, *says: Any) -> Any:
            before = Transfers(**vars(transfers))
            output = run(runner, step, *says)
            steps[not step.chunks].append(transfers - before)
            return output

        monkeypatch.setattr(StepRunner, "run", counted_run)
        config = {"dtype": "float32", "backend": "torch", "kv_cache_gib": 0.001}
        with cpinfer.attach(model, config=config) as engine:
            prompts = prompts_of(LENS, vocab_size=128)
            results = engine.generate(prompts, SamplingParams(max_new_tokens=NUM_NEW, ignore_eos=True, **sampling))
    assert [len(result.token_ids) for result in results] == [NUM_NEW] * len(LENS)
    return steps


def test_a_greedy_step_is_one_copy_to_the_device_and_one_wait_for_its_tokens(
    on_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefills, decodes = transfers_of(monkeypatch, temperature=0)
    assert [(t.num_copies, t.num_waits) for t in prefills] == [(1, 1)]
    assert [(t.num_copies, t.num_waits) for t in decodes] == [(1, 1)] * (NUM_NEW - 1)
    # Ids, positions, and slots that are written: three numbers a row, and what aligns them.
    assert all(t.num_bytes <= len(LENS) * 3 * 8 + 3 * 16 for t in decodes)


def test_random_numbers_are_one_copy_more_and_no_wait(on_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    prefills, decodes = transfers_of(monkeypatch, temperature=1.0)
    assert [(t.num_copies, t.num_waits) for t in (*prefills, *decodes)] == [(2, 1)] * NUM_NEW


def test_likeliest_tokens_and_cuts_make_no_wait_more(on_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    _, decodes = transfers_of(monkeypatch, temperature=1.0, top_logprobs=2, top_k=5, top_p=0.9)
    assert {t.num_waits for t in decodes} == {1}


def test_arrays_one_by_one_and_a_look_at_the_logits_would_be_seen(
    on_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: what the engine did before."""

    def put(staging: Staging, array: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(staging._device)

    usable = logits_reader.usable
    monkeypatch.setattr(Staging, "put", put)
    monkeypatch.setattr(logits_reader, "usable", lambda logits: torch.tensor(bool(usable(logits)), device=CUDA))
    _, decodes = transfers_of(monkeypatch, temperature=0)
    assert min(t.num_copies for t in decodes) >= 4 and min(t.num_waits for t in decodes) >= 2
