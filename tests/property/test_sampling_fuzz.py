"""Whatever parameters pass the config, a token is drawn with them, with a probability, from any finite logits."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpinfer.config import SamplingParams
from cpinfer.engine.prompts import check_sampling
from cpinfer.engine.request import Prompt, SampledRequest, SampledToken
from cpinfer.engine.sampling import sample_tokens
from cpinfer.engine.stop_checker import StopChecker
from cpinfer.errors import UserError
from cpinfer.models.spec import ModelSpec

VOCAB = 12
QUICK = settings(max_examples=200, deadline=10_000, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=5000)
SPEC = ModelSpec.from_config(
    {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
        "eos_token_id": 1,
    }
)
TOKENS = st.integers(0, VOCAB - 1)
# Each within its bounds, the ends more often than chance has them.
PARAMS = st.builds(
    SamplingParams,
    temperature=st.one_of(st.sampled_from([0, 1e-5, 1.0, 1e30]), st.floats(1e-5, 1e30)),
    top_k=st.sampled_from([0, 1, 3, VOCAB, 2**31 - 1]),
    top_p=st.one_of(st.sampled_from([1e-300, 5e-324, 1.0]), st.floats(0, 1, exclude_min=True)),
    min_p=st.one_of(st.sampled_from([0.0, 1e-300, 1.0]), st.floats(0, 1)),
    repetition_penalty=st.one_of(st.sampled_from([1e-5, 1.0, 1e5]), st.floats(1e-5, 1e5)),
    seed=st.sampled_from([0, 2**64 - 1]) | st.integers(0, 2**64 - 1),
    stop_token_ids=st.lists(TOKENS, max_size=VOCAB),
    ignore_eos=st.booleans(),
    min_new_tokens=st.integers(0, 4),
    logit_bias=st.dictionaries(TOKENS, st.sampled_from([-1e20, 1e20, 0.0]) | st.floats(-1e20, 1e20), max_size=3),
    top_logprobs=st.sampled_from([0, 1, VOCAB, 1024]),
    kept_token_ids=st.booleans(),
)
LOGITS = st.lists(
    st.one_of(st.floats(-50, 50, width=32), st.sampled_from([0.0, -1e4, 1e4, 1e-30])), min_size=VOCAB, max_size=VOCAB
)
ROWS = st.lists(st.tuples(LOGITS, PARAMS, st.lists(TOKENS, max_size=3)), min_size=1, max_size=3)


def check(rows):
    sequences = []
    for i, (_, params, sampled) in enumerate(rows):
        try:
            check_sampling(params, SPEC)
        except UserError:
            return
        sequence = SampledRequest(Prompt(i, str(i), (i,)), 0, params, 64)
        sequence.sampled += [SampledToken(token, 0.0, 0.0) for token in sampled]
        sequences.append(sequence)
    stop_checker = StopChecker(SPEC.eos_token_ids, None)
    found = sample_tokens(torch.tensor([logits for logits, _, _ in rows]), sequences, stop_checker).tokens()
    for sequence, token in zip(sequences, found, strict=True):
        params = sequence.params
        assert 0 <= token.token_id < VOCAB
        assert math.isfinite(token.logprob) and token.logprob <= 0
        assert math.isfinite(token.processed_logprob) and token.processed_logprob <= 1e-6
        assert len(token.top) == min(params.top_logprobs, VOCAB)
        assert 0 < token.kept_mass <= 1 and (params.cut_by or token.kept_mass == 1)
        assert (token.kept_ids is not None) == params.kept_token_ids
        if token.kept_ids is not None:
            assert token.token_id in token.kept_ids and token.kept_ids == tuple(sorted(set(token.kept_ids)))
        if len(sequence.sampled) < params.min_new_tokens:
            assert token.token_id not in stop_checker.stop_token_ids(params), "it may not end yet"


@QUICK
@given(ROWS)
def test_parameters_within_their_bounds_draw_a_token_from_any_logits(rows):
    check(rows)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@LONG
@given(ROWS)
def test_many_parameters_within_their_bounds_draw_a_token_from_any_logits(rows):
    check(rows)
