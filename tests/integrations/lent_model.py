"""What a job's model and process groups go through when they are lent, as plain values for a worker to print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

import cpinfer
from cpinfer.config import SamplingParams, parse_config
from cpinfer_tools.verify import check_rollout
from tiny_models import FAMILIES, make_model, prompts_of

NUM_NEW_TOKENS = 8


@contextmanager
def counted_groups() -> Iterator[list[list[int]]]:
    """The ranks of every process group that is created inside."""
    created: list[list[int]] = []
    new_group = dist.new_group

    def counting_new_group(ranks: list[int], *args: Any, **kwargs: Any) -> Any:
        created.append(list(ranks))
        return new_group(ranks, *args, **kwargs)

    dist.new_group = counting_new_group
    try:
        yield created
    finally:
        dist.new_group = new_group


def grid_of(topology: cpinfer.Topology) -> list[int]:
    grid = topology.grid
    return [grid.tp_size, grid.pcp_size, grid.dcp_size, grid.dp_size]


def lend(
    module: Any, topology: cpinfer.Topology, provider: str = "autotp", prepacked_gib: float = 0.0
) -> dict[str, Any]:
    """Generate with a model (that of the family qwen2, held by a job in whatever way) and give it back.

    `same_tokens`: for each prompt whether the answer is the whole model's; `num_prepacked`: how many layers ran by
    copies of their weights; the others say what is as it was.
    """
    grid = topology.grid
    config = parse_config(
        {
            "dtype": "float32",
            "tensor_parallel": {"tp_size": grid.tp_size, "provider": provider},
            "prefill_context_parallel_size": grid.pcp_size,
            "decode_context_parallel_size": grid.dcp_size,
            "prepacked_weights_gib": prepacked_gib,
        }
    )
    weights = {name: _local(weight).clone() for name, weight in module.state_dict().items()}
    before = _settings(module)
    greedy = SamplingParams(temperature=0, max_new_tokens=NUM_NEW_TOKENS)
    with cpinfer.attach(module, topology, config) as engine:
        results = engine.generate(prompts_of((3, 40), vocab_size=128), greedy)
        prepacked = engine._runner.prepacked.by_module.values()
        num_prepacked = sum(linear._copy is not None for linear in prepacked)
    topology.close()
    after = _settings(module)
    whole = make_model(FAMILIES["qwen2"])
    return {
        "same_tokens": [
            list(r.token_ids) == check_rollout.generate_greedy(whole, r.prompt_token_ids, NUM_NEW_TOKENS)
            for r in results
        ],
        "num_prepacked": num_prepacked,
        "weights_untouched": all(torch.equal(weights[name], _local(w)) for name, w in module.state_dict().items()),
        **{name: after[name] == before[name] for name in before},
    }


def _settings(module: Any) -> dict[str, Any]:
    return {
        "modes_restored": [m.training for m in module.modules()],
        "hooks_untouched": [list(m._forward_pre_hooks) for m in module.modules()],
        "attention_restored": module.config._attn_implementation,
    }


def _local(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if hasattr(weight, "to_local") else weight
