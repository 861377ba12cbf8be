"""From where on a decode step is faster over KV shards than in a home of each rank: a part of long_tail.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cpinfer_tools.measuring.harness import table

if TYPE_CHECKING:
    from cpinfer_tools.measuring.workloads import ModelShape
    from talk import Talk

BLOCK_SIZE = 16
BATCHES = (1, 2, 3, 8)
NUM_ROUNDS = 5


def decode_steps(
    model: Any, topology: Any, shape: ModelShape, contexts: Sequence[int], talk: Talk
) -> list[dict[str, Any]]:
    """Seconds of the model's part of decode steps, dcp=1 and dcp=2, of batches of equal sequences; the slower rank's.

    And which of the two an engine would choose for answers of 64 tokens.
    """
    import cpinfer
    from cpinfer.config import JobConfig
    from cpinfer.engine.layout_choice import _rows_of, _seconds_of
    from cpinfer.layout.decode_choice import best_shards

    num_blocks = max(BATCHES) // 2 * (max(contexts) // BLOCK_SIZE + 2)  # a home has half of the sequences
    config = JobConfig(
        decode_context_parallel_size="auto",
        dtype="float32",
        block_size=BLOCK_SIZE,
        kv_cache_gib=num_blocks * BLOCK_SIZE * shape.kv_bytes_per_token / 2**30,
    )
    found = []
    with cpinfer.attach(model, topology, config) as engine:
        engine._steps.clear_cache()  # type: ignore[union-attr]  # memory that is read has been written
        choice = engine._core.layouts
        for num_rows in BATCHES:
            for context in contexts:
                seconds = dict.fromkeys(choice._layouts, math.inf)  # type: ignore[union-attr]
                for _ in range(NUM_ROUNDS):
                    for num_shards, layout in choice._layouts.items():  # type: ignore[union-attr]
                        talk.barrier()
                        steps = engine._steps.over(num_shards)  # type: ignore[union-attr]
                        taken_s = max(talk.all(_seconds_of(steps, _rows_of(layout, num_rows, context))))
                        seconds[num_shards] = min(seconds[num_shards], taken_s)
                chosen = best_shards(choice._rates, [context] * num_rows, [64] * num_rows)  # type: ignore[union-attr]
                found.append({"rows": num_rows, "context": context, "seconds": seconds, "chosen": chosen})
    return found


def describe_steps(steps: Sequence[Mapping[str, Any]]) -> str:
    """The step of dcp=1 over that of dcp=2, sequences by contexts."""
    contexts = sorted({step["context"] for step in steps})
    rows = []
    for num_rows in BATCHES:
        cells = []
        for step in (step for step in steps if step["rows"] == num_rows):
            alone, shared = (step["seconds"][n] for n in sorted(step["seconds"]))
            chosen = "**" if step["chosen"] > 1 else ""
            cells.append(f"{chosen}{alone / shared:.2f}{chosen} ({1e3 * alone:.1f} / {1e3 * shared:.1f} ms)")
        rows.append([str(num_rows), *cells])
    body = table(["sequences", *(f"{context:,} tokens" for context in contexts)], rows)
    return (
        f"{body}\n\nDecode steps of equal sequences, without sampling: time with dcp=1 over time with dcp=2; above 1 "
        "two shards are faster. Bold: what auto chooses two shards for, by the rates that it measured at its start."
    )
