"""Sampling: which token, with which logprobs, by which random numbers, and that rounding does not choose."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cpinfer.config import SamplingParams
from cpinfer.engine import sampling
from cpinfer.engine.request import Prompt, SampledRequest, SampledToken
from cpinfer.engine.stop_checker import StopChecker
from cpinfer.ops.draws import GROUP_SIZE

VOCAB = 24
EOS = 2


def sample_tokens(logits, sequences):
    return sampling.sample_tokens(logits, sequences, StopChecker((EOS,), None)).tokens()


def make_sequence(params=SamplingParams(), id="p", sample_index=0, prompt=(3, 5, 3), so_far=()):
    sequence = SampledRequest(Prompt(0, id, tuple(prompt)), sample_index, params, 100)
    sequence.sampled = [SampledToken(t, 0.0, 0.0) for t in so_far]
    return sequence


def make_logits(rows, seed=0, vocab=VOCAB):
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def reference(logits, params, history):
    """Processed logprobs of one row by their definitions, in float64: penalty, temperature, top-k, top-p, min-p."""
    x = logits.double().clone()
    for token in set(history):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    if params.greedy:
        return x
    x = x / params.temperature
    if params.top_k:
        x[x < x.sort().values[-min(params.top_k, len(x))]] = -torch.inf
    if params.top_p < 1:
        probs = torch.softmax(x, dim=-1)
        held = 0.0
        for token in probs.argsort(descending=True).tolist():
            if held >= params.top_p:
                x[token] = -torch.inf
            held += float(probs[token])
    if params.min_p:
        probs = torch.softmax(x, dim=-1)
        x[probs < params.min_p * probs.max()] = -torch.inf
    return torch.log_softmax(x, dim=-1)


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=3.0),
    SamplingParams(top_k=3),
    SamplingParams(top_k=10**6),
    SamplingParams(top_p=0.7),
    SamplingParams(top_p=0.01),
    SamplingParams(min_p=0.1),
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(repetition_penalty=0.6),
    SamplingParams(temperature=2.0, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.3),
]


@pytest.mark.parametrize(
    "params", PARAMS, ids=lambda p: f"T{p.temperature}k{p.top_k}p{p.top_p}m{p.min_p}r{p.repetition_penalty}"
)
def test_processed_logprobs_follow_their_definitions(params):
    logits = make_logits(40)
    sequences = [make_sequence(params, sample_index=i, so_far=(7, 1)) for i in range(40)]
    for row, token in enumerate(sample_tokens(logits, sequences)):
        want = reference(logits[row], params, (3, 5, 7, 1))
        assert want[token.token_id] > -torch.inf, "a token was drawn that the parameters exclude"
        assert token.processed_logprob == pytest.approx(float(want[token.token_id]), abs=1e-5)
        raw = torch.log_softmax(logits[row].double(), dim=-1)
        assert token.logprob == pytest.approx(float(raw[token.token_id]), abs=1e-5)


def test_the_reference_tells_parameters_apart():
    """The control: were a parameter ignored, the comparison above would see it."""
    logits = make_logits(1)[0]
    plain = reference(logits, SamplingParams(), (3, 5, 7, 1))
    for params in PARAMS[1:]:
        if params.top_k < VOCAB:
            assert not torch.allclose(reference(logits, params, (3, 5, 7, 1)), plain, atol=1e-3)


CUT = [params for params in PARAMS if params.cut_by]
ROW_IDS = {"ids": lambda p: f"T{p.temperature}k{p.top_k}p{p.top_p}m{p.min_p}r{p.repetition_penalty}"}


def uncut(params):
    return replace(params, top_k=0, top_p=1.0, min_p=0.0)


@pytest.mark.parametrize("params", CUT, **ROW_IDS)
def test_the_kept_mass_leads_back_to_the_distribution_before_the_cut(params):
    logits = make_logits(40)
    params = replace(params, logit_bias=((9, 2.0),))
    sequences = [make_sequence(params, sample_index=i, so_far=(7, 1)) for i in range(40)]
    logits_biased = logits.clone()
    logits_biased[:, 9] += 2.0
    masses = []
    for row, token in enumerate(sample_tokens(logits, sequences)):
        before = reference(logits_biased[row], uncut(params), (3, 5, 7, 1))
        kept = reference(logits_biased[row], params, (3, 5, 7, 1)) > -torch.inf
        assert token.kept_mass == pytest.approx(float(before[kept].exp().sum()), abs=1e-6)
        found = token.processed_logprob + math.log(token.kept_mass)
        assert found == pytest.approx(float(before[token.token_id]), abs=1e-5)
        assert 0 < token.kept_mass <= 1
        masses.append(token.kept_mass)
    # The control: the mass under the cut distribution, which is 1, leads nowhere, but where all tokens are kept.
    assert (min(masses) < 0.99) == (params.top_k < VOCAB or params.top_p < 1 or params.min_p > 0)


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 1.0, 1e30])
def test_the_kept_mass_is_exact_at_every_temperature(temperature):
    """At low ones, where logits are large, the sum of probabilities is lost in the rounding of a plain logsumexp."""
    logits = make_logits(6)
    logits[:, 4] = logits[:, 5] = logits.amax(dim=-1) + 1  # two alike
    params = SamplingParams(temperature=temperature, top_k=2)
    tokens = sample_tokens(logits, [make_sequence(params, sample_index=i) for i in range(6)])
    for row, token in zip(logits.double() / temperature, tokens, strict=True):
        want = torch.softmax(row, dim=-1)[[4, 5]].sum()
        assert token.kept_mass == pytest.approx(float(want), rel=1e-6)
    if temperature == 1e-5:
        scaled = logits[0] / temperature
        assert (scaled.logsumexp(-1) - scaled.max() - math.log(2)).abs() > 1e-3, "the control"


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=0, top_p=0.5), SamplingParams(top_k=10**6)], **ROW_IDS
)
def test_the_kept_mass_is_one_where_nothing_is_cut(params):
    tokens = sample_tokens(make_logits(8), [make_sequence(params, sample_index=i) for i in range(8)])
    assert {token.kept_mass for token in tokens} == {1.0} and {token.kept_ids for token in tokens} == {None}


@pytest.mark.parametrize("eos", [(-1,), (-9,), (VOCAB,), (VOCAB + 70, 3)])
def test_ids_that_no_token_has_suppress_none(eos):
    """As a model's config may name them."""
    logits = torch.arange(VOCAB).float().unsqueeze(0)
    requests = [make_sequence(SamplingParams(temperature=0, min_new_tokens=3))]
    (token,) = sampling.sample_tokens(logits, requests, StopChecker(eos, None)).tokens()
    assert token.token_id == VOCAB - 1


