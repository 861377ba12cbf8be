"""What each family wants of its checkpoint: all of it is found in a whole one, and one change of any kind is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cpinfer.errors import UserError
from cpinfer.models import expected_weights as placed
from cpinfer.models import families
from cpinfer.models.checkpoint import Checkpoint, StoredTensor, read_checkpoint
from cpinfer.models.expected_weights import Weights, check_weights, expected_weights, place_weights
from cpinfer.models.loading import known_weights, load_model, load_partly
from every_family import EVERY_FAMILY
from tiny_models import FAMILIES, make_model

Tensors = dict[str, StoredTensor]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Checkpoint, Any]]:
    """A family's tiny model as save_pretrained writes it, which is in the names that the hub has: header and config."""

    @cache
    def of(family: str) -> tuple[Checkpoint, Any]:
        folder = tmp_path_factory.mktemp(family)
        make_model(FAMILIES[family]).save_pretrained(folder)
        return read_checkpoint(folder), AutoConfig.from_pretrained(folder)

    return of


def changed(checkpoint: Checkpoint, change: Callable[[Tensors], Tensors]) -> Checkpoint:
    return replace(checkpoint, tensors=change(dict(checkpoint.tensors)))


def without(checkpoint: Checkpoint, *names: str) -> Checkpoint:
    return changed(checkpoint, lambda tensors: {k: v for k, v in tensors.items() if k not in names})


def one_of_each(checkpoint: Checkpoint) -> list[str]:
    """Of the tensors that differ in numbers of layers and experts alone, the last."""
    return list({re.sub(r"\d+", "N", name): name for name in checkpoint.tensors}.values())


# What of the names in files is another one in some models.
RENAMED = (
    ("block_sparse_moe.gate", "mlp.gate"),
    ("block_sparse_moe.gate", "mlp.router"),
    ("block_sparse_moe.router.layer", "block_sparse_moe.router"),
    ("block_sparse_moe.e_score", "mlp.e_score"),
    ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
    ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
)


def in_messages(name: str) -> tuple[str, ...]:
    """What a tensor may be called in messages: single experts by their files, what is renamed by the model."""
    names = {name.replace(in_files, in_model) for in_files, in_model in RENAMED}
    return (name,) if ".experts." in name else (name, *sorted(names))


def bytes_of(model: Any) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def assert_refused(checkpoint: Checkpoint, config: Any, *words: str | tuple[str, ...]) -> None:
    """With all of these words, and one of those that are in a tuple."""
    with pytest.raises(UserError) as caught:
        check_weights(checkpoint, config, torch.float32)
    assert str(caught.value).startswith(f"model {checkpoint.folder}: ")
    for word in words:
        assert any(each in str(caught.value) for each in (word if isinstance(word, tuple) else (word,)))


def test_the_families_here_are_those_that_run() -> None:
    assert set(FAMILIES) == set(families.FAMILIES)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_whole_checkpoint_is_whole_and_its_bytes_are_those_of_the_loaded_model(family: str, stored: Any) -> None:
    checkpoint, config = stored(family)
    weights = check_weights(checkpoint, config, torch.float32)
    model = load_model(str(checkpoint.folder), torch.float32)
    assert weights.num_parameters == sum(p.numel() for p in model.parameters())
    assert weights.bytes_per_rank(1) == bytes_of(model)
    assert weights == expected_weights(config, torch.float32), "the config alone says the same"
    half = load_model(str(checkpoint.folder), torch.bfloat16)  # some families keep some weights in float32 there
    assert expected_weights(config, torch.bfloat16).bytes_per_rank(1) == bytes_of(half)
    for loaded, dtype in ((model, torch.float32), (half, torch.bfloat16)):
        plain = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype)
        assert_same_values(loaded, plain)


