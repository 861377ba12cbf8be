"""A model is known by what its files hold: not by where they lie, and no part of it changes unseen."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpinfer.models import model_files
from cpinfer.models.model_files import model_hashes

PARTS = ["config_files", "weights", "tokenizer_files"]


@pytest.fixture
def folder(tmp_path):
    """A model of two shards, as large for the test's limits as checkpoints are for the real ones."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8, "transformers_version": "4"}')
    (folder / "tokenizer.json").write_text("{}")
    for shard in range(2):
        save_file({f"layer{i}": torch.randn(64, 64) for i in range(8)}, folder / f"model-{shard}.safetensors")
    return folder


def changed(folder, change):
    """The parts whose hashes a change of the folder changes."""
    before = model_hashes(str(folder))
    assert list(before) == PARTS
    change()
    after = model_hashes(str(folder))
    return [name for name in PARTS if before[name] != after[name]]


@pytest.mark.parametrize("whole", [True, False], ids=["read whole", "sampled"])
def test_a_change_is_seen_and_named(folder, monkeypatch, whole):
    if not whole:
        monkeypatch.setattr(model_files, "_WHOLE_BYTES", 1 << 10)
        monkeypatch.setattr(model_files, "_SAMPLE_BYTES", 16)
        monkeypatch.setattr(model_files, "_NUM_SAMPLES", 16)
    shard = folder / "model-1.safetensors"
    tensors = load_file(shard)

    def one_matrix():
        save_file({**tensors, "layer7": tensors["layer7"] + 1}, shard)

    def one_name():
        save_file({("other" if name == "layer0" else name): t for name, t in tensors.items()}, shard)

    assert changed(folder, one_matrix) == ["weights"]
    assert changed(folder, one_name) == ["weights"]
    assert changed(folder, lambda: (folder / "model-0.safetensors").rename(folder / "model-2.safetensors")) == [
        "weights"
    ]
    assert changed(folder, lambda: (folder / "chat_template.jinja").write_text("x")) == ["tokenizer_files"]
    assert changed(folder, lambda: (folder / "generation_config.json").write_text("{}")) == ["config_files"]


def test_a_place_a_date_and_a_layout_of_text_are_no_change(folder, tmp_path):
    before = model_hashes(str(folder))
    moved = tmp_path / "elsewhere" / "other"
    shutil.copytree(folder, moved)
    os.utime(moved / "model-0.safetensors", (0, 0))
    text = json.dumps({"transformers_version": "5", "hidden_size": 8}, indent=4)
    (moved / "config.json").write_text(text)
    assert model_hashes(str(moved)) == before


def test_older_weights_count_where_there_are_no_others(folder):
    def write():
        (folder / "pytorch_model.bin").write_bytes(b"1")

    assert changed(folder, write) == []
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    assert changed(folder, lambda: (folder / "pytorch_model.bin").write_bytes(b"2")) == ["weights"]


def test_a_model_on_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    def at(commit):
        return lambda model, name, **options: str(tmp_path / "models--a--b" / "snapshots" / commit / name)

    found = []
    for commit in ("a" * 40, "b" * 40, "a" * 40):
        monkeypatch.setattr(model_files, "cached_file", at(commit))
        found.append(model_hashes("a/b"))
    assert found[0] == found[2] and list(found[0]) == PARTS
    assert all(found[0][name] != found[1][name] for name in PARTS)
