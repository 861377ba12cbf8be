"""The comparison of layouts on outputs made by hand: every number known, every disagreement found where it was put."""

from __future__ import annotations

import doctest
import errno
import importlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import psutil
import pytest

from cpinfer.errors import UserError
from cpinfer.models.loading import load_spec
from cpinfer_integrations.wandb_config import WandbConfig
from cpinfer_tools.results.output_lock import locked
from cpinfer_tools.verify import compare
from cpinfer_tools.verify.comparison import evaluations as evaluations_module
from cpinfer_tools.verify.comparison.agreement import agree, first_difference, is_greedy_near_tie
from cpinfer_tools.verify.comparison.evaluations import Evaluation, contents_of, evaluate, evaluations_of, is_complete
from cpinfer_tools.verify.comparison.launches import Ended, last_lines, launch, launch_command
from cpinfer_tools.verify.comparison.layouts import legal_names, load_comparison, parse_name, resolve_layouts
from cpinfer_tools.verify.comparison.plots import DARK_SCORES, accuracy_by_length, heat_map
from cpinfer_tools.verify.comparison.report import html_report, html_table, markdown_report
from cpinfer_tools.verify.comparison.results import Written
from cpinfer_tools.verify.comparison.samples import read_run
from cpinfer_tools.verify.comparison.tables import (
    accuracy_rows,
    accuracy_table,
    expected_capacity,
    figures,
    figures_table,
    markdown,
    seed_score,
)
from evaluations import changed, line, run, some_lines, summary, write_run

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "compare_recall.json"
SPEC = load_spec(str(ROOT / "configs" / "recall-tiny"))
TOLERANCE = 1e-4


@pytest.mark.parametrize("name", ["agreement", "layouts", "plots"])
def test_examples_in_docstrings_are_true(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"cpinfer_tools.verify.comparison.{name}"))
    assert result.attempted and not result.failed


# Agreement


def test_equal_runs_agree_in_everything() -> None:
    lines = some_lines()
    found = agree(run(lines), run(lines, "pcp2"), TOLERANCE)
    assert (found.num_samples, found.num_identical, found.num_positions) == (len(lines), len(lines), 4 * len(lines))
    assert found.share_identical == 1 and found.mean_abs_logprob_difference == found.max_abs_logprob_difference == 0
    assert found.first_difference_min is None and not found.disagreements


def test_differences_are_counted_over_common_prefixes_alone() -> None:
    ours = [line(sample_index=i) for i in range(4)]
    theirs = [
        line(sample_index=0),
        line(sample_index=1, logprobs=[-0.25, -0.5 - 3e-5, -0.125]),
        line(sample_index=2, token_ids=[5, 9, 7], logprobs=[-0.25 + 1e-5, -9.0, -9.0]),
        line(sample_index=3, token_ids=[5, 6, 8], logprobs=[-0.25, -0.5, -9.0]),
    ]
    found = agree(run(ours), run(theirs, "pcp2"), TOLERANCE)
    assert (found.num_identical, found.share_identical) == (2, 0.5)
    assert (found.first_difference_median, found.first_difference_min) == (1.5, 1)
    assert found.num_positions == 3 + 3 + 1 + 2
    assert found.max_abs_logprob_difference == pytest.approx(3e-5)
    assert found.mean_abs_logprob_difference == pytest.approx(4e-5 / 9)
    assert [(d.kind, d.key.sample_index, d.position) for d in found.disagreements] == [
        ("tokens", 2, 1),
        ("tokens", 3, 2),
    ]


@pytest.mark.parametrize(
    "ours, theirs, is_tie",
    [
        (-0.9, -0.9, True),
        (-0.9, -0.9 + 0.9e-4, True),
        (-0.9, -0.9 + 2e-4, False),
        (-0.1, -0.1, False),  # two tokens with p = 0.9 each: not both can be the likeliest of one distribution
        (-0.6931, -0.6931, True),
    ],
)
def test_a_near_tie_is_two_tokens_that_are_both_the_likeliest(ours: float, theirs: float, is_tie: bool) -> None:
    a = run([line(logprobs=[-0.25, ours, -0.125])]).samples[0]
    b = run([line(token_ids=[5, 9], logprobs=[-0.25, theirs])]).samples[0]
    assert first_difference(a, b) == 1
    assert is_greedy_near_tie(a, b, 1, TOLERANCE) is is_tie
    found = agree(
        run([line(logprobs=[-0.25, ours, -0.125])]), run([line(token_ids=[5, 9], logprobs=[-0.25, theirs])]), TOLERANCE
    )
    assert (found.num_near_ties, bool(found.disagreements)) == (int(is_tie), not is_tie)


