"""FlashInfer's wrappers for CPU, as literal as can be: page tables are walked key by key, nothing is clever.

What a call may look like is bound against the real signatures, `flashinfer_signatures.json` (made from the wheels by
`tools/dev/flashinfer_signatures.py`). What it means is written down here once more, from the documentation: indptr,
pages, the last page's length, causal masks aligned to the end, windows, soft caps, and an lse to base 2.

A library is a value with three classes in it. `lse_base` and `causal` make wrong ones, for negative controls.
"""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from cpinfer.attention.backends.base import AttentionNeeds
from cpinfer.attention.backends.flashinfer.backend import FlashInferBackend
from cpinfer.attention.backends.flashinfer.kernels import Chip, KernelModule
from cpinfer.attention.backends.self_check import check_backend

SIGNATURES = json.loads((Path(__file__).parent / "flashinfer_signatures.json").read_text(encoding="utf-8"))
VERSIONS = tuple(SIGNATURES)

_KINDS = {
    "plain": inspect.Parameter.POSITIONAL_OR_KEYWORD,
    "rest": inspect.Parameter.VAR_POSITIONAL,
    "keyword": inspect.Parameter.KEYWORD_ONLY,
    "keywords": inspect.Parameter.VAR_KEYWORD,
}


def signature(version: str, call: str) -> inspect.Signature:
    """How `call`, say "BatchMLAPagedAttentionWrapper.plan", is called; the first parameter is `self`."""
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    for name, kind, required in SIGNATURES[version][call]:
        default = inspect.Parameter.empty if required or kind in ("rest", "keywords") else None
        parameters.append(inspect.Parameter(name, _KINDS[kind], default=default))
    return inspect.Signature(parameters)


@dataclass
class Log:
    """What was asked of the library: wrappers made, plans and runs, by kind; modules that it would have compiled.

    `int_bytes`: of what wrappers were given to write plans to, in place of what they are made with.
    """

    made: list[dict[str, Any]]
    plans: list[tuple[str, dict[str, Any]]]
    num_runs: int = 0
    modules: set[KernelModule] = field(default_factory=set)
    int_bytes: list[int] = field(default_factory=list)


