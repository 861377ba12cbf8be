"""Agreement: after each step every rank holds the tokens of the ranks that have the say, or the same error."""

import dataclasses
import struct

import pytest
import torch

from cpinfer.comm.axis import CountingComm, SoloComm
from cpinfer.comm.threads import run_ranks
from cpinfer.comm.topology import Topology
from cpinfer.engine.agreement import (
    Prepared,
    Says,
    agree_on_tokens,
    begin_together,
    gather_packed,
    pack_token_lists,
    smallest,
)
from cpinfer.engine.request import SampledToken
from cpinfer.engine.token_records import LOGPROB, PROCESSED, TokenRecords
from cpinfer.errors import EngineFaultError, RanksDifferError, StreamEndedError, UserError
from cpinfer.layout.grid import RankGrid

CPU = torch.device("cpu")
GRID = RankGrid(tp_size=2, pcp_size=2, dcp_size=2)
# Three rows dealt over pcp: rows 0 and 2 on pcp rank 0, row 1 on pcp rank 1.
PLACES = [(0, 0), (1, 0), (0, 1)]


def float32(bits):
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def bits_of(number):
    return struct.unpack("<i", struct.pack("<f", number))[0]


def token(pcp_rank, row, tp_rank=0):
    """Another token, with other logprobs, for every place and tp rank."""
    n = 100 * pcp_rank + 10 * row + tp_rank
    return SampledToken(n, -0.1 * n, -0.01 * n)


def records(tokens):
    """Rows of these tokens, None where none could be chosen."""
    some = [token or SampledToken(0, 0.0, 0.0) for token in tokens]
    columns = (torch.tensor([token[i] for token in some]) for i in (0, 1, 2, 4))
    has_token = torch.tensor([token is not None for token in tokens], dtype=torch.bool)
    made = TokenRecords.of(*columns, has_token, None, [token.kept_ids for token in some])
    for column, i in ((LOGPROB, 1), (PROCESSED, 2)):  # of bits that no float of Python's keeps
        made.numbers[:, column] = torch.tensor([bits_of(token[i]) for token in some])
    return made


def rows_of(pcp_rank):
    return sum(p == pcp_rank for p, _ in PLACES)


def everyone_samples(topology):
    _, pcp_rank, tp_rank = topology.coords
    own = [token(pcp_rank, row, tp_rank) for row in range(rows_of(pcp_rank))]
    return agree_on_tokens(topology.replica, 2, PLACES, records(own))[0]


def only_the_authority_samples(topology):
    _, pcp_rank, tp_rank = topology.coords
    own = [token(pcp_rank, row) for row in range(rows_of(pcp_rank))] if tp_rank == 0 else []
    return agree_on_tokens(topology.replica, 2, PLACES, records(own))[0]


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
        return agree_on_tokens(topology.replica, 2, [(0, row) for row in range(len(tokens))], records(own))[0]

    for result in run_ranks(GRID, body):
        for got, want in zip(result, tokens, strict=True):
            assert got.token_id == want.token_id
            assert struct.pack("<f", got.logprob) == struct.pack("<f", want.logprob)


def test_kept_sets_arrive_at_their_tokens_on_every_rank_in_two_collectives():
    """Of the rank that has the say, of any length, beside tokens without; a kept mass travels as its bits."""
    kept = {(0, 0): (1, 5, 2**31 - 1), (0, 1): None, (1, 0): tuple(range(1024))}

    def body(topology):
        _, pcp_rank, tp_rank = topology.coords
        replica = CountingComm(topology.replica)
        own = [
            token(*place)._replace(kept_ids=kept[place], kept_mass=float32(0x3F000001 + place[1]))
            for place in sorted(kept)
            if place[0] == pcp_rank and tp_rank == 0
        ]
        return agree_on_tokens(replica, 2, PLACES, records(own))[0], replica.traffic.num_collectives

    for tokens, num_collectives in run_ranks(GRID, body):
        assert [t.kept_ids for t in tokens] == [kept[place] for place in PLACES]
        assert [t.kept_mass for t in tokens] == [float32(0x3F000001 + row) for _, row in PLACES]
        assert [t.token_id for t in tokens] == [token(*place).token_id for place in PLACES]
        assert num_collectives == 2


