"""Results on disk: nothing is overwritten unasked, every line is there or its loss is said, parts become one file."""

import datetime
import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest

from cpinfer.engine.request import RolloutResult
from cpinfer.errors import OutputError, UserError
from cpinfer_tools.results.finished import rollout_key
from cpinfer_tools.results.output import (
    ResultWriter,
    check_output,
    default_output,
    join_parts,
    meta_path,
    open_output,
    part_path,
    part_paths,
    summary_path,
    write_json,
)


def result(prompt_index, sample_index=0, text="x"):
    return RolloutResult(
        id=str(prompt_index),
        prompt_index=prompt_index,
        sample_index=sample_index,
        prompt_token_ids=(1, 2),
        token_ids=(3,),
        text=text,
        logprobs=(-0.5,),
        processed_logprobs=(-0.25,),
        finish_reason="stop",
        ttft_s=0.1,
        tpot_s=None,
        weights_version=0,
    )


META = {"config": {}, "made_of": {}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl"


def write(path, *keys):
    with ResultWriter(path) as writer:
        for prompt_index, sample_index in keys:
            writer.write(result(prompt_index, sample_index))


def tear(path, text='{"id": "9", "prompt_in'):
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def keys_in(path):
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["prompt_index"], line["sample_index"]) for line in lines]


def test_a_line_is_a_result_with_its_own_keys(path):
    with ResultWriter(path) as writer:
        writer.write(result(3, 1, text="naïve\n🙂"))
        assert path.read_text(encoding="utf-8").endswith("}\n"), "each line is on disk as soon as it is written"
    (line,) = path.read_text(encoding="utf-8").splitlines()
    data = json.loads(line)
    assert list(data) == [
        "id",
        "prompt_index",
        "sample_index",
        "prompt_token_ids",
        "token_ids",
        "text",
        "logprobs",
        "processed_logprobs",
        "finish_reason",
        "ttft_s",
        "tpot_s",
        "weights_version",
    ]
    assert (data["text"], data["token_ids"], data["tpot_s"]) == ("naïve\n🙂", [3], None)


def test_a_writer_appends(path):
    write(path, (0, 0))
    write(path, (1, 0))
    assert keys_in(path) == [(0, 0), (1, 0)]


def test_an_output_that_exists_is_refused_and_left_alone(path):
    write(path, (0, 0))
    with pytest.raises(UserError, match=rf"output {path} exists\. .*--resume.*--overwrite"):
        check_output(path, "refuse")
    check_output(path, "resume")
    check_output(path, "overwrite")
    assert keys_in(path) == [(0, 0)]


def test_a_new_output_in_a_new_folder_is_fine_and_checking_makes_nothing(tmp_path):
    path = tmp_path / "a" / "b" / "out.jsonl"
    for existing in ("refuse", "resume", "overwrite"):
        check_output(path, existing)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_output(tmp_path):
    for existing in ("refuse", "resume", "overwrite"):
        with pytest.raises(UserError, match="is a folder; a file was wanted"):
            check_output(tmp_path, existing)
        with pytest.raises(UserError, match="is a folder; a file was wanted"):
            check_output(Path("."), existing)


def test_an_output_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        check_output(tmp_path / "file" / "out.jsonl", "refuse")


def test_an_output_without_write_access_is_refused_with_the_place(tmp_path, path, monkeypatch):
    """By a stand-in for the system's answer: the superuser may write everywhere."""
    asked = []
    monkeypatch.setattr(os, "access", lambda where, mode: asked.append((where, mode)))
    with pytest.raises(UserError, match=f"cannot be written: no write access to {tmp_path}"):
        check_output(tmp_path / "new" / "out.jsonl", "refuse")
    write(path, (0, 0))
    with pytest.raises(UserError, match=f"no write access to {path}"):
        check_output(path, "resume")
    assert asked == [(tmp_path, os.W_OK), (path, os.W_OK)]


def test_opening_makes_the_folder_and_the_meta_file(tmp_path):
    path = tmp_path / "a" / "out.jsonl"
    open_output(path, "refuse", META)
    assert json.loads(meta_path(path).read_text(encoding="utf-8")) == META
    assert not path.exists()


