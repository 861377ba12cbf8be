"""The training forward's logprobs: one sample at a time, all logits, is the oracle; a wrong one must be seen."""

import random

import numpy as np
import pytest
import torch

import cpinfer
from cpinfer.colocate.mismatch import Mismatch
from cpinfer.colocate.training_logprobs import eval_no_grad, num_batches_of, training_logprobs
from cpinfer.config import SamplingParams, parse_config
from tiny_models import FAMILIES, make_model

PAD = 0
PROMPTS = [[5, 9, 2], [7], [11, 3, 8, 1, 4, 6, 2, 9], [5, 9], [31, 30, 29, 28]]
COMPLETIONS = [[1, 2, 3, 4], [8, 8], [], [17], [3, 60, 61, 62, 63, 64, 65]]


@pytest.fixture(scope="module", params=["qwen2", "gemma2", "gpt_oss"])
def model(request):
    return make_model(FAMILIES[request.param])


def given(model, temperature=1.0, batch_size=2, **words):
    return training_logprobs(
        model, PROMPTS, COMPLETIONS, temperature=temperature, batch_size=batch_size, pad_token_id=PAD, **words
    )


@torch.no_grad()
def oracle(model, temperature):
    found = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0].double() / temperature
        logprobs = torch.log_softmax(logits, dim=-1)
        found.append([float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(completion)])
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_every_token_has_the_logprob_of_the_whole_forward(model, temperature, batch_size):
    found = given(model, temperature, batch_size)
    assert [len(row) for row in found] == [len(row) for row in COMPLETIONS]
    assert Mismatch.of(oracle(model, temperature), found).max_abs < 2e-5


def test_a_wrong_temperature_and_a_shifted_token_are_seen(model):
    exact = oracle(model, 0.7)
    assert Mismatch.of(exact, given(model, 0.8)).mean_abs > 1e-2
    found = given(model, 0.7)
    shifted = [row[1:] + row[:1] for row in found]
    assert Mismatch.of(exact, shifted).mean_abs > 0.1


class Counting(torch.nn.Module):
    """A trainer's wrapper: counts calls and what goes through the vocabulary."""

    def __init__(self, model, keeps=True):
        super().__init__()
        self.module, self._keeps = model, keeps
        self.shapes, self.num_logits, self.modes = [], [], []

    def forward(self, ids, *, logits_to_keep, **words):
        self.shapes.append(tuple(ids.shape))
        self.modes.append((self.training, torch.is_grad_enabled()))
        out = self.module(ids, **words, **({"logits_to_keep": logits_to_keep} if self._keeps else {}))
        self.num_logits.append(out.logits.shape[1])
        return out


@pytest.fixture(scope="module")
def plain():
    return make_model(FAMILIES["qwen2"])


def test_only_completions_meet_the_vocabulary(plain):
    counting = Counting(plain)
    prompts, completions = [[1] * 50, [2] * 49, [3] * 50], [[4, 5], [6, 7, 8], [9]]
    training_logprobs(counting, prompts, completions, temperature=1.0, batch_size=3, pad_token_id=PAD)
    assert counting.shapes == [(3, 52)]
    assert counting.num_logits == [4]  # positions 48..51: the first says the shortest prompt's first token


def test_a_wrapper_that_gives_all_logits_changes_nothing(plain):
    assert Mismatch.of(given(plain), given(Counting(plain, keeps=False))).max_abs < 1e-6


def test_every_rank_makes_as_many_calls_as_the_busiest(plain):
    """Under ZeRO-3 each call gathers weights from all ranks: one that makes fewer leaves the others waiting."""
    sizes = [5, 2, 0]
    wanted = max(num_batches_of(n, 2) for n in sizes)
    assert wanted == 3
    for n in sizes:
        counting = Counting(plain)
        found = training_logprobs(
            counting, PROMPTS[:n], COMPLETIONS[:n], temperature=1.0, batch_size=2, pad_token_id=PAD, num_batches=wanted
        )
        assert len(counting.shapes) == wanted
        assert len(found) == n
        assert Mismatch.of(found, oracle(plain, 1.0)[:n]).max_abs < 2e-5


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_afterwards_is_the_callers_and_no_graph_is_kept(plain, training):
    counting = Counting(plain).train(training)
    try:
        given(counting)
        assert counting.training is plain.training is training
    finally:
        plain.eval()
    assert set(counting.modes) == {(False, False)}
    assert torch.is_grad_enabled()


class Noisy(torch.nn.Module):
    """A model that draws from everything that can be drawn from, whatever its mode, and has dropout in another."""

    def __init__(self, model):
        super().__init__()
        self.module = model
        self.dropout = torch.nn.Dropout(0.9)

    def forward(self, ids, **words):
        torch.rand(1), np.random.rand(), random.random()
        out = self.module(ids, **words)
        return type(out)(logits=self.dropout(out.logits))


def random_states():
    _, numbers, place, *_ = np.random.get_state()
    return torch.get_rng_state().tolist(), (numbers.tolist(), place), random.getstate()


def test_dropout_is_left_out_and_random_states_and_every_modules_mode_are_those_from_before(plain):
    noisy = Noisy(plain).train()
    noisy.module.lm_head.eval()  # frozen by its owner
    modes, before = [m.training for m in noisy.modules()], random_states()
    try:
        assert Mismatch.of(oracle(plain, 1.0), given(noisy)).max_abs < 2e-5
        assert [m.training for m in noisy.modules()] == modes and {True, False} <= set(modes)
        assert random_states() == before
        with pytest.raises(ZeroDivisionError), eval_no_grad(noisy):
            noisy(torch.tensor([[1, 2]]))
            raise ZeroDivisionError
        assert [m.training for m in noisy.modules()] == modes and random_states() == before
        noisy(torch.tensor([[1, 2]]))  # the control: outside it draws
        assert all(now != then for now, then in zip(random_states(), before, strict=True))
    finally:
        plain.eval()


def test_rollouts_of_the_engine_agree_with_the_forward_at_their_temperature(plain):
    config = parse_config({"dtype": "float32", "kv_cache_gib": 0.01})
    sampling = SamplingParams(temperature=0.6, max_new_tokens=12, n=3, ignore_eos=True)
    with cpinfer.attach(plain, cpinfer.Topology.single(), config) as engine:
        results = engine.generate(PROMPTS, sampling)
    prompts, tokens = [r.prompt_token_ids for r in results], [r.token_ids for r in results]

    def against(temperature, which):
        found = training_logprobs(plain, prompts, tokens, temperature=temperature, batch_size=4, pad_token_id=PAD)
        return Mismatch.of([getattr(r, which) for r in results], found)

    assert against(0.6, "processed_logprobs").max_abs <= 1e-4
    assert against(1.0, "logprobs").max_abs <= 1e-4
    assert against(1.0, "processed_logprobs").share_above_1e_3 > 0.9
    assert against(0.6, "processed_logprobs").num_tokens == 15 * 12


@pytest.mark.parametrize(
    "words, told",
    [
        ({"temperature": 0.0}, "temperature is 0"),
        ({"completions": [[1]]}, "5 prompts, 1 completions"),
        ({"prompts": [[], [1], [1], [1], [1]]}, "a prompt is empty"),
    ],
)
def test_what_has_no_logprobs_is_refused(plain, words, told):
    words = {"prompts": PROMPTS, "completions": COMPLETIONS, "temperature": 1.0, **words}
    with pytest.raises(ValueError, match=told):
        training_logprobs(plain, **words, batch_size=2, pad_token_id=PAD)
