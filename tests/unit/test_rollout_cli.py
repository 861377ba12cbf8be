"""The rollout tool as a user meets it: one process, the shipped tiny model, files in and files out.

Everything that is wrong with config or input is found before a model is loaded, ends with 2 and says one thing clearly.
"""

import copy
import datetime
import errno
import json
import os
import shutil
import types
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import tool_folder
from cpinfer.layout.grid import RankGrid
from cpinfer.ops.cpu_kernels.compiling import compiled
from cpinfer_tools import job, opening, rollout
from cpinfer_tools.results import output as output_module
from cpinfer_tools.results.output_lock import locked
from routers import experts_of
from tiny_models import FAMILIES, make_model, prompts_of
from tool_folder import ToolFolder, summary_of

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "configs" / "recall-tiny"
PROMPTS = [{"prompt": "The door waited."}, {"prompt_token_ids": [70, 71, 72], "id": "mine"}, {"prompt": "It was"}]
OWN_EXPERTS = {"routed_experts": True}
RESULT_KEYS = [
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


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path, capsys):
    data = {
        "model": str(MODEL),
        "dtype": "float32",
        "kv_cache_gib": 0.01,
        "max_num_batched_tokens": 10**6,
        "input": "in.jsonl",
        "sampling": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
    }
    folder = ToolFolder(tmp_path, capsys, rollout, data)
    folder.file("in.jsonl", *PROMPTS)
    return folder


@pytest.fixture
def no_loading(monkeypatch):
    def launch_inference(*args, **kwargs):
        raise AssertionError("a model is being loaded")

    monkeypatch.setattr(rollout, "launch_inference", launch_inference)


def assert_refused(outcome, *words):
    tool_folder.assert_refused(outcome, *words, tool="rollout")


SAMPLING = {"temperature": 0, "max_new_tokens": 4}


@pytest.mark.parametrize(
    "config, words",
    [
        ({"modle": "m"}, ["run.json", 'unknown key "modle"', 'nearest known key is "model"']),
        ({"sampling": {"temprature": 0}}, ['"sampling.temprature"', '"sampling.temperature"']),
        ({"block_size": "16"}, ["run.json", '"block_size" is "16"; a whole number was wanted']),
        ({"sampling": {"stop": 5}}, ['"sampling.stop" is 5; a list']),
        ({"max_num_seqs": 0}, ['"max_num_seqs" is 0; it must be at least 1']),
        ({"sampling": {"logit_bias": {"768": 1}}}, ["run.json", '"logit_bias" has token id 768', "768 tokens"]),
        ({"sampling": {"stop_token_ids": [768]}}, ["run.json", '"stop_token_ids" has token id 768']),
        (
            {"tensor_parallel": {"tp_size": 2}},
            ["1 process(es) were started", "a multiple of 2", "deepspeed --num_gpus 2", "torchrun"],
        ),
        ({"prefill_context_parallel_size": 2}, ["1 process(es) were started", "a multiple of 2"]),
        ({"data_parallel_size": 4}, ["1 process(es) were started", "needs 4 "]),
        ({"decode_context_parallel_size": 3}, ["run.json", "dcp=3 does not fit tp=1, pcp=1", "Use one of 1."]),
        ({"tensor_parallel": {"tp_size": 3}}, ["8 query heads do not divide over tp=3", "Use a divisor of 8"]),
        ({"tensor_parallel": {"tp_size": 16}}, ["8 query heads do not divide over tp=16"]),
        (
            {"tensor_parallel": {"tp_size": 2}, "decode_context_parallel_size": 2, "decode_exchange": "replicate_q"},
            ["tp=2 pcp=1 dcp=2", '"replicate_q" where dcp > pcp', 'Use "a2a", or a dcp of at most pcp.'],
        ),
        (
            {"tensor_parallel": {"tp_size": 2}, "decode_context_parallel_size": 4},
            ["dcp=4 does not fit tp=2, pcp=1", "Use one of 1, 2."],
        ),
        (
            {"tensor_parallel": {"tp_size": 4, "provider": "transformers"}},
            ["tp=4 over 2 KV heads", "more ranks than KV heads", '"autotp"'],
        ),
        (
            {"backend": "flashinfer", "dtype": "bfloat16"},
            ["FlashInfer on other devices than CUDA", 'backend to "torch"'],
        ),
        ({"backend": "flashinfer"}, ["FlashInfer in float32", 'Set backend to "torch"']),
        ({"backend": "trtllm-gen"}, ["kernel families that return no lse", 'Set backend to "flashinfer"']),
        ({"speculative_config": {}}, ["does not support speculative decoding"]),
        ({"model": "./nowhere"}, ["nowhere: no config could be read", "Give a folder with a config.json"]),
        ({"model": None}, ['"model" is missing']),
        ({"input": None}, ['"input" is missing', "--input"]),
        ({"input": "nowhere.jsonl"}, ["nowhere.jsonl: No such file or directory"]),
        ({"output": "in.jsonl/out.jsonl"}, ["in.jsonl/out.jsonl cannot be written"]),
        ({"output": "."}, ["is a folder; a file was wanted"]),
        ({"kv_cache_gib": 1e-9}, ["buys no block", "Raise kv_cache_gib"]),
        ({"deterministic": True, "decode_exchange": "ag_rs"}, ['"decode_exchange" is "ag_rs"', 'with "deterministic"']),
        (
            {"deterministic": True, "tensor_parallel": {"tp_size": 4}},
            ["deterministic mode over more than two tensor-parallel ranks"],
        ),
    ],
    ids=lambda x: json.dumps(x) if isinstance(x, dict) else "",
)
def test_a_bad_config_is_refused_before_loading(folder, no_loading, config, words):
    assert_refused(folder.run(**config), *words)
    assert not folder.output.exists()


