"""Kernel calls of a decode step, counted: as many for many sequences as for few, whatever their lengths.

Nothing is timed. A call of torch's dispatcher costs the same for one row and for hundreds, so calls per row are what a
step pays beside its arithmetic.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import cpinfer
from cpinfer.config import SamplingParams
from cpinfer.engine.step import Step
from cpinfer.engine.step_runner import StepRunner
from cpinfer.ops.ordered_attention import OrderedAttention
from tiny_models import FAMILIES, make_model, prompts_of

NUM_NEW = 3
FEW, MANY = 5, 40


class Calls(TorchDispatchMode):
    """Calls that torch dispatches while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += 1
        return func(*args, **(kwargs or {}))


def calls_of(
    monkeypatch: pytest.MonkeyPatch, num_seqs: int, *, family: str = "llama", backend: str = "cpu", **sampling: Any
) -> set[tuple[int, int]]:
    """Of each decode step: calls of torch, and of the attention kernel."""
    steps: list[tuple[int, int]] = []
    run, attend, attended = StepRunner.run, OrderedAttention.run, []

    def counted_attend(planned: OrderedAttention, *args: Any, **kwargs: Any) -> Any:
        attended.append(planned)
        return attend(planned, *args, **kwargs)

    def counted_run(runner: StepRunner, step: Step, *says: Any) -> Any:
        attended.clear()
        with Calls() as calls:
            output = run(runner, step, *says)
        if not step.chunks:
            steps.append((calls.num, len(attended)))
        return output

    model = copy.deepcopy(make_model(FAMILIES[family])).eval()
    # No two alike, and all longer than what is copied to lie together.
    prompts = prompts_of(range(70, 70 + num_seqs), vocab_size=128)
    with monkeypatch.context() as patch:
        patch.setattr(StepRunner, "run", counted_run)
        patch.setattr(OrderedAttention, "run", counted_attend)
        with cpinfer.attach(model, config={"dtype": "float32", "backend": backend, "kv_cache_gib": 0.01}) as engine:
            params = SamplingParams(max_new_tokens=NUM_NEW, ignore_eos=True, **sampling)
            results = engine.generate(prompts, params)
    assert [len(result.token_ids) for result in results] == [NUM_NEW] * num_seqs
    assert len(steps) == NUM_NEW - 1  # all of them decode in the same steps
    return set(steps)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}], ids=str
)
def test_a_step_of_many_sequences_makes_the_calls_of_a_step_of_few(
    monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]
) -> None:
    assert calls_of(monkeypatch, FEW, **sampling) == calls_of(monkeypatch, MANY, **sampling)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3"])
def test_attention_is_one_call_a_layer(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    num_layers = FAMILIES[family].num_hidden_layers
    assert {attended for _, attended in calls_of(monkeypatch, MANY, family=family, temperature=0)} == {num_layers}


def test_calls_of_each_row_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: torch's kernel takes each row by itself."""
    few, many = (min(calls_of(monkeypatch, n, backend="torch", temperature=0))[0] for n in (FEW, MANY))
    assert many > few + (MANY - FEW)
