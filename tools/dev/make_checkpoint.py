"""Writes a checkpoint of a Llama with random weights, of a size that one asks for: to load it, not to run it.

    python tools/dev/make_checkpoint.py FOLDER --gb 2

Tensors are written shard by shard, so a checkpoint may be larger than memory. The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

HEAD_DIM = 128


def config_of(num_bytes: float, dtype: torch.dtype) -> LlamaConfig:
    """A Llama of about so many bytes: as many layers as fit, of a width that leaves 16 or more to a checkpoint of 2 GB.

    Proportions are those of Llama 3: 4 query heads to a KV head, an MLP of 3.5 times the width.
    """
    width = 2048 if num_bytes >= 1e9 else 1024
    sizes = {
        "hidden_size": width,
        "intermediate_size": width * 7 // 2,
        "num_attention_heads": width // HEAD_DIM,
        "num_key_value_heads": width // HEAD_DIM // 4,
        "head_dim": HEAD_DIM,
        "vocab_size": 16 * width,
    }
    layer = width * (2 * width + 2 * width // 4 + 3 * width * 7 // 2)
    embeddings = 2 * width * sizes["vocab_size"]
    num_layers = max(1, round((num_bytes / dtype.itemsize - embeddings) / layer))
    return LlamaConfig(**sizes, num_hidden_layers=num_layers, tie_word_embeddings=False, dtype=dtype)


def shards(model: Any, num_files: int) -> Iterator[list[str]]:
    """Names of the tensors of each file, in the model's order."""
    names = [name for name, _ in model.named_parameters()]
    each = -(-len(names) // num_files)
    yield from (names[i : i + each] for i in range(0, len(names), each))


def make_checkpoint(folder: Path, num_bytes: float, dtype: torch.dtype, num_files: int) -> int:
    """Write the checkpoint; its bytes."""
    config = config_of(num_bytes, dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0
    groups = list(shards(model, num_files))
    for index, names in enumerate(groups, start=1):
        file = f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        tensors = {
            name: torch.empty(model.get_parameter(name).shape, dtype=dtype).uniform_(-0.05, 0.05, generator=generator)
            for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    told = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(told), encoding="utf-8")
    return total


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where it goes; not there yet")
    parser.add_argument("--gb", type=float, default=2.0, help="10^9 bytes of weights, about (default: 2)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--files", type=int, default=4, help="shards (default: 4)")
    args = parser.parse_args(argv)
    if args.folder.exists():
        parser.error(f"{args.folder} exists")
    total = make_checkpoint(args.folder, args.gb * 1e9, getattr(torch, args.dtype), args.files)
    print(json.dumps({"folder": str(args.folder), "bytes": total, "dtype": args.dtype}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
