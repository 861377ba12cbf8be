"""`cpinfer explain --plan`: the model as tools read it, in words and in JSON."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from cpinfer_tools.explain import main
from tiny_models import FAMILIES, make_model


@pytest.fixture
def plan(capsys, tmp_path):
    """Runs the tool on the config of a tiny family: (exit code, the JSON of the last line, text, stderr)."""

    def run(family: str, *flags: Any, **changed: Any) -> tuple[int, dict[str, Any], str, str]:
        config = copy.deepcopy(FAMILIES[family])
        config.architectures = None
        (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), **changed}))
        code = main(["--plan", "--model", str(tmp_path), *map(str, flags), "--json"])
        out, err = capsys.readouterr()
        *text, last = out.splitlines()
        return code, json.loads(last), "\n".join(text), err

    return run


def test_a_plan_says_for_every_layout_whether_it_fits_and_what_it_takes(plan):
    code, answer, text, _ = plan("llama", "--gpus", 4, "--seq-len", 256, "--batch", 4, "--new-tokens", 32)
    assert (code, answer["valid"], answer["errors"]) == (0, True, [])
    assert answer["num_parameters"] == sum(weight.numel() for weight in make_model(FAMILIES["llama"]).parameters())
    assert all(each["fits"] and each["prefill_s"] > 0 and each["decode_ms"] > 0 for each in answer["plans"])
    assert {each["tp"] * each["pcp"] * each["dp"] for each in answer["plans"]} == {4}
    times = [each["wall_s"] for each in answer["plans"]]
    assert times == sorted(times)
    assert "layouts fit; the quickest first" in text and "Prefill waits for" in text
    assert "at once: sequences" in text and "Predicted, not measured" in text
    assert set(answer["sources"]) == {"memory", "flops", "link", "network"}


def test_the_columns_of_the_table_end_where_their_names_do(plan):
    _, answer, text, _ = plan("llama", "--gpus", 4, "--seq-len", 256, "--batch", 4, "--new-tokens", 32)
    header, *rows = text.split("\n\n")[2].splitlines()
    assert header.split()[:4] == ["tp", "pcp", "dcp", "dp"] and len(rows) == min(12, len(answer["plans"]))
    assert {len(row) for row in rows} == {len(header)} and not header.endswith(" ")
    for name in ("tp", "weights GiB", "at once", "decode ms"):
        end = header.index(name) + len(name)
        assert all(row[end - 1] != " " and row[end] == " " for row in rows), name


def test_figures_that_are_given_win_over_the_presets(plan):
    own = ("--gpu-gib", 0.001, "--gpus-per-host", 2, "--link-gb-s", 7)
    code, answer, text, _ = plan("llama", "--gpus", 4, *own)
    assert code == 0 and "no layout fits" in text and "Predicted" not in text
    assert not any(each["fits"] for each in answer["plans"]) and "does not fit" in answer["plans"][0]["reason"]
    machine = answer["machine"]
    assert (machine["gpus_per_host"], machine["link_bandwidth"], machine["gpu_bytes"]) == (2, 7e9, 0.001 * 2**30)
    assert "as given" in machine["title"]


@pytest.mark.parametrize(
    "family, flags, changed, message",
    [
        ("llama", (), {"model_type": "mamba2"}, "recurrent and hybrid models"),
        ("olmo2", ("--tp", 2), {}, "tensor parallelism of families whose code"),
        ("llama", ("--gpus", 7, "--tp", 2), {}, "no legal layout"),
        ("gpt_bigcode", ("--seq-len", "8k"), {}, "Lower max_model_len"),
        ("llama", (), {"hidden_size": 0}, '"hidden_size" is 0'),
        ("llama", ("--machine", "h100", "--new-tokens", 0), {}, 'unknown length "0"'),
    ],
)
def test_what_the_tools_refuse_exits_2_with_the_reason(plan, family, flags, changed, message):
    code, answer, text, err = plan(family, *flags, **changed)
    assert (code, answer["valid"], text) == (2, False, "")
    assert message in answer["errors"][0] and message in err


def test_layouts_that_a_family_cannot_run_are_counted_with_the_reason(plan):
    code, answer, text, _ = plan("olmo2", "--gpus", 2)
    assert code == 0 and {each["tp"] for each in answer["plans"]} == {1}
    assert sum(each["num_layouts"] for each in answer["refused"]) == 2
    assert "2 layout(s) are refused: " in text


def test_flags_that_would_not_be_read_are_errors(plan, capsys):
    code, answer, _, _ = plan("llama", "--num-q-heads", 8)
    assert code == 2 and "--num-q-heads: --plan reads the model's config.json" in answer["errors"][0]
    assert main(["--gpus", "8", "--num-q-heads", "8", "--num-kv-heads", "2", "--batch", "4"]) == 2
    assert "--batch is of plans. Add --plan" in capsys.readouterr().err


def test_flops_that_are_given_are_those_of_the_dtype(plan):
    for dtype in ("float32", "bfloat16"):
        slow, fast = (
            plan("llama", "--dtype", dtype, "--tflops", flops, "--gpus", 1, "--seq-len", 512)[1]["plans"][0]
            for flops in (0.001, 1)
        )
        assert slow["parts"]["prefill"]["products_s"] > 100 * fast["parts"]["prefill"]["products_s"]


def test_a_plan_needs_a_model(capsys):
    assert main(["--plan"]) == 2
    assert "--plan needs a model" in capsys.readouterr().err
