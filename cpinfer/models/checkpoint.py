"""The weights in a model's folder, as the headers of its safetensors files tell: names, shapes, dtypes; none is read.

    model.safetensors                      one file, or
    model.safetensors.index.json           {"weight_map": {tensor: file, ...}} over several, all of them in the folder

A folder that holds weights in another form, or files that are not what their headers say, is refused by name. Files of
pickles are never opened: to read one is to run what is in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from cpinfer.errors import UserError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Forms of weights that Transformers would take instead of, or on top of, the files above.
_DISTRIBUTED = "shard-*-model-*-of-*.safetensors"
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its `dtype` in safetensors' words ("BF16"), its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a model's files, by name."""

    folder: Path
    tensors: Mapping[str, StoredTensor]


def read_checkpoint(folder: Path) -> Checkpoint:
    """The weights in a folder, by their headers. UserError names a file that is missing, broken or of another kind."""
    _refuse_other_forms(folder)
    if (folder / _SINGLE).exists():
        return Checkpoint(folder, _read_header(folder / _SINGLE))
    if (folder / _INDEX).exists():
        return Checkpoint(folder, _read_shards(folder, _read_index(folder / _INDEX)))
    raise _no_weights(folder)


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that `read_checkpoint` finds whole."""
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    return [folder / name for name in sorted(set(_read_index(folder / _INDEX).values()))]


def local_folder(model: str) -> Path | None:
    """The folder of a model that is here: the one named, or where an earlier download of this id left its files.

    None for an id of the hub whose weights, or some of them, are not here yet.
    """
    if Path(model).is_dir():
        return Path(model)
    config = try_to_load_from_cache(model, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    if (folder / _SINGLE).exists():
        return folder
    if not (folder / _INDEX).exists():
        return None
    files = set(_read_index(folder / _INDEX).values())
    return folder if all((folder / name).exists() for name in files) else None


def fetched_folder(model: str) -> Path:
    """The folder of a model, all of its weights here: those of an id of the hub are fetched where they are not yet."""
    return local_folder(model) or Path(snapshot_download(model, allow_patterns=["*.json", "model*.safetensors"]))


def _refuse_other_forms(folder: Path) -> None:
    if (folder / _ADAPTER).exists():
        raise UserError(
            f"model {folder}: it holds an adapter ({_ADAPTER}); a whole model was wanted. "
            "Merge the adapter into its model and save that, or take the file away."
        )
    if any(folder.glob(_DISTRIBUTED)):
        raise UserError(
            f"model {folder}: it holds a distributed checkpoint ({_DISTRIBUTED}); {_SINGLE}, or shards with {_INDEX}, "
            "were wanted. Save the model whole."
        )


def _no_weights(folder: Path) -> UserError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return UserError(
            f"model {folder}: {pickles[0]} is a pickle, and to read one is to run what is in it; {_SINGLE} was wanted. "
            "Convert it where you trust it (load it with Transformers, then save_pretrained)."
        )
    return UserError(f"model {folder}: it holds no weights; {_SINGLE}, or shards with {_INDEX}, were wanted.")


def _read_index(path: Path) -> dict[str, str]:
    """Tensor to file, every file a name within the index's folder."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f'{path} has no "weight_map" from names of tensors to names of files.')
    if not isinstance(data.get("metadata"), dict):  # Transformers reads no index without one
        raise UserError(f'{path} has no "metadata", an object, beside "weight_map". Add "metadata": {{}} to it.')
    for name in sorted(set(weight_map.values())):
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts or not name.endswith(".safetensors"):
            raise UserError(f'{path} names the file "{name}"; a .safetensors file in its own folder was wanted.')
    return weight_map


def _read_shards(folder: Path, weight_map: Mapping[str, str]) -> dict[str, StoredTensor]:
    headers = {name: _read_header(folder / name) for name in sorted(set(weight_map.values()))}
    tensors: dict[str, StoredTensor] = {}
    for name, header in headers.items():
        if twice := sorted(tensors.keys() & header.keys()):
            raise UserError(f"{folder / name} holds {named(twice)}, and so does another file of {_INDEX}.")
        tensors |= header
    if lacking := sorted(tensor for tensor, name in weight_map.items() if tensor not in headers[name]):
        raise UserError(f"{folder / weight_map[lacking[0]]} lacks {named(lacking)}, which {_INDEX} says is there.")
    return tensors


def _read_header(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        raise UserError(f"{path} is missing, or no file; the weights of the model were wanted there.")
    try:
        # The library checks that dtypes, shapes and byte ranges fit together and fill the file without gaps.
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return {name: StoredTensor(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is no whole safetensors file ({first_line(error)}). Copy or save it again.") from error


def named(names: Iterable[str], most: int = 3) -> str:
    """The first few of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def first_line(error: BaseException) -> str:
    """What an error of another library says, cut to its first line, or to two where the first announces the other."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
