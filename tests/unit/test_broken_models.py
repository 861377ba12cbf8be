"""Tools on models with something wrong: nothing of it runs, and one sentence says what it is.

What the folder shows is found before the model loads, with exit code 2; what only a step shows ends with 1.
"""

from __future__ import annotations

import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tool_folder
from broken_checkpoints import (
    INDEX,
    WEIGHTS,
    change_tensors,
    in_two_files,
    renamed,
    reshaped,
    set_in_json,
    with_header,
    without,
    write_index,
)
from cpinfer.errors import UserError
from cpinfer.models import loading
from cpinfer.models.loading import known_weights, load_model, load_spec, load_tokenizer
from cpinfer_tools import job, rollout
from cpinfer_tools.memory import AvailableMemory
from cpinfer_tools.verify import reference_eval
from tiny_models import FAMILIES, make_model
from tool_folder import ToolFolder, summary_of

Breaking = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_model(FAMILIES["qwen2"]).save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path: Path, whole: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def folder(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> ToolFolder:
    data = {
        "model": str(model),
        "dtype": "float32",
        "kv_cache_gib": 0.01,
        "input": "in.jsonl",
        "sampling": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
    }
    folder = ToolFolder(tmp_path, capsys, rollout, data)
    folder.file("in.jsonl", {"prompt_token_ids": [5, 6, 7]})
    capsys.readouterr()
    return folder


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch_inference(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model is being loaded")

    monkeypatch.setattr(rollout, "launch_inference", launch_inference)


def assert_refused(outcome: tool_folder.Outcome, *words: str) -> None:
    tool_folder.assert_refused(outcome, *words, tool="rollout")


class RunsWhenRead:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def to_pickle(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(RunsWhenRead(model / "it_ran")))


def to_index_outside(model: Path) -> None:
    weight_map = in_two_files(model)
    (model / "b.safetensors").rename(model.parent / "b.safetensors")
    write_index(model, {k: v.replace("b.", "../b.") for k, v in weight_map.items()})


def config_is(**values: Any) -> Breaking:
    return lambda model: set_in_json(model / "config.json", **values)


BROKEN: dict[str, tuple[Breaking, list[str]]] = {
    "a_missing_tensor": (
        lambda model: without(model, "model.layers.1.mlp.up_proj.weight"),
        ["1 tensor(s) of the model are in none of its files: model.layers.1.mlp.up_proj.weight", "never made up"],
    ),
    "all_renamed": (lambda model: renamed(model, lambda name: "x" + name), ["27 tensor(s)", "lm_head", "and 24 more"]),
    "another_prefix": (lambda model: renamed(model, lambda name: f"module.{name}"), ["27 tensor(s)"]),
    "another_shape": (
        lambda model: reshaped(model, "lm_head.weight"),
        ["lm_head.weight is [128, 63] in its files, and [128, 64] by its config.json"],
    ),
    "more_layers": (config_is(num_hidden_layers=3, layer_types=...), ["12 tensor(s)", "model.layers.2."]),
    "no_layers": (config_is(num_hidden_layers=0), ['"num_hidden_layers" is 0; a whole number from 1 to 1024']),
    "empty": (lambda model: (model / WEIGHTS).write_bytes(b""), [WEIGHTS, "no whole safetensors file"]),
    "truncated": (
        lambda model: (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-9]),
        [WEIGHTS, "no whole safetensors file"],
    ),
    "garbage": (lambda model: (model / WEIGHTS).write_bytes(b"\x13" * 5000), [WEIGHTS, "no whole safetensors file"]),
    "header_too_long": (lambda model: with_header(model, b"{}", 2**40), [WEIGHTS, "no whole safetensors file"]),
    "pickle": (to_pickle, ["pytorch_model.bin is a pickle"]),
    "nothing": (lambda model: (model / WEIGHTS).unlink(), ["it holds no weights"]),
    "index_outside": (to_index_outside, [INDEX, '"../b.safetensors"', "in its own folder was wanted"]),
    "index_to_nothing": (
        lambda model: in_two_files(model) and (model / "a.safetensors").unlink(),
        ["a.safetensors is missing"],
    ),
    "adapter": (lambda model: (model / "adapter_config.json").write_text("{}"), ["it holds an adapter"]),
    "other_weights_named": (config_is(transformers_weights="x.safetensors"), ['"transformers_weights"']),
    "config_no_json": (lambda model: (model / "config.json").write_text("{"), ["no config could be read"]),
    "config_a_list": (lambda model: (model / "config.json").write_text("[1]"), ["no config could be read"]),
    "config_nested": (lambda model: (model / "config.json").write_text("[" * 10**5), ["no config could be read"]),
    "endless_layers": (config_is(num_hidden_layers=10**12), ['"num_hidden_layers" is 1000000000000']),
    "endless_digits": (config_is(hidden_size=10**4000), ['"hidden_size" is a number of more than 30 digits']),
    "endless_labels": (config_is(num_labels=10**12), ['"num_labels" is 1000000000000']),
    "text_for_a_number": (config_is(hidden_size="64"), ['"hidden_size" is "64"; a whole number']),
    "list_for_a_number": (config_is(vocab_size=[128]), ['"vocab_size" is [128]; a whole number']),
    "no_positions": (config_is(max_position_embeddings=None), ['"max_position_embeddings" is null']),
    "endless_positions": (config_is(max_position_embeddings=10**30), ["more than 30 digits; a whole number from 1"]),
    "text_ends": (config_is(eos_token_id="</s>"), ['"eos_token_id" is "</s>"; a token id']),
    "odd_heads": (config_is(num_attention_heads=7), ['"hidden_size" is 64; a multiple of num_attention_heads (7)']),
    "kernels_of_others": (
        config_is(hidden_act="none_such"),
        ['"hidden_act" is "none_such"; the name of an activation'],
    ),
    "text_ends_generation": (
        lambda model: set_in_json(model / "generation_config.json", eos_token_id="x"),
        ['generation_config.json: "eos_token_id" is "x"'],
    ),
    "generation_no_json": (
        lambda model: (model / "generation_config.json").write_text("{"),
        ["its generation_config.json could not be read"],
    ),
    "tokenizer_no_json": (
        lambda model: (model / "tokenizer.json").write_text("{"),
        ["its tokenizer could not be read"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_refused_before_loading(folder: ToolFolder, model: Path, no_loading: None, name: str) -> None:
    breaking, words = BROKEN[name]
    breaking(model)
    started_s = time.perf_counter()
    assert_refused(folder.run("--dry-run"), *words)
    assert time.perf_counter() - started_s < 10
    assert not folder.output.exists() and not (model / "it_ran").exists()


def test_a_whole_model_in_two_files_answers_as_in_one(folder: ToolFolder, model: Path) -> None:
    assert folder.run()[0] == 0
    one = folder.lines()[0]["token_ids"]
    in_two_files(model)
    assert folder.run("--overwrite")[0] == 0
    assert folder.lines()[0]["token_ids"] == one


def test_tensors_without_a_place_are_named_once_and_the_answers_are_the_same(folder: ToolFolder, model: Path) -> None:
    assert folder.run()[0] == 0
    one = folder.lines()[0]["token_ids"]
    change_tensors(model, lambda tensors: {**tensors, "vision.weight": torch.ones(3)})
    code, _, err = folder.run("--overwrite")
    assert code == 0 and folder.lines()[0]["token_ids"] == one
    assert err.count("vision.weight") == 1
    assert "1 tensor(s) of the model's files have no place in it and are left out: vision.weight" in err


# Code in a folder.


def with_code(model: Path, config: str, **values: Any) -> Path:
    """A file of code that a config names as its own; where it would leave its mark."""
    mark = model / "it_ran"
    code = f"open({str(mark)!r}, 'w')\nfrom transformers import Qwen2Config, PreTrainedTokenizerFast\n"
    code += "class Own(Qwen2Config):\n    model_type = 'own'\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    (model / "own.py").write_text(code)
    if not (model / config).exists():
        (model / config).write_text("{}")
    set_in_json(model / config, **values)
    return mark


@pytest.fixture
def yes_to_everything(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    return asked


def test_a_model_that_is_code_is_refused_unasked_and_unrun(
    folder: ToolFolder, model: Path, no_loading: None, yes_to_everything: list[str]
) -> None:
    mark = with_code(model, "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    assert_refused(folder.run(), 'model_type "own"', "code of their own (auto_map)")
    assert not mark.exists() and not yes_to_everything


def test_code_beside_a_model_that_is_known_is_left_alone(
    folder: ToolFolder, model: Path, yes_to_everything: list[str]
) -> None:
    auto_map = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}
    mark = with_code(model, "config.json", auto_map=auto_map)
    assert folder.run()[0] == 0
    assert not mark.exists() and not yes_to_everything


def test_a_tokenizer_that_is_code_is_refused_unasked_and_unrun(
    folder: ToolFolder, model: Path, no_loading: None, yes_to_everything: list[str]
) -> None:
    auto_map = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    mark = with_code(model, "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)
    assert_refused(folder.run(), "its tokenizer is code of its own (auto_map", "never run")
    assert not mark.exists() and not yes_to_everything


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_that_a_config_asks_for_is_not_fetched(folder: ToolFolder, model: Path, key: str) -> None:
    set_in_json(model / "config.json", **{key: "someone/kernels"})
    assert folder.run()[0] == 0


def test_every_reading_of_a_model_forbids_its_code() -> None:
    """Each call of an Auto class's from_pretrained or from_config that the project ships says so."""
    root = Path(__file__).parents[2]
    files = [path for part in ("cpinfer", "integrations", "tools") for path in (root / part).rglob("*.py")]
    calls = 0
    for path in files:
        text = path.read_text(encoding="utf-8")
        for call in text.split("AutoModelForCausalLM.from_pretrained(")[1:]:
            calls += 1
            assert "trust_remote_code=False" in call[:300], path
        for name in ("AutoConfig", "AutoTokenizer"):
            for call in text.split(f"{name}.from_pretrained(")[1:]:
                calls += 1
                assert "trust_remote_code=False" in call[:100], path
    assert calls > 3


# What shows only later.


@pytest.fixture
def unseen_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model of the hub that is not on this machine yet."""
    monkeypatch.setattr(loading, "local_folder", lambda model: None)


@pytest.mark.parametrize("name", ["a_missing_tensor", "all_renamed", "another_prefix", "another_shape", "more_layers"])
def test_what_nobody_could_look_at_before_is_found_when_it_has_loaded(
    folder: ToolFolder, model: Path, unseen_files: None, name: str
) -> None:
    breaking, words = BROKEN[name]
    breaking(model)
    code, out, err = folder.run()
    assert (code, out) == (2, "") and "Traceback" not in err and "LOAD REPORT" not in err
    assert words[0] in err


@pytest.mark.parametrize("name", ["empty", "truncated", "garbage", "pickle", "nothing"])
def test_what_cannot_be_read_then_is_said_in_a_sentence(model: Path, unseen_files: None, name: str) -> None:
    BROKEN[name][0](model)
    with pytest.raises(UserError, match="its weights could not be read"):
        load_model(str(model), torch.float32)
    assert not (model / "it_ran").exists()


def test_an_expert_that_is_missed_as_experts_are_joined_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    make_model(FAMILIES["mixtral"]).save_pretrained(tmp_path)
    without(tmp_path, name := "model.layers.1.block_sparse_moe.experts.2.w3.weight")
    known = iter([None, tmp_path])  # not here before, here after
    monkeypatch.setattr(loading, "local_folder", lambda model: next(known))
    with pytest.raises(UserError, match=name):
        load_model(str(tmp_path), torch.float32)


def test_weights_that_are_no_numbers_end_in_a_sentence_and_1(folder: ToolFolder, model: Path) -> None:
    change_tensors(model, lambda ts: {**ts, "model.norm.weight": torch.full_like(ts["model.norm.weight"], torch.nan)})
    code, out, err = folder.run()
    assert (code, out) == (1, "") and "Traceback" not in err
    assert [line for line in err.splitlines() if line.startswith("rollout: ")] != []


def test_the_reference_refuses_what_the_engine_refuses(
    folder: ToolFolder, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(model, "lm_head.weight")
    outcome = folder.run("--tasks", "passkey", tool=reference_eval, input=None)
    tool_folder.assert_refused(outcome, "lm_head.weight", tool="reference_eval")


# Memory.


def test_a_dry_run_sets_what_a_rank_needs_beside_what_is_there(folder: ToolFolder, model: Path) -> None:
    code, out, err = folder.run("--dry-run")
    summary = summary_of(out)
    loaded = load_model(str(model), torch.float32)
    assert code == 0 and summary["fits_in_memory"] is True and "fits in memory" in err
    assert summary["num_parameters"] == sum(p.numel() for p in loaded.parameters())
    assert (
        summary["weights_bytes_per_rank"]
        == summary["loading_bytes_per_rank"]
        == 4 * sum(t.numel() for t in [*loaded.parameters(), *loaded.buffers()])
    )
    assert 0.009 * 2**30 < summary["kv_pool_bytes_per_rank"] <= 0.01 * 2**30
    assert summary["device_available_bytes_per_rank"] is None
    assert summary["host_available_bytes_per_rank"] > 2**20


@pytest.mark.parametrize(
    "available, fits, words",
    [
        (AvailableMemory(None, 2**20), False, "DOES NOT FIT IN THIS MACHINE'S MEMORY"),
        (AvailableMemory(None, None), None, "may fit in memory"),
        (AvailableMemory(2**20, 2**40), False, "DOES NOT FIT"),
        (AvailableMemory(2**40, 2**10), False, "DOES NOT FIT"),
        (AvailableMemory(2**40, 2**40), True, "rollout: fits in memory"),
    ],
)
def test_what_does_not_fit_is_said_loudly_and_is_no_error(
    folder: ToolFolder, monkeypatch: pytest.MonkeyPatch, available: AvailableMemory, fits: bool | None, words: str
) -> None:
    monkeypatch.setattr(job, "available_memory", lambda launch, environ: available)
    code, out, err = folder.run("--dry-run")
    assert code == 0 and summary_of(out)["fits_in_memory"] is fits
    assert words in err


def test_a_folder_of_nothing_is_no_model_and_has_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config could be read \(it has no config.json"):
        load_spec(str(tmp_path))
    with pytest.raises(UserError, match="no config could be read"):
        known_weights(str(tmp_path), torch.float32)
    assert load_tokenizer(str(tmp_path)) is None
