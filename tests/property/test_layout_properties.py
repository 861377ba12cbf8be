"""The laws of the layout floor, on layouts and lengths that nobody thought of."""

import dataclasses
from collections import Counter
from itertools import chain, pairwise, takewhile
from math import lcm

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cpinfer.kv_cache.block_pool import BlockPool
from cpinfer.layout.decode import plan_decode, plan_next_decode, rows_in_window
from cpinfer.layout.explain import rank_places
from cpinfer.layout.grid import RankGrid, legal_dcp_sizes
from cpinfer.layout.heads import HeadPlacement
from cpinfer.layout.prefill import assign_prompts, plan_prefill, zigzag_split
from cpinfer.layout.shards import KVSharding

LAW = settings(max_examples=60, deadline=None, derandomize=True)

shardings = st.builds(
    KVSharding, num_shards=st.integers(1, 9), interleave=st.integers(1, 40), block_size=st.integers(1, 40)
)
small_shardings = st.builds(
    KVSharding, num_shards=st.integers(1, 5), interleave=st.integers(1, 9), block_size=st.integers(1, 9)
)


@st.composite
def block_tables(draw, lengths, sharding):
    """Disjoint tables, blocks in no order, long enough for `lengths`."""
    needed = [sharding.num_blocks(length) for length in lengths]
    blocks = draw(st.permutations(range(sum(needed) + 3)))
    starts = np.cumsum([0, *needed])
    return [list(blocks[start : start + n]) for start, n in zip(starts, needed, strict=False)]


@st.composite
def prefill_steps(draw):
    """(prompt lengths, split, block tables, sharding): split everywhere, dealt by cost, or dealt at will."""
    lens = draw(st.lists(st.integers(1, 70) | st.integers(200, 700), min_size=1, max_size=5))
    pcp = draw(st.integers(1, 5))
    at_will = st.lists(st.none() | st.integers(0, pcp - 1), min_size=len(lens), max_size=len(lens))
    assigned = draw(st.none() | st.just(assign_prompts(lens, pcp)) | at_will)
    sharding = draw(small_shardings)
    split = zigzag_split(lens, pcp, page_size=draw(st.sampled_from([1, 2, 3, 16])), assigned=assigned)
    return lens, split, draw(block_tables(lens, sharding)), sharding


def gathered_tokens(lens, split):
    """What the K/V gather brings, with a (prompt, position) for each row's token, and (-1, -1) for padding."""
    buffer = np.full((split.pcp_size * split.part_len, 2), -1)
    for piece in split.pieces:
        first = piece.pcp_rank * split.part_len + piece.offset
        for position in range(piece.start, piece.end):
            assert (buffer[first + position - piece.start] == -1).all(), "two tokens in one row"
            buffer[first + position - piece.start] = piece.prompt, position
    return buffer


@LAW
@given(shardings, st.integers(0, 2000))
def test_shards_partition_a_sequence_and_local_len_counts_them(sharding, length):
    positions = np.arange(length)
    owner = sharding.owner(positions)
    assert ((owner >= 0) & (owner < sharding.num_shards)).all()
    parts = [sharding.positions(length, s) for s in range(sharding.num_shards)]
    assert np.sort(np.concatenate(parts)).tolist() == positions.tolist()
    for s, part in enumerate(parts):
        assert part.tolist() == np.flatnonzero(owner == s).tolist()
        assert sharding.local_len(length, s) == len(part)
        assert sharding.local_index(part).tolist() == list(range(len(part)))


@LAW
@given(shardings, st.integers(0, 5000))
def test_shard_0_is_never_shorter_than_another_and_no_shard_lags_by_more_than_an_interleave(sharding, length):
    lens = [sharding.local_len(length, s) for s in range(sharding.num_shards)]
    assert lens == sorted(lens, reverse=True)
    assert lens[0] - lens[-1] <= sharding.interleave