def test_without_a_compiler_the_deterministic_mode_is_refused_before_loading(folder, no_loading, monkeypatch):
    compiled.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    assert_refused(folder.run(deterministic=True), "run.json", "no C++ compiler was found", "Install g++")


@pytest.mark.parametrize(
    "line, config, words",
    [
        ('{"prompt": "a"', {}, ["not valid JSON"]),
        ("[1]", {}, ["found [1]; an object was wanted"]),
        ({"text": "a"}, {}, ['found the keys ["text"]', "exactly one of prompt, prompt_token_ids, messages"]),
        ({"prompt": ""}, {}, ["the prompt is empty; at least one token was wanted"]),
        ({"prompt_token_ids": []}, {}, ["the prompt is empty"]),
        ({"prompt_token_ids": [5, 768]}, {}, ["token id 768 is outside the vocabulary of 768 tokens"]),
        ({"prompt_token_ids": [-1]}, {}, ["token id -1 is outside the vocabulary"]),
        ({"prompt_token_ids": [5] * 32768}, {}, ["has 32768 tokens; the model has 32768 positions"]),
        ({"prompt_token_ids": [5] * 9}, {"max_model_len": 9}, ["has 9 tokens; the model has 9 positions"]),
        (
            {"prompt_token_ids": [5] * 200},
            {"kv_cache_gib": 0.0001},
            ["has 200 tokens and may grow to 203", "the KV pool holds 96", "Raise kv_cache_gib"],
        ),
        ({"prompt": "a", "id": "mine"}, {}, ['"id" is the same as in line 2']),
        ({"messages": []}, {}, ['"messages" must be a list']),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, ["does not support multimodal models"]),
        ({"prompt": "a", "max_new_tokens": 3}, {}, ['"max_new_tokens" says', 'put it under "sampling"']),
        ({"prompt": "a", "tools": []}, {}, ['"tools" is for the chat template, which only "messages" pass']),
        ({"prompt": "a", "sampling": {"temprature": 0}}, {}, ['"sampling.temprature"', '"sampling.temperature"']),
        ({"prompt": "a", "sampling": {"logit_bias": {"768": 1}}}, {}, ['"logit_bias" has token id 768', "768 tokens"]),
        ({"prompt": "a", "sampling": {"stop_token_ids": [768]}}, {}, ['"stop_token_ids" has token id 768']),
        ({"prompt": "a", "sampling": {"min_new_tokens": 5}}, {}, ['"min_new_tokens" is 5', '"max_new_tokens" (4)']),
    ],
    ids=lambda x: str(x)[:40] if isinstance(x, (str, dict)) else "",
)
def test_a_bad_line_is_refused_before_loading_with_its_number(folder, no_loading, line, config, words):
    folder.file("in.jsonl", PROMPTS[0], PROMPTS[1], "", line)
    assert_refused(folder.run(**config), "in.jsonl, line 4: ", "--skip-bad-prompts", *words)
    assert not folder.output.exists()


