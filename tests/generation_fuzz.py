"""What is different about our answers beside those of Transformers' `generate`: the fuzzer of generation.

    case_of(seed)      a case, in `generation_cases`: model, layout, config, prompts with their options, turns
    ours(case)         its answers by cpinfer, on all ranks of its layout
    reference(...)     one answer by Transformers alone, on the whole model
    differences(case)  sentences, none where all is alike

Where tokens are drawn, Transformers' `generate` runs with our draws in the place of its own: they have to be possible
there, as likely as we say, and the answer has to end where it ends there. The rules that Transformers has no answer for
are here once, as code: which stop strings end an answer, and what of its text is shown.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

import cpinfer
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from cpinfer.engine.attach import model_spec
from cpinfer.engine.request import RolloutResult
from cpinfer.engine.scheduler_stats import SchedulerStats
from cpinfer.layout.shards import KVSharding
from generation_cases import Case
from small_tokenizers import VOCAB_SIZE, tokenizer_of
from tiny_models import FAMILIES, make_model

TOLERANCE = 1e-4
# What `masks_vocabulary` rules out: as where a vocabulary is padded to a round number.
NUM_MASKED = 9


# --- ours ---


@functools.cache
def model_of(family: str, *, masks_vocabulary: bool) -> Any:
    """A tiny model without end-of-text tokens of its own; with a mask, its last tokens are ruled out by a hook."""
    model = make_model(FAMILIES[family])
    if masks_vocabulary:
        model.get_output_embeddings().register_forward_hook(_rule_out_the_last)
    return model


def _rule_out_the_last(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
    masked = logits.clone()
    masked[..., -NUM_MASKED:] = -torch.inf
    return masked


@dataclass
class Answers:
    """What an engine made of a case: results of all calls with the options they had, and what its scheduler counted."""

    results: list[RolloutResult] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    stats: list[SchedulerStats] = field(default_factory=list)


def ours(case: Case) -> Answers:
    """The answers of all calls, those of rank 0. AssertionError when ranks differ."""
    model = copy.deepcopy(model_of(case.family, masks_vocabulary=case.masks_vocabulary))
    model.generation_config.eos_token_id = list(case.eos) or None
    sizes = {"max_model_len": case.max_model_len, "kv_cache_gib": _kv_cache_gib(case, model)}
    config = parse_config({"dtype": "float32", **sizes, **case.config})

    def run(topology: cpinfer.Topology) -> Answers:
        answers, prompts = Answers(), [list(prompt) for prompt in case.prompts]
        with cpinfer.attach(copy.deepcopy(model), topology, config, tokenizer=tokenizer_of(case.tokenizer)) as engine:
            for turn in (*case.turns, None):
                results = engine.generate(prompts, case.sampling)
                answers.results += results
                answers.params += [case.sampling[result.prompt_index] for result in results]
                answers.stats.append(engine.stats)
                if turn is not None:
                    firsts = [result for result in results if result.sample_index == 0]
                    # Its end, as far as there are positions, one of them for an answer.
                    prompts = [
                        [*first.prompt_token_ids, *first.token_ids, *turn][-case.max_model_len + 1 :]
                        for first in firsts
                    ]
        return answers

    ranks = run_ranks(case.grid, run)
    for other in ranks[1:]:
        assert [_said(result) for result in other.results] == [_said(result) for result in ranks[0].results], case
    return ranks[0]


def _said(result: RolloutResult) -> tuple[object, ...]:
    """All but the clock's."""
    return tuple(value for name, value in vars(result).items() if not name.endswith("_s"))


def _kv_cache_gib(case: Case, model: Any) -> float:
    if case.spare_blocks is None:
        return 2.0**-7
    spec = model_spec(model)
    config = parse_config(case.config)
    sharding = KVSharding(case.dcp_size, config.interleave, config.block_size)
    later = sum(map(len, case.turns))
    longest = max(
        len(prompt) + (1 + len(case.turns)) * params.max_new_tokens + later
        for prompt, params in zip(case.prompts, case.sampling, strict=True)
    )
    num_blocks = sharding.num_blocks(min(longest, case.max_model_len)) + case.spare_blocks
    per_token = spec.kv_layout(spec.heads(1).max_stored_heads(case.grid)).bytes_per_token(spec.num_layers, "float32")
    return (num_blocks + 0.5) * config.block_size * per_token / 2**30


