"""Quantized checkpoints are the plain ones that they stand for, or are refused with what to do instead."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from broken_checkpoints import WEIGHTS, change_tensors, in_two_files, set_in_json
from cpinfer.engine.attach import attach
from cpinfer.errors import UnsupportedError, UserError
from cpinfer.models import checkpoint, loading
from cpinfer.models.checkpoint import read_checkpoint
from cpinfer.models.loading import fresh_model, known_weights, load_model, load_spec
from cpinfer.models.quantization import Float8, Mxfp4, plain_tensors, quantization
from cpinfer.models.stored_tensors import ReadBytes, stored_tensors
from quantized_checkpoints import fp8_of, make_fp8, make_mxfp4
from tiny_models import FAMILIES, make_model

# 40 columns, 20, 24 and 48 rows: some blocks are cut, in rows, in columns or in both.
FP8 = [("llama", (32, 32)), ("qwen3_moe", (32, 40)), ("deepseek_v3", (20, 24)), ("qwen2", None), ("gemma2", (128, 128))]


def make(folder: Path, kind: str, block: tuple[int, int] | None = (32, 32)) -> dict[str, torch.Tensor]:
    return make_mxfp4(folder) if kind == "gpt_oss" else make_fp8(folder, kind, block)


def saved(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """A model's tensors by the names that they have in files."""
    model.save_pretrained(folder)
    return load_file(folder / WEIGHTS)


@pytest.mark.parametrize(("family", "block"), [*FP8, ("gpt_oss", None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_checkpoint_is_the_plain_one_that_it_stands_for_and_can_be_saved_as_that(
    family: str, block: tuple[int, int] | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    plain = make(tmp_path / "quantized", family, block)
    model = load_model(str(tmp_path / "quantized"), dtype)
    found = saved(model, tmp_path / "plain")
    assert found.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(found[name], plain[name].to(found[name].dtype))] == []
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text(encoding="utf-8"))
    known = [known_weights(str(tmp_path / name), dtype) for name in ("quantized", "plain")]
    assert known[0] == known[1] and known[0].num_parameters == sum(p.numel() for p in model.parameters())


def test_quantized_layers_beyond_those_of_the_config_are_left_out(tmp_path: Path) -> None:
    """DeepSeek-V3's files have a layer more, for predicting several tokens."""
    plain = make(tmp_path / "quantized", "deepseek_v3", (20, 24))

    def with_one_more(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last = {name: tensor for name, tensor in tensors.items() if ".layers.1." in name}
        return {
            **tensors,
            **{name.replace(".layers.1.", ".layers.2."): tensor.clone() for name, tensor in last.items()},
        }

    change_tensors(tmp_path / "quantized", with_one_more)
    found = saved(load_model(str(tmp_path / "quantized"), torch.float32), tmp_path / "plain")
    assert all(torch.equal(found[name], plain[name]) for name in plain) and found.keys() == plain.keys()
    assert any(".layers.2." in name for name in known_weights(str(tmp_path / "quantized"), torch.float32).unexpected)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", FineGrainedFP8Config(dequantize=True)),
        ("deepseek_v3", FineGrainedFP8Config(dequantize=True)),
        ("gpt_oss", Mxfp4Config(dequantize=True)),
    ],
)
def test_where_no_block_is_cut_it_is_what_transformers_dequantizes_and_all_else_is_as_it_loads_it(
    family: str, config: Any, tmp_path: Path
) -> None:
    make(tmp_path, family, (8, 8))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config)
    ours = load_model(str(tmp_path), torch.bfloat16)
    assert type(ours) is type(theirs) and not ours.training
    found, wanted = ours.state_dict(), theirs.state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    said, saying = ours.config.to_dict(), theirs.config.to_dict()
    plans = {key for key in saying if key.startswith("base_model_")}  # which some versions change for quantized models
    assert said == {key: value for key, value in saying.items() if key in said or key not in plans}


