"""Checkpoints in fp8 and mxfp4 answer, in any layout, as Transformers answers on the numbers that they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_engine_parity import TOLERANCE, generate
from transformers import AutoModelForCausalLM

from broken_checkpoints import WEIGHTS
from cpinfer.config import SamplingParams
from cpinfer.layout.grid import RankGrid
from cpinfer.models.loading import load_model
from cpinfer_tools.verify import check_rollout
from quantized_checkpoints import make_fp8, make_mxfp4
from tiny_models import FAMILIES, make_model, prompts_of


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_quantized_checkpoint_answers_as_transformers_does_on_what_it_stands_for(family: str, tmp_path: Path) -> None:
    quantized, plain = tmp_path / "quantized", tmp_path / "plain"
    tensors = make_mxfp4(quantized) if family == "gpt_oss" else make_fp8(quantized, family, (20, 24))
    make_model(FAMILIES[family]).save_pretrained(plain)
    save_file(tensors, plain / WEIGHTS, {"format": "pt"})
    reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    model = load_model(str(quantized), torch.float32)
    sampling = SamplingParams(temperature=0, max_new_tokens=6)
    for grid in (RankGrid(), RankGrid(pcp_size=2, dcp_size=2)):
        for result in generate(model, grid, prompts_of((1, 7, 40), vocab_size=128), sampling):
            assert list(result.token_ids) == check_rollout.generate_greedy(reference, result.prompt_token_ids, 6)
            wanted = check_rollout.score(reference, result.prompt_token_ids, result.token_ids)
            assert (wanted - torch.tensor(result.logprobs)).abs().max() <= TOLERANCE
