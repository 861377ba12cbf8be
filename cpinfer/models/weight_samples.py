"""What of a model has to be the same on every rank that computes with it: versions, config, weights' shapes and values.

Values are compared by samples: the bits of a few elements of every tensor, in places that follow from its name. That
sees another checkpoint, another seed, an optimiser step that one rank has missed. It does not see a change of single
elements between the places; a position-weighted checksum over all elements does, which reads all of them. Weights that
are sharded when an engine attaches (ZeRO-3 and FSDP, `rollout.gather` "layerwise") are compared by shape alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from cpinfer.models.local_weights import local, shape_in_use
from cpinfer.models.model_files import NOT_THE_MODEL
from cpinfer.version import __version__

# Elements of a tensor that are compared.
_NUM_SAMPLES = 32
# The golden ratio's fraction: multiples of it, modulo 1, spread evenly however many there are.
_GOLDEN = 0.6180339887498949
# Elements of a checksum that are widened at a time.
_CHUNK = 2**22
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def software_versions() -> dict[str, str]:
    """Versions of what computes, which may differ between hosts."""
    return {"cpinfer": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def config_identity(model: Any) -> dict[str, object]:
    """What a model's config says, in order of names: modules also compute by what no weight shows (norms' epsilons,
    activations, experts per token).

    Without what Transformers writes of itself: `save_pretrained` puts `architectures` into the config of the rank that
    saves, as a rule of one alone.
    """
    values = model.config.to_dict()
    return {name: values[name] for name in sorted(values) if name not in (*NOT_THE_MODEL, "architectures")}


def weight_identity(model: Any, *, full: bool = False) -> Mapping[str, object]:
    """For every parameter and buffer its dtype, shape on this rank, and values: samples, or a checksum with `full`."""
    named = list(_named_tensors(model))
    values = {name: _checksum(x) for name, x in named} if full else _samples(named)
    return {
        f"weight {name}": {
            "dtype": str(x.dtype).removeprefix("torch."),
            "shape": shape_in_use(x, gathered_by_fsdp=True),
            "values": values[name],
        }
        for name, x in named
    }


def _named_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def _samples(named: list[tuple[str, Tensor]]) -> dict[str, bytes]:
    """The bytes of a few elements of every tensor; all leave the device in one copy."""
    taken: dict[str, Tensor] = {}
    for name, x in named:
        here = _values_here(x)
        if here is not None:
            offset = zlib.crc32(name.encode()) / 2**32
            places = ((offset + _GOLDEN * np.arange(_NUM_SAMPLES)) % 1 * here.numel()).astype(np.int64)
            coords = tuple(torch.from_numpy(c).to(here.device) for c in np.unravel_index(places, here.shape))
            taken[name] = here[coords].view(torch.uint8)
    flat = {device: _together([x for x in taken.values() if x.device == device]) for device in _devices(taken)}
    found = dict.fromkeys((name for name, _ in named), b"")
    used = dict.fromkeys(flat, 0)
    for name, x in taken.items():
        start = used[x.device]
        used[x.device] = start + x.numel()
        found[name] = flat[x.device][start : used[x.device]].tobytes()
    return found


def _devices(tensors: Mapping[str, Tensor]) -> list[torch.device]:
    return list(dict.fromkeys(x.device for x in tensors.values()))


def _together(tensors: list[Tensor]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    together: np.ndarray[Any, np.dtype[np.uint8]] = torch.cat(tensors).cpu().numpy()
    return together


def _checksum(x: Tensor) -> int:
    """The sum of all elements' bits, each times an odd number of its own place, modulo 2**64.

    Any change of one element changes it, since an odd number has an inverse; so does an exchange of two.
    """
    here = _values_here(x)
    if here is None:
        return 0
    total = torch.zeros((), dtype=torch.int64, device=here.device)
    bits = here.contiguous().view(-1).view(_INTEGERS[here.element_size()])
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK].long()
        odd = 2 * torch.arange(start, start + len(chunk), device=here.device) + 1
        total += (chunk * odd).sum()
    return int(total)


def _values_here(x: Tensor) -> Tensor | None:
    """The values that this rank computes with; None where they are sharded, or there are none."""
    placements, mesh = getattr(x, "placements", ()), getattr(x, "device_mesh", None)
    names = () if mesh is None else mesh.mesh_dim_names or ("",) * mesh.ndim
    dealt_out = any(p.is_shard() for name, p in zip(names, placements, strict=True) if name != "tp")
    here = local(x.detach())
    return None if dealt_out or here.is_meta or not here.numel() else torch.atleast_1d(here)
