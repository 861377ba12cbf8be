"""Checkpoints with one thing wrong each, made of a whole one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


def set_in_json(path: Path, **values: Any) -> None:
    """Change keys of a JSON file; an Ellipsis takes the key away."""
    data = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}), encoding="utf-8")


def change_tensors(folder: Path, change: Callable[[Tensors], Mapping[str, torch.Tensor]]) -> None:
    """Write what `change` makes of all tensors."""
    tensors = change(load_file(folder / WEIGHTS))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def without(folder: Path, *names: str) -> None:
    change_tensors(folder, lambda tensors: {k: v for k, v in tensors.items() if k not in names})


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    change_tensors(folder, lambda tensors: {rename(k): v for k, v in tensors.items()})


def reshaped(folder: Path, name: str) -> None:
    """One column fewer."""
    change_tensors(folder, lambda tensors: {**tensors, name: tensors[name][..., :-1]})


def in_two_files(folder: Path) -> dict[str, str]:
    """The same tensors in a.safetensors and b.safetensors, with their index; what it maps to what."""
    tensors = load_file(folder / WEIGHTS)
    weight_map = {name: "ab"[i % 2] + ".safetensors" for i, name in enumerate(sorted(tensors))}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({k: v for k, v in tensors.items() if weight_map[k] == file}, folder / file, {"format": "pt"})
    (folder / WEIGHTS).unlink()
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def with_header(folder: Path, header: bytes, length: int | None = None) -> None:
    """The weights' bytes behind another header, that says to be of another length."""
    old = (folder / WEIGHTS).read_bytes()
    values = old[8 + int.from_bytes(old[:8], "little") :]
    (folder / WEIGHTS).write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + values)


def header_of(folder: Path) -> dict[str, Any]:
    old = (folder / WEIGHTS).read_bytes()
    found: dict[str, Any] = json.loads(old[8 : 8 + int.from_bytes(old[:8], "little")])
    return found
