"""Compare the results of a rollout with the unsharded model, run by Transformers alone.

    cpinfer check-rollout                               # the newest runs/*/results.jsonl
    cpinfer check-rollout --output my_results.jsonl

Every sample is scored again by the whole model in one process: the log-probability of each of its tokens must agree to
`--tolerance`. Greedy samples are also generated again, by `generate`, and must have the same tokens. Where the rollout
had a `kv_cache_dtype`, Transformers' cache rounds K and V as that says. A table goes to stderr, the last stdout line is
one JSON object; exit 1 when anything disagrees.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import DynamicCache

from cpinfer.config import SamplingParams
from cpinfer.engine.attach import model_spec
from cpinfer.errors import UserError
from cpinfer.models.loading import load_model
from cpinfer_tools.results.metrics import format_summary
from cpinfer_tools.results.output import read_meta
from cpinfer_tools.run_config import RunConfig, parse_run_config
from cpinfer_tools.verify.by_transformers import generation_options

GREEDY = SamplingParams(temperature=0)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", metavar="FILE", help="results of cpinfer rollout; default: the newest under runs/")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest logprob difference (default: 1e-4)")
    args = parser.parse_args(argv)
    try:
        path = Path(args.output) if args.output else newest_results(Path("runs"))
        results, config = read_results(path)
        assert config.model is not None, "a rollout has a model"
        transformers.utils.logging.disable_progress_bar()  # loading takes no time beside the rest
        model = load_model(config.model, getattr(torch, config.dtype))
    except UserError as error:
        print(f"check_rollout: {error}", file=sys.stderr)
        return 2
    with warnings.catch_warnings():
        # Its newer name is not in all versions of Transformers that run here.
        warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)
        summary = compare(model, results, config)
    same = summary["num_same_tokens"] in (None, summary["num_greedy"])
    ok = same and summary["max_abs_logprob_difference"] <= args.tolerance
    summary = {"output": str(path), **summary, "tolerance": args.tolerance, "ok": ok}
    print(format_summary(summary), file=sys.stderr, flush=True)
    print(json.dumps(summary), flush=True)
    return 0 if ok else 1


def newest_results(folder: Path) -> Path:
    """The results file under `folder` that was written last."""
    found = sorted(folder.glob("*/results.jsonl"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"there is no {folder}/*/results.jsonl; run cpinfer rollout first, or name a file by --output.")
    return found[-1]


def read_results(path: Path) -> tuple[list[dict[str, Any]], RunConfig]:
    """The lines of a results file, and the config it was made with."""
    try:
        results = [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    config = parse_run_config(read_meta(path)["config"])
    if not results:
        raise UserError(f"{path} holds no results.")
    return results, config


def compare(model: Any, results: Sequence[dict[str, Any]], config: RunConfig) -> dict[str, Any]:
    """How results differ from what `model` gives on its own, told the same of how each was sampled."""
    keeps_all = config.kv_cache_dtype == "auto"
    kv_dtype = None if keeps_all else getattr(torch, config.cache_dtype(config.dtype))
    num_greedy = num_same = 0
    worst = 0.0
    for result in tqdm(results, unit="sample", file=sys.stderr, disable=None):
        prompt, tokens = result["prompt_token_ids"], result["token_ids"]
        params = replace(config.sampling, **result.get("sampling", {}))  # a line of the input may have its own
        if params.greedy:
            num_greedy += 1
            num_same += generate_greedy(model, prompt, len(tokens), kv_dtype, params) == tokens
        difference = score(model, prompt, tokens, kv_dtype) - torch.tensor(result["logprobs"])
        worst = max(worst, float(difference.abs().max()))
    return {
        "num_samples": len(results),
        "num_greedy": num_greedy,
        "num_same_tokens": num_same if num_greedy else None,
        "max_abs_logprob_difference": worst,
    }


@torch.no_grad()
def generate_greedy(
    model: Any,
    prompt: Sequence[int],
    num_tokens: int,
    kv_dtype: torch.dtype | None = None,
    params: SamplingParams = GREEDY,
) -> list[int]:
    """What Transformers' `generate` continues a prompt with, at most `num_tokens` tokens.

    With a `kv_dtype` from a cache that rounds K and V through it. Of `params` all counts but stop strings: an answer
    that they ended is `num_tokens` long.
    """
    ids = torch.tensor([list(prompt)], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        **generation_options(model, params, model_spec(model).eos_token_ids),
        **({} if kv_dtype is None else {"past_key_values": RoundedCache(model.config, kv_dtype)}),
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@torch.no_grad()
def score(
    model: Any, prompt: Sequence[int], tokens: Sequence[int], kv_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`[len(tokens)]` log-probabilities of a continuation, from one forward pass over all of it.

    With a `kv_dtype` through a cache that rounds K and V.
    """
    ids = torch.tensor([[*prompt, *tokens]], device=model.device)
    cache = None if kv_dtype is None else RoundedCache(model.config, kv_dtype)
    logits = model(ids, use_cache=cache is not None, past_key_values=cache, logits_to_keep=len(tokens) + 1).logits[
        0, :-1
    ]
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1).cpu()


class RoundedCache(DynamicCache):  # type: ignore[misc]  # transformers is untyped
    """Transformers' cache, but K and V have the numbers of `dtype` alone, the largest where theirs are larger.

    Also for the token that makes them: attention sees what `update` gives back. Of DeepSeek these are latents.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        super().__init__(config=config)
        self._dtype = dtype

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(self._rounded(key_states), self._rounded(value_states), *args, **kwargs)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        largest = torch.finfo(self._dtype).max
        return x.clamp(-largest, largest).to(self._dtype).to(x.dtype)