def test_a_row_without_a_token_stands_among_rows_with_kept_sets():
    tokens = [token(0, 0)._replace(kept_ids=(4, 7)), None, token(0, 2)._replace(kept_ids=(9,))]
    found, _ = agree_on_tokens(SoloComm(), 1, [(0, 0), (0, 1), (0, 2)], records(tokens))
    assert [t and t.kept_ids for t in found] == [(4, 7), None, (9,)]


def test_a_large_token_id_survives():
    tokens = [SampledToken(2**31 - 1, 0.0, 0.0)]
    assert agree_on_tokens(SoloComm(), 1, [(0, 0)], records(tokens)) == (tokens, Says.NOTHING)


@pytest.mark.parametrize("faulty", range(4))
def test_a_fault_on_one_rank_is_the_same_error_on_every_rank(faulty):
    """Also where the faulty rank has no say, and where its first row is fine."""
    messages = {}

    def body(topology):
        _, pcp_rank, tp_rank = topology.coords
        own = [token(pcp_rank, row, tp_rank) for row in range(rows_of(pcp_rank))]
        try:
            agree_on_tokens(topology.replica, 2, PLACES, records(own), says=Says.FAULT * (topology.rank == faulty))
        except EngineFaultError as error:
            messages[topology.rank] = str(error)

    run_ranks(GRID, body)
    assert sorted(messages) == [0, 1, 2, 3]
    assert len(set(messages.values())) == 1
    assert f"not finite on rank(s) [{faulty}]" in messages[0]


def test_a_row_without_a_token_is_known_to_all_where_its_first_tp_rank_says_so():
    def body(topology):
        _, pcp_rank, tp_rank = topology.coords
        own = [token(pcp_rank, row, tp_rank) for row in range(rows_of(pcp_rank))]
        if (pcp_rank, tp_rank) == (1, 0):
            own[0] = None
        return agree_on_tokens(topology.replica, 2, PLACES, records(own))[0]

    for tokens in run_ranks(GRID, body):
        assert [t is None for t in tokens] == [place == (1, 0) for place in PLACES]


def test_agreement_is_one_collective_however_many_rows():
    def body(topology):
        replica = CountingComm(topology.replica)
        places = [(0, row) for row in range(50)]
        own = [token(0, row) for row in range(50)] if topology.coords.pcp_rank == 0 else []
        agree_on_tokens(replica, 2, places, records(own))
        return replica.traffic.num_collectives

    assert run_ranks(GRID, body) == [1] * 4


def test_the_smallest_value_of_all_ranks_is_found_by_all():
    assert run_ranks(GRID, lambda t: smallest(t.replica, [7, 5, 9, 2**40][t.rank], CPU)) == [5] * 4
    assert smallest(SoloComm(), 3, CPU) == 3


def test_token_lists_of_all_lengths_arrive_in_rank_order_on_every_rank():
    given = [[[1, 2, 3], []], [], [[4]], [[5], [6, 7], [8, 9, 10, 11, 12]]]
    grid = RankGrid(pcp_size=4, dcp_size=4)
    packed = [pack_token_lists(lists) for lists in given]
    lens = [len(row) for row in packed]
    results = run_ranks(grid, lambda topology: gather_packed(topology.replica, packed[topology.rank], lens, CPU))
    want = [[tuple(tokens) for tokens in lists] for lists in given]
    assert all(result == want for result in results)


def errors_of(grid, body):
    """What `body` raised on each rank; a rank that raised nothing is a failure."""

    def caught(topology):
        with pytest.raises(Exception) as raised:
            body(topology)
        return raised.value

    return run_ranks(grid, caught)


def test_a_rank_that_leaves_is_an_error_on_all_with_its_place():
    def body(topology):
        own = [token(topology.coords.pcp_rank, row) for row in range(rows_of(topology.coords.pcp_rank))]
        agree_on_tokens(topology.replica, 2, PLACES, records(own), says=Says.LEAVES * (topology.rank == 3))

    errors = errors_of(GRID, body)
    assert [type(error) for error in errors] == [StreamEndedError] * 4
    assert {error.places for error in errors} == {(3,)}