# --- Transformers ---

# (tokenizer, tokens of an answer, options) to where the stop string begins that the last token completes, or None.
StopRule = Callable[[PreTrainedTokenizerFast, Sequence[int], SamplingParams], int | None]


@dataclass(frozen=True)
class Reference:
    """One answer by Transformers: its tokens, the rows that they were chosen from, and why it ended.

    `logits`, `scores` `[tokens, vocab]`: as the model has them, and processed. `prompt_logits`: of the tokens of the
    prompt but the first, where they are asked for.
    """

    token_ids: list[int]
    logits: torch.Tensor
    scores: torch.Tensor
    text: str
    finish_reason: str
    prompt_logits: torch.Tensor | None


def reference(
    case: Case, prompt: Sequence[int], params: SamplingParams, draws: Sequence[int], *, rule: StopRule
) -> Reference:
    """The answer of `generate`, all rules that it has being its own. Where it samples, `draws` are what it draws."""
    model, tokenizer = model_of(case.family, masks_vocabulary=case.masks_vocabulary), tokenizer_of(case.tokenizer)
    ends = ends_of(case, params)
    most = min(params.max_new_tokens, case.max_model_len - len(prompt))
    sampled = {"temperature": params.temperature, "top_k": max(params.top_k, 0), "top_p": params.top_p}
    options = GenerationConfig(
        max_new_tokens=most,
        min_new_tokens=min(params.min_new_tokens, most) or None,
        do_sample=not params.greedy,
        **({} if params.greedy else {**sampled, "min_p": params.min_p or None}),
        repetition_penalty=params.repetition_penalty,
        sequence_bias=[[[token], bias] for token, bias in params.logit_bias] or None,
        stop_strings=list(params.stop) if case.transformers_stops and params.stop else None,
        eos_token_id=ends or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )

    class OwnRule(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.tensor([rule(tokenizer, input_ids[0, len(prompt) :].tolist(), params) is not None])

    ids = torch.tensor([list(prompt)])
    with mock.patch("torch.multinomial", _drawing(draws)), torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=options,
            **(
                {"tokenizer": tokenizer}
                if case.transformers_stops
                else {"stopping_criteria": StoppingCriteriaList([OwnRule()])}
            ),
        )
        prompt_logits = model(ids).logits[0, :-1] if params.prompt_logprobs else None
    tokens = out.sequences[0, len(prompt) :].tolist()
    begins_at = rule(tokenizer, tokens, params)
    return Reference(
        tokens,
        torch.cat(out.logits),
        torch.cat(out.scores),
        shown_text(tokenizer, tokens, begins_at),
        "stop" if tokens[-1] in ends or begins_at is not None else "length",
        prompt_logits,
    )


def ends_of(case: Case, params: SamplingParams) -> list[int]:
    """Tokens that end an answer."""
    return sorted({*params.stop_token_ids, *(() if params.ignore_eos else case.eos)})


def _drawing(draws: Sequence[int]) -> Callable[..., torch.Tensor]:
    """Instead of `torch.multinomial`: one draw after the other; when there is none left, the likeliest token."""
    left = iter(draws)

    def draw(probs: torch.Tensor, num_samples: int) -> torch.Tensor:
        assert probs.shape[0] == num_samples == 1
        return torch.tensor([[next(left, int(probs.argmax()))]])

    return draw


def stop_begins_at(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], params: SamplingParams) -> int | None:
    """The rule of stop strings: the first character of the first one that the last token completes, if any.

    What a token among the first `min_new_tokens` completes, counts for nothing.
    """
    if len(tokens) <= params.min_new_tokens:
        return None
    text, before = spelled(tokenizer, tokens), spelled(tokenizer, tokens[:-1])
    found = [
        start
        for stop in params.stop
        for start in range(len(text))
        if text.startswith(stop, start) and not before.startswith(text[: start + len(stop)])
    ]
    return min(found, default=None)


