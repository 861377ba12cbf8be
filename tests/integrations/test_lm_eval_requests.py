"""What lm-eval's requests ask at their edges: choices without tokens, repeats, generation arguments, refusals.

Beside lm-eval's `hf` model on the same weights, at one rank and with the context parallel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import cpinfer
from cpinfer.comm.threads import run_ranks
from cpinfer.config import parse_config
from cpinfer.layout.grid import RankGrid
from cpinfer.models.loading import load_model, load_tokenizer
from cpinfer_integrations.lm_eval import CpinferLM

MODEL = "configs/recall-tiny"
MAX_LENGTH = 96
TOLERANCE = 1e-4
SHORT = "Remember: Amos keeps lanterns; Remember: Tomas owns clocks; Recall: Amos"
WILD = "The wild garden"
WRITTEN = {"kv_cache_gib": 2**-7, "dtype": "float32", "block_size": 4}
LAYOUTS = [
    pytest.param(RankGrid(), id="one_rank"),
    pytest.param(RankGrid(pcp_size=2, dcp_size=2), id="pcp2_dcp2"),
]
T = TypeVar("T")


@pytest.fixture(scope="module")
def weights() -> Any:
    return load_model(MODEL, torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def theirs(weights: Any, tokenizer: Any) -> HFLM:
    return HFLM(copy.deepcopy(weights), tokenizer=tokenizer, batch_size=1, max_length=MAX_LENGTH)


def on_all_ranks(grid: RankGrid, weights: Any, tokenizer: Any, ask: Callable[[CpinferLM], T], **args: Any) -> T:
    """What a model says on each rank of a grid; it must be the same."""
    sizes = {"prefill_context_parallel_size": grid.pcp_size, "decode_context_parallel_size": grid.dcp_size}
    config = parse_config({**WRITTEN, **sizes})

    def body(topology: cpinfer.Topology) -> T:
        with cpinfer.attach(copy.deepcopy(weights), topology, config, tokenizer=tokenizer) as engine:
            return ask(CpinferLM(engine, topology, tokenizer, **{"max_length": MAX_LENGTH, **args}))

    told = run_ranks(grid, body)
    assert all(other == told[0] for other in told)
    return told[0]


def requests(kind: str, all_args: Sequence[tuple[Any, ...]]) -> list[Instance]:
    """As lm-eval makes them: of documents 100, 101, ... of the task `recall`."""
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=("recall", 100 + i, 1))  # type: ignore[arg-type]
        for i, args in enumerate(all_args)
    ]


def generated(model: Any, all_args: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    return list(model.generate_until(requests("generate_until", copy.deepcopy(list(all_args))), disable_tqdm=True))


def scored(model: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    return list(model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True))


def assert_scores(found: Sequence[tuple[float, bool]], wanted: Sequence[tuple[float, bool]]) -> None:
    assert [flag for _, flag in found] == [flag for _, flag in wanted]
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in wanted], abs=TOLERANCE)


@pytest.mark.parametrize("grid", LAYOUTS)
def test_a_choice_without_a_token_of_its_own_is_certain_as_to_lm_evals_own_model(
    grid: RankGrid, weights: Any, tokenizer: Any, theirs: HFLM
) -> None:
    # " keep" and "s" make one token together, of which nothing is left behind the six of the context.
    assert len(tokenizer.encode(SHORT + " keeps")) < len(tokenizer.encode(SHORT + " keep"))
    beside_others = [(SHORT + " keep", "s"), (SHORT + " keep", " owns"), (SHORT + " keep", ""), (SHORT, " keeps")]
    wanted = scored(theirs, beside_others)
    assert wanted[0] == wanted[2] == (0.0, True)
    # Alone in its group such a choice ends `hf` at an assertion of its own; there is no other answer to give.
    alone = [(SHORT + " keep", "s"), (SHORT, ""), ("", ""), ("", tokenizer.eos_token)]
    for pair in alone:
        with pytest.raises((AssertionError, IndexError)):
            scored(theirs, [pair])
    found = on_all_ranks(grid, weights, tokenizer, lambda model: scored(model, [*alone, *beside_others]))
    assert found[: len(alone)] == [(0.0, True)] * len(alone)
    assert_scores(found[len(alone) :], wanted)


@pytest.mark.parametrize("grid", LAYOUTS)
def test_a_context_of_spaces_is_an_empty_one_before_them(
    grid: RankGrid, weights: Any, tokenizer: Any, theirs: HFLM
) -> None:
    with pytest.raises(AssertionError):  # without a token that begins every text, `hf` cannot
        scored(theirs, [("  ", " keeps")])
    spaces = [("  ", " keeps"), ("\n", "Amos"), (" ", "")]
    wanted = scored(theirs, [("", context + continuation) for context, continuation in spaces])
    assert_scores(on_all_ranks(grid, weights, tokenizer, lambda model: scored(model, spaces)), wanted)


@pytest.mark.parametrize("grid", LAYOUTS)
def test_a_text_without_tokens_adds_nothing(grid: RankGrid, weights: Any, tokenizer: Any, theirs: HFLM) -> None:
    texts = [("",), (SHORT,), ("",), (" ",)]

    def rolling(model: Any) -> list[float]:
        return list(model.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True))

    wanted = rolling(theirs)
    assert wanted[0] == wanted[2] == 0
    assert on_all_ranks(grid, weights, tokenizer, rolling) == pytest.approx(wanted, abs=TOLERANCE)


SAMPLED = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 6, "until": []}


@pytest.mark.parametrize("grid", LAYOUTS)
def test_repeats_of_a_prompt_are_samples_of_one_prefill(
    grid: RankGrid, weights: Any, tokenizer: Any, theirs: HFLM
) -> None:
    warmer = {**SAMPLED, "temperature": 1.5}
    greedy = {"max_gen_toks": 6}
    asked = [(WILD, SAMPLED)] * 8 + [(WILD, warmer)] * 2 + [(SHORT, SAMPLED)] + [(SHORT, greedy)] * 8

    def ask(model: CpinferLM) -> tuple[list[int], list[str], list[str]]:
        computed = []
        for repeats in ([(WILD, SAMPLED)] * 8, [(SHORT, greedy)] * 8):
            generated(model, repeats)
            computed.append(model.engine.stats.num_computed_prefill_tokens)
        return computed, generated(model, asked), generated(model, asked[::-1])

    computed, there, back = on_all_ranks(grid, weights, tokenizer, ask)
    assert computed == [len(tokenizer.encode(WILD)), len(tokenizer.encode(SHORT))]
    assert len(set(there[:8])) > 4
    # The same draws in any order and company; the first of those that ask the same gets the first sample.
    back = back[::-1]
    assert there[:8] == back[:8][::-1] and there[8:10] == back[8:10][::-1] and there[10:] == back[10:]
    assert there[11:] == generated(theirs, asked[11:])


def arguments(tokenizer: Any) -> list[dict[str, Any]]:
    lanterns, keeps = tokenizer.convert_tokens_to_ids([" lanterns", " keeps"])
    return [
        {"min_new_tokens": 2},
        {"min_new_tokens": 3},
        {"min_new_tokens": 7},
        {"min_new_tokens": 40},  # more than there may be
        {"min_new_tokens": 0, "temperature": 0},
        {"min_new_tokens": None, "eos_token_id": None},
        {"eos_token_id": lanterns},
        {"eos_token_id": [lanterns, keeps]},
        {"eos_token_id": []},
        {"eos_token_id": lanterns, "min_new_tokens": 1},
        {"eos_token_id": lanterns, "min_new_tokens": 4},
        {"eos_token_id": lanterns, "min_new_tokens": 4, "until": [" garden"]},
        # To `hf` the minimum holds back no text that ends an answer, the one of the EOS token included.
        {"until": [" lanterns", "den g"], "min_new_tokens": 6},
        {"until": [" Remember", "(", " garden"], "min_new_tokens": 6},
        {"until": ["s l"], "min_new_tokens": 3, "eos_token_id": [keeps]},
        # Texts that are special tokens, or hold some.
        {"until": ["<pad>", ";"], "eos_token_id": lanterns + 1},
        {"until": ["lanterns;"]},
        {"until": ["s;"], "eos_token_id": []},
        {"until": [" lanterns", "<pad>"]},
        {"until": "\n"},
        # What only samples would have.
        {"do_sample": False, "top_p": 0.5, "top_k": 3, "min_p": 0.2, "temperature": 0.7},
        {"do_sample": False, "top_k": -1, "num_beams": 1},
        {"repetition_penalty": 1.3, "temperature": 0.0},
    ]


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@pytest.mark.parametrize("grid", LAYOUTS)
def test_generation_arguments_mean_what_they_mean_to_lm_evals_own_model(
    grid: RankGrid, weights: Any, tokenizer: Any, theirs: HFLM
) -> None:
    asked = [(text, {"max_gen_toks": 9, **given}) for given in arguments(tokenizer) for text in (SHORT, WILD)]
    found = on_all_ranks(grid, weights, tokenizer, lambda model: generated(model, asked))
    for (text, given), answer, wanted in zip(asked, found, generated(theirs, asked), strict=True):
        assert answer == wanted, (text, given)
    assert len(set(found)) >= 8
    # To `hf` a top_k of -1 is an error where it counts, to others it is none at all.
    cold = (SHORT, {"do_sample": True, "temperature": 1e-3, "top_k": -1, "max_gen_toks": 9})
    assert on_all_ranks(grid, weights, tokenizer, lambda model: generated(model, [cold])) == [" keeps lanterns"]
    limits = [(WILD, {key: 3, "until": []}) for key in ("max_tokens", "max_new_tokens", "max_completion_tokens")]
    assert on_all_ranks(grid, weights, tokenizer, lambda model: generated(model, limits)) == [" garden" * 3] * 3


@pytest.mark.parametrize("grid", LAYOUTS)
def test_texts_that_are_special_tokens_end_answers_as_in_lm_evals_own_model(grid: RankGrid, weights: Any) -> None:
    tokenizer = load_tokenizer(MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": [" lanterns", " Remember"]})
    untils = [
        [" lanterns"],
        [" keeps lanterns"],
        ["ps lan", "zz"],
        ["ns(", ";"],
        [" lanterns( Re"],
        ["Remember"],
        ["\n"],
    ]
    asked = [
        (SHORT, {"max_gen_toks": 9, "until": until, "min_new_tokens": minimum})
        for until in untils
        for minimum in (0, 4)
    ]
    theirs = HFLM(copy.deepcopy(weights), tokenizer=tokenizer, batch_size=1, max_length=MAX_LENGTH)
    wanted = generated(theirs, asked)
    assert on_all_ranks(grid, weights, tokenizer, lambda model: generated(model, asked)) == wanted
    assert len(set(wanted)) > 2


@pytest.mark.parametrize("end", [" lanterns", "id", ";"])
def test_thinking_ends_at_a_text_or_a_token_as_in_lm_evals_own_model(end: str, weights: Any, tokenizer: Any) -> None:
    token_or_text = tokenizer.convert_tokens_to_ids(" keeps") if end == "id" else end
    args = {"max_length": MAX_LENGTH, "think_end_token": token_or_text}
    model = HFLM(copy.deepcopy(weights), tokenizer=tokenizer, batch_size=1, **args)
    asked = [(SHORT, {"max_gen_toks": 9, "min_new_tokens": 6}), (WILD, {"max_gen_toks": 4})]
    assert on_all_ranks(RankGrid(), weights, tokenizer, lambda m: generated(m, asked), **args) == generated(
        model, asked
    )


@pytest.mark.parametrize("grid", LAYOUTS)
def test_the_models_generation_config_holds_where_a_task_says_nothing_and_only_when_asked_for(
    grid: RankGrid, weights: Any, tokenizer: Any, theirs: HFLM
) -> None:
    chatty = copy.deepcopy(weights)
    chatty.generation_config.update(do_sample=True, repetition_penalty=9.0, top_k=1, temperature=0.3)
    model = HFLM(copy.deepcopy(chatty), tokenizer=tokenizer, batch_size=1, max_length=MAX_LENGTH)
    sampled = {"do_sample": True, "temperature": 1000.0, "repetition_penalty": 1.0}  # of the one token of a top_k of 1
    asked = [(WILD, {"max_gen_toks": 8, **given}) for given in ({}, {"repetition_penalty": 1.0}, sampled)]
    wanted = generated(model, asked)
    assert wanted[0] != wanted[1] == wanted[2]
    found = on_all_ranks(grid, chatty, tokenizer, lambda m: generated(m, asked), generation_config="model")
    assert found == wanted
    plain = on_all_ranks(grid, chatty, tokenizer, lambda m: generated(m, asked))
    assert plain[:2] == generated(theirs, asked[:2]) and plain[2] != wanted[2]


REFUSED = [
    ({"do_sample": True}, '"do_sample" is true and "temperature" 0.* Give one above 0, or do_sample: false'),
    ({"do_sample": True, "temperature": 0}, '"do_sample" is true and "temperature" 0'),
    ({"do_sample": "no"}, '"do_sample" is "no"; true or false was wanted'),
    ({"temperature": "warm"}, "generation arguments .*warm.* cannot be read"),
    ({"temperature": 1e-6}, '"temperature" is 1e-06'),
    ({"top_k": "all", "do_sample": True, "temperature": 1}, '"top_k" is "all"; a number was wanted'),
    ({"num_beams": 10}, r"generation arguments \['num_beams'\] are not known; known are temperature"),
    ({"max_length": 50}, r"\['max_length'\] are not known; .* max_gen_toks"),
    ({"min_length": 50}, r"\['min_length'\] are not known; .* min_new_tokens"),
    ({"no_repeat_ngram_size": 2}, r"\['no_repeat_ngram_size'\] are not known"),
    ({"stop": ["x"]}, r"\['stop'\] are not known; .* until"),
    ({"until": ["x", ""]}, r'"until" is \["x", ""\]; texts were wanted, and no empty one: `hf` ends answers there'),
    ({"until": [["x"], 2]}, r'"until" is \[\["x"\], 2\]; texts were wanted'),
    ({"eos_token_id": ";"}, '"eos_token_id" is ";"; a token id or a list of them was wanted'),
    ({"eos_token_id": -1}, '"eos_token_id" is -1; a token id'),
    ({"eos_token_id": 99999}, "token id 99999; the vocabulary has 768 tokens"),
    ({"min_new_tokens": "few"}, '"min_new_tokens" is "few"; a number was wanted'),
    ({"min_new_tokens": -1}, '"min_new_tokens" is -1'),
    ({"max_gen_toks": 0}, '"max_new_tokens" is 0'),
    ({"max_gen_toks": MAX_LENGTH}, f"max_gen_toks={MAX_LENGTH} leaves no room for a prompt"),
]


def test_a_refused_request_is_named_by_its_task_and_document_before_any_runs(weights: Any, tokenizer: Any) -> None:
    unknown = copy.deepcopy(tokenizer)
    unknown.add_tokens(["<new>"])  # of which the model has no embedding
    without_end = copy.deepcopy(tokenizer)
    without_end.eos_token = None
    outside = f"task recall, document 102: token id {len(tokenizer)} is outside the vocabulary"

    def ask(model: CpinferLM) -> None:
        good = (SHORT, {"max_gen_toks": 4})
        for given, complaint in REFUSED:
            with pytest.raises(cpinfer.UserError, match=f"^task recall, document 102: .*{complaint}"):
                generated(model, [good, good, (WILD, {"max_gen_toks": 4, **given}), good])
        with pytest.raises(cpinfer.UserError, match=r"^task recall, document 101: the prompt is empty"):
            generated(model, [good, ("", {"max_gen_toks": 4})])
        with pytest.raises(cpinfer.UserError, match=r"^task recall, document 101: a continuation has 200 tokens"):
            scored(model, [(SHORT, " keeps"), (SHORT, ";" * 200)])
        model.tokenizer = without_end
        with pytest.raises(cpinfer.UserError, match=r"the tokenizer has no EOS token.* set eos_token"):
            generated(model, [good])
        model.tokenizer = unknown
        # The longest are asked first: their places among what the engine is given are others than lm-eval's.
        texts = [WILD, SHORT, "<new>", SHORT + SHORT]
        with pytest.raises(cpinfer.UserError, match=outside):
            generated(model, [(text, {"max_gen_toks": 4}) for text in texts])
        with pytest.raises(cpinfer.UserError, match=outside):
            scored(model, [(SHORT, ""), *((text, " keeps") for text in (WILD, "<new>", SHORT))])
        with pytest.raises(cpinfer.UserError, match=outside):
            model.loglikelihood_rolling(requests("loglikelihood_rolling", [(SHORT * 9,), ("",), ("a<new>",)]))

    on_all_ranks(RankGrid(), weights, tokenizer, ask)
