"""What a model's generation_config says of sampling: taken by who asks for it, all of it or an error."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import GenerationConfig

import cpinfer
from cpinfer.config import SamplingParams
from cpinfer.errors import UserError
from cpinfer.models.generation_config import sampling_keys
from cpinfer_tools.evaluation.questions import DEFAULTS
from cpinfer_tools.run_config import load_run_config
from tiny_models import FAMILIES, make_model

RECALL_TINY = Path(__file__).parents[2] / "configs" / "recall-tiny"
# As Qwen2.5-Instruct has it.
QWEN = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
SAID = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}


def test_what_it_says_of_sampling_is_taken_and_the_rest_is_not_of_sampling():
    said = {**QWEN, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 1, "transformers_version": "4.37.0"}
    assert sampling_keys(said) == SAID
    assert sampling_keys(GenerationConfig(**said).to_dict()) == SAID
    assert sampling_keys({"stop_strings": ["a"], "max_new_tokens": 7, "min_new_tokens": 2}) == {
        "stop": ["a"], "max_new_tokens": 7, "min_new_tokens": 2,
    }  # fmt: skip


def test_a_silent_one_says_nothing_and_none_of_transformers_own_defaults():
    assert sampling_keys({}) == sampling_keys(GenerationConfig().to_dict()) == {}
    assert sampling_keys(GenerationConfig(do_sample=True).to_dict()) == {}


def test_no_sampling_is_temperature_0():
    assert sampling_keys({**QWEN, "do_sample": False}) == {"temperature": 0.0, "repetition_penalty": 1.05}


@pytest.mark.parametrize(
    ("key", "value", "neutral"),
    [
        ("num_beams", 4, 1),
        ("no_repeat_ngram_size", 3, 0),
        ("suppress_tokens", [1], []),
        ("typical_p", 0.9, 1.0),
        ("min_length", 5, 0),
        ("guidance_scale", 1.5, 1.0),
        ("sequence_bias", [[[1], 2.0]], None),
    ],
)
def test_what_would_choose_other_tokens_and_is_unknown_is_refused_by_name(key, value, neutral):
    with pytest.raises(UserError, match=f'"{key}": .* which cpinfer does not know'):
        sampling_keys({**QWEN, key: value})
    assert sampling_keys({**QWEN, key: neutral}) == SAID


def test_an_engine_gives_its_models_and_takes_it_only_when_it_is_handed_over():
    model = make_model(FAMILIES["llama"])
    model.generation_config = GenerationConfig(**QWEN)
    with cpinfer.attach(model, kv_cache_gib=2**-7) as engine:
        assert engine.default_sampling_params() == SamplingParams(**SAID)
        changed = engine.default_sampling_params(temperature=0, max_new_tokens=3)
        assert changed == SamplingParams(**{**SAID, "temperature": 0.0, "max_new_tokens": 3})
        (plain,), (own,) = (
            engine.generate({"prompt_token_ids": [1, 2, 3], "id": "a"}, SamplingParams(seed=1)) for _ in range(2)
        )
        assert plain.token_ids == own.token_ids
        model.generation_config.num_beams = 2
        with pytest.raises(UserError, match="num_beams"):
            engine.default_sampling_params()


def config_over(tmp_path, said, **keys):
    """A config beside a model that has this generation_config."""
    shutil.copytree(RECALL_TINY, tmp_path / "model", dirs_exist_ok=True)
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(said))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model": "./model", **keys}))
    return path


def test_a_config_asks_for_it_and_what_it_says_itself_wins(tmp_path):
    asks = {"generation_config": "model"}
    assert load_run_config(config_over(tmp_path, QWEN)).sampling == SamplingParams()
    assert load_run_config(config_over(tmp_path, QWEN, **asks)).sampling == SamplingParams(**SAID)
    path = config_over(tmp_path, QWEN, **asks, sampling={"top_k": 5, "n": 2})
    assert load_run_config(path, ["sampling.top_p=1"]).sampling == SamplingParams(
        **{**SAID, "top_k": 5, "n": 2, "top_p": 1.0}
    )
    # An evaluation is greedy unless somebody says otherwise, and here the model does.
    assert load_run_config(path, [], DEFAULTS).sampling.temperature == 0.7
    assert load_run_config(config_over(tmp_path, {}, **asks), [], DEFAULTS).sampling.temperature == 0


def test_a_config_that_asks_for_one_that_is_not_known_names_both(tmp_path):
    path = config_over(tmp_path, {"num_beams": 4}, generation_config="model")
    with pytest.raises(UserError, match=r'config .*config\.json: the model.*"num_beams": 4'):
        load_run_config(path)
    load_run_config(path, ["generation_config=ignore"])
