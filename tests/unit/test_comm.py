"""Communicators: place order along an axis, failures that end everyone, and what launchers say."""

import threading
import time

import pytest
import torch

import cpinfer.comm.axis as axis
from cpinfer.comm.axis import CountingComm, ProcessGroupComm, SoloComm
from cpinfer.comm.bootstrap import Launch, world_size_error
from cpinfer.comm.losses import is_peer_loss
from cpinfer.comm.threads import run_ranks
from cpinfer.comm.topology import Topology
from cpinfer.errors import PeerLostError
from cpinfer.layout.grid import RankGrid

TP2_PCP2_DCP4 = RankGrid(tp_size=2, pcp_size=2, dcp_size=4)
GRIDS = [
    TP2_PCP2_DCP4,
    RankGrid(tp_size=2, pcp_size=2, dcp_size=2),
    RankGrid(tp_size=4, pcp_size=1, dcp_size=2),
    RankGrid(pcp_size=2, dcp_size=1, dp_size=2),
]


def test_the_dcp_axis_of_tp2_pcp2_dcp4_runs_0_2_1_3():
    def body(topology):
        return topology.dcp.all_gather(torch.tensor([topology.rank])).flatten().tolist(), topology.kv_shard

    assert run_ranks(TP2_PCP2_DCP4, body) == [
        ([0, 2, 1, 3], 0),
        ([0, 2, 1, 3], 2),
        ([0, 2, 1, 3], 1),
        ([0, 2, 1, 3], 3),
    ]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name, groups", [("pcp", "pcp_groups"), ("dcp", "dcp_groups"), ("replica", "replica_groups")])
def test_all_gather_brings_what_each_place_gave_in_place_order(grid, name, groups):
    def body(topology):
        return getattr(topology, name).all_gather(torch.tensor([[topology.rank, 7]]))

    for rank, got in enumerate(run_ranks(grid, body)):
        group = next(g for g in getattr(grid, groups) if rank in g)
        assert got.shape == (len(group), 1, 2)
        assert got[:, 0, 0].tolist() == list(group)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name, groups", [("pcp", "pcp_groups"), ("dcp", "dcp_groups"), ("replica", "replica_groups")])
def test_all_to_all_brings_what_each_place_had_for_this_one(grid, name, groups):
    def body(topology):
        comm = getattr(topology, name)
        return comm.index, comm.all_to_all(torch.tensor([[100 * topology.rank + place] for place in range(comm.size)]))

    for rank, (index, got) in enumerate(run_ranks(grid, body)):
        group = next(g for g in getattr(grid, groups) if rank in g)
        assert group[index] == rank
        assert got.flatten().tolist() == [100 * other + index for other in group]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name, groups", [("pcp", "pcp_groups"), ("dcp", "dcp_groups"), ("replica", "replica_groups")])
def test_reduce_scatter_sums_what_every_place_had_for_this_one(grid, name, groups):
    def body(topology):
        comm = getattr(topology, name)
        terms = torch.tensor([[[100.0**place * (topology.rank + 1), place]] for place in range(comm.size)])
        return comm.index, comm.reduce_scatter(terms)

    for rank, (index, got) in enumerate(run_ranks(grid, body)):
        group = next(g for g in getattr(grid, groups) if rank in g)
        assert got.tolist() == [[100.0**index * sum(r + 1 for r in group), index * len(group)]]


def test_a_send_buffer_may_be_reused_at_once():
    def body(topology):
        x = torch.full((3,), topology.rank)
        first = topology.replica.all_gather(x)
        x.fill_(-1)
        return first[:, 0].tolist(), topology.replica.all_gather(x)[:, 0].tolist()

    assert run_ranks(RankGrid(pcp_size=2, dcp_size=2), body) == [([0, 1], [-1, -1])] * 2


def test_many_collectives_in_a_row_do_not_mix():
    def body(topology):
        return [topology.pcp.all_gather(torch.tensor([i * 10 + topology.rank])).flatten().tolist() for i in range(50)]

    assert run_ranks(RankGrid(pcp_size=2, dcp_size=2), body) == [[[i * 10, i * 10 + 1] for i in range(50)]] * 2


@pytest.mark.parametrize("failing", [0, 3])
def test_a_failing_rank_ends_the_others_and_its_own_error_is_raised(failing):
    ended = []

    def body(topology):
        if topology.rank == failing:
            raise KeyError("mine")
        try:
            topology.replica.all_gather(torch.zeros(1))
        except PeerLostError:
            ended.append(topology.rank)
            raise

    start = time.perf_counter()
    with pytest.raises(KeyError, match="mine"):
        run_ranks(TP2_PCP2_DCP4, body)
    assert time.perf_counter() - start < 2
    assert sorted(ended) == [rank for rank in range(4) if rank != failing]