def shown_text(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], begins_at: int | None) -> str:
    """The rule of `text`: what Transformers decodes without special tokens, up to where a stop string begins.

    Of the token in which it begins, the piece before it; but nothing of a special one.
    """
    if begins_at is None:
        return tokenizer.decode(tokens, skip_special_tokens=True)
    before = spelled(tokenizer, tokens)[:begins_at]
    num_whole = max(n for n in range(len(tokens)) if before.startswith(spelled(tokenizer, tokens[:n])))
    special = set(tokenizer.all_special_ids)
    visible = [token for token in tokens if token not in special]
    shown = spelled(tokenizer, [token for token in tokens[:num_whole] if token not in special])
    if not special.intersection(tokens[: num_whole + 1]):
        shown = before  # the token alone may be bytes of which those after it make characters
    elif tokens[num_whole] not in special:
        # With those before it, without the special ones between: bytes of one character may come together then.
        shown = spelled(tokenizer, [token for token in tokens[: num_whole + 1] if token not in special])
        shown = shown.removesuffix(spelled(tokenizer, tokens[: num_whole + 1])[begins_at:])
    # A space at the beginning is not shown where decoding drops it.
    is_dropped = spelled(tokenizer, visible) == " " + tokenizer.decode(visible)
    return shown.removeprefix(" ") if is_dropped else shown


