"""Partial states come back whole: whatever the way, each rank has its own rows and heads merged over all shards."""

import pytest
import torch

from cpinfer.attention.exchanges.all_to_all import AllToAllExchange
from cpinfer.attention.exchanges.registry import EXCHANGES, context_exchange, decode_exchange
from cpinfer.comm.axis import CountingComm, SoloComm
from cpinfer.comm.threads import run_ranks
from cpinfer.errors import UserError
from cpinfer.layout.grid import RankGrid
from cpinfer.ops.states import merge_packed, merge_states, pack_by_place

R, H, K, D = 3, 2, 1, 4

# One column (dcp <= pcp, over the DCP axis), and several: tp ranks whose heads differ share one KV head.
ONE_COLUMN = [RankGrid(1, 2, 2), RankGrid(1, 4, 4), RankGrid(2, 2, 2), RankGrid(1, 4, 2)]
COLUMNS = [RankGrid(2, 2, 4), RankGrid(4, 2, 8), RankGrid(4, 1, 2), RankGrid(4, 1, 4), RankGrid(4, 2, 4)]


class World:
    """Rows and heads of one DCP group of `columns` by `rows_of` ranks, and what each of its shards knows of them.

    Everything is float32 and random, peaked as attention is; `lse` of the given (row, shard) pairs is -inf.
    """

    def __init__(self, grid, num_places, pcp_size, empty=()):
        self.pcp_size, self.columns = pcp_size, num_places // pcp_size
        g = torch.Generator().manual_seed(grid.world_size)
        rows, heads = pcp_size * R, self.columns * H
        self.q = torch.randn(rows, heads, D, generator=g)
        self.k, self.v = torch.randn(rows, K, D, generator=g), torch.randn(rows, K, D, generator=g)
        self.out = torch.randn(num_places, rows, heads, D, generator=g)
        self.lse = 5 * torch.randn(num_places, rows, heads, generator=g)
        for row, shard in empty:
            self.lse[shard, row] = -torch.inf
            self.out[shard, row] = 0.0

    def own(self, x, place):
        """What of `[rows, heads, ...]` the rank at `place` owns: pcp runs fastest."""
        column, pcp_rank = divmod(place, self.pcp_size)
        return x[pcp_rank * R : (pcp_rank + 1) * R, column * H : (column + 1) * H]

    def merged(self, place):
        """Straight from the shards' states, in float64."""
        shards = range(len(self.out))
        return merge_states([tuple(self.own(x[s], place).double() for x in (self.out, self.lse)) for s in shards])


def group_sizes(grid):
    """(places, pcp places) of the decode exchange, which runs over the DCP axis."""
    return grid.dcp_size, grid.row_ranks


def exchange_states(grid, name, empty=(), wire_dtype=torch.float32):
    """(the world, each rank's merged state, traffic) for every rank of the grid."""
    places, pcp_size = group_sizes(grid)
    replicated = name == "replicate_q"
    # Replicated queries: every rank has computed all rows, so there is one place to deal them to.
    world = World(grid, places, 1 if replicated else pcp_size, empty)
    if replicated:
        world.columns = 1

    def body(topology):
        comm = CountingComm(topology.dcp)
        exchange = EXCHANGES[name](comm, pcp_size=1 if replicated else pcp_size, wire_dtype=wire_dtype)
        mine = world.out[comm.index], world.lse[comm.index]
        if replicated:
            mine = mine[0][:, :H], mine[1][:, :H]
        return comm.index, exchange.return_partials(mine), comm.traffic

    return world, run_ranks(grid, body)


def assert_merged(world, got, place, tolerance=2e-6):
    """`got` is what the shards' states merge to, and where all are empty it is the empty state."""
    (out, lse), (want_out, want_lse) = got, world.merged(place)
    assert out.shape == (R, H, D) and lse.shape == (R, H) and lse.dtype == torch.float32
    assert not out.isnan().any()
    torch.testing.assert_close(out.double(), want_out, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["a2a", "ag_rs"])
@pytest.mark.parametrize("grid", ONE_COLUMN + COLUMNS, ids=str)
def test_own_rows_and_heads_come_back_merged_over_all_shards(grid, name):
    world, results = exchange_states(grid, name)
    for place, got, _ in results:
        assert_merged(world, got, place)


