"""Small checkpoints as publishers have them: fp8 in blocks (DeepSeek, Qwen), mxfp4 (gpt-oss); what they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from broken_checkpoints import WEIGHTS, Tensors, set_in_json
from tiny_models import FAMILIES, make_model

# E2M1: a sign, two bits of exponent, one of mantissa.
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def make_fp8(folder: Path, family: str, block: tuple[int, int] | None) -> Tensors:
    """A family's tiny model, its projections in fp8; the tensors that its files stand for."""
    make_model(FAMILIES[family]).save_pretrained(folder)
    stored, plain = {}, {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        if not name.endswith(("_proj.weight", "_mqa.weight")):
            stored[name] = plain[name] = tensor
            continue
        stored[name], scales, plain[name] = fp8_of(tensor, block)
        stored[f"{name}_scale_inv"] = scales
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    set_in_json(folder / "config.json", quantization_config={**config, "weight_block_size": block and list(block)})
    return plain


def fp8_of(tensor: Tensor, block: tuple[int, int] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and the values that these stand for. A scale is no power of two, and no two are alike."""
    rows, columns = tensor.shape
    high, wide = block or (rows, columns)
    counts = (-(-rows // high), -(-columns // wide))
    scales = np.linspace(0.7, 1.3, counts[0] * counts[1], dtype=np.float32).reshape(counts) / 300
    factors = torch.from_numpy(np.kron(scales, np.ones((high, wide), np.float32))[:rows, :columns])
    codes = (tensor.float() / factors).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, torch.from_numpy(scales) if block else torch.tensor(scales[0, 0]), codes.float() * factors


def make_mxfp4(folder: Path) -> Tensors:
    """A tiny gpt-oss, its experts in mxfp4; the tensors that its files stand for."""
    make_model(FAMILIES["gpt_oss"]).save_pretrained(folder)
    stored, plain, random = {}, {}, np.random.default_rng(0)
    for name, tensor in load_file(folder / WEIGHTS).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = plain[name] = tensor
            continue
        num_experts, num_in, num_out = tensor.shape
        codes = random.integers(0, 16, (num_experts, num_out, num_in))
        scales = random.integers(118, 124, (num_experts, num_out, num_in // 32))
        values = FP4[codes] * np.repeat(2.0 ** (scales - 127), 32, axis=-1)
        plain[name] = torch.from_numpy(values.astype(np.float32)).mT.contiguous()
        pairs = codes.reshape(num_experts, num_out, num_in // 32, 16, 2)
        stored[f"{name}_blocks"] = torch.from_numpy((pairs[..., 0] + 16 * pairs[..., 1]).astype(np.uint8))
        stored[f"{name}_scales"] = torch.from_numpy(scales.astype(np.uint8))
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    set_in_json(folder / "config.json", quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": kept})
    return plain