def test_the_first_bad_line_is_shown_and_the_others_are_counted(folder, no_loading):
    folder.file("in.jsonl", {"prompt_token_ids": [9999]}, PROMPTS[0], "{", '{"prompt": ""}')
    assert_refused(folder.run(), "in.jsonl, line 1: ", "token id 9999", "(2 more bad lines)")


def test_an_empty_input_is_refused(folder, no_loading):
    folder.file("in.jsonl", "", "  ")
    assert_refused(folder.run(), "in.jsonl: the file is empty; one JSON object per line was wanted")


def test_an_input_of_bad_lines_alone_is_refused_even_when_they_are_skipped(folder, no_loading):
    folder.file("in.jsonl", "{", '{"prompt": ""}')
    assert_refused(folder.run("--skip-bad-prompts"), "no line can be run", "line 1: ")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--set", "sampling.temprature=0"], ["nearest known key"]),
        (["--set", "max_num_seqs"], ['--set "max_num_seqs" is not of the form a.b=value']),
        (["--resume", "--overwrite"], ["not allowed with argument", "--help"]),
        (["--frobnicate"], ["unrecognized arguments: --frobnicate", "--help"]),
        (["--input"], ["--input", "expected one argument"]),
    ],
)
def test_a_bad_command_line_is_refused(folder, no_loading, argv, words):
    assert_refused(folder.run(*argv), *words)


def test_a_config_is_wanted_and_must_be_there(tmp_path, capsys, no_loading):
    assert_refused((rollout.main([]), *capsys.readouterr()), "--config")
    missing = tmp_path / "missing.json"
    assert_refused((rollout.main(["--config", str(missing)]), *capsys.readouterr()), str(missing), "No such file")


def test_help_is_no_error(capsys):
    with pytest.raises(SystemExit) as left:
        rollout.main(["--help"])
    assert left.value.code == 0
    out, err = capsys.readouterr()
    assert "--skip-bad-prompts" in out and "local_rank" not in out and err == ""


def test_a_layout_that_mixes_kv_heads_is_accepted(folder):
    """Two KV heads on the two tp ranks of one group: every rank stores both, for its half of the tokens."""
    layout = {"tensor_parallel": {"tp_size": 2}, "decode_context_parallel_size": 2}
    (folder.path / "run.json").write_text(json.dumps({**folder.data, **layout}), encoding="utf-8")
    args = rollout.parse_args(["--config", str(folder.path / "run.json"), "--dry-run"])
    job = rollout.prepare(rollout.Launch(world_size=2), args)
    assert job.grid == RankGrid(tp_size=2, dcp_size=2)
    assert job.spec.heads(2).mixes_heads(job.grid)


def test_an_output_that_exists_is_refused_before_loading_and_left_alone(folder, no_loading):
    folder.output.write_text("precious\n")
    assert_refused(folder.run(), "out.jsonl exists", "--resume", "--overwrite")
    assert folder.output.read_text() == "precious\n"


def test_resuming_another_run_or_a_foreign_file_is_refused_before_loading(folder, monkeypatch, no_loading):
    folder.output.write_text("precious\n")
    assert_refused(folder.run("--resume"), "out.jsonl has no out.jsonl.meta.json beside it")
    assert folder.output.read_text() == "precious\n"
    folder.output.unlink()
    monkeypatch.undo()
    assert folder.run()[0] == 0
    assert_refused(
        folder.run("--resume", "--set", "sampling.seed=1"),
        "was made with sampling.seed=0, this run has 1",
        "--overwrite",
    )


