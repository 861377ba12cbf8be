"""Faults that were reported of other engines, tried here beside Transformers; tests/public_reports.py says of which."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Gemma3TextConfig, TopPLogitsWarper

import cpinfer
from chain_models import chain_of, make_chain
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine.request import RolloutResult
from cpinfer.errors import UserError
from cpinfer.layout.grid import RankGrid
from cpinfer.models.loading import load_model
from cpinfer_tools.verify import check_rollout
from tiny_models import FAMILIES, TINY, make_model, prompts_of

# Its newer name is not in all versions of Transformers that run here.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
GRIDS = pytest.mark.parametrize("grid", [RankGrid(), RankGrid(pcp_size=2, dcp_size=2)], ids=["one_rank", "pcp2_dcp2"])
TOKENIZER = AutoTokenizer.from_pretrained("configs/recall-tiny")
PAD = TOKENIZER.pad_token_id
# Its ends of words; ";" is a special token, and nobody's end of text where a test does not say so.
WORDS = " Alice Basil; Amos Bella"
TOLERANCE = 1e-4


def ask(
    model: Any,
    grid: RankGrid,
    body: Callable[[cpinfer.Engine], list[RolloutResult]],
    tokenizer: Any = None,
    **config: Any,
) -> list[RolloutResult]:
    """What `body(engine)` gives on the ranks of `grid`, each with a copy of `model`; they must agree."""
    return ask_with_model(model, grid, lambda engine, _: body(engine), tokenizer, **config)


def ask_with_model(
    model: Any,
    grid: RankGrid,
    body: Callable[[cpinfer.Engine, Any], list[RolloutResult]],
    tokenizer: Any = None,
    **config: Any,
) -> list[RolloutResult]:
    """The same of a `body(engine, model)` that is given the rank's copy too."""
    parsed = parse_config(
        {
            "dtype": "float32",
            "prefill_context_parallel_size": grid.pcp_size,
            "decode_context_parallel_size": grid.dcp_size,
            "kv_cache_gib": 2**-8,
            "block_size": 4,
            "cp_kv_cache_interleave_size": 2,
            **config,
        }
    )

    def run(topology: cpinfer.Topology) -> list[RolloutResult]:
        own = copy.deepcopy(model)
        with cpinfer.attach(own, topology, parsed, tokenizer=tokenizer) as engine:
            return body(engine, own)

    first, *others = run_ranks(grid, run)
    for other in others:
        assert [(r.token_ids, r.logprobs) for r in other] == [(r.token_ids, r.logprobs) for r in first]
    return first


def answer(model: Any, grid: RankGrid, prompt: Sequence[int], **sampling: Any) -> RolloutResult:
    """The greedy answer to a prompt of token ids."""
    params = SamplingParams(temperature=0, **{"max_new_tokens": 12, **sampling})
    return ask(model, grid, lambda engine: engine.generate([list(prompt)], params), TOKENIZER)[0]


def of_transformers(model: Any, prompt: Sequence[int], max_new_tokens: int = 12, **options: Any) -> list[int]:
    """The tokens of the same answer by `generate`."""
    ids = torch.tensor([list(prompt)])
    options = {"do_sample": False, "pad_token_id": PAD, "tokenizer": TOKENIZER, **options}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **options)
    return [int(token) for token in out[0, len(prompt) :]]


def speaker(text: str, **config: Any) -> tuple[Any, int]:
    """A model that says `text`, and then "!" for ever, to the prompt "h"; and that prompt."""
    tokens = TOKENIZER("h" + text)["input_ids"]
    return make_chain(chain_of(tokens), len(TOKENIZER), **config), tokens[0]


# --- where an answer ends ---


@GRIDS
@pytest.mark.parametrize(
    ("stop", "text"), [(";", " Alice Basil"), ("l; A", " Alice Basi"), ("; Amos", " Alice Basil")], ids=str
)
def test_a_stop_string_with_a_special_token_ends_the_answer(stop: str, text: str, grid: RankGrid) -> None:
    model, prompt = speaker(WORDS)
    result = answer(model, grid, [prompt], stop=(stop,))
    assert list(result.token_ids) == of_transformers(model, [prompt], stop_strings=[stop])
    assert (result.text, result.finish_reason) == (text, "stop")


