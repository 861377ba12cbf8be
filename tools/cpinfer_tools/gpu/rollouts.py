"""Stage rollouts: generated tokens per second beside Transformers `generate` (static cache) and `generate_batch`.

A random model of about 0.45B parameters, the same prompts, greedy; all engines in this process, taking turns. Random
weights say nothing of text, but cost what real ones do. Greedy texts are compared, as far as half precision allows:
how many samples agree with `generate` is reported, and has no target there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import ContinuousBatchingConfig

import cpinfer
from cpinfer.attention.backends.base import AttentionNeeds
from cpinfer.layout.capacity import KVLayout
from cpinfer_tools.gpu.stage import Figure, Found, Setting
from cpinfer_tools.measuring.contestants import Contestant, Cpinfer, Generate, GenerateBatch, attention_restored
from cpinfer_tools.measuring.harness import Timing, rotated, timed
from cpinfer_tools.measuring.workloads import QUICK_SHAPE, ModelShape, Workload, make_model, random_prompts, spread

SHAPE = ModelShape(
    num_layers=24,
    hidden_size=1024,
    intermediate_size=4096,
    num_q_heads=16,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=32768,
)
ROUNDS = 3


@dataclass(frozen=True)
class _Raced:
    """Seconds and tokens of one engine, round after round."""

    timing: Timing
    tokens: list[list[int]]


def run(setting: Setting) -> Found:
    """Tokens per second of each engine on each workload; ours must be ahead of both."""
    shape = _shape(setting)
    model = make_model(shape).to(setting.device, setting.dtype)
    figures, notes = [], []
    for workload in _workloads(shape, setting.is_smoke):
        contestants = _contestants(model, shape, workload, setting)
        raced = _race(contestants, model, workload, setting, 1 if setting.is_smoke else ROUNDS)
        rates = {name: workload.num_generated_tokens / r.timing.median_s for name, r in raced.items()}
        target = None if setting.is_smoke else max(rate for name, rate in rates.items() if name != "cpinfer")
        for name, rate in rates.items():
            wanted = target if name == "cpinfer" else None
            figures.append(Figure(f"{workload.name}: {name}", rate, "tokens/s", target=wanted, higher_is_better=True))
        same = sum(a == b for a, b in zip(raced["cpinfer"].tokens, raced["generate"].tokens, strict=True))
        total = len(raced["cpinfer"].tokens)
        # In float32 the texts are the same.
        wanted = float(total) if setting.dtype == torch.float32 else None
        figures.append(
            Figure(
                f"{workload.name}: samples as by generate", same, f"of {total}", target=wanted, higher_is_better=True
            )
        )
        notes.append(f"{workload.name}: {workload.described()}")
        notes += [f"{workload.name}, {c.name}: {c.given(workload)}" for c in contestants]
    return Found(tuple(figures), tuple(notes))


def needs(setting: Setting) -> Iterator[AttentionNeeds]:
    """What the model asks of our kernels."""
    shape = _shape(setting)
    layout = KVLayout(shape.num_kv_heads, shape.head_dim, shape.head_dim)
    yield AttentionNeeds(setting.dtype, ((shape.num_q_heads, layout),))


def _shape(setting: Setting) -> ModelShape:
    if setting.is_smoke:
        return replace(QUICK_SHAPE, head_dim=64) if setting.is_cuda else QUICK_SHAPE
    return SHAPE


def _workloads(shape: ModelShape, is_smoke: bool) -> list[Workload]:
    """A GRPO group, and a ragged batch with a long tail of answers."""
    vocab = shape.vocab_size
    if is_smoke:
        return [Workload("group", random_prompts([16] * 2, vocab, 1), (4, 4), 2)]
    lens = spread(64, 2048, 64, geometric=False, seed=11)
    new = spread(64, 1024, 64, geometric=True, seed=12)
    return [
        Workload("group", random_prompts([512] * 16, vocab, 1), (256,) * 16, 8),
        Workload("ragged", random_prompts(lens, vocab, 2), tuple(new)),
    ]


def _contestants(model: object, shape: ModelShape, workload: Workload, setting: Setting) -> list[Contestant]:
    dtype = str(setting.dtype).removeprefix("torch.")
    ours = Cpinfer(model, cpinfer.Topology.single(), shape, dtype=dtype, backend=setting.backend_name)
    if setting.is_smoke:
        return [ours, Generate(model), GenerateBatch(model)]
    # As the peers' decode steps are: `generate` captures those of a static cache.
    ours = replace(ours, step_tokens=8192, cuda_graphs=True)
    num_samples = len(workload.samples())
    batching = ContinuousBatchingConfig(
        page_size=256,
        num_blocks=workload.kv_blocks(256) + num_samples,
        max_batch_tokens=8192,
        max_requests_per_batch=num_samples,
    )
    return [ours, Generate(model, always_static=True), GenerateBatch(model, batching=batching)]


def _race(
    contestants: list[Contestant], model: object, workload: Workload, setting: Setting, rounds: int
) -> dict[str, _Raced]:
    """Everyone once to warm up, then in turns."""
    by_name = {contestant.name: contestant for contestant in contestants}
    seconds: dict[str, list[float]] = {name: [] for name in by_name}
    tokens = {}
    for i in range(-1, rounds):
        for name in rotated(list(by_name), max(0, i)):
            with attention_restored(model.config):  # type: ignore[attr-defined]
                tokens[name], took_s = timed(partial(by_name[name].run, workload), partial(_wait, setting))
            if i >= 0:
                seconds[name].append(took_s)
    return {name: _Raced(Timing(tuple(seconds[name])), tokens[name]) for name in by_name}


def _wait(setting: Setting) -> None:
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
