"""The config: what is accepted, what is refused and in which words, and where relative paths point."""

import dataclasses
import json
from pathlib import Path

import pytest

from cpinfer.config import (
    KEYS_OF_TOOLS,
    EngineConfig,
    JobConfig,
    ParallelConfig,
    SamplingParams,
    TensorParallel,
    config_to_dict,
    job_config,
    load_config,
    parse_config,
    with_keys,
)
from cpinfer.errors import UnsupportedError, UserError
from cpinfer.other_engines_keys import NAMES_HERE
from cpinfer_tools.run_config import RunConfig, load_run_config, parse_run_config

CONFIGS = Path(__file__).parents[2] / "configs"


def write(folder, data, name="run.json"):
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "data, unknown, nearest",
    [
        ({"modle": "m"}, "modle", "model"),
        ({"max_num_seq": 4}, "max_num_seq", "max_num_seqs"),
        ({"decode_context_parallel": 2}, "decode_context_parallel", "decode_context_parallel_size"),
        ({"sampling": {"temprature": 0}}, "sampling.temprature", "sampling.temperature"),
        ({"sampling": {"max_tokens": 0}}, "sampling.max_tokens", "sampling.max_new_tokens"),
        ({"tensor_parallel": {"size": 2}}, "tensor_parallel.size", "tensor_parallel.tp_size"),
        ({"wandb": {"projct": "p"}}, "wandb.projct", "wandb.project"),
    ],
)
def test_an_unknown_key_names_itself_and_the_nearest_known_one(data, unknown, nearest):
    with pytest.raises(UserError) as caught:
        parse_run_config(data)
    assert f'unknown key "{unknown}"' in str(caught.value)
    assert f'nearest known key is "{nearest}"' in str(caught.value)


@pytest.mark.parametrize("name", NAMES_HERE)
def test_a_key_of_another_engine_is_told_apart_from_a_typing_error(name):
    """By its letters `max_tokens` is near to `max_session_tokens`, and `pcp_size` to `block_size`."""
    here = NAMES_HERE[name]
    with pytest.raises(UserError, match=rf'^unknown key "{name}"; here it is "{here}"\.$'):
        parse_run_config({name: 1})
    for cls in (EngineConfig, JobConfig, RunConfig):
        assert name not in {field.name for field in dataclasses.fields(cls)}
    value = parse_run_config({})
    for part in here.split("."):
        value = getattr(value, part)


def test_only_a_key_that_is_near_is_suggested():
    """`foo` shares two letters with `rollout`, which is no reason to mean it."""
    with pytest.raises(UserError, match=r'^unknown key "foo"; no known key is near it\.$'):
        parse_run_config({"foo": 1})
    with pytest.raises(UserError, match=r'^unknown key "wandb\.x"; the known ones are project, name, group, mode\.$'):
        parse_run_config({"wandb": {"x": 1}})


@pytest.mark.parametrize("name", [1, None, (1, 2), b"model"])
def test_a_key_that_is_no_text_is_unknown(name):
    with pytest.raises(UserError, match=r"^unknown key "):
        parse_run_config({name: 1})


