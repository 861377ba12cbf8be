import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from cpinfer_tools.explain import main

ROOT = Path(__file__).parents[2]
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

# Rank by rank (query heads, stored KV heads, shard, part), 8 query heads over 2 KV heads.
TABLES = {
    (2, 2, 2): "q0-3/k0/s0/p0 q4-7/k1/s0/p0 q0-3/k0/s1/p1 q4-7/k1/s1/p1",
    (2, 2, 4): "q0-3/k0-1/s0/p0 q4-7/k0-1/s2/p0 q0-3/k0-1/s1/p1 q4-7/k0-1/s3/p1",
    (4, 2, 2): "q0-1/k0/s0/p0 q2-3/k0/s0/p0 q4-5/k1/s0/p0 q6-7/k1/s0/p0 "
    "q0-1/k0/s1/p1 q2-3/k0/s1/p1 q4-5/k1/s1/p1 q6-7/k1/s1/p1",
    (4, 2, 4): "q0-1/k0/s0/p0 q2-3/k0/s2/p0 q4-5/k1/s0/p0 q6-7/k1/s2/p0 "
    "q0-1/k0/s1/p1 q2-3/k0/s3/p1 q4-5/k1/s1/p1 q6-7/k1/s3/p1",
    (8, 1, 2): "q0/k0/s0/p0 q1/k0/s1/p0 q2/k0/s0/p0 q3/k0/s1/p0 q4/k1/s0/p0 q5/k1/s1/p0 q6/k1/s0/p0 q7/k1/s1/p0",
}
# The same with one KV head: k0 everywhere.
TWINS = {sizes: table.replace("k0-1", "k0").replace("k1", "k0") for sizes, table in TABLES.items()}
COPIES = {1: {(2, 2, 2): 2, (2, 2, 4): 1, (4, 2, 2): 4, (4, 2, 4): 2, (8, 1, 2): 4}}
COPIES[2] = {(2, 2, 2): 1, (2, 2, 4): 1, (4, 2, 2): 2, (4, 2, 4): 1, (8, 1, 2): 2}


@pytest.fixture
def explain(capsys):
    """Runs the tool with `--json`: (exit code, the JSON of the last line, what was printed before it, stderr)."""

    def run(*flags):
        code = main([*map(str, flags), "--json"])
        out, err = capsys.readouterr()
        *text, last = out.splitlines()
        return code, json.loads(last), "\n".join(text), err

    return run


def layout(tp, pcp, dcp, q=8, kv=2, **more):
    return flags_of({"tp": tp, "pcp": pcp, "dcp": dcp, "num-q-heads": q, "num-kv-heads": kv, **more})


def flags_of(values):
    return [part for name, value in values.items() for part in (f"--{name}", value)]


def span(cell):
    """The heads that "q0-3" or "k1" names."""
    first, _, last = cell[1:].partition("-")
    return list(range(int(first), int(last or first) + 1))


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
    "model_type": "qwen2",
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
    assert (code, answer["valid"], answer["errors"]) == (0, True, [])
    tp = sizes[0]
    for rank, (cell, got) in enumerate(zip(tables[sizes].split(), answer["ranks"], strict=True)):
        q, k, s, p = cell.split("/")
        stored = span(k)
        assert got == {
            "rank": rank,
            "dp_rank": 0,
            "pcp_rank": rank // tp,
            "tp_rank": rank % tp,
            "q_heads": span(q),
            "kv_heads": stored,
            "kv_shard": int(s[1:]),
            "prefill_part": int(p[1:]),
            "home": 0,
            "kv_copies": [COPIES[kv][sizes]] * len(stored),
        }
        assert f"{rank}: {cell}" in text


def test_where_only_some_groups_mix_heads_each_rank_shows_what_its_own_group_stores(explain):
    """TP6 DCP2 over 2 KV heads: the group of ranks 2 and 3 alone has both."""
    _, answer, text, _ = explain(*layout(6, 1, 2, q=12))
    assert [place["kv_heads"] for place in answer["ranks"]] == [[0], [0], [0, 1], [0, 1], [1], [1]]
    # Head 0 of shard 0 is on rank 0 and on rank 2, and so are both heads of both shards: always on two ranks.
    assert [place["kv_copies"] for place in answer["ranks"]] == [[2], [2], [2, 2], [2, 2], [2], [2]]
    assert "each (KV head, shard) stored twice" in text
    assert "up to 2, and computes 1" in text