@pytest.mark.parametrize("grid", ONE_COLUMN, ids=str)
def test_replicated_rows_are_merged_on_every_rank_and_equal_on_all(grid):
    world, results = exchange_states(grid, "replicate_q")
    for _, got, _ in results:
        assert_merged(world, got, 0)
        assert torch.equal(got[0], results[0][1][0]) and torch.equal(got[1], results[0][1][1])


@pytest.mark.parametrize(
    "grid, name",
    [(grid, way) for grid in ONE_COLUMN for way in ("a2a", "ag_rs", "replicate_q")]
    + [(grid, way) for grid in COLUMNS for way in ("a2a", "ag_rs")],
    ids=str,
)
def test_shards_that_hold_nothing_of_a_row_count_nothing_and_rows_that_nobody_holds_stay_empty(grid, name):
    shards = range(grid.dcp_size)
    empty = [(0, 0), (1, grid.dcp_size - 1), *((2, shard) for shard in shards)]
    world, results = exchange_states(grid, name, empty)
    for place, got, _ in results:
        at = 0 if name == "replicate_q" else place
        assert_merged(world, got, at)
        if at % world.pcp_size == 0:  # row 2 is among the rows of pcp rank 0
            assert (got[1][2] == -torch.inf).all() and (got[0][2] == 0).all()
            assert got[1][:2].isfinite().all()


@pytest.mark.parametrize("name", ["a2a", "ag_rs", "replicate_q"])
def test_a_fault_in_one_shard_is_not_merged_away(name):
    grid = RankGrid(1, 2, 2)

    def body(topology):
        exchange = EXCHANGES[name](topology.dcp, pcp_size=1 if name == "replicate_q" else 2, wire_dtype=torch.float32)
        rows = R if name == "replicate_q" else 2 * R
        out, lse = torch.ones(rows, H, D), torch.zeros(rows, H)
        if topology.rank == 1:
            out[0, 0, 0] = torch.nan
        return exchange.return_partials((out, lse))[0]

    assert run_ranks(grid, body)[0][0, 0].isnan().any()


@pytest.mark.parametrize("name, tolerance", [("a2a", 2e-2), ("replicate_q", 2e-2), ("ag_rs", 2e-6)])
def test_a_narrow_wire_rounds_outputs_and_never_lse(name, tolerance):
    """`ag_rs` sends what is already weighted, in float32 whatever the wire."""
    world, results = exchange_states(RankGrid(1, 4, 4), name, wire_dtype=torch.bfloat16)
    for place, got, _ in results:
        assert_merged(world, got, 0 if name == "replicate_q" else place, tolerance)


@pytest.mark.parametrize(
    "name, gathers, all_to_alls, reduce_scatters",
    [("a2a", 0, 1, 0), ("ag_rs", 1, 0, 1), ("replicate_q", 1, 0, 0)],
)
def test_states_come_back_by_the_collectives_of_the_design(name, gathers, all_to_alls, reduce_scatters):
    _, results = exchange_states(RankGrid(1, 4, 4), name)
    for _, _, traffic in results:
        counts = (traffic.num_all_gather, traffic.num_all_to_all, traffic.num_reduce_scatter)
        assert counts == (gathers, all_to_alls, reduce_scatters)


def test_an_all_to_all_of_states_has_the_bytes_of_the_design():
    for wire_dtype in (torch.float32, torch.bfloat16):
        _, results = exchange_states(RankGrid(2, 2, 4), "a2a", wire_dtype=wire_dtype)
        assert {t.received_bytes for _, _, t in results} == {3 * R * H * (D * wire_dtype.itemsize + 4)}


@pytest.mark.parametrize("grid", ONE_COLUMN + COLUMNS, ids=str)
def test_rows_are_gathered_in_pcp_order_with_the_heads_of_all_columns_side_by_side(grid):
    places, pcp_size = group_sizes(grid)
    world = World(grid, places, pcp_size)

    def body(topology):
        comm = topology.dcp
        exchange = AllToAllExchange(comm, pcp_size=pcp_size, wire_dtype=torch.float32)
        q, rows = world.own(world.q, comm.index), slice(comm.index % pcp_size * R, (comm.index % pcp_size + 1) * R)
        return exchange.gather_rows(q), exchange.gather_qkv(q, (world.k[rows], world.v[rows]))

    for q_rows, (q, (k, v)) in run_ranks(grid, body):
        assert torch.equal(q_rows, world.q) and torch.equal(q, world.q)
        assert torch.equal(k, world.k) and torch.equal(v, world.v)


