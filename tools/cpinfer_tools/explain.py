"""Explains a layout before anything runs: grid, groups, heads, KV shards, prefill parts, capacity and traffic.

    cpinfer explain --tp 2 --pcp 2 --dcp 2 --num-q-heads 8 --num-kv-heads 2 --seq-len 1000
    cpinfer explain --config configs/pcp2_dcp2.json --json
    cpinfer explain --gpus 8 --num-q-heads 64 --num-kv-heads 8
    cpinfer explain --tp 4 --pcp 2 --dcp 8 --num-q-heads 128 --kv-lora-rank 512 --qk-rope-head-dim 64
    cpinfer explain --plan --model FOLDER --machine h100 --gpus 16 --seq-len 32k --batch 64 --new-tokens 1k

Nothing is measured and no device is needed. numpy is enough: `PYTHONPATH=. python tools/explain.py` from a checkout.
The second form reads a rollout config and the `config.json` of its model; flags win over both. The third lists the
legal layouts of a machine, best first. The fourth is a model with MLA (DeepSeek): its cache is one latent head, whose
copies on all tp ranks can become shards. The last says which layouts of a machine fit a model, and what prefill and
decode would take, and wait for, in each; it alone needs torch and Transformers, to build the model without weights.
With `--json` the last line of stdout is one JSON object. Exit 0 for a legal layout, 2 for one that is not and for
models that are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cpinfer.config import KV_CACHE_DTYPES, EngineConfig, LaunchConfig, TensorParallel, load_as
from cpinfer.errors import UserError
from cpinfer.layout.advice import LayoutOption, for_long_prompt, for_many_sequences, legal_layouts
from cpinfer.layout.capacity import KVLayout, StateLayout
from cpinfer.layout.explain import Explanation, Question, draw_grid, explain, pool_size
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.heads import HeadPlacement
from cpinfer.layout.prefill import assign_prompts
from cpinfer.layout.rules import LayoutSizes
from cpinfer.models.families import FAMILIES, STATE_SIZES
from cpinfer.models.positions import Positions
from cpinfer.models.refused_models import refuse_unsupported, tensor_parallel_errors, why_no_tp
from cpinfer_tools.explain_flags import parse_flags

AXES = ("tp", "pcp", "dcp", "dp")
ADVICE = """\
*  the published advice, in our terms: pcp=2 and dcp = pcp * tp / num_kv_heads while there are copies of KV heads to
   shard, else dcp = pcp; MLA has one KV head, its latent, so dcp = pcp * tp.
m  mixes KV heads in DCP groups, whose ranks then store all of them: sequences get no longer than with the largest
   unmixed dcp of the same tp and pcp, and more travels.