def test_a_rank_that_never_comes_is_a_lost_peer_after_the_timeout():
    def body(topology):
        if topology.rank == 0:
            topology.replica.all_gather(torch.zeros(1))

    with pytest.raises(PeerLostError):
        run_ranks(RankGrid(pcp_size=2, dcp_size=2), body, timeout_s=0.1)


def test_results_come_in_rank_order_whoever_is_first():
    def body(topology):
        time.sleep(0.02 * (3 - topology.rank))
        return topology.rank, topology.coords

    assert run_ranks(TP2_PCP2_DCP4, body) == [(r, TP2_PCP2_DCP4.coords(r)) for r in range(4)]


def test_solo_is_the_identity_and_copies_nothing():
    x = torch.arange(6.0).reshape(1, 6)
    solo = SoloComm()
    assert (solo.size, solo.index) == (1, 0)
    assert torch.equal(solo.all_gather(x), x[None])
    assert solo.all_gather(x).data_ptr() == solo.all_to_all(x).data_ptr() == x.data_ptr()
    assert torch.equal(solo.all_to_all(x), x)
    assert torch.equal(solo.reduce_scatter(x), x[0]) and solo.reduce_scatter(x).data_ptr() == x.data_ptr()


def test_bytes_counted_are_those_received_from_others():
    """DESIGN section 5: `(n-1) *` one rank's share, for gather, all-to-all and reduce-scatter alike."""
    R, hq, kvl, D = 3, 4, 1, 8

    def body(topology):
        comm = CountingComm(topology.dcp)
        gathered = comm.all_gather(torch.zeros(R, (hq + 2 * kvl) * D, dtype=torch.bfloat16))
        gather_bytes = comm.traffic.received_bytes
        comm.all_to_all(torch.zeros(comm.size, R, hq, D + 2, dtype=torch.bfloat16))
        traffic = comm.traffic
        exchanged = traffic.received_bytes
        summed = comm.reduce_scatter(torch.zeros(comm.size, R, hq, D))
        assert summed.shape == (R, hq, D) and traffic.num_collectives == 3
        assert gathered.shape[0] == comm.size == 4 and comm.index == topology.kv_shard
        received = (gather_bytes, exchanged - gather_bytes, traffic.received_bytes - exchanged)
        return received, traffic.num_all_gather, traffic.num_all_to_all, traffic.num_reduce_scatter

    n = 4
    received = ((n - 1) * R * (hq + 2 * kvl) * D * 2, (n - 1) * R * hq * (D * 2 + 4), (n - 1) * R * hq * D * 4)
    want = (received, 1, 1, 1)
    assert run_ranks(TP2_PCP2_DCP4, body) == [want] * 4


def test_an_all_reduce_gives_every_place_the_same_sum_and_counts_what_bandwidth_asks_for():
    def body(topology):
        comm = CountingComm(topology.tp)
        total = comm.all_reduce(torch.full((8,), 10.0**topology.rank))
        return total.tolist(), comm.traffic.num_all_reduce, comm.traffic.num_collectives, comm.traffic.received_bytes

    low, high = ([11.0] * 8, 1, 1, 32), ([1100.0] * 8, 1, 1, 32)
    assert run_ranks(TP2_PCP2_DCP4, body) == [low, low, high, high]


def test_a_solo_axis_counts_nothing():
    comm = CountingComm(SoloComm())
    comm.all_gather(torch.zeros(8))
    comm.all_to_all(torch.zeros(1, 8))
    comm.reduce_scatter(torch.zeros(1, 8))
    comm.all_reduce(torch.zeros(8))
    assert (comm.traffic.num_collectives, comm.traffic.received_bytes) == (0, 0)


class SortedTransport:
    """Collectives as torch does them: over the *sorted* ranks of a group, by threads instead of processes."""

    def __init__(self, ranks):
        self.members = sorted(ranks)
        self.table = {}
        self.barrier = threading.Barrier(len(self.members), timeout=10)
        self.local = threading.local()

    def exchange(self, x):
        self.table[self.local.rank] = x.clone()
        self.barrier.wait()
        given = [self.table[r] for r in self.members]
        self.barrier.wait()
        return given

    def all_gather(self, out, x, group):
        out.copy_(torch.cat(self.exchange(x)))

    def all_to_all_single(self, out, x, group):
        me = self.members.index(self.local.rank)
        out.copy_(torch.stack([given[me] for given in self.exchange(x)]))

    def reduce_scatter(self, out, x, group):
        me = self.members.index(self.local.rank)
        terms = [given.reshape(len(self.members), -1)[me] for given in self.exchange(x)]
        out.copy_(torch.stack(terms).sum(dim=0))


