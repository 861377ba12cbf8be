"""DeepSeek's attention modules under a latent cache: the text of Transformers, whatever variant a config names."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config

import cpinfer
from cpinfer.comm.threads import run_ranks
from cpinfer.config import EngineConfig
from cpinfer.layout.grid import RankGrid
from cpinfer.models.latent_attention import is_latent_attention, latent_attention
from cpinfer.ops.attention import dense_attention
from cpinfer_tools.verify import check_rollout
from tiny_models import FAMILIES, LATENT, TINY, YARN, make_model, prompts_of

SHAPE = {**TINY, **LATENT}
MSCALE = {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9}
VARIANTS = {
    "v2": DeepseekV2Config(**SHAPE, q_lora_rank=None),
    "v2_lora": DeepseekV2Config(**SHAPE, q_lora_rank=32),
    "v2_yarn": DeepseekV2Config(**SHAPE, q_lora_rank=None, rope_parameters=MSCALE),
    "v3": DeepseekV3Config(**SHAPE, q_lora_rank=None, rope_interleave=False),
    "v3_lora": DeepseekV3Config(**SHAPE, q_lora_rank=32, rope_interleave=False),
    "v3_interleave": DeepseekV3Config(**SHAPE, q_lora_rank=None, rope_interleave=True),
    "v3_lora_interleave_yarn": DeepseekV3Config(**SHAPE, q_lora_rank=32, rope_interleave=True, rope_parameters=MSCALE),
}
# Chunks, so that what is cached is attended to by later chunks as well: absorbed where queries travel, else expanded.
CONFIG = EngineConfig(
    dtype="float32",
    kv_cache_gib=0.001,
    block_size=4,
    cp_kv_cache_interleave_size=3,
    max_num_batched_tokens=24,
)
GREEDY = cpinfer.SamplingParams(temperature=0, max_new_tokens=6)
PROMPTS = prompts_of((1, 5, 40), vocab_size=128)


def generate(model, grid, config):
    def body(topology):
        with cpinfer.attach(copy.deepcopy(model), topology, config) as engine:
            return engine.generate(PROMPTS, GREEDY)

    return run_ranks(grid, body)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_engine_gives_the_text_of_transformers(variant):
    model = make_model(VARIANTS[variant])
    for result in generate(model, RankGrid(1, 2, 2), CONFIG):
        assert list(result.token_ids) == check_rollout.generate_greedy(model, result.prompt_token_ids, 6)
        expected = check_rollout.score(model, result.prompt_token_ids, result.token_ids)
        assert float((expected - torch.tensor(result.logprobs)).abs().max()) <= 1e-4


@pytest.mark.parametrize("exchange", ["kv", "queries"])
def test_cached_latents_are_read_alike_absorbed_and_expanded(exchange):
    model = make_model(VARIANTS["v3_lora"])
    for result in generate(model, RankGrid(1, 2, 2), replace(CONFIG, context_exchange=exchange)):
        expected = check_rollout.score(model, result.prompt_token_ids, result.token_ids)
        assert float((expected - torch.tensor(result.logprobs)).abs().max()) <= 1e-4


class WholeStep:
    """Attention to the tokens of one call, absorbed or expanded, without ranks or cache."""

    def __init__(self, absorbs):
        self.absorbs = absorbs
        self.seen = []

    def attend(self, layer, q, k, v):
        self.seen.append((layer, q, k, v))
        if self.absorbs:
            out, _ = dense_attention(layer.absorb(q), k, v, scale=layer.scale, causal=True)
            return layer.project(out)
        return dense_attention(q, *layer.expand(k, v), scale=layer.scale, causal=True)[0]


@torch.no_grad()
@pytest.mark.parametrize("absorbs", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_module_gives_what_its_own_forward_gives(variant, absorbs):
    """In float64, module by module: what is the module's own (projections, norms, RoPE, scale) is taken from it."""
    model = make_model(VARIANTS[variant], torch.float64)
    T = 9
    hidden = torch.randn(1, T, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = torch.arange(3, 3 + T)[None]
    embeddings = model.model.rotary_emb(hidden, position_ids=positions)
    mask = torch.full((T, T), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    model.config._attn_implementation = "sdpa"
    for index, layer in enumerate(model.model.layers):
        module = layer.self_attn
        want, _ = module(hidden_states=hidden, position_embeddings=embeddings, attention_mask=mask)
        step = WholeStep(absorbs)
        got, weights = latent_attention(module, hidden, embeddings, step)
        assert weights is None and got.shape == want.shape
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
        [(told, q, k, v)] = step.seen
        assert (told.index, told.scale) == (index, module.scaling)
        assert q.shape == (T, 8, 16 + 8) and k.shape == (T, 1, 24 + 8) and v.shape == (T, 1, 24)
        # What is cached is one vector, of which the values are the beginning: no copy.
        assert v.data_ptr() == k.data_ptr()


@torch.no_grad()
def test_queries_rotated_for_other_positions_would_be_seen():
    model = make_model(VARIANTS["v3"], torch.float64)
    hidden = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    module = model.model.layers[0].self_attn
    outs = [
        latent_attention(module, hidden, model.model.rotary_emb(hidden, position_ids=p[None]), WholeStep(True))[0]
        for p in (torch.arange(6), torch.arange(6) * 2)
    ]
    assert float((outs[0] - outs[1]).abs().max()) > 1e-3


def test_yarn_with_mscale_changes_the_scale_that_a_layer_is_told():
    scales = {name: make_model(config).model.layers[0].self_attn.scaling for name, config in VARIANTS.items()}
    assert scales["v3_lora_interleave_yarn"] > scales["v3"]


def test_latent_attention_is_told_by_its_projections():
    num_latent = {"deepseek_v2": 2, "deepseek_v3": 2, "kimi_linear": 1}  # of layers, the others of the last are linear
    for family, config in FAMILIES.items():
        model = make_model(config)
        found = [module for module in model.modules() if is_latent_attention(module)]
        assert len(found) == num_latent.get(family, 0)
    assert not is_latent_attention(nn.Linear(2, 2))
