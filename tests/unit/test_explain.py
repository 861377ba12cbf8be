import importlib.util
import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from cpinfer.layout.advice import for_long_prompt, for_many_sequences, legal_layouts
from cpinfer.layout.traffic import decode_bytes, decode_collectives, prefill_bytes

TOOL = Path(__file__).parents[2] / "tools" / "explain.py"
KEYS = [
    "valid",
    "errors",
    "groups",
    "ranks",
    "kv_local_lens",
    "kv_bytes_per_token_per_rank",
    "kv_capacity_tokens",
    "kv_capacity_tokens_total",
    "max_concurrency",
]

# Rank by rank (query heads, KV heads, shard, part), 8 query heads over 2 KV heads; None where that mixes heads.
TABLES = {
    (2, 2, 2): "q0-3/k0/s0/p0 q4-7/k1/s0/p0 q0-3/k0/s1/p1 q4-7/k1/s1/p1",
    (2, 2, 4): None,
    (4, 2, 2): "q0-1/k0/s0/p0 q2-3/k0/s0/p0 q4-5/k1/s0/p0 q6-7/k1/s0/p0 "
    "q0-1/k0/s1/p1 q2-3/k0/s1/p1 q4-5/k1/s1/p1 q6-7/k1/s1/p1",
    (4, 2, 4): "q0-1/k0/s0/p0 q2-3/k0/s2/p0 q4-5/k1/s0/p0 q6-7/k1/s2/p0 "
    "q0-1/k0/s1/p1 q2-3/k0/s3/p1 q4-5/k1/s1/p1 q6-7/k1/s3/p1",
    (8, 1, 2): "q0/k0/s0/p0 q1/k0/s1/p0 q2/k0/s0/p0 q3/k0/s1/p0 q4/k1/s0/p0 q5/k1/s1/p0 q6/k1/s0/p0 q7/k1/s1/p0",
}
# The same with one KV head: k0 everywhere, and the layout that mixed two heads becomes legal.
TWINS = {sizes: table and table.replace("k1", "k0") for sizes, table in TABLES.items()}
TWINS[2, 2, 4] = "q0-3/k0/s0/p0 q4-7/k0/s2/p0 q0-3/k0/s1/p1 q4-7/k0/s3/p1"
COPIES = {1: {(2, 2, 2): 2, (2, 2, 4): 1, (4, 2, 2): 4, (4, 2, 4): 2, (8, 1, 2): 4}}
COPIES[2] = {(2, 2, 2): 1, (4, 2, 2): 2, (4, 2, 4): 1, (8, 1, 2): 2}


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("explain_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    path = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules[spec.name]


@pytest.fixture
def explain(tool, capsys):
    """Runs the tool with `--json`: (exit code, the JSON of the last line, what was printed before it, stderr)."""

    def run(*flags):
        code = tool.main([*map(str, flags), "--json"])
        out, err = capsys.readouterr()
        *text, last = out.splitlines()
        return code, json.loads(last), "\n".join(text), err

    return run


def layout(tp, pcp, dcp, q=8, kv=2, **more):
    flags = {"tp": tp, "pcp": pcp, "dcp": dcp, "num-q-heads": q, "num-kv-heads": kv, **more}
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


def write_config(folder, model=None, **keys):
    """A rollout config. `model`: a hub id, or what the config.json of a folder beside it holds."""
    if isinstance(model, dict):
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps(model))
        model = "model"
    keys["model"] = model
    path = folder / "rollout.json"
    path.write_text(json.dumps(keys))
    return path


QWEN = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "max_position_embeddings": 4096,
}


