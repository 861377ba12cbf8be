"""What is done already: only whole lines of the same run count, and what cannot be told from another run is refused."""

import json

import pytest

from cpinfer.config import SamplingParams
from cpinfer.engine.request import Prompt
from cpinfer.errors import OutputError, UserError
from cpinfer_tools.results.finished import (
    check_complete,
    content_hash,
    numbers_of,
    prompts_hash,
    read_finished,
    rollout_key,
    rollout_lines,
)
from cpinfer_tools.results.output import meta_path, part_path, write_json
from cpinfer_tools.run_config import RunConfig

PROMPTS = [Prompt(index, f"p{index}", (index, 7)) for index in range(6)]
EXPECTED = rollout_lines((prompt, 2) for prompt in PROMPTS)


def make_meta(prompts="sha256:1", weights="sha256:2", **config):
    return {"config": {}, "made_of": {**numbers_of(RunConfig(**config)), "prompts": prompts, "weights": weights}}


META = make_meta()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "out.jsonl"
    write_json(meta_path(path), META)
    return path


def line(index, sample=0, **changed):
    made = {"id": f"p{index}", "prompt_index": index, "sample_index": sample, "prompt_token_ids": [index, 7]}
    return json.dumps({**made, "token_ids": [3], **changed}) + "\n"


def finished(path, meta=META):
    return read_finished(path, meta, EXPECTED, rollout_key)


def test_what_is_done_is_found_in_all_parts(path):
    path.write_text(line(0) + line(0, 1))
    part_path(path, 1).write_text(line(1))
    part_path(path, 12).write_text(line(5, 1))
    assert finished(path) == {(0, 0), (0, 1), (1, 0), (5, 1)}


def test_nothing_is_done_where_nothing_was_run(path):
    assert finished(path) == frozenset()
    meta_path(path).unlink()
    assert finished(path) == frozenset()
    path.write_text("a line that a kill tore")
    assert finished(path) == frozenset()


def test_a_kill_at_any_byte_loses_one_line_at_most_and_reading_repairs_nothing(path):
    data = (line(0) + line(1) + line(2)).encode()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for size in (0, 1, ends[0] - 1, ends[0], ends[0] + 1, ends[1] + 40, ends[2] - 1, ends[2]):
        path.write_bytes(data[:size])
        assert finished(path) == {(i, 0) for i in range(sum(end <= size for end in ends))}
        assert path.read_bytes() == data[:size]


def test_a_sample_that_a_kill_left_in_a_part_and_in_the_file_is_done_once(path):
    path.write_text(line(0) + line(1))
    part_path(path, 1).write_text(line(1))
    assert finished(path) == {(0, 0), (1, 0)}
    part_path(path, 1).write_text(line(1, token_ids=[4]))
    with pytest.raises(UserError, match=r"out\.jsonl\.dp1 hold different lines for one sample, \(1, 0\)"):
        finished(path)


@pytest.mark.parametrize(
    "bad, words",
    [
        ("hello\n", "Expecting value"),
        ("\n", "Expecting value"),
        ("5\n", "found 5; an object was wanted"),
        ('{"prompt_index": 0}\n', '"sample_index" is missing'),
        (line("5"), '"prompt_index" is "5"; a whole number'),
        (line(-1), '"prompt_index" is -1; a whole number'),
        (line(5.7), r'"prompt_index" is 5\.7; a whole number'),
        (line(5.0), r'"prompt_index" is 5\.0; a whole number'),
        (line(True), '"prompt_index" is true; a whole number'),
        (line(1, None), '"sample_index" is null; a whole number'),
        (line(6), r"\(6, 0\) is no sample of this run"),
        (line(1, 2), r"\(1, 2\) is no sample of this run"),
        (line(1, id="p2"), '"id" is "p2"; "p1" was wanted'),
        (line(1, prompt_token_ids=[1, 8]), r'"prompt_token_ids" is \[1, 8\]'),
        (line(1, token_ids=[]), 'has no "token_ids"'),
        (line(0), r"the sample \(0, 0\) stands there a second time"),
    ],
)
def test_a_line_that_is_no_result_of_this_run_is_refused_with_its_number(path, bad, words):
    path.write_text(line(0) + bad + line(2))
    with pytest.raises(UserError, match=rf"output {path} holds lines that are not results \(line 2: .*{words}"):
        finished(path)


