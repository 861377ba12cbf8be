"""Agreement: after each step every rank holds the tokens of the ranks that have the say, or the same error."""

import struct

import pytest
import torch

from cpinfer.comm.axis import CountingComm, SoloComm
from cpinfer.comm.threads import run_ranks
from cpinfer.engine.agreement import agree_on_tokens, gather_token_lists, smallest
from cpinfer.engine.request import SampledToken
from cpinfer.errors import EngineFaultError
from cpinfer.layout.grid import RankGrid

CPU = torch.device("cpu")
GRID = RankGrid(tp_size=2, pcp_size=2, dcp_size=2)
# Three rows dealt over pcp: rows 0 and 2 on pcp rank 0, row 1 on pcp rank 1.
PLACES = [(0, 0), (1, 0), (0, 1)]


def float32(bits):
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def token(pcp_rank, row, tp_rank=0):
    """Another token, with other logprobs, for every place and tp rank."""
    n = 100 * pcp_rank + 10 * row + tp_rank
    return SampledToken(n, -0.1 * n, -0.01 * n)


def rows_of(pcp_rank):
    return sum(p == pcp_rank for p, _ in PLACES)


def everyone_samples(topology):
    _, pcp_rank, tp_rank = topology.coords
    own = [token(pcp_rank, row, tp_rank) for row in range(rows_of(pcp_rank))]
    return agree_on_tokens(topology.replica, 2, PLACES, own, CPU)


def only_the_authority_samples(topology):
    _, pcp_rank, tp_rank = topology.coords
    own = [token(pcp_rank, row) for row in range(rows_of(pcp_rank))] if tp_rank == 0 else []
    return agree_on_tokens(topology.replica, 2, PLACES, own, CPU)


@pytest.mark.parametrize("body", [everyone_samples, only_the_authority_samples])
def test_all_ranks_get_the_tokens_of_the_first_tp_rank(body):
    results = run_ranks(GRID, body)
    for got, want in zip(results[0], [token(0, 0), token(1, 0), token(0, 1)], strict=True):
        assert got.token_id == want.token_id
        assert (got.logprob, got.processed_logprob) == pytest.approx((want.logprob, want.processed_logprob))
    assert all(result == results[0] for result in results)


def test_other_tp_ranks_did_sample_something_else():
    """The control: the authority matters only where copies differ."""
    assert token(1, 0, tp_rank=1) != token(1, 0, tp_rank=0)


def test_logprobs_arrive_bit_by_bit():
    patterns = [0x80000000, 0x00000001, 0xBDCCCCCD, 0xC2F6E979, 0x3F800001, 0xFF800000]
    tokens = [SampledToken(i, float32(bits), float32(bits ^ 1)) for i, bits in enumerate(patterns)]

    def body(topology):
        own = tokens if topology.rank == 0 else []
        return agree_on_tokens(topology.replica, 2, [(0, row) for row in range(len(tokens))], own, CPU)

    for result in run_ranks(GRID, body):
        for got, want in zip(result, tokens, strict=True):
            assert got.token_id == want.token_id
            assert struct.pack("<f", got.logprob) == struct.pack("<f", want.logprob)


def test_a_large_token_id_survives():
    tokens = [SampledToken(2**31 - 1, 0.0, 0.0)]
    assert agree_on_tokens(SoloComm(), 1, [(0, 0)], tokens, CPU) == tokens


@pytest.mark.parametrize("faulty", range(4))
def test_a_fault_on_one_rank_is_the_same_error_on_every_rank(faulty):
    """Also where the faulty rank has no say, and where its first row is fine."""
    messages = {}

    def body(topology):
        _, pcp_rank, tp_rank = topology.coords
        own = [token(pcp_rank, row, tp_rank) for row in range(rows_of(pcp_rank))]
        if topology.rank == faulty:
            own[-1] = None
        try:
            agree_on_tokens(topology.replica, 2, PLACES, own, CPU)
        except EngineFaultError as error:
            messages[topology.rank] = str(error)

    run_ranks(GRID, body)
    assert sorted(messages) == [0, 1, 2, 3]
    assert len(set(messages.values())) == 1
    assert f"not finite on rank(s) [{faulty}]" in messages[0]


def test_agreement_is_one_collective_however_many_rows():
    def body(topology):
        replica = CountingComm(topology.replica)
        places = [(0, row) for row in range(50)]
        own = [token(0, row) for row in range(50)] if topology.coords.pcp_rank == 0 else []
        agree_on_tokens(replica, 2, places, own, CPU)
        return replica.traffic.num_collectives

    assert run_ranks(GRID, body) == [1] * 4


def test_the_smallest_value_of_all_ranks_is_found_by_all():
    assert run_ranks(GRID, lambda t: smallest(t.replica, [7, 5, 9, 2**40][t.rank], CPU)) == [5] * 4
    assert smallest(SoloComm(), 3, CPU) == 3


def test_token_lists_of_all_lengths_arrive_in_rank_order_on_every_rank():
    given = [[[1, 2, 3], []], [], [[4]], [[5], [6, 7], [8, 9, 10, 11, 12]]]
    grid = RankGrid(pcp_size=4, dcp_size=4)
    results = run_ranks(grid, lambda topology: gather_token_lists(topology.replica, given[topology.rank], CPU))
    want = [[tuple(tokens) for tokens in lists] for lists in given]
    assert all(result == want for result in results)