@GRIDS
@pytest.mark.parametrize(
    ("stop", "text"), [("ce Ba", " Ali"), (" Bas", " Alice"), ("sil", " Alice Ba"), ("lla", " Alice Basil Amos Be")]
)
def test_a_stop_string_may_begin_and_end_within_tokens(stop: str, text: str, grid: RankGrid) -> None:
    model, prompt = speaker(WORDS)
    result = answer(model, grid, [prompt], stop=(stop,))
    assert list(result.token_ids) == of_transformers(model, [prompt], stop_strings=[stop])
    assert (result.text, result.finish_reason) == (text, "stop")


@GRIDS
def test_a_special_token_that_ends_an_answer_costs_its_text_no_character(grid: RankGrid) -> None:
    model, prompt = speaker(WORDS)
    result = answer(model, grid, [prompt], stop_token_ids=(TOKENIZER.eos_token_id,))
    assert list(result.token_ids) == of_transformers(model, [prompt], eos_token_id=TOKENIZER.eos_token_id)
    assert (result.text, result.finish_reason) == (" Alice Basil", "stop")


@GRIDS
@pytest.mark.parametrize("length", [1, 3, 7, 12, 14])
def test_characters_of_several_tokens_come_out_as_the_tokenizer_reads_them(length: int, grid: RankGrid) -> None:
    model, prompt = speaker("→wörld🌍fin")
    expected = TOKENIZER.decode(of_transformers(model, [prompt], length))
    assert answer(model, grid, [prompt], max_new_tokens=length).text == expected


@GRIDS
@pytest.mark.parametrize(("stop", "text"), [("🌍", "→wörld"), ("ö", "→w"), ("rld🌍f", "→wö")], ids=str)
def test_characters_of_several_tokens_may_be_stop_strings(stop: str, text: str, grid: RankGrid) -> None:
    model, prompt = speaker("→wörld🌍fin")
    result = answer(model, grid, [prompt], max_new_tokens=20, stop=(stop,))
    assert list(result.token_ids) == of_transformers(model, [prompt], 20, stop_strings=[stop])
    assert (result.text, result.finish_reason) == (text, "stop")


# "h" would be followed by any of three ends, were they allowed, and so would what follows it.
ENDS = TOKENIZER("XYZ")["input_ids"]


@GRIDS
@pytest.mark.parametrize("minimum", range(5))
@pytest.mark.parametrize("told", ["by_the_model", "by_the_call"])
def test_no_token_that_ends_an_answer_is_chosen_before_the_minimum(told: str, minimum: int, grid: RankGrid) -> None:
    tokens = TOKENIZER("habcde")["input_ids"]
    followers = {token: [*ENDS, *after] for token, after in chain_of(tokens).items()}
    model = make_chain(followers, len(TOKENIZER))
    call: dict[str, Any] = {"stop_token_ids": tuple(ENDS)}
    if told == "by_the_model":
        model.generation_config.eos_token_id, call = ENDS, {}
    result = answer(model, grid, tokens[:1], min_new_tokens=minimum, **call)
    expected = of_transformers(model, tokens[:1], eos_token_id=ENDS, min_new_tokens=minimum)
    assert list(result.token_ids) == expected and len(expected) == minimum + 1
    assert result.finish_reason == "stop"


@GRIDS
@pytest.mark.parametrize(
    ("minimum", "num_tokens", "text"),
    [
        (0, 3, "ab"),
        (2, 3, "ab"),
        (3, 6, "abcde"),
        (6, 12, "abcdefg!!!!!"),
    ],
)
def test_a_stop_string_before_the_minimum_neither_ends_nor_cuts_an_answer(
    minimum: int, num_tokens: int, text: str, grid: RankGrid
) -> None:
    model, prompt = speaker("abcdefg")
    result = answer(model, grid, [prompt], stop=("c", "f"), min_new_tokens=minimum)
    assert (len(result.token_ids), result.text) == (num_tokens, text)


@GRIDS
def test_an_answer_ends_at_the_end_tokens_that_the_model_names_and_at_no_other(grid: RankGrid) -> None:
    """The model's list and the tokenizer's one differ, as they do where a chat ends by a token of its own."""
    model, prompt = speaker(WORDS)
    [after] = TOKENIZER(" Amos")["input_ids"]
    model.generation_config.eos_token_id = [PAD, after]
    result = answer(model, grid, [prompt])
    assert list(result.token_ids) == of_transformers(model, [prompt])
    assert result.token_ids[-1] == after and TOKENIZER.eos_token_id in result.token_ids


# --- which tokens, and how likely ---


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model(FAMILIES["llama"])


