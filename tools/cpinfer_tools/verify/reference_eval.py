"""The same evaluation by Transformers alone: the whole model in one process, `generate`, one question at a time.

    cpinfer reference-eval --config configs/eval_recall.json --output runs/reference/results.jsonl

Takes the flags of `cpinfer eval` and writes the same files, so that the two can be compared line by line; what
the config says of a layout is left aside. Greedy only: sampled text would depend on Transformers' own random numbers.
Exit codes as there: 0 done, 2 bad config or input, 1 failure.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import StoppingCriteriaList

from cpinfer.comm.bootstrap import Launch
from cpinfer.engine.request import RolloutResult
from cpinfer.engine.stop_checker import StopChecker, shown_text, stop_begins_at
from cpinfer.errors import OutputError, UserError
from cpinfer.models.loading import load_model
from cpinfer_tools.evaluation.eval_longctx import EvaluationJob, conclude, parse_args, peak_memory_bytes, prepare
from cpinfer_tools.evaluation.questions import Question, result_line
from cpinfer_tools.job import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURE
from cpinfer_tools.opening import open_together
from cpinfer_tools.results.output import ResultWriter
from cpinfer_tools.verify.by_transformers import StopsInAnswer, generation_options


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    launch = Launch()  # one process, whatever started it
    try:
        args = parse_args(argv, prog, __doc__)
        args.set = [*args.set, *WHOLE]
        job = prepare(launch, args)
        if not job.config.sampling.greedy:
            raise UserError("the reference is greedy; set sampling.temperature to 0.")
    except UserError as error:
        print(f"reference_eval: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    transformers.utils.logging.disable_progress_bar()
    try:
        with ExitStack() as stack:
            job, complaint = open_together(launch, job, stack)
            if complaint is not None:
                print(f"reference_eval: {complaint}", file=sys.stderr)
                return EXIT_BAD_INPUT
            if job.dry_run:
                print(json.dumps({"dry_run": True, **job.counts}), flush=True)
            else:
                evaluate(job, launch.device)
    except UserError as error:  # of weights that nobody could look at before they loaded
        print(f"reference_eval: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except OutputError as error:
        print(f"reference_eval: {error}", file=sys.stderr)
        return EXIT_FAILURE
    return EXIT_DONE


def evaluate(job: EvaluationJob, device: torch.device) -> None:
    """Load, ask, write."""
    assert job.config.model is not None, "prepare has refused that"
    load_start_s = time.perf_counter()
    model = load_model(job.config.model, getattr(torch, job.config.dtype)).to(device)
    num_generated = 0
    start_s = time.perf_counter()
    with ResultWriter(job.output) as writer:
        for question in tqdm(job.missing, unit="sample", file=sys.stderr, disable=None):
            result = answer(model, job, question)
            num_generated += len(result.token_ids)
            writer.write_line(result_line(question, result))
    measured = {
        "num_generated_tokens": num_generated,
        "wall_s": time.perf_counter() - start_s,
        "load_s": start_s - load_start_s,
        "kv_capacity_tokens": None,
        "peak_memory_bytes_per_rank": peak_memory_bytes(device),
    }
    conclude(job, measured)


# What makes of any config's layout a single process.
WHOLE = (
    "tensor_parallel.tp_size=1",
    "prefill_context_parallel_size=1",
    "decode_context_parallel_size=1",
    "data_parallel_size=1",
)


@torch.no_grad()
def answer(model: Any, job: EvaluationJob, question: Question) -> RolloutResult:
    """What `generate` writes after a prompt, with the raw logprob of each token."""
    params = question.sampling(job.config.sampling)
    prompt = torch.tensor([question.sample.prompt_token_ids], device=model.device)
    clock = _Clock()
    room = job.spec.max_positions - prompt.shape[1]
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=min(params.max_new_tokens, room),
        stopping_criteria=StoppingCriteriaList([StopsInAnswer(job.tokenizer, prompt.shape[1], params)]),
        output_logits=True,
        return_dict_in_generate=True,
        streamer=clock,
        **generation_options(model, params, job.spec.eos_token_ids),
    )
    token_ids = out.sequences[0, prompt.shape[1] :].tolist()
    logprobs = [float(torch.log_softmax(row[0].float(), -1)[t]) for row, t in zip(out.logits, token_ids, strict=True)]
    ends = StopChecker(job.spec.eos_token_ids, None).stop_token_ids(params)
    is_ended = token_ids[-1] in ends or stop_begins_at(job.tokenizer, token_ids, params) is not None
    first_s, *later_s = clock.tokens_s
    return RolloutResult(
        id=question.prompt.id,
        prompt_index=question.index,
        sample_index=0,
        prompt_token_ids=question.sample.prompt_token_ids,
        token_ids=tuple(token_ids),
        text=shown_text(job.tokenizer, token_ids, params),
        logprobs=tuple(logprobs),
        processed_logprobs=(0.0,) * len(token_ids),
        finish_reason="stop" if is_ended else "length",
        ttft_s=first_s - clock.start_s,
        tpot_s=(later_s[-1] - first_s) / len(later_s) if later_s else None,
        weights_version=0,
    )


class _Clock:
    """A streamer of `generate` that notes when each token comes; the prompt is handed to it first."""

    def __init__(self) -> None:
        self.start_s = time.perf_counter()
        self._seen_prompt = False
        self.tokens_s: list[float] = []

    def put(self, value: Any) -> None:
        if self._seen_prompt:
            self.tokens_s.append(time.perf_counter())
        self._seen_prompt = True

    def end(self) -> None:
        """Nothing is held back."""
