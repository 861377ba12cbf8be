"""tools/rollout.py under the launchers people use: right answers, one voice for bad input, and no rank left hanging."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from broken_checkpoints import change_tensors, without
from cpinfer_tools.verify import check_rollout
from launching import Finished, accelerate, deepspeed, forked, launch, torchrun

ROLLOUT = "tools/rollout.py"
# Past this a failure counts as a hang.
ALL_END_WITHIN_S = 60


def assert_answers_are_right(finished: Finished, output: Path, num_prompts: int) -> None:
    assert finished.returncode == 0, finished
    assert finished.summary["num_samples"] == num_prompts, finished
    assert finished.summary["num_answers_retrieved"] >= 0.9 * num_prompts
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert sorted(line["prompt_index"] for line in lines) == list(range(num_prompts))
    assert check_rollout.main(["--output", str(output)]) == 0


def few_prompts(path: Path, n: int = 8) -> str:
    """The first `n` shipped prompts, as an input file of their own."""
    lines = Path("configs/recall-tiny-prompts.jsonl").read_text(encoding="utf-8").splitlines()[:n]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.timeout(200)  # eight processes on two cores: the launch has a bound of its own, below this one
def test_deepspeed_on_8_processes_gives_the_answers_of_the_unsharded_model(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    arguments = ["--config", "configs/pcp2_dcp2.json", "--input", few_prompts(tmp_path / "in.jsonl", 12)]
    finished = launch(deepspeed(8, ROLLOUT, *arguments, "--output", str(output)), timeout_s=180)
    assert_answers_are_right(finished, output, num_prompts=12)
    assert finished.summary["layout"] == {"tp": 4, "pcp": 2, "dcp": 2, "dp": 1, "world_size": 8}


@pytest.mark.slow
def test_accelerate_launch_on_2_processes(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    arguments = ["--config", "configs/pcp2.json", "--input", few_prompts(tmp_path / "in.jsonl")]
    command = accelerate(2, ROLLOUT, *arguments, "--output", str(output))
    finished = launch(command, timeout_s=90, env={"ACCELERATE_USE_CPU": "true"})
    assert_answers_are_right(finished, output, num_prompts=8)


def test_torchrun_with_two_dp_replicas_joins_their_results(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    arguments = ["--config", "configs/single.json", "--input", few_prompts(tmp_path / "in.jsonl", 7)]
    finished = launch(torchrun(2, ROLLOUT, *arguments, "--output", str(output)), timeout_s=90)
    assert_answers_are_right(finished, output, num_prompts=7)
    assert finished.summary["layout"]["dp"] == 2
    assert [p.name for p in tmp_path.glob("results.jsonl*")] and not list(tmp_path.glob("*.dp1"))


def test_bad_input_on_many_ranks_is_said_once_and_all_exit_2(tmp_path: Path) -> None:
    bad = tmp_path / "in.jsonl"
    bad.write_text('{"prompt": "fine"}\n{"prompt": \n')
    finished = launch(deepspeed(2, ROLLOUT, "--config", "configs/pcp2.json", "--input", str(bad)), timeout_s=90)
    assert finished.returncode == 2, finished
    assert finished.stderr.count("line 2: not valid JSON") == 1, finished
    assert "Traceback" not in finished.stderr.split("rollout:")[0], finished


def test_broken_weights_on_many_ranks_are_said_once_and_all_exit_2(tmp_path: Path) -> None:
    shutil.copytree("configs/recall-tiny", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x13" * 4096)
    arguments = ["--config", "configs/pcp2.json", "--set", f"model={tmp_path / 'model'}"]
    finished = forked(2, ROLLOUT, *arguments, "--output", str(tmp_path / "results.jsonl"), timeout_s=90)
    assert "rollout: " in finished.stderr and finished.stderr.count("is no whole safetensors file") == 1, finished
    assert finished.returncodes == (2, 2), finished
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["transformers", "autotp"])
def test_weights_that_are_found_broken_when_loaded_end_all_ranks_with_2(provider: str, tmp_path: Path) -> None:
    """As of a model that is fetched from the hub: nobody could look at its files before."""
    shutil.copytree("configs/recall-tiny", tmp_path / "model")
    without(tmp_path / "model", "model.layers.1.mlp.up_proj.weight")
    arguments = ["--config", "configs/tp2_pcp2_dcp2.json", "--set", "prefill_context_parallel_size=1"]
    arguments += ["--set", "decode_context_parallel_size=1", "--set", f"tensor_parallel.provider={provider}"]
    arguments += ["--set", f"model={tmp_path / 'model'}", "--output", str(tmp_path / "results.jsonl")]
    finished = launch(torchrun(2, "tests/distributed/unseen_rollout.py", *arguments), timeout_s=ALL_END_WITHIN_S + 30)
    assert finished.stderr.count("rollout: model ") == 1 and "Traceback" not in finished.stderr.split("rollout:")[0]
    assert "model.layers.1.mlp.up_proj.weight" in finished.stderr and "exitcode  : 2" in finished.stderr, finished


@pytest.mark.slow
def test_weights_that_are_no_numbers_are_said_once_and_end_all_ranks_with_1(tmp_path: Path) -> None:
    shutil.copytree("configs/recall-tiny", tmp_path / "model")
    change_tensors(tmp_path / "model", lambda tensors: {k: v * float("nan") for k, v in tensors.items()})
    arguments = ["--config", "configs/pcp2.json", "--set", f"model={tmp_path / 'model'}"]
    finished = launch(torchrun(2, ROLLOUT, *arguments, "--output", str(tmp_path / "results.jsonl")), timeout_s=90)
    assert "logits are not finite" in finished.stderr and "exitcode  : 1" in finished.stderr, finished
    said = [line for line in finished.stderr.splitlines() if line.startswith("rollout: ")]
    assert [line for line in said if "load" not in line] == said[-1:], finished


@pytest.mark.parametrize("fault", [pytest.param("raise", marks=pytest.mark.slow), "kill"])
def test_one_failing_rank_ends_all_and_is_the_one_that_is_heard(fault: str, tmp_path: Path) -> None:
    arguments = ["--config", "configs/tp2_pcp2_dcp2.json", "--set", "prefill_context_parallel_size=1"]
    arguments += ["--set", "decode_context_parallel_size=1", "--output", str(tmp_path / "results.jsonl")]
    arguments += ["--set", "max_num_seqs=8"]  # so that some samples are done before others begin
    command = torchrun(2, "tests/distributed/failing_rollout.py", fault, *arguments)
    finished = launch(command, timeout_s=ALL_END_WITHIN_S + 30)
    assert finished.returncode != 0, finished
    if fault == "raise":
        assert finished.stderr.count("RuntimeError: the fault that was put in") == 1, finished
        assert "rank 1 failed" in finished.stderr and "rank 0 failed" not in finished.stderr, finished
    # What was finished before the fault is on disk, every line whole.
    lines = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert 0 < len(lines) < 64
    assert all(json.loads(line)["finish_reason"] in ("stop", "length") for line in lines)


FAULTY = "tests/distributed/failing_rollout.py"


def faulty_rollout(fault: str, tmp_path: Path, *more: str) -> list[str]:
    """A rollout of two ranks in which one has a fault, without its launcher."""
    arguments = ["--config", "configs/pcp2.json", "--input", few_prompts(tmp_path / "in.jsonl")]
    arguments += ["--set", "max_num_seqs=2"]  # so that it has not ended before the fault comes
    return [FAULTY, fault, *arguments, "--output", str(tmp_path / "results.jsonl"), *more]


def test_ranks_whose_launcher_was_killed_end_by_themselves(tmp_path: Path) -> None:
    """What they print ends with them, so `launch` waits for both."""
    finished = launch(torchrun(2, *faulty_rollout("orphan", tmp_path)), timeout_s=90)
    assert finished.returncode == -signal.SIGKILL, finished
    for rank in range(2):
        assert f"rollout: rank {rank} ends because its launcher ended" in finished.stderr, finished


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["orphan", "orphan_in_load"])
@pytest.mark.parametrize("launcher", [torchrun, deepspeed, accelerate], ids=lambda launcher: launcher.__name__)
def test_ranks_end_with_every_launcher_whenever_it_is_killed(
    launcher: Callable[..., list[str]], fault: str, tmp_path: Path
) -> None:
    command = launcher(2, *faulty_rollout(fault, tmp_path))
    finished = launch(command, timeout_s=ALL_END_WITHIN_S + 30, env={"ACCELERATE_USE_CPU": "true"})
    # What `deepspeed` itself returns is 0: it takes no note of a launcher that was killed.
    assert finished.stderr.count("ends because its launcher ended") == 2, finished


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stop:1", "stop:0", "sleep:1", "stop:1+forever"])
@pytest.mark.parametrize("launcher", [torchrun, deepspeed, accelerate], ids=lambda launcher: launcher.__name__)
def test_a_rank_that_does_not_come_is_named_by_the_others_which_end(
    launcher: Callable[..., list[str]], fault: str, tmp_path: Path
) -> None:
    """The launcher kills the stopped one, which does not hear it, half a minute after the others have ended.

    The first rank holds the store by which ranks know of each other, but under torchrun. Without gloo's timeout, as
    with NCCL, the watch ends the process.
    """
    command = launcher(2, *faulty_rollout(fault, tmp_path, "--set", "collective_timeout_s=5"))
    finished = launch(command, timeout_s=ALL_END_WITHIN_S + 50, env={"ACCELERATE_USE_CPU": "true"})
    assert finished.returncode != 0, finished
    faulty = int(fault[fault.index(":") + 1])
    ends = [line for line in finished.stderr.splitlines() if f"rank {1 - faulty} ends: step " in line]
    assert len(ends) == 1 and f"rank {faulty} (pid" in ends[0], finished


def test_a_run_killed_midway_resumes_with_exactly_what_is_missing(tmp_path: Path) -> None:
    """Sampled text after `kill -9` and `--resume` is that of an undisturbed run, every sample once."""
    sampled = ["--set", "sampling.temperature=1", "--set", "sampling.n=2", "--set", "max_num_seqs=8"]
    arguments = ["--config", "configs/pcp2.json", *sampled, "--input", few_prompts(tmp_path / "in.jsonl", 24)]
    output = ["--output", str(tmp_path / "results.jsonl")]
    killed = forked(2, FAULTY, "kill", *arguments, *output, timeout_s=90)
    assert killed.returncodes[1] == -signal.SIGKILL, killed
    results = tmp_path / "results.jsonl"
    before = results.read_bytes()
    assert 0 < before.count(b"\n") < 48
    results.write_bytes(before + b'{"id": "a line that the kill tore')
    resumed = forked(2, ROLLOUT, *arguments, *output, "--resume", timeout_s=90)
    assert resumed.returncode == 0, resumed
    assert resumed.summary["num_samples_resumed"] == before.count(b"\n")
    whole = ["--output", str(tmp_path / "whole.jsonl")]
    undisturbed = forked(1, ROLLOUT, *single_process(arguments), *whole, timeout_s=90)
    assert undisturbed.returncode == 0, undisturbed
    assert texts(results) == texts(tmp_path / "whole.jsonl")


def single_process(arguments: list[str]) -> list[str]:
    """The same run on one process."""
    one = ["--set", "prefill_context_parallel_size=1", "--set", "decode_context_parallel_size=1"]
    return [*arguments, *one]


def texts(results: Path) -> list[tuple[int, int, list[int]]]:
    """(prompt, sample, tokens) of a results file, sorted: a repeated sample would show."""
    lines = [json.loads(line) for line in results.read_bytes().splitlines()]
    return sorted((line["prompt_index"], line["sample_index"], line["token_ids"]) for line in lines)
