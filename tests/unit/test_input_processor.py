"""From what callers give to requests: which samples there are, how long they may get, and what ranks have to share."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest

from cpinfer.config import SamplingParams
from cpinfer.engine.input_processor import InputProcessor
from cpinfer.engine.pooled_prompts import PooledPrompts
from cpinfer.errors import UserError
from cpinfer.layout.capacity import PoolSize
from cpinfer.layout.shards import KVSharding
from cpinfer.logs import RankLogger
from cpinfer.models.spec import ModelSpec
from tiny_models import FAMILIES

SPEC = ModelSpec.from_config(FAMILIES["llama"].to_dict())  # 128 tokens, 512 positions
POOL = PoolSize(300, KVSharding(1, 4, 4))
SHORT = SamplingParams(max_new_tokens=7)
LOG = RankLogger("cpinfer.test")
INPUTS = InputProcessor(SPEC, POOL, None, LOG)


def test_every_sample_of_every_prompt_is_a_request_but_those_to_skip():
    params = [SamplingParams(n=2), SamplingParams(n=3)]
    requests = INPUTS.samples([[1, 2], [3]], params, frozenset({(0, 1), (1, 0)}), "call").value
    assert [(r.prompt.index, r.sample_index) for r in requests] == [(0, 0), (1, 1), (1, 2)]
    assert requests[1].prompt is requests[2].prompt  # by which they share a prefill


def test_an_answer_may_get_as_long_as_asked_or_as_there_are_positions():
    requests = INPUTS.samples([[1], [1] * 510], SHORT, frozenset(), "call").value
    assert [r.max_new_tokens for r in requests] == [7, 2]
    assert all(r.params is SHORT for r in requests)


def test_who_says_nothing_of_sampling_gets_the_default_parameters():
    [request] = INPUTS.samples([[1]], None, frozenset(), "call").value
    assert request.params == SamplingParams()


def test_ranks_are_alike_when_they_have_the_same_prompts_sampling_and_samples():
    def same(*given):
        return INPUTS.samples(*given, "call").same()

    base = ([[1, 2]], SHORT, frozenset({(0, 0)}))
    assert same(*base) == same(*base)
    for other in (([[1, 3]], *base[1:]), (base[0], SamplingParams(), base[2]), (*base[:2], frozenset())):
        assert same(*other) != same(*base)


def test_a_pair_becomes_a_request_that_is_scored_and_is_refused_by_its_number():
    prepared = INPUTS.scored([([1, 2], [3]), ([4], [5, 6])])
    assert [(r.prompt.token_ids, r.targets) for r in prepared.value] == [((1, 2), (3,)), ((4,), (5, 6))]
    assert prepared.same() == {"pairs": [((1, 2), (3,)), ((4,), (5, 6))]}
    for pair, complaint in (
        (([1], []), "pair 1: the continuation is empty"),
        (([1], [128]), "pair 1: token id 128"),
        (([1] * 500, [1] * 20), "pair 1: .* 512 positions"),
    ):
        with pytest.raises(UserError, match=complaint):
            INPUTS.scored([([1], [2]), pair])


@pytest.mark.parametrize("num_copies", [0, 3, True, "2"])
def test_copies_that_do_not_divide_the_ranks_are_refused(num_copies):
    assert INPUTS.packed([[1]], None, "name", 2, 4).number > 0
    with pytest.raises(UserError, match="a divisor of the replica's 4"):
        INPUTS.packed([[1]], None, "name", num_copies, 4)


def test_pooled_prompts_are_named_by_their_pool_and_sampled_as_often_as_they_are_asked_for():
    asked = [[(1,), (1,)], [(1,), (2,)]]
    requests, places = INPUTS.pooled(asked, 1, SHORT, "step/3")
    assert places == PooledPrompts.of(asked).places
    assert [(r.prompt.id, r.prompt.token_ids, r.sample_index) for r in requests] == [
        ("step/3/0", (1,), 0),
        ("step/3/0", (1,), 1),
        ("step/3/0", (1,), 2),
        ("step/3/1", (2,), 0),
    ]
    assert all(r.max_new_tokens == 7 for r in requests)


def test_stop_strings_without_a_tokenizer_are_refused_wherever_they_come_from():
    stop = SamplingParams(stop=("x",))
    for given in (
        lambda: INPUTS.samples([[1]], stop, frozenset(), "call"),
        lambda: INPUTS.packed([[1]], stop, "", 1, 1),
    ):
        with pytest.raises(UserError, match="stop strings need a tokenizer"):
            given()


def test_what_a_prompt_says_of_its_sampling_wins_over_the_call_and_ranks_must_agree_in_it():
    own = {"prompt_token_ids": [1], "sampling": {"n": 2, "max_new_tokens": 3, "seed": 9}}
    prepared = INPUTS.samples([own, [1]], SHORT, frozenset({(0, 0)}), "call")
    assert [(r.prompt.index, r.sample_index, r.max_new_tokens, r.params.seed) for r in prepared.value] == [
        (0, 1, 3, 9),
        (1, 0, 7, 0),
    ]
    assert prepared.value[1].params is SHORT
    other = {**own, "sampling": {**own["sampling"], "seed": 8}}
    assert INPUTS.samples([other, [1]], SHORT, frozenset({(0, 0)}), "call").same() != prepared.same()


@pytest.mark.parametrize(
    "own, words",
    [
        ({"stop": ["x"]}, "prompt 1: stop strings need a tokenizer"),
        ({"logit_bias": {"128": 1}}, 'prompt 1: "logit_bias" has token id 128; the vocabulary has 128 tokens'),
        ({"stop_token_ids": [128]}, 'prompt 1: "stop_token_ids" has token id 128'),
        ({"min_new_tokens": 8}, 'prompt 1: "sampling": "min_new_tokens" is 8; it must be at most "max_new_tokens"'),
    ],
    ids=str,
)
def test_what_a_prompt_says_of_its_sampling_is_checked_with_the_rest(own, words):
    with pytest.raises(UserError, match=words):
        INPUTS.samples([[1], {"prompt_token_ids": [1], "sampling": own}], SHORT, frozenset(), "call")


def test_prompts_of_one_id_may_differ_in_their_own_seed():
    given = [{"prompt_token_ids": [1], "id": "x", "sampling": {"seed": seed}} for seed in (0, 1)]
    assert len(INPUTS.samples(given, SHORT, frozenset(), "call").value) == 2
    with pytest.raises(UserError, match="the same"):
        INPUTS.samples([given[0], given[0]], SHORT, frozenset(), "call")


def test_sampling_of_a_prompts_own_is_refused_where_nothing_hears_it():
    own = {"prompt_token_ids": [1], "sampling": {"n": 2}}
    with pytest.raises(UserError, match='pair 0: "sampling" of a prompt\'s own'):
        INPUTS.scored([(own, [2])])
    with pytest.raises(UserError, match='prompt 0: "sampling" of a prompt\'s own'):
        INPUTS.packed([own], SHORT, "", 1, 1)


def warned(caplog, *calls, spec_eos=(3,), bos=2, eos=3, speaks=True):
    """The warnings of an engine's calls."""
    spec = dataclasses.replace(SPEC, eos_token_ids=spec_eos)
    tokenizer = SimpleNamespace(bos_token_id=bos, eos_token_id=eos, eos_token="</s>")
    inputs = InputProcessor(spec, POOL, tokenizer, RankLogger("cpinfer.test", speaks=speaks))
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="cpinfer.test"):
        for call in calls:
            call(inputs)
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    return [record.getMessage() for record in caplog.records]


