"""The evaluation tools as a user meets them: one process, the shipped models, tasks in and files out.

Everything that is wrong with config or input is found before a model is loaded, ends with 2 and says one thing clearly.
"""

import json
from pathlib import Path

import pytest

import tool_folder
from cpinfer_tools.evaluation import eval_longctx
from cpinfer_tools.verify import reference_eval
from tool_folder import ToolFolder, summary_of

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "configs" / "recall-tiny"
LINE_KEYS = [
    "task",
    "length",
    "sample_index",
    "seed",
    "depth",
    "prompt_num_tokens",
    "references",
    "prediction",
    "token_ids",
    "logprobs",
    "metric",
    "score",
    "finish_reason",
    "ttft_s",
    "tpot_s",
]
SUMMARY_KEYS = {
    "tasks",
    "num_samples",
    "num_generated_tokens",
    "wall_s",
    "load_s",
    "tokens_per_s",
    "ttft_s_p50",
    "tpot_s_p50",
    "kv_capacity_tokens",
    "peak_memory_bytes_per_rank",
    "layout",
    "output",
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


class Folder(ToolFolder):
    """Of the evaluation, whose own keys a test may change one by one too."""

    def run(self, *argv, evaluation=None, **config):
        return super().run(*argv, evaluation={**self.data["evaluation"], **(evaluation or {})}, **config)


@pytest.fixture
def folder(tmp_path, capsys):
    data = {
        "model": str(MODEL),
        "dtype": "float32",
        "kv_cache_gib": 0.01,
        "evaluation": {"tasks": ["recall_single"], "lengths": [64, 96], "num_samples": 3},
    }
    return Folder(tmp_path, capsys, eval_longctx, data)


@pytest.fixture
def no_loading(monkeypatch):
    def load_model(*args, **kwargs):
        raise AssertionError("a model is being loaded")

    monkeypatch.setattr(eval_longctx, "launch_inference", load_model)
    monkeypatch.setattr(reference_eval, "load_model", load_model)


def keys(lines):
    return sorted((line["task"], line["length"], line["sample_index"], line["seed"]) for line in lines)


def tokens(lines):
    return {key: line["token_ids"] for key, line in zip(keys(lines), sorted(lines, key=_key), strict=True)}


def _key(line):
    return line["task"], line["length"], line["sample_index"], line["seed"]


def test_a_run_writes_a_line_per_sample_and_sums_them_up(folder):
    code, out, err = folder.run()
    assert code == 0, err
    lines = folder.lines()
    assert keys(lines) == [("recall_single", length, index, 0) for length in (64, 96) for index in range(3)]
    for line in lines:
        assert list(line) == LINE_KEYS
        assert line["prompt_num_tokens"] + 4 == line["length"]
        assert line["depth"] == (0.0, 0.25, 0.5)[line["sample_index"]]
        assert line["score"] == 1.0 and line["references"][0] in line["prediction"]
        assert len(line["token_ids"]) == len(line["logprobs"]) and line["finish_reason"] == "stop"
    summary = summary_of(out)
    assert set(summary) >= SUMMARY_KEYS
    assert json.loads((folder.path / "out.jsonl.summary.json").read_text()) == summary
    task = summary["tasks"]["recall_single"]
    assert (task["metric"], task["score"], task["stderr_over_seeds"]) == ("string_match_all", 1.0, None)
    assert task["by_length"] == {n: {"score": 1.0, "num_samples": 3} for n in ("64", "96")}
    assert task["by_depth"] == {d: {"score": 1.0, "num_samples": 2} for d in ("0.0", "0.25", "0.5")}
    assert summary["num_samples"] == 6 and summary["num_generated_tokens"] == 18
    assert summary["peak_memory_bytes_per_rank"] > 10**8
    meta = folder.meta()
    assert meta["evaluation"]["tasks"] == ["recall_single"] and meta["config"]["sampling"]["temperature"] == 0
    assert "recall_single  string_match_all  1.000" in err


def test_flags_win_over_the_config(folder):
    code, _out, err = folder.run(
        "--tasks", "recall_multikey", "--lengths", "1k", "--num-samples", "2", "--depths", "0.5", "1", "--seeds", "3"
    )
    assert code == 0, err
    assert keys(folder.lines()) == [("recall_multikey", 1024, index, 3) for index in range(2)]
    assert [line["depth"] for line in sorted(folder.lines(), key=_key)] == [0.5, 1.0]


def test_seeds_are_runs_of_their_own_when_sampling(folder):
    """A template that the model cannot follow: what it samples is noise, and differs with the seed."""
    question = folder.file(
        "mine.jsonl", {"prompt": "It was", "references": ["river"]}, {"prompt": "The", "references": ["a"]}
    )
    sampling = {"temperature": 5.0, "max_new_tokens": 4, "ignore_eos": True}
    evaluation = {"tasks": [], "task_file": question, "seeds": [0, 1, 2], "num_samples": None}
    code, out, err = folder.run(evaluation=evaluation, sampling=sampling)
    assert code == 0, err
    lines = folder.lines()
    assert keys(lines) == [("mine", 0, index, seed) for index in range(2) for seed in range(3)]
    assert len({tuple(line["token_ids"]) for line in lines if line["sample_index"] == 0}) == 3
    assert summary_of(out)["tasks"]["mine"]["stderr_over_seeds"] is not None
    code, _, _ = folder.run("--overwrite", evaluation={**evaluation, "seeds": [2]}, sampling=sampling)
    alone = tokens(folder.lines())
    assert all(tokens(lines)[key] == found for key, found in alone.items())


def test_gsm8k_has_a_row_for_each_of_its_metrics(folder):
    name = folder.file("mine.jsonl", *({"question": f"{i}?", "answer": f"#### {i}"} for i in range(3)))
    code, out, err = folder.run(
        "--task-file", str(folder.path / name), "--num-shots", "1", sampling={"max_new_tokens": 4}
    )
    assert code == 0, err
    lines = folder.lines()
    assert len(lines) == 2 and lines[0]["metric"] == "exact_match_flexible"
    assert lines[0]["scores"].keys() == {"exact_match_flexible", "exact_match_strict"}
    assert summary_of(out)["tasks"].keys() == {"mine", "mine/exact_match_strict"}


def test_a_resumed_run_asks_exactly_what_is_missing(folder):
    assert folder.run()[0] == 0
    undisturbed = folder.lines()
    whole = folder.output.read_bytes().splitlines(keepends=True)
    kept = b"".join(whole[:2])
    folder.output.write_bytes(kept + whole[2][:30])
    code, out, err = folder.run("--resume")
    assert code == 0, err
    assert folder.output.read_bytes().startswith(kept)
    assert keys(folder.lines()) == keys(undisturbed) and tokens(folder.lines()) == tokens(undisturbed)
    summary = summary_of(out)
    assert (summary["num_samples"], summary["num_samples_resumed"], summary["num_generated_tokens"]) == (6, 2, 12)
    code, out, _ = folder.run("--resume")  # nothing is missing now
    assert code == 0 and summary_of(out)["num_generated_tokens"] == 0
    assert keys(folder.lines()) == keys(undisturbed)


def test_questions_that_changed_under_the_same_file_name_are_not_continued(folder):
    questions = [{"prompt": "It was", "references": ["river"]}, {"prompt": "The", "references": ["a"]}]
    folder.file("mine.jsonl", *questions)
    evaluation = {"tasks": [], "task_file": "mine.jsonl", "num_samples": None}
    assert folder.run(evaluation=evaluation, sampling={"max_new_tokens": 2})[0] == 0
    before = folder.output.read_bytes()
    for name, value in (("prompt", "Was it"), ("references", ["sea"])):
        folder.file("mine.jsonl", {**questions[0], name: value}, questions[1])
        outcome = folder.run("--resume", evaluation=evaluation, sampling={"max_new_tokens": 2})
        assert_refused(outcome, "the prompts differ from those that output")
    assert folder.output.read_bytes() == before
    (folder.path / "mine.jsonl").unlink()
    folder.path.joinpath("elsewhere").mkdir()
    folder.file("elsewhere/mine.jsonl", *questions)
    moved = {**evaluation, "task_file": "elsewhere/mine.jsonl"}
    code, out, err = folder.run("--resume", evaluation=moved, sampling={"max_new_tokens": 2})
    assert code == 0 and summary_of(out)["num_samples_resumed"] == 2, err


@pytest.mark.parametrize("tool", [eval_longctx, reference_eval], ids=lambda tool: tool.__name__)
def test_an_answer_that_is_not_in_the_file_ends_the_evaluation_without_scores(folder, monkeypatch, tool):
    def lose_a_line(path, *given):
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))

    monkeypatch.setattr(eval_longctx, "join_parts", lose_a_line)
    code, out, err = folder.run(tool=tool)
    assert (code, out) == (1, "") and "out.jsonl holds 5 of 6 samples" in err and "string_match_all" not in err
    assert "Traceback" not in err and not (folder.path / "out.jsonl.summary.json").exists()


