"""The engines that are compared: cpinfer, Transformers `generate`, Transformers `generate_batch`.

Each runs a workload greedily on the module it is given, in this process and together with the same contestant on the
other tensor-parallel ranks, and returns the new tokens of every sample in the workload's order. What each is given
("given") was chosen from a handful of settings, each timed once on a 2-core machine; the card prints it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import cpinfer
from cpinfer.config import JobConfig, SamplingParams, config_to_dict, parse_config
from cpinfer.engine.request import RolloutResult
from cpinfer_tools.measuring.workloads import ModelShape, Workload

Tokens = list[list[int]]

BLOCK_SIZE = 16
PAGE_SIZE = 256
# Tokens of one step of cpinfer: what a layer computes for 2,048 tokens stays in the last cache, for 16k it does not.
STEP_TOKENS = 2048
# Prompts above this get what peers need for long contexts.
LONG_PROMPT = 2048


class Contestant(Protocol):
    """An engine under test."""

    @property
    def name(self) -> str: ...

    def run(self, workload: Workload) -> Tokens:
        """New tokens of every sample, in the workload's order. Collective over the tp ranks."""
        ...

    def given(self, workload: Workload) -> str:
        """How it is set up for a workload, in words."""
        ...


@dataclass(frozen=True)
class Cpinfer:
    """This engine. Attaching it, and allocating its KV pool, is part of the time."""

    model: Any
    topology: cpinfer.Topology
    shape: ModelShape
    name: str = "cpinfer"
    dtype: str = "float32"
    backend: str = "auto"
    step_tokens: int = STEP_TOKENS
    cuda_graphs: bool = False
    deterministic: bool = False
    prepacked_weights_gib: float = 0.0

    def config(self, workload: Workload) -> JobConfig:
        """A pool that holds all samples at once."""
        tp_size = self.topology.grid.tp_size
        # Of a KV head that tp ranks cannot share, each has a copy.
        heads = max(1, self.shape.num_kv_heads // tp_size)
        per_block = BLOCK_SIZE * self.shape.kv_bytes_per_token * heads // self.shape.num_kv_heads
        return parse_config(
            {
                "dtype": self.dtype,
                "backend": self.backend,
                "tensor_parallel": {"tp_size": tp_size},
                "block_size": BLOCK_SIZE,
                "kv_cache_gib": (workload.kv_blocks(BLOCK_SIZE) + 1) * per_block / 2**30,
                "max_num_batched_tokens": self.step_tokens,
                "cuda_graphs": self.cuda_graphs,
                "deterministic": self.deterministic,
                "prepacked_weights_gib": self.prepacked_weights_gib,
            }
        )

    def run(self, workload: Workload) -> Tokens:
        with cpinfer.attach(self.model, self.topology, self.config(workload)) as engine:
            return [list(result.token_ids) for result in self.results(engine, workload)]

    def results(self, engine: cpinfer.Engine, workload: Workload) -> list[RolloutResult]:
        """What an attached engine makes of a workload."""
        sampling = [
            SamplingParams(temperature=0, max_new_tokens=n, n=workload.num_samples, ignore_eos=True)
            for n in workload.max_new_tokens
        ]
        return engine.generate([list(p) for p in workload.prompts], sampling)

    def given(self, workload: Workload) -> str:
        config = config_to_dict(self.config(workload))
        told = ["block_size", "kv_cache_gib", "max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching"]
        told += ["prepacked_weights_gib"] * bool(self.prepacked_weights_gib)
        return ", ".join(f"{key} {_short(config[key])}" for key in told)


@dataclass(frozen=True)
class Generate:
    """Transformers `generate` on left-padded batches; each batch runs to its longest answer.

    Samples are sorted by the tokens they want, then cut into batches: the fairest way to give it a ragged workload.
    """

    model: Any
    name: str = "generate"
    always_static: bool = False

    def batch_size(self, workload: Workload) -> int:
        """All samples at once where they are alike, else 8: larger batches pad more, smaller ones batch less.

        And 8 of long prompts: what it computes of all of theirs at once would take gigabytes.
        """
        if self.static_cache(workload):
            return min(8, len(workload.samples()))
        alike = len(set(workload.max_new_tokens)) == 1 and len(set(map(len, workload.prompts))) == 1
        return len(workload.samples()) if alike else 8

    def static_cache(self, workload: Workload) -> bool:
        """The default cache is copied for every token, which a long context notices."""
        return self.always_static or max(map(len, workload.prompts)) > LONG_PROMPT

    def run(self, workload: Workload) -> Tokens:
        samples = workload.samples()
        order = sorted(range(len(samples)), key=lambda i: samples[i][1])
        size = self.batch_size(workload)
        tokens: Tokens = [[] for _ in samples]
        for batch in (order[at : at + size] for at in range(0, len(order), size)):
            longest = max(len(samples[i][0]) for i in batch)
            pads = [longest - len(samples[i][0]) for i in batch]
            rows = [[0] * pad + list(samples[i][0]) for pad, i in zip(pads, batch, strict=True)]
            ids = torch.tensor(rows, device=self.model.device)
            mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=self.model.device)
            out = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max(samples[i][1] for i in batch),
                do_sample=False,
                pad_token_id=0,
                **({"cache_implementation": "static"} if self.static_cache(workload) else {}),
            )
            for i, row in zip(batch, out[:, longest:].tolist(), strict=True):
                tokens[i] = row[: samples[i][1]]
        return tokens

    def given(self, workload: Workload) -> str:
        cache = "static" if self.static_cache(workload) else "dynamic"
        return f"batches of {self.batch_size(workload)}, sorted by new tokens, left-padded; {cache} cache"


