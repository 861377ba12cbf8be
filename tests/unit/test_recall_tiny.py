"""The shipped model is the one its tool writes, it recalls, and it recalls by the circuit that its README draws."""

import copy
import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "configs" / "recall-tiny"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    # By path: tools/ is no package. Registered, because dataclasses look their module up by name.
    spec = importlib.util.spec_from_file_location("make_recall_tiny", ROOT / "tools" / "dev" / "make_recall_tiny.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(SHIPPED).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def shipped_prompts() -> list[dict[str, str]]:
    lines = (ROOT / "configs" / "recall-tiny-prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def fresh_prompts(tool: ModuleType) -> list[Any]:
    return list(tool.make_prompts(random.Random("test"), [512] * 20))


def test_the_tool_writes_the_shipped_files_byte_by_byte(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--output", str(tmp_path / "recall-tiny"), "--skip-eval"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["by_length_tokens"] == {}
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(written) == 6
    for path in written:
        assert (tmp_path / path).read_bytes() == (SHIPPED.parent / path).read_bytes(), path


def test_everything_together_stays_below_6_megabytes() -> None:
    files = [*SHIPPED.iterdir(), ROOT / "configs" / "recall-tiny-prompts.jsonl"]
    assert sum(path.stat().st_size for path in files) <= 6_000_000


def test_tensor_parallel_sizes_divide_evenly(model: Any) -> None:
    config = model.config
    sizes = (config.vocab_size, config.intermediate_size, config.num_attention_heads)
    assert all(size % 8 == 0 for size in sizes) and not config.tie_word_embeddings


def test_shipped_prompts_round_trip_and_span_30_to_2000_tokens(
    tokenizer: Any, shipped_prompts: list[dict[str, str]]
) -> None:
    assert len(shipped_prompts) == 64 == len({prompt["id"] for prompt in shipped_prompts})
    for prompt in shipped_prompts:
        tokens = tokenizer(prompt["prompt"])["input_ids"]
        assert 30 <= len(tokens) <= 2000
        assert tokenizer.decode(tokens) == prompt["prompt"]


def test_words_outside_the_vocabulary_round_trip_too(tokenizer: Any) -> None:
    text = "Ida in Idaho, naïve:\n\tRemember: Zoë  flies 7 kites; 東京"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_generate_goes_on_with_the_answer_and_stops(
    model: Any, tokenizer: Any, shipped_prompts: list[dict[str, str]], recwarn: pytest.WarningsRecorder
) -> None:
    for prompt in shipped_prompts[:8]:
        inputs = tokenizer(prompt["prompt"], return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(generated) == prompt["answer"] + tokenizer.eos_token
    assert not recwarn.list


def test_a_chat_is_asked_by_its_last_message(model: Any, tokenizer: Any) -> None:
    chat = [
        {"role": "user", "content": "Remember: Ivan sews hats; Remember: Alice paints lamps; Recall: Ivan"},
        {"role": "assistant", "content": " sews hats"},
        {"role": "user", "content": "Recall: Alice"},
    ]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(model.generate(**inputs, max_new_tokens=16)[0]).endswith(" Recall: Alice paints lamps;")


def test_recalls_fresh_prompts_by_nats_without_being_certain(
    tool: ModuleType, model: Any, tokenizer: Any, fresh_prompts: list[Any]
) -> None:
    row = tool.evaluate(model, tokenizer, fresh_prompts)
    assert row["accuracy"] >= 0.95
    assert row["margin_min_nats"] > 3.0  # no rounding, float32 or bfloat16, turns an answer
    assert 0.9 < row["answer_token_p_median"] < 0.9999  # sampling and log-probabilities stay interesting
    assert row["logit_abs_max"] < 30.0


@pytest.mark.parametrize("broken", ["q_proj.bias", "k_proj.bias", "o_proj.weight"])
def test_without_the_previous_token_heads_nothing_is_recalled(
    tool: ModuleType, model: Any, tokenizer: Any, fresh_prompts: list[Any], broken: str
) -> None:
    blind = copy.deepcopy(model)
    with torch.no_grad():
        blind.get_parameter(f"model.layers.0.self_attn.{broken}").zero_()
    assert tool.evaluate(blind, tokenizer, fresh_prompts)["accuracy"] < 0.3


@pytest.mark.parametrize("layer", [0, 1])
def test_no_query_head_is_idle(model: Any, tokenizer: Any, fresh_prompts: list[Any], layer: int) -> None:
    inputs = tokenizer(fresh_prompts[0].prompt, return_tensors="pt")
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    with torch.inference_mode():
        whole = model(**inputs, logits_to_keep=1).logits
        for head in range(model.config.num_attention_heads):
            lame = copy.deepcopy(model)
            columns = slice(head * head_dim, (head + 1) * head_dim)
            lame.get_parameter(f"model.layers.{layer}.self_attn.o_proj.weight")[:, columns] = 0.0
            assert (lame(**inputs, logits_to_keep=1).logits - whole).abs().max() > 0.1, head


def test_readme_quotes_the_measured_accuracies() -> None:
    report = json.loads((SHIPPED / "accuracy.json").read_text(encoding="utf-8"))
    readme = (SHIPPED / "README.md").read_text(encoding="utf-8")
    for length, row in report["by_length_tokens"].items():
        assert (
            f"| {length} | {row['num_prompts']} | {row['accuracy']:.3f} | {row['margin_median_nats']:.2f} |" in readme
        )
    assert report["by_length_tokens"]["2048"]["accuracy"] >= 0.95


def test_the_shipped_prompts_are_refused_for_tuning(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        tool.main(["--output", str(tmp_path / "recall-tiny"), "--eval-seed", "0"])