def test_without_a_tolerance_no_tokens_are_a_near_tie() -> None:
    same, other = (
        line(logprobs=[-0.25, math.log(0.5), -0.1]),
        line(token_ids=[5, 9, 7], logprobs=[-0.25, math.log(0.5), -0.1]),
    )
    assert not agree(run([same]), run([same], "pcp2"), 0.0).disagreements
    assert agree(run([same]), run([other], "pcp2"), 0.0).disagreements
    assert not agree(run([same]), run([other], "pcp2"), TOLERANCE).disagreements


def test_an_answer_that_ends_early_is_no_near_tie() -> None:
    found = agree(run([line()]), run([line(token_ids=[5, 6], logprobs=[-0.25, -0.5])], "pcp2"), TOLERANCE)
    [disagreement] = found.disagreements
    assert disagreement.position == 2 and "the end, the reference's token 7" in disagreement.detail


def test_a_logprob_beyond_the_tolerance_is_a_disagreement_at_its_position() -> None:
    for off, expected in ((0.9e-4, []), (2e-4, [1]), (math.nan, [1])):
        found = agree(run([line()]), run([line(logprobs=[-0.25, -0.5 - off, -0.125])], "pcp2"), TOLERANCE)
        assert [d.position for d in found.disagreements] == expected
        assert all(d.kind == "logprob" for d in found.disagreements)
    assert math.isnan(found.max_abs_logprob_difference or 0), "a NaN is not lost behind a maximum"


def test_missing_samples_and_other_prompts_are_disagreements() -> None:
    ours, theirs = [line(sample_index=0), line(sample_index=1)], [line(sample_index=1), line(sample_index=2)]
    found = agree(run(ours), run(theirs, "pcp2"), TOLERANCE)
    assert found.num_samples == 1 and {(d.kind, d.key.sample_index) for d in found.disagreements} == {
        ("missing", 0),
        ("missing", 2),
    }
    found = agree(run([line()]), run([line(prompt_num_tokens=999)], "pcp2"), TOLERANCE)
    assert [d.kind for d in found.disagreements] == ["prompt"]


def test_sampled_tokens_may_part_as_often_as_the_tolerance_explains() -> None:
    ours = [line(sample_index=i) for i in range(40)]
    theirs = [line(sample_index=i, token_ids=[5, 6, 8] if i < 3 else [5, 6, 7]) for i in range(40)]
    strict = agree(run(ours, passed="sampled"), run(theirs, "pcp2", "sampled"), TOLERANCE)
    assert len(strict.disagreements) == 3 and strict.num_near_ties == 0
    loose = agree(run(ours, passed="sampled"), run(theirs, "pcp2", "sampled"), 0.02)  # 117 positions, 2.34 expected
    assert not loose.disagreements and loose.num_near_ties == 3


def test_a_line_that_comes_twice_or_is_none_is_refused(tmp_path: Path) -> None:
    for lines, wanted in (
        ([line(), line()], "two lines"),
        ([{"task": "t"}], "no evaluation"),
        ([line(logprobs=[-1.0])], "1 logprobs"),
    ):
        write_run(tmp_path / "out.jsonl", lines, summary())
        with pytest.raises(UserError, match=wanted):
            read_run("tp1", "greedy", tmp_path / "out.jsonl")


def test_a_run_that_lacks_lines_of_its_summary_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    write_run(output, [line(sample_index=0), line(sample_index=1)], summary())
    output.write_text(output.read_text().partition("\n")[0] + "\n")
    with pytest.raises(UserError, match="has 1 lines, its summary speaks of 2"):
        read_run("tp1", "greedy", output)


# Tables


def test_the_score_is_the_mean_over_seeds_with_its_standard_error() -> None:
    lines = [
        line(seed=seed, sample_index=i, score=s)
        for seed, scores in ((0, (1, 1)), (1, (1, 0)))
        for i, s in enumerate(scores)
    ]
    score = seed_score(run(lines).samples)
    assert (score.mean, score.num_seeds, score.num_samples) == (0.75, 2, 4)
    assert score.stderr == pytest.approx(0.25)  # stdev of (1, 0.5) is 0.3536; over sqrt(2)
    assert seed_score(run(lines[:2]).samples).stderr is None


