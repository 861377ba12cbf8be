"""Weights that are codes for numbers, or that are elsewhere, are refused by name; all others are told as they are."""

import copy
import warnings

import accelerate
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from cpinfer.engine.attach import attach
from cpinfer.errors import UnsupportedError, UserError
from cpinfer.models.local_weights import refuse_unusable_weights, weight_kind
from tiny_models import FAMILIES, make_model


def fresh(family="llama"):
    return make_model(copy.deepcopy(FAMILIES[family]))


class Int8Linear(nn.Module):
    """Integers and a scale, as weight-only quantisation has them."""

    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)


class Packed4Bit(nn.Module):
    """As bitsandbytes packs two numbers into a byte."""

    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(torch.uint8).view(-1, 1)[::2], requires_grad=False)


class Float8Linear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


class CodesInABuffer(nn.Module):
    """As GPTQ keeps them."""

    def __init__(self, linear):
        super().__init__()
        self.qweight = nn.Buffer(linear.weight.detach().to(torch.int32))


class Codes(torch.Tensor):
    """A tensor that says it is of float32 and keeps bytes, as torchao's are."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32, requires_grad=False)

    def __init__(self, values):
        self.values = values.to(torch.int8)

    def __tensor_flatten__(self):
        return ["values"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values)
        raise NotImplementedError(function)


def with_codes(linear):
    linear.weight = nn.Parameter(Codes(linear.weight.detach()), requires_grad=False)
    return linear


@pytest.mark.parametrize("projection", ["self_attn.q_proj", "self_attn.v_proj"])
@pytest.mark.parametrize("quantise", [Int8Linear, Packed4Bit, Float8Linear, CodesInABuffer, with_codes])
def test_quantised_projections_are_refused_by_name(quantise, projection):
    model = fresh()
    parent, _, name = projection.partition(".")
    attention = getattr(model.model.layers[1], parent)
    setattr(attention, name, quantise(getattr(attention, name)))
    with pytest.raises(UnsupportedError, match=rf"layers.1.{projection}.*quantized weights"), attach(model):
        pytest.fail("the block must not be entered")


@pytest.mark.parametrize("quantise", [Int8Linear, Packed4Bit, Float8Linear, with_codes])
def test_so_are_those_outside_attention(quantise):
    model = fresh("qwen3")
    model.model.layers[0].mlp.up_proj = quantise(model.model.layers[0].mlp.up_proj)
    with pytest.raises(UnsupportedError, match=r"layers.0.mlp.up_proj.weight.*quantized weights"), attach(model):
        pytest.fail("the block must not be entered")


def test_dynamic_quantisation_of_torch_is_refused_by_name():
    model = torch.ao.quantization.quantize_dynamic(fresh(), {nn.Linear}, dtype=torch.qint8)
    with (
        pytest.raises(UnsupportedError, match=r"layers.0.self_attn.q_proj is a torch.ao.*quantized weights"),
        attach(model),
    ):
        pytest.fail("the block must not be entered")


def test_weights_that_are_elsewhere_are_refused_by_name():
    model = fresh()
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(UnsupportedError, match=r"weights on cpu, meta: .*device_map"), attach(model):
        pytest.fail("the block must not be entered")


def without_width(mlp):
    """What AutoTP leaves of an MLP on a rank for which there is no width: no rows, no bias for them, no columns."""
    mlp.c_fc.weight.data = mlp.c_fc.weight.data[:0]
    mlp.c_fc.bias.data = mlp.c_fc.bias.data[:0]
    mlp.c_proj.weight.data = mlp.c_proj.weight.data[:, :0]


@pytest.mark.parametrize("family", ["gpt_bigcode", "starcoder2"])
def test_a_rank_without_width_in_an_mlp_with_biases_adds_nothing_to_it(family):
    cut, whole = fresh(family), fresh(family)
    for name, module in cut.named_modules():
        if name.endswith(".mlp"):
            without_width(module)
            whole.get_submodule(name).c_proj.weight.data.zero_()
    small = {"kv_cache_gib": 2**-8}
    with attach(cut, config=small) as engine, attach(whole, config=small) as other:
        assert engine.generate([[1, 2, 3]])[0].token_ids == other.generate([[1, 2, 3]])[0].token_ids


@pytest.mark.parametrize("missing", [("bias",), ("weight", "bias")])
def test_a_bias_that_is_missing_beside_rows_of_a_matrix_or_with_it_is_refused(missing):
    model = fresh("starcoder2")
    linear = model.model.layers[1].mlp.c_fc
    for name in missing:
        getattr(linear, name).data = torch.empty(0)
    with pytest.raises(UserError, match=rf"layers.1.mlp.c_fc.{missing[0]} is empty on this rank"), attach(model):
        pytest.fail("the block must not be entered")


def test_a_weight_of_which_fsdp_gives_a_rank_nothing_is_none_that_is_elsewhere():
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=3)
    try:
        model = fully_shard(fresh("gpt_oss"))
        bias = model.model.layers[0].mlp.router.bias
        assert bias.shape == (4,) and bias.to_local().shape == (0,), "two values each for the first two ranks"
        refuse_unusable_weights(model)
    finally:
        dist.destroy_process_group()


def test_a_kind_of_weight_is_what_stays_the_same_between_steps():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    assert weight_kind(weight) == (torch.bfloat16, torch.device("cpu"))
    assert weight_kind(weight, gathered_by_fsdp=True) is None, "what FSDP has brought may be sharded again"
    weight.ds_id = 1  # sharded by ZeRO-3, which brings it wherever it wants
    assert weight_kind(weight) == (torch.bfloat16, None)


@pytest.mark.parametrize("part", ["model", "model.embed_tokens", "lm_head", "model.layers.1.mlp.up_proj"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_weights_in_a_dtype_that_nothing_is_cached_in_are_refused_with_what_to_do(part, dtype):
    model = fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch doubts complex modules
        model.get_submodule(part).to(dtype)
    before = {name: id(weight) for name, weight in model.named_parameters()}
    with (
        pytest.raises(UserError, match=rf"{part}\S* is of {dtype}; weights in bfloat16, float16, float32 were wanted"),
        attach(model),
    ):
        pytest.fail("the block must not be entered")
    assert {name: id(weight) for name, weight in model.named_parameters()} == before
    with attach(fresh().to(torch.float16)) as engine:
        assert len(engine.generate([[1, 2]])) == 1


def on_disk(model, folder):
    accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


def all_on_cpu(model, folder):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def embeddings_on_cpu(model, folder):
    accelerate.cpu_offload(model.model.embed_tokens, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("offload", [on_disk, all_on_cpu, embeddings_on_cpu])
def test_offloaded_weights_are_refused_by_name_and_the_model_runs_as_it_did(offload, tmp_path):
    wanted = fresh()(torch.tensor([[1, 2, 3]])).logits
    model = fresh()
    offload(model, tmp_path)
    with pytest.raises(UnsupportedError, match=r"weights on .*meta: .*offloaded \(device_map\)"), attach(model):
        pytest.fail("the block must not be entered")
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, wanted)


def test_so_are_buffers_that_are_elsewhere():
    model = fresh()
    model.model.rotary_emb.to("meta")
    with pytest.raises(UnsupportedError, match=r"weights on cpu, meta: .*device_map"), attach(model):
        pytest.fail("the block must not be entered")


def test_hooks_of_accelerate_that_move_nothing_are_no_fault():
    model = fresh()
    with attach(model) as engine:
        wanted = engine.generate([[1, 2, 3]])[0].token_ids
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with attach(model) as engine:
        assert engine.generate([[1, 2, 3]])[0].token_ids == wanted
