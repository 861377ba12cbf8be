"""From what callers give to requests: which samples there are, how long they may get, and what ranks have to share."""

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
INPUTS = InputProcessor(SPEC, POOL, None, RankLogger("cpinfer.test"))


def test_every_sample_of_every_prompt_is_a_request_but_those_to_skip():
    params = [SamplingParams(n=2), SamplingParams(n=3)]
    requests = INPUTS.samples([[1, 2], [3]], params, frozenset({(0, 1), (1, 0)})).value
    assert [(r.prompt.index, r.sample_index) for r in requests] == [(0, 0), (1, 1), (1, 2)]
    assert requests[1].prompt is requests[2].prompt  # by which they share a prefill


def test_an_answer_may_get_as_long_as_asked_or_as_there_are_positions():
    requests = INPUTS.samples([[1], [1] * 510], SHORT, frozenset()).value
    assert [r.max_new_tokens for r in requests] == [7, 2]
    assert all(r.params is SHORT for r in requests)


def test_who_says_nothing_of_sampling_gets_the_default_parameters():
    [request] = INPUTS.samples([[1]], None, frozenset()).value
    assert request.params == SamplingParams()


def test_ranks_are_alike_when_they_have_the_same_prompts_sampling_and_samples():
    def same(*given):
        return INPUTS.samples(*given).same()

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
    for given in (lambda: INPUTS.samples([[1]], stop, frozenset()), lambda: INPUTS.packed([[1]], stop, "", 1, 1)):
        with pytest.raises(UserError, match="stop strings need a tokenizer"):
            given()
