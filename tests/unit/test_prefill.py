import tracemalloc

import numpy as np
import pytest

from cpinfer.layout.prefill import (
    Piece,
    PrefillSplit,
    StepCost,
    assign_prompts,
    plan_prefill,
    zigzag_cuts,
    zigzag_split,
)
from cpinfer.layout.shards import KVSharding

ONE_SHARD = KVSharding(num_shards=1, interleave=4, block_size=4)


def step_time(split: PrefillSplit, cost: StepCost = StepCost()) -> float:
    parts = [split.part(r) for r in range(split.pcp_size)]
    load = [[sum(p.num_tokens for p in part), len(part), sum(p.num_pairs for p in part)] for part in parts]
    return float(cost.of(np.array(load, dtype=np.float64)).max())


@pytest.mark.parametrize(
    "num_tokens, pcp, page, cuts",
    [
        (8, 2, 1, [0, 2, 4, 6, 8]),
        (25, 2, 4, [0, 4, 12, 20, 25]),
        (7, 1, 1, [0, 3, 7]),
        (1, 4, 1, [0] * 8 + [1]),
        (3, 2, 16, [0, 0, 0, 0, 3]),
    ],
)
def test_cut_points_are_the_known_answers(num_tokens, pcp, page, cuts):
    assert zigzag_cuts(num_tokens, pcp, page).tolist() == cuts


def test_the_drawn_example_gathers_and_reads_pages_as_drawn():
    split = zigzag_split([8], 2, page_size=2)
    assert [[(p.start, p.end) for p in split.part(r)] for r in range(2)] == [[(0, 2), (6, 8)], [(2, 4), (4, 6)]]
    assert split.part_len == 4
    plan = plan_prefill(split, [[0, 1]], ONE_SHARD, pcp_rank=0, shard=0)
    assert plan.positions.tolist() == [0, 1, 6, 7]
    assert plan.send_rows.tolist() == [0, 1, 2, 3]
    assert plan.rows.q_lens.tolist() == [2, 2]
    assert plan.rows.kv_hi.tolist() == [2, 8]
    assert plan.rows.block_ids.tolist() == [0, 0, 2, 3, 1]
    assert plan.rows.causal


def test_pairs_of_a_piece_are_the_keys_its_queries_see():
    for start, end in ((0, 1), (0, 5), (3, 9)):
        assert Piece(0, start, end, 0, 0).num_pairs == sum(p + 1 for p in range(start, end))


def test_head_and_tail_balance_causal_work_where_contiguous_parts_do_not():
    zigzag = zigzag_split([4096], 4).pairs_per_rank()
    contiguous = [Piece(0, r * 1024, (r + 1) * 1024, r, 0).num_pairs for r in range(4)]
    assert sum(zigzag) == sum(contiguous) == 4096 * 4097 // 2
    assert max(zigzag) * 4 / sum(zigzag) <= 1.0001
    assert max(contiguous) * 4 / sum(contiguous) > 1.7