def test_overwriting_leaves_nothing_of_the_run_before(path, tmp_path):
    write(path, (0, 0))
    write(part_path(path, 1), (1, 0))
    write_json(summary_path(path), {"old": True})
    bystander = tmp_path / "out.jsonl.backup"
    bystander.write_text("keep")
    open_output(path, "overwrite", META)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl.backup", "out.jsonl.meta.json"]


def test_a_torn_last_line_is_cut_when_a_run_is_continued(path):
    open_output(path, "refuse", META)
    for part in (path, part_path(path, 1)):
        write(part, (int(part != path), 0))
        tear(part)
    open_output(path, "resume", META)
    write(path, (5, 0))
    write(part_path(path, 1), (6, 0))
    assert keys_in(path) == [(0, 0), (5, 0)]
    assert keys_in(part_path(path, 1)) == [(1, 0), (6, 0)]


def test_parts_are_joined_and_removed(path):
    write(path, (0, 0))
    write(part_path(path, 2), (2, 0))
    write(part_path(path, 1), (1, 0))
    join_parts(path, rollout_key)
    assert sorted(keys_in(path)) == [(0, 0), (1, 0), (2, 0)] and len(keys_in(path)) == 3
    assert part_paths(path) == []
    join_parts(path, rollout_key)  # again is harmless
    assert len(keys_in(path)) == 3


def test_parts_are_joined_where_replica_0_wrote_nothing(path):
    write(part_path(path, 1), (1, 0))
    join_parts(path, rollout_key)
    assert keys_in(path) == [(1, 0)]


def test_a_kill_while_parts_are_joined_doubles_nothing(path):
    """The part is in the results file already, and was about to be removed."""
    open_output(path, "refuse", META)
    write(path, (0, 0), (1, 0))
    write(part_path(path, 1), (1, 0))
    open_output(path, "resume", META)
    join_parts(path, rollout_key)
    assert sorted(keys_in(path)) == [(0, 0), (1, 0)]


def test_only_parts_of_this_output_are_taken_for_parts(path, tmp_path):
    for name in ("out.jsonl.dp1", "out.jsonl.dp12", "out.jsonl.dpx", "out.jsonl.dp", "other.jsonl.dp1"):
        (tmp_path / name).write_text("")
    assert [p.name for p in part_paths(path)] == ["out.jsonl.dp1", "out.jsonl.dp12"]
    assert part_path(path, 0) == path and part_path(path, 12) == tmp_path / "out.jsonl.dp12"


def test_a_run_without_a_named_output_gets_a_folder_named_after_config_and_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    now = datetime.datetime(2025, 3, 4, 5, 6, 7, tzinfo=datetime.UTC)
    path = default_output("configs/pcp2.json", now)
    assert str(path) == "runs/pcp2-20250304-050607/results.jsonl"
    path.parent.mkdir(parents=True)
    assert default_output("configs/pcp2.json", now).parent != path.parent
    for name in ("x" * 250, "é" * 120):
        check_output(default_output(f"{name}.json", now), "refuse")


def test_parts_of_a_run_whose_first_replica_wrote_nothing_are_not_mixed_with_another(path):
    write(part_path(path, 1), (1, 0))
    with pytest.raises(UserError, match=r"its part out\.jsonl\.dp1 exists\. .*--resume.*--overwrite"):
        check_output(path, "refuse")
    part_path(path, 1).write_text("")
    check_output(path, "refuse")


def test_a_name_may_hold_what_a_pattern_means_by_it(tmp_path):
    path = tmp_path / "a[1]*.jsonl"
    write(part_path(path, 1), (1, 0))
    assert part_paths(path) == [part_path(path, 1)]


def test_a_summary_never_speaks_of_a_run_that_goes_on(path):
    write(path, (0, 0))
    write_json(summary_path(path), {"num_samples": 1})
    open_output(path, "resume", META)
    assert not summary_path(path).exists() and keys_in(path) == [(0, 0)]


@pytest.mark.parametrize("name", ["x" * 250 + ".jsonl", "x" * 245, "x" * 300 + "/out.jsonl", "zero\0byte", "d/" * 3000])
def test_a_name_that_no_file_can_have_is_refused_with_all_that_stands_beside_it(tmp_path, name):
    with pytest.raises(UserError, match=r"output .*(Use a shorter one|zero byte|File name too long)"):
        check_output(tmp_path / name, "refuse")


