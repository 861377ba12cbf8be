"""What a model's files hold, as hashes: whether two runs had the same model, wherever its folder lay."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers.utils.hub import cached_file, extract_commit_hash

from cpinfer.errors import UserError
from cpinfer.models.tokenizer_files import PATTERNS

# The parts of a model that are told apart.
MODEL_PARTS = ("config_files", "weights", "tokenizer_files")
_CONFIGS = ("config.json", "generation_config.json", "adapter_config.json")
_TOKENIZERS = (*PATTERNS, "chat_template*")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# Where there are none of those.
_OLDER_WEIGHTS = ("*.bin", "*.bin.index.json", "*.pt", "*.pth")
# What Transformers writes of itself into a config.
NOT_THE_MODEL = ("transformers_version", "_name_or_path")
# Files up to this size are read whole. Of larger ones the header (names, shapes and dtypes of all tensors) and as many
# samples, spread evenly, each somewhere in its stretch: training changes every matrix, and no stretch is that long.
_WHOLE_BYTES = 64 << 20
_NUM_SAMPLES = 256
_SAMPLE_BYTES = 4096


def model_hashes(model: str) -> dict[str, str]:
    """Hashes of `config_files`, `weights` and `tokenizer_files`; of a model on the hub, of its commit.

    UserError when a file cannot be read. Weights in large files are sampled.
    """
    folder = Path(model)
    if not folder.is_dir():
        commit = _commit(model)
        return {name: _hash([name.encode(), commit.encode()]) for name in MODEL_PARTS}
    weights = _WEIGHTS if any(folder.glob("*.safetensors")) else _OLDER_WEIGHTS
    try:
        return {
            "config_files": _hash(_plain(path) for path in _files(folder, _CONFIGS)),
            "weights": _hash(chunk for path in _files(folder, weights) for chunk in _sampled(path)),
            "tokenizer_files": _hash(chunk for path in _files(folder, _TOKENIZERS) for chunk in _sampled(path)),
        }
    except OSError as error:
        raise UserError(f"model {model}: {error.filename} cannot be read: {error.strerror}.") from error


def _commit(model: str) -> str:
    """The commit that the model's id stands for now; its config has been fetched before."""
    try:
        config = cached_file(model, "config.json", local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"model {model}: its config is not in the cache of the Hugging Face hub.") from error
    # Nothing in a snapshot changes: its path is as good where it names no commit.
    return extract_commit_hash(str(config), None) or str(config)


def _files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _hash(chunks: Iterator[bytes] | Sequence[bytes]) -> str:
    found = hashlib.sha256()
    for chunk in chunks:
        # Its length before it: so that no two lists of chunks are one text.
        found.update(len(chunk).to_bytes(8, "little") + chunk)
    return f"sha256:{found.hexdigest()}"


def _plain(path: Path) -> bytes:
    """A config without its layout as text and without what does not concern the model."""
    raw = path.read_bytes()
    try:
        data = json.loads(raw)
    except ValueError:
        return raw
    if isinstance(data, dict):
        data = {key: value for key, value in data.items() if key not in NOT_THE_MODEL}
    return path.name.encode() + json.dumps(data, sort_keys=True).encode()


def _sampled(path: Path) -> Iterator[bytes]:
    """Name and size of a file, and all of it or samples."""
    size = path.stat().st_size
    yield f"{path.name} {size}".encode()
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            yield file.read()
            return
        start = 0
        if path.suffix == ".safetensors":
            length = min(int.from_bytes(file.read(8), "little"), size)
            yield file.read(length)
            start = 8 + length
        stretch = max(1, (size - start) // _NUM_SAMPLES)
        for number in range(_NUM_SAMPLES):
            drawn = hashlib.sha256(f"{size} {number}".encode()).digest()
            file.seek(start + number * stretch + int.from_bytes(drawn[:8], "little") % stretch)
            yield file.read(_SAMPLE_BYTES)
