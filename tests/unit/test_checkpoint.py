"""What a folder's weights are, by the headers of its files; what is wrong with these is said with the file's name."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from broken_checkpoints import INDEX, WEIGHTS, header_of, in_two_files, with_header, write_index
from cpinfer.errors import UserError
from cpinfer.models import checkpoint
from cpinfer.models.checkpoint import StoredTensor, first_line, local_folder, read_checkpoint

TENSORS = {
    "a.weight": torch.zeros(3, 4),
    "b.weight": torch.zeros(5, dtype=torch.bfloat16),
    "c.weight": torch.zeros(2, 2),
    "d": torch.zeros((), dtype=torch.int64),
}
STORED = {
    "a.weight": StoredTensor("F32", (3, 4)),
    "b.weight": StoredTensor("BF16", (5,)),
    "c.weight": StoredTensor("F32", (2, 2)),
    "d": StoredTensor("I64", ()),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, folder / WEIGHTS)
    return folder


def with_changed_header(key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        header = header_of(folder)
        header["a.weight"][key] = value
        with_header(folder, json.dumps(header).encode())

    return change


def replaced_by(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes(content) and None


def test_names_shapes_and_dtypes_are_those_of_the_file(folder: Path) -> None:
    assert dict(read_checkpoint(folder).tensors) == STORED


def test_shards_are_one_checkpoint(folder: Path) -> None:
    in_two_files(folder)
    assert dict(read_checkpoint(folder).tensors) == STORED


def test_a_file_of_all_weights_goes_before_an_index_as_in_transformers(folder: Path) -> None:
    write_index(folder, {"a.weight": "../elsewhere.safetensors"})
    assert dict(read_checkpoint(folder).tensors) == STORED


BROKEN_FILES = {
    "empty": replaced_by(b""),
    "seven_bytes": replaced_by(b"\x01" * 7),
    "garbage": replaced_by(bytes(range(256)) * 8),
    "text": replaced_by(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
    "truncated": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1]) and None,
    "longer": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"x") and None,
    "header_beyond_the_file": lambda folder: with_header(folder, b"{}", length=10**7),
    "header_beyond_memory": lambda folder: with_header(folder, b"{}", length=2**64 - 1),
    "header_no_json": lambda folder: with_header(folder, b"{" * 64),
    "header_of_a_list": lambda folder: with_header(folder, b"[1, 2]"),
    "header_no_utf8": lambda folder: with_header(folder, b"\xff" * 64),
    "negative_shape": with_changed_header("shape", [-3, -4]),
    "endless_shape": with_changed_header("shape", [2**62, 2**62]),
    "other_shape": with_changed_header("shape", [3, 5]),
    "unknown_dtype": with_changed_header("dtype", "F31"),
    "other_dtype": with_changed_header("dtype", "F16"),
    "range_backwards": with_changed_header("data_offsets", [48, 0]),
    "range_of_another": with_changed_header("data_offsets", [0, 48]),
    "range_outside": with_changed_header("data_offsets", [10**12, 10**12 + 48]),
    "negative_range": with_changed_header("data_offsets", [-48, 0]),
    "no_range": with_changed_header("data_offsets", None),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_file_that_is_not_what_its_header_says_is_refused_by_name(folder: Path, name: str) -> None:
    BROKEN_FILES[name](folder)
    with pytest.raises(UserError, match=rf"{folder / WEIGHTS} is no whole safetensors file \(.+\)"):
        read_checkpoint(folder)


def test_a_broken_shard_is_named_among_whole_ones(folder: Path) -> None:
    in_two_files(folder)
    (folder / "b.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"b.safetensors is no whole safetensors file"):
        read_checkpoint(folder)


def test_whatever_is_flipped_in_a_header_the_answer_is_a_checkpoint_or_a_user_error(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    flips = random.Random(0)
    refused = 0
    for _ in range(500):
        content = bytearray(whole)
        for _ in range(flips.randint(1, 3)):
            content[flips.randrange(header_bytes)] = flips.randrange(256)
        (folder / WEIGHTS).write_bytes(content[: flips.choice([len(content), flips.randint(0, len(content))])])
        try:
            assert len(read_checkpoint(folder).tensors) == len(TENSORS)
        except UserError:
            refused += 1
    assert refused > 400


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "deep/../../x.safetensors", "/tmp/x.safetensors", "x.bin", "", ".."]
)
def test_an_index_that_leaves_its_folder_or_names_no_safetensors_is_refused(folder: Path, file: str) -> None:
    save_file(TENSORS, folder.parent / "x.safetensors")
    weight_map = in_two_files(folder)
    write_index(folder, {**weight_map, "a.weight": file})
    with pytest.raises(UserError, match=f'{INDEX} names the file "{file}"; a .safetensors file in its own folder'):
        read_checkpoint(folder)


def test_an_index_to_a_file_or_a_tensor_that_is_not_there_is_refused(folder: Path) -> None:
    weight_map = in_two_files(folder)
    write_index(folder, {**weight_map, "e": "a.safetensors"})
    with pytest.raises(UserError, match=r"a.safetensors lacks e, which .*index.json says is there"):
        read_checkpoint(folder)
    write_index(folder, {**weight_map, "e": "e.safetensors"})
    with pytest.raises(UserError, match=r"e.safetensors is missing"):
        read_checkpoint(folder)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    in_two_files(folder)
    save_file({**load_file(folder / "b.safetensors"), "a.weight": torch.ones(3, 4)}, folder / "b.safetensors")
    with pytest.raises(UserError, match=r"b.safetensors holds a.weight, and so does another file"):
        read_checkpoint(folder)


@pytest.mark.parametrize("index", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "[" * 10**5])
def test_an_index_without_a_map_is_refused(folder: Path, index: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(index)
    with pytest.raises(UserError, match=rf"{INDEX} (cannot be read as JSON|has no \"weight_map\")"):
        read_checkpoint(folder)


@pytest.mark.parametrize("rest", [{}, {"metadata": None}, {"metadata": []}])
def test_an_index_that_transformers_could_not_read_is_refused(folder: Path, rest: dict[str, Any]) -> None:
    weight_map = in_two_files(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map, **rest}))
    with pytest.raises(UserError, match=rf"{INDEX} has no \"metadata\", an object"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("said", "told"),
    [("a:\n  b\nc", "a: b"), ("a\nb", "a"), ("", "ValueError"), ("a:", "a:")],
)
def test_of_another_librarys_error_the_line_that_says_what_is_wrong_is_told(said: str, told: str) -> None:
    assert first_line(ValueError(said)) == told


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "x.ckpt"])
def test_pickles_alone_are_refused(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    with pytest.raises(UserError, match=f"{name} is a pickle"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "name, words",
    [
        ("adapter_config.json", "it holds an adapter"),
        ("shard-00000-model-00001-of-00002.safetensors", "it holds a distributed checkpoint"),
    ],
)
def test_what_transformers_would_load_instead_of_the_weights_is_refused(folder: Path, name: str, words: str) -> None:
    (folder / name).write_text("{}")
    with pytest.raises(UserError, match=words):
        read_checkpoint(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"it holds no weights; model.safetensors, or shards"):
        read_checkpoint(folder)
    (folder / WEIGHTS).mkdir()
    with pytest.raises(UserError, match=r"model.safetensors is missing, or no file"):
        read_checkpoint(folder)


def test_a_download_counts_once_all_its_files_are_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: dict[str, object] = {"some/model": None}
    monkeypatch.setattr(checkpoint, "try_to_load_from_cache", lambda model, file: there[model])
    assert local_folder("some/model") is None
    there["some/model"] = str(folder / "config.json")
    assert local_folder("some/model") == folder
    weight_map = in_two_files(folder)
    assert local_folder("some/model") == folder
    (folder / "b.safetensors").unlink()
    assert local_folder("some/model") is None
    write_index(folder, {**weight_map, "a.weight": "../x.safetensors"})
    with pytest.raises(UserError, match="in its own folder"):
        local_folder("some/model")
    (folder / INDEX).unlink()
    assert local_folder("some/model") is None
    assert local_folder(str(folder)) == folder
