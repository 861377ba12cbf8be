"""FlashAttention-3's varlen call in torch, for TRL's AsyncGRPO, whose forward knows no other attention."""

from __future__ import annotations

from typing import Any

import torch


class _Flash:
    @staticmethod
    def flash_attn_varlen_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
    ) -> torch.Tensor:
        assert causal and window_size == (-1, -1)
        parts = []
        lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        for one_q, one_k, one_v in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
            # Queries are the last positions of the keys.
            num_q, num_k = len(one_q), len(one_k)
            mask = torch.ones(num_q, num_k, dtype=torch.bool).tril(num_k - num_q)
            heads = (x.transpose(0, 1)[None] for x in (one_q, one_k, one_v))
            out = torch.nn.functional.scaled_dot_product_attention(
                *heads, attn_mask=mask, scale=softmax_scale, enable_gqa=True
            )
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)


def get_kernel(name: str, version: int) -> Any:
    assert name == "kernels-community/flash-attn3", name
    return _Flash
