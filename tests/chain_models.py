"""Models that say what a test wants: each token has a list of tokens that may follow it, the likeliest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from tiny_models import TINY


def make_chain(followers: Mapping[int, Sequence[int]], vocab_size: int, **config: Any) -> Any:
    """A Qwen2 whose logits depend on the newest token alone.

    Args:
        followers: for each token those that may follow it, each half as far from all others as the one before. A token
            that has none is followed by token 0. At most 64 tokens may have some.
        vocab_size: of the model.
        config: more of the model's config.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**{**TINY, "vocab_size": vocab_size, **config})).eval()
    model = model.float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")):
                weight.zero_()
        for place, (token, after) in enumerate(followers.items()):
            model.model.embed_tokens.weight[token, place] = 1
            for rank, follower in enumerate(after):
                model.lm_head.weight[follower, place] = 2.0**-rank
    return model


def chain_of(tokens: Sequence[int]) -> dict[int, list[int]]:
    """Each token followed by the next. ValueError where one stands twice: it could not tell what follows it."""
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{tokens} has a token twice")
    return {token: [after] for token, after in pairwise(tokens)}
