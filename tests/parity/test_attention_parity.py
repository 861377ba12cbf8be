"""Context-parallel attention equals dense attention, whatever the layout; and would not, were anything wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cpinfer.attention.backends.base import AttentionBackend, PlannedAttention
from cpinfer.comm.axis import AxisComm
from cpinfer.comm.topology import Topology
from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.heads import GroupHeads, HeadPlacement
from cpinfer.layout.prefill import PrefillPlan
from cpinfer.layout.rows import AttentionRows
from cpinfer.layout.traffic import decode_bytes, decode_collectives, prefill_bytes
from cpinfer.models.spec import LatentDims
from cpinfer.ops.states import State
from cpinfer_tools.gpu.attention_ranks import Case, Tampering, run_case

# float32 against float64: logits up to about 30 leave some 1e-6 of the weights; values are of size 1.
TOLERANCE = 1e-5
SLOW = pytest.mark.slow
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


@pytest.mark.parametrize(
    ("interleave", "peaked"),
    [
        (1, True),
        (3, True),
        (16, True),
        (3, False),
        # What flat logits could show does not depend on how tokens are dealt.
        pytest.param(1, False, marks=SLOW),
        pytest.param(16, False, marks=SLOW),
    ],
)
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
@pytest.mark.parametrize(
    ("chunk", "interleave"),
    [(4, 1), (7, 3), (16, 16), (37, 4), pytest.param(500, 3, marks=SLOW)],  # 500 is all at once
)
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


# --- groups that mix KV heads: (tp, pcp, dcp, query heads, KV heads) ---

MIXED = [
    (2, 2, 4, 8, 2), (2, 1, 2, 8, 2), (4, 1, 4, 8, 2), (4, 2, 8, 8, 2), (2, 2, 4, 8, 4), (4, 1, 2, 8, 4),
    # Groups that hold different numbers of heads, and heads with different numbers of queries.
    (6, 1, 2, 12, 2), (6, 1, 3, 12, 3), (6, 2, 6, 6, 3), (3, 1, 3, 9, 3), (6, 1, 6, 12, 2), (2, 3, 6, 10, 2),
]  # fmt: skip


def make_mixed(tp: int, pcp: int, dcp: int, num_q_heads: int, num_kv_heads: int, **changes: object) -> Case:
    return replace(Case(RankGrid(tp, pcp, dcp), num_q_heads, num_kv_heads, LENGTHS), **changes)


@pytest.mark.parametrize("interleave", [1, 3, 16])
@pytest.mark.parametrize("layout", MIXED, ids=lambda x: "tp{}_pcp{}_dcp{}_q{}_kv{}".format(*x))
def test_groups_that_mix_kv_heads_equal_dense_attention(
    layout: tuple[int, int, int, int, int], interleave: int
) -> None:
    assert run_case(make_mixed(*layout, interleave=interleave)).max_error <= TOLERANCE


@pytest.mark.parametrize("exchange", ["queries", "kv"])
@pytest.mark.parametrize(("chunk", "interleave"), [(7, 3), (16, 16)])
@pytest.mark.parametrize("layout", MIXED, ids=lambda x: "tp{}_pcp{}_dcp{}_q{}_kv{}".format(*x))
def test_groups_that_mix_kv_heads_prefill_in_chunks(
    layout: tuple[int, int, int, int, int], chunk: int, interleave: int, exchange: str
) -> None:
    changes = {"prompt_lens": (1, 5, 16, 33, 65), "chunk": chunk, "interleave": interleave, "num_new_tokens": 1}
    assert run_case(make_mixed(*layout, context_exchange=exchange, **changes)).max_error <= TOLERANCE


@pytest.mark.parametrize("layout", MIXED[:2] + MIXED[6:8], ids=lambda x: "tp{}_pcp{}_dcp{}_q{}_kv{}".format(*x))
def test_groups_that_mix_kv_heads_work_by_reduce_scatter(layout: tuple[int, int, int, int, int]) -> None:
    assert run_case(make_mixed(*layout, decode_exchange="ag_rs")).max_error <= TOLERANCE


@pytest.mark.parametrize("layout", MIXED, ids=lambda x: "tp{}_pcp{}_dcp{}_q{}_kv{}".format(*x))
def test_traffic_of_mixed_groups_is_that_of_the_formulas(layout: tuple[int, int, int, int, int]) -> None:
    tp, pcp, dcp, num_q_heads, num_kv_heads = layout
    case = make_mixed(*layout, num_new_tokens=1, prompt_lens=(2 * pcp * 8,) * 3)
    kv = KVLayout(max(1, num_kv_heads // tp), 8, 8)
    outcome = run_case(case)
    # A column brings its heads once: where a group's columns are copies (tp6_dcp2, outer groups) nothing is mixed.
    placement = HeadPlacement(num_q_heads, num_kv_heads, tp)
    for rank, traffic in enumerate(outcome.decode_traffic):
        mixed = placement.in_group(case.grid, case.grid.coords(rank).tp_rank).is_mixed
        formula = decode_bytes(dcp, math.ceil(3 / pcp), num_q_heads // tp, kv, 4, sends_new_kv=pcp > 1 or mixed)
        assert (traffic.num_collectives, traffic.received_bytes) == (2, formula.total)
    for rank, traffic in enumerate(outcome.prefill_traffic):
        mixed = placement.in_group(case.grid, case.grid.coords(rank).tp_rank).is_mixed
        assert traffic.received_bytes == prefill_bytes(dcp if mixed else pcp, 3 * 2 * 8, kv, 4)


def test_the_heads_of_a_wrong_column_fail() -> None:
    """Negative control: vLLM 0.33 stores its own heads and lets the group's queries meet them."""

    def alike(heads: GroupHeads) -> GroupHeads:
        return replace(heads, columns=(0,) * len(heads.columns))

    assert run_case(make_mixed(*MIXED[0]), Tampering(heads=alike)).max_error > WRONG