def test_the_longest_name_that_is_accepted_can_be_written_with_all_its_files(tmp_path):
    lengths = [n for n in range(200, 260) if not refused(tmp_path / ("x" * n))]
    path = tmp_path / ("x" * max(lengths))
    open_output(path, "refuse", META)
    write(path, (0, 0))
    write(part_path(path, 127), (1, 0))
    join_parts(path, rollout_key)
    write_json(summary_path(path), {})
    assert keys_in(path) == [(0, 0), (1, 0)]


def refused(path):
    try:
        check_output(path, "refuse")
    except UserError:
        return True
    return False


@pytest.mark.parametrize("existing", ["resume", "overwrite"])
def test_a_device_is_no_output(existing):
    with pytest.raises(UserError, match="output /dev/null is a device or a pipe; a file was wanted"):
        check_output(Path("/dev/null"), existing)


@pytest.fixture
def little_room(path):
    """A limit of the system on the size of files, as a full disk: a write that passes it is cut off, the next fails."""
    write(path, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 40, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("little_room")
def test_a_line_that_finds_no_room_ends_the_run_at_once_and_leaves_whole_lines(path):
    with pytest.raises(OutputError, match=rf"output {path}: a line could not be written .* 0 line\(s\) .* are safe"):
        write(path, (1, 0), (2, 0))
    assert keys_in(path) == [(0, 0)] and path.read_bytes().endswith(b"\n")


@pytest.mark.usefixtures("little_room")
def test_a_summary_that_finds_no_room_is_an_error_and_leaves_no_half_of_it(path, tmp_path):
    with pytest.raises(OutputError, match=r"summary\.json could not be written: File too large"):
        write_json(summary_path(path), {"text": "x" * 4096})
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.usefixtures("little_room")
def test_parts_that_find_no_room_stay_and_are_joined_later(path):
    part = part_path(path, 1)
    part.write_bytes(path.read_bytes().replace(b'"prompt_index": 0', b'"prompt_index": 1'))
    with pytest.raises(OutputError, match=r"parts of the replicas could not be joined .*--resume joins them"):
        join_parts(path, rollout_key)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    open_output(path, "resume", META)
    join_parts(path, rollout_key)
    assert keys_in(path) == [(0, 0), (1, 0)]


def test_a_disk_that_is_full_only_when_it_is_asked_to_keep_the_lines_is_heard(path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = ResultWriter(path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="may not have reached the disk"), writer:
        writer.write(result(0))
    with pytest.raises(OutputError, match="may not have reached the disk"), ResultWriter(path):
        pass  # the first has closed the file all the same


@pytest.mark.parametrize("how", ["folder removed", "folder renamed", "file replaced"])
def test_a_file_that_is_no_longer_there_ends_the_run_with_the_next_line(tmp_path, how):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "out.jsonl"
    with pytest.raises(OutputError, match="was removed or replaced while it was written"), ResultWriter(path) as writer:
        writer.write(result(0))
        if how == "folder removed":
            shutil.rmtree(folder)
        elif how == "folder renamed":
            folder.rename(tmp_path / "other")
        else:
            path.unlink()
            path.write_text("")
        writer.write(result(1))


def test_a_file_has_one_writer_at_a_time(path):
    with ResultWriter(path) as writer, pytest.raises(OutputError, match="is being written by another run"):
        inherited = os.dup(writer._descriptor)  # as a child that was forked has it
        ResultWriter(path)
    write(path, (0, 0))
    os.close(inherited)


@pytest.mark.parametrize("existing", ["resume", "overwrite"])
def test_an_output_whose_part_is_still_written_is_not_opened(path, existing):
    """By a rank of a run whose first rank was killed."""
    write(path, (0, 0))
    with ResultWriter(part_path(path, 1)), pytest.raises(UserError, match=r"dp1 is being written by another run"):
        open_output(path, existing, META)
    assert keys_in(path) == [(0, 0)]


def test_text_that_no_file_can_hold_is_written_as_json_spells_it(path):
    with ResultWriter(path) as writer:
        writer.write_line({"id": "\ud83d"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"id": "\ud83d"}