def test_a_dry_run_loads_and_writes_nothing(folder, no_loading):
    code, out, _ = folder.run("--dry-run")
    assert code == 0 and summary_of(out)["num_samples"] == 6
    assert [path.name for path in folder.path.iterdir()] == ["run.json"]


def test_the_reference_gives_the_same_tokens_scores_and_logprobs(folder):
    other = folder.path / "reference.jsonl"
    assert folder.run()[0] == 0
    code, out, err = folder.run("--output", str(other), tool=reference_eval, prefill_context_parallel_size=2)
    assert code == 0, err
    ours, theirs = folder.lines(), folder.lines(other)
    assert keys(ours) == keys(theirs) and tokens(ours) == tokens(theirs)
    for a, b in zip(sorted(ours, key=_key), sorted(theirs, key=_key), strict=True):
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4)
        assert {key: a[key] for key in LINE_KEYS[:8]} == {key: b[key] for key in LINE_KEYS[:8]}
    assert set(summary_of(out)) >= SUMMARY_KEYS
    assert summary_of(out)["layout"] == {"tp": 1, "pcp": 1, "dcp": 1, "dp": 1, "world_size": 1}


@pytest.mark.parametrize(
    "sampling",
    [
        {"stop": [";"]},  # a special token
        {"ignore_eos": True, "min_new_tokens": 3, "stop": [" the", ";"]},
        {"repetition_penalty": 1.3, "logit_bias": {"26": -50.0}},
        {"stop_token_ids": [419, 422, 424], "min_new_tokens": 1},
    ],
    ids=str,
)
def test_the_reference_knows_how_answers_end_and_what_is_done_to_logits(folder, sampling):
    other = folder.path / "reference.jsonl"
    asked = {"sampling": sampling, "evaluation": {"lengths": [64]}}
    assert folder.run(**asked)[0] == 0
    code, _, err = folder.run("--output", str(other), tool=reference_eval, **asked)
    assert code == 0, err
    ours, theirs = (sorted(lines, key=_key) for lines in (folder.lines(), folder.lines(other)))
    named = ("token_ids", "prediction", "finish_reason", "score")
    assert [[line[key] for key in named] for line in ours] == [[line[key] for key in named] for line in theirs]
    assert folder.run(**{**asked, "sampling": None, "output": "plain.jsonl"})[0] == 0
    plain = sorted(folder.lines(folder.path / "plain.jsonl"), key=_key)
    assert [line["token_ids"] for line in plain] != [line["token_ids"] for line in ours] or sampling == {"stop": [";"]}


