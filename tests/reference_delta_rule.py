"""The gated delta rule by its definition, one token after another, in the precision of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    output_final_state: bool = True,
    use_qk_l2norm_in_kernel: bool = True,
) -> tuple[Tensor, Tensor]:
    """Arguments, shapes and results as `cpinfer.ops.delta_rule.DeltaRule` has them."""
    assert output_final_state
    assert use_qk_l2norm_in_kernel
    q, k = (x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    q, k = (x.repeat_interleave(value.shape[2] // x.shape[2], dim=2) for x in (q / q.shape[-1] ** 0.5, k))
    state, out = initial_state, torch.zeros_like(value)
    for t in range(value.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        delta = (value[:, t] - torch.einsum("nhk,nhkv->nhv", k[:, t], state)) * beta[:, t, :, None]
        state = state + torch.einsum("nhk,nhv->nhkv", k[:, t], delta)
        out[:, t] = torch.einsum("nhk,nhkv->nhv", q[:, t], state)
    return out, state
