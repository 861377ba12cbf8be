"""tools/mismatch.py: which logprobs are compared, what is over a limit, a planted difference found where it lies."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cpinfer.colocate.mismatch import Compared, Mismatch, uncut_logprobs
from cpinfer.colocate.training_logprobs import training_logprobs
from cpinfer.config import SamplingParams
from cpinfer.engine.request import Prompt
from cpinfer.models.loading import load_model, load_spec
from cpinfer_tools import rollout
from cpinfer_tools.verify import mismatch
from cpinfer_tools.verify.comparison.generated import generate_samples
from cpinfer_tools.verify.comparison.mismatches import WHOLE, Row, Sampled, rows_table, verdict

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "single.json"
RECALL_TINY = str(ROOT / "configs" / "recall-tiny")
SAMPLED = Sampled((0, 0, 3), ((7, 8), (7, 8), (9,)), ((1, 2), (3,), (4,)), ((-1.0, -2.0), (-0.5,), (-3.0,)))
EXACT = [list(sample) for sample in SAMPLED.logprobs]


# What is compared


def test_temperature_alone_leaves_processed_logprobs_comparable() -> None:
    assert Compared.of(SamplingParams(temperature=0.7, min_new_tokens=0)) == Compared(
        "processed_logprobs", 0.7, "processed logprobs against the forward at temperature 0.7"
    )


@pytest.mark.parametrize(
    "words",
    [
        {"repetition_penalty": 1.1},
        {"logit_bias": ((3, 1.0),)},
        {"min_new_tokens": 1},
    ],
    ids=lambda words: next(iter(words)),
)
def test_whatever_shapes_the_distribution_leaves_raw_ones_and_says_so(words: dict[str, Any]) -> None:
    compared = Compared.of(SamplingParams(temperature=0.7, **words))
    assert (compared.field, compared.temperature) == ("logprobs", 1.0)
    assert next(iter(words)) in compared.why
    assert "greedy" in Compared.of(SamplingParams(temperature=0, **words)).why


@pytest.mark.parametrize("words", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=lambda words: next(iter(words)))
def test_what_a_cut_kept_leads_back_to_what_the_forward_knows(words: dict[str, Any]) -> None:
    compared = Compared.of(SamplingParams(temperature=0.7, **words))
    assert (compared.field, compared.temperature) == ("processed_logprobs", 0.7)
    assert "kept mass" in compared.why and next(iter(words)) in compared.why
    line = {"logprobs": [-9.0, -9.0], "processed_logprobs": [-1.0, -2.0], "kept_mass": [0.5, 1.0]}
    assert compared.logprobs_of(line) == pytest.approx([-1.0 + math.log(0.5), -2.0])
    assert compared.logprobs_of({**line, "kept_mass": None}) == (-1.0, -2.0)
    raw = Compared.of(SamplingParams(temperature=0.7, repetition_penalty=1.1, **words))
    assert (raw.field, raw.temperature, raw.logprobs_of(line)) == ("logprobs", 1.0, (-9.0, -9.0))
    with pytest.raises(ValueError, match="2 processed logprobs and 1 kept masses"):
        uncut_logprobs([-1.0, -2.0], [0.5])


# Limits


def row(training: list[list[float]], dtype: str = "float32", *, is_judged: bool = True) -> Row:
    return Row.of("pcp2", WHOLE, SAMPLED, training, dtype, is_judged=is_judged)


@pytest.mark.parametrize(
    "dtype, off, is_within",
    [("float32", 0.9e-4, True), ("float32", 2e-4, False), ("bfloat16", 3.9e-3, True), ("bfloat16", 4.1e-3, False)],
)
@pytest.mark.parametrize("is_judged", [True, False])
def test_float32_is_judged_by_the_largest_and_half_precision_by_the_mean(
    dtype: str, off: float, is_within: bool, is_judged: bool
) -> None:
    training = [*EXACT[:2], [-3.0 + off]]  # one token of four
    found = row(training, dtype, is_judged=is_judged)
    assert found.is_within is is_within
    assert found.ok is (is_within or not is_judged)
    assert found.plain()["mismatch_max_abs"] == pytest.approx(off)
    assert ("OVER THE LIMIT: pcp2" in verdict([found, row(EXACT)])) is not found.ok


def test_where_every_bit_is_to_agree_the_last_one_is_over_the_limit_and_each_limit_is_told() -> None:
    def exact(training: list[list[float]]) -> Row:
        return Row.of("pcp2", WHOLE, SAMPLED, training, "bfloat16", is_judged=True, is_exact=True)

    assert exact(EXACT).ok and not exact([*EXACT[:2], [math.nextafter(-3.0, 0)]]).ok
    near = row([*EXACT[:2], [-3.0 + 2**-20]])
    assert verdict([exact(EXACT), near]) == (
        "Every layout is within the limit: the largest max is 0, 0 is allowed; the largest max is 9.5e-07, 0.0001 is "
        "allowed."
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_nan_is_over_every_limit_and_null_in_json(dtype: str) -> None:
    found = row([EXACT[0], [math.nan], EXACT[2]], dtype)
    assert not found.ok
    plain = json.loads(json.dumps(found.plain(), allow_nan=False))
    assert plain["mismatch_mean_abs"] is plain["mismatch_kl"] is plain["mismatch_max_abs"] is None
    assert plain["mismatch_share_above_1e_3"] == 0.25
    assert "prompt 0, token 3 at position 2: -0.5 when it was sampled, nan" in verdict([found])


def test_the_furthest_token_is_named_by_prompt_and_position_in_the_sequence() -> None:
    at = row([[-1.0, -2.5], [-0.5], [-3.25]]).furthest
    assert (at.prompt_index, at.position, at.token_id) == (0, 3, 2)
    assert (at.rollout_logprob, at.training_logprob) == (-2.0, -2.5)


def test_the_table_says_which_rows_are_judged() -> None:
    header, _, first, second = rows_table([row(EXACT), row(EXACT, is_judged=False)]).splitlines()
    assert "against the forward" in header and "share above 1e-3" in header
    assert first.endswith("| max ≤ 0.0001 | yes |") and second.endswith("| yes (not judged) |")


# Transformers' generate beside it


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(RECALL_TINY, torch.float32)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.7, max_new_tokens=6, n=2, seed=1),
        SamplingParams(temperature=0.7, max_new_tokens=6, n=3, ignore_eos=True, top_k=4),
        SamplingParams(temperature=0, max_new_tokens=6, n=2),
    ],
    ids=["sampled", "shaped", "greedy"],
)
def test_samples_of_generate_come_with_its_logprobs_and_end_where_answers_end(model: Any, sampling: Any) -> None:
    spec = load_spec(RECALL_TINY)
    prompts = [Prompt(i, str(i), tuple(range(5, 5 + n))) for i, n in enumerate((9, 3, 17))]
    temperature = Compared.of(sampling).temperature
    found = generate_samples(model, prompts, sampling, spec, temperature=temperature, batch_size=4)
    samples = 1 if sampling.greedy else sampling.n
    assert found.prompt_indices == tuple(i for i in range(3) for _ in range(samples))
    assert found.prompts == tuple(prompts[i].token_ids for i in found.prompt_indices)
    ends = {tokens.index(t) for tokens in found.completions for t in spec.eos_token_ids if t in tokens[:-1]}
    assert sampling.ignore_eos or not ends
    assert not sampling.ignore_eos or {len(tokens) for tokens in found.completions} == {6}

    def against(at: float) -> Mismatch:
        words = {"temperature": at, "batch_size": 2, "pad_token_id": 0}
        return Mismatch.of(found.logprobs, training_logprobs(model, found.prompts, found.completions, **words))

    assert against(temperature).max_abs <= 1e-4
    assert against(temperature * 1.5).share_above_1e_3 > 0.1


# The tool


@pytest.fixture
def config(tmp_path: Path) -> Path:
    lines = (ROOT / "configs" / "recall-tiny-prompts.jsonl").read_text().splitlines()
    short = sorted(lines, key=len)[:3]
    (tmp_path / "prompts.jsonl").write_text("\n".join(short))
    sampling = {"temperature": 1.0, "max_new_tokens": 4, "n": 2}
    data = {"model": RECALL_TINY, "dtype": "float32", "input": "prompts.jsonl", "sampling": sampling}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    return path


def launch_here(monkeypatch: pytest.MonkeyPatch, planted: float = 0.0) -> None:
    """Rollouts run in this process; their last logprob is moved by `planted`."""

    def run(job: mismatch.Job, module: str, num_ranks: int, arguments: list[str], log: Path) -> None:
        assert (module, num_ranks) == ("cpinfer_tools.rollout", 1)
        assert rollout.main(arguments) == 0
        output = Path(arguments[arguments.index("--output") + 1])
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        lines[-1]["processed_logprobs"][-1] += planted
        output.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))

    monkeypatch.setattr(mismatch, "_launch", run)


def test_a_layout_agrees_and_a_planted_difference_is_found(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["--config", str(config), "--output", str(output)]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("cpinfer_integrations.wandb.log_comparison", None)  # nobody has asked for it
    launch_here(monkeypatch)
    assert mismatch.main(arguments) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out.splitlines()[-1])
    ours, peer = summary["rows"]
    assert (ours["name"], ours["num_samples"], ours["is_judged"]) == ("tp1", 6, True)
    assert (peer["name"], peer["num_samples"], peer["is_judged"]) == ("Transformers generate", 6, False)
    assert ours["mismatch_max_abs"] <= 1e-4 and peer["mismatch_max_abs"] <= 1e-4
    assert "| tp1 | whole | 6 |" in captured.err
    assert f"Command: `cpinfer mismatch --config {config}" in (output / "report.md").read_text()
    assert {path.name for path in output.iterdir()} == {"report.md", "report.html", "mismatch.json", "tp1"}

    launch_here(monkeypatch, planted=0.01)
    assert mismatch.main([*arguments, "--overwrite"]) == 1
    captured = capsys.readouterr()
    furthest = json.loads(captured.out.splitlines()[-1])["rows"][0]["furthest"]
    assert furthest["rollout_logprob"] - furthest["training_logprob"] == pytest.approx(0.01, abs=1e-4)
    assert "OVER THE LIMIT: tp1" in captured.err


def test_rollouts_that_were_cut_agree_by_their_kept_mass_and_by_another_do_not(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--config",
        str(config),
        "--output",
        str(tmp_path / "out"),
        "--set",
        "sampling.top_p=0.6",
        "--overwrite",
    ]
    launch_here(monkeypatch)
    assert mismatch.main(arguments) == 0
    ours, peer = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert ours["mismatch_max_abs"] <= 1e-4 and peer["mismatch_max_abs"] <= 1e-4
    assert "log of the kept mass added: top_p" in (tmp_path / "out" / "report.md").read_text()

    monkeypatch.setattr("cpinfer.engine.sampling._kept_mass", lambda uncut, logprobs: torch.ones(len(uncut)))
    assert mismatch.main(arguments) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]["mismatch_max_abs"] > 0.01


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--layouts", "tq2"], 'the nearest is "tp"'),
        (["--layouts", "tp1", "tp1"], "comes twice"),
        (["--set", "input=null"], '"input" is missing'),
        (["--set", "model=null"], '"model" is missing'),
        (["--set", "sampling.temprature=1"], '"sampling.temperature"'),
        (["--set", "kv_cache_gib=0.00001"], "Raise kv_cache_gib"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--timeout-s", "0"], "--timeout-s 0"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--layouts", "own.json"], "dtype or sampling of its own"),
        (["--output", "."], "exists"),
    ],
)
def test_bad_input_is_told_before_anything_is_launched(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    (tmp_path / "own.json").write_text(json.dumps({"dtype": "bfloat16"}))
    monkeypatch.setattr(mismatch, "_launch", None)
    monkeypatch.chdir(tmp_path)
    assert mismatch.main(["--config", str(config), *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_prompt_that_fits_no_layout_is_named(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt_token_ids": [1, 2]}\n{"prompt_token_ids": [999999]}')
    assert mismatch.main(["--config", str(config)]) == 2
    assert 'layout "tp1": prompt 1: token id 999999' in capsys.readouterr().err


def test_under_tensor_parallelism_half_precision_is_judged_by_the_forward_that_has_it(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the framework's own sums round is not the rollout's; in float32 both forwards must agree with it."""
    for dtype, judged in (("float32", [True, True, False, False]), ("bfloat16", [False, True, False, False])):
        argv = ["--config", str(config), "--layouts", "tp2", "--set", f"dtype={dtype}"]
        job = mismatch.prepare(mismatch.parse_args(argv), argv)
        assert job.tp_sizes == [2]
        sampled = replace(SAMPLED, prompts=((7, 8), (7, 8), (9,)))
        rows = mismatch.judge(job, {"tp2": sampled}, {2: {"tp2": EXACT}})
        assert [(r.name, r.forward) for r in rows] == [
            ("tp2", "whole"),
            ("tp2", "tp=2"),
            ("tp=2 forward", "whole"),
            ("Transformers generate", "whole"),
        ]
        assert [r.is_judged for r in rows] == judged
        assert rows[1].mismatch.max_abs == 0 and rows[0].mismatch == rows[2].mismatch != rows[1].mismatch


def test_a_dry_run_says_what_would_run_and_writes_nothing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mismatch, "_launch", lambda *_: pytest.fail("it was run"))
    assert mismatch.main(["--config", str(config), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["dry_run"] and told["layouts"] == ["tp1"] and told["num_prompts"] > 0
    assert not (tmp_path / "out").exists()


def test_what_is_missing_for_some_layout_is_said_before_the_first_runs(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cpinfer.packages.find_spec", lambda name: None)
    arguments = ["--config", str(config), "--output", str(tmp_path / "out"), "--dry-run"]
    for more, missing in ((["--layouts", "tp1", "tp2"], "deepspeed"), (["--set", 'wandb={"project": "x"}'], "wandb")):
        assert mismatch.main([*arguments, *more]) == 2
        assert f"needs the package {missing}" in capsys.readouterr().err