def assert_same_values(found: Any, wanted: Any) -> None:
    """Bit by bit, dtypes and what is in several places included."""
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (found, wanted))
        assert ours.keys() == theirs.keys()
        other = [k for k in ours if ours[k].dtype != theirs[k].dtype or not torch.equal(ours[k], theirs[k])]
        assert other == []
        assert len(set(map(id, ours.values()))) == len(set(map(id, theirs.values())))


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_each_tensor_is_missed_by_its_name(family: str, stored: Any) -> None:
    checkpoint, config = stored(family)
    for name in one_of_each(checkpoint):
        assert_refused(without(checkpoint, name), config, in_messages(name), "in none of its files")


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_each_tensor_of_another_shape_is_named_with_both(family: str, stored: Any) -> None:
    checkpoint, config = stored(family)
    for name in [n for i, n in enumerate(one_of_each(checkpoint)) if i % 3 == 0 or "experts" in n]:
        tensor = checkpoint.tensors[name]
        wider = replace(tensor, shape=(*tensor.shape[:-1], sum(tensor.shape[-1:]) + 1))
        other = replace(checkpoint, tensors={**checkpoint.tensors, name: wider})
        assert_refused(other, config, in_messages(name), str(list(wider.shape)))


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_tensor_in_a_quantized_dtype_is_as_good_as_missing(family: str, stored: Any) -> None:
    checkpoint, config = stored(family)
    name, tensor = next((k, v) for k, v in checkpoint.tensors.items() if k.endswith("proj.weight") or "c_attn" in k)
    bytes_only = replace(checkpoint, tensors={**checkpoint.tensors, name: replace(tensor, dtype="F8_E4M3")})
    assert_refused(bytes_only, config, name)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_more_layers_than_the_files_have_are_missed(family: str, stored: Any) -> None:
    checkpoint, config = stored(family)
    key = "n_layer" if family == "gpt_bigcode" else "num_hidden_layers"
    data = {**config.to_dict(), key: 3}
    for each in ("layer_types", "no_rope_layers"):
        if data.get(each):
            data[each] = [*data[each], data[each][0]]
    assert_refused(checkpoint, type(config)(**data), ".2.", "in none of its files")


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_another_prefix_on_every_name_is_all_missing_and_the_base_models_own_is_not(family: str, stored: Any) -> None:
    checkpoint, config = stored(family)
    assert_refused(changed(checkpoint, lambda ts: {f"wrapped.{k}": v for k, v in ts.items()}), config, "in none of")
    prefix = "transformer." if family == "gpt_bigcode" else "model."
    bare = changed(checkpoint, lambda ts: {k.removeprefix(prefix): v for k, v in ts.items()})
    assert check_weights(bare, config, torch.float32).unexpected == (), "as saved from the base model"


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_tensors_without_a_place_are_named_and_no_fault(family: str, stored: Any) -> None:
    checkpoint, config = stored(family)
    more = {"vision.tower.weight": StoredTensor("F32", (3,)), "another.mask": StoredTensor("BOOL", (2, 2))}
    weights = check_weights(replace(checkpoint, tensors={**checkpoint.tensors, **more}), config, torch.float32)
    assert weights.unexpected == ("vision.tower.weight",)


EXPERTS = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.{}.{}.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.{}.{}.weight",
    "deepseek_v2": "model.layers.1.mlp.experts.{}.{}.weight",
    "deepseek_v3": "model.layers.1.mlp.experts.{}.{}.weight",
}