h  a tensor-parallel group spans hosts (--gpus-per-host), whose all-reduces are then the network's; these come last.
Longest sequence and tokens in all are relative to the best. A rank holds 1/tp of the weights, which must fit: --plan
knows weights and machines. In a trainer tp is given, so add --tp."""


@dataclass(frozen=True)
class ModelFacts:
    """What a model's `config.json` says; None where it says nothing. `family`: its model_type, of the table's."""

    family: str | None = None
    norms_all_heads: bool = False
    hidden_size: int | None = None
    num_q_heads: int | None = None
    num_kv_heads: int | None = None
    num_layers: int | None = None
    head_dim: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    max_model_len: int | None = None
    states: StateLayout | None = None


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    result: dict[str, Any]
    try:
        args = parse_flags(argv, prog, __doc__)
        result = _plan(args) if args.plan else _list_layouts(args) if args.gpus else _explain_layout(args)
    except UserError as error:
        result = asdict(Explanation(valid=False, errors=[str(error)]))
    for message in result["errors"]:
        print(f"error: {message}", file=sys.stderr)
    if "--json" in argv:
        sys.stderr.flush()
        print(json.dumps(result))
    return 0 if result["valid"] else 2


def _explain_layout(args: argparse.Namespace) -> dict[str, Any]:
    config = load_as(LaunchConfig, args.config) if args.config else None
    model = _model_facts(args, config)
    question = _question(args, config, model)
    errors = _refused_tp(model, question.sizes.tp_size, config)
    answer = Explanation(valid=False, errors=errors) if errors else explain(question)
    if answer.valid:
        print(describe(question, answer))
    return asdict(answer)


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    from cpinfer_tools.plan import plan  # torch and Transformers, which all else here is quick without

    return plan(args)


def _list_layouts(args: argparse.Namespace) -> dict[str, Any]:
    config = load_as(LaunchConfig, args.config) if args.config else None
    model = _model_facts(args, config)
    latent = _latent(args, model)
    num_q_heads, num_kv_heads = _heads(args, model, latent)
    legal = legal_layouts(
        args.gpus,
        num_q_heads,
        num_kv_heads,
        tp_size=args.tp,
        pcp_size=args.pcp,
        dcp_size=args.dcp,
        dp_size=args.dp,
        kv_head=_kv_head(args, model, latent),
        hidden_size=model.hidden_size,
        ranks_per_host=args.gpus_per_host,
    )
    refused = {o.sizes.tp_size: _refused_tp(model, o.sizes.tp_size, config) for o in legal}
    options = [o for o in legal if not refused[o.sizes.tp_size]]
    title = f"{_count(args.gpus, 'GPU')}, {_count(num_q_heads, 'query head')} over {_count(num_kv_heads, 'KV head')}"
    if legal and not options:
        raise UserError(" ".join(refused[legal[0].sizes.tp_size]))
    if not options:
        sizes = " ".join(f"{axis}={getattr(args, axis)}" for axis in AXES if getattr(args, axis) is not None)
        wish = f" with {sizes}" if sizes else ""
        raise UserError(f"{title}: no legal layout{wish} uses them all. Use another number of GPUs, or other sizes.")
    question = _question(args, config, model)
    pools = {o.sizes: pool_size(replace(question, sizes=o.sizes)) for o in options}
    tokens = {sizes: pool.capacity_tokens if pool else None for sizes, pool in pools.items()}
    print(f"{title}: {_count(len(options), 'legal layout')}, best first.")
    result: dict[str, Any] = {"valid": True, "errors": []}
    orders = (
        ("long_prompt", "a long prompt", for_long_prompt),
        ("many_sequences", "many sequences", for_many_sequences),
    )
    for key, title, best_first in orders:
        order = best_first(options)
        print(f"\nFor {title}:\n{_table(order, tokens)}")
        result[key] = [_plain(option, tokens[option.sizes]) for option in order]
    if len(options) < len(legal):
        told = next(" ".join(errors) for errors in refused.values() if errors)
        print(f"\n{_count(len(legal) - len(options), 'layout')} refused, as {told}")
    print(f"\n{ADVICE}")
    return result


def _refused_tp(model: ModelFacts, tp_size: int, config: LaunchConfig | None) -> list[str]:
    """Why the model's family is not cut over so many tp ranks; nothing where it is, or where no model is known."""
    if model.family is None or model.num_kv_heads is None:
        return []
    why_not = why_no_tp(model.family, norms_all_heads=model.norms_all_heads)
    provider = config.tensor_parallel.provider if config else TensorParallel.provider
    return tensor_parallel_errors(model.family, model.num_kv_heads, why_not, tp_size, provider)