def test_where_a_cut_is_asked_for_lines_say_what_it_kept_and_a_resumed_run_writes_the_same(folder):
    cut = {**folder.data["sampling"], "temperature": 1, "top_p": 0.8, "kept_token_ids": True}
    assert folder.run(sampling=cut)[0] == 0
    whole = folder.lines()
    for line in whole:
        assert list(line) == [*RESULT_KEYS, "kept_mass", "kept_token_ids"]
        assert len(line["kept_mass"]) == len(line["kept_token_ids"]) == 4
        for token, mass, kept in zip(line["token_ids"], line["kept_mass"], line["kept_token_ids"], strict=True):
            assert token in kept and kept == sorted(kept) and 0.8 <= mass <= 1
    folder.output.write_text("".join(json.dumps(line) + "\n" for line in whole[:1]))
    assert folder.run("--resume", sampling=cut)[0] == 0
    by_id = {line["id"]: line for line in folder.lines()}
    for line in whole:
        for key in ("token_ids", "kept_token_ids"):
            assert by_id[line["id"]][key] == line[key]
        assert by_id[line["id"]]["kept_mass"] == pytest.approx(line["kept_mass"])


def test_lines_have_the_experts_of_who_asks_and_a_resumed_run_writes_the_same(folder):
    model = make_model(FAMILIES["deepseek_v3"])
    model.save_pretrained(folder.path / "moe")
    folder.file("in.jsonl", {"prompt_token_ids": [7] * 9}, {"prompt_token_ids": [8, 9], "sampling": OWN_EXPERTS})
    sampling = {**folder.data["sampling"], "temperature": 1, "n": 2}
    asked = {"model": "moe", "sampling": {**sampling, "routed_experts": True}}
    assert folder.run(**asked)[0] == 0
    whole = folder.lines()
    assert [list(line) for line in whole] == [[*RESULT_KEYS, "routed_experts"]] * 2 + [
        [*RESULT_KEYS, "routed_experts", "sampling"]
    ] * 2
    for line in whole:
        wanted = experts_of(model, [*line["prompt_token_ids"], *line["token_ids"]][:-1])
        assert line["routed_experts"] == wanted.tolist() and wanted.shape[1:] == (1, 2)
    folder.output.write_text("".join(json.dumps(line) + "\n" for line in whole[:1]))
    assert folder.run("--resume", **asked)[0] == 0
    assert {line["id"] + str(line["sample_index"]): line["routed_experts"] for line in folder.lines()} == {
        line["id"] + str(line["sample_index"]): line["routed_experts"] for line in whole
    }
    tool_folder.assert_refused(
        folder.run("--resume", model="moe", sampling=sampling), "routed_experts", "--overwrite", tool="rollout"
    )
    assert folder.run("--overwrite", model="moe", sampling=sampling)[0] == 0
    assert ["routed_experts" in line for line in folder.lines()] == [False, False, True, True]
    dense = {"sampling": {**sampling, "routed_experts": True}}
    words = ['"routed_experts" asks', 'model_type "qwen2" has none']
    tool_folder.assert_refused(folder.run("--overwrite", "--dry-run", **dense), *words, tool="rollout")


def test_a_run_writes_one_line_for_each_sample_with_exactly_these_keys(folder):
    code, out, err = folder.run("--set", "sampling.n=2", "--local_rank=0")
    assert code == 0 and "Traceback" not in err
    results = folder.lines()
    assert all(list(line) == RESULT_KEYS for line in results)
    assert sorted((x["prompt_index"], x["sample_index"]) for x in results) == [(p, s) for p in range(3) for s in (0, 1)]
    assert {x["id"] for x in results} == {"0", "mine", "2"}
    for line in results:
        assert len(line["token_ids"]) == len(line["logprobs"]) == len(line["processed_logprobs"]) == 4
        assert line["finish_reason"] == "length" and isinstance(line["text"], str)
        assert set(line["processed_logprobs"]) == {0.0} and all(x <= 0 for x in line["logprobs"])
        assert line["ttft_s"] > 0 and line["tpot_s"] > 0 and line["weights_version"] == 0
    assert [x["prompt_token_ids"] for x in results if x["id"] == "mine"] == [[70, 71, 72]] * 2

    summary = summary_of(out)
    assert json.loads((folder.path / "out.jsonl.summary.json").read_text()) == summary
    assert (summary["num_prompts"], summary["num_samples"], summary["num_generated_tokens"]) == (3, 6, 24)
    for key in ("wall_s", "tokens_per_s", "ttft_s_p50", "tpot_s_p50", "kv_capacity_tokens", "kv_capacity_tokens_total"):
        assert summary[key] > 0
    assert summary["output"] == str(folder.output)
    assert summary["layout"] == {"tp": 1, "pcp": 1, "dcp": 1, "dp": 1, "world_size": 1}

    meta = folder.meta()
    assert set(meta) == {"config", "made_of", "versions", "git_revision", "layout", "device"}
    assert meta["config"]["sampling"]["n"] == 2 and meta["config"]["model"] == str(MODEL)
    assert {"python", "torch", "transformers"} <= set(meta["versions"])
    assert "num_generated_tokens" in err and "sample" in err  # the table and the bar are for people


