"""Segments of shared memory: what one takes, and when there is none. What goes through them: tests/distributed."""

import datetime
import os
import sys

import pytest
import torch.distributed as dist

from cpinfer.comm import segments, shared_memory
from cpinfer.comm.axis import SoloComm
from cpinfer.comm.rank_watch import place_of, timeout_s
from cpinfer.comm.segments import SharingAxis, open_segments
from cpinfer.comm.shared_memory import MAX_BYTES, MAX_RANKS, chunk_bytes, segment_bytes

HERE, THERE = ["a boot", "pid:[1]"], ["another boot", "pid:[1]"]


def offers(*hosts, first=0):
    return {first + place: {"why": None, "host": host} for place, host in enumerate(hosts)}


def test_a_segment_is_never_more_than_it_may_be_and_holds_whole_pages():
    for num_ranks in range(2, MAX_RANKS + 1):
        assert segment_bytes(num_ranks) <= MAX_BYTES
        assert chunk_bytes(num_ranks) >= 4096
        assert chunk_bytes(num_ranks) % 4096 == 0


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
@pytest.mark.parametrize("namespace", ["pid", "net"])
def test_ranks_of_other_processes_or_another_network_are_on_another_host(namespace, monkeypatch):
    here, readlink = segments._host(), os.readlink
    monkeypatch.setattr(os, "readlink", lambda path: f"{readlink(path)}{'0' * str(path).endswith(namespace)}")
    assert segments._host() != here


def test_only_ranks_that_exchange_have_to_be_on_one_host():
    two_hosts = offers(HERE, HERE, THERE, THERE, first=4)
    assert segments._refusal(two_hosts, [(4, 5), (6, 7)]) is None
    assert "ranks 4 and 6" in segments._refusal(two_hosts, [(4, 6), (5, 7)])
    told = segments._refusal(offers(HERE, HERE, HERE, THERE, first=4), [(4, 5), (6, 7)])
    assert told == "ranks 6 and 7 are on different hosts, or in different containers"


def test_the_first_rank_that_cannot_is_named_before_hosts_are_compared():
    told = offers(HERE, THERE, THERE)
    told[2]["why"] = "no compiler"
    assert segments._refusal(told, [(0, 1, 2)]) == "no compiler (rank 2)"


@pytest.mark.parametrize("platform, size, told", [("darwin", 2, "darwin shares no memory"), ("linux", 32, "32 ranks")])
def test_a_rank_says_why_it_cannot(monkeypatch, platform, size, told):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(segments, "compiled", lambda name: None)
    segment = segments._Segment(SharingAxis([tuple(range(size))], lambda: 1.0), 0)
    assert told in segment.offer()["why"]
    segment.close()


def test_a_python_built_with_an_older_libc_has_segments_too(monkeypatch):
    monkeypatch.setattr(segments, "compiled", lambda name: None)
    monkeypatch.delattr(os, "memfd_create")
    segment = segments._Segment(SharingAxis([(0, 1)], lambda: 1.0), 0)
    offer = segment.offer()
    with open(offer["path"], "rb") as file:
        assert (file.seek(0, os.SEEK_END), os.get_inheritable(segment._fd)) == (segment_bytes(2), False)
    segment.close()
    assert not os.path.exists(offer["path"])


def test_a_machine_without_files_in_memory_says_so(monkeypatch):
    monkeypatch.setattr(segments, "compiled", lambda name: None)
    monkeypatch.setattr(segments.ctypes, "CDLL", lambda name, **options: object())
    segment = segments._Segment(SharingAxis([(0, 1)], lambda: 1.0), 0)
    assert segment.offer()["why"] == "the C library here has no memfd_create"


def test_long_reasons_are_cut_to_what_a_message_holds():
    axis = SharingAxis([(0,)], lambda: 1.0, "\N{LEFT SINGLE QUOTATION MARK}\0" * 5000)
    found = open_segments(SoloComm(), (0,), dict.fromkeys(("replica", "pcp", "dcp", "tp"), axis))
    assert found == dict.fromkeys(found, "\N{LEFT SINGLE QUOTATION MARK}\0" * 100 + " (rank 0)")
    assert len(found) == 4


def test_a_reason_may_name_a_folder_whose_name_is_no_text():
    found = open_segments(SoloComm(), (0,), {"tp": SharingAxis([(0,)], lambda: 1.0, os.fsdecode(b"no /\xff"))})
    assert found == {"tp": "no /? (rank 0)"}


def test_a_rank_in_a_collective_here_waits_for_others_as_in_any():
    frames = []
    source = "def all_gather(see):\n    see()\n"

    def see():
        frames.append(sys._getframe(1))

    for file, waits in ((shared_memory.__file__, True), (shared_memory.__file__ + ".py", False)):
        names = {}
        exec(compile(source, file, "exec"), names)
        names["all_gather"](see)
        assert place_of(frames.pop(), is_async=False)[2] is waits


def test_a_collective_here_waits_as_long_as_its_group(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=datetime.timedelta(seconds=77))
    try:
        assert timeout_s(dist.group.WORLD) == 77
    finally:
        dist.destroy_process_group()