def test_copies_of_a_head_may_differ_from_those_of_its_neighbour(explain):
    """TP6 DCP3 over 3 KV heads: both groups store head 1, one each the others."""
    _, answer, text, _ = explain(*layout(6, 1, 3, q=12, kv=3))
    assert [place["kv_heads"] for place in answer["ranks"]] == [[0, 1]] * 3 + [[1, 2]] * 3
    assert [place["kv_copies"] for place in answer["ranks"]] == [[1, 2]] * 3 + [[2, 1]] * 3
    assert "each (KV head, shard) stored 1 to 2 times" in text


def test_copies_are_counted_within_a_home_and_a_replica(explain):
    _, answer, text, _ = explain(*layout(2, 4, 2, kv=1, dp=2))
    assert {tuple(place["kv_copies"]) for place in answer["ranks"]} == {(2,)}
    assert "2 homes, each (KV head, shard) stored twice in each" in text


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


def test_a_cache_in_fp8_holds_twice_as_much_and_as_many_bytes_travel(explain, tmp_path):
    model = {"num-layers": 28, "head-dim": 128, "kv-cache-gib": 1, "seq-len": 1000}
    exact = explain(*layout(2, 2, 2, **model))[1]
    code, rounded, text, _ = explain(*layout(2, 2, 2, **model, **{"kv-cache-dtype": "fp8"}))
    assert code == 0 and "bytes of float8_e4m3fn where it is stored" in text
    assert 2 * rounded["kv_bytes_per_token_per_rank"] == exact["kv_bytes_per_token_per_rank"]
    assert rounded["kv_capacity_tokens"] == 2 * exact["kv_capacity_tokens"]
    assert (rounded["prefill"], rounded["decode"]) == (exact["prefill"], exact["decode"])
    path = write_config(tmp_path, QWEN, kv_cache_dtype="fp8_e5m2", kv_cache_gib=1)
    kept = [explain("--config", path, *flags)[1] for flags in ((), ("--kv-cache-dtype", "auto"))]
    assert kept[0]["kv_capacity_tokens"] == 2 * kept[1]["kv_capacity_tokens"]


@pytest.mark.parametrize("sizes, q, stored", [((2, 2, 4), 8, 2), ((6, 1, 2), 12, 2), ((6, 1, 3), 12, 1)])
def test_the_rank_that_stores_the_most_heads_bounds_the_capacity(explain, sizes, q, stored):
    model = {"num-layers": 3, "head-dim": 64, "kv-cache-gib": 1}
    _, answer, _, _ = explain(*layout(*sizes, q=q, **model))
    assert answer["kv_bytes_per_token_per_rank"] == 3 * stored * 2 * 64 * 2
    assert answer["kv_capacity_tokens"] == 2**30 // (16 * 768 * stored) * 16 * sizes[2]


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


@pytest.mark.parametrize("sizes, new_values", [((2, 1, 2), 2 * 128), ((6, 1, 2), 2 * 128), ((6, 1, 3), 0)], ids=str)
def test_groups_that_mix_heads_exchange_new_keys_and_values_whoever_computed_them(explain, sizes, new_values):
    """With pcp=1 too, where an unmixed layout has them everywhere already. A rank sends its own heads alone."""
    tp, _, dcp = sizes
    _, answer, _, _ = explain(*layout(*sizes, q=12, **{"head-dim": 128, "seq-len": 100}))
    peers, hq = dcp - 1, 12 // tp
    assert answer["prefill"]["received_bytes_per_rank_per_layer"] == peers * 100 * new_values * 2 * bool(new_values)
    per_row = peers * ((hq * 128 + new_values) * 2 + hq * 260)
    assert answer["decode"]["received_bytes_per_rank_per_layer_per_row"] == per_row