@pytest.fixture
def transport(monkeypatch):
    transport = SortedTransport([0, 2, 1, 3])
    monkeypatch.setattr(axis, "_all_gather", transport.all_gather)
    monkeypatch.setattr(axis, "_reduce_scatter", transport.reduce_scatter)
    monkeypatch.setattr(axis.dist, "all_to_all_single", transport.all_to_all_single)
    monkeypatch.setattr(axis.dist, "get_process_group_ranks", lambda group: transport.members)
    return transport


def on_every_rank(transport, body):
    def enter(topology):
        transport.local.rank = topology.rank
        return body(topology.rank)

    return run_ranks(TP2_PCP2_DCP4, enter)


@pytest.mark.parametrize("places", [(0, 2, 1, 3), (0, 1, 2, 3), (3, 1, 0, 2)])
def test_a_process_group_that_sorts_its_ranks_still_gives_place_order(transport, places):
    """torch sorts `new_group([0, 2, 1, 3])`; (3, 1, 0, 2) is a permutation that is not its own inverse."""

    def body(rank):
        comm = ProcessGroupComm(None, places, rank)
        gathered = comm.all_gather(torch.tensor([rank, rank]))
        sent = torch.tensor([[100 * rank + place] for place in range(4)])
        summed = comm.reduce_scatter(sent[:, :, None].expand(4, 1, 2))
        return comm.index, gathered[:, 0].tolist(), comm.all_to_all(sent).flatten().tolist(), summed.tolist()

    for rank, (index, gathered, received, summed) in enumerate(on_every_rank(transport, body)):
        assert places[index] == rank
        assert gathered == list(places)
        assert received == [100 * other + index for other in places]
        assert summed == [[sum(received)] * 2]


def test_a_process_group_of_other_ranks_is_refused(transport):
    with pytest.raises(ValueError, match="ranks"):
        ProcessGroupComm(None, (0, 1), 0)


def test_only_a_lost_peer_is_taken_for_one(transport, monkeypatch):
    """Another error of a collective (shapes that differ, say) is this rank's own, and must be told as such."""
    for message, lost in (("Connection closed by peer [127.0.0.1]:1234", True), ("output shape is wrong", False)):

        def broken(*args, message=message, **kwargs):
            raise RuntimeError(message)

        monkeypatch.setattr(axis, "_all_gather", broken)
        with pytest.raises(RuntimeError) as caught:
            ProcessGroupComm(None, (0, 2, 1, 3), 0).all_gather(torch.zeros(1))
        assert is_peer_loss(caught.value) == lost


def test_a_world_of_one_needs_no_process_group():
    topology = Topology.from_world(RankGrid(), tp_group="the job's")
    assert (topology.rank, topology.tp_group, topology.is_writer, topology.kv_shard) == (0, "the job's", True, 0)
    assert topology.pcp.size == topology.dcp.size == topology.replica.size == 1
    topology.close()


def test_the_writer_of_a_replica_is_its_first_rank():
    grid = RankGrid(tp_size=2, pcp_size=1, dcp_size=1, dp_size=2)
    assert run_ranks(grid, lambda topology: topology.is_writer) == [True, False, True, False]


def test_launch_reads_what_launchers_say():
    assert Launch.from_environ({}) == Launch(0, 0, 1)
    assert Launch.from_environ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}) == Launch(5, 1, 8)


@pytest.mark.parametrize(
    "world_size, grid_size, dp_is_free, fits",
    [(4, 4, False, True), (8, 4, True, True), (8, 4, False, False), (6, 4, True, False), (2, 4, True, False)],
)
def test_a_world_fits_a_grid_or_any_number_of_them(world_size, grid_size, dp_is_free, fits):
    error = world_size_error(world_size, grid_size, dp_is_free)
    assert (error is None) == fits
    if error:
        assert f"{world_size} process(es) were started" in error
        assert (f"a multiple of {grid_size}" if dp_is_free else f"needs {grid_size} ") in error
        assert f"Start {grid_size} processes, or change the layout." in error


def test_one_process_where_more_were_wanted_gets_the_launchers_to_call():
    error = world_size_error(1, 4, True)
    for words in ("deepspeed --num_gpus 4", "torchrun --nproc-per-node 4", "ACCELERATE_USE_CPU=true accelerate launch"):
        assert words in error


def test_only_the_echo_of_another_ranks_end_is_a_peer_loss():
    assert is_peer_loss(PeerLostError("gone"))
    assert is_peer_loss(RuntimeError("[enforce] Connection closed by peer [127.0.0.1]:4711"))
    assert is_peer_loss(RuntimeError("NCCL error: remote process exited or there was a network error"))
    assert not is_peer_loss(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_peer_loss(ValueError("connection reset"))
