"""Jobs of agents, who takes turns with tools in between, and the two ways to run them: sessions, and in lock-step."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cpinfer_tools.measuring.workloads import (
    NEAR_TIE,
    QUICK_SHAPE,
    ModelShape,
    Speed,
    Workload,
    decode_floor_s,
    random_prompts,
)

if TYPE_CHECKING:
    from cpinfer_tools.measuring.contestants import Contestant

BLOCK_SIZE = 16
STEP_TOKENS = 2048
OURS = "sessions"
LOCK_STEP, AT_ONCE = "lock-step", "tools at once"

# Answers by sample and turn.
Answers = list[list[list[int]]]


@dataclass(frozen=True)
class Size:
    """How large the measured work is: what each turn gives and generates, and how long tools take at most."""

    shape: ModelShape
    num_samples: int
    num_turns: int
    given_tokens: int
    new_tokens: int
    longest_tool_s: float
    num_steps: int


FULL = Size(ModelShape(num_layers=2), 16, 8, 256, 32, longest_tool_s=2.0, num_steps=100)
QUICK = Size(QUICK_SHAPE, 4, 3, 32, 4, longest_tool_s=0.02, num_steps=6)


@dataclass(frozen=True)
class Job:
    """One opening prompt for all samples; what the tool of each sample says after each turn, and how long it takes."""

    name: str
    opening: tuple[int, ...]
    given: tuple[tuple[tuple[int, ...], ...], ...]
    tools_s: tuple[tuple[float, ...], ...]
    new_tokens: int

    @property
    def num_samples(self) -> int:
        return len(self.given)

    @property
    def num_turns(self) -> int:
        return len(self.given[0]) + 1

    @property
    def num_distinct_tokens(self) -> int:
        """Given tokens: those of the opening once, since all samples share it."""
        return len(self.opening) + sum(len(tokens) for turns in self.given for tokens in turns)

    @property
    def num_lock_step_tokens(self) -> int:
        """What is prefilled where each turn begins from the whole sequence."""
        return sum(length for i in range(self.num_samples) for length in self.prompt_lens(i))

    def prompt_lens(self, sample: int) -> Iterator[int]:
        """Tokens before each answer of a sample."""
        length = len(self.opening)
        yield length
        for tokens in self.given[sample]:
            length += self.new_tokens + len(tokens)
            yield length

    def tool(self, sample: int, turn: int) -> list[int]:
        """What comes back after a turn, when the tool is done."""
        if self.tools_s[sample][turn]:
            time.sleep(self.tools_s[sample][turn])
        return list(self.given[sample][turn])

    def sequence(self, sample: int, answers: Sequence[Sequence[int]]) -> list[int]:
        """Prompt, answers and what tools said, in order."""
        tokens = [*self.opening, *answers[0]]
        for given, answer in zip(self.given[sample], answers[1:], strict=True):
            tokens += [*given, *answer]
        return tokens


def jobs_of(size: Size) -> list[Job]:
    """The same turns with slow tools, and with instant ones."""
    num_calls = size.num_turns - 1
    (opening,) = random_prompts([size.given_tokens], size.shape.vocab_size, 31)
    flat = random_prompts([size.given_tokens] * (size.num_samples * num_calls), size.shape.vocab_size, 32)
    given = tuple(flat[i * num_calls : (i + 1) * num_calls] for i in range(size.num_samples))
    rng = random.Random(33)
    slow = tuple(tuple(rng.uniform(0, size.longest_tool_s) for _ in range(num_calls)) for _ in given)
    instant = ((0.0,) * num_calls,) * size.num_samples
    return [
        Job(name, opening, given, tools_s, size.new_tokens) for name, tools_s in (("slow", slow), ("instant", instant))
    ]


def floor_s(job: Job, shape: ModelShape, speed: Speed) -> float:
    """The least time of a job: its arithmetic and bytes with each token computed once and all samples decoded at once,
    or the tools of the sample whose tools take longest, whichever is more.
    """
    flops, seconds = 0.0, 0.0
    for turn, lens in enumerate(zip(*(job.prompt_lens(i) for i in range(job.num_samples)), strict=True)):
        news = [len(job.opening)] if turn == 0 else [len(turns[turn - 1]) for turns in job.given]
        flops += 2.0 * shape.params_per_token * sum(news) + 2.0 * shape.vocab_params * len(lens)
        # A new token sees what comes before it, and itself.
        flops += shape.flops_per_pair * sum(
            n * (length - n) + n * (n + 1) / 2 for n, length in zip(news, lens, strict=False)
        )
        rows = Workload("", tuple((0,) * length for length in lens), (job.new_tokens,) * len(lens))
        seconds += sum(decode_floor_s(rows, shape, speed, step) for step in range(1, job.new_tokens))
    return max(seconds + flops / (speed.gflop_per_s * 1e9), max(map(sum, job.tools_s)))


class Sessions:
    """This engine: one session for each sample, whose tools run in threads while others generate.

    The first sample goes ahead until its prompt is computed; the others find it cached.
    """

    name = OURS

    def __init__(self, model: Any, shape: ModelShape) -> None:
        self._model, self._shape = model, shape
        self.num_prefilled_tokens = 0

    def run(self, job: Job) -> Answers:
        import cpinfer

        longest = len(job.opening) + job.num_turns * job.new_tokens + max(sum(map(len, turns)) for turns in job.given)
        blocks = job.num_samples * (-(-longest // BLOCK_SIZE)) + 1
        config = {
            "dtype": "float32",
            "block_size": BLOCK_SIZE,
            "kv_cache_gib": blocks * BLOCK_SIZE * self._shape.kv_bytes_per_token / 2**30,
            "max_num_batched_tokens": STEP_TOKENS,
        }
        with (
            cpinfer.attach(self._model, cpinfer.Topology.single(), config) as engine,
            ThreadPoolExecutor(job.num_samples) as pool,
        ):
            agents = _Agents(engine, job, pool)
            agents.begin(0)
            engine.run_until(agents.go_on)
            self.num_prefilled_tokens = engine.stats.num_computed_prefill_tokens
        return agents.answers


@dataclass
class _Agents:
    """Where each sample of a job is: in the engine, at its tool, or done."""

    engine: Any
    job: Job
    pool: ThreadPoolExecutor
    sessions: list[Any] = field(default_factory=list)
    answers: Answers = field(default_factory=list)
    _sample_of: dict[str, int] = field(default_factory=dict)
    _tools: dict[Future[list[int]], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from cpinfer.config import SamplingParams

        self._params = SamplingParams(temperature=0, max_new_tokens=self.job.new_tokens, ignore_eos=True)

    def begin(self, sample: int) -> None:
        self.sessions.append(self.engine.open_session(list(self.job.opening)))
        self.answers.append([])
        self._ask(sample, [])

    def go_on(self, outputs: Sequence[Any]) -> bool:
        """Start tools for who has an answer, turns for who has its tool's; whether all is done."""
        if outputs and len(self.sessions) == 1:
            for sample in range(1, self.job.num_samples):
                self.begin(sample)
        for output in outputs:
            if output.finish_reason is None:
                continue
            sample = self._sample_of.pop(output.request_id)
            answers = self.answers[sample]
            answers.append(list(output.result.token_ids))
            if len(answers) < self.job.num_turns:
                self._tools[self.pool.submit(self.job.tool, sample, len(answers) - 1)] = sample
            else:
                self.engine.close_session(self.sessions[sample])
        for tool in [tool for tool in self._tools if tool.done()]:
            self._ask(self._tools.pop(tool), tool.result())
        return not self._sample_of and not self._tools

    def _ask(self, sample: int, given: list[int]) -> None:
        request_id = self.engine.add(given, self._params, session=self.sessions[sample])
        self._sample_of[request_id] = sample