def test_suppressed_tokens_are_no_part_of_what_is_cut():
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS] = 20.0
    (token,) = sample_tokens(logits, [make_sequence(SamplingParams(top_k=2, min_new_tokens=3))])
    (free,) = sample_tokens(logits, [make_sequence(SamplingParams(top_k=2))])
    # All others are alike, and top_k keeps ties.
    assert token.kept_mass == pytest.approx(1.0) and free.kept_mass == pytest.approx(1.0)
    logits[0, [3, 4]] = 1.0
    (token,) = sample_tokens(logits, [make_sequence(SamplingParams(top_k=2, min_new_tokens=3))])
    assert token.kept_mass == pytest.approx(2 * math.e / (2 * math.e + VOCAB - 3), abs=1e-6)


@pytest.mark.parametrize("params", CUT, **ROW_IDS)
def test_kept_ids_are_the_tokens_that_may_be_drawn_ascending(params):
    logits = make_logits(40)
    sequences = [make_sequence(replace(params, kept_token_ids=True), sample_index=i, so_far=(7,)) for i in range(40)]
    for row, token in enumerate(sample_tokens(logits, sequences)):
        want = (reference(logits[row], params, (3, 5, 7)) > -torch.inf).nonzero().flatten().tolist()
        assert list(token.kept_ids) == want and token.token_id in want


