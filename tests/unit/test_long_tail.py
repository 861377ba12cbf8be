"""The benchmark of the long tail: its batches, its bounds, and that nothing wrong is timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cpinfer
import long_tail
from cpinfer_tools.measuring.harness import Timing
from cpinfer_tools.measuring.workloads import ModelShape, Speed, Workload, make_model
from long_tail import FULL, NUM_SAMPLES, OPEN, OURS, PLAIN, QUICK, Way, floor_s, floors_s, long_tail_workloads, unlikely
from talk import Talk

SHAPE = ModelShape()
SPEED = Speed(gflop_per_s=50.0, gbyte_per_s=8.0)


@pytest.mark.parametrize("size", [FULL, QUICK], ids=["full", "quick"])
def test_one_sample_of_eight_is_sixteen_times_longer(size):
    answer, prompt, both = long_tail_workloads(size)
    for workload, prompt_times, new_times in ((answer, 1, 16), (prompt, 16, 1), (both, 16, 16)):
        (first, *rest), (first_new, *rest_new) = workload.prompts, workload.max_new_tokens
        assert (len(first), first_new) == (prompt_times * size.prompt_tokens, new_times * size.new_tokens)
        assert set(map(len, rest)) == {size.prompt_tokens} and set(rest_new) == {size.new_tokens}
        assert len(rest) == len(rest_new) == NUM_SAMPLES - 1


def test_two_ranks_halve_arithmetic_and_kv_and_read_all_weights_each():
    arithmetic, reading = Speed(1.0, 1e12), Speed(1e12, 1.0)
    samples = [(100, 2), (50, 2)]
    one, two = (floor_s(samples, SHAPE, arithmetic, n) for n in (1, 2))
    assert two == pytest.approx(one / 2)
    weights = 4 * (SHAPE.params_per_token + SHAPE.vocab_params) / 1e9
    one, two = (floor_s(samples, SHAPE, reading, n) for n in (1, 2))
    kv = SHAPE.kv_bytes_per_token * (101 + 51) / 1e9
    assert one == pytest.approx(weights + kv, rel=1e-6)
    assert two == pytest.approx(weights + kv / 2, rel=1e-6)


def test_the_bound_of_data_parallelism_is_the_replica_with_the_long_sample():
    workload = long_tail_workloads(FULL)[0]
    found = floors_s(workload, SHAPE, SPEED)
    samples = [(len(p), n) for p, n in workload.samples()]
    assert found[PLAIN] == floor_s(samples[0::2], SHAPE, SPEED, 1) > floor_s(samples[1::2], SHAPE, SPEED, 1)
    assert found[OURS] < found[PLAIN]


class Whole:
    """A model that finds token 1 the likeliest everywhere, token 2 behind it by `margin`, all others by 1."""

    def __init__(self, margin):
        self.margin = margin

    def __call__(self, ids, *, logits_to_keep, **_):
        logits = torch.full((1, logits_to_keep, 8), -1.0)
        logits[..., 1], logits[..., 2] = 0.0, -self.margin
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize(
    "answer, margin, told",
    [
        ([1, 1, 1], 0.5, None),
        ([1, 2, 1], 1e-4, None),
        ([1, 2, 1], 0.5, "0.5 behind"),
        ([1, 1, 3], 0.5, "1 behind"),
        ([1, 1], 0.5, "2 tokens, 3 were wanted"),
        ([1, 2, 1], float("nan"), "nan behind"),
    ],
)
def test_an_answer_that_the_whole_model_finds_unlikely_is_told(answer, margin, told):
    found = unlikely(Whole(margin), Workload("w", ((5, 6),), (3,)), OURS, [answer])
    assert len(found) == (told is not None)
    assert told is None or told in found[0]


def test_a_way_counts_its_tokens_and_the_time_inside_steps():
    size = QUICK
    model, workload = make_model(size.shape), long_tail_workloads(size)[0]
    way = Way(PLAIN, cpinfer.Topology.single(), model, size.shape)
    tokens, taken_s, watch = way.run(workload, Talk(0, 1))
    assert not unlikely(model, workload, PLAIN, tokens)
    # The last token of an answer is never computed.
    assert watch.num_tokens == workload.num_prompt_tokens + workload.num_generated_tokens - NUM_SAMPLES
    assert 0 < watch.busy_s <= taken_s and watch.collective_s < watch.busy_s
    assert way.run(workload, Talk(0, 1))[2].num_tokens == watch.num_tokens, "each run is counted by itself"


def outcome(ours, plain, complaints=()):
    watches = [
        {"num_shards": 1, "num_tokens": 10, "busy_s": 0.9, "collective_s": 0.3},
        {"num_shards": 1, "num_tokens": 6, "busy_s": 0.25, "collective_s": 0},
    ]
    taken_s = {OURS: ours, OPEN: 2 * ours, PLAIN: plain}
    runs = {name: [{"taken_s": seconds, "watches": watches}] for name, seconds in taken_s.items()}
    steps = [{"rows": 1, "context": 64, "seconds": {1: 4e-3, 2: 2e-3}, "chosen": 2}]
    return {
        "complaints": list(complaints),
        "runs": {"w": runs},
        "rounds": 1,
        "num_same_answers": {"w": 8},
        "load": [2.0, 6.5],
        "speed": {"gflop_per_s": 50.0, "gbyte_per_s": 8.0},
        "floors_s": {"w": {OURS: 0.4, OPEN: 0.4, PLAIN: 0.8}},
        "steps": steps,
    }


WORKLOAD = Workload("w", ((1,) * 4,), (8,))


@pytest.mark.parametrize("plain, told", [(2.0, "**2.00** times as fast"), (0.5, "**behind**, 0.50 times as fast")])
def test_the_card_says_plainly_who_is_ahead_and_who_idles(plain, told):
    [(_, body), (_, steps), _] = long_tail.describe(outcome(1.0, plain), [WORKLOAD])
    assert "pcp=2 dcp=auto (1)" in body and "**2.00** (4.0 / 2.0 ms)" in steps
    assert told in body and "the bounds allow 2.00" in body
    assert "| 10 / 6 | 10% / 75% | 30% / 0% |" in body


def test_no_time_is_told_of_wrong_answers():
    good = long_tail.summarize(outcome(1.0, 2.0), [WORKLOAD], None)
    assert good["ok"] and good["w"]["speedup"] == {OURS: 2.0, OPEN: 1.0}
    assert good["w"][PLAIN]["wall_s"] == Timing((2.0,)).as_json()
    assert good["w"][PLAIN]["num_tokens_per_rank"] == [10, 6]
    bad = long_tail.summarize(outcome(1.0, 2.0, ["w: wrong"]), [WORKLOAD], None)
    assert not bad["ok"] and "w" not in bad


def test_launchers_local_rank_is_accepted():
    assert long_tail.parse_args(["--quick", "--local_rank=1"]).quick


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_quick_runs_and_ends_with_one_json_object(tmp_path):
    script = Path(__file__).parents[2] / "tools" / "bench" / "long_tail.py"
    command = [sys.executable, str(script), "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["ok"] and summary["rounds"] == 2
    assert summary["long answer"][OURS]["num_tokens_per_rank"] != summary["long answer"][PLAIN]["num_tokens_per_rank"]
    assert Path(summary["card"]).read_text(encoding="utf-8").startswith("# ")
