"""Context-parallel attention equals dense attention, whatever the layout; and would not, were anything wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from attention_ranks import Case, Tampering, run_case
from torch import Tensor

from cpinfer.backends.base import AttentionBackend, PlannedAttention
from cpinfer.comm.axis import AxisComm
from cpinfer.comm.topology import Topology
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.prefill import PrefillPlan
from cpinfer.layout.rows import AttentionRows
from cpinfer.layout.traffic import decode_bytes, decode_collectives, prefill_bytes
from cpinfer.ops.states import State

# float32 against float64: logits up to about 30 leave some 1e-6 of the weights; values are of size 1.
TOLERANCE = 1e-5
# What a mistake must cost at least to be called one: a hundred tolerances.
WRONG = 100 * TOLERANCE

# (tp, pcp, dcp, KV heads) for every number of shards, 8 query heads (6 where tp is 3).
LAYOUTS = [
    (1, 1, 1, 2), (2, 1, 1, 2), (4, 1, 1, 2),
    (1, 2, 2, 2), (2, 1, 2, 1), (2, 2, 2, 2), (2, 2, 2, 1), (4, 2, 2, 2), (4, 1, 2, 2),
    (1, 3, 3, 2), (3, 1, 3, 1), (2, 3, 3, 1),
    (1, 4, 4, 8), (2, 2, 4, 1), (4, 2, 4, 2), (4, 1, 4, 1),
    (1, 8, 8, 1), (2, 4, 8, 1), (4, 2, 8, 1), (8, 1, 8, 1),
]  # fmt: skip
# One token, fewer than ranks, and both sides of multiples of the block (4), of the interleave (3, 16) and of pieces.
LENGTHS = (1, 2, 3, 5, 15, 16, 17, 31, 33, 47, 48, 49, 64, 65, 127, 129)


def make_case(tp: int, pcp: int, dcp: int, num_kv_heads: int, **changes: object) -> Case:
    case = Case(RankGrid(tp, pcp, dcp), 6 if tp == 3 else 8, num_kv_heads, LENGTHS)
    return replace(case, **changes)


@pytest.mark.parametrize("peaked", [True, False], ids=["peaked", "flat"])
@pytest.mark.parametrize("interleave", [1, 3, 16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: "tp{}_pcp{}_dcp{}_kv{}".format(*x))
def test_attention_of_every_layout_equals_dense_attention(
    layout: tuple[int, int, int, int], interleave: int, peaked: bool
) -> None:
    assert run_case(make_case(*layout, interleave=interleave, peaked=peaked)).max_error <= TOLERANCE


@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_block_size_does_not_matter(block_size: int) -> None:
    assert run_case(make_case(2, 2, 4, 1, block_size=block_size, interleave=3)).max_error <= TOLERANCE


@pytest.mark.parametrize("page_size", [2, 4, 16, 64])
def test_scratch_page_size_does_not_matter(page_size: int) -> None:
    assert run_case(make_case(1, 4, 4, 2, page_size=page_size)).max_error <= TOLERANCE


@pytest.mark.parametrize("pcp", [2, 3, 8])
def test_prompts_kept_whole_on_one_rank_give_the_same(pcp: int) -> None:
    assert run_case(make_case(1, pcp, pcp, 2, whole_prompts=True)).max_error <= TOLERANCE


def test_long_runs_of_blocks_read_in_place_give_the_same() -> None:
    case = make_case(1, 2, 2, 2, prompt_lens=(1500, 900), block_size=512, interleave=512)
    assert run_case(case).max_error <= TOLERANCE


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5])
def test_any_number_of_rows_can_be_dealt(num_rows: int) -> None:
    assert run_case(make_case(2, 4, 4, 2, prompt_lens=LENGTHS[-num_rows:])).max_error <= TOLERANCE


# --- homes: dcp < pcp ---

HOMES = [(1, 2, 1, 2), (1, 4, 2, 2), (2, 4, 1, 2), (1, 4, 1, 2), (2, 4, 2, 1), (1, 6, 3, 2), (1, 8, 2, 2)]


@pytest.mark.parametrize("interleave", [1, 3, 16])
@pytest.mark.parametrize("layout", HOMES, ids=lambda x: "tp{}_pcp{}_dcp{}_kv{}".format(*x))
def test_sequences_dealt_to_homes_equal_dense_attention(layout: tuple[int, int, int, int], interleave: int) -> None:
    assert run_case(make_case(*layout, interleave=interleave)).max_error <= TOLERANCE


def test_a_home_without_a_sequence_idles() -> None:
    assert run_case(make_case(1, 4, 2, 2, prompt_lens=(33,))).max_error <= TOLERANCE


# --- context: chunked prefill ---

CONTEXT_LAYOUTS = [
    (1, 1, 1, 2), (1, 2, 2, 2), (1, 3, 3, 2), (2, 2, 2, 2), (2, 1, 2, 1), (2, 2, 4, 1), (4, 2, 4, 2), (4, 2, 8, 1),
    (1, 2, 1, 2), (1, 4, 2, 2), (2, 4, 2, 1),
]  # fmt: skip


@pytest.mark.parametrize("exchange", ["queries", "kv"])
@pytest.mark.parametrize(("chunk", "interleave"), [(4, 1), (7, 3), (16, 16), (37, 4), (500, 3)])
@pytest.mark.parametrize("layout", CONTEXT_LAYOUTS, ids=lambda x: "tp{}_pcp{}_dcp{}_kv{}".format(*x))
def test_prefill_in_chunks_equals_dense_attention(
    layout: tuple[int, int, int, int], chunk: int, interleave: int, exchange: str
) -> None:
    case = make_case(
        *layout,
        prompt_lens=(1, 5, 16, 33, 65),
        chunk=chunk,
        interleave=interleave,
        context_exchange=exchange,
        num_new_tokens=1,
    )
    assert run_case(case).max_error <= TOLERANCE


@pytest.mark.parametrize("workspace", [1, 7, 64, 100])
def test_context_gathered_in_windows_equals_dense_attention(workspace: int) -> None:
    case = make_case(1, 4, 2, 2, chunk=37, context_exchange="kv", context_workspace_tokens=workspace)
    assert run_case(case).max_error <= TOLERANCE


@pytest.mark.parametrize("exchange", ["queries", "kv"])
def test_whole_prompts_with_context_equal_dense_attention(exchange: str) -> None:
    case = make_case(1, 4, 4, 2, chunk=37, context_exchange=exchange, whole_prompts=True)
    assert run_case(case).max_error <= TOLERANCE


# --- the other ways for states to come back ---


@pytest.mark.parametrize("state_return", ["ag_rs", "replicate_q"])
@pytest.mark.parametrize("layout", [(1, 2, 2, 2), (2, 2, 2, 2), (1, 4, 2, 2), (1, 3, 3, 2), (1, 2, 1, 2)])
def test_every_way_for_states_to_return_gives_the_same(layout: tuple[int, int, int, int], state_return: str) -> None:
    assert run_case(make_case(*layout, state_return=state_return)).max_error <= TOLERANCE


@pytest.mark.parametrize("layout", [(2, 2, 4, 1), (4, 2, 8, 1), (2, 1, 2, 1)])
def test_reduce_scatter_works_over_columns_too(layout: tuple[int, int, int, int]) -> None:
    assert run_case(make_case(*layout, state_return="ag_rs")).max_error <= TOLERANCE


@pytest.mark.parametrize(("state_return", "collectives"), [("a2a", 2), ("ag_rs", 3), ("replicate_q", 1)])
def test_collectives_of_every_way_for_states_to_return(state_return: str, collectives: int) -> None:
    outcome = run_case(make_case(1, 2, 2, 2, state_return=state_return, num_new_tokens=1))
    assert {t.num_collectives for t in outcome.decode_traffic} == {collectives}


# --- negative controls: each mistake others have shipped must be seen ---


class _WrongLogBase:
    """A backend that returns lse in base 2, as FlashInfer's kernels do."""

    name = "wrong"

    def __init__(self, inner: AttentionBackend) -> None:
        self._inner = inner

    def plan(self, rows: AttentionRows) -> PlannedAttention:
        planned = self._inner.plan(rows)

        class Planned:
            def run(self, q: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> State:
                out, lse = planned.run(q, keys, values, scale=scale)
                return out, lse / math.log(2)

        return Planned()


def test_an_lse_in_base_2_fails() -> None:
    assert run_case(make_case(1, 2, 2, 2), Tampering(backend=_WrongLogBase)).max_error > WRONG


def test_a_wrong_shard_index_on_one_rank_fails() -> None:
    def shard(topology: Topology) -> int:
        return 0 if topology.rank == 1 else topology.kv_shard

    assert run_case(make_case(1, 4, 4, 2), Tampering(shard=shard)).max_error > WRONG


def test_head_and_tail_swapped_fails() -> None:
    def swap(plan: PrefillPlan) -> PrefillPlan:
        """The key ranges of the first prompt's head and tail, exchanged: as many queries, the other's keys."""
        kv_hi = plan.rows.kv_hi.copy()
        kv_hi[[0, 1]] = kv_hi[[1, 0]]
        indptr, ids = plan.rows.block_indptr, plan.rows.block_ids
        first, second = ids[indptr[0] : indptr[1]], ids[indptr[1] : indptr[2]]
        ids = torch.cat([torch.tensor(x) for x in (second, first, ids[indptr[2] :])]).numpy()
        indptr = indptr.copy()
        indptr[1] = len(second)
        rows = AttentionRows(plan.rows.q_lens, plan.rows.kv_lo, kv_hi, indptr, ids, plan.rows.block_size, causal=True)
        return replace(plan, rows=rows)

    case = make_case(1, 2, 2, 2, prompt_lens=(64,), num_new_tokens=0)
    assert run_case(case).max_error <= TOLERANCE
    assert run_case(case, Tampering(plan=swap)).max_error > WRONG


class _SortedOrder:
    """The communicator of a torch group whose order nobody restored: places are sorted ranks, not shards."""

    def __init__(self, inner: AxisComm, ranks: tuple[int, ...]) -> None:
        self._inner = inner
        self._sorted = torch.tensor([ranks.index(r) for r in sorted(ranks)])
        self.size = inner.size
        self.index = inner.index

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self._inner.all_gather(x, out)[self._sorted]

    def all_to_all(self, x: Tensor) -> Tensor:
        return self._inner.all_to_all(x)


def test_a_group_in_sorted_order_fails_where_shard_order_differs() -> None:
    def unordered(topology: Topology) -> Topology:
        return replace(topology, dcp=_SortedOrder(topology.dcp, topology.grid.dcp_groups[0]))

    case = make_case(2, 2, 4, 1)
    assert case.grid.dcp_groups == ((0, 2, 1, 3),)
    assert run_case(case, Tampering(topology=unordered)).max_error > WRONG


# --- counted, against the formulas ---


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: "tp{}_pcp{}_dcp{}_kv{}".format(*x))
def test_collectives_and_bytes_are_those_of_the_formulas(layout: tuple[int, int, int, int]) -> None:
    case = make_case(*layout, num_new_tokens=1)
    tp, pcp, dcp, num_kv_heads = layout
    q_heads, kv_heads = case.num_q_heads // tp, max(1, num_kv_heads // tp)
    rows = math.ceil(len(LENGTHS) / pcp)
    outcome = run_case(case)
    for traffic in outcome.decode_traffic:
        assert traffic.num_collectives == decode_collectives(dcp) == (0 if dcp == 1 else 2)
        formula = decode_bytes(
            dcp_size=dcp,
            pcp_size=pcp,
            rows_per_rank=rows,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=8,
            dtype_bytes=4,
        )
        assert traffic.received_bytes == formula.total
        # The same, written out: queries (and new k, v where pcp deals rows) gathered, out and lse sent back.
        new_kv = 2 * kv_heads if pcp > 1 else 0
        gathered = (dcp - 1) * rows * (q_heads + new_kv) * 8 * 4
        assert traffic.received_bytes == gathered + (dcp - 1) * rows * q_heads * (8 * 4 + 4)
    part_len = sum(LENGTHS) / pcp
    for traffic in outcome.prefill_traffic:
        assert traffic.num_collectives == (1 if pcp > 1 else 0)
        ideal = prefill_bytes(pcp_size=pcp, part_len=1, kv_heads=kv_heads, head_dim=8, dtype_bytes=4) * part_len
        # Cut points of short prompts leave some ranks a few tokens longer; all pad to the longest.
        assert ideal <= traffic.received_bytes <= 1.5 * ideal
