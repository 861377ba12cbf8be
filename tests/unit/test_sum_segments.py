"""Sums in shared memory: what a segment takes, and when there is none. Sums themselves: tests/distributed."""

import datetime
import sys

import pytest
import torch.distributed as dist

from cpinfer.comm import shared_sum
from cpinfer.comm.axis import SoloComm
from cpinfer.comm.rank_watch import place_of, timeout_s
from cpinfer.comm.shared_sum import MAX_BYTES, MAX_RANKS, open_shared_sum, segment_bytes

HERE, THERE = ["a boot", "pid:[1]"], ["another boot", "pid:[1]"]


def offers(*hosts):
    return [{"why": None, "host": host} for host in hosts]


def test_a_segment_is_never_more_than_it_may_be_and_holds_whole_pages():
    for num_ranks in range(2, MAX_RANKS + 1):
        assert segment_bytes(num_ranks) <= MAX_BYTES
        assert shared_sum._chunk_bytes(num_ranks) >= 4096
        assert shared_sum._chunk_bytes(num_ranks) % 4096 == 0


def test_only_ranks_that_sum_together_have_to_be_on_one_host():
    ranks = (4, 5, 6, 7)
    assert shared_sum._refusal(offers(HERE, HERE, THERE, THERE), ranks, 2) is None
    told = shared_sum._refusal(offers(HERE, HERE, HERE, THERE), ranks, 2)
    assert told == "ranks 6 and 7 are on different hosts, or in different containers"
    assert "ranks 4 and 6" in shared_sum._refusal(offers(HERE, HERE, THERE, THERE), ranks, 4)


def test_the_first_rank_that_cannot_is_named_before_hosts_are_compared():
    told = offers(HERE, THERE, THERE)
    told[2]["why"] = "no compiler"
    assert shared_sum._refusal(told, (0, 1, 2), 3) == "no compiler (rank 2)"


@pytest.mark.parametrize("platform, size, told", [("darwin", 2, "darwin shares no memory"), ("linux", 32, "32 ranks")])
def test_a_rank_says_why_it_cannot(monkeypatch, platform, size, told):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(shared_sum, "compiled", lambda name: None)
    offer, fd = shared_sum._offer(size, makes=True, why_not=None)
    assert fd is None
    assert told in offer["why"]


def test_a_long_reason_is_cut_to_what_a_message_holds():
    found = open_shared_sum(SoloComm(), (0,), 1, lambda: 1.0, "\N{LEFT SINGLE QUOTATION MARK}" * 5000)
    assert found == "\N{LEFT SINGLE QUOTATION MARK}" * 200 + " (rank 0)"


def test_a_rank_in_a_sum_waits_for_others_as_in_a_collective():
    frames = []
    source = "def all_reduce(see):\n    see()\n"

    def see():
        frames.append(sys._getframe(1))

    for file, waits in ((shared_sum.__file__, True), (shared_sum.__file__ + ".py", False)):
        names = {}
        exec(compile(source, file, "exec"), names)
        names["all_reduce"](see)
        assert place_of(frames.pop(), is_async=False)[2] is waits


def test_a_sum_waits_as_long_as_its_group(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=datetime.timedelta(seconds=77))
    try:
        assert timeout_s(dist.group.WORLD) == 77
    finally:
        dist.destroy_process_group()
