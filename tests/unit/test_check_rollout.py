"""What Transformers answers alone is what the model says, whatever its own settings for chats say."""

import pytest
import torch

import cpinfer
from cpinfer.config import SamplingParams
from cpinfer_tools.run_config import parse_run_config
from cpinfer_tools.verify import check_rollout
from tiny_models import FAMILIES, make_model, prompts_of


def test_the_penalty_that_a_chat_model_asks_for_is_left_out():
    model = make_model(FAMILIES["qwen2"])
    [prompt] = prompts_of((40,), vocab_size=128)
    plain = check_rollout.generate_greedy(model, prompt, 12)
    model.generation_config.update(repetition_penalty=1.8, do_sample=True, temperature=0.7, top_k=20)
    assert check_rollout.generate_greedy(model, prompt, 12) == plain


@pytest.mark.parametrize("kept", ["auto", "fp8"])
def test_a_rollout_is_compared_with_transformers_through_a_cache_of_its_own_dtype(kept):
    model = make_model(FAMILIES["llama"])
    sampling = {"temperature": 0, "max_new_tokens": 6}
    config = parse_run_config({"dtype": "float32", "kv_cache_dtype": kept, "sampling": sampling})
    with cpinfer.attach(model, config=config) as engine:
        results = [
            {"prompt_token_ids": r.prompt_token_ids, "token_ids": list(r.token_ids), "logprobs": r.logprobs}
            for r in engine.generate(prompts_of((9, 40), vocab_size=128), SamplingParams(**sampling))
        ]
    found = check_rollout.compare(model, results, config)
    assert found["num_same_tokens"] == 2 and found["max_abs_logprob_difference"] <= 1e-4
    other = parse_run_config({"dtype": "float32", "kv_cache_dtype": "fp8" if kept == "auto" else "auto"})
    assert check_rollout.compare(model, results, other)["max_abs_logprob_difference"] > 0.05


def test_a_cache_that_rounds_gives_the_largest_number_for_what_is_larger():
    model = make_model(FAMILIES["llama"])
    cache = check_rollout.RoundedCache(model.config, torch.float8_e4m3fn)
    k = torch.tensor([449.0, -1e9, 17.0, 0.3]).view(1, 1, 1, 4)
    assert cache.update(k, k, 0)[0].flatten().tolist() == [448, -448, 16, 0.3125]