@pytest.mark.parametrize("kv, tables", [(2, TABLES), (1, TWINS)])
@pytest.mark.parametrize("sizes", TABLES, ids=str)
def test_every_rank_of_the_known_tables_holds_what_they_print(explain, kv, tables, sizes):
    code, answer, text, _ = explain(*layout(*sizes, kv=kv))
    if tables[sizes] is None:
        assert (code, answer["valid"], answer["ranks"]) == (2, False, None)
        assert "mix KV heads" in answer["errors"][0]
        return
    assert (code, answer["valid"], answer["errors"]) == (0, True, [])
    tp = sizes[0]
    for rank, (cell, got) in enumerate(zip(tables[sizes].split(), answer["ranks"], strict=True)):
        q, k, s, p = cell.split("/")
        first, last = q[1:].split("-") if "-" in q else (q[1:], q[1:])
        assert got == {
            "rank": rank,
            "dp_rank": 0,
            "pcp_rank": rank // tp,
            "tp_rank": rank % tp,
            "q_heads": list(range(int(first), int(last) + 1)),
            "kv_heads": [int(k[1:])],
            "kv_shard": int(s[1:]),
            "prefill_part": int(p[1:]),
            "home": 0,
            "kv_copies": COPIES[kv][sizes],
        }
        assert f"{rank}: {cell}" in text


def test_groups_are_printed_in_shard_order(explain):
    _, answer, _, _ = explain(*layout(4, 2, 4))
    assert answer["groups"] == {
        "tp": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "pcp": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "dcp": [[0, 4, 1, 5], [2, 6, 3, 7]],
    }


def test_the_table_is_drawn_as_in_the_design(explain):
    _, _, text, _ = explain(*layout(2, 2, 2))
    drawn = [
        "       tp0                tp1",
        "pcp0 | 0: q0-3/k0/s0/p0 | 1: q4-7/k1/s0/p0 |",
        "pcp1 | 2: q0-3/k0/s1/p1 | 3: q4-7/k1/s1/p1 |",
    ]
    assert "\n".join(drawn) in text


def test_each_dp_replica_has_a_table_of_its_own_and_homes_are_named(explain):
    code, answer, text, _ = explain(*layout(1, 4, 2, dp=2))
    assert code == 0
    assert text.count("pcp0 |") == 2
    assert [place["home"] for place in answer["ranks"]] == [0, 0, 1, 1] * 2
    assert [place["dp_rank"] for place in answer["ranks"]] == [0] * 4 + [1] * 4
    assert "7: q0-7/k0-1/s1/p3/h1" in text


@pytest.mark.parametrize(
    "dcp, gib, tokens, sequences",
    [(1, 12.674468994140625, 949_296, 115.9), (2, 12.65887451171875, 1_896_256, 231.5)],
)
def test_a_budget_holds_the_known_number_of_tokens(explain, dcp, gib, tokens, sequences):
    model = {"num-layers": 28, "head-dim": 128, "dtype": "bfloat16", "kv-cache-gib": gib, "max-model-len": 8192}
    code, answer, text, _ = explain(*layout(2, 1, dcp, kv=1, **model))
    assert code == 0
    assert answer["kv_bytes_per_token_per_rank"] == 14336
    assert answer["kv_capacity_tokens"] == answer["kv_capacity_tokens_total"] == tokens
    assert round(answer["max_concurrency"], 1) == sequences
    assert f"{tokens:,} tokens: {sequences} sequences of 8,192" in text


def test_homes_multiply_the_total_and_not_the_longest_sequence(explain):
    model = {"num-layers": 2, "head-dim": 64, "kv-cache-gib": 1, "max-model-len": 1000}
    two = explain(*layout(1, 4, 2, **model))[1]
    one = explain(*layout(1, 4, 4, **model))[1]
    assert two["kv_capacity_tokens_total"] == 2 * two["kv_capacity_tokens"] == one["kv_capacity_tokens"]
    assert two["max_concurrency"] == two["kv_capacity_tokens_total"] / 1000


def test_a_sequence_is_dealt_to_shards_by_the_known_answer(explain):
    _, answer, _, _ = explain(*layout(1, 4, 4, interleave=8, **{"seq-len": 25}))
    assert answer["kv_local_lens"] == [8, 8, 8, 1]


