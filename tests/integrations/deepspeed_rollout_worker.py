"""DeepSpeed's interface of rollouts on training engines; rank 0 prints what every rank found, as one JSON line.

torchrun --nproc-per-node 2 tests/integrations/deepspeed_rollout_worker.py KIND ...

A kind is `zero1`, `zero2`, `zero3:GATHER`, or `zero0+autotp`, as in lending_worker.py. DeepSpeed's own classes are not
touched: `HybridEngineRollout` answers the same requests, and a distillation step of `opsd` is made of our batches.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.rollout import (
    HybridEngineRollout,
    ResponseTokenBatch,
    RolloutRequest,
    SamplingConfig,
    generalized_jsd_loss,
)

from cpinfer.comm.bootstrap import Launch, default_group
from cpinfer_integrations.deepspeed import CpinferRolloutBatch, CpinferRolloutEngine, init_distributed
from cpinfer_tools.verify import check_rollout
from small_tokenizers import tokenizer_of
from tiny_models import FAMILIES, make_model, prompts_of
from trainers import Trainer, changes, deepspeed_trainer, everywhere, photograph

GREEDY = SamplingConfig(max_new_tokens=8, temperature=0.0)
SAMPLED = SamplingConfig(max_new_tokens=6, top_p=0.9, top_k=20, n_samples_per_prompt=2)
PAD = 127


def request_of(prompts: Sequence[Sequence[int]]) -> RolloutRequest:
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + list(p) for p in prompts])
    return RolloutRequest(ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]))


class Rollouts:
    """A job of some kind, its rollout engine, and the same weights whole in this process."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        has_tp = kind.endswith("+autotp")
        self.trainer: Trainer = deepspeed_trainer(int(kind[4]), autotp=2 if has_tp else 1, micro_steps=1)
        # What ranks of one tp group are asked is the same; data-parallel ranks have prompts of their own.
        own = prompts_of((3, 40, 17), vocab_size=128) if dist.get_rank() == 0 or has_tp else prompts_of((9, 21), 128)
        self.prompts = [list(p) for p in own]
        self.whole = make_model(FAMILIES["qwen2"])
        self.tokenizer = copy.deepcopy(tokenizer_of("byte_level"))
        # A token in the middle of a greedy answer of the first rank ends answers: here one of several does so early.
        first = prompts_of((3,), vocab_size=128)[0]
        self.tokenizer.eos_token = self.tokenizer.convert_ids_to_tokens(self._whole_answer(first, 8)[4])
        self.engine = self.new_engine()

    def new_engine(self, **sampling: Any) -> CpinferRolloutEngine:
        tp_size = 2 if self._kind.endswith(("+autotp", "tp_shards")) else 1
        config = {
            "dtype": "float32",
            "kv_cache_gib": 0.001,
            "tensor_parallel": {"tp_size": tp_size},
            "prefill_context_parallel_size": dist.get_world_size() // tp_size,
            "rollout": {"gather": self._kind.partition(":")[2] or "full"},
            "sampling": {"seed": 3, **sampling},
        }
        return CpinferRolloutEngine(self.trainer.trained, self.tokenizer, config)

    def generate(self, sampling: SamplingConfig = GREEDY) -> CpinferRolloutBatch:
        return self.engine.generate(request_of(self.prompts), sampling)

    def copy_weights(self) -> None:
        """The trainer's newest weights into the whole model. Collective."""
        self.whole.load_state_dict(self.trainer.weights())

    def whole_answer(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """What Transformers continues with on the same weights, up to the token that ends answers."""
        tokens = self._whole_answer(prompt, num_tokens)
        eos = self.tokenizer.eos_token_id
        return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens

    def _whole_answer(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        return check_rollout.generate_greedy(self.whole, prompt, num_tokens)


def answers_of(batch: CpinferRolloutBatch) -> list[list[int]]:
    start = int(batch.response_start_idx[0])
    return [
        ids[start:][mask[start:].bool()].tolist()
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]


def check_greedy(rollouts: Rollouts, batch: CpinferRolloutBatch) -> dict[str, Any]:
    """A greedy batch beside the whole model: tokens, logprobs, and that all else is padding."""
    request, answers = request_of(rollouts.prompts), answers_of(batch)
    width = request.prompt_ids.shape[1]
    is_answer = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    worst = 0.0
    for row, (prompt, answer) in enumerate(zip(rollouts.prompts, answers, strict=True)):
        is_answer[row, width : width + len(answer)] = True
        found = batch.logprobs[row, width : width + len(answer)]
        worst = max(worst, (check_rollout.score(rollouts.whole, prompt, answer) - found).abs().max().item())
    longest = max(map(len, answers))
    behind = batch.input_ids[:, width:][~is_answer[:, width:]]
    return {
        "same_tokens": [a == rollouts.whole_answer(p, 8) for p, a in zip(rollouts.prompts, answers, strict=True)],
        "worst": worst,
        "lens": list(map(len, answers)),
        "prompts_as_they_came": torch.equal(batch.input_ids[:, :width], request.prompt_ids)
        and torch.equal(batch.attention_mask[:, :width], request.prompt_attention_mask),
        "answers_alone_have_logprobs": torch.equal(batch.logprobs != 0, is_answer)
        and not batch.processed_logprobs.any(),
        "nothing_is_cut": torch.equal(batch.kept_mass, torch.ones(batch.input_ids.shape)),
        "as_wide_as_the_longest": batch.seq_len == width + longest,
        "padded": bool((behind == rollouts.tokenizer.eos_token_id).all()),
        "starts": batch.response_start_idx.tolist() == [width] * len(answers),
    }


def beside_hybrid(rollouts: Rollouts, ours: CpinferRolloutBatch) -> dict[str, bool]:
    """The same request to DeepSpeed's HybridEngineRollout, whose rows are all as wide as the longest answer allowed."""
    theirs = HybridEngineRollout(rollouts.trainer.trained, rollouts.tokenizer)
    batch = theirs.generate(request_of(rollouts.prompts), GREEDY)
    width = ours.seq_len
    return {
        "ids": torch.equal(batch.input_ids[:, :width], ours.input_ids),
        "mask": torch.equal(batch.attention_mask[:, :width], ours.attention_mask)
        and not batch.attention_mask[:, width:].any(),
        "starts": torch.equal(batch.response_start_idx, ours.response_start_idx),
        "dtypes": batch.input_ids.dtype == ours.input_ids.dtype
        and batch.attention_mask.dtype == ours.attention_mask.dtype
        and batch.response_start_idx.dtype == ours.response_start_idx.dtype,
    }


def distill(rollouts: Rollouts, batch: CpinferRolloutBatch) -> float:
    """One step of on-policy distillation, all of it DeepSpeed's; the loss before it."""
    teacher = make_model(FAMILIES["mistral"])
    targets = ResponseTokenBatch.from_rollout(batch)
    given = {"input_ids": targets.input_ids, "attention_mask": targets.attention_mask, "use_cache": False}
    with torch.no_grad():
        theirs = targets.select_causal_logits(teacher(**given).logits)
    ours = targets.select_causal_logits(rollouts.trainer.trained(**given).logits)
    found = generalized_jsd_loss(ours, theirs, targets.response_mask)
    assert int(found.valid_token_count) == sum(map(len, answers_of(batch)))
    rollouts.trainer.backward(found.loss)
    rollouts.trainer.step()
    return float(found.loss.detach())


def check_sampling(rollouts: Rollouts) -> dict[str, Any]:
    """Draws follow step and call, and the two samples of a prompt stand side by side."""
    rollouts.engine.sync_weights(5)
    first, second = rollouts.generate(SAMPLED), rollouts.generate(SAMPLED)
    again = rollouts.new_engine()
    again.sync_weights(5)
    repeated = again.generate(request_of(rollouts.prompts), SAMPLED)
    again.shutdown()
    rows = request_of(rollouts.prompts).prompt_ids.repeat_interleave(2, dim=0)
    # At temperature 1 logprobs before the cut are those of the model.
    uncut = first.processed_logprobs + first.kept_mass.log()
    return {
        "uncut": bool((uncut - first.logprobs).abs().max() < 1e-4) and bool((first.kept_mass < 0.999).any()),
        "rows": torch.equal(first.input_ids[:, : rows.shape[1]], rows),
        "samples_differ": any(a != b for a, b in zip(*[iter(answers_of(first))] * 2, strict=True)),
        "calls_differ": answers_of(first) != answers_of(second),
        "repeated": torch.equal(repeated.input_ids, first.input_ids) and torch.equal(repeated.logprobs, first.logprobs),
        "version": first.weights_version,
    }


def check_phases(rollouts: Rollouts) -> dict[str, Any]:
    """A block of several calls is one phase; each call alone is one as well."""
    alone = rollouts.generate()
    report = rollouts.engine.last_report
    with rollouts.engine.phase() as inside:
        batches = [inside.generate(request_of(rollouts.prompts), GREEDY) for _ in range(2)]
        same_phase = rollouts.engine.last_report is report
        nested = error_of(lambda: rollouts.engine.phase().__enter__())
    return {
        "one_phase": same_phase and rollouts.engine.last_report is not report,
        "same": all(torch.equal(batch.input_ids, alone.input_ids) for batch in batches),
        "nested": nested,
    }


def check_errors(rollouts: Rollouts) -> dict[str, str]:
    """What the last rank alone asks wrongly is an error on every rank; then all goes on."""
    is_wrong = dist.get_rank() == dist.get_world_size() - 1
    right = request_of(rollouts.prompts)
    requests = {
        "right_padded": RolloutRequest(right.prompt_ids.flip(1), right.prompt_attention_mask.flip(1)),
        "empty": RolloutRequest(right.prompt_ids, torch.zeros_like(right.prompt_attention_mask)),
        "unknown_token": RolloutRequest(right.prompt_ids + 128, right.prompt_attention_mask),
    }
    errors = {
        name: error_of(lambda wrong=wrong: rollouts.engine.generate(wrong if is_wrong else right, GREEDY))
        for name, wrong in requests.items()
    }
    settings = {
        "no_samples": SamplingConfig(8, n_samples_per_prompt=0),
        "continuous": SamplingConfig(8, continuous_batch_size=4),
        "top_p": SamplingConfig(8, top_p=1.5),
    }
    for name, setting in settings.items():
        errors[name] = error_of(
            lambda setting=setting: rollouts.engine.generate(right, setting if is_wrong else GREEDY)
        )
    return errors


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def run(kind: str) -> dict[str, Any]:
    rollouts = Rollouts(kind)
    before = photograph(rollouts.trainer)
    batch = rollouts.generate()
    found: dict[str, Any] = {"changed": changes(before, photograph(rollouts.trainer))}
    found["greedy"] = [check_greedy(rollouts, batch)]
    found["hybrid"] = {} if kind.endswith("+autotp") else beside_hybrid(rollouts, batch)
    found["errors"] = check_errors(rollouts)
    found["phases"] = check_phases(rollouts)
    found["sampling"] = check_sampling(rollouts)
    found["losses"] = []
    for step in (1, 2, 3):
        found["losses"].append(distill(rollouts, batch))
        rollouts.engine.sync_weights(step)
        rollouts.copy_weights()
        newer = rollouts.generate()
        found["greedy"].append({**check_greedy(rollouts, newer), "new": answers_of(newer) != answers_of(batch)})
        batch = newer
    found["version"] = batch.weights_version
    rollouts.engine.close()
    return found


if __name__ == "__main__":
    launch = Launch.from_environ(os.environ)
    with default_group(launch):
        with redirect_stdout(sys.stderr):
            init_distributed()
            outcomes = {kind: everywhere(run(kind)) for kind in sys.argv[1:]}
        if launch.rank == 0:
            print(json.dumps(outcomes), flush=True)