# --- windows, soft caps, sinks ---

WINDOW_LAYOUTS = [(1, 1, 1, 2), (1, 2, 2, 2), (1, 3, 3, 2), (2, 2, 2, 2), (2, 2, 4, 1), (4, 1, 4, 1), (1, 4, 2, 2)]


def in_pairs(firsts: Sequence[Any], seconds: Sequence[Any], quick: Mapping[Any, Sequence[Any]]) -> list[Any]:
    """All pairs, slow but for those of `quick`, where each value stands beside values that are unlike it."""
    pairs = [(first, second) for first in firsts for second in seconds]
    return [pytest.param(a, b, marks=() if b in quick[a] else SLOW) for a, b in pairs]


# A window is a whole number of shard rounds, of interleaves, or neither; shorter than either, or longer than a prompt.
WINDOWS = (1, 2, 7, 16, 33, 100, 500)


@pytest.mark.parametrize(
    ("interleave", "window"), in_pairs((1, 3, 16), WINDOWS, {1: (2, 7, 100), 3: (1, 7, 33, 500), 16: (16, 33, 100)})
)
@pytest.mark.parametrize("layout", WINDOW_LAYOUTS, ids=lambda x: "tp{}_pcp{}_dcp{}_kv{}".format(*x))
def test_windows_of_every_layout_equal_dense_attention(
    layout: tuple[int, int, int, int], window: int, interleave: int
) -> None:
    assert run_case(make_case(*layout, window=window, interleave=interleave)).max_error <= TOLERANCE


@pytest.mark.parametrize(
    ("dealt", "window"),
    in_pairs(
        ((4, 1), (7, 3), (37, 4)), WINDOWS[:-1], {(4, 1): (1, 7, 33), (7, 3): (2, 7, 16, 100), (37, 4): (16, 33, 100)}
    ),
)
@pytest.mark.parametrize("layout", WINDOW_LAYOUTS, ids=lambda x: "tp{}_pcp{}_dcp{}_kv{}".format(*x))
def test_windows_in_chunks_equal_dense_attention(
    layout: tuple[int, int, int, int], dealt: tuple[int, int], window: int
) -> None:
    chunk, interleave = dealt
    changes = {"prompt_lens": (1, 5, 16, 33, 65), "chunk": chunk, "interleave": interleave, "num_new_tokens": 1}
    assert run_case(make_case(*layout, window=window, **changes)).max_error <= TOLERANCE


def test_windows_wider_than_a_tile_equal_dense_attention() -> None:
    case = make_case(1, 2, 2, 2, prompt_lens=(1500, 900), block_size=64, interleave=64, window=700)
    assert run_case(case).max_error <= TOLERANCE
    assert run_case(replace(case, chunk=512)).max_error <= TOLERANCE


@pytest.mark.parametrize("layout", [MIXED[0], MIXED[6], MIXED[7]], ids=lambda x: "tp{}_pcp{}_dcp{}_q{}_kv{}".format(*x))
def test_windows_soft_caps_and_sinks_work_in_mixed_groups(layout: tuple[int, int, int, int, int]) -> None:
    for changes in ({"window": 7}, {"window": 33, "with_sinks": True, "chunk": 16}, {"soft_cap": 5.0, "chunk": 16}):
        assert run_case(make_mixed(*layout, **changes)).max_error <= TOLERANCE, changes