def test_the_prefill_of_a_mixed_group_gathers_from_all_its_ranks(explain):
    parts = {dcp: explain(*layout(2, 2, dcp, **{"head-dim": 64, "seq-len": 4096}))[1]["prefill"] for dcp in (2, 4)}
    received = {dcp: cost["received_bytes_per_rank_per_layer"] for dcp, cost in parts.items()}
    assert received == {2: 1 * 2048 * 2 * 64 * 2, 4: 3 * 2048 * 2 * 64 * 2}


MLA = {"num-q-heads": 128, "kv-lora-rank": 512, "qk-rope-head-dim": 64}


def mla(tp, pcp, dcp, **more):
    return flags_of({"tp": tp, "pcp": pcp, "dcp": dcp, **MLA, **more})


def test_a_token_of_deepseek_v3_takes_70272_bytes_on_its_rank(explain):
    code, answer, text, _ = explain(*mla(8, 1, 8, **{"num-layers": 61, "kv-cache-gib": 40}))
    assert (code, answer["kv_bytes_per_token_per_rank"]) == (0, 70_272)
    assert answer["kv_capacity_tokens"] == 40 * 2**30 // (16 * 70_272) * 16 * 8
    assert "128 query heads over 1 KV head (the latent)" in text


@pytest.mark.parametrize("tp, pcp", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_copies_of_a_latent_on_all_tp_ranks_become_shards(explain, tp, pcp):
    _, answer, _, _ = explain(*mla(tp, pcp, tp * pcp))
    assert sorted(place["kv_shard"] for place in answer["ranks"]) == list(range(8))
    assert all((place["kv_heads"], place["kv_copies"]) == ([0], [1]) for place in answer["ranks"])
    assert explain(*mla(tp, pcp, pcp))[1]["ranks"][0]["kv_copies"] == [tp]


@pytest.mark.parametrize("pcp, new_values", [(1, 0), (2, 576)])
def test_decode_and_prefill_of_a_latent_count_its_widths(explain, pcp, new_values):
    _, answer, _, _ = explain(*mla(8, pcp, 8, **{"seq-len": 4096}))
    per_row = 7 * ((16 * 576 + new_values) * 2 + 16 * (512 * 2 + 4))
    assert answer["decode"]["received_bytes_per_rank_per_layer_per_row"] == per_row
    assert answer["prefill"]["received_bytes_per_rank_per_layer"] == (pcp - 1) * 2048 * 576 * 2


def test_one_rank_computes_a_prompt_in_one_piece_and_receives_nothing(explain):
    _, answer, text, _ = explain(*layout(1, 1, 1, q=1, kv=1, **{"seq-len": 9, "head-dim": 64}))
    assert answer["prefill"]["pieces"] == [[[0, 9]]]
    assert answer["prefill"]["received_bytes_per_rank_per_layer"] == 0
    assert text.startswith("tp=1 pcp=1 dcp=1 dp=1: 1 rank, 1 query head over 1 KV head")


def test_what_is_not_known_is_null_and_every_key_is_there(explain):
    for flags in (layout(2, 2, 2), layout(2, 2, 4), layout(2, 2, 3), ["--tp", "x"], []):
        _, answer, _, _ = explain(*flags)
        assert list(answer)[: len(KEYS)] == KEYS
        assert answer["kv_capacity_tokens"] is answer["max_concurrency"] is answer["kv_local_lens"] is None


@pytest.mark.parametrize(
    "flags, message",
    [
        (layout(2, 2, 3), "dcp=3 does not fit tp=2, pcp=2"),
        (mla(4, 2, 8, **{"num-kv-heads": 128}), "--num-kv-heads 128, but MLA caches one latent head"),
        (mla(4, 2, 8, **{"head-dim": 128}), "MLA caches no heads of --head-dim"),
        (mla(3, 1, 3), "128 query heads do not divide over tp=3"),
        (layout(2, 2, 2, **{"kv-lora-rank": 512}), "Pass both --kv-lora-rank and --qk-rope-head-dim"),
        (layout(2, 2, 2, **{"qk-rope-head-dim": 64}), "Pass both --kv-lora-rank and --qk-rope-head-dim"),
        (layout(3, 1, 1), "do not divide over tp=3"),
        (layout(0, 1, 1), "tp=0 is not a positive number"),
        (layout(2, 2, 2, interleave=0), "interleave=0 must be at least 1"),
        (["--tp", "2"], "Pass --num-q-heads and --num-kv-heads"),
        (layout(2, 2, "x"), "argument --dcp: invalid int value: 'x'"),
        (layout(2, 2, 2, **{"seq-len": 0}), 'argument --seq-len: unknown length "0"'),
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


def test_without_json_there_is_none(capsys):
    assert main(list(map(str, layout(2, 2, 2)))) == 0
    assert "{" not in capsys.readouterr().out
    assert main(list(map(str, layout(2, 2, 3)))) == 2
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


@pytest.mark.parametrize(
    "kinds", [{"layer_types": [*["linear_attention"] * 3, "full_attention"]}, {"full_attention_interval": 4}]
)
def test_layers_of_linear_attention_cache_no_keys(explain, tmp_path, kinds):
    _, answer, _, _ = explain("--config", write_config(tmp_path, QWEN | {"model_type": "qwen3_next"} | kinds))
    assert answer["kv_bytes_per_token_per_rank"] == 1 * 2 * 2 * 32 * 2


LINEAR = {
    "model_type": "qwen3_5_text",
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}


@pytest.mark.parametrize(("provider", "share"), [("autotp", 2), ("transformers", 1)])
def test_states_of_sequences_are_told_beside_kv_and_taken_out_of_its_budget(explain, tmp_path, provider, share):
    path = write_config(
        tmp_path,
        QWEN | LINEAR,
        tensor_parallel={"tp_size": 2, "provider": provider},
        prefill_context_parallel_size=2,
        max_num_seqs=5,
        kv_cache_gib=2**-10,
    )
    _, answer, text, _ = explain("--config", path)
    per_state = 3 * (4 * 16 * 8 * 4 + 3 * (2 * 2 * 16 + 4 * 8) * 2) // share
    assert answer["state_bytes_per_sequence"] == per_state
    assert answer["max_states"] == 6  # three on each of two ranks
    per_block = 16 * answer["kv_bytes_per_token_per_rank"]
    assert answer["kv_capacity_tokens"] == (2**20 - 3 * per_state) // per_block * 16 * 2
    assert f"a state of {per_state:,} bytes" in text and "states of 6 sequences" in text
    (tmp_path / "other").mkdir()
    _, without, text, _ = explain("--config", write_config(tmp_path / "other", QWEN, kv_cache_gib=2**-10))
    assert without["state_bytes_per_sequence"] is without["max_states"] is None and "state" not in text


def test_half_the_budget_is_left_to_kv(explain, tmp_path):
    path = write_config(tmp_path, QWEN | LINEAR, max_num_seqs=10**6, kv_cache_gib=2**-10)
    _, answer, _, _ = explain("--config", path)
    assert answer["max_states"] == 2**19 // answer["state_bytes_per_sequence"]


def test_the_latent_of_a_deepseek_config_is_its_one_kv_head_whatever_heads_it_names(explain, tmp_path):
    model = QWEN | {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 8,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "head_dim": 8,
    }
    path = write_config(tmp_path, model, tensor_parallel={"tp_size": 4}, decode_context_parallel_size=4)
    code, answer, text, _ = explain("--config", path)
    assert (code, answer["kv_bytes_per_token_per_rank"]) == (0, 4 * (32 + 8) * 2)
    assert "8 query heads over 1 KV head (the latent)" in text
    assert explain("--config", path, "--num-kv-heads", 1)[0] == 0
    assert explain("--config", path, "--qk-rope-head-dim", 16)[1]["kv_bytes_per_token_per_rank"] == 4 * (32 + 16) * 2
    assert "one latent head" in explain("--config", path, "--num-kv-heads", 8)[1]["errors"][0]


def test_a_config_whose_lora_rank_is_null_has_no_latent(explain, tmp_path):
    _, answer, _, _ = explain("--config", write_config(tmp_path, QWEN | {"kv_lora_rank": None, "qk_rope_head_dim": 8}))
    assert answer["ranks"][0]["kv_heads"] == [0, 1]


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
    code, answer, _, _ = explain("--config", path, *flags_of(MLA))
    assert (code, answer["ranks"][0]["kv_heads"]) == (0, [0])


@pytest.mark.parametrize(
    "model, message",
    [
        ({"text_config": QWEN}, 'no "model_type"'),
        ({"model_type": "qwen2"}, "Pass --num-q-heads"),
        (QWEN | {"num_attention_heads": "eight"}, '"num_attention_heads" is "eight"'),
        (QWEN | {"kv_lora_rank": 512}, "Pass both --kv-lora-rank and --qk-rope-head-dim"),
        (QWEN | {"kv_lora_rank": 0, "qk_rope_head_dim": 64}, '"kv_lora_rank" is 0'),
    ],
)
def test_a_model_config_that_cannot_be_read_is_named(explain, tmp_path, model, message):
    code, answer, _, _ = explain("--config", write_config(tmp_path, model))
    assert code == 2
    assert message in answer["errors"][0]


def test_the_tool_runs_from_a_checkout_and_imports_numpy_alone(tmp_path):
    """Every import beyond numpy and the tree is listed."""
    code = (
        "import runpy, sys; before = set(sys.modules); sys.argv[1:] = sys.argv[2:]\n"
        f"try: runpy.run_path({str(ROOT / 'tools' / 'explain.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "print(sorted(new), sys.modules['cpinfer'].__file__)"
    )
    flags = map(str, layout(2, 2, 2, **{"seq-len": 100}))
    done = subprocess.run(
        [sys.executable, "-c", code, "explain.py", *flags],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"['cpinfer', 'cpinfer_tools', 'numpy'] {ROOT / 'cpinfer' / '__init__.py'}"


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


def test_the_list_marks_mixed_layouts_and_takes_a_latent_for_one_kv_head(explain):
    _, answer, text, _ = explain("--gpus", 4, "--tp", 2, "--pcp", 2, "--num-q-heads", 8, "--num-kv-heads", 2)
    assert [(row["dcp"], row["mixed"]) for row in answer["long_prompt"]] == [(2, False), (4, True), (1, False)]
    assert "m     2    2    4    1 |" in text
    _, answer, text, _ = explain("--gpus", 8, *flags_of(MLA))
    assert {"tp": 4, "pcp": 2, "dcp": 8, "advised": True, "mixed": False}.items() <= answer["long_prompt"][0].items()
    assert not any(row["mixed"] for row in answer["long_prompt"])


def test_given_sizes_narrow_the_list_and_a_machine_without_a_legal_layout_is_an_error(explain):
    _, answer, _, _ = explain("--gpus", 8, "--tp", 4, "--dp", 1, "--num-q-heads", 64, "--num-kv-heads", 8)
    # Mixed groups (dcp 4 and 8) hold as much as dcp=2, for more traffic; dcp=1 holds half.
    found = [(row["tp"], row["pcp"], row["dcp"]) for row in answer["long_prompt"]]
    assert found == [(4, 2, 2), (4, 2, 4), (4, 2, 8), (4, 2, 1)]
    code, answer, text, _ = explain("--gpus", 8, "--tp", 3, "--num-q-heads", 64, "--num-kv-heads", 8)
    assert (code, answer["valid"], text) == (2, False, "")
    assert "no legal layout with tp=3" in answer["errors"][0]


@pytest.mark.parametrize(
    "model, flags, message",
    [
        (QWEN | {"model_type": "mamba2"}, (), "recurrent and hybrid models"),
        (QWEN | {"model_type": "qwen9", "auto_map": {"AutoModel": "x"}}, (), "models that bring code of their own"),
        (QWEN | {"model_type": "qwen9"}, (), "model families without a row"),
        (QWEN | {"rope_scaling": {"rope_type": "longrope"}}, (), "RoPE whose frequencies depend on the longest"),
        (QWEN | {"model_type": "olmo2"}, ("--tp", 2), "tensor parallelism of families whose code"),
        (QWEN | {"model_type": "cohere", "use_qk_norm": True}, ("--tp", 2), "normalised over all heads"),
        (QWEN | {"model_type": "olmo2"}, ("--gpus", 4, "--tp", 4), "tensor parallelism of families whose code"),
    ],
)
def test_what_the_tools_refuse_is_refused_here(explain, tmp_path, model, flags, message):
    """In a config's words alone, as the one table has it; the same family at tp=1 is explained."""
    path = write_config(tmp_path, model)
    code, answer, text, _ = explain("--config", path, *flags)
    assert (code, answer["valid"], text) == (2, False, "")
    assert message in answer["errors"][0]
    if flags:
        assert explain("--config", path)[0] == 0


def test_layouts_that_a_family_cannot_run_are_left_out_of_the_list_and_told(explain, tmp_path):
    path = write_config(tmp_path, QWEN | {"model_type": "olmo2"})
    code, answer, text, _ = explain("--gpus", 4, "--config", path)
    assert code == 0
    assert {row["tp"] for row in answer["long_prompt"]} == {1}
    assert 'layouts refused, as model_type "olmo2" with tp=2' in text


def test_a_model_folder_needs_no_config_beside_it(explain, tmp_path):
    write_config(tmp_path, QWEN)
    code, answer, _, _ = explain("--model", tmp_path / "model", "--tp", 2)
    assert (code, answer["kv_bytes_per_token_per_rank"]) == (0, 4 * 1 * 2 * 32 * 2)


def test_a_budget_shows_in_the_list_as_the_tokens_of_the_longest_sequence(explain):
    known = {"num-q-heads": 8, "num-kv-heads": 2, "num-layers": 2, "head-dim": 64}
    _, answer, text, _ = explain("--gpus", 4, *flags_of(known), "--kv-cache-gib", 1)
    assert "tokens of the longest seq" in text
    for row in answer["many_sequences"]:
        sizes = (row["tp"], row["pcp"], row["dcp"])
        alone = explain(*layout(*sizes, dp=row["dp"], **known, **{"kv-cache-gib": 1}))[1]
        assert row["kv_capacity_tokens"] == alone["kv_capacity_tokens"] > 0
    _, answer, text, _ = explain("--gpus", 4, *flags_of(known))
    assert "tokens of the longest seq" not in text and answer["long_prompt"][0]["kv_capacity_tokens"] is None


def test_tensor_parallelism_across_hosts_is_marked_comes_last_and_is_never_advised(explain):
    heads = ("--num-q-heads", 64, "--num-kv-heads", 8)
    _, answer, text, _ = explain("--gpus", 32, *heads, "--gpus-per-host", 8)
    for order in (answer["long_prompt"], answer["many_sequences"]):
        spans = [row["tp"] > 8 for row in order]
        assert spans == sorted(spans) and any(spans)
        assert [row["tp_spans_hosts"] for row in order] == spans
        assert not any(row["advised"] for row in order if row["tp"] > 8)
    assert "h    16    2    4    1 |" in text
    # Without hosts nobody knows.
    _, answer, _, _ = explain("--gpus", 32, *heads)
    assert any(row["advised"] and row["tp"] > 8 for row in answer["long_prompt"])


def test_sizes_under_other_names_are_read_like_all(explain, tmp_path):
    kimi = {
        "model_type": "kimi_linear",
        "num_attention_heads": 4,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "layer_types": LINEAR["layer_types"],
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "model_max_length": 512,
        "linear_num_heads": 4,
        "linear_head_dim": 16,
        "linear_conv_kernel_dim": 4,
    }
    _, answer, _, _ = explain("--config", write_config(tmp_path, kimi, kv_cache_gib=2**-10))
    assert answer["state_bytes_per_sequence"] == 3 * (4 * 16 * 16 * 4 + 3 * (3 * 4 * 16) * 2)