def test_work_is_balanced_up_to_the_largest_page_that_the_rule_allows_and_not_far_beyond_it():
    def imbalance(page):
        pairs = zigzag_split([8100], 4, page_size=page).pairs_per_rank()
        return max(pairs) * 4 / sum(pairs)

    assert imbalance(8100 // (200 * 3)) <= 1.01
    assert imbalance(100) > 1.01


def test_only_the_rank_with_the_last_token_samples():
    split = zigzag_split([8, 1, 5], 2)
    plans = [plan_prefill(split, [[0, 1], [2], [3, 4]], ONE_SHARD, pcp_rank=r, shard=0) for r in range(2)]
    for plan in plans:
        assert plan.sample_owner.tolist() == [0, 0, 0]
    # Packed rows of rank 0: prompt 0 has 0 1 6 7, prompt 1 its only token, prompt 2 has 0 and 3 4.
    assert plans[0].sample_rows.tolist() == [3, 4, 7]
    assert plans[0].positions[plans[0].sample_rows].tolist() == [7, 0, 4]
    assert plans[1].sample_rows.tolist() == [-1, -1, -1]


def test_a_prompt_that_stays_whole_is_sampled_where_it_was_dealt():
    split = zigzag_split([8, 3], 2, assigned=[None, 1])
    plan = plan_prefill(split, [[0, 1], [2]], ONE_SHARD, pcp_rank=1, shard=0)
    assert plan.sample_owner.tolist() == [0, 1]
    assert plan.positions[plan.sample_rows[1]] == 2
    assert split.tokens_per_rank() == [4, 7]


def test_a_rank_without_tokens_has_an_empty_plan_and_still_stores_its_shard():
    split = zigzag_split([3], 2, assigned=[0])
    sharding = KVSharding(num_shards=2, interleave=1, block_size=4)
    plan = plan_prefill(split, [[6]], sharding, pcp_rank=1, shard=1)
    assert (len(plan.pieces), len(plan.positions), len(plan.send_rows), plan.rows.num_rows) == (0, 0, 0, 0)
    assert plan.write_src.tolist() == [1]
    assert plan.write_slots.tolist() == [24]


def test_a_prompt_after_a_partial_page_starts_on_a_new_one():
    split = zigzag_split([3, 3], 1, page_size=4, assigned=[0, 0])
    assert [piece.offset for piece in split.pieces] == [0, 4]
    assert split.part_len == 8


def test_short_prompts_stay_whole_and_long_ones_are_split():
    assert assign_prompts([200], 8) == [0]
    assert assign_prompts([4000], 8) == [None]
    assert assign_prompts([100_000], 1) == [0]  # With one rank there is nothing to split.
    assert assign_prompts([], 4) == []


def test_equal_short_prompts_are_dealt_evenly():
    assigned = assign_prompts([300] * 16, 4)
    assert None not in assigned
    assert [assigned.count(r) for r in range(4)] == [4, 4, 4, 4]


def test_dealing_depends_on_the_lengths_alone_and_not_on_how_ties_come_up():
    assert [assign_prompts([50, 50, 50], 2) for _ in range(3)] == [assign_prompts([50, 50, 50], 2)] * 3


def test_dealing_is_never_slower_than_splitting_everything_nor_than_dealing_everything():
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(200):
        pcp = int(rng.integers(2, 9))
        lens = np.exp(rng.uniform(0, np.log(20_000), rng.integers(1, 12))).astype(int).tolist()
        time = step_time(zigzag_split(lens, pcp, assigned=assign_prompts(lens, pcp)))
        in_turn = [None] * len(lens)
        for place, i in enumerate(sorted(range(len(lens)), key=lambda i: -lens[i])):
            in_turn[i] = place % pcp
        others = [step_time(zigzag_split(lens, pcp, assigned=d)) for d in (None, in_turn)]
        # The cost of a split prompt is taken as equal on all ranks, the pieces are whole tokens and rows.
        assert time <= min(others) * 1.01
        gains.append(min(others) / time)
    assert max(gains) > 1.1


def test_many_short_prompts_are_dealt_whole_beside_a_long_one_that_is_split():
    assert assign_prompts([20_000, *[300] * 8], 4).count(None) == 1


@pytest.mark.parametrize("lens", [[], [0], [5, 0], [-1]], ids=str)
def test_a_step_without_prompts_or_tokens_is_refused(lens):
    with pytest.raises(ValueError, match="at least one"):
        zigzag_split(lens, 2)


def test_a_block_table_that_is_too_short_is_an_error():
    with pytest.raises(IndexError):
        plan_prefill(zigzag_split([9], 2), [[0, 1]], ONE_SHARD, pcp_rank=0, shard=0)


def test_to_deal_many_prompts_takes_room_by_their_number_and_not_by_its_square():
    def peak_bytes(num_prompts):
        tracemalloc.start()
        assigned = assign_prompts([5] * num_prompts, 2)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sorted(set(assigned)) == [0, 1] and abs(2 * sum(assigned) - num_prompts) <= 1
        return peak

    assert peak_bytes(1200) <= 2.5 * peak_bytes(600)
