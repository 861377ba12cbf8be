"""Requests: what the scheduler and the steps ask of them, by their type."""

import numpy as np
import pytest

from cpinfer.config import SamplingParams
from cpinfer.engine.request import DROPPED, Prompt, Request, SampledRequest, SampledToken, ScoredRequest, TokenScore

PROMPT = Prompt(3, "p", (5, 6, 7))


def sampled(*token_ids, prompt=PROMPT, sample_index=0, max_new_tokens=4, **params):
    request = SampledRequest(prompt, sample_index, SamplingParams(**params), max_new_tokens)
    request.sampled = [SampledToken(t, -1.0, -0.5, ((t, -1.0),)) for t in token_ids]
    return request


def test_a_request_that_is_neither_sampled_nor_scored_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Request(PROMPT)


def test_a_sample_computes_its_prompt_and_its_answer_so_far_and_reads_the_logits_of_the_newest_token():
    fresh, later = sampled(), sampled(8, 9)
    assert fresh.all_token_ids == (5, 6, 7) and fresh.first_logits_place == 2
    assert later.all_token_ids == (5, 6, 7, 8, 9) and later.first_logits_place == later.next_position == 4
    assert {request.max_length for request in (fresh, later)} == {7}
    assert {request.max_cached_tokens for request in (fresh, later)} == {6}
    assert later.scored_positions(0, 5) == range(0)


def test_of_a_given_answer_all_but_the_last_token_is_computed_and_every_token_is_scored_once():
    request = ScoredRequest(PROMPT, (8, 9, 10))
    assert request.all_token_ids == (5, 6, 7, 8, 9)
    assert request.max_length == 6 and request.max_cached_tokens == len(request.all_token_ids)
    places = [place for chunk in ((0, 1), (1, 3), (3, 5)) for place in request.scored_positions(*chunk)]
    assert places == [2, 3, 4] and places[0] == request.first_logits_place
    assert tuple(map(request.target_at, places)) == request.targets


def test_fresh_samples_of_equal_prompts_share_a_prefill_and_nobody_else_does():
    assert sampled().shares_prefill_with(sampled(sample_index=1))
    assert sampled().shares_prefill_with(sampled(prompt=Prompt(4, "q", (5, 6, 7))))
    assert not sampled().shares_prefill_with(sampled(prompt=Prompt(4, "q", (5, 6, 8))))
    assert not sampled().shares_prefill_with(sampled(prompt_logprobs=True))
    asks = sampled(routed_experts=True)
    assert asks.shares_prefill_with(sampled(routed_experts=True))
    assert not asks.shares_prefill_with(sampled()) and not sampled().shares_prefill_with(asks)
    asks.note_experts(0, np.zeros((3, 1, 2), dtype=np.int16))
    assert not asks.shares_prefill_with(sampled(routed_experts=True))
    continued = sampled()
    continued.continues = sampled(8)
    assert not continued.shares_prefill_with(sampled()) and not sampled().shares_prefill_with(continued)
    assert not sampled(8).shares_prefill_with(sampled()) and not sampled().shares_prefill_with(sampled(8))
    assert not sampled().shares_prefill_with(ScoredRequest(PROMPT, (8,)))
    assert not ScoredRequest(PROMPT, (8,)).shares_prefill_with(sampled())
    assert not ScoredRequest(PROMPT, (8,)).shares_prefill_with(ScoredRequest(PROMPT, (8,)))


def test_blocks_are_dropped_from_the_front_and_taken_once():
    request = sampled()
    request.blocks = [4, 2, 9]
    assert request.drop_blocks(2) == [4, 2] and request.drop_blocks(1) == []
    assert request.blocks == [DROPPED, DROPPED, 9] and request.held_blocks == [9]
    assert request.take_blocks() == [9] and request.take_blocks() == [] and request.num_dropped == 0


