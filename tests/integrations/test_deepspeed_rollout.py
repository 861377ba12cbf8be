"""DeepSpeed's interface of rollouts: what it promises of a batch holds, on the weights of the engine that trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from deepspeed.runtime.rollout import RolloutConfig, RolloutEngine, RolloutRequest, SamplingConfig, build_rollout

from cpinfer.errors import UserError
from cpinfer_integrations.deepspeed import CpinferRolloutEngine
from launching import forked
from routers import experts_of
from small_tokenizers import tokenizer_of
from tiny_models import FAMILIES, make_model

PAD = 127
WORKER = "tests/integrations/deepspeed_rollout_worker.py"
# Of each launch most is imports.
KINDS = ("zero1", "zero3:full", "zero0+autotp")
SLOW_KINDS = ("zero2", "zero3:layerwise", "zero3:tp_shards")

Outcomes = dict[str, list[dict[str, Any]]]
every_kind = pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW_KINDS)])


def launched(kinds: tuple[str, ...]) -> Outcomes:
    """By kind, what every rank found."""
    finished = forked(2, WORKER, *kinds, timeout_s=110)
    assert finished.returncode == 0, finished
    return finished.summary


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    return launched(KINDS)


@pytest.fixture(scope="module")
def slow_outcomes() -> Outcomes:
    return launched(SLOW_KINDS)


@pytest.fixture
def ranks(kind: str, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    found: Outcomes = request.getfixturevalue("outcomes" if kind in KINDS else "slow_outcomes")
    return found[kind]


@every_kind
def test_greedy_batches_are_transformers_answers_on_the_newest_weights(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        before, *after = found["greedy"]  # the weights as they were made, and after each of three steps
        for batch in (before, *after):
            assert all(batch["same_tokens"]) and batch["worst"] < 1e-4, batch
            assert batch["answers_alone_have_logprobs"] and batch["prompts_as_they_came"], batch
            assert batch["nothing_is_cut"], batch
            assert batch["as_wide_as_the_longest"] and batch["padded"] and batch["starts"], batch
        assert len(after) == 3 and all(batch["new"] for batch in after), after
        assert found["version"] == 3 and found["changed"] == [], found
    # Of the first rank's answers one ends early, with the token that ended it.
    assert min(ranks[0]["greedy"][0]["lens"]) == 5 and max(ranks[0]["greedy"][0]["lens"]) == 8


@every_kind
def test_distillation_by_deepspeeds_own_functions_trains_on_the_batches(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert len(found["losses"]) == 3 and all(loss > 0 for loss in found["losses"]), found["losses"]


@pytest.mark.parametrize("kind", ["zero1", "zero3:full", pytest.param("zero2", marks=pytest.mark.slow)])
def test_batches_are_those_of_deepspeeds_hybrid_engine_rollout(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["hybrid"] == {"ids": True, "mask": True, "starts": True, "dtypes": True}


@every_kind
def test_samples_follow_step_and_call_and_those_of_a_prompt_stand_side_by_side(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        sampling = found["sampling"]
        assert sampling.pop("version") == 5 and all(sampling.values()), sampling


@every_kind
def test_a_block_of_calls_is_one_phase(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        phases = found["phases"]
        assert phases["one_phase"] and phases["same"], phases
        assert phases["nested"].startswith("RuntimeError: a phase of this rollout engine is open already"), phases


@every_kind
def test_what_one_rank_asks_wrongly_is_an_error_on_all(kind: str, ranks: list[dict[str, Any]]) -> None:
    expected = {
        "right_padded": "Pad prompts on the left",
        "empty": "prompt 0 has no token",
        "unknown_token": "outside the vocabulary",
        "no_samples": "n_samples_per_prompt is 0",
        "continuous": "continuous_batch_size=4",
        "top_p": '"top_p" is 1.5',
    }
    for rank, found in enumerate(ranks):
        assert found["errors"].keys() == expected.keys()
        for name, told in expected.items():
            error = found["errors"][name]
            assert told in error, error
            assert error.startswith("U") and ("rank 1" in error) == (rank == 0), error


def test_it_is_a_rollout_engine_of_deepspeed_whose_factory_has_one_other_name() -> None:
    assert issubclass(CpinferRolloutEngine, RolloutEngine)
    with pytest.raises(ValueError, match="choose from 'hybrid_engine'"):
        build_rollout(RolloutConfig(engine=CpinferRolloutEngine.name))


def test_a_rank_may_bring_no_prompts() -> None:
    engine = CpinferRolloutEngine(make_model(FAMILIES["qwen2"]), tokenizer_of("byte_level"), {"kv_cache_gib": 0.001})
    nothing = torch.zeros((0, 5), dtype=torch.long)
    batch = engine.generate(RolloutRequest(nothing, nothing), SamplingConfig(max_new_tokens=4))
    assert batch.input_ids.shape == batch.logprobs.shape == (0, 5) and batch.batch_size == 0


def test_experts_stand_beside_the_tokens_that_went_through_them() -> None:
    model = make_model(FAMILIES["mixtral"])
    asked = {"kv_cache_gib": 0.001, "dtype": "float32", "sampling": {"routed_experts": True}}
    ids = torch.tensor([[PAD, PAD, 5, 6, 7], [3, 4, 5, 6, 7]])
    request = RolloutRequest(ids, (ids != PAD).long())
    sampling = SamplingConfig(max_new_tokens=4, n_samples_per_prompt=2)
    for config in (asked, {"kv_cache_gib": 0.001}):
        batch = CpinferRolloutEngine(model, tokenizer_of("byte_level"), config).generate(request, sampling)
        if config is not asked:
            assert batch.routed_experts is None
            continue
        assert batch.routed_experts is not None and batch.routed_experts.dtype == torch.int16
        assert batch.routed_experts.shape == (*batch.input_ids.shape, 2, 2)
        for tokens, mask, found in zip(batch.input_ids, batch.attention_mask, batch.routed_experts, strict=True):
            run = tokens[mask.bool()][:-1].tolist()
            ran = torch.from_numpy(experts_of(model, run)).to(torch.int16)
            first = int(mask.argmax())
            assert torch.equal(found[first : first + len(run)], ran)
            assert (found[:first] == -1).all() and (found[first + len(run) :] == -1).all()


def test_a_tokenizer_that_cannot_pad_is_refused() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("byte_level"))
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a pad token nor an end-of-text token"):
        CpinferRolloutEngine(None, tokenizer)