def sampled(*prompts, params=SHORT):
    return lambda inputs: inputs.samples(list(prompts), params, frozenset(), "call")


def test_a_second_begin_of_text_token_is_said_once(caplog):
    doubled = sampled([2, 2, 5], [2, 2, 6])
    [said] = warned(caplog, doubled, doubled)
    assert "prompt 0 begins with two begin-of-text tokens (id 2)" in said and "add_special_tokens=False" in said
    assert warned(caplog, sampled([2, 5, 2], [2], [5, 5])) == []
    assert warned(caplog, doubled, bos=None) == warned(caplog, doubled, speaks=False) == []


def test_a_prompt_that_ends_in_an_end_of_text_token_is_said_once(caplog):
    ended = sampled([5], [5, 4])
    [said] = warned(caplog, ended, ended, spec_eos=(3, 4))
    assert "prompt 1 ends in an end-of-text token of the model (id 4)" in said
    assert warned(caplog, ended) == []
    assert warned(caplog, sampled([3], [3, 5])) == [], "a token that begins a text may be called an end"


@pytest.mark.parametrize(
    "call",
    [
        lambda inputs: inputs.scored([([2, 2, 5, 3], [1])]),
        lambda inputs: inputs.packed([[2, 2, 5, 3]], SHORT, "", 1, 1),
    ],
    ids=["scored", "pooled"],
)
def test_prompts_are_looked_at_wherever_they_go(caplog, call):
    assert len(warned(caplog, call)) == 2


@pytest.mark.parametrize("spec_eos, shown", [((), "none"), ((7, 8), "7, 8")])
def test_an_end_of_text_token_that_the_model_does_not_know_is_said_once(caplog, spec_eos, shown):
    ask = sampled([5])
    [said] = warned(caplog, ask, ask, spec_eos=spec_eos)
    for words in ('"</s>", id 3', f"eos_token_id is {shown}.", "Put 3 into sampling.stop_token_ids"):
        assert words in said


@pytest.mark.parametrize(
    "params", [{"ignore_eos": True}, {"stop_token_ids": [3]}, {"stop": ["</s>"]}], ids=lambda params: next(iter(params))
)
def test_answers_that_end_there_all_the_same_or_never_are_fine(caplog, params):
    assert warned(caplog, sampled([5], params=SamplingParams(**params)), spec_eos=(7,)) == []
    assert warned(caplog, lambda inputs: inputs.scored([([5], [1])]), spec_eos=(7,)) == []
    assert warned(caplog, sampled([5]), eos=None, spec_eos=(7,)) == []