def test_greedy_keeps_its_token_alone_and_sets_that_are_too_large_are_none():
    logits = make_logits(1)
    (token,) = sample_tokens(logits, [make_sequence(SamplingParams(temperature=0, kept_token_ids=True))])
    assert token.kept_ids == (token.token_id,)
    for num_kept in (1023, 1024, 1025):
        logits = torch.full((2, 2000), -1.0)
        logits[0, 7 : 7 + num_kept] = 1.0  # top_k keeps ties; the other row keeps all
        params = SamplingParams(top_k=5, kept_token_ids=True)
        first, second = sample_tokens(logits, [make_sequence(params), make_sequence(params, id="q")])
        assert first.kept_ids == (tuple(range(7, 7 + num_kept)) if num_kept <= 1024 else None)
        assert second.kept_ids is None and second.kept_mass == pytest.approx(1.0)


def test_kept_ids_change_no_token():
    logits, params = make_logits(8), SamplingParams(top_p=0.7)
    asked = [make_sequence(replace(params, kept_token_ids=i % 2 == 0), sample_index=i) for i in range(8)]
    plain = [make_sequence(params, sample_index=i) for i in range(8)]
    with_ids, without = sample_tokens(logits, asked), sample_tokens(logits, plain)
    assert [token._replace(kept_ids=None) for token in with_ids] == without
    assert [token.kept_ids is None for token in with_ids] == [i % 2 == 1 for i in range(8)]


def test_greedy_takes_the_likeliest_token_with_processed_logprob_zero():
    logits = make_logits(10)
    sampled = sample_tokens(logits, [make_sequence(SamplingParams(temperature=0, top_k=5, top_p=0.5))] * 10)
    assert [s.token_id for s in sampled] == logits.argmax(dim=-1).tolist()
    raw = torch.log_softmax(logits, dim=-1).amax(dim=-1)
    for token, want in zip(sampled, raw.tolist(), strict=True):
        assert token.processed_logprob == 0
        assert token.logprob == pytest.approx(want, abs=1e-6)


def test_greedy_heeds_the_repetition_penalty_and_raw_logprobs_do_not():
    logits = torch.zeros(1, VOCAB)
    logits[0, 3], logits[0, 9] = 5.0, 4.0
    (plain,) = sample_tokens(logits, [make_sequence(SamplingParams(temperature=0))])
    (penalised,) = sample_tokens(logits, [make_sequence(SamplingParams(temperature=0, repetition_penalty=2.0))])
    assert (plain.token_id, penalised.token_id) == (3, 9)
    assert penalised.logprob == pytest.approx(float(torch.log_softmax(logits, -1)[0, 9]), abs=1e-6)


def test_the_penalty_counts_prompt_and_answer_of_its_own_row():
    logits = torch.zeros(2, VOCAB)
    logits[:, 3], logits[:, 4], logits[:, 9] = 5.0, 4.9, 4.0
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    rows = [make_sequence(params, prompt=(3,), so_far=(4,)), make_sequence(params, prompt=(9, 9, 9, 9), so_far=(3,))]
    assert [s.token_id for s in sample_tokens(logits, rows)] == [9, 4]


def test_logits_are_left_as_they_were():
    logits = make_logits(3)
    before = logits.clone()
    sample_tokens(logits, [make_sequence(PARAMS[-1]), make_sequence(), make_sequence(SamplingParams(temperature=0))])
    assert torch.equal(logits, before)


def test_no_rows_give_no_tokens():
    assert sample_tokens(torch.empty(0, VOCAB), []) == []


@pytest.mark.parametrize("vocab", [VOCAB, 5 * GROUP_SIZE + 3])
def test_a_row_is_sampled_alike_in_any_company(vocab):
    logits = make_logits(30, vocab=vocab)
    params = [PARAMS[i % len(PARAMS)] for i in range(30)]
    sequences = [make_sequence(params[i], id=str(i), so_far=(i % VOCAB,)) for i in range(30)]
    together = sample_tokens(logits, sequences)
    alone = [sample_tokens(logits[i : i + 1], [sequences[i]])[0] for i in range(30)]
    backwards = sample_tokens(logits.flip(0), sequences[::-1])[::-1]
    for other in (alone, backwards):
        assert [s.token_id for s in together] == [s.token_id for s in other]
        for a, b in zip(together, other, strict=True):
            assert a.processed_logprob == pytest.approx(b.processed_logprob, abs=1e-6)


