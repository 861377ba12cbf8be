"""Stage deterministic: the same bits of logprobs in several layouts, chunks and batches, played in turn on one device.

Of each token that was sampled the logprobs of the likeliest are compared with those of one rank, with `==`. In float32
and in the stage's dtype, over a cache in fp8 too. When an engine attaches it checks its model and its attention kernel
for themselves, and names what it finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from cpinfer.engine.request import RolloutResult
from cpinfer.layout.grid import RankGrid
from cpinfer_tools.gpu.model import generate, models
from cpinfer_tools.gpu.stage import Figure, Found, Setting

NUM_TOP = 16
# Grid, and keys of the config.
WAYS: tuple[tuple[str, RankGrid, dict[str, object]], ...] = (
    ("pcp=2 dcp=2, odd chunks", RankGrid(1, 2, 2), {"max_num_batched_tokens": 17}),
    ("pcp=4 dcp=2, two homes", RankGrid(1, 4, 2), {}),
    ("pcp=8 dcp=8", RankGrid(1, 8, 8), {}),
    ("whole prompts", RankGrid(), {"max_num_batched_tokens": 4096}),
    ("one at a time", RankGrid(), {"max_num_seqs": 1}),
)


def run(setting: Setting) -> Found:
    """How many tokens of each way have other bits than on one rank, which must be none."""
    figures: list[Figure] = []
    for name, model in models(setting):
        for dtype in dict.fromkeys((torch.float32, setting.dtype)):
            figures += _figures(f"{name} {str(dtype).removeprefix('torch.')}", model.to(dtype), setting)
        figures += _figures(f"{name}, KV in fp8", model, setting, kv_cache_dtype="fp8_e4m3")
    return Found(tuple(figures))


def _figures(kind: str, model: Any, setting: Setting, **keys: object) -> Iterator[Figure]:
    keys = {"deterministic": True, "backend": "auto", **keys}
    expected = _tokens(generate(model, RankGrid(), setting, top_logprobs=NUM_TOP, **keys))
    for way, grid, more in WAYS[:2] if setting.is_smoke else WAYS:
        found = _tokens(generate(model, grid, setting, top_logprobs=NUM_TOP, **keys, **more))
        differing = sum(a != b for a, b in zip(found, expected, strict=True))
        yield Figure(f"{kind}, {way}: tokens with other bits", differing, f"of {len(expected)}", target=0.0)


def _tokens(results: list[RolloutResult]) -> list[Any]:
    """Of each token all that was computed for it."""
    return [
        told
        for result in results
        for told in zip(result.token_ids, result.logprobs, result.top_logprobs or (), strict=True)
    ]
