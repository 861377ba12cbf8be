"""Tensors in files: what is read of them, how much is counted, and what stays mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from broken_checkpoints import in_two_files
from cpinfer.models.checkpoint import Checkpoint, read_checkpoint
from cpinfer.models.stored_tensors import MappedFile, ReadBytes, Unread, stored_tensors

ROWS, COLUMNS = 1024, 1024
WHOLE_BYTES = ROWS * COLUMNS * 4


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Two, of 4 MiB each."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(ROWS, COLUMNS, generator=generator) for name in ("a", "b")}


@pytest.fixture(scope="module")
def checkpoint(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return read_checkpoint(folder)


def mapped_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the checkpoint's files that this process has mapped and used: other tests may leave theirs mapped."""
    found, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            is_ours = Path(words[-1]).parent == checkpoint.folder
        elif is_ours and words[0] == "Rss:":
            found += int(words[1]) * 1024
    return found


PARTS = [..., (slice(512, 768),), (slice(512, 768), slice(None)), (slice(None), slice(256, 512)), slice(3, 5)]


@pytest.mark.parametrize("index", PARTS)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_a_part_is_that_of_the_whole_view_or_copy(
    checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], index: Any, kept: torch.dtype
) -> None:
    tensor = stored_tensors(checkpoint, kept, ReadBytes())["b"]
    assert tensor.get_shape() == [ROWS, COLUMNS]
    for found in (tensor[index], tensor.copied(index)):
        assert torch.equal(found, tensors["b"][index]) and found.is_contiguous()


def test_a_view_keeps_pages_of_its_file_and_copies_leave_none_behind(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MappedFile, "RENEWED_AFTER_BYTES", WHOLE_BYTES)
    stored = stored_tensors(checkpoint, torch.float32, ReadBytes())
    copies = [stored["a"].copied(slice(0, 512)), stored["a"][:, :512], stored["b"].copied(slice(0, 8))]
    assert mapped_bytes(checkpoint) < WHOLE_BYTES / 4, "of the last copy alone"
    view = stored["a"][...]
    assert view.sum().isfinite() and mapped_bytes(checkpoint) >= WHOLE_BYTES
    del view, stored
    assert mapped_bytes(checkpoint) < WHOLE_BYTES / 4 and all(copy.sum().isfinite() for copy in copies)


def test_what_is_converted_is_no_view_that_stays(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MappedFile, "RENEWED_AFTER_BYTES", WHOLE_BYTES)
    stored = stored_tensors(checkpoint, torch.bfloat16, ReadBytes())
    converted = [stored[name][...].to(torch.bfloat16) for name in ("a", "b")]
    converted.append(stored["a"].copied(slice(0, 8)).to(torch.bfloat16))
    assert mapped_bytes(checkpoint) < WHOLE_BYTES / 4 and all(weight.sum().isfinite() for weight in converted)


def test_bytes_are_expected_whole_until_a_part_is_asked_for(checkpoint: Checkpoint) -> None:
    told: list[tuple[int, int]] = []
    stored = stored_tensors(checkpoint, torch.float32, ReadBytes(lambda *read: told.append(read)))
    stored["a"][0 : ROWS // 4], stored["a"].copied((slice(None), slice(0, COLUMNS // 4))), stored["b"][...]
    quarter = WHOLE_BYTES // 4
    assert told == [
        (quarter, quarter + WHOLE_BYTES),
        (2 * quarter, 2 * quarter + WHOLE_BYTES),
        (2 * quarter + WHOLE_BYTES, 2 * quarter + WHOLE_BYTES),
    ]


def test_tensors_of_several_files_are_found(tmp_path: Path) -> None:
    wanted = {name: torch.full((3,), float(number)) for number, name in enumerate("abcd")}
    save_file(wanted, tmp_path / "model.safetensors", metadata={"format": "pt"})
    in_two_files(tmp_path)
    found = stored_tensors(read_checkpoint(tmp_path), torch.float32, ReadBytes())
    assert found.keys() == wanted.keys() and all(torch.equal(found[name][...], wanted[name]) for name in wanted)


def test_a_stand_in_has_a_shape_and_no_values() -> None:
    stand_in = Unread((3, 2))
    assert stand_in.became is None and stand_in.get_shape() == [3, 2]
    made = stand_in[...].to(device="cpu", dtype=torch.float16)
    assert (made.device.type, made.shape, made.dtype) == ("meta", (3, 2), torch.float16) and stand_in.became is made