def test_logprobs_as_trained_are_alike_beside_rows_that_may_not_end_yet():
    logits, plain = make_logits(300, vocab=131), SamplingParams(temperature=3.0)
    minimum = replace(plain, min_new_tokens=1)

    def processed(params):
        rows = [make_sequence(params if i == 0 else plain, id=f"p{i}", so_far=(5,)) for i in range(300)]
        found = sampling.sample_tokens(logits, rows, StopChecker((EOS,), None), as_trained=True).tokens()
        return [token.processed_logprob for token in found]

    assert processed(minimum) == processed(plain)


def test_rows_of_different_parameters_get_each_its_own():
    logits = make_logits(1).expand(3, VOCAB)
    greedy, top1, hot = SamplingParams(temperature=0), SamplingParams(top_k=1), SamplingParams(temperature=1e6)
    sampled = sample_tokens(logits, [make_sequence(hot), make_sequence(greedy), make_sequence(top1)])
    best = int(logits[0].argmax())
    assert [s.token_id for s in sampled[1:]] == [best, best]
    assert sampled[0].processed_logprob == pytest.approx(-math.log(VOCAB), abs=1e-4)
    assert sampled[2].processed_logprob == pytest.approx(0, abs=1e-6)


def draw(logits, sequences):
    return torch.tensor([s.token_id for s in sample_tokens(logits, sequences)])


def chi_square(counts, probs):
    """Of how often each token was drawn; how many standard deviations that is above what chance gives."""
    counts, probs = counts[probs > 0].double(), probs[probs > 0].double()
    want = counts.sum() * probs
    assert want.min() > 5
    freedom = len(probs) - 1
    return (float(((counts - want) ** 2 / want).sum()) - freedom) / math.sqrt(2 * freedom)


# One group of tokens, and three, the last not full: likely tokens and unlikely ones in each.
DISTRIBUTIONS = {
    "one group": (torch.tensor([0.4, 0.05, 0.0, 0.25, 0.2, 0.1]).log(), SamplingParams()),
    "three groups": (make_logits(1, vocab=2 * GROUP_SIZE + 40)[0] / 4, SamplingParams()),
    "three groups, top-p": (make_logits(1, vocab=2 * GROUP_SIZE + 40)[0] / 2, SamplingParams(top_p=0.8)),
    "three groups, temperature and top-k": (
        make_logits(1, vocab=2 * GROUP_SIZE + 40)[0],
        SamplingParams(temperature=3.0, top_k=100),
    ),
}
# What may be got wrong: a number for all tokens, numbers of another distribution, of other tokens once more.
WRONG = {
    "no token id": lambda numbers: np.repeat(numbers[:, :1], numbers.shape[1], axis=1),
    "uniform": lambda numbers: np.exp(-numbers),
    "groups by the numbers of tokens": lambda numbers: np.concatenate([numbers[:, :GROUP_SIZE]] * 2, axis=1),
}