@pytest.mark.parametrize(
    "other, words",
    [
        (make_meta(prompts="sha256:3"), "the prompts differ from those that output .* was made of"),
        (make_meta(weights="sha256:3"), "the weights differ"),
        (make_meta(dtype="float32"), 'was made with dtype="bfloat16", this run has "float32"'),
        (make_meta(kv_cache_dtype="fp8"), "was made with kv_cache_dtype="),
        (make_meta(cp_wire_dtype="float32"), "was made with cp_wire_dtype="),
        (make_meta(sampling=SamplingParams(seed=1)), "was made with sampling.seed=0, this run has 1. Use the same"),
    ],
)
def test_results_of_another_run_are_not_mixed_in(path, other, words):
    path.write_text(line(0))
    with pytest.raises(UserError, match=words):
        finished(path, other)
    path.unlink()
    with pytest.raises(UserError, match=words):  # nothing is written yet, but the run was another
        finished(path, other)


def test_a_part_that_a_run_is_no_longer_made_of_is_a_difference(path):
    write_json(meta_path(path), {**META, "made_of": {**META["made_of"], "tokenizer_files": "sha256:4"}})
    with pytest.raises(UserError, match="the tokenizer files differ"):
        finished(path)


def test_paths_and_layouts_are_no_part_of_what_results_are_made_of(path):
    path.write_text(line(0))
    other = make_meta(model="/elsewhere/m", input="other.jsonl", prefill_context_parallel_size=2, max_num_seqs=3)
    assert finished(path, other) == {(0, 0)}


def test_the_wire_dtype_that_is_chosen_by_itself_is_the_one_that_is_named(path):
    path.write_text(line(0))
    assert finished(path, make_meta(cp_wire_dtype="bfloat16")) == {(0, 0)}


def test_lines_without_a_meta_file_are_not_continued(path):
    meta_path(path).unlink()
    path.write_text(line(0))
    with pytest.raises(UserError, match=r"has no out\.jsonl\.meta\.json beside it"):
        finished(path)


def test_a_meta_file_from_before_it_said_what_results_are_made_of_is_refused(path):
    path.write_text(line(0))
    write_json(meta_path(path), {"config": {"dtype": "bfloat16"}})
    with pytest.raises(UserError, match="of a version that did not write down what its results are made of"):
        finished(path)


@pytest.mark.parametrize("torn", ["", '{"config": {"mod', "[]", "{}"])
def test_a_meta_file_that_says_nothing_is_an_error_for_people(path, torn):
    """A kill may tear it, too: whoever resumes must be told in words, not by a traceback."""
    path.write_text(line(0))
    meta_path(path).write_text(torn)
    with pytest.raises(UserError, match="meta"):
        finished(path)


def test_a_file_is_complete_when_it_holds_each_sample_once(path):
    lines = [line(index, sample) for index in range(6) for sample in (1, 0)]
    path.write_text("".join(reversed(lines)))
    assert check_complete(path, EXPECTED, rollout_key) == 12
    path.write_text("".join(lines[:4] + lines[6:]))
    with pytest.raises(OutputError, match=rf"output {path} holds 10 of 12 samples; missing are \(2, 0\) and 1 more"):
        check_complete(path, EXPECTED, rollout_key)
    path.write_text("".join([*lines, lines[3]]))
    with pytest.raises(OutputError, match=r"does not hold what was generated: .* a second time"):
        check_complete(path, EXPECTED, rollout_key)
    path.unlink()
    with pytest.raises(OutputError, match="does not hold what was generated"):
        check_complete(path, EXPECTED, rollout_key)


def test_a_hash_of_contents_tells_order_and_every_token():
    assert content_hash([["a", (1, 2)]]) == content_hash([["a", [1, 2]]])
    others = [[["a", [1, 3]]], [["b", [1, 2]]], [["a", [1, 2]]] * 2, [], [["a", [2, 1]]]]
    assert len({content_hash(items) for items in [*others, [["a", [1, 2]]]]}) == 6


def test_each_prompt_has_as_many_lines_as_samples():
    assert list(rollout_lines([(PROMPTS[0], 1), (PROMPTS[3], 2)])) == [(0, 0), (3, 0), (3, 1)]


def test_prompts_are_others_where_they_say_other_sampling():
    """Those that say none have the hash they always had: what was written before can be continued."""
    plain, own, other = (Prompt(0, "p", (1,), sampling) for sampling in (None, (("n", 2),), (("n", 3),)))
    assert prompts_hash([plain]) == content_hash([[0, "p", (1,)]])
    assert len({prompts_hash([prompt]) for prompt in (plain, own, other)}) == 3