def assert_refused(outcome, *words, tool="eval_longctx"):
    tool_folder.assert_refused(outcome, *words, tool=tool)


@pytest.mark.parametrize(
    "argv, config, words",
    [
        (["--tasks", "recall_singel"], {}, ['unknown task "recall_singel"; the nearest is "recall_single"']),
        (["--lengths", "4kb"], {}, ['unknown length "4kb"', "such as 12000, 12k"]),
        (
            ["--lengths", "128k"],
            {},
            ["length 131072 is more than the model's 32768 positions", "Ask for fewer tokens"],
        ),
        (
            ["--lengths", "8"],
            {},
            ["task recall_single at length 8", "the template alone has 10", "at least 6 tokens greater"],
        ),
        (["--tasks", "cwe", "--lengths", "4k"], {}, ["task cwe at length 4096", "the template alone has"]),
        (["--num-samples", "0"], {}, ['"num_samples" is 0; it must be at least 1']),
        (["--depths", "1.5"], {}, ['"depths[0]" is 1.5; it must be', "at most 1."]),
        (["--depths", "deep"], {}, ["invalid float value"]),
        (["--seeds", "1", "1"], {}, ['"seeds" is [1, 1]; it must be free of repetitions']),
        (["--tasks", "vt", "--task-file", "x"], {}, ["not allowed with argument"]),
        (["--task-file", "nowhere.jsonl"], {}, ["task file nowhere.jsonl: No such file"]),
        (["--lengths", "16k"], {}, ["recall_single, sample 0: the prompt has 16380 tokens", "Raise kv_cache_gib"]),
        ([], {"evaluation": {"taks": ["vt"]}}, ['unknown key "evaluation.taks"', '"evaluation.tasks"']),
        ([], {"evaluation": {"task_file": "x"}}, ['"task_file" is "x"; it must be left out where `tasks` are named']),
        ([], {"sampling": {"n": 2}}, ['"sampling.n" is 2', '"seeds"']),
        ([], {"model": None}, ['"model" is missing']),
        ([], {"prefill_context_parallel_size": 2}, ["1 process(es) were started", "accelerate launch"]),
        ([], {"output": "."}, ["is a folder; a file was wanted"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_run_is_refused_before_loading(folder, no_loading, argv, config, words):
    assert_refused(folder.run(*argv, **config), *words)
    assert not folder.output.exists()


def test_lengths_go_as_far_as_max_model_len(folder, no_loading):
    """The pool is what ends them then."""
    longer = {"max_model_len": 131072, "kv_cache_gib": 0.01}
    assert_refused(folder.run("--lengths", "128k", **longer), "the prompt has 131068 tokens", "Raise kv_cache_gib")
    shorter = folder.run("--lengths", "96", max_model_len=95)
    assert_refused(shorter, "length 96 is more than the model's 95 positions", "or raise max_model_len")


def test_another_evaluation_is_not_continued(folder, no_loading):
    (folder.path / "out.jsonl").write_text("")
    meta = {"config": {}, "made_of": {"dtype": "float32", "kv_cache_dtype": "auto", "cp_wire_dtype": "float32"}}
    (folder.path / "out.jsonl.meta.json").write_text(json.dumps(meta))
    assert_refused(folder.run("--resume"), "was made with sampling.temperature=null, this run has 0")
    assert_refused(folder.run(), "exists. Continue it with --resume, or replace it with --overwrite")


def test_the_reference_refuses_what_it_cannot_repeat(folder, no_loading):
    sampled = folder.run(tool=reference_eval, sampling={"temperature": 1})
    assert_refused(sampled, "the reference is greedy", tool="reference_eval")


def test_the_blunt_model_is_recall_tiny_with_another_sharpness():
    """It shares everything but the gains of layer 1's match, so that tasks and tokens are the same."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        blunt = ROOT / "configs" / "recall-blunt" / name
        assert blunt.read_bytes() == (MODEL / name).read_bytes()


def test_the_blunt_models_accuracy_falls_over_length():
    report = json.loads((ROOT / "configs" / "recall-blunt" / "accuracy.json").read_text())
    measured = [row["accuracy"] for row in report["by_length_tokens"].values()]
    assert measured == sorted(measured, reverse=True)
    assert measured[0] == 1.0 and measured[-1] < 0.5
