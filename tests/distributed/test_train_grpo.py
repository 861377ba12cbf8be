"""tools/train_grpo.py on two real processes: it learns, in every ZeRO stage, and nobody hangs when one rank fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launching import Finished, deepspeed, forked, launch, torchrun

TRAIN = "tools/train_grpo.py"
CONFIG = ["--config", "configs/grpo_sentence.json"]
# Past this a failure counts as a hang.
ALL_END_WITHIN_S = 60
FAULTY_REWARD = """
import os

calls = []

def reward(completions, **_):
    calls.append(1)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        raise ValueError("the reward that was made to fail")
    return [0.0] * len(completions)
"""


def run(tmp_path: Path, *arguments: str, timeout_s: float = 170, by_a_launcher: bool = False) -> dict[str, Any]:
    """The summary of two ranks that DeepSpeed's launcher starts, or that are forked."""
    output = ["--output", str(tmp_path / "output.jsonl"), "--overwrite"]
    if by_a_launcher:
        finished = launch(deepspeed(2, TRAIN, *CONFIG, *arguments, *output), timeout_s=timeout_s)
    else:
        finished = forked(2, TRAIN, *CONFIG, *arguments, *output, timeout_s=timeout_s)
    assert finished.returncode == 0, finished
    return finished.summary


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "output.jsonl").read_text(encoding="utf-8").splitlines()]


def test_deepspeed_trains_on_rollouts_that_its_own_forward_agrees_with(tmp_path: Path) -> None:
    summary = run(tmp_path, "--set", "training.num_steps=3", by_a_launcher=True)
    assert summary["layout"] == {"tp": 1, "pcp": 2, "dcp": 2, "dp": 1, "world_size": 2}
    assert summary["mismatch_num_tokens"] > 0 and summary["mismatch_max_abs"] <= 1e-4
    assert [line["weights_version"] for line in lines(tmp_path)] == [0, 1, 2]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("stage", "dtype", "lora_rank"),
    [
        (2, "float32", 0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(2, "bfloat16", 0), (0, "bfloat16", 8), (3, "float32", 0)]
        ),
    ],
)
def test_deterministic_rollouts_are_trained_by_a_forward_of_the_same_bits(
    stage: int, dtype: str, lora_rank: int, tmp_path: Path
) -> None:
    """On two processes, each prompt prefilled by both: pcp=2, dcp=2."""
    settings = ["training.num_steps=3", "deterministic=true", f"training.zero_stage={stage}", f"dtype={dtype}"]
    settings += [f"training.lora_rank={lora_rank}"] if lora_rank else []
    summary = run(tmp_path, *(word for setting in settings for word in ("--set", setting)), timeout_s=300)
    assert summary["layout"]["pcp"] == 2 and summary["mismatch_num_tokens"] > 0
    assert summary["mismatch_max_abs"] == 0.0
    assert all(line["mismatch_max_abs"] == 0.0 for line in lines(tmp_path))


def assert_all_ended(finished: Finished, tmp_path: Path) -> None:
    assert finished.returncode != 0, finished
    assert lines(tmp_path), "the steps before the fault are on disk"


@pytest.mark.slow
def test_a_reward_that_raises_on_one_rank_ends_all_and_is_heard(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY_REWARD)
    arguments = ["--set", f"training.reward={tmp_path}/faulty.py:reward", "--output", str(tmp_path / "output.jsonl")]
    finished = launch(torchrun(2, TRAIN, *CONFIG, *arguments), timeout_s=ALL_END_WITHIN_S + 60)
    assert_all_ended(finished, tmp_path)
    assert finished.stderr.count("ValueError: the reward that was made to fail") == 1, finished
    assert "rank 1 failed" in finished.stderr and "rank 0 failed" not in finished.stderr, finished


def test_a_rank_killed_in_a_phase_ends_all(tmp_path: Path) -> None:
    """Forked ranks: that a launcher ends the others is seen of rollouts."""
    arguments = ["kill", *CONFIG, "--output", str(tmp_path / "output.jsonl")]
    finished = forked(2, "tests/distributed/failing_training.py", *arguments, timeout_s=ALL_END_WITHIN_S + 60)
    assert_all_ended(finished, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "arguments",
    [
        ["training.zero_stage=null"],
        ["training.zero_stage=0"],
        ["training.zero_stage=1"],
        ["training.zero_stage=3"],
        ["training.zero_stage=3", "rollout.gather=layerwise"],
        [
            "training.zero_stage=3",
            "rollout.gather=tp_shards",
            "tensor_parallel.tp_size=2",
            "prefill_context_parallel_size=1",
            "decode_context_parallel_size=1",
        ],
        ["training.lora_rank=4"],
        ["prefill_context_parallel_size=1", "decode_context_parallel_size=1"],
    ],
    ids=" ".join,
)
def test_rollouts_agree_with_the_training_forward_however_the_weights_are_held(
    tmp_path: Path, arguments: list[str]
) -> None:
    options = [word for argument in arguments for word in ("--set", argument)]
    summary = run(tmp_path, "--set", "training.num_steps=3", *options, timeout_s=380)
    assert summary["mismatch_num_tokens"] > 0 and summary["mismatch_max_abs"] <= 1e-4


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("zero_stage", ["null", "0", "1", "2", "3"])
def test_the_kl_is_to_the_model_before_training_however_its_weights_are_held(tmp_path: Path, zero_stage: str) -> None:
    options = [f"training.zero_stage={zero_stage}", "training.kl_coef=0.1", "training.num_steps=2"]
    run(tmp_path, *[word for option in options for word in ("--set", option)])
    first, second = (line["kl"] for line in lines(tmp_path))
    assert abs(first) <= 1e-6 < 1e-4 < second


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("zero_stage", ["null", "3"])
def test_training_is_the_same_whether_it_is_measured_or_not(tmp_path: Path, zero_stage: str) -> None:
    losses = []
    for every in (0, 1):
        options = [f"training.zero_stage={zero_stage}", f"rollout.mismatch_every={every}", "training.num_steps=3"]
        run(tmp_path, *[word for option in options for word in ("--set", option)])
        losses.append([(line["loss"], line["reward"], line["entropy"]) for line in lines(tmp_path)])
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_reward_rises_over_three_seeds_as_it_does_with_transformers_generation(tmp_path: Path) -> None:
    gains: dict[str, list[float]] = {"cpinfer": [], "transformers": []}
    for generator, gained in gains.items():
        for seed in range(3):
            options = ["--set", f"training.generator={generator}", "--set", f"training.seed={seed}"]
            summary = run(tmp_path, *options, timeout_s=240)
            gained.append(summary["reward_last"] - summary["reward_first"])
    assert min(min(gained) for gained in gains.values()) > 0.1, gains
    # Within noise: as far apart as seeds of one generator are.
    means = {generator: sum(gained) / 3 for generator, gained in gains.items()}
    spread = max(max(gained) - min(gained) for gained in gains.values())
    assert abs(means["cpinfer"] - means["transformers"]) <= spread, gains