def test_flags_win_over_the_config_and_start_where_the_user_is(folder, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    folder.file("elsewhere/other.jsonl", {"prompt": "One"})
    argv = ["--input", "other.jsonl", "--output", "deep/mine.jsonl", "--set", "sampling.max_new_tokens=2"]
    assert folder.run(*argv, "--local_rank", "0", input="nowhere.jsonl")[0] == 0
    (line,) = folder.lines(elsewhere / "deep" / "mine.jsonl")
    assert len(line["token_ids"]) == 2
    assert not folder.output.exists()


def test_bad_lines_are_skipped_on_request_and_keep_their_place(folder):
    folder.file("in.jsonl", PROMPTS[0], "{", {"prompt_token_ids": [768]}, "", PROMPTS[2])
    code, out, err = folder.run("--skip-bad-prompts")
    assert code == 0
    assert sorted((x["prompt_index"], x["id"]) for x in folder.lines()) == [(0, "0"), (3, "3")]
    assert "skipped: " in err and "line 2: not valid JSON" in err and "line 3: token id 768" in err
    assert summary_of(out)["num_prompts"] == 2


def test_a_dry_run_loads_and_writes_nothing(folder, no_loading):
    code, out, _ = folder.run("--dry-run")
    assert code == 0
    summary = summary_of(out)
    assert summary["dry_run"] is True and summary["num_prompts"] == 3 and summary["kv_capacity_tokens"] > 0
    assert sorted(p.name for p in folder.path.iterdir()) == ["in.jsonl", "run.json"]


def test_a_dry_run_counts_the_bytes_of_the_caches_own_dtype(folder, no_loading):
    tokens = {
        kept: summary_of(folder.run("--dry-run", kv_cache_dtype=kept, kv_cache_gib=0.25)[1])["kv_capacity_tokens"]
        for kept in ("auto", "fp8", "fp8_e5m2")
    }
    assert tokens["fp8"] == tokens["fp8_e5m2"] == 4 * tokens["auto"]  # of float32


def test_a_dry_run_finds_what_is_wrong(folder, no_loading):
    assert_refused(folder.run("--dry-run", block_size=0), '"block_size" is 0')


def test_a_run_without_an_output_makes_a_folder_of_its_own(folder, monkeypatch):
    monkeypatch.chdir(folder.path)
    code, out, _ = folder.run(output=None)
    assert code == 0
    (made,) = (folder.path / "runs").iterdir()
    assert made.name.startswith("run-")
    assert sorted(p.name for p in made.iterdir()) == [
        "results.jsonl",
        "results.jsonl.meta.json",
        "results.jsonl.summary.json",
    ]
    assert len(folder.lines(made / "results.jsonl")) == 3
    assert summary_of(out)["output"] == str(Path("runs") / made.name / "results.jsonl")


def test_a_command_may_be_repeated_within_a_second(folder, monkeypatch):
    now = datetime.datetime(2025, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    clock = types.SimpleNamespace(UTC=datetime.UTC, datetime=types.SimpleNamespace(now=lambda tz: now))
    monkeypatch.setattr(job, "datetime", clock)
    monkeypatch.chdir(folder.path)
    assert folder.run(output=None)[0] == 0
    code, _, err = folder.run(output=None)
    assert code == 0, err
    assert len(list((folder.path / "runs").iterdir())) == 2


def test_overwriting_replaces_and_greedy_text_is_repeated(folder):
    def texts():
        return {x["prompt_index"]: x["token_ids"] for x in folder.lines()}

    assert folder.run()[0] == 0
    first = texts()
    assert folder.run("--overwrite")[0] == 0
    assert len(folder.lines()) == 3 and texts() == first


def sampled(results):
    return sorted((x["prompt_index"], x["sample_index"], tuple(x["token_ids"])) for x in results)


def test_a_resumed_run_computes_what_is_missing_and_equals_an_undisturbed_one(folder):
    sampling = {"temperature": 1, "n": 2, "max_new_tokens": 4, "seed": 7, "ignore_eos": True}
    assert folder.run(sampling=sampling)[0] == 0
    undisturbed = folder.lines()
    assert len({tuple(x["token_ids"]) for x in undisturbed}) > 3  # sampled, and not all alike
    lines = folder.output.read_bytes().splitlines(keepends=True)
    kept = b"".join(lines[:2])
    folder.output.write_bytes(kept + lines[2][: len(lines[2]) // 2])

    code, out, _ = folder.run("--resume", sampling=sampling)
    assert code == 0
    summary = summary_of(out)
    assert (summary["num_samples_resumed"], summary["num_samples"]) == (2, 6)
    assert folder.output.read_bytes().startswith(kept)
    assert len(folder.lines()) == 6
    assert sampled(folder.lines()) == sampled(undisturbed)

    code, out, _ = folder.run("--resume", sampling=sampling)  # nothing is missing now
    assert code == 0 and (summary_of(out)["num_samples"], summary_of(out)["num_generated_tokens"]) == (6, 0)
    assert sampled(folder.lines()) == sampled(undisturbed)


@pytest.mark.parametrize("state_cache_gib", [0, 0.01])
def test_a_resumed_run_of_a_model_with_states_equals_an_undisturbed_one(folder, tmp_path, state_cache_gib):
    make_model(copy.deepcopy(FAMILIES["qwen3_5_text"])).save_pretrained(tmp_path / "hybrid")
    # The third has what the first begins with, so that with a cache it may go on from its state, or may not.
    first, second = (prompt for prompt in prompts_of((60, 20), 128))
    folder.file("in.jsonl", *({"prompt_token_ids": p} for p in (first, second, [*first[:40], *second])))
    keys = {
        "model": str(tmp_path / "hybrid"),
        "block_size": 4,
        "max_num_batched_tokens": 32,
        "max_num_seqs": 4,
        "state_cache_gib": state_cache_gib,
        "sampling": {"temperature": 1, "n": 2, "max_new_tokens": 6, "seed": 7, "ignore_eos": True},
    }
    assert folder.run(**keys)[0] == 0
    undisturbed = folder.lines()
    assert len({tuple(x["token_ids"]) for x in undisturbed}) > 3
    kept = b"".join(folder.output.read_bytes().splitlines(keepends=True)[:3])
    folder.output.write_bytes(kept)
    code, out, _ = folder.run("--resume", **keys)
    assert code == 0 and summary_of(out)["num_samples_resumed"] == 3
    assert folder.output.read_bytes().startswith(kept) and sampled(folder.lines()) == sampled(undisturbed)


@pytest.fixture
def own_model(tmp_path):
    """The shipped model in a folder whose files a test may change."""
    return shutil.copytree(MODEL, tmp_path / "own")


def change_weights(model):
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if "mlp" in name)
    save_file({**tensors, name: tensors[name] + 0.01}, model / "model.safetensors", metadata={"format": "pt"})


def change_json(path, key, value):
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: value}), encoding="utf-8")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda folder, model: folder.file("in.jsonl", {"prompt": "Another."}, *PROMPTS[1:]), "the prompts differ"),
        (lambda folder, model: folder.file("in.jsonl", *PROMPTS[:2]), "the prompts differ"),
        (lambda folder, model: change_weights(model), "the weights differ"),
        (lambda folder, model: change_json(model / "config.json", "rope_theta", 9), "the config files differ"),
        (lambda folder, model: change_json(model / "tokenizer_config.json", "x", 1), "the tokenizer files differ"),
        (lambda folder, model: (folder.path / "out.jsonl.meta.json").unlink(), "has no out.jsonl.meta.json beside it"),
    ],
    ids=["a prompt", "fewer prompts", "weights", "config", "tokenizer", "meta file lost"],
)
def test_what_changed_in_files_of_the_same_names_is_not_continued(folder, own_model, monkeypatch, change, words):
    assert folder.run(model=str(own_model))[0] == 0
    before = folder.output.read_bytes()
    change(folder, own_model)
    monkeypatch.setattr(rollout, "launch_inference", None)
    assert_refused(folder.run("--resume", model=str(own_model)), words, "--overwrite")
    assert_refused(folder.run("--resume", "--dry-run", model=str(own_model)), words)
    assert folder.output.read_bytes() == before


