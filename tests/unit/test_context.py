"""Context of a prefill step: whoever travels, every query sees every cached token of its prompt exactly once."""

from collections import Counter
from dataclasses import replace
from math import isclose

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.context import (
    Context,
    Place,
    StepContext,
    choose_exchange,
    exchange_bytes,
    exchange_places,
    most_pairs,
    plan_kv_exchange,
    plan_query_exchange,
    plan_window_exchange,
    plan_window_exchanges,
)
from cpinfer.layout.grid import RankGrid, legal_dcp_sizes
from cpinfer.layout.prefill import gathered_rows, zigzag_split
from cpinfer.layout.shards import KVSharding

GRIDS = [RankGrid(tp, pcp, dcp) for tp in (1, 2, 4) for pcp in (1, 2, 3, 4) for dcp in legal_dcp_sizes(tp, pcp)]


def places_of(grid):
    """The places of every rank's exchange axis, and the rank's place on it."""
    for rank in range(grid.world_size):
        places = exchange_places(grid, rank)
        me = Place(grid.coords(rank).pcp_rank, grid.home(rank), grid.kv_shard(rank))
        yield rank, places, places.index(me)


@pytest.mark.parametrize(
    "grid, rank, places",
    [
        (RankGrid(2, 2, 2), 3, [(0, 0, 0), (1, 0, 1)]),  # dcp = pcp: the column, one home
        (RankGrid(1, 4, 2), 0, [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)]),  # dcp < pcp: all homes of the column
        (RankGrid(2, 2, 1), 1, [(0, 0, 0), (1, 1, 0)]),
        (RankGrid(2, 2, 4), 2, [(0, 0, 0), (1, 0, 1), (0, 0, 2), (1, 0, 3)]),  # dcp > pcp: the group, pcp fastest
        (RankGrid(4, 1, 2), 3, [(0, 0, 0), (0, 0, 1)]),
        (RankGrid(4, 2, 4), 7, [(0, 0, 0), (1, 0, 1), (0, 0, 2), (1, 0, 3)]),
        (RankGrid(1, 1, 1), 0, [(0, 0, 0)]),
    ],
    ids=str,
)
def test_the_known_places_of_an_axis(grid, rank, places):
    assert exchange_places(grid, rank) == tuple(Place(*place) for place in places)