def test_keys_and_values_of_other_widths_are_taken_apart_again():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2 * R, heads, dim, generator=g) for heads, dim in ((H, 6), (2, 6), (2, 4)))

    def body(topology):
        exchange = AllToAllExchange(topology.dcp, pcp_size=2, wire_dtype=torch.float32)
        rows = slice(topology.rank * R, (topology.rank + 1) * R)
        q_rows, new = exchange.gather_qkv(q[rows], (k[rows], v[rows]))
        return q_rows, *new

    for got in run_ranks(RankGrid(1, 2, 2), body):
        assert all(torch.equal(x, y) for x, y in zip(got, (q, k, v), strict=True))


def test_replicated_rows_and_a_solo_axis_are_not_gathered():
    q, k, v = torch.randn(R, H, D), torch.randn(R, K, D), torch.randn(R, K, D)
    state = torch.randn(R, H, D), torch.randn(R, H)

    def body(topology):
        comm = CountingComm(topology.dcp)
        exchange = EXCHANGES["replicate_q"](comm, pcp_size=1, wire_dtype=torch.float32)
        assert exchange.replicates_rows
        q_rows, new = exchange.gather_qkv(q, (k, v))
        same = [x is y for x, y in zip((q_rows, *new), (q, k, v), strict=True)]
        return [exchange.gather_rows(q) is q, *same], comm.traffic.num_collectives

    assert run_ranks(RankGrid(1, 2, 2), body) == [([True] * 4, 0)] * 2
    for name in ("a2a", "ag_rs", "replicate_q"):
        comm = CountingComm(SoloComm())
        solo = EXCHANGES[name](comm, pcp_size=1, wire_dtype=torch.bfloat16)
        assert solo.gather_rows(q) is q and solo.return_partials(state) is state
        assert comm.traffic.num_collectives == 0


def test_the_wrong_shard_order_of_columns_is_seen():
    """Negative control: heads of the columns swapped would pass a test that looks at shapes."""
    grid = RankGrid(2, 2, 4)
    world, results = exchange_states(grid, "a2a")
    place, got, _ = results[0]
    with pytest.raises(AssertionError):
        assert_merged(world, got, (place + 2) % 4)


def test_places_that_do_not_divide_into_columns_are_refused():
    def body(topology):
        with pytest.raises(ValueError, match="4 places do not divide into columns of 3 pcp ranks"):
            AllToAllExchange(topology.dcp, pcp_size=3, wire_dtype=torch.float32)
        return True

    assert run_ranks(RankGrid(1, 4, 4), body) == [True] * 4


# --- groups that mix KV heads: what is new goes to every rank that stores it ---

# grid, the columns that bring the stored heads, the head that each column computes (copies repeat).
MIXED = [
    (RankGrid(2, 2, 4), (0, 1), (0, 1)),
    (RankGrid(2, 1, 2), (0, 1), (0, 1)),
    (RankGrid(3, 1, 3), (0, 2), (0, 0, 1)),
    (RankGrid(3, 1, 3), (0, 1), (0, 1, 1)),
    (RankGrid(3, 2, 6), (0, 2), (0, 0, 1)),
    (RankGrid(3, 3, 9), (0, 1, 2), (0, 1, 2)),
    (RankGrid(4, 1, 4), (0, 2), (0, 0, 1, 1)),
]


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("grid, kv_columns, heads", MIXED, ids=str)
def test_new_keys_and_values_of_all_rows_have_the_heads_of_the_named_columns_in_order(
    grid, kv_columns, heads, num_kv_heads
):
    g = torch.Generator().manual_seed(0)
    rows, columns = grid.pcp_size * R, grid.tp_size
    q = torch.randn(rows, columns * H, D, generator=g)
    distinct = 1 + max(heads)
    # Every distinct set of heads once; a column holds its own set.
    k = torch.randn(distinct, rows, num_kv_heads, D, generator=g)
    v = torch.randn(distinct, rows, num_kv_heads, D + 2, generator=g)

    def body(topology):
        comm = CountingComm(topology.dcp)
        exchange = AllToAllExchange(comm, pcp_size=grid.pcp_size, wire_dtype=torch.float32, kv_columns=kv_columns)
        column, pcp_rank = divmod(comm.index, grid.pcp_size)
        mine = slice(pcp_rank * R, (pcp_rank + 1) * R)
        own_q = q[mine, column * H : (column + 1) * H]
        own_kv = (k[heads[column], mine], v[heads[column], mine])
        got_q, (got_k, got_v) = exchange.gather_qkv(own_q, own_kv)
        alone = exchange.gather_qkv(own_q, own_kv[:1])[1]  # a latent is one part
        return got_q, got_k, got_v, alone, comm.traffic

    for got_q, got_k, got_v, alone, traffic in run_ranks(grid, body):
        assert torch.equal(got_q, q)
        assert torch.equal(got_k, torch.cat([k[heads[c]] for c in kv_columns], dim=1))
        assert torch.equal(got_v, torch.cat([v[heads[c]] for c in kv_columns], dim=1))
        assert len(alone) == 1 and torch.equal(alone[0], got_k)
        assert traffic.num_all_gather == traffic.num_collectives == 2, "one for each of the two calls"


