"""What the open interface costs beside a closed batch, and what requests that wait cost a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cpinfer
from cpinfer.config import SamplingParams
from cpinfer_tools.measuring.contestants import BLOCK_SIZE, Cpinfer, Tokens
from cpinfer_tools.measuring.workloads import ModelShape, Workload, make_model, random_prompts

NUM_WAITING = (100, 1_000, 10_000)
PROMPT_LEN = 16


@dataclass(frozen=True)
class Loop:
    """Tokens of all samples in the workload's order, what they took, and how much of it was outside of steps.

    Seconds are of the process on its processor, and without attaching: other programs on the machine do not count.
    Much of what two runs differ by is how fast memory is just then; the part outside of steps knows nothing of that.
    """

    tokens: Tokens
    taken_s: float
    outside_s: float


class Loops:
    """One workload by `generate`, and by `add` and `step`; each run has an engine of its own, without prefixes."""

    def __init__(self, model: Any, shape: ModelShape, workload: Workload) -> None:
        self._model = model
        self._config = Cpinfer(model, cpinfer.Topology.single(), shape).config(workload)
        self._prompts = [list(prompt) for prompt in workload.prompts]
        self._sampling = [
            SamplingParams(temperature=0, max_new_tokens=n, n=workload.num_samples, ignore_eos=True)
            for n in workload.max_new_tokens
        ]

    def closed(self) -> Loop:
        """By `generate`."""
        return self._run(
            lambda engine: [list(result.token_ids) for result in engine.generate(self._prompts, self._sampling)]
        )

    def opened(self) -> Loop:
        """By `add`, one by one, and `step` until all have ended."""
        return self._run(self._by_steps)

    def _by_steps(self, engine: cpinfer.Engine) -> Tokens:
        asked = zip(self._prompts, self._sampling, strict=True)
        places = {engine.add(prompt, params): i for i, (prompt, params) in enumerate(asked)}
        found: dict[tuple[int, int], list[int]] = {}
        num_left = sum(params.n for params in self._sampling)
        while num_left:
            for output in engine.step():
                found.setdefault((places[output.request_id], output.sample_index), []).extend(output.token_ids)
                num_left -= output.finish_reason is not None
        return [found[place] for place in sorted(found)]

    def _run(self, run: Callable[[cpinfer.Engine], Tokens]) -> Loop:
        with cpinfer.attach(self._model, cpinfer.Topology.single(), self._config) as engine:
            core, in_steps_s = engine._core, 0.0
            advance = core.advance

            def timed_advance(*args: Any, **options: Any) -> Any:
                nonlocal in_steps_s
                step_s = time.process_time()
                try:
                    return advance(*args, **options)
                finally:
                    in_steps_s += time.process_time() - step_s

            vars(core).update(advance=timed_advance)  # from outside: the engine has no use for the figure
            start_s = time.process_time()
            tokens = run(engine)
            taken_s = time.process_time() - start_s
        return Loop(tokens, taken_s, taken_s - in_steps_s)


def waiting_step_us(shape: ModelShape, num_waiting: int, num_running: int, num_steps: int) -> list[float]:
    """Microseconds of each of `num_steps` decode steps of `num_running` requests, while `num_waiting` others wait.

    Of this thread on its processor.
    """
    model = make_model(shape)
    per_request = -(-(PROMPT_LEN + num_steps + 8) // BLOCK_SIZE)
    config = {
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "kv_cache_gib": (num_running + 1) * per_request * BLOCK_SIZE * shape.kv_bytes_per_token / 2**30,
        "max_num_seqs": num_running,
        "max_num_batched_tokens": 2048,
    }
    # A few tokens more than are timed: nobody ends, and so nobody is admitted, in between.
    params = SamplingParams(temperature=0, max_new_tokens=num_steps + 8, ignore_eos=True)
    spent: list[float] = []
    with cpinfer.attach(model, cpinfer.Topology.single(), config) as engine:
        for prompt in random_prompts([PROMPT_LEN] * (num_running + num_waiting), shape.vocab_size, 5):
            engine.add(list(prompt), params)
        for step in range(num_steps + 4):
            start_s = time.thread_time()
            outputs = engine.step()
            taken_us = (time.thread_time() - start_s) * 1e6
            if step >= 4:  # arrivals, prefill, first steps
                assert len(outputs) == num_running, "all that run get a token, and none that waits"
                spent.append(taken_us)
    return spent


def share_beyond(opened: Sequence[Sequence[float]], closed: Sequence[Sequence[float]]) -> float:
    """How much more the open loop takes than the closed one, of medians of (seconds, ...): 0.02 is 2 % more.

    >>> round(share_beyond([(1.02,), (1.03,), (1.01,)], [(1.0,), (1.1,), (0.9,)]), 6)
    0.02
    """
    return statistics.median(x[0] for x in opened) / statistics.median(x[0] for x in closed) - 1


def share_outside(loops: Sequence[Sequence[float]]) -> float:
    """The share outside of steps, of pairs (seconds, of them outside): the median.

    >>> share_outside([(2.0, 0.02), (1.0, 0.03), (4.0, 0.02)])
    0.01
    """
    return statistics.median(outside_s / taken_s for taken_s, outside_s in loops)