def test_interleave_defaults_to_the_block_size(explain):
    _, answer, _, _ = explain(*layout(1, 2, 2, **{"block-size": 4, "seq-len": 10}))
    assert answer["kv_local_lens"] == [6, 4]


def test_prefill_pieces_partition_the_prompt_and_show_their_balance(explain):
    _, answer, text, _ = explain(*layout(1, 4, 4, **{"seq-len": 4096, "head-dim": 64}))
    prefill = answer["prefill"]
    assert sorted(chain(*prefill["pieces"])) == [[i * 512, (i + 1) * 512] for i in range(8)]
    assert prefill["max_over_mean_work"] == 1.0
    assert prefill["received_bytes_per_rank_per_layer"] == 3 * 1024 * 2 * 2 * 64 * 2
    assert "[0, 512) + [3,584, 4,096)" in text


@pytest.mark.parametrize(
    "sizes, per_row", [((2, 1, 1), 0), ((2, 1, 2), 4 * 256 + 4 * 260), ((2, 2, 2), 6 * 256 + 4 * 260)]
)
def test_decode_traffic_packs_keys_only_where_they_must_travel(explain, sizes, per_row):
    _, answer, _, _ = explain(*layout(*sizes, kv=1, **{"head-dim": 128}))
    assert answer["decode"]["collectives_per_layer"] == (0 if sizes[2] == 1 else 2)
    assert answer["decode"]["received_bytes_per_rank_per_layer_per_row"] == per_row


def test_traffic_formulas_are_those_of_the_design():
    S, R, hq, kvl, D, b = 4, 3, 8, 2, 64, 2
    for pcp, w in ((1, 0), (2, 2 * kvl), (4, 2 * kvl)):
        got = decode_bytes(S, R, hq, kvl, D, b, pcp)
        assert got == ((S - 1) * R * (hq + w) * D * b, (S - 1) * R * hq * (D * b + 4))
        assert got.total == sum(got)
    assert decode_bytes(S, R, hq, kvl, D, b, 1, wire_bytes=4).all_to_all == (S - 1) * R * hq * (D * 4 + 4)
    assert decode_bytes(1, R, hq, kvl, D, b, 4).total == 0
    assert [decode_collectives(s) for s in (1, 2, 8)] == [0, 2, 2]
    assert prefill_bytes(4, 100, kvl, D, b) == 3 * 100 * 2 * kvl * D * b
    assert prefill_bytes(1, 100, kvl, D, b) == 0


def test_one_rank_computes_a_prompt_in_one_piece_and_receives_nothing(explain):
    _, answer, text, _ = explain(*layout(1, 1, 1, q=1, kv=1, **{"seq-len": 9, "head-dim": 64}))
    assert answer["prefill"]["pieces"] == [[[0, 9]]]
    assert answer["prefill"]["received_bytes_per_rank_per_layer"] == 0
    assert text.startswith("tp=1 pcp=1 dcp=1 dp=1: 1 rank, 1 query head over 1 KV head")


def test_what_is_not_known_is_null_and_every_key_is_there(explain):
    for flags in (layout(2, 2, 2), layout(2, 2, 4), ["--tp", "x"], []):
        _, answer, _, _ = explain(*flags)
        assert list(answer)[: len(KEYS)] == KEYS
        assert answer["kv_capacity_tokens"] is answer["max_concurrency"] is answer["kv_local_lens"] is None