@pytest.mark.parametrize(
    "data, where, wanted",
    [
        ({"block_size": True}, "block_size", "a whole number"),
        ({"block_size": 16.0}, "block_size", "a whole number"),
        ({"block_size": "16"}, "block_size", "a whole number"),
        ({"block_size": None}, "block_size", "a whole number"),
        ({"kv_cache_gib": "1"}, "kv_cache_gib", "a number"),
        ({"kv_cache_gib": True}, "kv_cache_gib", "a number"),
        ({"enable_prefix_caching": 0}, "enable_prefix_caching", "true or false"),
        ({"context_exchange": "keys"}, "context_exchange", 'one of "auto", "queries", "kv"'),
        ({"cascade_attention": "on", "cuda_graphs": True}, "cascade_attention", "with cuda_graphs"),
        ({"context_exchange": "ring"}, "context_exchange", 'one of "auto", "queries", "kv"'),
        ({"model": 3}, "model", "a text"),
        ({"dtype": "fp8"}, "dtype", 'one of "float32", "bfloat16", "float16"'),
        ({"dtype": None}, "dtype", "one of"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype", 'one of "auto", "fp8", "fp8_e4m3", "fp8_e5m2"'),
        ({"sampling": {"stop": 5}}, "sampling.stop", "a list, each item a text"),
        ({"sampling": {"stop": ["end", 1]}}, "sampling.stop[1]", "a text"),
        ({"sampling": {"stop_token_ids": [True]}}, "sampling.stop_token_ids[0]", "a whole number"),
        ({"sampling": {"temperature": "0"}}, "sampling.temperature", "a number"),
        ({"sampling": {"n": True}}, "sampling.n", "a whole number"),
        ({"sampling": []}, "sampling", "an object with keys temperature, top_k"),
        ({"sampling": None}, "sampling", "an object with keys"),
        ({"tensor_parallel": 2}, "tensor_parallel", "an object with keys tp_size"),
        ({"wandb": "project"}, "wandb", "an object with keys project"),
    ],
)
def test_a_wrong_type_says_where_what_is_and_what_was_wanted(data, where, wanted):
    with pytest.raises(UserError) as caught:
        parse_run_config(data)
    assert f'"{where}" is ' in str(caught.value)
    assert wanted in str(caught.value)


def test_a_whole_number_will_do_where_a_number_is_wanted():
    config = parse_run_config({"kv_cache_gib": 1, "sampling": {"temperature": 0}})
    assert (config.kv_cache_gib, config.sampling.temperature) == (1.0, 0.0)
    assert isinstance(config.kv_cache_gib, float)


@pytest.mark.parametrize(
    "key, bad, good",
    [
        ("temperature", -0.1, 0),
        ("top_k", -2, -1),
        ("top_p", 0, 0.01),
        ("top_p", 1.01, 1),
        ("min_p", -0.1, 0),
        ("min_p", 1.1, 1),
        ("repetition_penalty", 0, 0.1),
        ("max_new_tokens", 0, 1),
        ("n", 0, 1),
        ("seed", -1, 0),
        ("seed", 2**64, 2**64 - 1),
        ("stop", [""], ["x"]),
    ],
)
def test_a_sampling_value_out_of_range_is_refused_at_the_edge(key, bad, good):
    with pytest.raises(UserError, match=rf'"(sampling\.)?{key}" is .*; it must be '):
        parse_run_config({"sampling": {key: bad}})
    parse_run_config({"sampling": {key: good}})


def test_a_top_k_of_minus_1_is_off_and_the_same_as_0():
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0) and SamplingParams(top_k=-1).top_k == 0
    assert parse_run_config({"sampling": {"top_k": -1}}) == parse_run_config({})


def test_an_answer_cannot_have_to_be_longer_than_it_may_be():
    with pytest.raises(
        UserError, match=r'"(sampling\.)?min_new_tokens" is 5; it must be at most "max_new_tokens" \(4\)'
    ):
        parse_config({"sampling": {"min_new_tokens": 5, "max_new_tokens": 4}})
    assert parse_config({"sampling": {"min_new_tokens": 4, "max_new_tokens": 4}}).sampling.min_new_tokens == 4


@pytest.mark.parametrize(
    "key",
    [
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
        "data_parallel_size",
        "cp_kv_cache_interleave_size",
        "block_size",
        "kv_cache_gib",
        "max_num_seqs",
        "max_num_batched_tokens",
        "context_workspace_tokens",
    ],
)
def test_a_size_below_one_is_refused(key):
    with pytest.raises(UserError, match=f'"{key}" is 0'):
        parse_run_config({key: 0})
    assert getattr(parse_run_config({key: 1}), key) == 1


def test_tp_size_below_one_is_refused():
    with pytest.raises(UserError, match=r'"tensor_parallel\.tp_size" is 0; it must be at least 1'):
        parse_run_config({"tensor_parallel": {"tp_size": 0}})


@pytest.mark.parametrize("text", ['{"kv_cache_gib": NaN}', '{"kv_cache_gib": Infinity}', '{"kv_cache_gib": 1e999}'])
def test_a_size_that_is_no_finite_number_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="kv_cache_gib"):
        load_run_config(write(tmp_path, text))


