"""Runs layouts one after another on the processes it was started with; rank 0 writes how they differ from Transformers.

torchrun --nproc-per-node 2 tests/distributed/layout_worker.py OUTPUT '[{"tp": 2, "pcp": 1, "dcp": 1, "kv": 2}]'
"""

from __future__ import annotations

import copy
import json
import os
import sys
from typing import Any

import torch

import cpinfer
from cpinfer.comm.bootstrap import Launch, default_group
from cpinfer.config import SamplingParams, parse_config
from cpinfer.layout.grid import RankGrid
from cpinfer_tools.verify import check_rollout
from routers import num_other_experts
from tiny_models import FAMILIES, make_model, prompts_of

PROMPT_LENS = (1, 2, 3, 17, 64, 200)
TURN = SamplingParams(temperature=0, max_new_tokens=4)


def main(output: str, layouts: list[dict[str, Any]]) -> None:
    launch = Launch.from_environ(os.environ)
    with default_group(launch):
        for layout in layouts:
            outcome = {**layout, **run(launch, **layout)}
            if launch.rank == 0:
                with open(output, "a", encoding="utf-8") as file:
                    file.write(json.dumps(outcome) + "\n")


def run(
    launch: Launch, tp: int, pcp: int, dcp: int, kv: int | None = None, family: str = "qwen2", **changes: Any
) -> dict[str, Any]:
    """Greedy and sampled text of one layout against the unsharded model, in float32; `kv` heads where not its own."""
    config = copy.deepcopy(FAMILIES[family])
    if kv is not None:
        config.num_key_value_heads = kv
    whole = make_model(config)
    grid = RankGrid(tp, pcp, dcp, launch.world_size // (tp * pcp))
    model, topology = copy.deepcopy(whole), None
    if tp > 1:
        from cpinfer_integrations.deepspeed import launch_inference

        launched = launch_inference(model, grid, dtype=torch.float32)
        model, topology = launched.module, launched.topology
    else:
        topology = cpinfer.Topology.from_world(grid)
    engine_config = parse_config(
        {
            "dtype": "float32",
            "tensor_parallel": {"tp_size": tp},
            "prefill_context_parallel_size": pcp,
            "decode_context_parallel_size": dcp,
            "cp_kv_cache_interleave_size": 3,
            "block_size": 4,
            "kv_cache_gib": 2**-8,  # larger ones take time to clear
            **changes,
        }
    )
    prompts = prompts_of(PROMPT_LENS, vocab_size=128)
    with cpinfer.attach(model, topology, engine_config) as engine:
        greedy = engine.generate(prompts, SamplingParams(temperature=0, max_new_tokens=10))
        named = [{"prompt_token_ids": prompt, "id": i} for i, prompt in enumerate(prompts)]
        has_experts = hasattr(config, "num_experts_per_tok")
        sampling = SamplingParams(temperature=1, seed=4, max_new_tokens=10, routed_experts=has_experts)
        sampled = engine.generate(named, sampling)
        turns = take_turns(engine, prompts[launch.rank :], num_turns=2 + launch.rank)
    topology.close()
    if launch.rank != 0:
        return {}
    differences = [
        (check_rollout.score(whole, r.prompt_token_ids, r.token_ids) - torch.tensor(r.logprobs)).abs().max().item()
        for r in greedy + sampled + turns
    ]
    num_same, num_same_turns = (
        sum(list(r.token_ids) == check_rollout.generate_greedy(whole, r.prompt_token_ids, n) for r in results)
        for results, n in ((greedy, 10), (turns, TURN.max_new_tokens))
    )
    return {
        "num_prompts": len(prompts),
        "num_same_tokens": num_same,
        "num_turns": len(turns),
        "num_same_turns": num_same_turns,
        "max_abs_logprob_difference": max(differences),
        "sampled": [r.token_ids for r in sampled],
        "num_other_experts": sum(num_other_experts(whole, r) for r in sampled) if has_experts else None,
    }


def take_turns(engine: cpinfer.Engine, prompts: list[list[int]], num_turns: int) -> list[cpinfer.RolloutResult]:
    """Every turn of a session for each of this rank's prompts. Ranks have other numbers of both."""
    results: list[cpinfer.RolloutResult] = []
    sessions = [engine.open_session(prompt) for prompt in prompts]
    by_turn = {engine.add([], TURN, session=session): session for session in sessions}

    def condition(outputs: list[cpinfer.RequestOutput]) -> bool:
        for output in outputs:
            if output.result is not None:
                results.append(output.result)
                session = by_turn.pop(output.request_id)
                if session.num_turns < num_turns:
                    by_turn[engine.add([7, session.num_turns, 9], TURN, session=session)] = session
        return not by_turn

    engine.run_until(condition)
    return results


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
