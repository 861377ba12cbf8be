"""What belongs to one layer of attention and to no step: its place in the cache, its logits, what its cache holds.

Letters: T tokens, S keys, H query heads of this rank, K KV heads, D key dim, C latent dims, R rope dims, N dims without
rope, V value dims.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cpinfer.attention.backends.base import PlannedAttention
from cpinfer.ops.states import State


@dataclass(frozen=True)
class AttentionLayer:
    """One layer whose cache holds keys and values as heads attend to them (MHA, GQA, MQA).

    `window`: a query sees so many of the last tokens, its own included; None all. `sinks [H]`: logit of a key without
    value (attention sinks).
    """

    index: int
    scale: float
    soft_cap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None

    def run(self, planned: PlannedAttention, q: Tensor, keys: Tensor, values: Tensor) -> State:
        """Planned attention with this layer's logits; shapes as `PlannedAttention.run` has them."""
        return planned.run(q, keys, values, scale=self.scale, soft_cap=self.soft_cap)

    def absorb(self, q: Tensor) -> Tensor:
        """Queries of what is cached, from the model's q `[T, H, D]`: the same."""
        return q

    def project(self, out: Tensor) -> Tensor:
        """`[T, H, V]` values of the model, from weighted cached values: the same."""
        return out

    def expand(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[S, K, D]` and values `[S, K, V]` for the model's own queries, from what is cached: the same."""
        return keys, values

    def v_dim(self, v: Tensor) -> int:
        """V of the layer's output, from new values as they are cached."""
        return v.shape[-1]

    def to(self, dtype: torch.dtype) -> AttentionLayer:
        """The same layer with the weights it brings in this dtype: it brings none."""
        return self


@dataclass(frozen=True, kw_only=True)
class LatentLayer(AttentionLayer):
    """Multi-head latent attention: heads whose K and V are maps of one latent (DeepSeek-V2, arXiv:2405.04434, 2.1).

    A token caches one latent `[C]` and one rotated key `[R]`, `C + R` values that serve all heads. Head h has keys
    `(w_k[h] @ latent, rotated)` and values `w_v[h] @ latent`. `w_k [H, N, C]`, `w_v [H, V, C]`.

    Few queries are best *absorbed*: `q . (w_k c) = (w_k^T q) . c`, so they attend to latents as they are, and what they
    get is projected at the end. For many, keys and values are best expanded.
    """

    w_k: Tensor
    w_v: Tensor

    def absorb(self, q: Tensor) -> Tensor:
        """`[T, H, C + R]` queries of latents, from q `[T, H, N + R]`."""
        plain, rotated = torch.split(q, [self.w_k.shape[1], q.shape[-1] - self.w_k.shape[1]], dim=-1)
        return torch.cat([torch.einsum("thn,hnc->thc", plain, self.w_k), rotated], dim=-1)

    def project(self, out: Tensor) -> Tensor:
        """`[T, H, V]` values, from weighted latents `[T, H, C]`."""
        return torch.einsum("thc,hvc->thv", out, self.w_v.to(out.dtype))

    def expand(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[S, H, N + R]` and values `[S, H, V]` of latents `[S, 1, C + R]`; `values` are part of those."""
        (H, N, C), S = self.w_k.shape, len(keys)
        latent, rotated = keys[:, 0, :C], keys[:, :, C:]
        R, V = rotated.shape[-1], self.w_v.shape[1]
        # Side by side, as the cache has them: kernels may want keys and values of equal strides.
        both = torch.empty(S, H, N + R + V, dtype=keys.dtype, device=keys.device)
        both[..., :N] = torch.einsum("sc,hnc->shn", latent, self.w_k)
        both[..., N : N + R] = rotated
        both[..., N + R :] = torch.einsum("sc,hvc->shv", latent, self.w_v)
        return both[..., : N + R], both[..., N + R :]

    def v_dim(self, v: Tensor) -> int:
        return self.w_v.shape[1]

    def to(self, dtype: torch.dtype) -> LatentLayer:
        return replace(self, w_k=self.w_k.to(dtype), w_v=self.w_v.to(dtype))