@pytest.mark.parametrize(
    "key, values, default",
    [
        ("enable_prefix_caching", (True, False), True),
        ("context_exchange", ("auto", "queries", "kv"), "auto"),
        ("cascade_attention", ("auto", "on", "off"), "auto"),
        ("decode_exchange", ("a2a", "ag_rs", "replicate_q"), "a2a"),
    ],
)
def test_a_choice_takes_all_its_values_and_defaults_to_the_safe_one(key, values, default):
    assert getattr(RunConfig(), key) == default
    assert tuple(getattr(parse_run_config({key: value}), key) for value in values) == values


def test_sizes_left_out_follow_from_the_others():
    assert (RunConfig().dcp_size, RunConfig().interleave, RunConfig().tp_size, RunConfig().pcp_size) == (1, 16, 1, 1)
    config = parse_run_config({"prefill_context_parallel_size": 4, "block_size": 8, "tensor_parallel": {"tp_size": 2}})
    assert (config.dcp_size, config.interleave, config.tp_size) == (4, 8, 2)
    config = parse_run_config({"decode_context_parallel_size": 2, "cp_kv_cache_interleave_size": 1})
    assert (config.dcp_size, config.interleave) == (2, 1)


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        RunConfig(model="m", tensor_parallel=TensorParallel(4), kv_cache_gib=1.5, output="o.jsonl"),
        RunConfig(sampling=SamplingParams(temperature=0, stop=("a", "b"), stop_token_ids=(1, 2), seed=2**64 - 1)),
        parse_run_config({"wandb": {"name": "run", "mode": "offline"}, "data_parallel_size": 2}),
    ],
)
def test_a_config_survives_the_way_to_json_and_back(config):
    data = json.loads(json.dumps(config_to_dict(config)))
    assert parse_run_config(data) == config


def test_different_configs_do_not_become_the_same_data():
    assert config_to_dict(RunConfig()) != config_to_dict(RunConfig(sampling=SamplingParams(seed=1)))


def load_with(folder, data, *overrides):
    return load_run_config(write(folder, data), overrides)


def test_overrides_are_json_first_and_text_otherwise(tmp_path):
    config = load_with(
        tmp_path,
        {"block_size": 8},
        "block_size=32",
        "kv_cache_gib=null",
        "dtype=float32",
        'sampling.stop=["a=b", "c"]',
        "sampling.ignore_eos=true",
        "wandb.project=5x",
    )
    assert (config.block_size, config.kv_cache_gib, config.dtype) == (32, None, "float32")
    assert config.sampling.stop == ("a=b", "c")
    assert config.sampling.ignore_eos is True
    assert config.wandb is not None and config.wandb.project == "5x"


def test_an_override_makes_the_objects_it_goes_through(tmp_path):
    assert load_with(tmp_path, {}, "sampling.n=3", "tensor_parallel.tp_size=2").sampling.n == 3


def test_an_override_keeps_the_keys_beside_it_and_the_last_one_wins(tmp_path):
    config = load_with(tmp_path, {"sampling": {"n": 3, "seed": 7}}, "sampling.n=4", "sampling.n=5")
    assert (config.sampling.n, config.sampling.seed) == (5, 7)


@pytest.mark.parametrize("override", ["block_size", "=3", ""])
def test_an_override_of_bad_form_is_named(tmp_path, override):
    with pytest.raises(UserError) as caught:
        load_with(tmp_path, {}, override)
    assert f"--set {json.dumps(override)} is not of the form a.b=value" in str(caught.value)


def test_an_override_through_something_that_is_no_object_is_named(tmp_path):
    with pytest.raises(UserError, match='"block_size" is 8, not an object'):
        load_with(tmp_path, {"block_size": 8}, "block_size.x=3")


def test_an_override_is_held_to_the_same_rules(tmp_path):
    with pytest.raises(UserError, match=r'nearest known key is "sampling\.temperature"'):
        load_with(tmp_path, {}, "sampling.temprature=0")
    with pytest.raises(UserError, match='"block_size" is "many"; a whole number was wanted'):
        load_with(tmp_path, {}, "block_size=many")