@pytest.mark.parametrize("grid", [*GRIDS, RankGrid(2, 2, 2, dp_size=3)], ids=str)
def test_an_axis_has_every_part_and_every_shard_of_every_home_it_may_ask_for(grid):
    for rank, places, _ in places_of(grid):
        columns = max(1, grid.dcp_size // grid.pcp_size)
        assert Counter(p.pcp_rank for p in places) == dict.fromkeys(range(grid.pcp_size), columns)
        everything = {(home, shard) for home in range(grid.num_homes) for shard in range(grid.dcp_size)}
        assert Counter((p.home, p.shard) for p in places) == dict.fromkeys(everything, 1)
        # The order is that of the communicator which the engine takes for it.
        groups = grid.pcp_groups if grid.dcp_size <= grid.pcp_size else grid.dcp_groups
        group = next(g for g in groups if rank in g)
        assert places[group.index(rank)] == (grid.coords(rank).pcp_rank, grid.home(rank), grid.kv_shard(rank))


def caches(contexts, sharding, num_homes, num_slots):
    """`[homes, shards, slots, 2]`: (prompt, position) of the token that each slot holds, (-1, -1) where none is."""
    store = np.full((num_homes, sharding.num_shards, num_slots, 2), -1)
    for prompt, context in enumerate(contexts):
        positions, table = np.arange(context.num_tokens), np.asarray(context.block_table, dtype=np.int64)
        for shard in range(sharding.num_shards):
            slots = sharding.slots(table, positions, shard)
            mine = slots >= 0
            assert (store[context.home, shard][slots[mine]] == -1).all()
            store[context.home, shard][slots[mine], 0] = prompt
            store[context.home, shard][slots[mine], 1] = positions[mine]
    return store


def query_exchange_sees(split, contexts, sharding, places, store):
    """For each token of each part, (prompt, new position) -> counted (prompt, position) it sees over all shards."""
    seen = {}
    for index, me in enumerate(places):
        plan = plan_query_exchange(StepContext(split, contexts, sharding, places), index)
        # The gather brings every part, padded; places of the same part on other columns hold other heads of it.
        queries = np.full((split.pcp_size, plan.part_len, 2), -1)
        for pcp_rank in range(split.pcp_size):
            tokens = [(p.prompt, t) for p in split.part(pcp_rank) for t in range(p.start, p.end)]
            queries[pcp_rank, : len(tokens)] = np.array(tokens).reshape(-1, 2)
        packed = queries.reshape(-1, 2)
        assert plan.rows.num_queries == len(packed) and not plan.rows.causal
        starts = np.cumsum([0, *plan.rows.q_lens])
        for row, start in enumerate(starts[:-1]):
            keys = [tuple(key) for key in store[me.home, me.shard][plan.rows.slots(row)].tolist()]
            for query in packed[start : starts[row + 1]].tolist():
                if query == [-1, -1]:
                    assert keys == []
                else:
                    seen.setdefault(tuple(query), Counter()).update(keys)
    return seen


def kv_exchange_sees(split, contexts, sharding, places, store, workspace_tokens):
    """The same, with each part's own queries and what the windows bring."""
    step = StepContext(split, contexts, sharding, places)
    plans = [plan_kv_exchange(step, index, workspace_tokens) for index in range(len(places))]
    lengths = [[window.length for window in plan.windows] for plan in plans]
    assert all(other == lengths[0] for other in lengths), "every rank takes part in the same gathers"
    assert all(length * len(places) <= max(workspace_tokens, len(places)) for length in lengths[0])
    seen_by_place = []
    for index, place in enumerate(places):
        seen = {}
        pieces = split.part(place.pcp_rank)
        for window, gathered in enumerate(gathers(plans, places, store)):
            rows = plans[index].windows[window].rows
            assert rows.q_lens.tolist() == [piece.num_tokens for piece in pieces] and not rows.causal
            for row, piece in enumerate(pieces):
                keys = [tuple(key) for key in gathered[rows.slots(row)].tolist()]
                for t in range(piece.start, piece.end):
                    seen.setdefault((piece.prompt, t), Counter()).update(keys)
        seen_by_place.append(seen)
    return seen_by_place


def gathers(plans, places, store):
    """What each gather brings: `[places * length, 2]`."""
    for window in range(len(plans[0].windows)):
        sent = []
        for plan, place in zip(plans, places, strict=True):
            w = plan.windows[window]
            assert len(w.slots) <= w.length
            send = np.full((w.length, 2), -1)
            send[: len(w.slots)] = store[place.home, place.shard][w.slots]
            sent.append(send)
        yield np.concatenate(sent)


def wanted(split, contexts):
    """Every new token sees the context of its own prompt, whole and once."""
    return {
        (piece.prompt, t): Counter({(piece.prompt, p): 1 for p in range(contexts[piece.prompt].num_tokens)})
        for piece in split.pieces
        for t in range(piece.start, piece.end)
    }


@st.composite
def context_steps(draw):
    """(grid, split, contexts, sharding): chunks with 0 or more cached tokens each, split or whole, in any home."""
    grid = draw(st.sampled_from(GRIDS))
    n = draw(st.integers(1, 4))
    lens = draw(st.lists(st.integers(1, 20), min_size=n, max_size=n))
    assigned = draw(st.none() | st.lists(st.none() | st.integers(0, grid.pcp_size - 1), min_size=n, max_size=n))
    split = zigzag_split(lens, grid.pcp_size, assigned=assigned)
    sharding = KVSharding(grid.dcp_size, draw(st.integers(1, 6)), draw(st.integers(1, 5)))
    cached = draw(st.lists(st.just(0) | st.integers(1, 60), min_size=n, max_size=n))
    homes = draw(st.lists(st.integers(0, grid.num_homes - 1), min_size=n, max_size=n))
    needed = [sharding.num_blocks(p) for p in cached]
    blocks = draw(st.permutations(range(sum(needed) + 2)))
    ends = np.cumsum(needed)
    contexts = [
        Context(p, home, list(blocks[end - k : end]))
        for p, home, k, end in zip(cached, homes, needed, ends, strict=True)
    ]
    return grid, split, contexts, sharding


def store_of(step):
    grid, _, contexts, sharding = step
    return caches(
        contexts, sharding, grid.num_homes, (sum(len(c.block_table) for c in contexts) + 2) * sharding.block_size
    )


LAW = settings(max_examples=60, deadline=None, derandomize=True)


@LAW
@given(context_steps(), st.data())
def test_travelling_queries_see_every_cached_token_of_their_prompt_once_over_all_shards(step, data):
    grid, split, contexts, sharding = step
    places = exchange_places(grid, data.draw(st.integers(0, grid.world_size - 1)))
    seen = query_exchange_sees(split, contexts, sharding, places, store_of(step))
    assert seen == wanted(split, contexts)


@LAW
@given(context_steps(), st.integers(1, 200), st.data())
def test_travelling_kv_shows_every_query_every_cached_token_of_its_prompt_once_in_windows_of_any_size(
    step, workspace_tokens, data
):
    grid, split, contexts, sharding = step
    places = exchange_places(grid, data.draw(st.integers(0, grid.world_size - 1)))
    by_place = kv_exchange_sees(split, contexts, sharding, places, store_of(step), workspace_tokens)
    want = wanted(split, contexts)
    if not any(c.num_tokens for c in contexts):
        assert by_place == [{}] * len(places)
        return
    for place, seen in zip(places, by_place, strict=True):
        own = {(p.prompt, t) for p in split.part(place.pcp_rank) for t in range(p.start, p.end)}
        assert seen == {query: want[query] for query in own}


def test_a_rotated_shard_is_seen_by_these_tests():
    """Negative control: a plan for another shard's tokens must not pass."""
    grid, sharding = RankGrid(1, 2, 2), KVSharding(2, 2, 4)
    split, contexts = zigzag_split([6], 2), [Context(7, 0, [1])]
    store = caches(contexts, sharding, 1, 8)
    places = exchange_places(grid, 0)
    assert query_exchange_sees(split, contexts, sharding, places, store) == wanted(split, contexts)
    with pytest.raises(AssertionError):
        assert query_exchange_sees(split, contexts, sharding, places, store[:, ::-1]) == wanted(split, contexts)
    with pytest.raises(AssertionError):
        (first, second) = kv_exchange_sees(split, contexts, sharding, places[::-1], store[:, ::-1], 3)
        assert first | second == wanted(split, contexts)


@LAW
@given(context_steps(), st.integers(1, 5), st.sampled_from([2, 4]), st.data())
def test_bytes_are_those_that_a_literal_exchange_moves(step, q_heads, dtype_bytes, data):
    grid, split, contexts, sharding = step
    places = exchange_places(grid, data.draw(st.integers(0, grid.world_size - 1)))
    kv = data.draw(st.sampled_from([KVLayout(2, 8, 8), KVLayout(1, 16, 8), KVLayout(1, 12, 8, v_is_prefix_of_k=True)]))

    def count(exchange, contexts=contexts):
        return exchange_bytes(exchange, StepContext(split, contexts, sharding, places), q_heads, kv, dtype_bytes)

    # Queries: q of a padded part from each other place, then out and a float32 lse of the own part from each.
    whole = StepContext(split, contexts, sharding, places)
    part_len = plan_query_exchange(whole, 0).part_len
    received = 0
    for _ in range(len(places) - 1):
        received += part_len * q_heads * kv.k_dim * dtype_bytes
        received += part_len * q_heads * (kv.v_dim * dtype_bytes + 4)
    assert count("queries") == received
    # KV: every window from each other place, padded to the longest.
    for workspace_tokens in (1, 7, 10**6):
        plan = plan_kv_exchange(whole, 0, workspace_tokens)
        rows = sum(window.length for window in plan.windows) * (len(places) - 1)
        values = kv.num_heads * (kv.k_dim + (0 if kv.v_is_prefix_of_k else kv.v_dim))
        assert count("kv") == rows * values * dtype_bytes
    # And a rank's padding is what the fullest rank holds, token by token.
    longest = max(
        sum(
            1
            for c in contexts
            if c.home == p.home
            for t in range(c.num_tokens)
            if sharding.owner(np.array(t)) == p.shard
        )
        for p in places
    )
    assert count("kv") == (len(places) - 1) * longest * kv.values_per_token * dtype_bytes
    choice = choose_exchange(whole, q_heads, kv, dtype_bytes)
    other = "kv" if choice == "queries" else "queries"
    assert count(choice) <= count(other) or most_pairs(choice, whole) < most_pairs(other, whole)
    nothing = [replace(c, num_tokens=0) for c in contexts]
    assert count("kv", nothing) == 0


def choice(grid, num_new, num_cached, q_heads, kv_heads, head_dim=128):
    """What travels for one prompt on this grid; heads are those of one rank."""
    sharding = KVSharding(grid.dcp_size, 16, 16)
    split = zigzag_split([num_new], grid.pcp_size)
    contexts = [Context(num_cached, 0, range(sharding.num_blocks(num_cached)))]
    kv = KVLayout(kv_heads, head_dim, head_dim)
    return choose_exchange(StepContext(split, contexts, sharding, exchange_places(grid, 0)), q_heads, kv, 2)


@pytest.mark.parametrize("grid", [RankGrid(1, 2, 2), RankGrid(1, 8, 8), RankGrid(2, 2, 4), RankGrid(4, 2, 8)], ids=str)
@pytest.mark.parametrize("q_heads, kv_heads", [(32, 8), (8, 1), (4, 4)])
def test_queries_travel_while_new_over_cached_is_at_most_kvl_over_k_hq(grid, q_heads, kv_heads):
    k = grid.columns_per_dcp_group
    cached = 64000
    edge = cached * kv_heads / (k * q_heads)
    assert choice(grid, int(edge * 0.95), cached, q_heads, kv_heads) == "queries"
    assert choice(grid, int(edge * 1.05), cached, q_heads, kv_heads) == "kv"


def test_32_over_8_heads_switch_where_a_fifth_of_the_tokens_is_new():
    grid, total = RankGrid(1, 4, 4), 80000
    queries = [
        share
        for share in range(1, 100)
        if choice(grid, total * share // 100, total - total * share // 100, 32, 8) == "queries"
    ]
    assert queries == list(range(1, len(queries) + 1))
    assert isclose(len(queries) / 100, 0.2, abs_tol=0.011)


def test_queries_travel_when_both_cost_the_same_and_nothing_is_to_be_exchanged_alone():
    assert choice(RankGrid(1, 1, 1), 100, 1, 4, 4) == "queries"


@pytest.mark.parametrize("cached", [1, 5000])
@pytest.mark.parametrize(("num_new", "expected"), [(1, "queries"), (170, "queries"), (171, "kv"), (4000, "kv")])
def test_alone_latents_are_expanded_for_many_queries(num_new, expected, cached):
    sharding, split = KVSharding(1, 16, 16), zigzag_split([num_new], 1)
    contexts = [Context(cached, 0, range(sharding.num_blocks(cached)))]
    kv, places = KVLayout(1, 576, 512, v_is_prefix_of_k=True), exchange_places(RankGrid(), 0)
    step = StepContext(split, contexts, sharding, places)
    found = choose_exchange(step, 128, kv, 2, max_absorbed_queries=170)
    assert found == expected


def test_of_several_prompts_what_is_cached_weighs():
    sharding, split = KVSharding(1, 16, 16), zigzag_split([1000, 10], 1)
    kv, places = KVLayout(1, 576, 512, v_is_prefix_of_k=True), exchange_places(RankGrid(), 0)
    for cached, expected in (((100, 100), "kv"), ((100, 1000), "queries"), ((0, 0), "queries")):
        contexts = [Context(n, 0, range(sharding.num_blocks(n))) for n in cached]
        step = StepContext(split, contexts, sharding, places)
        assert choose_exchange(step, 128, kv, 2, max_absorbed_queries=170) == expected


def test_homes_share_their_axis_with_ranks_that_hold_nothing_of_a_prompt():
    """Two homes: the context is denser on its ranks, which have all to do where queries travel."""
    one, two = RankGrid(1, 4, 4), RankGrid(1, 4, 2)
    for grid, pairs in ((one, 1), (two, 2)):
        sharding, split = KVSharding(grid.dcp_size, 16, 16), zigzag_split([400], 4)
        step = StepContext(
            split, [Context(4000, 0, range(sharding.num_blocks(4000)))], sharding, exchange_places(grid, 0)
        )
        assert most_pairs("queries", step) == pytest.approx(pairs * 400 * 4000 / 4, rel=0.01)
        assert most_pairs("kv", step) == pytest.approx(400 * 4000 / 4, rel=0.01)
    assert (choice(one, 1500, 4000, 4, 1), choice(two, 1500, 4000, 4, 1)) == ("kv", "kv")
    assert (choice(one, 900, 4000, 4, 1), choice(two, 100, 4000, 4, 1)) == ("queries", "queries")


def test_even_contexts_of_several_homes_are_decided_by_bytes_alone():
    """Each home has one of four prompts: whichever travels, all ranks have as much to do."""
    grid, sharding = RankGrid(1, 4, 1), KVSharding(1, 16, 16)
    for new, expected in ((60, "queries"), (9000, "kv")):
        split = zigzag_split([new] * 4, 4)
        contexts = [Context(4000, home, range(sharding.num_blocks(4000))) for home in range(4)]
        step = StepContext(split, contexts, sharding, exchange_places(grid, 0))
        assert most_pairs("queries", step) == most_pairs("kv", step)
        assert choose_exchange(step, 4, KVLayout(1, 128, 128), 2) == expected


# --- layers with a window: the end of every context travels, in sequence order ---


def window_exchange_sees(split, contexts, sharding, places, store, window, workspace_tokens=10**6):
    """For each place, (prompt, position) of a query -> the (prompt, position) of the keys it sees, in their order."""
    step = StepContext(split, contexts, sharding, places)
    by_place = [plan_window_exchanges(step, index, window, workspace_tokens) for index in range(len(places))]
    seen_of = [min(c.num_tokens, window - 1) for c in contexts]
    found, next_query, next_prompt = [{} for _ in places], [0] * len(places), 0
    for parts in zip(*by_place, strict=True):  # every rank takes part in the same gathers
        # Some prompts after others, as many as there is room for.
        last_prompt = next_prompt + 1
        while last_prompt < len(contexts) and sum(seen_of[next_prompt : last_prompt + 1]) <= workspace_tokens:
            last_prompt += 1
        prompts = range(next_prompt, last_prompt)
        for i, part in enumerate(parts):
            assert part.queries.start == next_query[i]
            next_query[i] = part.queries.stop
        sees = part_of_window_exchange_sees(split, contexts, sharding, places, store, window, parts, prompts)
        for all_seen, seen in zip(found, sees, strict=True):
            all_seen |= seen
        next_prompt = last_prompt
    assert next_prompt == len(contexts)
    return found


def part_of_window_exchange_sees(split, contexts, sharding, places, store, window, plans, prompts):
    (length,) = {plan.length for plan in plans}  # every rank takes part in the same gather
    sent = np.full((len(places), length, 2), -1)
    for plan, place, room in zip(plans, places, sent, strict=True):
        assert (plan.slots >= 0).all(), "a block that was given back is looked up"
        room[: len(plan.slots)] = store[place.home, place.shard][plan.slots]
        # What a place holds of the ends of its home's contexts travels, and nothing else.
        assert [tuple(key) for key in room[: len(plan.slots)].tolist()] == [
            (prompt, x)
            for prompt, c in enumerate(contexts)
            if prompt in prompts
            for x in range(max(0, c.num_tokens - window + 1), c.num_tokens)
            if c.home == place.home and sharding.owner(np.array(x)) == place.shard
        ]
    assert length == max(len(plan.slots) for plan in plans)
    new = np.full((split.pcp_size * split.part_len, 2), -1)
    for prompt, context in enumerate(contexts):
        rows = gathered_rows(split, prompt)
        new[rows, 0], new[rows, 1] = prompt, context.num_tokens + np.arange(len(rows))
    gathered = np.concatenate([sent.reshape(-1, 2), new])
    by_place = []
    for plan, place in zip(plans, places, strict=True):
        pieces = [piece for piece in split.part(place.pcp_rank) if piece.prompt in prompts]
        assert plan.rows.q_lens.tolist() == [piece.num_tokens for piece in pieces]
        assert plan.rows.causal and plan.rows.window == window and plan.rows.block_size == 1
        seen = {}
        for row, piece in enumerate(pieces):
            keys = [tuple(key) for key in gathered[plan.rows.slots(row)].tolist()]
            for t in range(piece.num_tokens):
                end = len(keys) - piece.num_tokens + t + 1
                query = piece.prompt, contexts[piece.prompt].num_tokens + piece.start + t
                seen[query] = keys[max(0, end - window) : end]
        by_place.append(seen)
    return by_place


def wanted_in_window(split, contexts, place, window):
    """Every query of a place sees the last `window` positions of its own prompt, in order."""
    return {
        (piece.prompt, at): [(piece.prompt, x) for x in range(max(0, at - window + 1), at + 1)]
        for piece in split.part(place.pcp_rank)
        for at in (contexts[piece.prompt].num_tokens + t for t in range(piece.start, piece.end))
    }


WINDOWS = st.sampled_from([1, 2, 3, 4, 7, 12, 30, 61, 500])


@settings(max_examples=120, deadline=None, derandomize=True)
@given(context_steps(), WINDOWS, st.data())
def test_in_a_window_every_query_sees_exactly_the_last_positions_of_its_prompt_in_order(step, window, data):
    grid, split, contexts, sharding = step
    store = store_of(step)
    # Blocks that no query will see may be gone by now.
    dead = [sharding.num_dead_blocks(c.num_tokens, window) for c in contexts]
    sparse = [replace(c, block_table=[-1] * n + list(c.block_table[n:])) for c, n in zip(contexts, dead, strict=True)]
    places = exchange_places(grid, data.draw(st.integers(0, grid.world_size - 1)))
    workspace_tokens = data.draw(st.sampled_from([1, 10, 60, 10**6]))
    by_place = window_exchange_sees(split, sparse, sharding, places, store, window, workspace_tokens)
    assert by_place == [wanted_in_window(split, contexts, place, window) for place in places]


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.world_size <= 8], ids=str)
@pytest.mark.parametrize("window", [1, 5, 100])
def test_the_same_on_every_axis_with_and_without_context_side_by_side(grid, window):
    sharding = KVSharding(grid.dcp_size, 2, 3)
    split = zigzag_split([9, 4, 7], grid.pcp_size, assigned=[None, 0, None])
    cached, blocks = [17, 0, 40], iter(range(100))
    contexts = [
        Context(n, i % grid.num_homes, [next(blocks) for _ in range(sharding.num_blocks(n))])
        for i, n in enumerate(cached)
    ]
    store = caches(contexts, sharding, grid.num_homes, 300)
    for rank in range(grid.world_size):
        places = exchange_places(grid, rank)
        by_place = window_exchange_sees(split, contexts, sharding, places, store, window)
        assert by_place == [wanted_in_window(split, contexts, place, window) for place in places]