def test_a_fault_and_a_leaving_rank_in_one_step_are_one_error_everywhere():
    def body(topology):
        own = [None] * rows_of(topology.coords.pcp_rank)
        agree_on_tokens(topology.replica, 2, PLACES, records(own), says=Says.LEAVES * (topology.rank == 0))

    assert {type(error) for error in errors_of(GRID, body)} == {StreamEndedError}


def test_ranks_that_agree_begin_with_one_gather_and_learn_each_others_numbers():
    def body(topology):
        counted = dataclasses.replace(topology, replica=CountingComm(topology.replica))
        prepared = Prepared(topology.rank, lambda: {"block_size": 16}, number=10 * topology.rank)
        return *begin_together(counted, CPU, lambda: prepared), counted.replica.traffic.num_collectives

    assert run_ranks(GRID, body) == [(rank, [0, 10, 20, 30], 1) for rank in range(4)]


def test_one_rank_alone_compares_nothing():
    def never():
        raise AssertionError("asked for what nobody is there to compare with")

    assert begin_together(Topology.single(), CPU, lambda: Prepared("x", never, never, 3)) == ("x", [3])


def test_ranks_that_differ_are_named_with_the_first_difference_on_every_rank():
    grid = RankGrid(tp_size=2, pcp_size=2, dcp_size=2, dp_size=2)

    def body(topology):
        size = 32 if topology.rank == 6 else 16  # in the second replica: the first must not notice
        prepared = Prepared(None, lambda: {"dtype": "float32", "block_size": size})
        try:
            return begin_together(topology, CPU, lambda: prepared)
        except RanksDifferError as error:
            return str(error)

    results = run_ranks(grid, body)
    assert results[:4] == [(None, [0] * 4)] * 4
    assert len(set(results[4:])) == 1
    assert results[4].startswith("rank 6 has block_size 32, rank 4 has 16.")


def test_slices_of_weights_are_compared_along_pcp_only():
    def body(topology, moved=None):
        weights = {"weight w": 100 * topology.coords.tp_rank + (topology.rank == moved)}
        return begin_together(topology, CPU, lambda: Prepared(None, dict, lambda: weights))

    assert run_ranks(GRID, body) == [(None, [0] * 4)] * 4
    errors = errors_of(GRID, lambda topology: body(topology, moved=3))
    assert {str(error).split(".")[0] for error in errors} == {"rank 3 has weight w 101, rank 1 has 100"}


@pytest.mark.parametrize(
    ("complaint", "others"), [(UserError("no such token"), UserError), (KeyError("x"), RanksDifferError)]
)
def test_what_one_rank_cannot_begin_is_an_error_on_all(complaint, others):
    def prepare(topology):
        if topology.rank == 2:
            raise complaint
        return Prepared(None, dict)

    errors = errors_of(GRID, lambda topology: begin_together(topology, CPU, lambda: prepare(topology)))
    assert errors[2] is complaint
    assert [type(error) for error in errors[:2] + errors[3:]] == [others] * 3
    assert all("rank 2" in str(error) and str(complaint) in str(error) for error in errors[:2] + errors[3:])


def test_a_complaint_of_all_is_each_ranks_own():
    def prepare(topology):
        raise UserError(f"of {topology.rank}")

    errors = errors_of(GRID, lambda topology: begin_together(topology, CPU, lambda: prepare(topology)))
    assert [str(error) for error in errors] == [f"of {rank}" for rank in range(4)]


def test_what_cannot_be_fingerprinted_is_an_error_on_all():
    def same(topology):
        if topology.rank == 1:
            raise RuntimeError("weights are gone")
        return {}

    errors = errors_of(
        GRID, lambda topology: begin_together(topology, CPU, lambda: Prepared(0, lambda: same(topology)))
    )
    assert all("weights are gone" in str(error) for error in errors)
