"""Modules of linear attention by our forward, over one sequence: the numbers of Transformers' own."""

import pytest
import torch
from transformers import KimiLinearConfig, OlmoHybridConfig, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearAttention, KimiLinearDeltaAttention
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridAttention, OlmoHybridGatedDeltaNet
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5Attention, Qwen3_5GatedDeltaNet
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from cpinfer.attention.linear_attention import DecodeStates, PrefillStates
from cpinfer.comm.axis import SoloComm
from cpinfer.kv_cache.state_store import StateStore
from cpinfer.layout.capacity import StateLayout
from cpinfer.layout.prefill import zigzag_split
from cpinfer.layout.states import PromptStates, StatePlace, plan_states
from cpinfer.models.gated_delta_net import LinearHeads, gated_delta_net, is_gated_delta_net

SIZES = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
}
LAYOUT = StateLayout(1, *SIZES.values())
OF_KIMI = {"linear_num_heads": 4, "linear_head_dim": 16}
LAYOUTS = {"kimi_linear": StateLayout(1, 4, 4, 16, 16, 4)}
WORDS = {"hidden_size": 64, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], **SIZES}
MODULES = {
    "olmo_hybrid": (OlmoHybridGatedDeltaNet, OlmoHybridConfig(**WORDS, num_attention_heads=8)),
    "kimi_linear": (KimiLinearDeltaAttention, KimiLinearConfig(**WORDS, **OF_KIMI)),
    "qwen3_next": (Qwen3NextGatedDeltaNet, Qwen3NextConfig(**WORDS)),
    "qwen3_5_text": (Qwen3_5GatedDeltaNet, Qwen3_5TextConfig(**WORDS)),
    "qwen3_5_moe_text": (Qwen3_5MoeGatedDeltaNet, Qwen3_5MoeTextConfig(**WORDS)),
}
CPU = torch.device("cpu")


def make(name, dtype=torch.float32):
    """A module whose state lasts, and hidden states of 70 tokens."""
    torch.manual_seed(0)
    cls, config = MODULES[name]
    module = cls(config, layer_idx=0).to(dtype).eval()
    for key, weight in module.named_parameters():
        if key.endswith(("A_log", "dt_bias")):
            weight.data.uniform_(-4, -2)
    return module, torch.randn(1, 70, 64, dtype=dtype)


def prefill(n, store, start=None):
    plan = plan_states(
        zigzag_split([n], 1, assigned=[0]), [PromptStates(start, (StatePlace(0, 0),))], pcp_rank=0, num_tail=3
    )
    return PrefillStates(plan, store, SoloComm())


def in_parts(name, module, hidden):
    """The module's output, in two chunks and two decode steps."""
    sizes = LAYOUTS.get(name, LAYOUT)
    store = StateStore(sizes, [0], 1, hidden.dtype, CPU)
    parts = [
        gated_delta_net(module, hidden[:, :40], prefill(40, store), LinearHeads.of(sizes)),
        gated_delta_net(module, hidden[:, 40:68], prefill(28, store, StatePlace(0, 0)), LinearHeads.of(sizes)),
        *(
            gated_delta_net(module, hidden[:, t : t + 1], DecodeStates([0], store), LinearHeads.of(sizes))
            for t in (68, 69)
        ),
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_chunks_and_decode_of_a_sequence_are_what_transformers_makes_of_the_whole(name):
    module, hidden = make(name)
    want = module(hidden)
    assert want.abs().max() > 0.5
    torch.testing.assert_close(in_parts(name, module, hidden), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_in_half_precision_they_are_as_near_to_float32_as_transformers_is(name):
    module, hidden = make(name)
    want = module(hidden)
    module, hidden = make(name, torch.bfloat16)[0], hidden.bfloat16()
    errors = [(out.float() - want).pow(2).mean().sqrt() for out in (in_parts(name, module, hidden), module(hidden))]
    assert errors[0] <= 1.05 * errors[1]


@torch.no_grad()
def test_a_past_that_is_left_out_shows():
    module, hidden = make("qwen3_next")
    store = StateStore(LAYOUT, [0], 1, torch.float32, CPU)
    out = gated_delta_net(module, hidden[:, 40:], prefill(30, store), LinearHeads.of(LAYOUT))
    assert (out - module(hidden)[:, 40:]).abs().max() > 1e-3


def test_only_linear_attention_is_taken_for_it():
    assert all(is_gated_delta_net(make(name)[0]) for name in MODULES)
    others = {"qwen3_5_text": Qwen3_5Attention, "olmo_hybrid": OlmoHybridAttention, "kimi_linear": KimiLinearAttention}
    assert not any(is_gated_delta_net(cls(MODULES[name][1], layer_idx=1)) for name, cls in others.items())