@dataclass(frozen=True)
class GenerateBatch:
    """Transformers continuous batching, `generate_batch`.

    Driven through the manager that `generate_batch` itself drives, for two reasons: requests may want different numbers
    of tokens, and all are queued before its thread starts, so that the schedulers of several ranks see the same queue
    (Transformers agrees on it only for its own tensor parallelism). Under DeepSpeed's it also has to be told how many
    heads a rank has: it sizes its cache by the model's config, which still counts all.
    """

    model: Any
    tp_size: int = 1
    name: str = "generate_batch"
    batching: ContinuousBatchingConfig | None = None

    def config(self, workload: Workload) -> ContinuousBatchingConfig:
        if self.batching is not None:
            return self.batching
        longest = max(map(len, workload.prompts))
        # On CPU every query of a step is multiplied with the keys of all requests of the step, so few at a time are
        # best. A long prompt goes in chunks for the same reason: its mask is as large as chunk times context.
        at_once = min(8 if workload.num_samples > 1 else 4, len(workload.samples()))
        return ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=workload.kv_blocks(PAGE_SIZE) + at_once,
            max_batch_tokens=1024 if longest > LONG_PROMPT else 512 if workload.num_samples > 1 else 256,
            max_requests_per_batch=at_once,
        )

    def run(self, workload: Workload) -> Tokens:
        generation = GenerationConfig(
            max_new_tokens=max(workload.max_new_tokens), do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        # Set after the constructor, which refuses greedy groups; prompts are prefilled once and forked.
        generation.num_return_sequences = workload.num_samples
        with _heads_of_a_rank(self.model.config, self.tp_size), torch.no_grad():
            manager = self.model.init_continuous_batching(
                generation_config=generation, continuous_batching_config=self.config(workload)
            )
            try:
                return self._drain(manager, workload)
            finally:
                manager.stop(block=True, timeout=10)
                manager.destroy()

    def _drain(self, manager: Any, workload: Workload) -> Tokens:
        ids = [
            manager.add_request(list(prompt), max_new_tokens=n, eos_token_id=-1)
            for prompt, n in zip(workload.prompts, workload.max_new_tokens, strict=True)
        ]
        manager.start()
        found: dict[str, list[int]] = {}
        while len(found) < len(workload.samples()):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("its generation thread ended early")
            if result is not None and result.error is not None:
                raise RuntimeError(result.error)
            if result is not None and result.is_finished():
                found[result.request_id] = list(result.generated_tokens)
        names = [[i, *(f"{i}__child#{k}" for k in range(workload.num_samples - 1))] for i in ids]
        return [found[name] for group in names for name in group]

    def given(self, workload: Workload) -> str:
        config = self.config(workload)
        told = ("page_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch")
        forked = f", num_return_sequences {workload.num_samples}" if workload.num_samples > 1 else ""
        return ", ".join(f"{key} {getattr(config, key)}" for key in told) + forked


@contextmanager
def _heads_of_a_rank(config: Any, tp_size: int) -> Iterator[None]:
    before = config.num_attention_heads, config.num_key_value_heads
    config.num_attention_heads, config.num_key_value_heads = (n // tp_size for n in before)
    try:
        yield
    finally:
        config.num_attention_heads, config.num_key_value_heads = before


@contextmanager
def attention_restored(config: Any) -> Iterator[None]:
    """Each contestant puts its own attention into the model; the next one finds it as it was."""
    before = config._attn_implementation
    try:
        yield
    finally:
        config._attn_implementation = before


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
