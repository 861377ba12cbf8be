"""Stage graphs: decode replayed from CUDA graphs equals the same padded steps run launch by launch, and what it saves.

One rank. That collectives can be captured takes several GPUs; `cuda_graphs` is off by default until that has been seen.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

import cpinfer
from cpinfer.attention.backends.base import AttentionNeeds
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine.request import RolloutResult
from cpinfer.layout.capacity import KVLayout
from cpinfer_tools.gpu.stage import Figure, Found, Setting
from cpinfer_tools.measuring.workloads import QUICK_SHAPE, ModelShape, make_model, random_prompts


def run(setting: Setting) -> Found:
    """Differences of logprobs, and seconds per token, of the three ways to run decode."""
    if not setting.is_cuda:
        return Found(notes=("needs CUDA",))
    model = make_model(_shape(setting)).to(setting.device, setting.dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        replayed, replayed_s = _generate(model, setting, cuda_graphs=True)
        notes = tuple(str(w.message) for w in caught if "CUDA graphs" in str(w.message))
    with mock.patch("cpinfer.engine.decode_cuda_graphs.capture_on_cuda", lambda: _refuse), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        padded, padded_s = _generate(model, setting, cuda_graphs=True)
    plain, plain_s = _generate(model, setting, cuda_graphs=False)
    return Found(
        (
            Figure("captured", 0.0 if notes else 1.0, "", target=1.0, higher_is_better=True),
            Figure("logprobs replayed beside padded, largest difference", _largest(replayed, padded), "", target=0.0),
            Figure("samples whose tokens differ, replayed and padded", _num_other(replayed, padded), "", target=0.0),
            # Of other shapes, whose products round otherwise: no target.
            Figure("samples whose tokens differ, replayed and plain", _num_other(replayed, plain), ""),
            Figure("replayed", replayed_s * 1e3, "ms per decode step", target=plain_s * 1e3),
            Figure("padded, launch by launch", padded_s * 1e3, "ms per decode step"),
            Figure("plain", plain_s * 1e3, "ms per decode step"),
        ),
        notes,
    )


def needs(setting: Setting) -> Iterator[AttentionNeeds]:
    """What the model asks of its kernels."""
    shape = _shape(setting)
    layout = KVLayout(shape.num_kv_heads, shape.head_dim, shape.head_dim)
    yield AttentionNeeds(setting.dtype, ((shape.num_q_heads, layout),))


def _shape(setting: Setting) -> ModelShape:
    if setting.is_smoke:
        return replace(QUICK_SHAPE, head_dim=64)
    return replace(ModelShape(), num_layers=8, hidden_size=1024, num_q_heads=16, num_kv_heads=4)


def _refuse(run: Callable[[], None]) -> Callable[[], None]:
    raise RuntimeError("not captured, on purpose")


def _generate(model: Any, setting: Setting, *, cuda_graphs: bool) -> tuple[list[RolloutResult], float]:
    """Results, and seconds per decode step once everything that happens once has happened."""
    lengths = (5, 17, 1) if setting.is_smoke else (5, 130, 700, 33, 64, 257, 1, 1500)
    first, step, longest_num = (2, 2, 4) if setting.is_smoke else (32, 16, 128)
    prompts = [list(p) for p in random_prompts(lengths, model.config.vocab_size, seed=3)]
    config = parse_config(
        {"backend": "flashinfer", "kv_cache_gib": 0.01 if setting.is_smoke else 1.0, "cuda_graphs": cuda_graphs}
    )
    # Answers of different lengths, so that there are fewer and fewer rows.
    sampling = [
        SamplingParams(temperature=0, max_new_tokens=first + step * i, ignore_eos=True) for i in range(len(lengths))
    ]
    with cpinfer.attach(model, None, config) as engine:
        results = engine.generate(prompts, sampling)
        longest = [SamplingParams(temperature=0, max_new_tokens=longest_num, ignore_eos=True)] * len(lengths)
        engine.generate(prompts, longest)
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        engine.generate(prompts, longest)
        torch.cuda.synchronize()
        return results, (time.perf_counter() - start_s) / longest_num


def _largest(a: list[RolloutResult], b: list[RolloutResult]) -> float:
    return max(
        (abs(x - y) for r, s in zip(a, b, strict=True) for x, y in zip(r.logprobs, s.logprobs, strict=True)),
        default=0.0,
    )


def _num_other(a: list[RolloutResult], b: list[RolloutResult]) -> float:
    return sum(r.token_ids != s.token_ids for r, s in zip(a, b, strict=True))