def test_the_accuracy_table_has_the_published_shape() -> None:
    lines = [line(seed=seed, score=float(seed != 4)) for seed in range(5)]
    rows = accuracy_rows([run(lines), run(lines[:1], "pcp2")])
    assert accuracy_table(rows, ["tp1", "pcp2", "gone"]) == (
        "| task | metric | tp1 | pcp2 | gone |\n"
        "| --- | --- | ---: | ---: | ---: |\n"
        "| niah_single_1 | string_match_all, avg@1/avg@5 | 0.8000 ± 0.2000 | 1.0000 | - |"
    )
    by_length = accuracy_rows([run([*lines, line(length=4096, score=0.5)])], by_length=True)
    assert [(row.length, row.scores["tp1"].mean) for row in by_length] == [(1024, 0.8), (4096, 0.5)]


def test_a_task_with_several_metrics_has_a_row_for_each() -> None:
    gsm8k = {"task": "gsm8k", "length": 0, "depth": None, "metric": "strict-match", "score": 0.0}
    lines = [line(**gsm8k, scores={"strict-match": 0.0, "flexible-extract": 1.0})]
    rows = accuracy_rows([run(lines)], by_length=True)
    assert [(row.metric, row.scores["tp1"].mean) for row in rows] == [("strict-match", 0.0), ("flexible-extract", 1.0)]
    assert "| gsm8k | as it is | strict-match, avg@1 | 0.0000 |" in accuracy_table(rows, ["tp1"])
    assert str(run(lines).samples[0].key) == "task gsm8k, seed 0, sample 0"


def test_a_bar_in_a_name_does_not_end_its_cell() -> None:
    table = markdown(["a"], [["x|y"]], num_left=1)
    assert "x\\|y" in table and "<td>x|y</td>" in html_table(table)


def test_figures_stand_beside_what_is_expected() -> None:
    _, base = load_comparison(str(CONFIG))
    layouts = resolve_layouts(["tp1", "tp2_dcp2", "pcp4"], base, CONFIG.parent, SPEC)
    runs = [
        run([line()], "tp1", ttft_s_p50=1.0, kv_capacity_tokens=1000, peak_memory_bytes_per_rank=[100]),
        run([line()], "tp2_dcp2", ttft_s_p50=0.75, kv_capacity_tokens=2000, peak_memory_bytes_per_rank=[70, 80]),
        run([line()], "pcp4", ttft_s_p50=None, kv_capacity_tokens=4000, peak_memory_bytes_per_rank=[90] * 4),
    ]
    found = {(f.name, f.layout): f for f in figures(runs, layouts, SPEC, num_workers=2)}
    ttft = found["ttft_s_p50", "tp2_dcp2"]
    assert (ttft.value, ttft.ratio, ttft.expected_ratio) == (0.75, 0.75, 0.5)
    assert found["ttft_s_p50", "pcp4"].expected_ratio == 0.5, "4 ranks on 2 cores are 2 workers"
    assert found["ttft_s_p50", "pcp4"].ratio is None
    assert found["tokens_per_s", "pcp4"].expected_ratio == 2
    # Of 2 KV heads tp1 stores both, and so does each rank of the group of tp2_dcp2, which mixes them.
    ratios = [found["kv_capacity_tokens", layout.name].expected_ratio for layout in layouts]
    assert ratios == [expected_capacity(layout, SPEC) / expected_capacity(layouts[0], SPEC) for layout in layouts]
    assert ratios == pytest.approx([1, 2, 4], rel=1e-3)
    assert found["peak_memory_bytes_per_rank", "tp2_dcp2"].value == 80, "the rank that needs most"
    assert found["peak_memory_bytes_per_rank", "pcp4"].expected_ratio is None
    table = figures_table(list(found.values()), [layout.name for layout in layouts]).splitlines()
    assert table[2].startswith("| ttft_s_p50 | 1, 1.00 (1.00) | 0.75, 0.75 (0.50) | - | equal work over")
    assert "| 80, 0.80 |" in table[-1]


# Layouts


def test_names_are_parsed_and_written_alike() -> None:
    for name in ("tp4", "tp4_dcp4", "tp4_pcp2", "tp4_pcp2_dcp4", "tp1_pcp2_dcp1", "tp2_dp2"):
        assert parse_name(name).name == name
    assert parse_name("dcp4_tp4").name == "tp4_dcp4"
    assert parse_name("pcp4_dp2").world_size == 8