def describe(question: Question, answer: Explanation) -> str:
    """The explanation of a legal layout in prose and tables."""
    sizes = question.sizes
    grid = RankGrid(sizes.tp_size, sizes.pcp_size, sizes.dcp_size, sizes.dp_size)
    heads = HeadPlacement(sizes.num_q_heads, sizes.num_kv_heads, sizes.tp_size)
    assert answer.groups is not None and answer.ranks is not None and answer.decode is not None
    latent = question.kv_head is not None and question.kv_head.v_is_prefix_of_k
    copies, homes = {n for place in answer.ranks for n in place.kv_copies}, grid.num_homes
    lines = [
        f"{sizes} dp={grid.dp_size}: {_count(grid.world_size, 'rank')}, {_count(heads.num_q_heads, 'query head')} over "
        f"{_count(heads.num_kv_heads, 'KV head')}{' (the latent)' if latent else ''}",
        "rank: query heads / stored KV heads / KV shard / prefill part" + (" / home" if homes > 1 else ""),
        "",
        draw_grid(grid, heads),
        "",
        *(f"{axis.ljust(4)}groups  {json.dumps(groups)}" for axis, groups in answer.groups.items()),
        f"shards      {_count(grid.dcp_size, 'shard')}, dealt {_count(sizes.interleave, 'token')} at a time, in blocks "
        f"of {sizes.block_size}; {_count(homes, 'home')}, each (KV head, shard) stored "
        + _times(copies)
        + (" in each" if homes > 1 else ""),
    ]
    if heads.mixes_heads(grid):
        lines.append(
            f"            groups mix KV heads: a rank stores all those of its group, up to "
            f"{heads.max_stored_heads(grid)}, and computes {heads.kv_heads_per_rank}"
        )
    if answer.kv_local_lens is not None:
        lines.append(f"            {question.seq_len:,} tokens: {', '.join(f'{n:,}' for n in answer.kv_local_lens)}")
    lines += _describe_capacity(question, answer, homes)
    lines += _describe_prefill(question, answer)
    decode = answer.decode
    lines.append(
        f"decode      {decode.collectives_per_layer} collectives per layer; sequences of a home dealt over "
        f"{_count(decode.row_ranks, 'pcp rank')}"
    )
    if decode.received_bytes_per_rank_per_layer_per_row is not None:
        lines.append(
            f"            a rank receives {decode.received_bytes_per_rank_per_layer_per_row:,} bytes per layer for "
            "each row dealt to it"
        )
    return "\n".join(lines)


def _describe_capacity(question: Question, answer: Explanation, homes: int) -> list[str]:
    if answer.kv_bytes_per_token_per_rank is None:
        return ["capacity    unknown without --num-layers and --head-dim (MLA: --kv-lora-rank and --qk-rope-head-dim)"]
    lines = [
        f"capacity    a token is {answer.kv_bytes_per_token_per_rank:,} bytes of "
        f"{question.cache_dtype or question.dtype} where it is stored"
    ]
    if answer.state_bytes_per_sequence is not None:
        size = f"{answer.state_bytes_per_sequence:,}"
        lines.append(f"            a sequence has a state of {size} bytes beside it, on one pcp rank")
    if answer.kv_capacity_tokens is None:
        return lines
    lines.append(f"            {question.kv_cache_gib} GiB per rank hold {answer.kv_capacity_tokens:,} tokens")
    if homes > 1:
        lines[-1] += f" in a home, {answer.kv_capacity_tokens_total:,} in {homes}"
    if answer.max_concurrency is not None:
        lines[-1] += f": {answer.max_concurrency:,.1f} sequences of {question.max_model_len:,}"
    if answer.max_states is not None:
        lines.append(f"            and states of {_count(answer.max_states, 'sequence')}, which run at once at most")
    return lines


def _describe_prefill(question: Question, answer: Explanation) -> list[str]:
    cost, seq_len = answer.prefill, question.seq_len
    if cost is None or seq_len is None:
        return []
    lines = []
    for part, pieces in enumerate(cost.pieces):
        label = "prefill" if part == 0 else ""
        ranges = " + ".join(f"[{start:,}, {end:,})" for start, end in pieces) or "nothing"
        lines.append(f"{label.ljust(12)}p{part}  {ranges}: {cost.pairs_per_rank[part]:,} query-key pairs")
    lines.append(f"            max/mean work {cost.max_over_mean_work:.4f}")
    if cost.received_bytes_per_rank_per_layer:
        lines[-1] += f"; a rank receives {cost.received_bytes_per_rank_per_layer:,} bytes per layer in one K/V gather"
    if len(cost.pieces) > 1 and assign_prompts([seq_len], len(cost.pieces)) != [None]:
        lines.append("            (the engine leaves so short a prompt whole on one rank)")
    return lines


