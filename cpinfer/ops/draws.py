"""Tokens from rows of logits: drawn by exponential races, or the likeliest; and how likely they are.

On CPU in C++ (`cpu_kernels/draws.cpp`), which reads each row twice and writes none, where that can be compiled; what is
written here in torch is its definition, and what runs elsewhere. The two agree up to rounding.

A race is won by the smallest e_i / p_i, e_i exponentially distributed with mean 1: by i with probability p_i, and the
winner changes with rounding only where two are nearly equal. (It is Gumbel-max, argmax of log p_i - log e_i.) First
groups of `GROUP_SIZE` tokens race, each with the probability of its tokens together, then the tokens of the group that
won. So a row needs vocab / GROUP_SIZE + GROUP_SIZE random numbers, not one for each token:

    numbers of a row   [ GROUP_SIZE of the tokens of a group | one for each group, in order of token ids ]

Equal times are won by the lower token id. Of rows that are no logits (NaN, +inf, nothing but -inf) some token comes,
which means nothing.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cpinfer.ops.cpu_kernels.compiling import functions_of

# About the square root of a vocabulary, and most vocabularies are a multiple of it.
GROUP_SIZE = 128
# Of the kernels' functions.
ARGUMENTS = MappingProxyType(
    {
        "cpinfer_draw": "pnnnpnpp",
        "cpinfer_logprobs": "pnnnpnp",
        "cpinfer_likeliest": "pnnnnp",
        "cpinfer_norms": "pnnnnp",
    }
)


def num_random(vocab_size: int) -> int:
    """Random numbers that a row of so many logits is drawn by."""
    return GROUP_SIZE - (-vocab_size // GROUP_SIZE)


def draw(scores: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each row of `scores [N, vocab]`, float32, and its logprob, `[N]` each. Empty for N = 0.

    `numbers [N, num_random(vocab)]`, float64: exponentially distributed, finite, above 0.
    """
    kernels = _kernels_for(scores)
    if kernels is None:
        return _drawn(scores, numbers)
    if numbers.shape != (len(scores), num_random(scores.shape[-1])) or numbers.dtype != torch.float64:
        raise ValueError(f"random numbers are {[*numbers.shape]} {numbers.dtype}, for scores {[*scores.shape]}")
    tokens, logprobs = scores.new_empty(len(scores), dtype=torch.int64), scores.new_empty(len(scores))
    numbers = numbers.contiguous()
    outs = tokens.data_ptr(), logprobs.data_ptr()
    kernels.cpinfer_draw(*_rows(scores), numbers.data_ptr(), torch.get_num_threads(), *outs)
    return tokens, logprobs


def logprobs_of(scores: Tensor, tokens: Tensor) -> Tensor:
    """`[N]` logprobs of `tokens [N]` under `scores [N, vocab]`, float32. Empty for N = 0.

    An IndexError on CPU for a token that is none of them.
    """
    kernels = _kernels_for(scores)
    if kernels is None:
        return _pick(torch.log_softmax(scores, dim=-1), tokens)
    tokens, logprobs = tokens.to(torch.int64).contiguous(), scores.new_empty(len(scores))
    num_beyond = kernels.cpinfer_logprobs(
        *_rows(scores), tokens.data_ptr(), torch.get_num_threads(), logprobs.data_ptr()
    )
    if num_beyond:
        raise IndexError(f"{num_beyond} token(s) are outside the {scores.shape[-1]} of the logits")
    return logprobs


def likeliest(scores: Tensor) -> Tensor:
    """`[N]`: of each row of `scores [N, vocab]`, float32, the likeliest token, of several the first."""
    kernels = _kernels_for(scores)
    if kernels is None:
        return scores.argmax(dim=-1)
    tokens = scores.new_empty(len(scores), dtype=torch.int64)
    kernels.cpinfer_likeliest(*_rows(scores), torch.get_num_threads(), tokens.data_ptr())
    return tokens


def top_logprobs(scores: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Ids and logprobs, `[N, num]` each, of the likeliest tokens under `scores [N, vocab]`, float32, likeliest first.

    `num` is at most vocab. The logprob of a token is that of `logprobs_of`, in every bit. Empty for N = 0.
    """
    kernels = _kernels_for(scores)
    if kernels is None:
        values, ids = torch.log_softmax(scores, dim=-1).topk(num, dim=-1)
        return ids, values
    norms = scores.new_empty(len(scores), 1, dtype=torch.float64)
    kernels.cpinfer_norms(*_rows(scores), torch.get_num_threads(), norms.data_ptr())
    values, ids = scores.topk(num, dim=-1)
    return ids, (values.double() - norms).float()


def _drawn(scores: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(scores, dim=-1)
    vocab_size = scores.shape[-1]
    # float32 will do: a group's sum is off by 1e-6 of it at most, and logits differ between layouts by more.
    probs = logprobs.exp()
    if vocab_size % GROUP_SIZE:
        probs = pad(probs, (0, -vocab_size % GROUP_SIZE))
    probs = probs.reshape(len(scores), -(-vocab_size // GROUP_SIZE), GROUP_SIZE)
    # Divided by 0 they are infinite: what has no probability wins against nothing.
    groups = (numbers[:, GROUP_SIZE:] / probs.sum(dim=-1)).argmin(dim=-1)
    within = probs[torch.arange(len(probs), device=probs.device), groups]
    places = (numbers[:, :GROUP_SIZE] / within).argmin(dim=-1)
    # Of probabilities that are not finite the last place may win, behind the vocabulary.
    tokens = (groups * GROUP_SIZE + places).clamp(max=vocab_size - 1)
    return tokens, _pick(logprobs, tokens)


def _pick(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _rows(scores: Tensor) -> tuple[int, ...]:
    """Rows as the kernels are given them."""
    return scores.data_ptr(), *scores.shape, scores.stride(0)


def _kernels_for(scores: Tensor) -> Any:
    """The kernels, for rows side by side in float32 on CPU, where they can be compiled."""
    if scores.device.type != "cpu" or scores.dtype != torch.float32 or scores.stride(-1) != 1:
        return None
    return functions_of("draws", **ARGUMENTS)