def test_a_window_of_one_token_lets_nothing_travel():
    sharding, split = KVSharding(2, 2, 4), zigzag_split([6], 2)
    places = exchange_places(RankGrid(1, 2, 2), 0)
    plan = plan_window_exchange(StepContext(split, [Context(20, 0, [0, 1, 2])], sharding, places), 0, 1)
    assert plan.length == 0 and plan.slots.tolist() == []
    assert [plan.rows.slots(i).tolist() for i in range(2)] == [[0], [1, 2]]  # pieces of 1, 2, 1 and 2


def test_a_rotated_shard_or_a_window_off_by_one_is_seen_by_these_tests():
    """Negative controls."""
    sharding, split, contexts = KVSharding(2, 2, 4), zigzag_split([6], 2), [Context(7, 0, [1])]
    store = caches(contexts, sharding, 1, 8)
    places = exchange_places(RankGrid(1, 2, 2), 0)
    want = [wanted_in_window(split, contexts, place, 5) for place in places]
    assert window_exchange_sees(split, contexts, sharding, places, store, 5) == want
    with pytest.raises(AssertionError):
        window_exchange_sees(split, contexts, sharding, places, store[:, ::-1], 5)
    for other in (4, 6):
        assert window_exchange_sees(split, contexts, sharding, places, store, other) != want