def test_a_result_says_what_was_sampled_and_how_long_it_took():
    request = sampled(8, 9, 10, top_logprobs=1)
    request.finish_reason, request.submitted_s, request.first_token_s, request.finished_s = "stop", 1.0, 3.0, 4.0
    result = request.result("text", 7)
    assert (result.id, result.prompt_index, result.sample_index) == ("p", 3, 0)
    assert (result.prompt_token_ids, result.token_ids, result.text) == ((5, 6, 7), (8, 9, 10), "text")
    assert (result.logprobs, result.processed_logprobs) == ((-1.0,) * 3, (-0.5,) * 3)
    assert (result.ttft_s, result.tpot_s, result.finish_reason, result.weights_version) == (2.0, 0.5, "stop", 7)
    assert result.top_logprobs == (((8, -1.0),), ((9, -1.0),), ((10, -1.0),))


def test_a_result_has_kept_masses_where_a_cut_was_asked_for_and_kept_ids_where_these_were():
    def result(**params):
        request = sampled(8, 9, **params)
        request.sampled = [SampledToken(8, -1.0, -0.5, (), 0.5, (3, 8)), SampledToken(9, -1.0, -0.5, (), 0.25)]
        request.finish_reason, request.first_token_s, request.finished_s = "length", 3.0, 4.0
        return request.result(None, 0)

    for cut in ({"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1}):
        assert result(**cut).kept_mass == (0.5, 0.25) and result(**cut).kept_token_ids is None
        assert result(**cut, temperature=0).kept_mass is None
        assert result(**cut, kept_token_ids=True).kept_token_ids == ((3, 8), None)
    assert result(repetition_penalty=1.1).kept_mass is None and result().kept_mass is None


def test_without_a_second_token_there_is_no_time_between_tokens():
    request = sampled(8)
    request.finish_reason, request.first_token_s, request.finished_s = "length", 3.0, 4.0
    result = request.result(None, 0)
    assert result.tpot_s is None and result.top_logprobs is None


@pytest.mark.parametrize("greedy", [[True, True], [True, False]], ids=str)
def test_an_answer_is_greedy_when_all_of_its_tokens_are(greedy):
    request = ScoredRequest(PROMPT, (8, 9))
    request.scores = [TokenScore(-float(i), is_greedy) for i, is_greedy in enumerate(greedy)]
    result = request.result()
    assert result.logprobs == (0.0, -1.0) and result.logprob == -1.0 and result.is_greedy == all(greedy)


def rows(*numbers):
    """Experts of as many tokens, in one layer."""
    return np.array(numbers, dtype=np.int16).reshape(-1, 1, 1)


def test_a_token_keeps_the_experts_of_the_forward_that_ran_it_first():
    request = sampled(8, routed_experts=True)
    request.note_experts(0, rows(1, 2, 3))
    request.note_experts(0, rows(7, 7))  # computed again after a preemption, in chunks
    request.note_experts(2, rows(7, 4))
    request.restart(version=0)
    assert request.experts is not None and request.experts.array().ravel().tolist() == [1, 2, 3, 4]
    assert not request.experts.array().flags.writeable
    nobody = sampled(8)
    nobody.note_experts(0, rows(1, 2, 3))
    assert nobody.experts is None


def test_before_a_token_is_drawn_new_weights_choose_all_experts_anew():
    request = sampled(routed_experts=True)
    request.note_experts(0, rows(1, 2))
    request.restart(version=0)
    assert request.experts is not None and request.experts.num_tokens == 0


def test_who_asks_continues_on_kv_whose_experts_are_known():
    before = sampled(8, 9, routed_experts=True)
    before.note_experts(0, rows(1, 2, 3, 4))
    before.blocks = [0]
    after, other = (sampled(prompt=Prompt(3, "p", (5, 6, 7, 8, 9, 4)), routed_experts=True) for _ in range(2))
    assert after.continue_from(before) and after.continues is before
    after.note_experts(4, rows(5, 6))
    assert before.experts is not None and before.experts.num_tokens == 4, "a turn does not write to the one before it"
    unasked = sampled(8, 9)
    assert sampled().continue_from(unasked)
    unasked.blocks = [0]
    assert not other.continue_from(unasked) and other.continues is None