def test_the_same_files_under_other_names_are_continued(folder, own_model, monkeypatch, tmp_path):
    assert folder.run(model=str(own_model))[0] == 0
    folder.output.write_bytes(b"".join(folder.output.read_bytes().splitlines(keepends=True)[:1]))
    moved = own_model.rename(tmp_path / "moved")
    (tmp_path / "in.jsonl").rename(tmp_path / "other.jsonl")
    monkeypatch.chdir(tmp_path)
    code, out, err = folder.run("--resume", "--input", "./other.jsonl", model=moved.name)
    assert code == 0, err
    assert summary_of(out)["num_samples_resumed"] == 1 and len(folder.lines()) == 3


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_an_output_that_another_run_writes_is_refused_before_loading_and_left_alone(folder, no_loading, flag):
    folder.output.write_text("precious\n")
    with locked(folder.output):
        assert_refused(folder.run(flag), f"output {folder.output} is being written by another run")
    assert folder.output.read_text() == "precious\n"


@pytest.mark.parametrize("fault", ["a line", "the end of all lines"])
def test_what_could_not_be_written_ends_the_run_with_1_and_a_sentence(folder, monkeypatch, fault):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patched = (os, "write") if fault == "a line" else (output_module.os, "fsync")
    opened = opening.open_output

    def open_then_fill(*given):
        opened(*given)
        monkeypatch.setattr(*patched, full)

    monkeypatch.setattr(opening, "open_output", open_then_fill)
    code, out, err = folder.run()
    assert (code, out) == (1, "") and "No space left on device" in err and "Traceback" not in err
    assert err.splitlines()[-1].startswith("rollout: output ")
    assert not (folder.path / "out.jsonl.summary.json").exists()


