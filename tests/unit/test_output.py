"""Results on disk: nothing is overwritten unasked, a kill at any moment loses one line at most, runs do not mix."""

import datetime
import json
import os

import pytest

from cpinfer.config import Config, SamplingParams, config_to_dict
from cpinfer.engine.output import (
    ResultWriter,
    check_output,
    default_output,
    join_parts,
    meta_path,
    open_output,
    part_path,
    part_paths,
    read_finished,
    summary_path,
    write_json,
)
from cpinfer.engine.request import RolloutResult
from cpinfer.errors import UserError


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


def make_meta(**config):
    return {"config": config_to_dict(Config(**config)), "versions": {}}


META = make_meta(model="m")


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


def test_resuming_finds_what_is_done_in_all_parts(path):
    open_output(path, "refuse", META)
    write(path, (0, 0), (0, 1))
    write(part_path(path, 1), (1, 0))
    write(part_path(path, 12), (2, 5))
    assert read_finished(path, META) == {(0, 0), (0, 1), (1, 0), (2, 5)}


def test_nothing_is_done_where_nothing_was_run(path):
    assert read_finished(path, META) == frozenset()
    open_output(path, "resume", META)
    assert read_finished(path, META) == frozenset()


def test_a_torn_last_line_counts_as_not_done_and_is_cut_only_when_opened(path):
    open_output(path, "refuse", META)
    for part in (path, part_path(path, 1)):
        write(part, (part != path, 0))
        tear(part)
    before = path.read_bytes()
    assert read_finished(path, META) == {(0, 0), (1, 0)}
    assert path.read_bytes() == before, "reading repairs nothing"
    open_output(path, "resume", META)
    write(path, (5, 0))
    write(part_path(path, 1), (6, 0))
    assert keys_in(path) == [(0, 0), (5, 0)]
    assert keys_in(part_path(path, 1)) == [(1, 0), (6, 0)]


def test_a_kill_at_any_byte_loses_one_line_at_most(path):
    open_output(path, "refuse", META)
    write(path, (0, 0), (1, 0), (2, 0))
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for size in (0, 1, ends[0] - 1, ends[0], ends[0] + 1, ends[1] + 40, ends[2] - 1, ends[2]):
        path.write_bytes(data[:size])
        whole = sum(end <= size for end in ends)
        assert read_finished(path, META) == {(i, 0) for i in range(whole)}


@pytest.mark.parametrize("line", ["hello", "[1, 2]", '{"a": 1}', '{"prompt_index": 0}', "5"])
def test_lines_that_are_not_results_are_refused(path, line):
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"output {path} holds lines that are not results"):
        read_finished(path, META)


@pytest.mark.parametrize(
    "key, other",
    [
        ("model", make_meta(model="other")),
        ("dtype", make_meta(model="m", dtype="float32")),
        ("input", make_meta(model="m", input="other.jsonl")),
        ("kv_cache_dtype", make_meta(model="m", kv_cache_dtype="fp8")),
        ("sampling", make_meta(model="m", sampling=SamplingParams(seed=1))),
    ],
)
def test_results_of_another_run_are_not_mixed_in(path, key, other):
    open_output(path, "refuse", META)
    write(path, (0, 0))
    with pytest.raises(UserError, match=rf"output {path} was made with {key}="):
        read_finished(path, other)


def test_a_run_from_before_there_was_a_dtype_of_the_cache_can_be_continued(path):
    before = {**META, "config": {k: v for k, v in META["config"].items() if k != "kv_cache_dtype"}}
    open_output(path, "refuse", before)
    write(path, (0, 0))
    assert read_finished(path, META) == {(0, 0)}


def test_another_layout_may_continue_a_run(path):
    open_output(path, "refuse", META)
    write(path, (0, 0))
    other = make_meta(model="m", prefill_context_parallel_size=2, max_num_seqs=3)
    assert read_finished(path, other) == {(0, 0)}


@pytest.mark.parametrize("torn", ["", '{"config": {"mod', "[]", "{}"])
def test_a_meta_file_that_says_nothing_is_an_error_for_people(path, torn):
    """A kill may tear it, too: whoever resumes must be told in words, not by a traceback."""
    write(path, (0, 0))
    meta_path(path).write_text(torn, encoding="utf-8")
    with pytest.raises(UserError, match="meta"):
        read_finished(path, META)


def test_parts_are_joined_and_removed(path):
    write(path, (0, 0))
    write(part_path(path, 2), (2, 0))
    write(part_path(path, 1), (1, 0))
    join_parts(path)
    assert sorted(keys_in(path)) == [(0, 0), (1, 0), (2, 0)] and len(keys_in(path)) == 3
    assert part_paths(path) == []
    join_parts(path)  # again is harmless
    assert len(keys_in(path)) == 3


def test_parts_are_joined_where_replica_0_wrote_nothing(path):
    write(part_path(path, 1), (1, 0))
    join_parts(path)
    assert keys_in(path) == [(1, 0)]


def test_a_kill_while_parts_are_joined_doubles_nothing(path):
    """The part is in the results file already, and was about to be removed."""
    open_output(path, "refuse", META)
    write(path, (0, 0), (1, 0))
    write(part_path(path, 1), (1, 0))
    open_output(path, "resume", META)
    join_parts(path)
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
