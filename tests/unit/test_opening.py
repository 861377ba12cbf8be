"""An output is opened once, and nothing of an earlier run is touched before it is known that all ranks can go on."""

import socket
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cpinfer.comm.bootstrap import Launch
from cpinfer.errors import UserError
from cpinfer.layout.grid import RankGrid
from cpinfer_tools import opening
from cpinfer_tools.opening import Opening, is_writer, open_together
from cpinfer_tools.results.output import meta_path
from cpinfer_tools.results.output_lock import lock_path

MADE_OF = {"prompts": "sha256:1", "weights": "sha256:2"}


@dataclass(frozen=True)
class AJob:
    """What opening needs of a job."""

    output: Path
    existing: str = "overwrite"
    grid: RankGrid = field(default_factory=lambda: RankGrid(pcp_size=2, dcp_size=1, dp_size=2))
    meta: dict = field(default_factory=lambda: {"config": {}, "made_of": MADE_OF})
    dry_run: bool = False
    done: frozenset = frozenset()
    complaint: str | None = None

    def read_done(self):
        if self.complaint is not None:
            raise UserError(self.complaint)
        return frozenset({(0, 0)})


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "SEEN_WITHIN_S", 0.2)
    return tmp_path / "out.jsonl"


def test_one_rank_of_each_replica_writes():
    assert [is_writer(RankGrid(tp_size=2, pcp_size=2, dcp_size=2, dp_size=2), rank) for rank in range(8)] == (
        [True, False, False, False] * 2
    )


def test_an_output_is_locked_and_opened_with_what_is_done(path):
    path.write_text("old\n")
    with ExitStack() as stack:
        job, complaint = open_together(Launch(), AJob(path), stack)
        assert complaint is None and job.done == {(0, 0)}
        assert lock_path(path).exists() and meta_path(path).exists() and not path.exists()
    assert [p.name for p in path.parent.iterdir()] == ["out.jsonl.meta.json"]


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_complaint_leaves_everything_as_it_was(path, dry_run):
    path.write_text("old\n")
    with ExitStack() as stack:
        job = AJob(path, complaint="the prompts differ", dry_run=dry_run)
        assert open_together(Launch(), job, stack)[1] == "the prompts differ"
    assert path.read_text() == "old\n" and [p.name for p in path.parent.iterdir()] == ["out.jsonl"]


def test_a_dry_run_touches_nothing(path):
    path.write_text("old\n")
    with ExitStack() as stack:
        assert open_together(Launch(), AJob(path, dry_run=True), stack)[1] is None
        assert [p.name for p in path.parent.iterdir()] == ["out.jsonl"]
    assert path.read_text() == "old\n"


def test_an_output_that_came_into_being_since_it_was_checked_is_refused(path):
    path.write_text("another run's\n")
    with ExitStack() as stack:
        assert "exists. Continue it with --resume" in open_together(Launch(), AJob(path, "refuse"), stack)[1]
    assert path.read_text() == "another run's\n"


def doubt(path, rank, token="out.jsonl.12345678", made_of=MADE_OF, **job):
    told = Opening(None, "/there/out.jsonl on first", token, frozenset(), made_of)
    return opening._doubt(Launch(rank=rank, world_size=4), AJob(path, **job), told)


def test_a_writer_that_does_not_see_the_first_ranks_folder_says_both_places(path):
    said = doubt(path, rank=2)
    assert f"rank 2 writes {path}.dp1 on {socket.gethostname()}, and does not see" in said
    assert "beside /there/out.jsonl on first" in said and "a folder that all of them share" in said
    path.with_name("out.jsonl.12345678").touch()
    assert doubt(path, rank=2) is None


def test_a_rank_that_writes_nothing_need_not_see_the_output(tmp_path):
    assert doubt(tmp_path / "nowhere" / "out.jsonl", rank=3) is None


@pytest.mark.parametrize("rank", [1, 2])
def test_a_rank_that_runs_something_else_names_it(path, rank):
    path.with_name("out.jsonl.12345678").touch()
    said = doubt(path, rank, made_of={**MADE_OF, "weights": "sha256:3"})
    assert (
        f"rank {rank} on {socket.gethostname()} does not have rank 0's weights: sha256:2 there, sha256:3 on rank 0"
        in said
    )


def test_a_rank_with_another_sampling_names_the_key(path):
    path.with_name("out.jsonl.12345678").touch()
    said = doubt(
        path, 1, made_of={**MADE_OF, "sampling.seed": 1}, meta={"made_of": {**MADE_OF, "sampling": {"seed": 0}}}
    )
    assert "does not have rank 0's sampling.seed: 0 there, 1 on rank 0" in said


def test_a_writer_whose_part_cannot_be_written_says_so(path):
    path.with_name("out.jsonl.12345678").touch()
    path.with_name("out.jsonl.dp1").mkdir()
    assert "out.jsonl.dp1 is a folder; a file was wanted" in doubt(path, rank=2)