def fake_flashinfer(
    version: str = VERSIONS[-1],
    *,
    lse_base: float = 2.0,
    causal: Literal["bottom-right", "top-left"] = "bottom-right",
) -> Any:
    """The part of the library that we use; its `log` says how it was used."""
    log = Log([], [])
    takes_metadata = "MLAPlanMetadata.csr" in SIGNATURES[version]

    def bound(call: str, wrapper: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(signature(version, call).bind(wrapper, *args, **kwargs).arguments)

    class Wrapper:
        """What the three have in common: plans are taken apart into rows, runs walk them."""

        kind = ""
        name = ""
        is_mla = False
        buffers: tuple[str, ...] = ()

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = bound(f"{self.name}.__init__", self, args, kwargs)
            log.made.append({"name": self.kind, **given})
            assert given.get("backend") in ("fa2", "fa3"), "a family that returns lse must be pinned"
            self.family, self.fixed, self.tensor_cores = given["backend"], None, given.get("use_tensor_cores")
            if given.get("use_cuda_graph"):
                self.fixed = {name: given[name] for name in self.buffers}
            self.planned: dict[str, Any] = {}

        def reset_workspace_buffer(self, *args: Any, **kwargs: Any) -> None:
            given = bound(f"{self.name}.reset_workspace_buffer", self, args, kwargs)
            assert given["int_workspace_buffer"].dtype == torch.uint8
            log.int_bytes.append(len(given["int_workspace_buffer"]))

        def compile(self, name: Any) -> None:
            """The module of what is planned. Windows are compiled for where one is planned, and caps above 0."""
            p = self.planned
            dtypes, dims = (p["q_data_type"], p["kv_data_type"]), (p["head_dim_qk"], p["head_dim_vo"])
            made_for = (p["window_left"] >= 0, (p["logits_soft_cap"] or 0) > 0)
            log.modules.add(KernelModule(name, self.family, *dtypes, *dims, *made_for))

        def hold(self, **arrays: Tensor) -> None:
            """Plan arrays are int32; a fixed wrapper copies them to where it was told, in order of `buffers`."""
            for array in arrays.values():
                assert array.dtype == torch.int32 and array.is_contiguous()
            if self.fixed is None:
                self.arrays = {name: array.clone() for name, array in arrays.items()}
                return
            for (name, array), room in zip(arrays.items(), self.fixed.values(), strict=True):
                is_same = len(array) <= len(room) if name == "kv_indices" else len(array) == len(room)
                assert is_same, "the number of rows of a captured plan cannot change, nor its room for pages"
                room[: len(array)] = array
            self.arrays = dict(zip(arrays, self.fixed.values(), strict=True))

        def rows(self) -> list[tuple[int, int, list[int], int]]:
            """First and last query of each row, its pages, and its keys."""
            a = self.arrays
            found = []
            for row in range(len(a["kv_indptr"]) - 1):
                first, last = int(a["kv_indptr"][row]), int(a["kv_indptr"][row + 1])
                pages = a["kv_indices"][first:last].tolist()
                if "kv_len_arr" in a:
                    num_keys = int(a["kv_len_arr"][row])
                    assert (len(pages) - 1) * self.planned["page_size"] < num_keys
                    assert num_keys <= len(pages) * self.planned["page_size"]
                else:
                    assert 1 <= a["last_page_len"][row] <= self.planned["page_size"]
                    num_keys = (len(pages) - 1) * self.planned["page_size"] + int(a["last_page_len"][row])
                assert num_keys >= 1, "families differ in what they make of rows without keys"
                q_first, q_last = (row, row + 1) if "qo_indptr" not in a else a["qo_indptr"][row : row + 2].tolist()
                assert q_last > q_first
                found.append((q_first, q_last, pages, num_keys))
            return found

        def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, lse: Tensor) -> None:
            """q `[T, H, D]`, caches `[pages, page_size, K, D]`, all read through the plan."""
            log.num_runs += 1
            plan = self.planned
            T, H = q.shape[:2]
            assert k_cache.shape[1] == plan["page_size"]
            assert out.shape == (T, H, v_cache.shape[-1]) and out.dtype == q.dtype and out.is_contiguous()
            assert lse.shape == (T, H) and lse.dtype == torch.float32 and lse.is_contiguous()
            assert q.dtype == plan["q_data_type"] and k_cache.dtype == v_cache.dtype == plan["kv_data_type"]
            if k_cache.dtype != q.dtype:
                assert k_cache.dtype == torch.float8_e4m3fn or (k_cache.dtype == torch.float8_e5m2 and not self.is_mla)
                assert self.family == "fa2" or self.is_mla, "FA3 takes fp8 keys with fp8 queries alone"
                k_cache, v_cache = _widened(k_cache), _widened(v_cache)
            assert (H, k_cache.shape[2]) == (plan["num_qo_heads"], plan["num_kv_heads"])
            assert (q.shape[-1], v_cache.shape[-1]) == (plan["head_dim_qk"], plan["head_dim_vo"])
            group = H // k_cache.shape[2]
            num_seen = 0
            for q_first, q_last, pages, num_keys in self.rows():
                keys, values = (x[pages].flatten(0, 1)[:num_keys].double() for x in (k_cache, v_cache))
                keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
                num_seen += q_last - q_first
                logits = torch.einsum("qhd,khd->qhk", q[q_first:q_last].double(), keys) * plan["sm_scale"]
                if plan["logits_soft_cap"]:
                    logits = plan["logits_soft_cap"] * torch.tanh(logits / plan["logits_soft_cap"])
                num_q = q_last - q_first
                query, key = torch.arange(num_q)[:, None], torch.arange(num_keys)[None, :]
                hidden = torch.zeros(num_q, num_keys, dtype=torch.bool)
                if plan["causal"]:
                    hidden |= key > (query + num_keys - num_q if causal == "bottom-right" else query)
                if plan["window_left"] >= 0:  # inclusive: a window of 1 leaves the query its own key
                    hidden |= key + num_q + plan["window_left"] < num_keys + query
                logits.masked_fill_(hidden[:, None, :], -math.inf)
                total = torch.logsumexp(logits, dim=-1)
                weights = torch.exp(logits - torch.where(total == -math.inf, 0.0, total)[..., None])
                out[q_first:q_last] = torch.einsum("qhk,khd->qhd", weights, values).to(out.dtype)
                lse[q_first:q_last] = (total / math.log(lse_base)).float()
            assert num_seen == T

    class Prefill(Wrapper):
        kind, name = "prefill", "BatchPrefillWithPagedKVCacheWrapper"
        buffers = ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")

        def plan(self, *args: Any, **kwargs: Any) -> None:
            p = bound(f"{self.name}.plan", self, args, kwargs)
            log.plans.append((self.kind, p))
            self.hold(
                qo_indptr=p["qo_indptr"],
                kv_indptr=p["paged_kv_indptr"],
                kv_indices=p["paged_kv_indices"],
                last_page_len=p["paged_kv_last_page_len"],
            )
            self.planned = {"causal": False, "window_left": -1, "head_dim_vo": p["head_dim_qk"], **p}
            self.compile("batch_prefill")
            # Over pages, of keys and values of different dims it has none: cudaErrorNotSupported.
            is_square = self.planned["head_dim_qk"] == self.planned["head_dim_vo"]
            if self.family == "fa3" and not is_square:
                raise RuntimeError("BatchPrefillWithPagedKVCacheSM90Run failed: operation not supported")

        def run(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            r = bound(f"{self.name}.run", self, args, kwargs)
            assert r["return_lse"]
            self.attend(r["q"], *r["paged_kv_cache"], r["out"], r["lse"])
            return r["out"], r["lse"]

    class Decode(Wrapper):
        kind, name = "decode", "BatchDecodeWithPagedKVCacheWrapper"
        buffers = ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer")

        def plan(self, *args: Any, **kwargs: Any) -> None:
            p = bound(f"{self.name}.plan", self, args, kwargs)
            log.plans.append((self.kind, p))
            self.hold(kv_indptr=p["indptr"], kv_indices=p["indices"], last_page_len=p["last_page_len"])
            same = {"causal": False, "window_left": -1, "head_dim_qk": p["head_dim"], "head_dim_vo": p["head_dim"]}
            self.planned = {**same, **p}
            self.compile("batch_prefill" if self.tensor_cores else "batch_decode")

        run = Prefill.run

    class Latent(Wrapper):
        kind, name = "latent", "BatchMLAPagedAttentionWrapper"
        is_mla = True
        buffers = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")

        def plan(self, *args: Any, **kwargs: Any) -> None:
            p = bound(f"{self.name}.plan", self, args, kwargs)
            log.plans.append((self.kind, p))
            # From 0.7 on rows are one object, without which a warning is given, and the lse must have been planned;
            # before, neither could be said.
            assert ("metadata" in p) == ("lse_mode" in p) == takes_metadata, "metadata and lse_mode are of 0.7"
            assert p.get("lse_mode") in (None, "base2")
            self.hold(**(p["metadata"] if takes_metadata else {name: p[name] for name in self.buffers}))
            self.planned = {
                **p,
                "window_left": -1,
                "logits_soft_cap": None,
                "num_qo_heads": p["num_heads"],
                "num_kv_heads": 1,
                "head_dim_qk": p["head_dim_ckv"] + p["head_dim_kpe"],
                "head_dim_vo": p["head_dim_ckv"],
            }
            self.compile("batch_mla")

        def run(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            r = bound(f"{self.name}.run", self, args, kwargs)
            assert r["return_lse"]
            if takes_metadata:  # a plan of one takes latents and rotated keys as one tensor, if it says nothing else
                q, keys = r["query"], r["kv_cache"]
            else:
                q = torch.cat([r["q_nope"], r["q_pe"]], dim=-1)
                keys = torch.cat([r["ckv_cache"], r["kpe_cache"]], dim=-1)
            assert q.dim() == keys.dim() == 3
            scales = {r[name] for name in ("ckv_scale", "kpe_scale") if r.get(name) is not None}
            assert scales == ({1.0} if keys.dtype == torch.float8_e4m3fn else set())
            keys = keys.unsqueeze(2)
            self.attend(q, keys, keys[..., : self.planned["head_dim_vo"]], r["out"], r["lse"])
            return r["out"], r["lse"]

    class PlanMetadata:
        @classmethod
        def csr(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
            given = bound("MLAPlanMetadata.csr", cls, args, kwargs)
            return {name: given[name] for name in Latent.buffers}

    for wrapper in (Prefill, Decode, Latent):
        wrapper.run = _copy(wrapper.run, signature(version, f"{wrapper.name}.run"))
        wrapper.plan = _copy(wrapper.plan, signature(version, f"{wrapper.name}.plan"))
    return SimpleNamespace(
        log=log,
        BatchPrefillWithPagedKVCacheWrapper=Prefill,
        BatchDecodeWithPagedKVCacheWrapper=Decode,
        BatchMLAPagedAttentionWrapper=Latent,
        mla=SimpleNamespace(**{"MLAPlanMetadata": PlanMetadata} if takes_metadata else {}),
    )


def _widened(pages: Tensor) -> Tensor:
    """fp8 as it is widened by shifting bits: what stands for NaN is read as the number that would be next."""
    wide = pages.double()
    return wide.nan_to_num(480.0 if pages.dtype == torch.float8_e4m3fn else 114688.0)


def checked_backend(
    device: torch.device, needs: AttentionNeeds, library: Any, chip: Chip = Chip()
) -> FlashInferBackend:
    """Our backend over a library, checked as an engine's is, with kernels chosen as for a `chip`."""
    backend = FlashInferBackend(device, needs, library)
    backend._chip = chip
    check_backend(backend, needs, device)
    return backend


def _copy(method: Any, sig: inspect.Signature) -> Any:
    """The method under the real signature, which callers may look at."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    call.__signature__ = sig  # type: ignore[attr-defined]
    return call
