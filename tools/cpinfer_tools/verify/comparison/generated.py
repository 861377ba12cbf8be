"""What Transformers' own `generate` samples, with its own logprobs, on padded batches as its users have them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from cpinfer.config import SamplingParams
from cpinfer.engine.request import Prompt
from cpinfer.engine.stop_checker import StopChecker
from cpinfer.models.spec import ModelSpec
from cpinfer_tools.progress import Progress
from cpinfer_tools.verify.by_transformers import generation_options
from cpinfer_tools.verify.comparison.mismatches import Sampled


def generate_samples(
    model: Any,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    spec: ModelSpec,
    *,
    temperature: float,
    batch_size: int,
) -> Sampled:
    """Samples of `model`, which is whole, padded on the left, in the order of `prompts`; a batch is so many samples.

    Their logprobs are those of `generate`'s logits (`output_logits`) at `temperature`. Stop strings are left out: they
    say which tokens come, not what the model thinks of them.
    """
    torch.manual_seed(sampling.seed)
    stop_token_ids = StopChecker(spec.eos_token_ids, None).stop_token_ids(sampling)
    num_samples = 1 if sampling.greedy else sampling.n  # greedy samples of a prompt are one
    per_batch = max(1, batch_size // num_samples)
    samples: list[tuple[Prompt, list[int], list[float]]] = []
    batches = [prompts[at : at + per_batch] for at in range(0, len(prompts), per_batch)]
    with Progress("mismatch", len(batches), "batch", shown=True, where=" (Transformers generate)") as progress:
        for batch in batches:
            samples += _generated(model, batch, sampling, spec, temperature, num_samples, stop_token_ids)
            progress.update()
    return Sampled(
        tuple(prompt.index for prompt, _, _ in samples),
        tuple(prompt.token_ids for prompt, _, _ in samples),
        tuple(tuple(given) for _, given, _ in samples),
        tuple(tuple(said) for _, _, said in samples),
    )


@torch.no_grad()
def _generated(
    model: Any,
    batch: Sequence[Prompt],
    sampling: SamplingParams,
    spec: ModelSpec,
    temperature: float,
    num_samples: int,
    stop_token_ids: Collection[int],
) -> list[tuple[Prompt, list[int], list[float]]]:
    """`num_samples` of each prompt of a batch, with their logprobs."""
    longest = max(len(p.token_ids) for p in batch)
    pads = [longest - len(p.token_ids) for p in batch]
    ids = torch.tensor([[0] * pad + list(p.token_ids) for pad, p in zip(pads, batch, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        num_return_sequences=num_samples,
        max_new_tokens=min(sampling.max_new_tokens, spec.max_positions - longest),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **generation_options(model, sampling, spec.eos_token_ids),
    )
    tokens = out.sequences[:, longest:]
    # Step by step: float32 logits of all steps at once would be there twice.
    logprobs = torch.stack(
        [
            torch.log_softmax(logits.float() / temperature, dim=-1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
            for logits, chosen in zip(out.logits, tokens.unbind(1), strict=True)
        ],
        dim=1,
    )
    samples = []
    for row, (given, said) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
        # Behind the token that ended it there is padding.
        end = next((i + 1 for i, token in enumerate(given) if token in stop_token_ids), len(given))
        samples.append((batch[row // num_samples], given[:end], said[:end]))
    return samples