@pytest.mark.parametrize(
    "name, said",
    [
        ("tp4_cp2", ['"cp" is no axis; the nearest is "', "tp4_pcp2"]),
        ("tp4-pcp2", ['"tp4-pcp2" is no axis with a size', "tp4_pcp2"]),
        ("tp0", ['"tp0" is no axis with a size', "nearest legal layouts"]),
        ("tp2_tp4", ['"tp" is named twice']),
        ("tp3", ["8 query heads", "nearest legal layouts of this model: tp"]),
        ("tp2_pcp2_dcp3", ["dcp", "tp2_pcp2"]),
        ("nowhere.json", ["nowhere.json", "No such file"]),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_the_nearest_legal_ones(name: str, said: list[str]) -> None:
    _, base = load_comparison(str(CONFIG))
    with pytest.raises(UserError) as error:
        resolve_layouts(["tp1", name], base, CONFIG.parent, SPEC)
    assert all(text in str(error.value) for text in said), error.value


def test_every_name_that_is_suggested_is_legal() -> None:
    _, base = load_comparison(str(CONFIG))
    names = legal_names(SPEC)
    assert {"tp1", "tp2_pcp2_dcp4", "tp1_pcp4", "tp4_pcp2_dcp8"} <= set(names) and len(names) == len(set(names))
    assert len(resolve_layouts(names, base, CONFIG.parent, SPEC)) == len(names)


def test_one_layout_and_the_same_twice_are_refused() -> None:
    _, base = load_comparison(str(CONFIG))
    for wanted, said in ((["tp1"], "at least one other"), (["tp1", "pcp2", "tp1"], "comes twice"), ([], "0 layout")):
        with pytest.raises(UserError, match=said):
            resolve_layouts(wanted, base, CONFIG.parent, SPEC)


def test_a_layout_may_be_a_config_of_its_own(tmp_path: Path) -> None:
    _, base = load_comparison(str(CONFIG))
    own = {"prefill_context_parallel_size": 4, "block_size": 32, "input": "x", "sampling": {"temperature": 0}}
    (tmp_path / "wide.json").write_text(json.dumps(own))
    [_, layout] = resolve_layouts(["tp2", "wide.json"], base, tmp_path, SPEC)
    assert layout.name == "wide" and layout.sizes == parse_name("pcp4")
    assert layout.config.block_size == 32 and layout.config.interleave == 8, "the rest is the comparison's"
    assert layout.config.input is None
    assert layout.config.sampling.temperature == 0.4, "answers are compared that are asked for in the same way"
    (tmp_path / "other.json").write_text(json.dumps({"model": "some/other", "prefill_context_parallel_size": 2}))
    with pytest.raises(UserError, match="Layouts of one model"):
        resolve_layouts(["tp2", "other.json"], base, tmp_path, SPEC)


def test_the_config_of_a_run_can_lie_anywhere_and_asks_for_its_layout() -> None:
    _, base = load_comparison(str(CONFIG), ["evaluation.task_file=tasks.jsonl", "evaluation.tasks=[]"])
    [layout, _] = resolve_layouts(["tp2_pcp2_dcp4", "tp1"], base, CONFIG.parent, SPEC)
    assert Path(layout.data["model"]).is_absolute() and "comparison" not in layout.data
    assert layout.data["evaluation"]["task_file"] == str(ROOT / "configs" / "tasks.jsonl")
    assert (layout.config.tp_size, layout.config.pcp_size, layout.config.dcp_size) == (2, 2, 4)
    assert layout.config.interleave == 8
    greedy, sampled = evaluations_of(layout, Path("out"))
    assert (greedy.passed, greedy.data["sampling"]["temperature"], greedy.data["evaluation"]["seeds"]) == (
        "greedy",
        0,
        [0],
    )
    assert (sampled.data["sampling"]["temperature"], sampled.data["evaluation"]["seeds"]) == (0.4, [0, 1, 2, 3, 4])


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("compare_*.json")), ids=lambda path: path.stem)
def test_shipped_comparisons_deal_8_tokens_at_a_time_as_the_published_ones(config: Path) -> None:
    parsed, base = load_comparison(str(config))
    assert parsed.interleave == 8 and len(parsed.evaluation.seeds) == 5
    if Path(base["model"]).is_dir():
        layouts = resolve_layouts(parsed.comparison.layouts, base, config.parent, load_spec(base["model"]))
        assert len(layouts) == 4 and max(layout.sizes.world_size for layout in layouts) <= 4


# Pictures and report