def _table(options: Sequence[LayoutOption], tokens: Mapping[LayoutSizes, int | None]) -> str:
    """Rows in the given order; `*` marks the published advice, `m` groups that mix KV heads, `h` tp across hosts."""
    longest = max(o.longest_sequence for o in options)
    most = max(o.total_tokens for o in options)
    header = "     tp  pcp  dcp   dp | longest seq | tokens in all | decode collectives/layer (with TP's) | weights"
    knows_pool = None not in tokens.values()
    if knows_pool:
        header += " | tokens of the longest seq"
    rows = [
        f"{_mark(o)} {s.tp_size:5} {s.pcp_size:4} {s.dcp_size:4} {s.dp_size:4} | {o.longest_sequence / longest:11.3f} "
        f"| {o.total_tokens / most:13.3f} | {o.collectives_per_layer:36} | {f'1/{s.tp_size}':>7}"
        + (f" | {tokens[s]:25,}" if knows_pool else "")
        for o in options
        for s in (o.sizes,)
    ]
    return "\n".join([header, *rows])


def _mark(option: LayoutOption) -> str:
    return "h" if option.tp_spans_hosts else "*" if option.is_advised else "m" if option.is_mixed else " "


def _plain(option: LayoutOption, capacity_tokens: int | None) -> dict[str, Any]:
    sizes = option.sizes
    return {
        "tp": sizes.tp_size,
        "pcp": sizes.pcp_size,
        "dcp": sizes.dcp_size,
        "dp": sizes.dp_size,
        "advised": option.is_advised,
        "mixed": option.is_mixed,
        "longest_sequence": option.longest_sequence,
        "total_tokens": option.total_tokens,
        "collectives_per_layer": option.collectives_per_layer,
        "tp_spans_hosts": option.tp_spans_hosts,
        "kv_capacity_tokens": capacity_tokens,
    }


def _question(args: argparse.Namespace, config: LaunchConfig | None, model: ModelFacts) -> Question:
    """Flags, then the config, then the model's `config.json`, then defaults."""
    latent, tp = _latent(args, model), config.tensor_parallel if config else TensorParallel()
    num_q_heads, num_kv_heads = _heads(args, model, latent)
    pcp = _first(args.pcp, config and config.pcp_size, 1)
    block_size = _first(args.block_size, config and config.block_size, 16)
    sizes = LayoutSizes(
        tp_size=_first(args.tp, config and config.tp_size, 1),
        pcp_size=pcp,
        dcp_size=_first(args.dcp, config and config.decode_context_parallel_size and config.dcp_size, pcp),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        dp_size=_first(args.dp, config and config.data_parallel_size, 1),
        interleave=_first(args.interleave, config and config.cp_kv_cache_interleave_size, block_size),
        block_size=block_size,
    )
    dtype = _first(args.dtype, config and config.dtype, "bfloat16")
    kept = _first(args.kv_cache_dtype, config and config.kv_cache_dtype, "auto")
    return Question(
        sizes,
        num_layers=_first(args.num_layers, model.num_layers),
        kv_head=_kv_head(args, model, latent),
        dtype=dtype,
        cache_dtype=KV_CACHE_DTYPES[kept],
        wire_dtype=config.cp_wire_dtype if config and config.cp_wire_dtype != "auto" else None,
        kv_cache_gib=_first(args.kv_cache_gib, config and config.kv_cache_gib),
        max_model_len=_first(args.max_model_len, model.max_model_len),
        seq_len=args.seq_len,
        states=None if model.states is None else model.states.over(sizes.tp_size if tp.cuts_states else 1),
        max_num_seqs=config.max_num_seqs if config else EngineConfig.max_num_seqs,
    )


def _kv_head(args: argparse.Namespace, model: ModelFacts, latent: KVLayout | None) -> KVLayout | None:
    """What one KV head caches of a token; None where its width is not known."""
    head_dim = _first(args.head_dim, model.head_dim)
    return latent or (KVLayout(1, head_dim, head_dim) if head_dim is not None else None)


def _heads(args: argparse.Namespace, model: ModelFacts, latent: KVLayout | None) -> tuple[int, int]:
    """Query and KV heads; with a `latent` that is the one KV head, whatever the model says of others."""
    num_q_heads = _first(args.num_q_heads, model.num_q_heads)
    num_kv_heads = _first(args.num_kv_heads, latent and latent.num_heads, model.num_kv_heads)
    if num_q_heads is None or num_kv_heads is None:
        raise UserError("the model's heads are unknown. Pass --num-q-heads and --num-kv-heads.")
    return num_q_heads, num_kv_heads


