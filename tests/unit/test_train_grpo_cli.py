"""The training tool as a user meets it, in one process without DeepSpeed: steps and a curve, or one complaint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tool_folder
from cpinfer_tools.grpo import rewards, train_grpo
from tool_folder import ToolFolder, summary_of

CONFIGS = Path(__file__).parents[2] / "configs"
OWN_REWARD = """
def longest(completion_ids, id, **_):
    assert all(name.startswith("p") for name in id)
    return [float(len(ids)) for ids in completion_ids]

not_a_function = 3
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


class Folder(ToolFolder):
    """Of the training tool, whose own keys a test may change one by one too."""

    def run(self, *argv, training=None, **config):
        return super().run(*argv, training={**self.data["training"], **(training or {})}, **config)


@pytest.fixture
def folder(tmp_path, capsys):
    training = {
        "reward": "sentence",
        "num_steps": 2,
        "batch_size": 4,
        "num_generations": 2,
        "learning_rate": 1e-3,
        "zero_stage": None,
        "fresh_weights": True,
    }
    data = {
        "model": str(CONFIGS / "grpo-tiny"),
        "dtype": "float32",
        "kv_cache_gib": 0.01,
        "input": "in.jsonl",
        "sampling": {"max_new_tokens": 4},
        "training": training,
    }
    folder = Folder(tmp_path, capsys, train_grpo, data)
    folder.file("in.jsonl", {"prompt": " Recall: Alice", "id": "p0"}, {"prompt": " Recall: Boris", "id": "p1"})
    folder.file("own.py", OWN_REWARD)
    return folder


def assert_refused(outcome, *words):
    tool_folder.assert_refused(outcome, *words, tool="train_grpo")
    assert all(word in outcome[2] for word in words), outcome[2]