def counts_of(logits, params, draws=20_000):
    sequences = [make_sequence(params, id=str(i // 4), sample_index=i % 4) for i in range(draws)]
    return torch.bincount(draw(logits.expand(draws, -1), sequences), minlength=len(logits))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_tokens_are_drawn_as_often_as_they_are_likely(name):
    logits, params = DISTRIBUTIONS[name]
    probs = reference(logits, params, ()).exp()
    counts = counts_of(logits, params)
    assert counts[probs == 0].sum() == 0
    assert chi_square(counts, probs) < 3.5  # the counters are fixed
    wrong = torch.where(torch.arange(len(probs)) % 2 == 0, 0.8, 1.2) * probs
    assert chi_square(counts, wrong / wrong.sum()) > 10


@pytest.mark.parametrize("wrong", WRONG)
def test_other_random_numbers_would_draw_other_tokens(monkeypatch, wrong):
    """The control: generators that are wrong on purpose."""
    logits, params = DISTRIBUTIONS["three groups"]
    right = sampling.exponentials
    monkeypatch.setattr(sampling, "exponentials", lambda requests, num: WRONG[wrong](right(requests, num))[:, :num])
    assert chi_square(counts_of(logits, params), reference(logits, params, ()).exp()) > 10


# Equally likely tokens in four groups, so that both races decide.
LIKELY = torch.arange(8) * GROUP_SIZE // 2 + 7
AXES = ("seed", "id", "sample_index", "place")


def pairs_of(axis, ignored=None):
    """How often which tokens are drawn by neighbours along an axis: [8 * 8]."""
    logits = torch.full((1, 4 * GROUP_SIZE), -torch.inf)
    logits[0, LIKELY] = 0.0
    sequences = []
    for i in range(3000):
        for side in range(2):
            of = dict.fromkeys(AXES, 3) | {"id": 2 * (i // 30), "sample_index": 2 * (i % 30)}
            of[axis] += side
            if ignored:
                of[ignored] = 0
            params = SamplingParams(seed=of["seed"])
            sequences.append(make_sequence(params, str(of["id"]), of["sample_index"], so_far=range(of["place"])))
    left, right = torch.searchsorted(LIKELY, draw(logits.expand(len(sequences), -1), sequences)).reshape(-1, 2).T
    return torch.bincount(8 * left + right, minlength=64)


@pytest.mark.parametrize("axis", AXES)
def test_tokens_of_neighbours_are_independent(axis):
    alike = torch.full((64,), 1 / 64)
    assert chi_square(pairs_of(axis), alike) < 3.5
    assert chi_square(pairs_of(axis, ignored=axis), alike) > 10, "a generator that ignores it would be seen"


@pytest.mark.parametrize("number", [2.0**-53, 1.0, 53 * math.log(2)])
@pytest.mark.parametrize("dead", [[0, 1], [-1, -2], list(range(1, VOCAB - 1)), list(range(GROUP_SIZE + 2))])
def test_a_token_without_probability_is_never_drawn_and_equal_ones_by_the_lowest_id(monkeypatch, number, dead):
    """By the ends of the random numbers, too."""
    monkeypatch.setattr(sampling, "exponentials", lambda requests, num: np.full((len(requests), num), number))
    for vocab in (VOCAB, 2 * GROUP_SIZE + 1):
        if len(dead) > vocab:
            continue
        logits = make_logits(5, vocab=vocab)
        logits[0] = 0.0
        logits[:, dead] = -torch.inf
        tokens = sample_tokens(logits, [make_sequence()] * 5)
        if vocab == VOCAB:
            assert tokens[0].token_id == int(logits[0].isfinite().nonzero()[0])
        for row, token in zip(logits, tokens, strict=True):
            assert row[token.token_id] > -torch.inf
            assert math.isfinite(token.logprob) and math.isfinite(token.processed_logprob)


@pytest.mark.parametrize("token", [0, 5, GROUP_SIZE, 2 * GROUP_SIZE + 1, 3 * GROUP_SIZE - 1])
def test_the_random_numbers_of_a_group_and_of_a_place_in_it_decide(monkeypatch, token):
    """The control: with all tokens alive any of them may be drawn, and by which numbers is known."""
    group, place = divmod(token, GROUP_SIZE)
    numbers = np.full((1, GROUP_SIZE + 3), 30.0)
    numbers[0, [place, GROUP_SIZE + group]] = 1e-9
    monkeypatch.setattr(sampling, "exponentials", lambda requests, num: numbers)
    assert draw(torch.zeros(1, 3 * GROUP_SIZE), [make_sequence()]).item() == token


def test_unused_rows_at_the_end_of_a_vocabulary_do_not_change_what_is_drawn():
    sequences = [make_sequence(id=str(i)) for i in range(50)]
    for vocab in (VOCAB, GROUP_SIZE):
        logits = make_logits(50, vocab=vocab)
        longer = torch.nn.functional.pad(logits, (0, 3 * GROUP_SIZE - 5), value=-torch.inf)
        assert torch.equal(draw(longer, sequences), draw(logits, sequences))


def draw_by_inverse_cdf(logits, uniforms):
    """What is not done: uniform numbers fall into the cumulative distribution, tokens in order of their ids."""
    return torch.searchsorted(torch.softmax(logits, dim=-1).double().cumsum(dim=-1), uniforms, right=True)


@pytest.mark.parametrize(
    "dtype, noise, num_samples, most",
    [(torch.float32, 2.4e-5, 400, 1e-4), (torch.bfloat16, 1e-2, 20, 0.02)],
    ids=["float32", "bfloat16"],
)
def test_rounding_changes_few_tokens_and_many_by_the_inverse_cdf(dtype, noise, num_samples, most):
    """As layouts differ in the last bits: 2.4e-5 is what logprobs of float32 were seen to differ by."""
    chance = torch.Generator().manual_seed(0)
    logits = torch.randn(100, 2048, generator=chance)
    again = (logits + noise * torch.randn(logits.shape, generator=chance)).to(dtype).float()
    logits = logits.to(dtype).float()
    num_changed = 0
    for sample in range(num_samples):
        sequences = [make_sequence(id=str(i), sample_index=sample) for i in range(len(logits))]
        num_changed += int((draw(logits, sequences) != draw(again, sequences)).sum())
    assert num_changed <= most * len(logits) * num_samples
    uniforms = torch.rand(len(logits), 10 * num_samples, generator=chance, dtype=torch.float64)
    by_inverse_cdf = draw_by_inverse_cdf(logits, uniforms) != draw_by_inverse_cdf(again, uniforms)
    assert int(by_inverse_cdf.sum()) / 10 >= 10 * max(num_changed, 1)  # of ten times as many


def test_samples_of_one_prompt_differ():
    sequences = [make_sequence(SamplingParams(n=8), sample_index=i) for i in range(8)]
    assert len({s.token_id for s in sample_tokens(torch.zeros(8, VOCAB), sequences)}) > 3


def test_parameters_that_do_not_choose_tokens_do_not_change_them():
    logits = make_logits(1)
    params = SamplingParams(seed=3)
    (one,) = sample_tokens(logits, [make_sequence(params)])
    (other,) = sample_tokens(logits, [make_sequence(replace(params, max_new_tokens=7, stop=("x",), n=5))])
    assert one == other


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_row_that_may_not_end_yet_does_not_choose_a_token_that_would_end_it(temperature):
    logits = torch.zeros(4, VOCAB)
    logits[:, [EOS, 7]] = 30.0
    params = SamplingParams(temperature=temperature, min_new_tokens=3, stop_token_ids=(7,))
    # Three tokens come before the first that may be an end.
    rows = [make_sequence(params, so_far=range(10, 10 + n)) for n in range(4)]
    *held_back, last = (s.token_id for s in sample_tokens(logits, rows))
    assert not {EOS, 7} & set(held_back) and last in (EOS, 7)


def test_a_row_that_is_left_with_no_token_has_none_and_others_have_theirs():
    logits = torch.full((3, VOCAB), -torch.inf)
    logits[:2, EOS], logits[2, 5] = 1.0, 1.0
    for temperature in (0, 0.7):
        early, late = SamplingParams(temperature=temperature, min_new_tokens=1), SamplingParams(temperature=temperature)
        rows = [make_sequence(early), make_sequence(late), make_sequence(early)]
        first, second, third = sample_tokens(logits, rows)
        assert first is None and (second.token_id, third.token_id) == (EOS, 5)


def test_tokens_that_the_model_rules_out_are_no_top_logprobs():
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, [3, 9]] = torch.tensor([2.0, 1.0])
    (token,) = sample_tokens(logits, [make_sequence(SamplingParams(temperature=0, top_logprobs=5))])
    assert [i for i, _ in token.top] == [3, 9] and all(math.isfinite(p) for _, p in token.top)


def test_top_logprobs_are_of_the_raw_distribution_in_order():
    logits = make_logits(2)
    params = SamplingParams(temperature=3.0, top_logprobs=4, logit_bias=((1, 50.0),))
    raw = torch.log_softmax(logits, dim=-1)
    for row, token in enumerate(sample_tokens(logits, [make_sequence(params), make_sequence(params, id="q")])):
        values, ids = raw[row].topk(4)
        assert [i for i, _ in token.top] == ids.tolist()
        assert [p for _, p in token.top] == pytest.approx(values.tolist())
        assert token.token_id == 1 and token.logprob == pytest.approx(float(raw[row, 1]))
