"""The benchmarks' own arithmetic, and (slow) that both tools run from end to end on tiny models."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import cascade
import deterministic
import engine
import hybrids
import same_text
import scaling
from cpinfer.models.spec import ModelSpec
from cpinfer_tools.measuring.harness import Card, Timing, has_time_for_another, machine_name, rotated, slug, table
from cpinfer_tools.measuring.workloads import (
    QUICK_SHAPE,
    ModelShape,
    Speed,
    Workload,
    decode_floor_s,
    engine_workloads,
    floor_s,
    make_model,
    random_prompts,
    spread,
)

BENCH = Path(__file__).parents[2] / "tools" / "bench"
SHAPE = ModelShape()


def test_a_timing_shows_median_and_spread():
    timing = Timing((2.0, 1.0, 4.0))
    assert timing.as_json() == {"median_s": 2.0, "min_s": 1.0, "max_s": 4.0, "n": 3}
    assert str(timing) == "2.00 s (1.00..4.00, n=3)"
    with pytest.raises(ValueError, match="at least one"):
        Timing(())


def test_every_contestant_goes_first_equally_often():
    firsts = [rotated(["a", "b", "c"], i)[0] for i in range(6)]
    assert sorted(firsts) == ["a", "a", "b", "b", "c", "c"]
    assert all(sorted(rotated(["a", "b", "c"], i)) == ["a", "b", "c"] for i in range(6))


def test_rounds_end_before_the_budget_does():
    assert has_time_for_another(0, 0.0, 0.0, 5), "the first round always runs"
    assert has_time_for_another(2, 20.0, 30.0, 5)
    assert not has_time_for_another(2, 20.0, 29.0, 5)
    assert not has_time_for_another(5, 1.0, 100.0, 5)


def test_workloads_are_a_group_a_long_tail_a_long_prompt_short_ones_and_questions_about_one_document():
    group, ragged, long, short, shared = engine_workloads(SHAPE, quick=False)
    assert tuple(w.name for w in engine_workloads(SHAPE, quick=True)) == engine.WORKLOADS
    assert (len(group.prompts), group.num_samples, set(map(len, group.prompts))) == (8, 8, {512})
    assert set(group.max_new_tokens) == {128}
    lens = sorted(map(len, ragged.prompts))
    assert (len(lens), lens[0], lens[-1]) == (32, 64, 1024)
    assert (min(ragged.max_new_tokens), max(ragged.max_new_tokens)) == (32, 512)
    assert ([len(p) for p in long.prompts], long.max_new_tokens) == ([16384], (64,))
    assert ({(len(p), n) for p, n in short.samples()}, len(short.prompts)) == ({(32, 16)}, 256)
    assert len(set(shared.prompts)) == 64 and len({p[: shared.num_shared] for p in shared.prompts}) == 1
    assert shared.num_shared == 8192


def test_what_prompts_share_is_computed_and_read_once_in_bounds():
    shared = Workload("w", ((1,) * 100, (1,) * 100), (2, 2), num_shared=90)
    alone = Workload("w", ((1,) * 100, (1,) * 100), (2, 2))
    saved_flops = 2 * SHAPE.params_per_token * 90 + 90 * 91 // 2 * SHAPE.flops_per_pair
    fast_memory = Speed(1.0, 1e9)
    assert floor_s(alone, SHAPE, fast_memory) - floor_s(shared, SHAPE, fast_memory) == pytest.approx(saved_flops / 1e9)
    fast_products = Speed(1e12, 1.0)
    saved_s = floor_s(alone, SHAPE, fast_products) - floor_s(shared, SHAPE, fast_products)
    assert saved_s == pytest.approx(90 * SHAPE.kv_bytes_per_token / 1e9, rel=1e-6)


@pytest.mark.parametrize("quick", [True, False])
def test_workloads_are_the_same_on_every_call_and_within_the_vocabulary(quick):
    assert engine_workloads(SHAPE, quick=quick) == engine_workloads(SHAPE, quick=quick)
    for workload in engine_workloads(SHAPE, quick=quick):
        assert all(0 <= t < SHAPE.vocab_size for p in workload.prompts for t in p)
        assert workload.num_generated_tokens == sum(n for _, n in workload.samples())


def test_a_workload_needs_an_answer_length_for_every_prompt():
    with pytest.raises(ValueError, match="2 prompts, 1 lengths"):
        Workload("w", ((1,), (2,)), (3,))


def test_blocks_are_counted_per_sample_and_rounded_up():
    workload = Workload("w", ((1,) * 10, (1,) * 16), (6, 1), num_samples=3)
    assert workload.kv_blocks(16) == 3 * (1 + 2)


def test_spread_includes_both_ends():
    assert sorted(spread(64, 1024, 4, geometric=False, seed=1)) == [64, 384, 704, 1024]
    assert sorted(spread(32, 512, 3, geometric=True, seed=1)) == [32, 128, 512]


def test_shape_counts_the_weights_that_the_model_has():
    shape = ModelShape(2, 32, 48, 4, 2, 8, 64)
    model = make_model(shape)
    weights = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    assert weights == shape.params_per_token
    assert model.lm_head.weight.numel() == shape.vocab_params


@pytest.mark.parametrize("shape, num_distinct", [(engine.SHAPE, 24), (QUICK_SHAPE, 8)], ids=["full", "quick"])
def test_answers_of_the_model_vary_and_change_with_a_single_key(shape, num_distinct):
    import torch

    # Otherwise "the tokens agree" would say nothing about attention.
    model = make_model(shape)
    ids = torch.tensor(random_prompts([48] * 8, shape.vocab_size, 1))
    wrong = ids.clone()
    wrong[:, 7] = (wrong[:, 7] + 1) % shape.vocab_size

    def answers(ids):
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False, pad_token_id=0)[:, 48:]

    right = answers(ids)
    assert all(len(set(row.tolist())) >= num_distinct for row in right)
    assert (right != answers(wrong)).any(dim=1).all()


def test_a_hybrid_shape_counts_the_weights_and_states_that_the_model_has():
    shape = hybrids.QUICK.shape
    model = hybrids.make_model(shape)
    weights = sum(p.numel() for name, p in model.named_parameters() if "proj" in name or "conv1d" in name)
    assert weights == shape.params_per_token
    states = ModelSpec.from_config(model.config.to_dict()).states
    assert shape.state_bytes == states.bytes_per_sequence("float32")


def test_answers_of_the_hybrid_change_with_a_single_token_and_a_split_saves_less_than_half():
    import torch

    shape = hybrids.QUICK.shape
    model = hybrids.make_model(shape)
    ids = torch.tensor(random_prompts([40] * 4, shape.softmax.vocab_size, 1))
    wrong = ids.clone()
    wrong[:, 7] = (wrong[:, 7] + 1) % shape.softmax.vocab_size
    right, other = (
        model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=12, do_sample=False, pad_token_id=0)[:, 40:]
        for x in (ids, wrong)
    )
    assert (right != other).any(dim=1).all() and all(len(set(row.tolist())) >= 6 for row in right)
    alone, *both = hybrids.FULL.shape.prefill_flops(2**14)
    assert 1.5 < alone / max(both) < 2


def test_floor_of_one_token_is_prefill_arithmetic_alone():
    workload = Workload("w", ((1,) * 100,), (1,))
    flops = 2 * SHAPE.params_per_token * 100 + 5050 * SHAPE.flops_per_pair + 2 * SHAPE.vocab_params
    assert floor_s(workload, SHAPE, Speed(1.0, 1e9)) == pytest.approx(flops / 1e9)
    assert floor_s(workload, SHAPE, Speed(1.0, 1e9), tp_size=2) == pytest.approx(flops / 2e9)


def test_floor_of_a_decode_step_is_weights_and_kv_where_arithmetic_is_free():
    one, two = (Workload("w", ((1,) * 100,), (n,)) for n in (1, 2))
    speed = Speed(gflop_per_s=1e12, gbyte_per_s=1.0)
    weights = 4 * (SHAPE.params_per_token + SHAPE.vocab_params)
    step_s = floor_s(two, SHAPE, speed) - floor_s(one, SHAPE, speed)
    assert step_s == pytest.approx((weights + 101 * SHAPE.kv_bytes_per_token) / 1e9)


def test_floor_computes_a_prompt_once_for_all_its_samples():
    prompt = (1,) * 50
    one, many = (Workload("w", (prompt,), (1,), num_samples=n) for n in (1, 8))
    speed = Speed(1.0, 1.0)
    assert floor_s(one, SHAPE, speed) == floor_s(many, SHAPE, speed)


def test_a_decode_step_reads_a_prompt_once_for_all_its_samples_or_as_often_as_it_is_said_to():
    group = Workload("w", ((1,) * 100,), (3,), num_samples=4)
    speed = Speed(gflop_per_s=1e12, gbyte_per_s=1.0)
    weights = 4 * (SHAPE.params_per_token + SHAPE.vocab_params)
    for reads, num_keys in ((None, 100 + 4), (4, 4 * 101)):
        found = decode_floor_s(group, SHAPE, speed, 1, prompt_reads=reads)
        assert found == pytest.approx((weights + num_keys * SHAPE.kv_bytes_per_token) / 1e9)


def test_ways_that_part_other_than_at_a_near_tie_are_told_and_not_timed():
    workload = Workload("w", ((1, 2),), (2,), num_samples=2)
    model = make_model(QUICK_SHAPE)
    same, other = cascade.Run([[5, 6], [7, 8]], 1.0, 1.0), cascade.Run([[5, 6], [7, 9]], 1.0, 1.0)
    assert cascade.disagreements(model, workload, {"on": [same], "off": [same]}) == []
    (told,) = cascade.disagreements(model, workload, {"on": [same], "off": [other]})
    assert "sample 1 parts" in told
    summary = cascade.summarize({"w": {"on": [same], "off": [other]}}, [told], None)
    assert not summary["tokens_agree"] and set(summary["batches"]["w"].values()) == {None}


def scaling_of(alone, copies, split):
    return scaling.Scaling(Timing((alone,)), (Timing((copies[0],)), Timing((copies[1],))), Timing((split,)))


def test_scaling_is_measured_against_what_copies_reach():
    ideal = scaling_of(10.0, (10.0, 10.0), 5.0)
    assert (ideal.speedup, ideal.reachable, ideal.efficiency) == (2, 2, 1)
    shared = scaling_of(10.0, (12.5, 12.5), 7.0)
    assert shared.reachable == pytest.approx(1.6)
    assert shared.efficiency == pytest.approx(10 / 7 / 1.6)


def test_of_a_split_run_the_slowest_rank_counts():
    seconds = {"alone": [[4.0, 0.0]], "copies": [[5.0, 6.0]], "split": [[2.0, 3.0]]}
    found = scaling.scaling_of(seconds)
    assert (found.alone.median_s, found.split.median_s) == (4.0, 3.0)
    assert [c.median_s for c in found.copies] == [5.0, 6.0]


def test_the_longest_sequence_grows_with_dcp():
    capacity = scaling.capacities(scaling.QUICK)
    assert all(tokens >= 0.98 * dcp * capacity[1] for dcp, tokens in capacity.items())
    assert capacity[1] == scaling.QUICK.capacity_bytes // scaling.QUICK.shape.kv_bytes_per_token // 16 * 16


def test_a_card_names_machine_versions_command_and_config():
    card = Card("theme", "Title", "python x.py --quick", (("Part", table(["a"], [["1"]])),), {"rounds": 3})
    text = card.text("a machine", {"torch": "2", "deepspeed": None})
    for told in ("# Title", "a machine", "torch 2", "`python x.py --quick`", "## Part", "| 1 |", '"rounds": 3'):
        assert told in text
    assert "deepspeed" not in text


def test_a_card_is_named_after_theme_and_hardware(tmp_path):
    path = Card("theme", "Title", "command", (), {}).write(tmp_path)
    assert path.name == f"theme_{slug(machine_name())}.md"
    assert path.read_text(encoding="utf-8").startswith("# Title")


def outcome(ours, peer, failures=None):
    values = {"cpinfer": ours, "generate": peer, "generate_batch": []}
    return {
        "seconds": {"w": values},
        "failures": {"w": failures or {}},
        "floor_s": {"w": 0.5},
        "speed": {"gflop_per_s": 90.0, "gbyte_per_s": 10.0},
        "given": {"w": dict.fromkeys(values, "as it is")},
        "profiles": {},
        "has_vllm": False,
        "num_near_ties": 0,
        "disagreements": [],
        "rounds": len(ours),
    }


WORKLOAD = Workload("w", ((1,) * 4,), (8,))


@pytest.mark.parametrize("ours, verdict", [([1.0], "2.00x ahead of generate"), ([4.0], "0.50x BEHIND generate")])
def test_the_card_says_plainly_who_is_ahead(ours, verdict):
    told = "\n".join(body for _, body in engine.describe({1: outcome(ours, [2.0])}, [WORKLOAD]))
    assert verdict in told


def test_a_contestant_that_fails_is_named_with_its_reason():
    run = outcome([1.0], [2.0], {"generate_batch": "RuntimeError: too\nmany | heads"})
    told = engine.describe({1: run}, [WORKLOAD])[0][1]
    assert "failed: RuntimeError: too many / heads" in told


def test_times_are_withheld_when_tokens_disagree():
    run = {1: outcome([1.0], [2.0])}
    assert engine.summarize(run, [WORKLOAD], agreed=True, card=None)["tp1_w"]["best_peer_over_cpinfer"] == 2.0
    withheld = engine.summarize(run, [WORKLOAD], agreed=False, card=None)["tp1_w"]
    assert (withheld["cpinfer_s"], withheld["best_peer_over_cpinfer"]) == (None, None)


class Whole:
    """A model that finds token 1 `margin` likelier than any other."""

    def __init__(self, margin):
        self.margin = margin

    def __call__(self, ids, **_):
        import torch

        logits = torch.zeros(1, 1, 8)
        logits[..., 1] = self.margin
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("margin, complaints, near_ties", [(1e-4, 0, 1), (1.0, 1, 0)])
def test_tokens_may_part_from_the_oracle_only_at_a_near_tie(margin, complaints, near_ties):
    tokens = {"w": {"generate": [[[1, 2]]], "cpinfer": [[[3, 2]]], "generate_batch": [[[1, 2]]]}}
    found, num_near_ties = engine.compare(tokens, [Workload("w", ((5,),), (2,))], Whole(margin))
    assert (len(found), num_near_ties) == (complaints, near_ties)


def test_without_the_oracle_nothing_agrees():
    tokens = {"w": {"generate": [], "cpinfer": [[[1]]], "generate_batch": []}}
    assert engine.compare(tokens, [Workload("w", ((5,),), (1,))], Whole(0))[0]


def test_an_answer_that_is_too_short_is_no_near_tie():
    tokens = {"w": {"generate": [[[1, 2]]], "cpinfer": [[[1]]]}}
    assert engine.compare(tokens, [Workload("w", ((5,),), (2,))], Whole(0))[0]


def test_launchers_local_rank_is_accepted():
    for tool in (engine, scaling):
        assert tool.parse_args(["--quick", "--local_rank=1"]).quick


def test_answers_are_compared_up_to_the_token_that_differs():
    one = SimpleNamespace(token_ids=(5, 6, 7), logprobs=(-1.0, -2.0, -3.0))
    near = SimpleNamespace(token_ids=(5, 6, 7), logprobs=(-1.0, -2.0, -3.25))
    other = SimpleNamespace(token_ids=(5, 9, 7), logprobs=(-1.5, -9.0, -3.0))
    found = same_text.Compared().and_also(one, near)
    assert found == same_text.Compared(1, 0, 3, 0.25)
    assert found.and_also(one, other) == same_text.Compared(2, 1, 5, 0.5)


def a_run(logprob):
    return deterministic.Run(1.0, 0.0, ((5,),), ((logprob,),))


def test_a_round_of_the_deterministic_mode_that_differs_in_one_bit_is_told():
    same, other = a_run(-1.0), a_run(math.nextafter(-1.0, 0))
    assert deterministic.unequal_rounds("w", [same, same]) == []
    (told,) = deterministic.unequal_rounds("w", [same, same, other])
    assert told.startswith("w: round 3 ")


def test_costs_of_the_deterministic_mode_are_withheld_when_answers_disagree():
    runs = {"w": {"default": [a_run(-1.0)], "deterministic": [replace(a_run(-1.0), seconds=2.0)]}}
    told = deterministic.describe(runs, 0)
    assert "| 2.00 | 1.35: **over** |" in told
    assert deterministic.summarize({"float32": runs}, [], None)["float32"]["w"]["ratio"] == 2.0
    withheld = deterministic.summarize({"float32": runs}, ["something"], None)
    assert (withheld["answers_agree"], withheld["float32"]["w"]["ratio"]) == (False, None)


@pytest.fixture(scope="module")
def bench_of_deterministic():
    return deterministic.Bench(QUICK_SHAPE, "float32", deterministic.QUICK_LENGTHS)


def test_logits_of_a_batch_are_those_of_its_sequences_only_with_the_training_forward(bench_of_deterministic):
    assert bench_of_deterministic.logits_are_those_of_sequences_alone()
    assert not bench_of_deterministic.logits_are_those_of_sequences_alone("default")


def test_shares_of_time_are_of_all_of_it_and_only_the_mode_cuts_rows(bench_of_deterministic):
    group = engine_workloads(QUICK_SHAPE, quick=True)[0]
    for shares in (bench_of_deterministic.shares(group), bench_of_deterministic.shares_of_training()):
        for mode, seconds in shares.items():
            assert min(seconds.values()) >= 0
            assert (seconds[deterministic.CUTTING] > 0) == (mode == "deterministic")
            assert seconds["attention"] > 0 and seconds[deterministic.PRODUCTS] > 0


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["cascade", "deterministic", "engine", "hybrids", "scaling"])
def test_quick_runs_and_ends_with_one_json_object(tool, tmp_path):
    command = [sys.executable, str(BENCH / f"{tool}.py"), "--quick", "--results", str(tmp_path)]
    if tool == "engine":
        command += ["--only", "group", "ragged", "shared"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary.get("tokens_agree", summary.get("answers_agree")) is True
    assert Path(summary["card"]).read_text(encoding="utf-8").startswith("# ")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.timeout(120)
def test_the_bench_of_step_costs_runs_on_the_engine_as_it_is():
    done = subprocess.run(
        [sys.executable, str(BENCH / "step_cost.py"), "--quick"], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["sampling_us"].keys() >= {"greedy", "temperature 1"}
    # Several times what they are on a quiet machine.
    assert figures["worst_step_us_per_sequence"] < 20 and figures["decode"]["share"] < 0.1
