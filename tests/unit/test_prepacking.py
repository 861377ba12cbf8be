"""Copies of weights in oneDNN's order: the products are the layer's, and whose weights they are is never in doubt."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from cpinfer.config import SamplingParams
from cpinfer.engine.attach import attach
from cpinfer.engine.needs import RankNeeds
from cpinfer.errors import UnsupportedError, UserError
from cpinfer.models import prepacking
from cpinfer.models.attachment import replaced
from cpinfer.models.prepacking import PrepackedLinear, PrepackedLinears, prepackable
from cpinfer.models.runner import _prepacked
from every_family import WITH_STATES
from tiny_models import FAMILIES, make_model, prompts_of

GREEDY = SamplingParams(temperature=0, max_new_tokens=8)
PROMPTS = prompts_of((3, 40, 90), vocab_size=128)
FAST = ("qwen2", "deepseek_v3", "qwen3_moe")


def answers(model: Any, **keys: Any) -> list[Any]:
    with attach(model, dtype="auto", kv_cache_gib=0.001, **keys) as engine:
        return engine.generate(PROMPTS, GREEDY)


def tokens(results: list[Any]) -> list[tuple[int, ...]]:
    return [tuple(result.token_ids) for result in results]


def linear(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 40, bias=bias, dtype=dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_gives_the_products_of_the_layer(dtype: torch.dtype, bias: bool) -> None:
    module = linear(dtype, bias=bias)
    packed = PrepackedLinear(module)
    packed.pack()
    for rows in (1, 2, 16, 257):
        x = torch.randn(1, rows, 48).to(dtype)
        for given in (x, x[0], x.transpose(0, 1), x.unsqueeze(0), torch.cat([x, x], dim=-1)[..., 48:]):
            with torch.no_grad():
                found, expected = packed.forward(given), module(given)
            assert found.shape == expected.shape and not found.isnan().any()
            if dtype == torch.bfloat16:
                assert torch.equal(found, expected)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_copy_is_made_anew_where_its_weight_has_changed_or_moved() -> None:
    module, x = linear(), torch.randn(4, 48)
    packed = PrepackedLinear(module)
    together = PrepackedLinears({module: packed})
    together.renew()
    assert not packed.is_stale and packed._copy is not None, "what is missing is made"
    before = packed.forward(x)
    changes: list[Callable[[], object]] = [
        lambda: module.weight.mul_(2),
        lambda: setattr(module.weight, "data", 3 * module.weight.data),
        lambda: setattr(module, "weight", nn.Parameter(2 * module.weight)),
        lambda: module.weight.data.mul_(2),
    ]
    for change in changes:
        change()
        assert packed.is_stale and torch.equal(packed.forward(x), before), "what nobody renews is of old weights"
        together.renew()
        before = packed.forward(x)
        torch.testing.assert_close(before, module(x))
    module.weight.data[1, 1] += 1
    assert not packed.is_stale, "a single element that torch does not count has to be told of"
    together.release()
    assert packed._copy is None and torch.equal(packed.forward(x), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_a_fused_optimiser_is_seen(dtype: torch.dtype) -> None:
    module = linear(dtype)
    packed = PrepackedLinear(module)
    packed.pack()
    version = module.weight._version
    module(torch.randn(4, 48, dtype=dtype)).sum().backward()
    torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True).step()
    assert module.weight._version == version, "torch counts it by now"
    assert packed.is_stale


def test_a_module_that_is_copied_runs_by_its_own_weight() -> None:
    module, x = linear(), torch.randn(4, 48)
    packed = PrepackedLinear(module)
    packed.pack()
    with replaced(module, "forward", packed.forward):
        copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for copied in copies:
        with torch.no_grad():
            copied.weight.mul_(2)
        torch.testing.assert_close(copied(x), nn.functional.linear(x, copied.weight, copied.bias), rtol=0, atol=0)


def test_weights_of_inference_mode_are_packed() -> None:
    with torch.inference_mode():
        module = linear()
    packed = PrepackedLinear(module)
    packed.pack()
    assert not packed.is_stale
    with torch.inference_mode():
        module.weight.mul_(2)
    assert packed.is_stale


def test_memory_goes_to_the_first_layers_that_it_suffices_for() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 80), nn.Linear(8, 4), nn.Linear(8, 8))
    found = prepackable(model, granted_bytes=8 * (8 + 4) * 4)
    assert list(found.by_module) == [model[0], model[2]] and found.num_bytes == 8 * (8 + 4) * 4
    assert not prepackable(model, 8).by_module


def test_layers_of_another_kind_stay_as_they_are() -> None:
    class Other(nn.Linear):
        pass

    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    by_another = nn.Linear(8, 8)
    by_another.forward = lambda input: input  # type: ignore[method-assign]
    computed = nn.Linear(8, 8)
    del computed.weight
    computed.weight = torch.zeros(8, 8)
    others = [Other(8, 8), parametrized, by_another, computed, nn.Linear(8, 8, dtype=torch.float16)]
    plain = nn.Linear(8, 8)
    assert list(prepackable(nn.Sequential(*others, plain), 2**20).by_module) == [plain]


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in FAST else [pytest.mark.slow]) for f in sorted(FAMILIES)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_are_those_of_the_model_as_it_is(family: str, dtype: torch.dtype) -> None:
    model = make_model(copy.deepcopy(FAMILIES[family]), dtype)
    plain, packed = answers(model), answers(model, prepacked_weights_gib=1)
    assert tokens(plain) == tokens(packed)
    logprobs, expected = (torch.tensor([r.logprobs for r in results]) for results in (packed, plain))
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=0 if dtype == torch.bfloat16 else 1e-4)
    assert dtype == torch.bfloat16 or family in WITH_STATES or not torch.equal(logprobs, expected), "copies were used"


def test_copies_are_there_while_the_engine_is_awake_and_the_model_is_given_back() -> None:
    model = make_model(copy.deepcopy(FAMILIES["qwen2"]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with attach(model, kv_cache_gib=0.001, prepacked_weights_gib=1) as engine:
        linears = engine._runner.prepacked.by_module.values()
        assert len(linears) == 7 * model.config.num_hidden_layers + 1
        awake = engine.generate(PROMPTS, GREEDY)
        assert all(packed._copy is not None for packed in linears)
        engine.sleep()
        assert all(packed._copy is None for packed in linears)
        engine.wake()
        assert tokens(engine.generate(PROMPTS, GREEDY)) == tokens(awake)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@torch.no_grad()
def changed(model: Any, sign: float) -> None:
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(sign)


@pytest.mark.parametrize("told", [True, False])
def test_weights_that_change_between_calls_are_those_that_answer(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(copy.deepcopy(FAMILIES["qwen2"]))
    before = tokens(answers(model))
    keys = {"kv_cache_gib": 0.001, "prepacked_weights_gib": 1, "enable_prefix_caching": False}
    with attach(model, **keys) as engine:
        assert tokens(engine.generate(PROMPTS, GREEDY)) == before
        changed(model, -1)
        if told:
            engine.weights_changed()
        after = tokens(engine.generate(PROMPTS, GREEDY))
    assert after == tokens(answers(model)) != before
    monkeypatch.setattr(prepacking.PrepackedLinears, "renew", lambda _: None)
    with attach(model, **keys) as engine:
        changed(model, -1)
        assert tokens(engine.generate(PROMPTS, GREEDY)) == after, "old copies answer when nothing looks at weights"


def test_old_copies_are_gone_when_copying_new_ones_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(copy.deepcopy(FAMILIES["qwen2"]))
    plain_pack, num_packed = PrepackedLinear.pack, 0

    def interrupted(packed: PrepackedLinear) -> None:
        nonlocal num_packed
        num_packed += 1
        if num_packed == 3:
            raise KeyboardInterrupt
        plain_pack(packed)

    with attach(model, kv_cache_gib=0.001, prepacked_weights_gib=1) as engine:
        before = tokens(engine.generate(PROMPTS, GREEDY))
        changed(model, -1)
        monkeypatch.setattr(PrepackedLinear, "pack", interrupted)
        monkeypatch.setattr(PrepackedLinears, "renew", lambda _: None)
        with pytest.raises(KeyboardInterrupt):
            engine.weights_changed()
        after = tokens(engine.generate(PROMPTS, GREEDY))
    assert after == tokens(answers(model)) != before


def test_no_copy_is_left_where_waking_fails_or_the_block_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError("no memory")

    with attach(make_model(copy.deepcopy(FAMILIES["qwen2"])), kv_cache_gib=0.001, prepacked_weights_gib=1) as engine:
        linears = engine._runner.prepacked.by_module.values()
        engine.sleep()
        with monkeypatch.context() as patched, pytest.raises(MemoryError):
            patched.setattr(RankNeeds, "make_cache", no_memory)
            engine.wake()
        assert all(packed._copy is None for packed in linears)
        engine.wake()
        assert all(packed._copy is not None for packed in linears)
    assert linears and all(packed._copy is None for packed in linears), "the engine is still there"


def test_an_adapter_that_is_merged_is_in_the_copies() -> None:
    adapted = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(make_model(copy.deepcopy(FAMILIES["qwen2"])), adapted)
    with attach(model, kv_cache_gib=0.001, prepacked_weights_gib=1) as engine:
        apart = tokens(engine.generate(PROMPTS, GREEDY))
        model.merge_adapter()
        assert tokens(engine.generate(PROMPTS, GREEDY)) == apart
        model.unmerge_adapter()
        with model.disable_adapter():
            assert tokens(engine.generate(PROMPTS, GREEDY)) != apart


def test_an_adapter_that_is_merged_while_a_stream_is_open_is_in_the_copies_of_the_next_call() -> None:
    torch.manual_seed(0)
    adapted = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(make_model(copy.deepcopy(FAMILIES["qwen2"])), adapted)
    with attach(model, kv_cache_gib=0.001, prepacked_weights_gib=1) as engine:
        apart = tokens(engine.generate(PROMPTS, GREEDY))
        version = engine.weights_version
        stream = engine.stream(PROMPTS, [SamplingParams(temperature=0, max_new_tokens=n) for n in (2, 30, 30)])
        next(stream)
        model.merge_adapter()
        with pytest.raises(RuntimeError, match="cannot change adapters while a stream is open"):
            engine.generate(PROMPTS, GREEDY)
        stream.close()
        merged = engine.generate(PROMPTS, GREEDY)
    assert tokens(merged) == apart
    assert {result.weights_version for result in merged} == {version + 1}


def test_a_weight_that_is_read_without_a_call_takes_no_memory() -> None:
    model = make_model(copy.deepcopy(FAMILIES["deepseek_v3"]))
    packed = prepackable(model, 2**30).by_module
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if module in packed}
    assert "o_proj" in names and "kv_b_proj" not in names


def test_what_cannot_be_packed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(copy.deepcopy(FAMILIES["qwen2"]))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UnsupportedError, match=r"^autocast to torch\.bfloat16: cpinfer does not support"),
        attach(model, kv_cache_gib=0.001, prepacked_weights_gib=1),
    ):
        pass
    for keys, words in (
        ({"deterministic": True}, '"prepacked_weights_gib" is 1'),
        ({"prepacked_weights_gib": 2**14}, "prepacked_weights_gib=16384 is more than the"),
    ):
        with pytest.raises(UserError, match=words), attach(model, **{"prepacked_weights_gib": 1, **keys}):
            pass
    with (
        pytest.raises(UnsupportedError, match=r'prepacked weights of a model whose weights are sharded.*"full"'),
        _prepacked(model, 2**20, None, True),
    ):
        pass
    with pytest.raises(UnsupportedError, match="device meta"):
        prepackable(nn.Linear(2, 2, device="meta"), 100)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert prepackable(linear(), 2**20).by_module
    with pytest.raises(UnsupportedError, match="bfloat16 on this processor"):
        prepackable(linear(torch.bfloat16), 2**20)
    assert not any("forward" in vars(module) for module in model.modules())