@pytest.mark.parametrize(
    "changes", [{}, {"window": 16}, {"chunk": 37}, {"chunk": 37, "context_exchange": "kv"}], ids=str
)
@pytest.mark.parametrize("kind", [{"soft_cap": 4.0}, {"with_sinks": True}], ids=str)
@pytest.mark.parametrize("layout", WINDOW_LAYOUTS, ids=lambda x: "tp{}_pcp{}_dcp{}_kv{}".format(*x))
def test_soft_caps_and_sinks_equal_dense_attention(
    layout: tuple[int, int, int, int], kind: dict[str, object], changes: dict[str, object]
) -> None:
    assert run_case(make_case(*layout, **kind, **changes)).max_error <= TOLERANCE


@pytest.mark.parametrize("change", [{"window": 16}, {"soft_cap": 4.0}, {"with_sinks": True}], ids=str)
def test_what_a_layer_does_to_its_logits_is_seen_by_these_tests(change: dict[str, object]) -> None:
    """Negative control: left out on the ranks' side, each must show."""
    case = make_case(1, 2, 2, 2)
    assert run_case(case, Tampering(oracle=lambda c: replace(c, **change))).max_error > WRONG


# --- multi-head latent attention ---

LATENT = LatentDims(kv_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=5)
LATENT_LAYOUTS = [(1, 1, 1, 1), (1, 2, 2, 1), (2, 1, 2, 1), (2, 2, 4, 1), (1, 4, 2, 1), (4, 1, 1, 1), (4, 2, 8, 1)]


@pytest.mark.parametrize(
    "changes", [{}, {"chunk": 37}, {"chunk": 37, "context_exchange": "kv"}, {"decode_exchange": "ag_rs"}], ids=str
)
@pytest.mark.parametrize("layout", LATENT_LAYOUTS, ids=lambda x: "tp{}_pcp{}_dcp{}_kv{}".format(*x))
def test_latents_of_every_layout_equal_dense_attention(
    layout: tuple[int, int, int, int], changes: dict[str, object]
) -> None:
    assert run_case(make_case(*layout, latent=LATENT, **changes)).max_error <= TOLERANCE


def test_latents_of_a_wrong_shard_are_seen() -> None:
    tampering = Tampering(shard=lambda topology: 0)
    assert run_case(make_case(1, 2, 2, 1, latent=LATENT), tampering).max_error > WRONG


# --- the other ways for states to come back ---


@pytest.mark.parametrize("decode_exchange", ["ag_rs", "replicate_q"])
@pytest.mark.parametrize("layout", [(1, 2, 2, 2), (2, 2, 2, 2), (1, 4, 2, 2), (1, 3, 3, 2), (1, 2, 1, 2)])
def test_every_way_for_states_to_return_gives_the_same(layout: tuple[int, int, int, int], decode_exchange: str) -> None:
    assert run_case(make_case(*layout, decode_exchange=decode_exchange)).max_error <= TOLERANCE


@pytest.mark.parametrize("layout", [(2, 2, 4, 1), (4, 2, 8, 1), (2, 1, 2, 1)])
def test_reduce_scatter_works_over_columns_too(layout: tuple[int, int, int, int]) -> None:
    assert run_case(make_case(*layout, decode_exchange="ag_rs")).max_error <= TOLERANCE


@pytest.mark.parametrize(("decode_exchange", "collectives"), [("a2a", 2), ("ag_rs", 3), ("replicate_q", 1)])
def test_collectives_of_every_way_for_states_to_return(decode_exchange: str, collectives: int) -> None:
    outcome = run_case(make_case(1, 2, 2, 2, decode_exchange=decode_exchange, num_new_tokens=1))
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
            def run(
                self, q: Tensor, keys: Tensor, values: Tensor, *, scale: float, soft_cap: float | None = None
            ) -> State:
                out, lse = planned.run(q, keys, values, scale=scale, soft_cap=soft_cap)
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
            rows_per_rank=rows,
            q_heads=q_heads,
            kv=KVLayout(kv_heads, 8, 8),
            dtype_bytes=4,
            sends_new_kv=pcp > 1,
        )
        assert traffic.received_bytes == formula.total
        # The same, written out: queries (and new k, v where pcp deals rows) gathered, out and lse sent back.
        new_kv = 2 * kv_heads if pcp > 1 else 0
        gathered = (dcp - 1) * rows * (q_heads + new_kv) * 8 * 4
        assert traffic.received_bytes == gathered + (dcp - 1) * rows * q_heads * (8 * 4 + 4)
    part_len = sum(LENGTHS) / pcp
    for traffic in outcome.prefill_traffic:
        assert traffic.num_collectives == (1 if pcp > 1 else 0)
        ideal = prefill_bytes(num_places=pcp, part_len=1, kv=KVLayout(kv_heads, 8, 8), dtype_bytes=4) * part_len
        # Cut points of short prompts leave some ranks a few tokens longer; all pad to the longest.
        assert ideal <= traffic.received_bytes <= 1.5 * ideal