@pytest.mark.parametrize(
    "flags, message",
    [
        (layout(2, 2, 3), "dcp=3 does not fit tp=2, pcp=2"),
        (layout(2, 2, 4), "mix KV heads"),
        (layout(3, 1, 1), "do not divide over tp=3"),
        (layout(0, 1, 1), "tp=0 is not a positive number"),
        (layout(2, 2, 2, interleave=0), "interleave=0 must be at least 1"),
        (["--tp", "2"], "Pass --num-q-heads and --num-kv-heads"),
        (layout(2, 2, "x"), "argument --dcp: invalid int value: 'x'"),
        (layout(2, 2, 2, **{"seq-len": 0}), "argument --seq-len: 0 must be at least 1"),
        (layout(2, 2, 2, **{"kv-cache-gib": -1}), "argument --kv-cache-gib: -1 must be above 0"),
        (layout(2, 2, 2, dtype="int8"), "argument --dtype: invalid choice: 'int8'"),
        ([*layout(2, 2, 2), "--nonsense"], "unrecognized arguments: --nonsense"),
        (["--config", "/nowhere.json"], "config /nowhere.json"),
    ],
)
def test_a_bad_layout_or_flag_exits_2_with_the_reason_in_words_and_in_json(explain, flags, message):
    code, answer, text, err = explain(*flags)
    assert (code, answer["valid"], text) == (2, False, "")
    assert any(message in error for error in answer["errors"]), answer["errors"]
    assert message in err


def test_without_json_there_is_none(tool, capsys):
    assert tool.main(list(map(str, layout(2, 2, 2)))) == 0
    assert "{" not in capsys.readouterr().out
    assert tool.main(list(map(str, layout(2, 2, 4)))) == 2
    assert capsys.readouterr().out == ""


def test_config_and_its_model_folder_say_everything(explain, tmp_path):
    path = write_config(
        tmp_path,
        QWEN,
        dtype="float32",
        tensor_parallel={"tp_size": 2},
        prefill_context_parallel_size=2,
        block_size=32,
        cp_kv_cache_interleave_size=8,
        data_parallel_size=2,
        kv_cache_gib=0.5,
    )
    code, answer, text, _ = explain("--config", path, "--seq-len", 25)
    assert code == 0
    assert text.startswith("tp=2 pcp=2 dcp=2 dp=2: 8 ranks, 8 query heads over 2 KV heads")
    assert answer["kv_local_lens"] == [16, 9]
    assert answer["kv_bytes_per_token_per_rank"] == 4 * 1 * 2 * 32 * 4
    assert answer["kv_capacity_tokens"] == 2**29 // (1024 * 32) * 32 * 2
    assert answer["max_concurrency"] == answer["kv_capacity_tokens"] / 4096


def test_config_defaults_are_dcp_of_pcp_and_interleave_of_block_size(explain, tmp_path):
    path = write_config(tmp_path, QWEN, prefill_context_parallel_size=4, block_size=2)
    _, answer, _, _ = explain("--config", path, "--seq-len", 10)
    assert answer["kv_local_lens"] == [4, 2, 2, 2]


def test_head_dim_of_the_model_wins_over_the_quotient_and_missing_kv_heads_mean_as_many_as_queries(explain, tmp_path):
    model = {k: v for k, v in QWEN.items() if k != "num_key_value_heads"} | {"head_dim": 64}
    _, answer, _, _ = explain("--config", write_config(tmp_path, model))
    assert answer["kv_bytes_per_token_per_rank"] == 4 * 8 * 2 * 64 * 2
    assert answer["ranks"][0]["kv_heads"] == list(range(8))


def test_flags_win_over_config_and_model(explain, tmp_path):
    path = write_config(tmp_path, QWEN, tensor_parallel={"tp_size": 2}, prefill_context_parallel_size=2)
    _, answer, text, _ = explain("--config", path, *layout(4, 1, 1, q=16, kv=4))
    assert len(answer["ranks"]) == 4
    assert text.startswith("tp=4 pcp=1 dcp=1 dp=1: 4 ranks, 16 query heads over 4 KV heads")