def test_relative_paths_start_at_the_config_file(tmp_path, monkeypatch):
    folder = tmp_path / "deep"
    (folder / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    write(folder, {"model": "tiny", "input": "in.jsonl", "output": "../out.jsonl"})
    config = load_run_config(Path("deep") / "run.json")
    assert (config.input, config.output) == (str(Path("deep/in.jsonl")), str(Path("deep/../out.jsonl")))
    assert Path(config.model or "").resolve() == folder / "tiny"


def test_absolute_and_home_paths_stay_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = load_with(tmp_path, {"model": "/models/m", "input": "~/in.jsonl", "output": "/out.jsonl"})
    assert config.model == "/models/m"
    assert config.input == str(tmp_path / "home" / "in.jsonl")
    assert config.output == "/out.jsonl"


def test_a_hub_id_is_left_alone(tmp_path):
    assert load_with(tmp_path, {"model": "Qwen/Qwen2.5-3B"}).model == "Qwen/Qwen2.5-3B"


def test_a_missing_folder_that_says_it_is_one_is_kept_as_a_path(tmp_path):
    assert load_with(tmp_path, {"model": "./missing"}).model == str(tmp_path / "missing")
    assert load_with(tmp_path, {"model": "../missing"}).model == str(tmp_path / ".." / "missing")


def test_unnamed_paths_stay_unnamed(tmp_path):
    config = load_with(tmp_path, {})
    assert (config.model, config.input, config.output) == (None, None, None)


@pytest.mark.parametrize(
    "data, what",
    [
        ({"speculative_config": {"num_speculative_tokens": 3}}, "speculative decoding"),
        ({"speculative_model": "m"}, "speculative decoding"),
        ({"num_speculative_tokens": 1}, "speculative decoding"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"pipeline_parallel": {"pp_size": 2}}, "pipeline parallelism"),
        ({"limit_mm_per_prompt": {"image": 1}}, "multimodal"),
        ({"quantization": "awq"}, "quantized weights"),
        ({"backend": "flashinfer", "dtype": "float32"}, "FlashInfer in float32"),
        ({"backend": "trtllm-gen"}, "trtllm-gen"),
        ({"backend": "cudnn"}, "kernel families"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(data, what):
    with pytest.raises(UnsupportedError) as caught:
        parse_run_config(data)
    message = str(caught.value)
    assert "does not support" in message and what in message and next(iter(data)) in message


@pytest.mark.parametrize(
    "data",
    [
        {"pipeline_parallel_size": 1},
        {"speculative_config": None},
        {"quantization": None},
        {"backend": "torch"},
        {"backend": "flashinfer"},
        {"kv_cache_dtype": "auto"},
        {"kv_cache_dtype": None},
    ],
)
def test_a_refused_key_that_asks_for_nothing_is_accepted(data):
    parse_run_config(data)


@pytest.mark.parametrize(
    "value, kept",
    [
        (None, "bfloat16"),
        ("auto", "bfloat16"),
        ("fp8", "float8_e4m3fn"),
        ("fp8_e4m3", "float8_e4m3fn"),
        ("fp8_e5m2", "float8_e5m2"),
    ],
)
def test_the_cache_has_the_models_dtype_or_fp8_by_the_names_that_vllm_has(value, kept):
    config = parse_run_config({"kv_cache_dtype": value})
    assert config.cache_dtype("bfloat16") == kept
    assert parse_run_config(config_to_dict(config)) == config
    assert parse_run_config({}).kv_cache_dtype == "auto"
    assert parse_run_config({"kv_cache_dtype": "fp8"}) == parse_run_config({"kv_cache_dtype": "fp8_e4m3"}), "one thing"


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"model": ', "not valid JSON"),
        ("", "not valid JSON"),
        ("[1, 2]", "holds a list, an object with config keys was wanted"),
        ('"text"', "holds a str"),
        ("null", "an object with config keys was wanted"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_run_config(path)
    assert f"config {path}: " in str(caught.value) and words in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(UserError, match=f"config {path}: .* A JSON file with config keys was wanted"):
            load_run_config(path)
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid JSON"):
        load_run_config(binary)


def test_an_error_in_a_file_keeps_its_kind_and_names_the_file(tmp_path):
    with pytest.raises(UnsupportedError, match=r"config .*run\.json: .*FlashInfer"):
        load_with(tmp_path, {"backend": "flashinfer", "dtype": "float32"})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_config_that_is_shipped_parses_and_names_its_files(path):
    config = load_run_config(path)
    assert config.model is not None
    # What is evaluated is made from a seed, or comes from a file that is the user's.
    assert config.input is not None or config.evaluation.tasks or config.evaluation.task_file
    assert config.input is None or Path(config.input).is_file()


def test_configs_are_shipped():
    assert len(list(CONFIGS.glob("*.json"))) >= 4


# --- one file, several readers ---


def keys_of(cls):
    return {field.name for field in dataclasses.fields(cls)}


def test_what_only_tools_read_is_written_down_once_more_below_them_and_the_same():
    assert keys_of(RunConfig) - keys_of(JobConfig) == KEYS_OF_TOOLS


def test_the_engine_has_neither_sizes_nor_what_others_read():
    assert not keys_of(EngineConfig) & (keys_of(ParallelConfig) | KEYS_OF_TOOLS | {"model", "sampling", "rollout"})


def test_a_job_reads_the_file_of_a_run_and_passes_over_what_is_the_tools(tmp_path):
    path = write(tmp_path, {"block_size": 8, "evaluation": {"no such": "key"}, "wandb": {}, "input": "in.jsonl"})
    assert load_config(path) == parse_config({"block_size": 8})
    for data, nearest in (({"evaluatoin": {}}, None), ({"bolck_size": 8}, "block_size"), ({"rollout": {"x": 1}}, None)):
        with pytest.raises(UserError, match=f'unknown key .*"{nearest}"' if nearest else "unknown key"):
            load_config(write(tmp_path, data))


def test_keys_of_tools_are_passed_over_by_a_job_in_every_form():
    assert parse_config({"evaluation": {"tasks": ["vt"]}, "max_num_seqs": 3}) == parse_config({"max_num_seqs": 3})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_config_that_is_shipped_says_the_same_to_a_job_as_to_a_tool(path):
    job, run = load_config(path), load_run_config(path)
    assert {name: getattr(run, name) for name in keys_of(JobConfig)} == vars(job)


def test_the_dtype_of_a_model_that_is_loaded_has_a_name_and_that_of_a_job_is_what_it_is():
    assert (parse_config({}).dtype, parse_run_config({}).dtype) == ("auto", "bfloat16")
    with pytest.raises(UserError, match='"dtype" is "auto"; one of "float32"'):
        parse_run_config({"dtype": "auto"})


FORMS = {
    "job": JobConfig(block_size=8, sampling=SamplingParams(n=2)),
    "run": RunConfig(block_size=8, sampling=SamplingParams(n=2), dtype="float32", input="in.jsonl"),
    "dict": {"block_size": 8, "sampling": {"n": 2}},
    "path": {"block_size": 8, "sampling": {"n": 2}, "input": "in.jsonl", "training": {"num_steps": 3}},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_jobs_config_comes_in_any_form(tmp_path, form):
    config = job_config(write(tmp_path, FORMS[form]) if form == "path" else FORMS[form])
    assert isinstance(config, JobConfig)
    assert (config.block_size, config.sampling.n, config.pcp_size) == (8, 2, 1)
    assert config is FORMS[form] or form in ("dict", "path")


def test_a_job_that_is_told_nothing_has_the_defaults_and_one_of_an_engine_its_keys():
    assert job_config(None) == JobConfig()
    assert job_config(EngineConfig(block_size=8)) == JobConfig(block_size=8)


@pytest.mark.parametrize("bad", [3, ["block_size"], ParallelConfig(), SamplingParams(), True])
def test_what_is_no_config_is_told_what_was_wanted(bad):
    with pytest.raises(UserError, match="an object, a dict, the path of a file or None was wanted"):
        job_config(bad)


def test_some_keys_of_a_config_are_changed_and_the_rest_is_what_it_was():
    config = RunConfig(block_size=8, input="in.jsonl")
    assert with_keys(config, {}) is config
    assert with_keys(config, {"max_num_seqs": 3}) == RunConfig(block_size=8, input="in.jsonl", max_num_seqs=3)


def test_a_size_that_is_not_said_is_one_and_can_be_told_from_one_that_is():
    assert (ParallelConfig().tp_size, ParallelConfig().pcp_size, ParallelConfig().dcp_size) == (1, 1, 1)
    said = ParallelConfig(tensor_parallel={"tp_size": 1}, prefill_context_parallel_size=1)
    assert said != ParallelConfig() and (said.tp_size, said.pcp_size) == (1, 1)
