"""The tensors in a checkpoint's files, each read when it is asked for, and no more of it than that.

    a view, where the dtype may stay, of all of it or of rows [a, b)    of the mapped file: no copy, and ranks of a host
                                                                        share its pages
    a copy, of columns [a, b), or where one is wanted                   pages of the file that were read for copies are
                                                                        let go of soon

They stand in for the slices of safetensors' files in what is given to `from_pretrained` as `state_dict`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from cpinfer.models.checkpoint import Checkpoint, weight_files

# Told, as tensors are read, how many bytes were read and how many will have been in the end. From any thread.
OnRead = Callable[[int, int], None]


class Readable(Protocol):
    """A tensor that is still in a file: what Transformers' loader asks of it, and `copied`."""

    def get_shape(self) -> list[int]:
        """The whole tensor's."""
        ...

    def __getitem__(self, index: Any) -> Tensor:
        """Values at an index of the whole tensor, in the dtype of the file; maybe a view."""
        ...

    def copied(self, index: Any) -> Tensor:
        """The same in memory of their own."""
        ...


class ReadBytes:
    """Counts what is read of tensors, of which each was expected whole before its first part was asked for."""

    def __init__(self, on_read: OnRead | None = None) -> None:
        self._on_read = on_read
        self._lock = Lock()
        self._read = 0
        self._total = 0

    def expect(self, num_bytes: int) -> None:
        """So many more are to be read, or fewer where it is negative."""
        with self._lock:
            self._total += num_bytes

    def add(self, num_bytes: int) -> None:
        """So many were read."""
        with self._lock:
            self._read += num_bytes
            if self._on_read is not None:
                self._on_read(self._read, self._total)


class MappedFile:
    """A safetensors file, mapped: once for views that stay, and anew after every few copies for those."""

    RENEWED_AFTER_BYTES = 32 << 20

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        self._for_views = safe_open(path, framework="pt")
        self._for_copies = self._for_views
        self._num_bytes = self.RENEWED_AFTER_BYTES

    @property
    def names(self) -> list[str]:
        return list(self._for_views.keys())

    def slices(self, name: str) -> Any:
        """safetensors' own of a tensor, whose values are views that may stay."""
        return self._for_views.get_slice(name)

    def slices_to_copy(self, name: str) -> Any:
        """Whose values are to be copied: when they are gone, so are, from this process, the pages that they lay on."""
        with self._lock:
            if self._num_bytes >= self.RENEWED_AFTER_BYTES:
                self._for_copies, self._num_bytes = safe_open(self._path, framework="pt"), 0
            slices = self._for_copies.get_slice(name)
            self._num_bytes += slices[...].nbytes
        return slices


class FileTensor:
    """A tensor of a safetensors file, a `Readable`. `read` expects all its bytes until some are asked for, then those.

    Values of the dtype `kept` may stay views.
    """

    def __init__(self, file: MappedFile, name: str, kept: torch.dtype, read: ReadBytes) -> None:
        self._file = file
        self._name = name
        self._read = read
        self._slices = file.slices(name)
        whole = self._slices[...]
        self._may_stay = whole.dtype == kept
        self._unasked_bytes = whole.nbytes
        read.expect(whole.nbytes)

    def get_shape(self) -> list[int]:
        """See `Readable`."""
        shape: list[int] = self._slices.get_shape()
        return shape

    def __getitem__(self, index: Any) -> Tensor:
        """See `Readable`."""
        found: Tensor = self._slices[index]
        if not found.is_contiguous():
            return self.copied(index)
        if not self._may_stay:  # its reader is about to convert it
            found = self._file.slices_to_copy(self._name)[index]
        return self._counted(found)

    def copied(self, index: Any) -> Tensor:
        """See `Readable`."""
        found: Tensor = self._file.slices_to_copy(self._name)[index]
        return self._counted(found.clone(memory_format=torch.contiguous_format))

    def _counted(self, found: Tensor) -> Tensor:
        self._read.expect(found.nbytes - self._unasked_bytes)
        self._unasked_bytes = 0
        self._read.add(found.nbytes)
        return found


class Unread:
    """Stands in for a tensor that stays unread: what is made of it lies on the meta device.

    `became` is that, None until it is asked for.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = list(shape)
        self.became: Tensor | None = None

    def get_shape(self) -> list[int]:
        """See `Readable`."""
        return self._shape

    def __getitem__(self, index: Any) -> Unread:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of its shape without values."""
        self.became = torch.empty(self._shape, dtype=dtype, device="meta")
        return self.became


def stored_tensors(checkpoint: Checkpoint, kept: torch.dtype, read: ReadBytes) -> dict[str, FileTensor]:
    """Every tensor in the files of a checkpoint, by name, to be used in the dtype `kept`; none is read yet."""
    files = [MappedFile(path) for path in weight_files(checkpoint.folder)]
    return {name: FileTensor(file, name, kept, read) for file in files for name in file.names}