def test_a_hub_id_needs_the_heads_as_flags(explain, tmp_path):
    path = write_config(tmp_path, "Qwen/Qwen2.5-0.5B", prefill_context_parallel_size=2)
    code, answer, _, _ = explain("--config", path)
    assert code == 2
    assert "Pass --num-q-heads" in answer["errors"][0]
    code, answer, _, _ = explain("--config", path, "--num-q-heads", 14, "--num-kv-heads", 2)
    assert (code, len(answer["ranks"])) == (0, 2)


@pytest.mark.parametrize(
    "model, message",
    [
        ({"text_config": QWEN}, "Pass --num-q-heads"),
        (QWEN | {"num_attention_heads": "eight"}, '"num_attention_heads" is "eight"'),
        (QWEN | {"kv_lora_rank": 512}, "MLA"),
    ],
)
def test_a_model_config_that_cannot_be_read_is_named(explain, tmp_path, model, message):
    code, answer, _, _ = explain("--config", write_config(tmp_path, model))
    assert code == 2
    assert message in answer["errors"][0]


def test_the_tool_runs_from_a_checkout_without_an_installed_cpinfer_and_imports_numpy_alone(tmp_path):
    """`-I` hides the current folder and the environment; every import beyond numpy and the tree is listed."""
    code = (
        "import runpy, sys; before = set(sys.modules); sys.argv[1:] = sys.argv[2:]\n"
        f"try: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "print(sorted(new), sys.modules['cpinfer'].__file__)"
    )
    flags = map(str, layout(2, 2, 2, **{"seq-len": 100}))
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, "explain.py", *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"['cpinfer', 'numpy'] {TOOL.parents[1] / 'cpinfer' / '__init__.py'}"


def test_all_listed_layouts_use_every_gpu_are_valid_and_follow_both_orders(explain):
    code, answer, text, _ = explain("--gpus", 8, "--num-q-heads", 64, "--num-kv-heads", 8)
    assert code == 0
    long_prompt, many = answer["long_prompt"], answer["many_sequences"]
    assert sorted(map(str, long_prompt)) == sorted(map(str, many))
    for row in long_prompt:
        assert row["tp"] * row["pcp"] * row["dp"] == 8
        sizes = (row["tp"], row["pcp"], row["dcp"])
        assert explain(*layout(*sizes, q=64, kv=8, dp=row["dp"]))[0] == 0
    assert {"tp": 4, "pcp": 2, "dcp": 2, "dp": 1, "advised": True}.items() <= long_prompt[0].items()
    assert {"tp": 1, "pcp": 8, "dcp": 1, "dp": 1}.items() <= many[0].items()
    assert "published advice" in text


@pytest.mark.parametrize("kv, dcp", [(8, 2), (4, 2), (2, 4), (1, 8)])
def test_the_published_advice_is_pcp_2_and_all_copies_of_a_head_made_shards(kv, dcp):
    """GQA: tp / num_kv_heads shards per pcp rank; MLA, one head: all tp ranks."""
    best = for_long_prompt(legal_layouts(8, 64, kv, tp_size=4))[0]
    assert best.is_advised
    assert (best.sizes.pcp_size, best.sizes.dcp_size) == (2, dcp)


def test_layouts_that_store_copies_rank_below_those_that_do_not_for_many_sequences():
    order = for_many_sequences(legal_layouts(8, 64, 2))
    totals = [option.total_tokens for option in order]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] == 4 * totals[-1]


def test_given_sizes_narrow_the_list_and_a_machine_without_a_legal_layout_is_an_error(explain):
    _, answer, _, _ = explain("--gpus", 8, "--tp", 4, "--dp", 1, "--num-q-heads", 64, "--num-kv-heads", 8)
    assert [(row["tp"], row["pcp"], row["dcp"]) for row in answer["long_prompt"]] == [(4, 2, 2), (4, 2, 1)]
    code, answer, text, _ = explain("--gpus", 8, "--tp", 3, "--num-q-heads", 64, "--num-kv-heads", 8)
    assert (code, answer["valid"], text) == (2, False, "")
    assert "no legal layout with tp=3" in answer["errors"][0]
