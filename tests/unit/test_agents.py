"""The benchmark of agents: its jobs and bounds, that both ways run them alike, and that nothing wrong is timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import agents
from agent_jobs import FULL, LOCK_STEP, OURS, QUICK, LockStep, Sessions, floor_s, jobs_of, unlikely
from cpinfer_tools.measuring.contestants import Generate
from cpinfer_tools.measuring.workloads import QUICK_SHAPE, Speed, engine_workloads, make_model
from open_steps import Loops, waiting_step_us


@pytest.mark.parametrize("size", [FULL, QUICK], ids=["full", "quick"])
def test_slow_and_instant_tools_say_the_same(size):
    slow, instant = jobs_of(size)
    assert (slow.num_samples, slow.num_turns) == (size.num_samples, size.num_turns)
    assert slow.given == instant.given and slow.opening == instant.opening and jobs_of(size) == [slow, instant]
    calls = [seconds for turns in slow.tools_s for seconds in turns]
    assert 0 <= min(calls) < size.longest_tool_s / 4 and max(calls) > size.longest_tool_s / 2
    assert max(calls) <= size.longest_tool_s and not any(map(sum, instant.tools_s))


def test_distinct_tokens_are_the_opening_once_and_what_tools_say():
    job = jobs_of(FULL)[0]
    assert job.num_distinct_tokens == 256 + 16 * 7 * 256
    assert job.num_lock_step_tokens == 16 * sum(256 + turn * (256 + 32) for turn in range(8))


def test_answers_stand_behind_their_prompts():
    job = jobs_of(QUICK)[0]
    answers = [[100 + turn] * job.new_tokens for turn in range(job.num_turns)]
    sequence = job.sequence(1, answers)
    for turn, length in enumerate(job.prompt_lens(1)):
        assert sequence[length : length + job.new_tokens] == answers[turn]
    assert len(sequence) == length + job.new_tokens


def test_the_bound_is_the_slowest_samples_tools_where_computing_is_free_and_else_computing():
    slow, instant = jobs_of(FULL)
    free, hard = Speed(1e12, 1e12), Speed(1e-3, 1e12)
    assert floor_s(slow, FULL.shape, free) == pytest.approx(max(map(sum, slow.tools_s)))
    assert floor_s(instant, FULL.shape, free) < 1e-3
    params = FULL.shape.params_per_token * (slow.num_distinct_tokens + 16 * 8 * 31)
    assert floor_s(slow, FULL.shape, hard) == floor_s(instant, FULL.shape, hard) > 2 * params / 1e6


def test_sessions_and_lock_step_give_the_same_answers_and_sessions_compute_each_token_once():
    model, job = make_model(QUICK_SHAPE), jobs_of(QUICK)[0]
    sessions, peer = Sessions(model, QUICK_SHAPE), Generate(model)
    answers = sessions.run(job)
    assert unlikely(model, job, OURS, answers) == []
    for loop in (LockStep(model, peer), LockStep(model, peer, at_once=True)):
        assert loop.run(job) == answers
    # Beside the given tokens: the last of each answer but the newest, and of the opening what is less than a block.
    shared = (job.num_samples - 1) * 16
    extra = sessions.num_prefilled_tokens - job.num_distinct_tokens
    assert 0 <= extra <= job.num_samples * (job.num_turns - 1) + shared


def test_a_token_that_is_not_the_likeliest_is_told():
    model, job = make_model(QUICK_SHAPE), jobs_of(QUICK)[1]
    answers = LockStep(model, Generate(model)).run(job)
    answers[2][1][-1] = (answers[2][1][-1] + 1) % QUICK_SHAPE.vocab_size
    (told,) = unlikely(model, job, "x", answers)
    assert "sample 2 of x" in told
    answers[3][0].pop()
    assert len(unlikely(model, job, "x", answers)) == 2


@pytest.mark.parametrize("workload", engine_workloads(QUICK_SHAPE, quick=True)[:2], ids=["group", "ragged"])
def test_the_open_loop_gives_the_tokens_of_the_closed_one(workload):
    loops = Loops(make_model(QUICK_SHAPE), QUICK_SHAPE, workload)
    opened, closed = loops.opened(), loops.closed()
    assert opened.tokens == closed.tokens
    assert all(0 < loop.outside_s < loop.taken_s for loop in (opened, closed))


def test_steps_are_timed_while_the_same_requests_run():
    assert len(waiting_step_us(QUICK_SHAPE, num_waiting=20, num_running=4, num_steps=3)) == 3


def outcome(ours, peer, complaints=()):
    seconds = {OURS: [ours], f"generate, {LOCK_STEP}": [peer], f"generate_batch, {LOCK_STEP}": [peer + 1]}
    return {
        "seconds": {"slow": seconds, "instant": seconds},
        "prefilled": {"slow": 290, "instant": 300},
        "floor_s": {"slow": 0.5, "instant": 0.1},
        "speed": {"gflop_per_s": 90.0, "gbyte_per_s": 10.0},
        "spent": {"group": {"generate": [(1.0, 0.001)], "add and step": [(1.01, 0.011)]}},
        "waiting_us": {"100": [5.0, 6.0, 7.0]},
        "complaints": list(complaints),
    }


def test_the_card_says_how_far_ahead_sessions_are_and_what_was_wanted():
    told = "\n".join(body for _, body in agents.describe(outcome(1.0, 3.0), QUICK))
    assert "slow tools: 3.00 times as fast as the faster lock-step loop; above 2 was wanted" in told
    assert f"{300 / jobs_of(QUICK)[0].num_distinct_tokens:.3f} of the distinct ones" in told
    assert "+1.00% | 0.10% | 1.09% |" in told and "| 100 | 6 |" in told


def test_no_time_is_told_of_wrong_tokens():
    assert agents.summarize(outcome(1.0, 3.0), QUICK, None)["slow_lock_step_over_sessions"] == 3.0
    bad = agents.summarize(outcome(1.0, 3.0, ["wrong"]), QUICK, None)
    assert bad == {"benchmark": "agents", "tokens_agree": False, "card": None}


def test_launchers_local_rank_is_accepted():
    assert agents.parse_args(["--quick", "--local_rank=1"]).quick


@pytest.mark.slow
def test_quick_runs_and_ends_with_one_json_object(tmp_path):
    script = Path(agents.__file__)
    command = [sys.executable, str(script), "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["tokens_agree"] and summary["prefilled_over_distinct"] < 1.3
    assert Path(summary["card"]).read_text(encoding="utf-8").startswith("# ")
