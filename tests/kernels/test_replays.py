"""Plans of fixed size as CUDA graphs replay them: kernels with the parameters of the capture, arrays of later plans."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Heads, Inputs, backend_of, faults, inputs_of, on_device, rows_of, truth_of

from cpinfer.attention.backends.base import FixedSize
from cpinfer.attention.backends.flashinfer.backend import LN_2, FlashInferPlan
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.rows import AttentionRows
from interpreted_cuda.modules import Recording
from interpreted_cuda.tensors import CudaTensor

pytestmark = pytest.mark.timeout(900)

NUM_ROWS, NUM_SLOTS, MAX_PAGES = 4, 4096, 3000
CASES = {
    "grouped": Heads(8, KVLayout(2, 128, 128)),
    "each head its own": Heads(4, KVLayout(4, 128, 128)),
    "latents": Heads(16, KVLayout(1, 576, 512, v_is_prefix_of_k=True)),
    "expanded": Heads(4, KVLayout(4, 192, 128)),
}
LATER = (
    [18, 0, 6, 8],
    [1, 0, 0, 5],
    [0, 0, 7, 200],
    [0, 0, 0, 0],
    [900, 41, 7, 17],
    [3, 3, 3, 3],
    [700, 700, 700, 700],
    [1, 1, 1, 1],
)


def memory_of(plan: FlashInferPlan) -> list[CudaTensor]:
    """What a graph reads and writes beside the tensors that it was captured with: what the wrapper holds."""
    held = (x for wrapper in plan._wrappers.values() for x in vars(wrapper._wrapper).values())
    return [x for x in held if isinstance(x, CudaTensor)]


@pytest.mark.parametrize("single_tokens", [False, True], ids=["blocks of 16", "pages of one token"])
@pytest.mark.parametrize("heads", CASES.values(), ids=CASES)
def test_what_was_captured_computes_later_rows(heads: Heads, single_tokens: bool) -> None:
    block_size = 4 if single_tokens else 16

    def rows_for(kv_lens: list[int]) -> AttentionRows:
        at = {"causal": False, "seed": sum(kv_lens), "num_blocks": NUM_SLOTS // block_size}
        rows = rows_of([1] * NUM_ROWS, kv_lens, block_size, **at).over(heads.layout)  # type: ignore[arg-type]
        return rows.above(rows.kv_hi - 3) if single_tokens else rows

    rows = rows_for([1] * NUM_ROWS)
    inputs = inputs_of(rows, heads, num_slots=NUM_SLOTS)
    given = on_device(inputs)
    arguments = (given.q, given.keys, given.values)
    plan = backend_of(heads).fixed_plan(FixedSize(NUM_ROWS, MAX_PAGES), single_tokens=single_tokens)
    plan.update(rows)
    plan.run(*arguments, scale=heads.scale)  # as before a capture
    with Recording() as graph:
        out, lse = plan.run(*arguments, scale=heads.scale)
    assert isinstance(out, CudaTensor) and isinstance(lse, CudaTensor)
    for seed, kv_lens in enumerate(LATER, start=1):
        rows = rows_for(kv_lens)
        fill(inputs, inputs_of(rows, heads, num_slots=NUM_SLOTS, seed=seed))
        plan.update(rows)
        assert graph.replay([*memory_of(plan), given.q, given.keys, given.values, out, lse]) >= 1
        # What a graph holds beside FlashInfer's kernels.
        lse.mul_(LN_2)
        assert plan._empty is not None
        out.masked_fill_(plan._empty[:, None, None], 0.0)
        lse.masked_fill_(plan._empty[:, None], -torch.inf)
        assert not faults((out, lse), truth_of(rows, inputs, heads), heads.dtype), kv_lens


def fill(room: Inputs, numbers: Inputs) -> None:
    room.q.copy_(numbers.q)
    room.keys.copy_(numbers.keys)
    room.values.copy_(numbers.values)