@pytest.mark.parametrize("family", EXPERTS)
def test_an_expert_that_is_missing_or_has_anothers_number_is_named(family: str, stored: Any) -> None:
    checkpoint, config = stored(family)
    parts = ("w1", "w2", "w3") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    second = [EXPERTS[family].format(1, part) for part in parts]
    assert set(second) <= set(checkpoint.tensors)
    assert_refused(without(checkpoint, *second), config)
    moved = {name: name.replace("experts.1.", "experts.99.") for name in second}
    assert_refused(
        changed(checkpoint, lambda ts: {moved.get(k, k): v for k, v in ts.items()}), config, "experts.1.", "in none"
    )
    count = sum(name.startswith(EXPERTS[family].partition("{}")[0]) for name in checkpoint.tensors) // len(parts)
    last = [EXPERTS[family].format(count - 1, part) for part in parts]
    assert_refused(without(checkpoint, *last), config)  # fewer, in good order: their shape is another
    assert_refused(
        without(checkpoint, *(n for n in checkpoint.tensors if "experts" in n and n.endswith(f"{parts[0]}.weight"))),
        config,
    )


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_without_accelerate_the_same_is_known_of_a_checkpoint(
    family: str, stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, config = stored(family)
    known = place_weights(checkpoint, config, torch.float32)
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda: False)
    monkeypatch.setattr(placed, "find_spec", lambda name: None)
    assert place_weights(checkpoint, config, torch.float32) == known
    name = next(iter(known.linear.values()))
    assert_refused(without(checkpoint, name), config, name, "in none of its files")


def test_a_weight_of_a_linear_layer_stays_in_a_file_where_a_tensor_there_is_it_as_it_is(stored: Any) -> None:
    checkpoint, config = stored("mixtral")
    place = place_weights(checkpoint, config, torch.bfloat16)
    kinds = {name.rsplit(".", 2)[-2] for name in place.linear}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}, "experts are joined, embeddings no such layer"
    assert all(key == name for key, name in place.linear.items()) and place.wanted == checkpoint.tensors.keys()
    bare = changed(checkpoint, lambda ts: {k.removeprefix("model."): v for k, v in ts.items()})
    renamed = place_weights(bare, config, torch.float32).linear
    assert renamed.keys() == place.linear.keys() and set(renamed.values()) <= bare.tensors.keys()


def test_a_tied_head_is_no_weight_of_its_own_and_the_log_says_that_it_is_read_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = type(FAMILIES["qwen2"])(**{**FAMILIES["qwen2"].to_dict(), "tie_word_embeddings": True})
    make_model(config).save_pretrained(tmp_path)
    place = place_weights(read_checkpoint(tmp_path), config, torch.float32)
    assert not any("lm_head" in key or "embed" in name for key, name in place.linear.items())
    with caplog.at_level("INFO", "cpinfer"):
        partly = load_partly(str(tmp_path), torch.float32)
    assert [r.getMessage() for r in caplog.records if "read whole by every rank: lm_head.weight" in r.getMessage()]
    left = {name for name, weight in partly.model.named_parameters() if weight.is_meta}
    assert left == partly.unread.keys() == place.linear.keys()


def test_tied_embeddings_are_wanted_once(tmp_path: Path) -> None:
    config = type(FAMILIES["qwen2"])(**{**FAMILIES["qwen2"].to_dict(), "tie_word_embeddings": True})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    assert "lm_head.weight" not in checkpoint.tensors
    weights = check_weights(checkpoint, config, torch.float32)
    assert weights.num_parameters == sum(p.numel() for p in load_model(str(tmp_path), torch.float32).parameters())
    assert_refused(without(checkpoint, "model.embed_tokens.weight"), config, "model.embed_tokens.weight")


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"pad_token_id": 10**6}),
        ("gemma2", {"query_pre_attn_scalar": 0}),
        ("deepseek_v3", {"first_k_dense_replace": None}),
        ("qwen3_moe", {"decoder_sparse_step": 0}),
    ],
)
def test_a_config_that_no_model_can_be_built_of_is_refused_with_the_value_that_is_to_blame(
    family: str, change: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**FAMILIES[family].to_dict(), **change}))
    [(name, value)] = change.items()
    with pytest.raises(UserError, match=f'no model can be built from .* With another "{name}" than {value} one can'):
        known_weights(str(tmp_path), torch.float32, in_files=False)


def test_tensor_parallelism_divides_what_is_in_layers() -> None:
    weights = Weights(num_parameters=0, layer_bytes=1001, other_bytes=10)
    assert [weights.bytes_per_rank(tp) for tp in (1, 2, 4)] == [1011, 511, 261]