def test_the_heat_map_has_a_hole_where_there_is_no_sample() -> None:
    cells = [(0, 1024, 1.0), (0, 1024, 0.0), (100, 1024, 0.25), (0, 4096, 1.0)]
    lines = [line(depth=d, length=n, score=s, sample_index=i) for i, (d, n, s) in enumerate(cells)]
    lines.append(line(depth=None, length=9999))
    found = heat_map(run(lines).samples)
    assert (found.depths, found.lengths) == ((0, 100), (1024, 4096))
    assert found.values == ((0.5, 1.0), (0.25, None))
    assert heat_map([]).values == ()


def test_accuracy_by_length_is_in_the_order_of_lengths() -> None:
    lines = [line(length=n, seed=seed, score=s) for n, seed, s in ((4096, 0, 0.0), (1024, 0, 1.0), (1024, 1, 0.0))]
    assert accuracy_by_length(run(lines).samples) == {1024: (0.5, 0.5), 4096: (0.0, None)}


def test_the_report_needs_nothing_from_outside(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    picture.write_bytes(b"\x89PNG not really")
    text = html_report("<b>t</b>", "fine & good", True, [], {"needle <1>": picture})
    assert_self_contained(text)
    assert "&lt;b&gt;t&lt;/b&gt;" in text and "fine &amp; good" in text and "data:image/png;base64,iVBORyB" in text
    assert "prefers-color-scheme: dark" in text and "color-scheme: light dark" in text
    assert markdown_report("t", "v", []) == "# t\n\nv\n"


def test_names_of_columns_stand_over_their_numbers() -> None:
    made = html_table("| task | score |\n| --- | ---: |\n| vt | 0.5 |")
    assert "<th>task</th><th class=number>score</th>" in made and "<td>vt</td><td class=number>0.5</td>" in made


def test_text_on_every_score_has_the_better_contrast_of_black_and_white() -> None:
    def luminance(rgb: Sequence[float]) -> float:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for score in [i / 100 for i in range(101) if abs(i / 100 - DARK_SCORES) > 0.02]:
        below = luminance(matplotlib.colormaps["cividis"](score)[:3])
        white, black = 1.05 / (below + 0.05), (below + 0.05) / 0.05
        assert bool(white > black) is (score < DARK_SCORES), score


def assert_self_contained(text: str) -> None:
    sources = re.findall(r'(?:src|href|srcset|action|data)\s*=\s*["\']?([^"\'\s>]*)', text)
    assert all(source.startswith("data:") for source in sources), sources
    assert not re.search(r"<(script|link|iframe|object)\b|@import|url\(|https?:|//[a-z]", without_pictures(text))


def without_pictures(text: str) -> str:
    return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]*", "data:", text)


def test_a_report_with_an_address_would_be_noticed() -> None:
    for bad in ('<img src="p.png">', '<link rel="x">', "<style>@import 'x'</style>", "<script>1</script>"):
        with pytest.raises(AssertionError):
            assert_self_contained(bad)


# The tool, with runs that are made by hand instead of launched


