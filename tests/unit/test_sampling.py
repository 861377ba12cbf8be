"""Sampling: which token, with which logprobs, by which random number."""

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cpinfer.config import SamplingParams
from cpinfer.engine import sampling
from cpinfer.engine.request import Prompt, SampledRequest, SampledToken
from cpinfer.engine.sampling import uniforms
from cpinfer.engine.stop_checker import StopChecker

VOCAB = 24
EOS = 2


def sample_tokens(logits, sequences):
    return sampling.sample_tokens(logits, sequences, StopChecker((EOS,), None))


def make_sequence(params=SamplingParams(), id="p", sample_index=0, prompt=(3, 5, 3), so_far=()):
    sequence = SampledRequest(Prompt(0, id, tuple(prompt)), sample_index, params, 100)
    sequence.sampled = [SampledToken(t, 0.0, 0.0) for t in so_far]
    return sequence


def make_logits(rows, seed=0):
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def reference(logits, params, history):
    """Processed logprobs of one row by their definitions, in float64: penalty, temperature, top-k, top-p, min-p."""
    x = logits.double().clone()
    for token in set(history):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    if params.greedy:
        return x
    x = x / params.temperature
    if params.top_k:
        x[x < x.sort().values[-min(params.top_k, VOCAB)]] = -torch.inf
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


def test_the_random_number_is_the_philox_of_its_counter():
    """A known answer, exact in every bit: text sampled once must be sampled again by later versions."""
    sequences, want = [], []
    for id in map(str, range(20)):  # about half of the keys have their highest bit set
        for seed, sample_index, index in ((0, 0, 0), (2**64 - 1, 3, 7)):
            key = int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest())
            counter = np.array([index, sample_index, key, 0], dtype=np.uint64)
            want.append(int(np.random.Philox(key=seed, counter=counter).random_raw() >> np.uint64(11)) / 2**53)
            sequences.append(make_sequence(SamplingParams(seed=seed), id, sample_index, so_far=range(index)))
    assert uniforms(sequences) == want
    assert uniforms(sequences[::-1]) == want[::-1]
    assert uniforms([]) == []


def test_the_random_number_differs_when_anything_of_it_does():
    sequences = [
        make_sequence(SamplingParams(seed=seed), id, sample_index, so_far=range(index))
        for seed in (0, 1, 2**63)
        for id in ("a", "b", "1")
        for sample_index in range(3)
        for index in range(4)
    ]
    numbers = uniforms(sequences)
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= u < 1 for u in numbers)
    assert abs(float(np.mean(numbers)) - 0.5) < 0.1


def test_the_random_number_depends_on_nothing_else():
    one = make_sequence(SamplingParams(seed=4), "id", 2, prompt=(1,), so_far=(5, 6))
    other = make_sequence(SamplingParams(seed=4, temperature=0.3, n=9), "id", 2, prompt=(8, 8), so_far=(7, 7))
    other.blocks = [1, 2]
    assert uniforms([one]) == uniforms([other]) == uniforms([one])


def test_the_random_numbers_of_similar_counters_are_uncorrelated():
    numbers = np.array([uniforms([make_sequence(id=str(i), sample_index=s) for s in range(8)]) for i in range(50)])
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.15
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.15


def test_a_row_is_sampled_alike_in_any_company():
    logits = make_logits(30)
    params = [PARAMS[i % len(PARAMS)] for i in range(30)]
    sequences = [make_sequence(params[i], id=str(i), so_far=(i % VOCAB,)) for i in range(30)]
    together = sample_tokens(logits, sequences)
    alone = [sample_tokens(logits[i : i + 1], [sequences[i]])[0] for i in range(30)]
    backwards = sample_tokens(logits.flip(0), sequences[::-1])[::-1]
    for other in (alone, backwards):
        assert [s.token_id for s in together] == [s.token_id for s in other]
        for a, b in zip(together, other, strict=True):
            assert a.processed_logprob == pytest.approx(b.processed_logprob, abs=1e-6)


def test_rows_of_different_parameters_get_each_its_own():
    logits = make_logits(1).expand(3, VOCAB)
    greedy, top1, hot = SamplingParams(temperature=0), SamplingParams(top_k=1), SamplingParams(temperature=1e6)
    sampled = sample_tokens(logits, [make_sequence(hot), make_sequence(greedy), make_sequence(top1)])
    best = int(logits[0].argmax())
    assert [s.token_id for s in sampled[1:]] == [best, best]
    assert sampled[0].processed_logprob == pytest.approx(-math.log(VOCAB), abs=1e-4)
    assert sampled[2].processed_logprob == pytest.approx(0, abs=1e-6)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    draws = 4000
    probs = torch.tensor([0.4, 0.05, 0.0, 0.25, 0.2, 0.1])
    logits = probs.log().expand(draws, -1)
    sampled = sample_tokens(logits, [make_sequence(id=str(i // 4), sample_index=i % 4) for i in range(draws)])
    counts = torch.bincount(torch.tensor([s.token_id for s in sampled]), minlength=6).double()
    assert counts[2] == 0
    kept = probs > 0
    chi2 = float(((counts - draws * probs) ** 2 / (draws * probs))[kept].sum())
    assert chi2 < 18.5  # 4 degrees of freedom: one seed in a thousand would be above, and the seed is fixed
    wrong = torch.tensor([0.35, 0.1, 0.0, 0.25, 0.2, 0.1])
    assert float(((counts - draws * wrong) ** 2 / (draws * wrong))[kept].sum()) > 18.5


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("dead", [[0, 1], [VOCAB - 1, VOCAB - 2], list(range(1, VOCAB - 1))])
def test_a_token_without_probability_is_never_drawn(monkeypatch, u, dead):
    monkeypatch.setattr(sampling, "uniforms", lambda sequences: [u] * len(sequences))
    for seed in range(20):
        logits = make_logits(1, seed)
        logits[0, dead] = -torch.inf
        (token,) = sample_tokens(logits, [make_sequence()])
        assert 0 <= token.token_id < VOCAB and token.token_id not in dead
        assert math.isfinite(token.logprob) and math.isfinite(token.processed_logprob)


@pytest.mark.parametrize("u, want", [(0.0, 0), (1 - 2**-53, VOCAB - 1)])
def test_the_ends_of_the_unit_interval_draw_the_ends_of_the_vocabulary(monkeypatch, u, want):
    """The control: with all tokens alive the random number does decide."""
    monkeypatch.setattr(sampling, "uniforms", lambda sequences: [u] * len(sequences))
    assert sample_tokens(make_logits(1), [make_sequence()])[0].token_id == want


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