@pytest.fixture
def no_telemetry(monkeypatch):
    """A hub client as a user has it, which may not begin to send."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("CI", raising=False)
    asked = []
    monkeypatch.setattr("huggingface_hub.utils._telemetry._start_telemetry_thread", lambda: asked.append(True))
    yield
    assert not asked


@pytest.mark.usefixtures("no_telemetry")
def test_a_run_leaves_a_line_per_step_a_summary_and_a_curve(folder, tmp_path):
    code, out, _ = folder.run()
    assert code == 0
    lines, summary = folder.lines(), summary_of(out)
    assert [line["step"] for line in lines] == [1, 2]
    assert [line["weights_version"] for line in lines] == [0, 1]
    assert all(0 <= line["reward"] <= 1 and line["rollout_s"] > 0 for line in lines)
    assert summary["generator"] == "cpinfer" and summary["num_steps"] == 2
    assert summary["mismatch_num_tokens"] > 0 and summary["mismatch_max_abs"] <= 1e-4
    assert summary == json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out.svg").read_text().rstrip().endswith("</svg>")
    assert folder.meta()["config"]["training"]["reward"] == "sentence"


def test_transformers_can_generate_instead_and_another_run_be_drawn_beside(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "output.jsonl").write_text('{"step": 1, "reward": 0.5, "rollout_s": 0.1}\n')
    code, out, _ = folder.run("--beside", str(other / "output.jsonl"), training={"generator": "transformers"})
    assert code == 0
    summary = summary_of(out)
    assert summary["generator"] == "transformers" and summary["rollout_s_p50"] > 0
    assert not [key for key in summary if key.startswith("mismatch")]  # what was not measured is not reported


def test_a_reward_of_ones_own_sees_the_columns_of_the_input(folder):
    code, _, _ = folder.run(training={"reward": "own.py:longest", "num_steps": 1})
    assert code == 0
    assert folder.lines()[0]["reward"] == pytest.approx(folder.lines()[0]["completion_tokens_mean"])


def test_an_adapter_is_trained_and_in_effect_in_rollouts(folder):
    code, out, _ = folder.run(training={"lora_rank": 4, "learning_rate": 1e-1, "num_steps": 3})
    assert code == 0
    assert summary_of(out)["mismatch_max_abs"] <= 1e-4


@pytest.mark.parametrize("start", ["fresh_weights", "fresh_weights and LoRA", "weights of the model"])
def test_the_kl_is_to_the_model_before_training(folder, tmp_path, start):
    """To rounding 0 in the first step, then not."""
    model = folder.data["model"]
    if start == "weights of the model":
        model = str(tmp_path / "model")
        shutil.copytree(folder.data["model"], model)
        torch.manual_seed(5)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(model)
    training = {"kl_coef": 0.1, "learning_rate": 1e-2, "fresh_weights": start.startswith("fresh")}
    # Of many samples some are better than others, whatever is drawn: else nothing would be learned.
    many = {"batch_size": 16, "num_generations": 8}
    code, _, err = folder.run(model=model, training={**training, **many, "lora_rank": 2 * ("LoRA" in start)})
    assert code == 0, err
    first, second = (line["kl"] for line in folder.lines())
    assert abs(first) <= 1e-6 < 1e-4 < second
    assert (tmp_path / "initial").exists() == (start == "fresh_weights")


def test_a_dry_run_loads_nothing(folder, monkeypatch):
    monkeypatch.setattr(train_grpo, "train", lambda *_, **__: pytest.fail("loaded"))
    code, out, _ = folder.run("--dry-run")
    assert code == 0
    assert summary_of(out)["num_prompts"] == 2 and summary_of(out)["num_steps"] == 2


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"reward": "sentense"}, ["'sentense'", '"sentence"', "FILE.py:FUNCTION"]),
        ({"reward": "none.py:f"}, ["none.py is no Python file"]),
        ({"reward": "own.py:short"}, ['no function "short"']),
        ({"reward": "own.py:not_a_function"}, ['no function "not_a_function"']),
        ({"num_generations": 3}, ["4 samples a step", "num_generations (3)"]),
        ({"learning_rate": 0}, ['"training.learning_rate" is 0']),
        ({"zero_stage": 4}, ['"training.zero_stage" is 4']),
        ({"generator": "vllm"}, ['"training.generator" is "vllm"']),
        ({"zero_stage": 0}, ['"training.zero_stage" is 0', "deepspeed --num_gpus 1", "to null"]),
    ],
)
def test_a_bad_training_section_is_said_in_one_line_before_anything_loads(folder, monkeypatch, training, words):
    monkeypatch.setattr(train_grpo, "train", lambda *_, **__: pytest.fail("loaded"))
    assert_refused(folder.run(training=training), *words)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"sampling": {"temperature": 0}}, ['"sampling.temperature" is 0', "alike"]),
        ({"input": None}, ['"input" is missing']),
        ({"tensor_parallel": {"tp_size": 2}}, ["1 process(es)"]),
        ({"sampling": {"max_new_tokens": 4}, "kv_cache_gib": 0.0001, "block_size": 1}, ["KV pool holds"]),
    ],
)
def test_a_config_that_cannot_train_is_refused(folder, config, words):
    if "kv_cache_gib" in config:
        folder.file("in.jsonl", {"prompt": " Recall: Alice" * 100, "id": "p0"})
    assert_refused(folder.run(**config), *words)


@pytest.mark.parametrize(
    ("key", "value"), [("stop", ["e"]), ("seed", 3), ("logit_bias", {"5": 1}), ("ignore_eos", True)]
)
def test_what_the_other_generator_would_leave_out_is_refused(folder, monkeypatch, key, value):
    monkeypatch.setattr(train_grpo, "train", lambda *_, **__: pytest.fail("loaded"))
    refused = folder.run(sampling={"max_new_tokens": 4, key: value}, training={"generator": "transformers"})
    assert_refused(refused, f'"sampling.{key}" is', "does not hand to Transformers", '"cpinfer"')


def test_an_overlong_prompt_trains_by_its_end_where_that_was_asked_for(folder):
    folder.file("in.jsonl", {"prompt": " Recall: Alice" * 100, "id": "p0"})
    small = {"kv_cache_gib": 0.0001, "block_size": 1, "rollout": {"overlong_prompts": "truncate_left"}}
    code, _, err = folder.run(**small, training={"num_steps": 1, "batch_size": 2})
    assert code == 0, err
    assert folder.lines()[0]["num_truncated_prompts"] == 2
    assert_refused(folder.run("--overwrite", **small, training={"generator": "transformers"}), "KV pool holds")


def test_prompts_of_token_ids_are_refused_since_trl_wants_texts(folder):
    folder.file("in.jsonl", {"prompt_token_ids": [1, 2]})
    assert_refused(folder.run(), "prompt 1 is token ids")


def test_what_is_no_output_of_the_tool_cannot_be_drawn_beside(folder):
    assert_refused(folder.run("--beside", "nowhere.jsonl"), "--beside nowhere.jsonl")
    path = folder.path / folder.file("other.jsonl", {"step": 1})
    assert_refused(folder.run("--beside", str(path)), "no output of train_grpo")


def test_a_reward_file_that_fails_to_load_says_how(tmp_path):
    (tmp_path / "bad.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(rewards.UserError, match="ModuleNotFoundError"):
        rewards.find_reward(f"{tmp_path}/bad.py:f")