def test_columns_in_another_order_would_be_seen():
    """Negative control: heads of two columns swapped pass a test that looks at shapes."""
    k = torch.randn(2, 2 * R, 1, D, generator=torch.Generator().manual_seed(0))

    def body(topology):
        exchange = AllToAllExchange(topology.dcp, pcp_size=2, wire_dtype=torch.float32, kv_columns=(1, 0))
        column, pcp_rank = divmod(topology.dcp.index, 2)
        own = k[column, pcp_rank * R : (pcp_rank + 1) * R]
        return exchange.gather_qkv(own, (own,))[1][0]

    for got in run_ranks(RankGrid(2, 2, 4), body):
        assert not torch.equal(got, torch.cat([k[0], k[1]], dim=1))
        assert torch.equal(got, torch.cat([k[1], k[0]], dim=1))


@pytest.mark.parametrize("name", ["a2a", "ag_rs"])
@pytest.mark.parametrize("grid", [RankGrid(2, 2, 4), RankGrid(3, 1, 3)], ids=str)
def test_mixed_groups_return_states_as_others_do(grid, name):
    """Whose KV heads were met makes no difference to where a row and query head belong."""
    world = World(grid, grid.dcp_size, grid.pcp_size)

    def body(topology):
        comm = topology.dcp
        exchange = EXCHANGES[name](
            comm,
            pcp_size=grid.pcp_size,
            wire_dtype=torch.float32,
            kv_columns=range(grid.tp_size),
        )
        return comm.index, exchange.return_partials((world.out[comm.index], world.lse[comm.index]))

    for place, got in run_ranks(grid, body):
        assert_merged(world, got, place)


def test_new_keys_that_every_rank_has_already_are_not_sent():
    """pcp=1 and one set of heads: of q, k and v only q travels."""
    q, k = torch.randn(R, H, D), torch.randn(R, K, D)

    def body(topology):
        comm = CountingComm(topology.dcp)
        exchange = AllToAllExchange(comm, pcp_size=1, wire_dtype=torch.float32)
        _, new = exchange.gather_qkv(q, (k, k))
        assert new[0] is k and new[1] is k
        return comm.traffic.received_bytes

    assert run_ranks(RankGrid(4, 1, 2), body) == [q.numel() * 4] * 4


def test_a_name_near_a_known_one_is_named():
    with pytest.raises(UserError, match='the nearest known decode_exchange is "ag_rs"'):
        decode_exchange("ag_sr")


@pytest.mark.parametrize("name", EXCHANGES)
def test_queries_of_a_prefill_are_split_over_ranks_whatever_decode_rows_are(name):
    assert not context_exchange(name).replicates_rows
    assert context_exchange(name) is decode_exchange(name) or decode_exchange(name).replicates_rows


class InOrder(AllToAllExchange):
    """A trial of one file: as by all-to-all, but every place sends all it has, and takes its own part of that."""

    def _return(self, out, lse):
        packed = pack_by_place(out, lse, self._wire_dtype, self._pcp_size, self._columns)
        return merge_packed(self._comm.all_gather(packed)[:, self._comm.index], out.shape[-1])


def test_a_row_is_all_that_a_new_exchange_takes(monkeypatch):
    monkeypatch.setitem(EXCHANGES, "trial", InOrder)
    for grid in (RankGrid(1, 4, 4), RankGrid(2, 2, 4)):
        world, results = exchange_states(grid, "trial")
        for place, got, _ in results:
            assert_merged(world, got, place)
