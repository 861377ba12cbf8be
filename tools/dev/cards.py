"""The cards of the benchmarks, as a table: what each measured, on what machine, and what it says.

A card is a file of `tools/bench/results`, as a benchmark wrote it. Every figure of a sentence here stands in its card,
which a test holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
PLACE = "../tools/bench/results"  # from docs/benchmarks.md

# By a card's name: what it measures, and what it says, also where that is not in our favour.
SAYS: Mapping[str, tuple[str, str]] = {
    "engine_amd_epyc_2_cores": (
        "Rollout throughput beside Transformers and vLLM",
        "On one process 4.27 times as fast as `generate` for groups of samples, 2.70 for ragged batches, 1.24 for one "
        "prompt of 16k tokens, 1.09 for many short ones; beside vLLM 1.40, 1.02, 0.96 and 0.97. No token parted.",
    ),
    "engine_shared_amd_epyc_2_cores": (
        "Questions over a shared document beside Transformers and vLLM",
        "64 questions over 8,192 shared tokens, on one process, one run: 1.08 times as fast as vLLM, 49.73 times as "
        "fast as `generate`, which computes the document for each; 67 % of the bound.",
    ),
    "scaling_amd_epyc_2_cores": (
        "Prefill over pcp, decode and capacity over dcp",
        "On two ranks prefill of 16k tokens is 1.98 times as fast, decode at 64k tokens 2.01 times for 8 sequences and "
        "1.28 for 1; a sequence may be `dcp` times as long.",
    ),
    "long_tail_amd_epyc_2_cores": (
        "One long sample in a batch, beside data parallelism",
        "Beside two replicas pcp=2 dcp=auto is 1.63 times as fast where a prompt is long, 1.04 where an answer is, "
        "1.26 where both are; pcp=2 dcp=2 is 0.70 where an answer is.",
    ),
    "cascade_amd_epyc_2_cores": (
        "Samples that attend to their prompt together",
        "A decode step of groups of eight is 1.08 times as fast for prompts of 2k tokens, 1.06 for 8k; for 128 tokens "
        "it is slower, 0.93.",
    ),
    "hybrids_amd_epyc_2_cores": (
        "Linear attention: prefill and decode",
        "Prefill over two ranks is 2.03 times as fast; a decode step beside that of `generate` 0.85 for one sequence, "
        "1.21 for 64.",
    ),
    "agents_intel_r_xeon_r_processor_2_cores": (
        "Turns with tools, beside TRL's lock-step loop",
        "8.93 times as fast where tools are slow, 2.60 where they take no time; 1.004 of the distinct prompt tokens "
        "computed.",
    ),
    "server_intel_r_xeon_r_processor_2_cores": (
        "HTTP beside `generate`, and beside vLLM on CPU",
        "Whole answers have 0.95 of the tokens a second of `generate`, streams 0.80; vLLM has 1.64 to 2.42 times as "
        "many on a model of 2 layers.",
    ),
    "same_text_intel_r_xeon_r_processor_2_cores": (
        "How often a seed draws another text",
        "In float32 0 of 256 answers differ from those of one rank, for chunks, batches and pcp2 dcp2 alike; in "
        "bfloat16 75 of 128 do as pcp2 dcp2.",
    ),
    "mismatch_float32_amd_epyc_2_cores": (
        "Rollout logprobs beside the training forward, float32",
        "At most 3.3e-06 in every layout; 0.0001 is allowed.",
    ),
    "mismatch_bfloat16_amd_epyc_2_cores": (
        "The same in bfloat16",
        "A mean of 0.00082 at most against the forward of the layout's own tp; 0.001 is allowed.",
    ),
    "mismatch_bfloat16_past_answers_amd_epyc_2_cores": (
        "The same, where the model writes on past its answer",
        "Over the limit: a mean of 0.0019 for pcp2, where 0.001 is allowed.",
    ),
    "mismatch_float32_deterministic_intel_r_xeon_r_processor_2_cores": (
        "The same under `deterministic`, float32",
        "The largest max is 0 against the forward of the same tp.",
    ),
    "mismatch_bfloat16_deterministic_intel_r_xeon_r_processor_2_cores": (
        "The same under `deterministic`, bfloat16",
        "The largest max is 0 against the forward of the same tp.",
    ),
    "deterministic_amd_epyc_2_cores": (
        "What the deterministic mode costs",
        "In float32 1.29 times the default's processor time for groups, 1.00 for a training step; 1.35 was the bound.",
    ),
    "deterministic_intel_r_xeon_r_processor_2_cores": (
        "The same on a processor with units for half precision",
        "One long prompt in bfloat16 takes 2.64 times the default's time, over the bound of 1.35.",
    ),
    "grpo_amd_epyc_2_cores": (
        "GRPO on two processes",
        "Reward rises from 0.064 to 0.741 in a run of 28 s; on so small a model `generate` has the faster phase, "
        "41 beside 89 ms.",
    ),
    "lending_amd_epyc_2_cores": (
        "What lending a job's weights takes",
        "Under ZeRO-2 or DDP a phase takes 1,555,712 bytes beside weights of 14,440,448.",
    ),
    "loading_amd_epyc_2_cores": (
        "Loading weights: time and host memory",
        "Under AutoTP four ranks take 1.03 of the checkpoint's bytes of host memory at the peak; DeepSpeed and "
        "Transformers alone take 2.05.",
    ),
    "step_cost_amd_epyc_2_cores": (
        "What a step costs beside the model",
        "Schedule, plan, agreement and commit take 1.5 us per running sequence at 512 of them, 131.2 us for one alone; "
        "a token of 151,936 is drawn in 111 us, without a compiler in 959.",
    ),
    "same_call_intel_r_xeon_r_processor_2_cores": (
        "Comparing calls among ranks",
        "At most 0.94% of a call of 16 tokens.",
    ),
    "hung_ranks_amd_epyc_2_cores": (
        "How long a stopped rank keeps the others",
        "At most 9.7 s beyond `collective_timeout_s`; every end named the rank.",
    ),
    "starts_amd_epyc_2_cores": (
        "How long a job takes to start",
        "A rollout on 2 ranks is ready after 9.74 s, Transformers alone after 8.63 s, DeepSpeed and Transformers after "
        "8.99 s; on 8 ranks a rollout after 27.91 s, DeepSpeed and Transformers alone after 26.33 s.",
    ),
    "plan_amd_epyc_2_cores": (
        "The model of cost of `explain --plan`, beside the clock",
        "The median error of a step is 19%, above the goal of 15%: 12% for 2 ranks on as many cores, 19% for 4.",
    ),
    "kernel_builds_amd_epyc_2_cores": (
        "FlashInfer's kernels compiled for GPUs",
        "53 s of processor time for latents for sm_80, 931 s for FlashAttention-3's prefill for Hopper; nothing of it "
        "was run.",
    ),
}


@dataclass(frozen=True)
class Card:
    """One card: its file, what it measures, what it says, and the machine that it was measured on."""

    path: Path
    theme: str
    says: str
    machine: str

    @property
    def row(self) -> str:
        """Its line of the table."""
        return f"| [{self.theme}]({PLACE}/{self.path.name}) | {self.machine} | {self.says} |"


def cards() -> list[Card]:
    """All cards, in the order of `SAYS`. ValueError for a card without a sentence, or a sentence without a card."""
    there = {path.stem for path in RESULTS.glob("*.md")}
    if there != SAYS.keys():
        raise ValueError(f"of cards in {RESULTS} and sentences in SAYS one lacks {sorted(there ^ SAYS.keys())}")
    return [card(RESULTS / f"{name}.md", *said) for name, said in SAYS.items()]


def card(path: Path, theme: str, says: str) -> Card:
    """A card of a file. ValueError without a line that names the machine."""
    found = re.search(r"^Machine: ([^,]+, [^,\n]+?)(?:,.*)?\s*$", path.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ValueError(f"{path} does not say its machine")
    return Card(path, theme, says, found[1].replace("(R)", ""))


def cards_table() -> str:
    """The table of all cards, in Markdown."""
    return "\n".join(["| card | measured on | it says |", "|---|---|---|", *(card.row for card in cards())])
