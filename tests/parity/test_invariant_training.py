"""A training forward has the logprobs of deterministic rollouts, bit for bit, and the gradients of any other."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import cpinfer
from covering import pairs
from cpinfer.comm.threads import run_ranks
from cpinfer.config import SamplingParams, parse_config
from cpinfer.errors import UnsupportedError, UserError
from cpinfer.layout.grid import RankGrid
from every_family import OFTEN, SELDOM, WITH_STATES
from tiny_models import FAMILIES, make_model, prompts_of

DTYPES = ["float32", "bfloat16"]
SELDOM_TRAINED = [
    f if f == "phimoe" else pytest.param(f, marks=pytest.mark.slow) for f in SELDOM if f not in WITH_STATES
]
TRAINABLE = [*OFTEN, *SELDOM_TRAINED]
PROMPTS = prompts_of((5, 40, 17, 133, 8), vocab_size=128)
CONFIG = parse_config({"kv_cache_gib": 2**-7, "max_num_batched_tokens": 50, "block_size": 4, "deterministic": True})
SAMPLING = SamplingParams(temperature=0.7, seed=5, n=2, max_new_tokens=9)

pytestmark = pytest.mark.timeout(240)


def rollouts(model: Any, grid: RankGrid = RankGrid(pcp_size=2, dcp_size=2)) -> list[Any]:
    def body(topology: cpinfer.Topology) -> list[Any]:
        with cpinfer.attach(copy.deepcopy(model), topology, CONFIG) as engine:
            return engine.generate(PROMPTS, SAMPLING)

    found: list[Any] = run_ranks(grid, body)[0]
    return found


def trained(model: Any, results: Sequence[Any], batch_size: int) -> list[list[float]]:
    return cpinfer.training_logprobs(
        model,
        [r.prompt_token_ids for r in results],
        [r.token_ids for r in results],
        temperature=SAMPLING.temperature,
        batch_size=batch_size,
        pad_token_id=0,
    )


@pytest.mark.parametrize(("family", "dtype"), pairs(TRAINABLE, DTYPES))
def test_rollouts_and_training_agree_in_every_bit(family: str, dtype: str) -> None:
    model = make_model(FAMILIES[family]).to(getattr(torch, dtype))
    results = rollouts(model)
    sampled = [list(r.processed_logprobs) for r in results]
    before = trained(model, results, 4)
    for batch_size in (1, 3, 8):
        with cpinfer.invariant_training(model, CONFIG):
            assert trained(model, results, batch_size) == sampled, batch_size
    assert before != sampled, "without it they differ"
    assert trained(model, results, 4) == before, "the model is what it was"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_logits(side: str) -> None:
    model = make_model(FAMILIES["mistral"])
    with cpinfer.invariant_training(model, CONFIG), torch.no_grad():
        alone = [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
        longest = max(map(len, PROMPTS)) + 3
        ids = torch.full((len(PROMPTS), longest), 7)
        mask = torch.zeros(len(PROMPTS), longest, dtype=torch.long)
        for row, prompt in enumerate(PROMPTS):
            place = slice(longest - len(prompt), longest) if side == "left" else slice(0, len(prompt))
            ids[row, place], mask[row, place] = torch.tensor(prompt), 1
        batch = model(ids, attention_mask=mask).logits
    for row, logits in enumerate(alone):
        assert torch.equal(batch[row][mask[row].bool()], logits)


def loss_of(model: Any) -> Tensor:
    ids = torch.tensor([[0] * 12 + PROMPTS[4], PROMPTS[1][:20]])
    mask = torch.tensor([[0] * 12 + [1] * 8, [1] * 20])
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    told = (mask[:, 1:] * mask[:, :-1]).bool()  # padding tells nothing
    return torch.log_softmax(logits[:, :-1], dim=-1).gather(-1, ids[:, 1:, None])[told].mean()


@pytest.mark.parametrize("family", TRAINABLE)
def test_gradients_are_those_of_ordinary_attention(family: str) -> None:
    model = make_model(copy.deepcopy(FAMILIES[family]))  # in eval mode: rollouts know no dropout
    model.set_attn_implementation("eager")  # that of sdpa leaves soft caps out
    loss = loss_of(model)
    loss.backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    with cpinfer.invariant_training(model, CONFIG):
        other = loss_of(model)
        other.backward()
    assert abs(loss.item() - other.item()) < 1e-5
    for name, weight in model.named_parameters():
        if expected[name] is None:
            assert weight.grad is None
        else:
            apart = (weight.grad - expected[name]).abs().max()
            assert apart <= 2e-5 * expected[name].abs().max(), (name, apart)


@pytest.mark.parametrize("family", ["qwen2", "gpt_oss", "deepseek_v2"])
def test_autocast_over_float32_weights_is_trained_as_it_is_sampled(family: str) -> None:
    """Autocast leaves keys in float32 and values in bfloat16."""
    model = make_model(FAMILIES[family])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with cpinfer.attach(model, config=CONFIG) as engine:  # of this thread, as autocast is
            results = engine.generate(PROMPTS, SAMPLING)
        with cpinfer.invariant_training(model, CONFIG):
            assert trained(model, results, 3) == [list(r.processed_logprobs) for r in results]
            loss_of(model).backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


@pytest.mark.parametrize("family", ["qwen2", "deepseek_v2"])
def test_adapters_are_trained_as_they_are_sampled(family: str) -> None:
    adapted = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "kv_a_proj_with_mqa", "down_proj"], init_lora_weights=False
    )
    model = get_peft_model(make_model(FAMILIES[family]), adapted)
    results = rollouts(model)
    with cpinfer.invariant_training(model, CONFIG):
        assert trained(model, results, 3) == [list(r.processed_logprobs) for r in results]


def test_adapters_that_drop_are_refused_while_they_do() -> None:
    adapted = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1)
    model = get_peft_model(make_model(FAMILIES["qwen2"]), adapted).train()
    results = rollouts(model)
    with cpinfer.invariant_training(model, CONFIG):
        assert trained(model, results, 3) == [list(r.processed_logprobs) for r in results]  # in eval mode
        with pytest.raises(UserError, match=r"q_proj\.lora_dropout\.default is 0\.1, which rollouts know nothing of"):
            model(torch.tensor([[1, 2, 3]]))


def test_adapters_on_what_expands_latents_are_refused() -> None:
    model = get_peft_model(make_model(FAMILIES["deepseek_v3"]), LoraConfig(r=4, target_modules=["kv_b_proj"]))
    with (
        pytest.raises(UnsupportedError, match="adapters on kv_b_proj of latent attention"),
        cpinfer.invariant_training(model, CONFIG),
    ):
        raise AssertionError("it was not refused")


@pytest.mark.parametrize("family", ["qwen2", "deepseek_v2"])
def test_checkpointed_layers_are_computed_again_in_the_same_bits(family: str) -> None:
    """A backward of other bits would raise nothing: gradients of both ways are compared."""
    found = []
    for is_checkpointed in (False, True):
        model = make_model(FAMILIES[family]).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with cpinfer.invariant_training(model, CONFIG):
            loss_of(model).backward()
        found.append([weight.grad for weight in model.parameters()])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("family", ["qwen2", "deepseek_v2"])
def test_what_rollouts_know_nothing_of_is_refused(family: str) -> None:
    model = make_model(FAMILIES[family])
    ids, mask = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 1]])
    with cpinfer.invariant_training(model, CONFIG):
        with pytest.raises(UserError, match="position_ids are not those of the tokens"):
            model(ids, attention_mask=mask, position_ids=torch.tensor([[0, 1, 2]]))
        model(ids, attention_mask=mask, position_ids=torch.tensor([[5, 0, 1]]))
        with pytest.raises(UserError, match="of sequences packed into a row"):
            model(ids, position_ids=torch.tensor([[0, 0, 1]]))
        for other in (torch.ones(1, 1, 3, 3).bool(), {"full_attention": None}):
            with pytest.raises(UserError, match=r"attention_mask is not \[batch, tokens\]"):
                model(ids, attention_mask=other)
        assert torch.equal(model(ids, mask, None).logits, model(ids, mask).logits)
        cached = model(ids, use_cache=True).past_key_values
        with pytest.raises(UserError, match="Set use_cache to False"):
            model(ids, past_key_values=cached)
    dropping = copy.deepcopy(FAMILIES[family])
    dropping.attention_dropout = 0.1
    model = make_model(dropping).train()
    with cpinfer.invariant_training(model), pytest.raises(UserError, match=r"dropout of attention is 0\.1"):
        model(ids)
    with (
        pytest.raises(UnsupportedError, match="invariant training of linear attention"),
        cpinfer.invariant_training(make_model(FAMILIES["qwen3_next"])),
    ):
        raise AssertionError("it was not refused")


def test_other_dtypes_are_refused() -> None:
    model = make_model(FAMILIES["qwen2"]).double()
    with cpinfer.invariant_training(model), pytest.raises(UserError, match=r"keys are torch\.float64 and values"):
        model(torch.tensor([[1, 2, 3]]))


def test_sinks_of_other_heads_are_refused() -> None:
    model = make_model(FAMILIES["gpt_oss"])
    attention = model.model.layers[0].self_attn
    attention.sinks = torch.nn.Parameter(torch.cat([attention.sinks.detach()] * 2))
    with cpinfer.invariant_training(model), pytest.raises(UserError, match="its heads are sharded, its sinks are not"):
        model(torch.tensor([[1, 2, 3]]))


def test_another_order_is_other_bits() -> None:
    model = make_model(FAMILIES["qwen2"])
    results = rollouts(model)
    with cpinfer.invariant_training(model, {"deterministic_kv_shards": 4, "block_size": 4}):
        assert trained(model, results, 3) != [list(r.processed_logprobs) for r in results]