@LAW
@given(st.data(), shardings, st.integers(0, 600))
def test_slots_are_unique_per_shard_lie_in_the_table_and_agree_with_local_index(data, sharding, length):
    (table,) = data.draw(block_tables([length], sharding))
    positions, size = np.arange(length), sharding.block_size
    for s in range(sharding.num_shards):
        slots = sharding.slots(np.array(table, dtype=np.int64), positions, s)
        mine = slots >= 0
        assert mine.tolist() == (sharding.owner(positions) == s).tolist()
        assert len(set(slots[mine])) == mine.sum()
        expected = [table[i // size] * size + i % size for i in sharding.local_index(positions)[mine]]
        assert slots[mine].tolist() == expected


@LAW
@given(shardings, st.integers(0, 5000))
def test_blocks_are_sufficient_for_every_shard_and_none_is_wasted(sharding, length):
    n = sharding.num_blocks(length)
    lens = [sharding.local_len(length, s) for s in range(sharding.num_shards)]
    assert all(local <= n * sharding.block_size for local in lens)
    assert n == 0 or lens[0] > (n - 1) * sharding.block_size


@LAW
@given(prefill_steps())
def test_pieces_partition_every_prompt_and_fit_their_send_buffers(step):
    lens, split, _, _ = step
    for prompt, length in enumerate(lens):
        pieces = sorted((p.start, p.end) for p in split.pieces if p.prompt == prompt)
        assert pieces[0][0] == 0
        assert pieces[-1][1] == length
        assert all(start < end for start, end in pieces)
        assert all(a[1] == b[0] for a, b in pairwise(pieces))
    assert sum(split.tokens_per_rank()) == sum(lens)
    for piece in split.pieces:
        assert piece.offset % split.page_size == 0
        assert piece.offset + piece.num_tokens <= split.part_len
    assert split.part_len % split.page_size == 0


@LAW
@given(st.integers(4096, 200_000), st.integers(2, 21), st.data())
def test_every_rank_works_as_much_within_one_percent(num_tokens, pcp, data):
    largest = num_tokens // (200 * (pcp - 1))
    page = data.draw(st.integers(1, largest) if largest else st.just(1))
    pairs = zigzag_split([num_tokens], pcp, page_size=page).pairs_per_rank()
    assert sum(pairs) == num_tokens * (num_tokens + 1) // 2
    if largest:
        assert max(pairs) * pcp / sum(pairs) <= 1.01


@LAW
@given(prefill_steps())
def test_the_page_table_restores_sequence_order_for_every_row_of_every_rank(step):
    lens, split, tables, sharding = step
    buffer = gathered_tokens(lens, split)
    for rank in range(split.pcp_size):
        plan = plan_prefill(split, tables, sharding, pcp_rank=rank, shard=0)
        for row, piece in enumerate(plan.pieces):
            seen = buffer[plan.rows.slots(row)]
            assert seen.tolist() == [[piece.prompt, position] for position in range(piece.end)]


@LAW
@given(prefill_steps())
def test_a_rank_sends_and_computes_exactly_its_own_pieces_in_order(step):
    lens, split, tables, sharding = step
    buffer = gathered_tokens(lens, split).reshape(split.pcp_size, split.part_len, 2)
    for rank in range(split.pcp_size):
        plan = plan_prefill(split, tables, sharding, pcp_rank=rank, shard=0)
        own = [[p.prompt, position] for p in split.part(rank) for position in range(p.start, p.end)]
        assert plan.positions.tolist() == [position for _, position in own]
        assert buffer[rank][plan.send_rows].tolist() == own
        assert plan.rows.num_queries == len(own)
        # Nothing but what it sends is in its part of the gathered buffer.
        assert (buffer[rank][:, 0] >= 0).sum() == len(own)


@LAW
@given(prefill_steps())
def test_every_token_is_written_once_over_all_shards_where_the_sharding_says(step):
    lens, split, tables, sharding = step
    buffer = gathered_tokens(lens, split)
    written = Counter()
    for shard in range(sharding.num_shards):
        plan = plan_prefill(split, tables, sharding, pcp_rank=0, shard=shard)
        assert len(set(plan.write_slots.tolist())) == len(plan.write_slots)
        for (prompt, position), slot in zip(buffer[plan.write_src].tolist(), plan.write_slots.tolist(), strict=True):
            written[prompt, position] += 1
            assert sharding.slots(np.array(tables[prompt]), np.array([position]), shard).tolist() == [slot]
    assert written == {(prompt, position): 1 for prompt, n in enumerate(lens) for position in range(n)}


@LAW
@given(prefill_steps())
def test_the_last_token_of_every_prompt_is_sampled_by_one_rank_and_all_agree_which(step):
    lens, split, tables, sharding = step
    plans = [plan_prefill(split, tables, sharding, pcp_rank=r, shard=0) for r in range(split.pcp_size)]
    for prompt, length in enumerate(lens):
        samplers = [rank for rank, plan in enumerate(plans) if plan.sample_rows[prompt] >= 0]
        assert {int(plan.sample_owner[prompt]) for plan in plans} == set(samplers)
        (rank,) = samplers
        row = plans[rank].sample_rows[prompt]
        assert plans[rank].positions[row] == length - 1
        ends = np.cumsum([p.num_tokens for p in plans[rank].pieces])
        assert plans[rank].pieces[int(np.searchsorted(ends, row, side="right"))].prompt == prompt


@LAW
@given(st.data(), small_shardings, st.integers(1, 5), st.lists(st.integers(0, 150), min_size=1, max_size=12))
def test_a_decode_step_computes_every_row_once_and_its_shards_hold_exactly_the_keys_up_to_it(
    data, sharding, pcp, positions
):
    tables = data.draw(block_tables([p + 1 for p in positions], sharding))
    keys, writers = [[] for _ in positions], Counter()
    for shard in range(sharding.num_shards):
        plans = [plan_decode(positions, tables, sharding, pcp_size=pcp, pcp_rank=r, shard=shard) for r in range(pcp)]
        own = np.concatenate([plan.own for plan in plans])
        assert sorted(own[own >= 0].tolist()) == list(range(len(positions)))
        plan = plans[0]
        # Ranks gather in place order, so each finds its own rows at its place.
        assert own.tolist() == plan.gathered.tolist()
        for place, row in enumerate(plan.gathered):
            slots = plan.rows.slots(place)
            if row < 0:
                assert len(slots) == 0
                continue
            stored = sharding.positions(positions[row] + 1, shard)
            assert slots.tolist() == sharding.slots(np.array(tables[row]), stored, shard).tolist()
            keys[row] += stored.tolist()
        for src, slot in zip(plan.write_src, plan.write_slots, strict=True):
            row = plan.gathered[src]
            writers[int(row)] += 1
            assert plan.rows.slots(src)[-1] == slot  # The last key a row sees is the one it has just written.
        for other in plans:
            at = [0 if row < 0 else positions[row] for row in other.own]
            assert other.positions.tolist() == at
            assert other.write_slots.tolist() == plan.write_slots.tolist()
    assert [sorted(k) for k in keys] == [list(range(p + 1)) for p in positions]
    assert writers == dict.fromkeys(range(len(positions)), 1)


class PoolNeverLeaks(RuleBasedStateMachine):
    """Sequences come, fork, grow and go; at every moment each block has as many references as holders."""

    @initialize(num_blocks=st.integers(0, 40))
    def start(self, num_blocks):
        self.pool, self.twin = BlockPool(num_blocks), BlockPool(num_blocks)
        self.held = []

    def take(self, n, **where):
        """Blocks nobody held, the same from both replicas; None when there are too few."""
        if n > self.pool.num_free:
            for pool in (self.pool, self.twin):
                try:
                    pool.allocate(n, **where)
                except ValueError:
                    continue
                raise AssertionError("allocated more than was free")
            return None
        free = {block for block in range(self.pool.num_blocks) if self.pool.refs(block) == 0}
        blocks = self.pool.allocate(n, **where)
        assert len(set(blocks)) == len(blocks) == n
        assert free.issuperset(blocks)
        assert blocks == self.twin.allocate(n, **where), "replicas of a pool must hand out the same blocks"
        return blocks

    @rule(n=st.integers(0, 12), room=st.integers(0, 20))
    def allocate(self, n, room):
        blocks = self.take(n, room=room)
        if blocks is not None:
            assert blocks == sorted(blocks)
            self.held.append(blocks)

    @rule(data=st.data(), n=st.integers(0, 4))
    def grow(self, data, n):
        grown = [blocks for blocks in self.held if blocks]
        if grown:
            blocks = data.draw(st.sampled_from(grown))
            behind = range(blocks[-1] + 1, self.pool.num_blocks)
            in_place = list(takewhile(lambda block: self.pool.refs(block) == 0, behind))[:n]
            more = self.take(n, after=blocks[-1])
            if more is not None:
                assert more[: len(in_place)] == in_place
                blocks += more

    @rule(data=st.data())
    def fork(self, data):
        if self.held:
            blocks = data.draw(st.sampled_from(self.held))
            shared = blocks[: data.draw(st.integers(0, len(blocks)))]
            self.pool.share(shared)
            self.twin.share(shared[::-1])
            self.held.append(list(shared))

    @rule(data=st.data())
    def release(self, data):
        if self.held:
            blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.pool.release(blocks)
            self.twin.release(blocks[::-1])

    @invariant()
    def every_block_has_as_many_references_as_holders(self):
        if not hasattr(self, "pool"):
            return
        holders = Counter(block for blocks in self.held for block in blocks)
        self.pool.check_integrity(holders.elements())
        assert {b: self.pool.refs(b) for b in range(self.pool.num_blocks) if self.pool.refs(b)} == holders
        assert self.pool.num_free == self.pool.num_blocks - len(holders)


TestPoolNeverLeaks = PoolNeverLeaks.TestCase
TestPoolNeverLeaks.settings = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True)


# Layouts of up to 32 ranks per replica, for models of up to 16 KV heads.
MAX_RANKS, MAX_KV_HEADS = 32, 16


def grids():
    for tp in range(1, MAX_RANKS + 1):
        for pcp in range(1, MAX_RANKS // tp + 1):
            for dcp in legal_dcp_sizes(tp, pcp):
                yield RankGrid(tp, pcp, dcp)


def head_counts(tp):
    """Every number of KV heads that fits `tp`, each with the three smallest numbers of query heads."""
    for kv in range(1, MAX_KV_HEADS + 1):
        if kv % tp == 0 or tp % kv == 0:
            yield from (HeadPlacement(n * lcm(kv, tp), kv, tp) for n in (1, 2, 3))


def needed_heads(heads, tp_rank):
    """By definition: query head q attends to KV head q // (Hq / Hkv), and ranks hold equal runs of query heads."""
    n = heads.num_q_heads // heads.tp_size
    return [q // (heads.num_q_heads // heads.num_kv_heads) for q in range(tp_rank * n, (tp_rank + 1) * n)]


def test_every_group_stores_what_its_queries_need_of_all_layouts_up_to_32_ranks():
    """What a rank stores depends on the tp ranks of its group alone, so one grid does for every number of columns."""
    num_groups = num_uneven = 0
    for grid in (g for g in grids() if g.pcp_size == 1):
        for heads in head_counts(grid.tp_size):
            needs = [needed_heads(heads, t) for t in range(grid.tp_size)]
            is_mixed, num_stored = [], []
            for group in grid.dcp_groups:
                meets = list(chain.from_iterable(needs[t] for t in group))
                counts = Counter(meets)
                is_mixed.append(len({tuple(dict.fromkeys(needs[t])) for t in group}) > 1)
                for t in group:
                    got = heads.in_group(grid, t)
                    case = grid, heads, t, got
                    assert list(got.kv_heads) == sorted(counts), case
                    assert got.kv_heads[got.own] == tuple(sorted(set(needs[t]))), case
                    assert got.num_q_heads == len(needs[t]), case
                    assert got.is_mixed == is_mixed[-1], case
                # Side by side, the group's query heads meet the stored heads in runs.
                assert [h for h, n in zip(got.kv_heads, got.q_per_kv, strict=True) for _ in range(n)] == meets, case
                brought = chain.from_iterable(sorted(set(needs[group[column]])) for column in got.columns)
                assert tuple(brought) == got.kv_heads, case
                num_stored.append(len(counts))
                num_groups += 1
                num_uneven += len(set(got.q_per_kv)) > 1
            assert heads.max_stored_heads(grid) == max(num_stored)
            assert heads.mixes_heads(grid) == any(is_mixed)
    assert num_groups > 1000
    assert num_uneven > 100


def test_every_head_and_shard_is_in_every_home_of_all_layouts_up_to_32_ranks():
    """And every shard once in every group, with all heads of the group, so that its queries find all their keys."""
    num_layouts = 0
    for grid in grids():
        places = [(grid.home(rank), grid.kv_shard(rank), grid.coords(rank).tp_rank) for rank in range(grid.world_size)]
        for group in grid.dcp_groups:
            assert sorted(grid.kv_shard(rank) for rank in group) == list(range(grid.dcp_size))
            assert len({grid.home(rank) for rank in group}) == 1
        groups_of_columns = {frozenset(grid.coords(rank).tp_rank for rank in group) for group in grid.dcp_groups}
        for heads in list(head_counts(grid.tp_size))[::3]:
            needs = [set(needed_heads(heads, t)) for t in range(grid.tp_size)]
            stored = [heads.in_group(grid, t).kv_heads for t in range(grid.tp_size)]
            for columns in groups_of_columns:
                assert {stored[t] for t in columns} == {tuple(sorted(set.union(*(needs[t] for t in columns))))}
            found = {(home, shard, head) for home, shard, t in places for head in stored[t]}
            assert len(found) == grid.num_homes * grid.dcp_size * heads.num_kv_heads, (grid, heads)
            num_layouts += 1
    assert num_layouts > 3000


def test_copies_are_what_is_stored_over_what_there_is():
    """`rep / k` of each head where nothing is mixed, of every head alike; mixed groups may differ, and lose none."""
    for grid in (g for g in grids() if g.world_size <= 12):
        for heads in list(head_counts(grid.tp_size))[::3]:
            places = rank_places(grid, heads)
            for place in places:
                assert place.kv_copies == tuple(
                    sum(
                        head in other.kv_heads and (other.home, other.kv_shard) == (place.home, place.kv_shard)
                        for other in places
                    )
                    for head in place.kv_heads
                )
            if not heads.mixes_heads(grid):
                assert {n for p in places for n in p.kv_copies} == {heads.rep // grid.columns_per_dcp_group}


def test_own_heads_alone_would_not_do_in_a_mixed_group():
    """Negative control: TP2 PCP2 DCP4 with two KV heads would then have each head on half of the shards only."""
    grid, heads = RankGrid(2, 2, 4), HeadPlacement(8, 2, 2)
    stored = {(head, grid.kv_shard(r)) for r in range(4) for head in heads.kv_heads(grid.coords(r).tp_rank)}
    assert stored == {(0, 0), (0, 1), (1, 2), (1, 3)}


@LAW
@given(st.data(), small_shardings, st.integers(1, 3), st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_a_plan_that_goes_on_is_the_plan_of_where_it_has_come_to(data, sharding, pcp, positions):
    num_steps, window = 12, data.draw(st.sampled_from([1, 3, 8]))
    tables = data.draw(block_tables([p + num_steps for p in positions], sharding))
    shard, rank = data.draw(st.integers(0, sharding.num_shards - 1)), data.draw(st.integers(0, pcp - 1))
    ranks = data.draw(st.none() | st.lists(st.integers(0, pcp - 1), min_size=len(positions), max_size=len(positions)))
    spare = data.draw(st.integers(0, 2))  # rows of padding
    at = {"pcp_size": pcp, "pcp_rank": rank, "shard": shard}
    dealt = {"rows_per_rank": len(positions) + spare, "ranks": ranks}
    plan = plan_decode(positions, tables, sharding, **dealt, **at)
    for step in range(1, num_steps):
        plan = plan_next_decode(plan, tables, sharding, **at)
        anew = plan_decode([p + step for p in positions], tables, sharding, **dealt, **at)
        assert_same(plan, anew)
        assert_same(rows_in_window(plan, sharding, shard, window), rows_in_window(anew, sharding, shard, window))


def assert_same(found, wanted):
    """Plans, or their rows, field by field, dtypes included."""
    for field in dataclasses.fields(wanted):
        a, b = getattr(found, field.name), getattr(wanted, field.name)
        if dataclasses.is_dataclass(b):
            assert_same(a, b)
        elif isinstance(b, np.ndarray):
            assert a.dtype == b.dtype and a.tolist() == b.tolist(), field.name
        else:
            assert a == b, field.name