def _latent(args: argparse.Namespace, model: ModelFacts) -> KVLayout | None:
    """What MLA caches: a latent, which serves as V, and behind it the rotated key. None for a model without."""
    rank = _first(args.kv_lora_rank, model.kv_lora_rank)
    rope = _first(args.qk_rope_head_dim, model.qk_rope_head_dim)
    if rank is None and args.qk_rope_head_dim is None:
        return None
    if rank is None or rope is None:
        raise UserError("MLA caches a latent and a rotated key. Pass both --kv-lora-rank and --qk-rope-head-dim.")
    if args.num_kv_heads not in (None, 1):
        raise UserError(
            f"--num-kv-heads {args.num_kv_heads}, but MLA caches one latent head for all query heads. Leave it out."
        )
    if args.head_dim is not None:
        raise UserError("MLA caches no heads of --head-dim. Leave it out: --kv-lora-rank and --qk-rope-head-dim count.")
    return KVLayout(1, rank + rope, rank, v_is_prefix_of_k=True)


def _model_facts(args: argparse.Namespace, config: LaunchConfig | None) -> ModelFacts:
    """Read from the model's folder. UserError when it is none and the flags do not say what is needed."""
    model = args.model or (config.model if config else None)
    if model is None:
        return ModelFacts()
    path = Path(model) / "config.json"
    if not path.is_file():
        if args.num_q_heads is not None and _first(args.num_kv_heads, args.kv_lora_rank) is not None:
            return ModelFacts()
        raise UserError(
            f'model "{model}" is not a folder with a config.json, and nothing is downloaded here. Pass --num-q-heads '
            "and --num-kv-heads (and --num-layers, --head-dim, --max-model-len) beside --config."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}. A Hugging Face config.json was wanted.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}. A Hugging Face config.json was wanted.")

    refuse_unsupported(data)
    family: str = data["model_type"]
    data = FAMILIES[family].with_common_names(data)

    def size(key: str) -> int | None:
        value = data.get(key)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f'{path}: "{key}" is {json.dumps(value)}; a whole number from 1 was wanted.')
        return value

    heads, width = size("num_attention_heads"), size("hidden_size")
    num_layers = size("num_hidden_layers")
    num_kv_layers = _num_kv_layers(data, num_layers, size("full_attention_interval"))
    of_states = [found for name in STATE_SIZES if (found := size(name)) is not None]
    return ModelFacts(
        family=family,
        norms_all_heads=bool(data.get(FAMILIES[family].flag_of_norm_of_all_heads or "")),
        hidden_size=width,
        num_q_heads=heads,
        num_kv_heads=_first(size("num_key_value_heads"), heads),
        num_layers=num_kv_layers,
        head_dim=_first(size("head_dim"), width // heads if width and heads else None),
        kv_lora_rank=size("kv_lora_rank"),
        qk_rope_head_dim=size("qk_rope_head_dim"),
        max_model_len=Positions.of(data, has_table=False).made_for if size("max_position_embeddings") else None,
        states=StateLayout(num_layers - num_kv_layers, *of_states)
        if num_layers and num_kv_layers and len(of_states) == len(STATE_SIZES)
        else None,
    )


def _num_kv_layers(data: Mapping[str, Any], num_layers: int | None, interval: int | None) -> int | None:
    """The layers of a config that cache K and V: all but those of linear attention."""
    kinds = data.get("layer_types")
    if num_layers is None or not isinstance(kinds, list):
        return num_layers if num_layers is None or interval is None else max(1, num_layers // interval)
    return max(1, num_layers - kinds.count("linear_attention"))


def _first(*values: Any) -> Any:
    """The first value that is known."""
    return next((value for value in values if value is not None), None)


def _times(counts: set[int]) -> str:
    if len(counts) > 1:
        return f"{min(counts)} to {max(counts)} times"
    (n,) = counts
    return {1: "once", 2: "twice"}.get(n, f"{n} times")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")