def spelled(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    """The text of tokens behind another one, which keeps a space at its beginning."""
    return tokenizer.decode([0, *tokens])[len(tokenizer.decode([0])) :]


# --- beside each other ---


@dataclass
class Comparison:
    """What is different, in sentences; and what was compared, so that a run that says little can be told."""

    differences: list[str] = field(default_factory=list)
    num_answers: int = 0
    num_ties: int = 0
    endings: Counter[str] = field(default_factory=Counter)


def differences(case: Case) -> list[str]:
    """How our answers to a case differ from Transformers'."""
    return compare(case, ours(case)).differences


def compare(
    case: Case,
    answers: Answers,
    change: Callable[[SamplingParams], SamplingParams] = lambda params: params,
    rule: StopRule = stop_begins_at,
) -> Comparison:
    """Answers beside those of Transformers, for whose options `change` makes others of ours."""
    greedy: dict[tuple[object, ...], Reference] = {}
    found = Comparison()
    for number, (result, params) in enumerate(zip(answers.results, answers.params, strict=True)):

        def expected(params: SamplingParams, result: RolloutResult = result) -> Reference:
            """The same for all greedy answers to a prompt."""
            prompt, draws = result.prompt_token_ids, result.token_ids
            if not params.greedy:
                return reference(case, prompt, params, draws, rule=rule)
            if (prompt, params) not in greedy:
                greedy[prompt, params] = reference(case, prompt, params, (), rule=rule)
            return greedy[prompt, params]

        different, is_tie = _differences_or_tie(result, change(params), expected)
        found.num_answers += 1
        found.num_ties += is_tie
        at_a_token = result.token_ids[-1] in ends_of(case, params)
        ending = "length" if result.finish_reason == "length" else "stop token" if at_a_token else "stop string"
        found.endings[ending] += 1
        found.differences += [
            f"seed {case.seed}, answer {number} (prompt {result.prompt_index}, sample {result.sample_index}): {what}"
            for what in different
        ]
    return found


def _differences_or_tie(
    result: RolloutResult, params: SamplingParams, expected: Callable[[SamplingParams], Reference]
) -> tuple[list[str], bool]:
    """What is different; and whether nothing is but that a token stands where rounding decides.

    Of a greedy answer two tokens are as likely as each other; of a sampled one, one is as likely as a threshold.
    """
    found = expected(params)
    different = list(_differences(result, params, found))
    if not different:
        return [], False
    if params.greedy:
        for place, (own, other) in enumerate(zip(result.token_ids, found.token_ids, strict=False)):
            if own != other:
                row = found.scores[place]
                is_tie = bool(row[other] - row[own] < TOLERANCE)
                return ([] if is_tie else different), is_tie
        return different, False
    for moved in (1 - TOLERANCE, 1 + TOLERANCE):
        top_p, min_p = min(params.top_p * moved, 1.0), min(params.min_p * moved, 1.0)
        nearly = dataclasses.replace(params, top_p=top_p, min_p=min_p)
        if not list(_differences(result, nearly, expected(nearly))):
            return [], True
    return different, False


def _differences(result: RolloutResult, params: SamplingParams, expected: Reference) -> Iterator[str]:
    ids = list(result.token_ids)
    if ids != expected.token_ids:
        yield f"tokens {ids}, Transformers has {expected.token_ids}"
    if result.finish_reason != expected.finish_reason:
        yield f"it ended by {result.finish_reason}, with Transformers by {expected.finish_reason}"
    if result.text != expected.text:
        yield f"text {result.text!r}, by the rule it is {expected.text!r}"
    # Up to where they part: rows behind that place are those of another text.
    same = [a == b for a, b in zip(ids, expected.token_ids, strict=False)]
    num = same.index(False) if False in same else len(same)
    raw = torch.log_softmax(expected.logits[:num], dim=-1)
    yield from _far("logprobs", result.logprobs[:num], _picked(raw, ids[:num]))
    yield from _far_tops("top logprobs", result.top_logprobs, raw if params.top_logprobs else None, params)
    if params.greedy:
        if any(result.processed_logprobs):
            yield f"processed logprobs of a greedy answer: {result.processed_logprobs}"
    else:
        processed = _picked(torch.log_softmax(expected.scores[:num], dim=-1), ids[:num])
        # Penalty and temperature make what is far farther.
        grown = max(params.repetition_penalty, 1 / params.repetition_penalty) / min(params.temperature, 1)
        yield from _far("processed logprobs", result.processed_logprobs[:num], processed, TOLERANCE * grown)
    yield from _other_kept_sets(result, params, expected, num)
    raw_prompt = None if expected.prompt_logits is None else torch.log_softmax(expected.prompt_logits, dim=-1)
    if (result.prompt_logprobs is None) != (raw_prompt is None):
        yield f"prompt logprobs are {result.prompt_logprobs}"
    elif result.prompt_logprobs is not None and raw_prompt is not None:
        first, *later = result.prompt_logprobs
        if first is not None:
            yield f"the prompt's first token has the logprob {first}"
        yield from _far("prompt logprobs", later, _picked(raw_prompt, result.prompt_token_ids[1:]))
    tops = None if result.prompt_top_logprobs is None else result.prompt_top_logprobs[1:]
    yield from _far_tops("prompt top logprobs", tops, raw_prompt if params.top_logprobs else None, params)


def _other_kept_sets(result: RolloutResult, params: SamplingParams, expected: Reference, num: int) -> Iterator[str]:
    """Of the first `num` places: the ids that Transformers' processors left, and the probability they had before."""
    is_kept = expected.scores[:num] > -torch.inf
    ids = None if result.kept_token_ids is None else result.kept_token_ids[:num]
    wanted = [tuple(row.nonzero().flatten().tolist()) for row in is_kept]
    if params.greedy:
        wanted = [(token,) for token in result.token_ids[:num]]
    if ids != (tuple(wanted) if params.kept_token_ids else None):
        yield f"kept ids are {ids}, with Transformers {wanted}"
    if (result.kept_mass is None) == bool(params.cut_by):
        yield f"kept masses are {result.kept_mass}"
    elif result.kept_mass is not None and not params.shaped_by:
        uncut = torch.softmax(expected.logits[:num] / params.temperature, dim=-1)
        yield from _far("kept masses", result.kept_mass[:num], torch.where(is_kept, uncut, 0).sum(dim=-1))


def _picked(rows: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    return rows.gather(-1, torch.tensor(list(tokens), dtype=torch.long)[:, None])[:, 0]


def _far_tops(
    what: str, tops: Sequence[Sequence[tuple[int, float]]] | None, raw: torch.Tensor | None, params: SamplingParams
) -> Iterator[str]:
    """The likeliest tokens of each place beside the rows `raw [places, vocab]`, as many as there are of these."""
    if tops is None or raw is None:
        if (tops is None) != (raw is None):
            yield f"{what} are {tops}"
        return
    for place, (top, row) in enumerate(zip(tops, raw, strict=False)):
        best = row.topk(min(params.top_logprobs, VOCAB_SIZE)).values
        own = [logprob for _, logprob in top]
        yield from _far(f"{what} at {place}", own, best[best > -torch.inf])
        yield from _far(f"tokens of the {what} at {place}", own, row[[token for token, _ in top]])


def _far(what: str, own: Sequence[float], others: torch.Tensor, tolerance: float = TOLERANCE) -> Iterator[str]:
    if len(own) != len(others):
        yield f"{len(own)} {what}, {len(others)} of Transformers"
        return
    far = [(a, b) for a, b in zip(own, others.tolist(), strict=True) if a != b and not abs(a - b) <= tolerance]
    if far:  # so is a NaN, and not what both rule out
        yield f"{what} differ: {far[0][0]}, of Transformers {far[0][1]}"