PROMPTS = prompts_of((70, 3, 150), vocab_size=128)


@GRIDS
def test_logprobs_are_those_of_the_model_and_processed_ones_those_of_what_is_drawn_from(
    llama: Any, grid: RankGrid
) -> None:
    sampling = SamplingParams(temperature=0.6, top_p=0.9, max_new_tokens=8, n=2, seed=4)
    for result in ask(llama, grid, lambda engine: engine.generate(PROMPTS, sampling)):
        ids = torch.tensor([[*result.prompt_token_ids, *result.token_ids]])
        with torch.no_grad():
            logits = llama(ids).logits[0, len(result.prompt_token_ids) - 1 : -1]
        tokens = torch.tensor(result.token_ids).unsqueeze(-1)
        drawn_from = TopPLogitsWarper(0.9)(ids, logits / 0.6)
        raw, processed = (torch.log_softmax(x, dim=-1).gather(-1, tokens).squeeze(-1) for x in (logits, drawn_from))
        assert list(result.logprobs) == pytest.approx(raw.tolist(), abs=TOLERANCE)
        assert list(result.processed_logprobs) == pytest.approx(processed.tolist(), abs=TOLERANCE)
        assert (raw - processed).abs().max() > 100 * TOLERANCE, "one could be taken for the other"


@GRIDS
@pytest.mark.parametrize("has_mask", [False, True], ids=["all_tokens", "masked_tokens"])
def test_logprobs_can_be_written_as_json_whatever_may_be_drawn(has_mask: bool, llama: Any, grid: RankGrid) -> None:
    model = copy.deepcopy(llama)
    if has_mask:
        model.lm_head.register_forward_hook(mask_padding)
    sampling = SamplingParams(top_k=1, max_new_tokens=4, top_logprobs=128)
    for result in ask(model, grid, lambda engine: engine.generate(PROMPTS, sampling)):
        json.dumps([result.logprobs, result.processed_logprobs, result.top_logprobs], allow_nan=False)
        assert result.top_logprobs is not None and len(result.top_logprobs[0]) == (100 if has_mask else 128)


@GRIDS
def test_logprobs_of_a_prompt_do_not_depend_on_what_is_cached_of_it(llama: Any, grid: RankGrid) -> None:
    sampling = SamplingParams(temperature=0, max_new_tokens=2, prompt_logprobs=True)

    def body(engine: cpinfer.Engine) -> list[RolloutResult]:
        return [r for prompt in (PROMPTS[2][:90], PROMPTS[2], PROMPTS[2]) for r in engine.generate([prompt], sampling)]

    for config in ({}, {"max_num_batched_tokens": 33}):
        for result in ask(llama, grid, body, **config):
            prompt = list(result.prompt_token_ids)
            expected = check_rollout.score(llama, prompt[:1], prompt[1:]).tolist()
            assert result.prompt_logprobs is not None and result.prompt_logprobs[0] is None
            assert list(result.prompt_logprobs[1:]) == pytest.approx(expected, abs=TOLERANCE)


@GRIDS
@pytest.mark.parametrize("config", [{}, {"max_num_batched_tokens": 33}], ids=["whole", "chunks"])
def test_a_repetition_penalty_counts_the_prompt_cached_or_not(
    llama: Any, config: dict[str, Any], grid: RankGrid
) -> None:
    sampling = SamplingParams(temperature=0, max_new_tokens=10, repetition_penalty=1.8)
    results = ask(llama, grid, lambda e: [*e.generate(PROMPTS, sampling), *e.generate(PROMPTS, sampling)], **config)
    for result in results:
        prompt = result.prompt_token_ids
        expected = of_transformers(llama, prompt, 10, repetition_penalty=1.8)
        assert list(result.token_ids) == expected
    assert any(list(r.token_ids) != of_transformers(llama, r.prompt_token_ids, 10) for r in results)


@GRIDS
def test_samples_of_one_call_differ_and_each_is_drawn_again_by_its_seed(llama: Any, grid: RankGrid) -> None:
    sampling = SamplingParams(max_new_tokens=8, n=6, seed=123)
    prompt = [{"id": "p", "prompt_token_ids": PROMPTS[1]}]
    others = [{"id": f"q{i}", "prompt_token_ids": p} for i, p in enumerate(PROMPTS)]

    def body(engine: cpinfer.Engine) -> list[RolloutResult]:
        return [*engine.generate(prompt, sampling), *engine.generate([*others, *prompt], sampling)]

    results = [r for r in ask(llama, grid, body, max_num_seqs=5) if r.id == "p"]
    first, again = results[:6], results[6:]
    assert len({r.token_ids for r in first}) == 6
    assert [r.token_ids for r in again] == [r.token_ids for r in first]


