"""Logprobs of tokens as trainers compute them, operation by operation: so equal logits give equal bits.

TRL's fused LM head (trl.kernels, 1.16) multiplies by 1 / temperature, sums exponentials piece by piece of the
vocabulary, and subtracts the log of all of them at once; `log_softmax` rounds elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of the vocabulary that are summed together (_CHUNKED_LOGPROB_CHUNK_SIZE there).
PIECE = 32768


def trained_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """`[N]` logprobs, float32, of `tokens [N]` under `logits [N, vocab]`, float32, divided by a temperature above 0."""
    scaled = logits * (1 / temperature)
    peak = scaled.new_full((len(scaled),), -torch.inf)
    total = scaled.new_zeros(len(scaled))
    for piece in torch.split(scaled, PIECE, dim=-1):
        higher = torch.maximum(peak, piece.amax(dim=-1))
        total = total * torch.exp(peak - higher) + torch.exp(piece - higher.unsqueeze(-1)).sum(dim=-1)
        peak = higher
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - (peak + torch.log(total))