def test_a_sample_that_is_not_in_the_file_is_not_in_the_summary(folder, monkeypatch):
    """A line that went missing behind the writer's back: the run has generated it, and fails."""
    join = rollout.join_parts

    def lose_a_line(path, *given):
        join(path, *given)
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))

    monkeypatch.setattr(rollout, "join_parts", lose_a_line)
    code, out, err = folder.run()
    assert (code, out) == (1, "") and "out.jsonl holds 2 of 3 samples" in err and "Traceback" not in err
    assert not (folder.path / "out.jsonl.summary.json").exists()


def test_another_seed_samples_another_text(folder):
    """The control of the test above."""
    sampling = {"temperature": 1, "max_new_tokens": 4, "ignore_eos": True}
    assert folder.run(sampling={**sampling, "seed": 1})[0] == 0
    first = sampled(folder.lines())
    assert folder.run("--overwrite", sampling={**sampling, "seed": 2})[0] == 0
    assert sampled(folder.lines()) != first


@pytest.fixture
def bare_model(tmp_path):
    """The shipped model without its tokenizer."""
    return shutil.copytree(MODEL, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))


def test_a_model_without_tokenizer_works_with_token_ids_and_gives_no_text(folder, bare_model):
    folder.file("in.jsonl", PROMPTS[1])
    assert folder.run(model=str(bare_model))[0] == 0
    (line,) = folder.lines()
    assert line["text"] is None and len(line["token_ids"]) == 4


def test_what_needs_a_tokenizer_is_refused_without_one(folder, bare_model, no_loading):
    assert_refused(folder.run(model=str(bare_model)), "line 1: ", 'needs a tokenizer, the model folder has none. Use "')
    folder.file("in.jsonl", PROMPTS[1])
    stop = {**SAMPLING, "stop": ["x"]}
    assert_refused(folder.run(model=str(bare_model), sampling=stop), '"sampling.stop" needs a tokenizer')
    folder.file("in.jsonl", {**PROMPTS[1], "sampling": {"stop": ["x"]}})
    assert_refused(folder.run(model=str(bare_model)), "line 1: ", '"sampling.stop" needs a tokenizer')


def test_answers_of_the_input_are_judged(folder):
    folder.file("in.jsonl", {"prompt": "It was", "answer": "no such text"}, {"prompt": "The"})
    code, out, _ = folder.run()
    assert code == 0
    summary = summary_of(out)
    assert (summary["num_answers"], summary["num_answers_retrieved"]) == (1, 0)