@GRIDS
def test_a_generation_config_does_not_sample_unasked(llama: Any, grid: RankGrid) -> None:
    model = copy.deepcopy(llama)
    model.generation_config.update(do_sample=True, temperature=0.1, top_k=1, top_p=0.001, repetition_penalty=1.8)
    sampling = SamplingParams(max_new_tokens=8, n=3)
    given, plain = (ask(m, grid, lambda engine: engine.generate(PROMPTS, sampling)) for m in (model, llama))
    assert [r.token_ids for r in given] == [r.token_ids for r in plain]
    assert [r.processed_logprobs for r in given] == [r.processed_logprobs for r in plain]


@GRIDS
def test_a_generation_config_that_is_asked_for_is_followed(llama: Any, grid: RankGrid) -> None:
    model = copy.deepcopy(llama)
    model.generation_config.update(do_sample=False, repetition_penalty=1.8)
    results = ask(model, grid, lambda e: e.generate(PROMPTS, e.default_sampling_params(max_new_tokens=10)))
    found = [list(r.token_ids) for r in results]
    assert found == [of_transformers(model, prompt, 10) for prompt in PROMPTS]
    assert found != [of_transformers(llama, prompt, 10) for prompt in PROMPTS]


# --- the ends of the vocabulary ---


@GRIDS
@pytest.mark.parametrize("key", ["logit_bias", "stop_token_ids"])
def test_a_token_beyond_the_vocabulary_is_refused_and_the_engine_goes_on(key: str, llama: Any, grid: RankGrid) -> None:
    value: Any = ((128, 1.0),) if key == "logit_bias" else (128,)

    def body(engine: cpinfer.Engine) -> list[RolloutResult]:
        with pytest.raises(UserError, match=f'"{key}" has token id 128; the vocabulary has 128 tokens'):
            engine.generate(PROMPTS, SamplingParams(**{key: value}))
        return engine.generate(PROMPTS, SamplingParams(temperature=0, max_new_tokens=3))

    for result in ask(llama, grid, body):
        assert list(result.token_ids) == check_rollout.generate_greedy(llama, result.prompt_token_ids, 3)


@GRIDS
def test_tokens_of_a_padded_vocabulary_may_be_masked_by_minus_infinity(llama: Any, grid: RankGrid) -> None:
    model = copy.deepcopy(llama)
    model.lm_head.register_forward_hook(mask_padding)
    greedy, sampled = SamplingParams(temperature=0, max_new_tokens=8), SamplingParams(max_new_tokens=8, n=4)
    for result in ask(model, grid, lambda e: [*e.generate(PROMPTS, greedy), *e.generate(PROMPTS, sampled)]):
        assert max(result.token_ids) < 100
        expected = check_rollout.score(model, result.prompt_token_ids, result.token_ids)
        assert list(result.logprobs) == pytest.approx(expected.tolist(), abs=TOLERANCE)
    free = ask(llama, grid, lambda e: e.generate(PROMPTS, sampled))
    assert max(token for r in free for token in r.token_ids) >= 100, "nothing would have been masked"


