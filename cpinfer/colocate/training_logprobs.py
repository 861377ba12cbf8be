"""What the training forward says of sampled tokens: the model as the trainer calls it, nothing of ours in it.

But for its dropout: rollouts are drawn without, and to measure is not to train.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpinfer.ops.trained_logprobs import trained_logprobs

Tokens = Sequence[int]


@contextmanager
def eval_no_grad(model: Any) -> Iterator[None]:
    """The model without dropout and without gradients, for the length of the block; it changes nothing of training.

    Every module has its mode back afterwards, and the random states of this process (torch's, on the model's device
    too, NumPy's and Python's) are those from before, also after an error. Modules run in the order of training:
    dropout is called, and does nothing.
    """
    modes = {module: module.training for module in model.modules()}
    numpy_state, python_state = np.random.get_state(), random.getstate()
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def training_logprobs(
    model: Any,
    prompts: Sequence[Tokens],
    completions: Sequence[Tokens],
    *,
    temperature: float,
    batch_size: int,
    pad_token_id: int,
    num_batches: int = 0,
) -> list[list[float]]:
    """The logprob of every token of every completion, log_softmax(logits / temperature) in float32, as TRL computes it.

    The model is called, hooks and all, `eval_no_grad`; no cache. Samples are batched by length and padded on the
    right. Only completions meet the vocabulary, as far as batches are alike.

    Args:
        model: what the trainer calls forward on.
        prompts: token ids of each sample's prompt, none empty.
        completions: token ids of each sample's answer.
        temperature: by which logits are divided; above 0.
        batch_size: samples per forward.
        pad_token_id: what stands behind short samples.
        num_batches: forwards to make at least. Under ZeRO-3 or FSDP a forward is collective: give the largest
            `num_batches_of` any rank; calls beyond this rank's samples are of one token and are dropped.

    Returns:
        For each sample a logprob per token of its completion, natural log; an empty list for an empty one.

    Raises:
        ValueError: for a temperature of 0 (whose distribution has one token), an empty prompt, or lists that do not
            match.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; above 0 was wanted (1 for the model's own distribution)")
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts, {len(completions)} completions; one each was wanted")
    if not all(prompts):
        raise ValueError("a prompt is empty; its completion's first token has no logits")
    # Alike in length side by side: less padding, and less of it through the vocabulary.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]) + len(completions[i]), len(prompts[i])))
    found: list[list[float]] = [[] for _ in prompts]
    num_called = 0
    with eval_no_grad(model):
        for rows in (order[at : at + batch_size] for at in range(0, len(order), batch_size)):
            batch = [(prompts[i], completions[i]) for i in rows]
            for i, logprobs in zip(rows, _of_batch(model, batch, temperature, pad_token_id), strict=True):
                found[i] = logprobs.tolist()
            num_called += 1
        for _ in range(num_called, num_batches):
            _logits(model, [[pad_token_id]], num_kept=1, pad_token_id=pad_token_id)
    return found


def num_batches_of(num_samples: int, batch_size: int) -> int:
    """How many forward calls `training_logprobs` makes for so many samples."""
    return -(-num_samples // batch_size)


def _of_batch(
    model: Any, batch: Sequence[tuple[Tokens, Tokens]], temperature: float, pad_token_id: int
) -> Iterator[Tensor]:
    longest = max(len(prompt) + len(completion) for prompt, completion in batch)
    # The token at position p is told by the logits at p - 1: the first that matter are the shortest prompt's last.
    first = min(len(prompt) for prompt, _ in batch) - 1
    logits = _logits(model, [[*p, *c] for p, c in batch], longest - first, pad_token_id)
    for row, (prompt, completion) in zip(logits, batch, strict=True):
        start = len(prompt) - 1 - first
        # Row by row: float32 of the whole batch would be as large as the logits again.
        tokens = torch.tensor(list(completion), dtype=torch.long, device=row.device)
        yield trained_logprobs(row[start : start + len(completion)].float(), tokens, temperature)


def _logits(model: Any, samples: Sequence[list[int]], num_kept: int, pad_token_id: int) -> Tensor:
    """`[B, num_kept, vocab]`: logits of the last `num_kept` positions of a batch padded on the right."""
    longest = max(map(len, samples))
    device = next(model.parameters()).device
    ids = torch.tensor([[*s, *[pad_token_id] * (longest - len(s))] for s in samples], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in samples], device=device)
    logits: Tensor = model(ids, attention_mask=mask, use_cache=False, logits_to_keep=num_kept).logits
    return logits[:, -num_kept:]  # a wrapper may not hand the wish on
