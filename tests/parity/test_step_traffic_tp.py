"""Bytes on the wire under tensor parallelism: groups of copies, and groups that mix KV heads, as they are counted."""

from __future__ import annotations

import dataclasses

import pytest
from thread_tp import shard_attention

import cpinfer
from cpinfer.comm.axis import CountingComm, Traffic
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine.attach import model_spec
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.shards import KVSharding
from cpinfer.layout.step_traffic import Moved, PrefillWork, Widths, decode_moved, prefill_moved
from cpinfer.models.model_sizes import model_sizes
from tiny_models import FAMILIES, make_model, prompts_of

CHUNK, NUM_NEW = 96, 4
MIXED, COPIES, SPANS_TP = RankGrid(2, 2, 4), RankGrid(4, 1, 2), RankGrid(2, 1, 2)


@pytest.mark.parametrize(
    "grid", [MIXED, *(pytest.param(g, marks=pytest.mark.slow) for g in (COPIES, SPANS_TP))], ids=str
)
def test_a_prompt_in_chunks_and_its_answer_move_what_is_predicted(grid: RankGrid) -> None:
    """Of a rank that stores the most heads: here all do."""
    model = make_model(FAMILIES["qwen2"])
    spec = model_spec(model)
    sizes, widths = model_sizes(spec, model), Widths(4, 4, 4)
    [prompt] = prompts_of([2 * CHUNK], vocab_size=128)
    keys = {"dtype": "float32", "kv_cache_gib": 2**-7, "block_size": 4, "max_num_batched_tokens": CHUNK}

    def body(topology: cpinfer.Topology) -> dict[str, Traffic]:
        sharded = shard_attention(model, topology)
        axes = {axis: CountingComm(getattr(topology, axis)) for axis in ("pcp", "dcp")}
        counted = dataclasses.replace(topology, **axes)
        with cpinfer.attach(sharded, counted, parse_config({**keys, "context_workspace_tokens": CHUNK})) as engine:
            for axis in axes.values():
                axis.traffic = Traffic()
            engine.generate([prompt], SamplingParams(temperature=0, max_new_tokens=NUM_NEW, ignore_eos=True))
        return {name: axis.traffic for name, axis in axes.items()}

    sharding = KVSharding(grid.dcp_size, 4, 4)
    predicted: list[Moved] = []
    for start, ends in ((0, False), (CHUNK, True)):
        work = PrefillWork.of([CHUNK], [start], grid.pcp_size, [ends], pairs_per_token=spec.pairs_per_token)
        predicted += prefill_moved(sizes, grid, work, widths, sharding, workspace_tokens=CHUNK)
    for _ in range(NUM_NEW - 1):
        predicted += decode_moved(sizes, grid, 1, widths)
    for traffic in run_ranks(grid, body):
        for axis, found in traffic.items():
            mine = [each for each in predicted if each.axis == axis]
            assert found.num_collectives == sum(each.num for each in mine), axis
            assert found.received_bytes == sum(each.received_bytes for each in mine), axis