def mask_padding(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
    """A forward hook on a head: tokens from 100 on are padding."""
    padding = torch.arange(logits.shape[-1]) >= 100
    return logits.masked_fill(padding, -torch.inf)


@GRIDS
def test_a_token_that_the_tokenizer_does_not_know_is_text_as_transformers_decodes_it(grid: RankGrid) -> None:
    unknown = len(TOKENIZER) + 5
    tokens = TOKENIZER("hab")["input_ids"]
    model = make_chain(chain_of([*tokens[:2], unknown, tokens[2]]), len(TOKENIZER) + 32)
    result = answer(model, grid, tokens[:1], stop=("b",))
    assert list(result.token_ids) == of_transformers(model, tokens[:1], 3) == [tokens[1], unknown, tokens[2]]
    assert (result.text, result.finish_reason) == (TOKENIZER.decode([tokens[1], unknown]), "stop")


# --- what is kept ---


@GRIDS
def test_after_new_weights_nothing_of_the_old_ones_is_reused(llama: Any, grid: RankGrid) -> None:
    sampling = SamplingParams(temperature=0, max_new_tokens=6)

    def train(model: Any) -> None:
        """Other values from the first layer on, so that KV of all layers would be another."""
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.mul_(-3)

    def body(engine: cpinfer.Engine, model: Any) -> list[RolloutResult]:
        old = engine.generate(PROMPTS, sampling)
        train(model)
        engine.weights_changed()
        return [*old, *engine.generate(PROMPTS, sampling)]

    new = copy.deepcopy(llama)
    train(new)
    results = ask_with_model(llama, grid, body)
    for result in results:
        model = new if result.weights_version else llama
        assert list(result.token_ids) == check_rollout.generate_greedy(model, result.prompt_token_ids, 6)
    assert [r.token_ids for r in results[:3]] != [r.token_ids for r in results[3:]]


# --- windows ---


@GRIDS
def test_a_window_that_no_layer_has_hides_nothing(grid: RankGrid) -> None:
    """The config names a window, and that all layers see all; what is asked for lies beyond the window."""
    config = {**TINY, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}
    model = make_model(Gemma3TextConfig(**config, layer_types=["full_attention"] * 2))
    windowed = make_model(Gemma3TextConfig(**config, layer_types=["sliding_attention"] * 2))
    sampling = SamplingParams(temperature=0, max_new_tokens=8)
    results = ask(model, grid, lambda engine: engine.generate(PROMPTS, sampling), max_num_batched_tokens=33)
    found = [list(r.token_ids) for r in results]
    assert found == [check_rollout.generate_greedy(model, prompt, 8) for prompt in PROMPTS]
    assert found != [check_rollout.generate_greedy(windowed, prompt, 8) for prompt in PROMPTS]


# --- chats ---


@GRIDS
def test_a_template_that_writes_the_first_token_gets_no_second_one(grid: RankGrid) -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.bos_token = tokenizer.pad_token
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = [{"role": "user", "content": "h"}]
    model, _ = speaker("ab")
    sampling = SamplingParams(max_new_tokens=1)
    [result] = ask(model, grid, lambda engine: engine.generate([{"messages": chat}], sampling), tokenizer)
    assert list(result.prompt_token_ids) == [PAD, *TOKENIZER("h")["input_ids"]]


@GRIDS
def test_text_in_parts_is_the_text(grid: RankGrid) -> None:
    parts = [{"type": "text", "text": "Remember"}, {"type": "text", "text": "Amos"}]
    chats = [[{"role": "user", "content": content}] for content in (parts[:1], "Remember", parts, "Remember\nAmos")]
    model, _ = speaker("ab")
    sampling = SamplingParams(temperature=0, max_new_tokens=1)
    results = ask(model, grid, lambda engine: engine.generate(chats, sampling), TOKENIZER)
    one, same_as_one, two, same_as_two = [r.prompt_token_ids for r in results]
    assert one == same_as_one and two == same_as_two and one != two


@GRIDS
@pytest.mark.parametrize("content", ["keeps", [{"type": "text", "text": "keeps"}]], ids=["text", "parts"])
def test_an_assistant_message_at_the_end_is_continued(content: Any, grid: RankGrid) -> None:
    chat = [{"role": "user", "content": "Recall: Amos"}, {"role": "assistant", "content": content}]
    model, _ = speaker("ab")
    sampling = SamplingParams(temperature=0, max_new_tokens=1)
    [result] = ask(model, grid, lambda engine: engine.generate([{"messages": chat}], sampling), TOKENIZER)
    chat[-1] = {"role": "assistant", "content": "keeps"}
    expected = TOKENIZER.apply_chat_template(chat, continue_final_message=True, return_dict=False)
    assert list(result.prompt_token_ids) == expected
    assert TOKENIZER.decode(expected).endswith("keeps")


# --- loading ---


@GRIDS
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_that_is_not_installed_is_not_missed(key: str, tmp_path: Path, grid: RankGrid) -> None:
    folder = tmp_path / "model"
    shutil.copytree("configs/recall-tiny", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, key: "flash_attention_2"}), encoding="utf-8")
    prompt = TOKENIZER("Remember: Amos keeps lanterns; Remember: Tomas owns clocks; Recall: Amos")["input_ids"]
    result = answer(load_model(str(folder), torch.float32), grid, prompt)
    plain = load_model("configs/recall-tiny", torch.float32)
    assert list(result.token_ids) == of_transformers(plain, prompt)
    assert result.text == " keeps lanterns"