def test_shards_a_spec_and_fresh_weights_are_as_of_any_model(tmp_path: Path) -> None:
    plain = make(tmp_path / "quantized", "llama")
    set_in_json(tmp_path / "quantized" / "generation_config.json", eos_token_id=[7, 9])
    in_two_files(tmp_path / "quantized")
    found = saved(load_model(str(tmp_path / "quantized"), torch.float32), tmp_path / "plain")
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert load_spec(str(tmp_path / "quantized")) == load_spec(str(tmp_path / "plain"))
    assert load_spec(str(tmp_path / "quantized")).eos_token_ids == (7, 9)
    assert {p.dtype for p in fresh_model(str(tmp_path / "quantized"), torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_slice_of_a_tensor_is_that_of_the_whole_for_who_loads_it_sharded(family: str, tmp_path: Path) -> None:
    plain = make(tmp_path, family, (20, 24))
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    how = quantization(config)
    assert how is not None
    found = read_checkpoint(tmp_path)
    tensors = plain_tensors(found, how, torch.float32, stored_tensors(found, torch.float32, ReadBytes()))
    assert tensors.keys() == plain.keys()
    for name, tensor in tensors.items():
        assert tuple(tensor.get_shape()) == plain[name].shape
        assert torch.equal(tensor[...], plain[name]) and torch.equal(tensor[1:3], plain[name][1:3])


def test_a_model_of_the_hub_is_fetched_before_it_is_dequantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make(tmp_path, "llama")
    asked = []

    def fetch(model: str, allow_patterns: list[str]) -> str:
        asked.append((model, allow_patterns))
        return str(tmp_path)

    for module in (loading, checkpoint):
        monkeypatch.setattr(module, "local_folder", lambda model: None)
    monkeypatch.setattr(checkpoint, "snapshot_download", fetch)
    model = load_model(str(tmp_path), torch.float32)
    assert asked == [(str(tmp_path), ["*.json", "model*.safetensors"])]
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, plain["model.layers.1.mlp.up_proj.weight"])


def test_scales_may_be_exponents() -> None:
    codes, _, _ = fp8_of(torch.randn(6, 6), (4, 4))
    exponents = torch.tensor([[120, 130], [127, 126]], dtype=torch.uint8)
    wanted = Float8((4, 4)).dequantized(codes, torch.exp2(exponents.float() - 127), torch.float32)
    as_dtype = exponents.view(torch.float8_e8m0fnu)
    for scales in (exponents, as_dtype):
        assert torch.equal(Float8((4, 4)).dequantized(codes, scales, torch.float32), wanted)
    assert torch.equal(wanted[:4, 4:], codes[:4, 4:].float() * 8)


# What is wrong with such files.


def without_scales(folder: Path) -> None:
    change_tensors(folder, lambda ts: {k: v for k, v in ts.items() if "1.mlp.up_proj.weight_scale" not in k})


def with_one_scale_fewer(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    change_tensors(folder, lambda ts: {**ts, name: ts[name][:-1]})


def block_is(value: Any) -> Callable[[Path], None]:
    config = {"quant_method": "fp8", "weight_block_size": value}
    return lambda folder: set_in_json(folder / "config.json", quantization_config=config)


def config_is(value: Any) -> Callable[[Path], None]:
    return lambda folder: set_in_json(folder / "config.json", quantization_config=value)


BROKEN: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no_scales": (without_scales, ["layers.1.mlp.up_proj.weight is quantized (F8_E4M3)", "up_proj.weight_scale_inv"]),
    "fewer_scales": (with_one_scale_fewer, ["q_proj.weight_scale_inv [1, 2]; scales [2, 2] were wanted"]),
    "another_block": (block_is([64, 64]), ["down_proj.weight_scale_inv [2, 3]; scales [1, 2] were wanted"]),
    "no_block": (block_is(None), ["; one scale for all were wanted"]),
    "block_of_texts": (block_is(["32", "32"]), ['"weight_block_size"', "['32', '32']; rows and columns"]),
    "block_of_nothing": (block_is([0, 32]), ['"weight_block_size"', "[0, 32]"]),
    "as_if_plain": (config_is(...), ["_proj.weight", "F8_E4M3 are no plain weights"]),
    "a_text": (config_is("fp8"), ['"quantization_config" is "fp8"; an object with a "quant_method" was wanted']),
    "no_method": (config_is({"bits": 4}), ['"quantization_config" is', 'an object with a "quant_method"']),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_not_quantized_as_the_config_says_are_refused_by_name(name: str, tmp_path: Path) -> None:
    make(tmp_path, "llama")
    breaking, words = BROKEN[name]
    breaking(tmp_path)
    for read in (known_weights, load_model):
        with pytest.raises(UserError) as caught:
            read(str(tmp_path), torch.float32)
        for word in words:
            assert word in str(caught.value)


def test_blocks_of_mxfp4_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    make_mxfp4(tmp_path)
    name = "model.layers.1.mlp.experts.down_proj_blocks"
    change_tensors(tmp_path, lambda ts: {**ts, name: ts[name][..., :15]})
    with pytest.raises(UserError, match=rf"{name} \[4, 64, 3, 15\] .*blocks \[experts, rows, groups, 16\] were wanted"):
        known_weights(str(tmp_path), torch.float32)
    assert Mxfp4().suffixes == ("_blocks", "_scales")


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "mxfp8", "new"])
def test_other_methods_are_refused_by_name_before_anything_loads(key: str, method: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**FAMILIES["llama"].to_dict(), key: {"quant_method": method}}))
    for read in (load_spec, lambda model: load_model(model, torch.float32)):
        with pytest.raises(
            UnsupportedError, match=f'"{key}" with quant_method "{method}".*Take the checkpoint that it'
        ):
            read(str(tmp_path))


# A model that its user has loaded: what counts is what its weights are.


def test_a_model_attaches_by_its_weights_whatever_its_config_says_of_those_that_it_came_from() -> None:
    model = make_model(copy.deepcopy(FAMILIES["llama"]))
    with attach(model) as engine:
        wanted = engine.generate([[1, 2, 3]])
    model.config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with attach(model) as engine:
        assert [r.token_ids for r in engine.generate([[1, 2, 3]])] == [r.token_ids for r in wanted]


class CodesInBuffers(nn.Module):
    """As GPTQ and AWQ keep them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.qweight = nn.Buffer(linear.weight.detach().to(torch.int32))


def test_codes_in_buffers_are_refused_wherever_they_are() -> None:
    model = make_model(copy.deepcopy(FAMILIES["llama"]))
    model.model.layers[1].mlp.up_proj = CodesInBuffers(model.model.layers[1].mlp.up_proj)
    with pytest.raises(UnsupportedError, match=r"layers.1.mlp.up_proj.qweight .*quantized weights"), attach(model):
        pytest.fail("the block must not be entered")