class LockStep:
    """All samples take a turn, from their whole sequences; then all tools run, one by one or `at_once`."""

    def __init__(self, model: Any, generation: Contestant, *, at_once: bool = False) -> None:
        self._model, self._generation, self._at_once = model, generation, at_once
        self.name = f"{generation.name}, {AT_ONCE if at_once else LOCK_STEP}"

    def run(self, job: Job) -> Answers:
        from cpinfer_tools.measuring.contestants import attention_restored

        samples = range(job.num_samples)
        sequences = [list(job.opening) for _ in samples]
        answers: Answers = [[] for _ in samples]
        with ThreadPoolExecutor(job.num_samples if self._at_once else 1) as pool:
            for turn in range(job.num_turns):
                if turn:
                    # One thread is one after the other.
                    for i, given in zip(
                        samples, pool.map(lambda i, at=turn - 1: job.tool(i, at), samples), strict=True
                    ):
                        sequences[i] += given
                workload = Workload("turn", tuple(map(tuple, sequences)), (job.new_tokens,) * job.num_samples)
                with attention_restored(self._model.config):
                    generated = self._generation.run(workload)
                for i, tokens in enumerate(generated):
                    answers[i].append(tokens)
                    sequences[i] += tokens
        return answers


def unlikely(model: Any, job: Job, name: str, answers: Answers) -> list[str]:
    """Samples with a generated token that the whole model does not find likeliest, near-ties aside, in words."""
    import torch

    complaints = []
    for sample, turns in enumerate(answers):
        ids = torch.tensor([job.sequence(sample, turns)])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0]
        behind = [0.0]
        for length, tokens in zip(job.prompt_lens(sample), turns, strict=True):
            rows = logits[length - 1 : length - 1 + len(tokens)]
            chosen = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            behind += (rows.max(dim=1).values - chosen).tolist()
        if max(behind) > NEAR_TIE or any(len(tokens) != job.new_tokens for tokens in turns):
            complaints.append(
                f"{job.name}: sample {sample} of {name} has a token {max(behind):.3g} below the whole model's likeliest"
            )
    return complaints