class Tool:
    """`tools/compare.py` on evaluations that write given lines."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.output = folder / "out"
        self.lines = {layout: some_lines() for layout in ("tp1", "pcp2", "tp2_pcp2")}
        self.launched: list[str] = []
        self.returncode: int | None = 0
        self.changed: dict[str, str] = {}  # of the contents that a run had

    def evaluate(self, evaluation: Evaluation, *_: Any) -> Ended:
        self.launched.append(f"{evaluation.layout.name}/{evaluation.passed}")
        evaluation.folder.mkdir(parents=True, exist_ok=True)
        evaluation.log.write_text("some\nlog\n")
        if self.returncode == 0:
            evaluation.config.write_text(json.dumps(evaluation.data))
            made_of = contents_of([evaluation], SPEC)[evaluation.passed] | self.changed
            write_run(evaluation.output, self.lines[evaluation.layout.name], summary(), made_of)
        return Ended(self.returncode, 1.0)

    def __call__(self, *argv: str, greedy: bool = True) -> tuple[int, dict[str, Any], str]:
        given = ["--config", str(CONFIG), "--output", str(self.output)]
        given += ["--set", "evaluation.lengths=[256]", "--set", "evaluation.num_samples=1"]
        given += ["--set", "sampling.temperature=0"] if greedy else []
        layouts = [] if "--layouts" in argv else ["--layouts", *self.lines]
        code = compare.main([*given, *layouts, *argv])
        out, err = self.capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out else {}, err


@pytest.fixture
def tool(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tool:
    made = Tool(tmp_path, capsys)
    monkeypatch.setattr(compare, "evaluate", made.evaluate)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return made


def test_layouts_that_agree_end_with_0_and_leave_tables_pictures_and_a_report(tool: Tool) -> None:
    code, said, err = tool()
    assert code == 0 and said["ok"] and said["reference"] == "tp1" and said["num_disagreements"] == 0
    assert [a["share_identical"] for a in said["agreement"]] == [1.0, 1.0]
    assert {row["task"] for row in said["accuracy"]} == {"niah_single_1", "vt"}
    assert "All layouts agree with tp1: 240 of 240" in err
    html = (tool.output / "report.html").read_text()
    assert_self_contained(html)
    plots = {path.name for path in (tool.output / "plots").iterdir()}
    stems = ("heatmap_niah_single_1", "accuracy_by_length", "agreement")
    assert plots == {f"{stem}{suffix}" for stem in stems for suffix in (".png", ".svg")}
    assert all((tool.output / "plots" / f"{stem}.svg").read_text().rstrip().endswith("</svg>") for stem in stems)
    assert html.count("data:image/png;base64,") == len(stems)
    data = json.loads((tool.output / "comparison.json").read_text())
    assert data["figures"] and data["accuracy_by_length"] and data["summaries"]["pcp2/greedy"]
    assert "| task | metric | tp1 | pcp2 | tp2_pcp2 |" in (tool.output / "report.md").read_text()


def test_a_planted_disagreement_ends_with_1_and_says_exactly_where(tool: Tool) -> None:
    def plant(data: dict[str, Any]) -> dict[str, Any]:
        if (data["task"], data["length"], data["depth"], data["seed"], data["sample_index"]) == (
            "niah_single_1",
            4096,
            0.5,
            3,
            1,
        ):
            data["logprobs"] = [*data["logprobs"][:2], data["logprobs"][2] - 0.01, *data["logprobs"][3:]]
        return data

    tool.lines["tp2_pcp2"] = changed(some_lines(), plant)
    code, said, err = tool()
    assert code == 1 and not said["ok"] and said["num_disagreements"] == 1
    [found] = said["disagreements"]
    wanted = {
        "layout": "tp2_pcp2", "pass": "greedy", "task": "niah_single_1", "length": 4096, "depth": 0.5, "seed": 3,
        "sample_index": 1, "position": 2, "kind": "logprob",
    }  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted
    assert "tp2_pcp2 (greedy): task niah_single_1, length 4096, depth 0.5, seed 3, sample 1, position 2: logprob" in err
    assert "DISAGREEMENT with tp1: tp2_pcp2 (1 places" in (tool.output / "report.html").read_text()
    assert tool("--overwrite", "--tolerance", "0.1")[0] == 0, "within a tolerance that is asked for it agrees"


def test_a_nan_is_a_disagreement_and_leaves_the_json_valid(tool: Tool) -> None:
    first, *others = some_lines()
    tool.lines["pcp2"] = [{**first, "logprobs": [None, *first["logprobs"][1:]]}, *others]
    code, said, _ = tool()
    assert code == 1 and said["disagreements"][0]["position"] == 0
    json.loads((tool.output / "comparison.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_sampling_configs_run_greedy_too_and_are_scored_by_the_sampled_pass(tool: Tool) -> None:
    code, said, _ = tool(greedy=False)
    assert code == 0
    assert tool.launched == [f"{layout}/{p}" for layout in tool.lines for p in ("greedy", "sampled")]
    assert [(a["layout"], a["pass"]) for a in said["agreement"]] == [
        ("pcp2", "greedy"), ("tp2_pcp2", "greedy"), ("pcp2", "sampled"), ("tp2_pcp2", "sampled"),
    ]  # fmt: skip


def test_reuse_keeps_complete_runs_of_the_same_config_alone(tool: Tool) -> None:
    assert tool()[0] == 0
    assert tool()[0] == 2, "an output that exists is not touched unasked"
    (tool.output / "pcp2" / "greedy.jsonl.summary.json").unlink()
    tool.launched.clear()
    assert tool("--reuse")[0] == 0 and tool.launched == ["pcp2/greedy"]
    tool.launched.clear()
    assert tool("--reuse", "--set", "block_size=32")[0] == 0 and len(tool.launched) == 3


def test_reuse_keeps_no_run_of_other_contents_under_the_same_config(
    tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool.changed = {"weights": "sha256:what it was before"}
    monkeypatch.setattr(compare, "write_results", lambda *_, **__: 1 / 0)
    for argv in ([], ["--reuse"]):
        tool.launched.clear()
        with pytest.raises(ZeroDivisionError):  # once all have run
            tool(*argv)
        assert len(tool.launched) == 3


def test_nothing_goes_to_wandb_unless_the_config_says_so(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[WandbConfig, bool]] = []

    def log_comparison(config: WandbConfig, *_: Any, has_api_key: bool) -> None:
        logged.append((config, has_api_key))

    written = Written(Path("report.html"), Path("report.md"), Path("comparison.json"), {}, "")
    monkeypatch.setattr(compare, "write_results", lambda *_, **__: written)
    monkeypatch.setattr("cpinfer_integrations.wandb.log_comparison", log_comparison)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert tool()[0] == 0 and logged == []
    assert tool("--reuse", "--set", "wandb.project=p")[0] == 0
    assert logged == [(WandbConfig(project="p"), True)]


def test_two_comparisons_do_not_write_one_folder(tool: Tool) -> None:
    with locked(tool.output / "comparison.json"):
        code, _, err = tool("--overwrite")
    assert code == 2 and "is being written by another run" in err and tool.launched == []


def test_what_cannot_be_written_is_said_without_a_traceback(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "report.html")

    monkeypatch.setattr(compare, "write_results", full)
    code, said, err = tool()
    assert code == 1 and not said and "compare: [Errno 28] No space left on device: 'report.html'" in err


@pytest.mark.parametrize(
    "returncode, code, said", [(1, 1, "exit code 1"), (2, 2, "exit code 2"), (None, 1, "did not end within")]
)
def test_a_layout_that_fails_ends_the_comparison_and_shows_its_log(
    tool: Tool, returncode: int | None, code: int, said: str
) -> None:
    tool.returncode = returncode
    found, _, err = tool()
    assert found == code and said in err and "some\nlog" in err and tool.launched == ["tp1/greedy"]


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--layouts", "tp1", "tp4_pc2"], '"pc" is no axis'),
        (["--layouts", "tp1", "tp3"], "nearest legal layouts"),
        (["--layouts", "tp1"], "at least one other"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--set", 'evaluation.tasks=["recal_single"]'], 'the nearest is "recall_single"'),
        (["--set", "evaluation.lengths=[999999]"], "more than the model's 32768 positions"),
        (["--set", "evaluation.lengths=[128]"], "task recall_multikey at length 128"),
        (["--set", "evaluation.tasks=[]", "--set", "evaluation.task_file=no.jsonl"], "no.jsonl: No such file"),
        (["--set", "comparison.layout=1"], 'nearest known key is "comparison.layouts"'),
        (["--set", "comparison.tolerance=-1"], "tolerance"),
        (["--tolerance", "nan"], "must be at least 0"),
        (["--bitwise", "--tolerance", "0.1"], "not allowed with"),
        (["--bitwise", "--layouts", "tp1", "tp2"], "--bitwise is for layouts of one tp size"),
        (["--bitwise", "--layouts", "pcp1", "pcp3_dcp3"], "does not divide deterministic_kv_shards=8"),
        (["--timeout-s", "0"], "above 0"),
        (["--launcher", "mpi"], "--launcher"),
        (["--reuse", "--overwrite"], "not allowed with"),
    ],
)
def test_bad_input_is_found_before_anything_is_launched(tool: Tool, argv: list[str], said: str) -> None:
    code, _, err = tool(*argv)
    assert code == 2 and said in err and not tool.launched and not tool.output.exists(), err


def test_it_refuses_to_be_one_of_many_ranks(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    code, _, err = tool()
    assert code == 2 and "Start it with python" in err


# Launching


def test_what_a_launch_prints_goes_to_its_log_and_to_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os; print('out', os.environ.get('RANK'), os.environ['OMP_NUM_THREADS']); raise SystemExit(3)"
    ended = launch([sys.executable, "-c", code], tmp_path / "log", 30, {"RANK": "5", "PATH": ""})
    assert (
        ended.returncode == 3
        and (tmp_path / "log").read_text() == "out None 1\n" == last_lines(tmp_path / "log") + "\n"
    )
    out, err = capfd.readouterr()
    assert (out, err) == ("", "out None 1\n")


def test_past_its_time_a_launch_and_workers_in_sessions_of_their_own_are_ended(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    worker = f"import time, pathlib, os; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    start = f"subprocess.Popen([sys.executable, '-c', {worker!r}], start_new_session=True)"
    code = f"import subprocess, sys, time; {start}; time.sleep(60)"
    started_s = time.perf_counter()
    ended = launch([sys.executable, "-c", code], tmp_path / "log", 3, {})
    assert ended.returncode is None and time.perf_counter() - started_s < 15
    worker_pid = int(pid.read_text())
    # Who adopted it may not have asked for its end yet.
    assert not psutil.pid_exists(worker_pid) or psutil.Process(worker_pid).status() == psutil.STATUS_ZOMBIE


def test_torchrun_is_asked_for_as_many_processes_and_its_workers_exit_code_is_found(tmp_path: Path) -> None:
    script = tmp_path / "ends_badly.py"
    # The first that fails is the one that counts: torchrun ends the other, and lists it before.
    waits = "import os, time\nif os.environ['RANK'] == '0':\n    time.sleep(60)\n"
    script.write_text(f"{waits}print('why', flush=True)\nraise SystemExit(2)\n")
    command = launch_command("torchrun", 2, "ends_badly", [])
    assert "--nproc-per-node 2" in " ".join(command)
    assert "--num_gpus 4" in " ".join(launch_command("deepspeed", 4, "ends_badly", []))
    assert launch(command, tmp_path / "log", 90, {**os.environ, "PYTHONPATH": str(tmp_path)}).returncode == 2
    assert last_lines(tmp_path / "log") == "why"


def test_an_evaluation_replaces_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, base = load_comparison(str(CONFIG), ["sampling.temperature=0"])
    [layout, _] = resolve_layouts(["tp1", "pcp2"], base, CONFIG.parent, SPEC)
    [evaluation] = evaluations_of(layout, tmp_path)
    write_run(evaluation.output, [line()], summary())
    seen: list[list[str]] = []

    def fake_launch(command: list[str], *_: Any) -> Ended:
        seen.append(command)
        assert not evaluation.output.with_name("greedy.jsonl.summary.json").exists()
        assert json.loads(evaluation.config.read_text()) == json.loads(json.dumps(evaluation.data))
        return Ended(0, 0.0)

    monkeypatch.setattr(evaluations_module, "launch", fake_launch)
    assert not is_complete(evaluation, {"weights": "sha256:1"})
    evaluate(evaluation, "torchrun", 10, {}, "info")
    files = ["--config", str(evaluation.config), "--output", str(evaluation.output)]
    assert seen[0][-7:] == [*files, "--overwrite", "--log-level", "info"]
    assert not is_complete(evaluation, {"weights": "sha256:1"})
    write_run(evaluation.output, [line()], summary(), {"weights": "sha256:1"})
    assert is_complete(evaluation, {"weights": "sha256:1"})
    assert not is_complete(evaluation, {"weights": "sha256:2"})


def test_a_dry_run_says_what_would_run_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "evaluate", lambda *_: pytest.fail("it was run"))
    arguments = ["--config", str(CONFIG), "--layouts", "tp1", "pcp2", "--output", str(tmp_path / "out"), "--dry-run"]
    assert compare.main([*arguments, "--set", "sampling.temperature=0"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == {"dry_run": True, "layouts": ["tp1", "pcp2"], "num_runs": 2}
    assert not (tmp_path / "out").exists()
    assert compare.main([*arguments, "--layouts", "tp3"]) == 2  # what is wrong is found all the same


def test_what_is_missing_for_some_layout_is_said_before_the_first_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpinfer.packages.find_spec", lambda name: None)
    arguments = ["--config", str(CONFIG), "--output", str(tmp_path / "out"), "--dry-run"]
    assert compare.main([*arguments, "--layouts", "tp1", "tp2"]) == 2
    assert 'tp_size=2 with the provider "autotp" needs the package deepspeed' in capsys.readouterr().err
    assert compare.main([*arguments, "--layouts", "tp1", "pcp2", "--launcher", "deepspeed"]) == 2
    assert "--launcher deepspeed needs the package deepspeed" in capsys.readouterr().err
    wandb = ["--set", 'wandb={"project": "x"}']
    assert compare.main([*arguments, "--layouts", "tp1", "pcp2", *wandb]) == 2
    assert 'the key "wandb" needs the package wandb' in capsys.readouterr().err
    assert compare.main([*arguments, "--layouts", "tp1", "pcp2"]) == 0
