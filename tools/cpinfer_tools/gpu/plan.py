"""Stage plan: the model of cost beside the clock on one GPU, and how much of its data sheet is reached.

Predictions take the copy and the matrix product that are measured here, and of `machines` what a layer's launches cost;
`explain --plan` takes shares of the data sheet instead, which these figures are to correct.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

import cpinfer
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine.attach import model_spec
from cpinfer.layout.cost_model import Link, Rates, decode_step, prefill
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.machines import FLOPS_SHARE, LAUNCH_S, MACHINES, MEMORY_SHARE
from cpinfer.layout.step_traffic import Widths
from cpinfer.models.model_sizes import model_sizes
from cpinfer_tools.gpu.stage import Figure, Found, Setting, copy_bytes_per_s, flops_per_s
from cpinfer_tools.measuring.rates import decode_step_s
from cpinfer_tools.measuring.workloads import QUICK_SHAPE, ModelShape, make_model, random_prompts

# Eight layers as wide as those of models of 8 billion parameters.
LAYERS_OF_8_BILLION = ModelShape(
    num_layers=8, hidden_size=4096, intermediate_size=14336, num_q_heads=32, num_kv_heads=8, head_dim=128
)


def run(setting: Setting) -> Found:
    """Seconds of prefill and of decode steps, predicted and measured, and shares of the data sheet."""
    copy_rate, flop_rate = copy_bytes_per_s(setting), flops_per_s(setting)
    return Found((*_shares(setting, copy_rate, flop_rate), *_steps(setting, copy_rate, flop_rate)))


def _shares(setting: Setting, copy_rate: float, flop_rate: float) -> Iterator[Figure]:
    name = torch.cuda.get_device_name(setting.device).lower() if setting.device.type == "cuda" else ""
    machine = next((machine for key, machine in MACHINES.items() if key in name), None)
    if machine is None:
        return
    for what, rate, sheet, taken in (
        ("memory", copy_rate, machine.memory_bandwidth, MEMORY_SHARE),
        ("products", flop_rate, machine.flops_16, FLOPS_SHARE),
    ):
        yield Figure(f"{what}: share of the data sheet ({taken:.0%} is taken)", rate / sheet, "", higher_is_better=True)


def _steps(setting: Setting, copy_rate: float, flop_rate: float) -> Iterator[Figure]:
    small = setting.is_smoke
    shape, prompt, gib = (QUICK_SHAPE, 64, 2**-6) if small else (LAYERS_OF_8_BILLION, 8192, 4.0)
    decodes = [(2, 32)] if small else [(8, 4096), (64, 512)]
    model = make_model(shape).to(setting.device, setting.dtype)
    sizes, b = model_sizes(model_spec(model), model), setting.dtype.itemsize
    widths, grid = Widths(b, b, b), RankGrid()
    rates = Rates(
        ((1, flop_rate),),
        attention_flops=flop_rate,
        memory_bandwidth=copy_rate,
        link=Link(float("inf"), 0.0),
        layer_s=LAUNCH_S,
        host_overlaps=not setting.is_smoke,
    )
    config = parse_config({"backend": setting.backend_name, "kv_cache_gib": gib, "max_num_batched_tokens": prompt})
    with cpinfer.attach(model, None, config) as engine:
        seconds = [_prefill_s(engine, random_prompts([prompt], shape.vocab_size, seed)[0]) for seed in range(4)]
        predicted = prefill(sizes, grid, rates, [prompt], prompt, widths)
        yield from _beside(f"prefill of {prompt:,} tokens", min(seconds[1:]), predicted.seconds)
        for batch, context in decodes:
            prompts = [list(p) for p in random_prompts([context] * batch, shape.vocab_size, 9)]
            measured = decode_step_s(engine, prompts, 3)
            step = decode_step(sizes, grid, rates, [context + 8] * batch, widths)
            yield from _beside(f"decode of {batch} x {context:,} tokens", measured, step.seconds)


def _prefill_s(engine: cpinfer.Engine, prompt: tuple[int, ...]) -> float:
    start_s = time.perf_counter()
    engine.generate([list(prompt)], SamplingParams(temperature=0, max_new_tokens=1, ignore_eos=True))
    return time.perf_counter() - start_s


def _beside(name: str, measured_s: float, predicted_s: float) -> Iterator[Figure]:
    yield Figure(name, measured_s * 1e3, "ms")
    yield Figure(f"{name}: predicted", predicted_s * 1e3, "ms")
    yield Figure(f"{name}: predicted of measured", predicted_s / measured_s, "")
