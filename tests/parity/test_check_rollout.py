"""What Transformers answers alone is what the model says, whatever its own settings for chats say."""

import pytest
import torch
from test_engine_parity import generate

import cpinfer
from cpinfer.config import SamplingParams
from cpinfer.layout.grid import RankGrid
from cpinfer_tools.run_config import parse_run_config
from cpinfer_tools.verify import check_rollout
from tiny_models import FAMILIES, make_model, prompts_of


def test_the_penalty_that_a_chat_model_asks_for_is_left_out():
    model = make_model(FAMILIES["qwen2"])
    [prompt] = prompts_of((40,), vocab_size=128)
    plain = check_rollout.generate_greedy(model, prompt, 12)
    model.generation_config.update(repetition_penalty=1.8, do_sample=True, temperature=0.7, top_k=20)
    assert check_rollout.generate_greedy(model, prompt, 12) == plain


PROMPTS = prompts_of((9, 40, 3), vocab_size=128)
GREEDY = {"temperature": 0, "max_new_tokens": 10}


def lines_of(model, grid, sampling, prompts=PROMPTS):
    return [
        {"prompt_token_ids": r.prompt_token_ids, "token_ids": list(r.token_ids), "logprobs": r.logprobs}
        for r in generate(model, grid, prompts, SamplingParams(**sampling))
    ]


@pytest.fixture(scope="module")
def ending_model():
    """A model whose answers end by a token of its own soon."""
    model = make_model(FAMILIES["qwen2"])
    answers = lines_of(model, RankGrid(), GREEDY)
    ends = sorted({line["token_ids"][2] for line in answers})
    model.generation_config.eos_token_id = ends
    return model


@pytest.mark.parametrize("grid", [RankGrid(), RankGrid(pcp_size=2, dcp_size=2)], ids=["alone", "pcp2_dcp2"])
@pytest.mark.parametrize(
    "options",
    [
        {"ignore_eos": True},
        {"min_new_tokens": 5},
        {"logit_bias": {7: 12.5, 9: -4.0}},
        {"repetition_penalty": 1.6},
        {"stop_token_ids": [3, 4, 5, 6]},
        {"ignore_eos": True, "min_new_tokens": 4, "stop_token_ids": list(range(64)), "repetition_penalty": 0.8},
    ],
    ids=lambda options: "_".join(options),
)
def test_a_right_rollout_is_right_whatever_it_was_sampled_with(ending_model, grid, options):
    sampling = {**GREEDY, **options}
    found = check_rollout.compare(
        ending_model, lines_of(ending_model, grid, sampling), parse_run_config({"sampling": sampling})
    )
    assert found["num_same_tokens"] == found["num_greedy"] == len(PROMPTS)
    assert found["max_abs_logprob_difference"] <= 1e-4


def test_a_rollout_that_was_sampled_otherwise_is_found_out(ending_model):
    """The control: each option changes an answer, and a check that knows nothing of it says so."""
    config = parse_run_config({"sampling": GREEDY})
    for options in (
        {"ignore_eos": True},
        {"min_new_tokens": 5},
        {"logit_bias": {7: 12.5}},
        {"repetition_penalty": 1.6},
    ):
        lines = lines_of(ending_model, RankGrid(), {**GREEDY, **options})
        assert check_rollout.compare(ending_model, lines, config)["num_same_tokens"] < len(PROMPTS), options


def test_a_line_that_says_how_it_was_sampled_is_taken_at_its_word(ending_model):
    lines = lines_of(ending_model, RankGrid(), GREEDY, PROMPTS[:2])
    own = {"ignore_eos": True, "max_new_tokens": 8, "logit_bias": {"7": 12.5}}
    for line in lines_of(ending_model, RankGrid(), {**GREEDY, **own, "logit_bias": {7: 12.5}}, PROMPTS[2:]):
        lines.append({**line, "sampling": own})
    sampled = {"temperature": 1.0, "max_new_tokens": 4}
    for line in lines_of(ending_model, RankGrid(), sampled, PROMPTS[:1]):
        lines.append({**line, "sampling": sampled})
    found = check_rollout.compare(ending_model, lines, parse_run_config({"sampling": GREEDY}))
    assert (found["num_samples"], found["num_greedy"], found["num_same_tokens"]) == (4, 3, 3)


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
