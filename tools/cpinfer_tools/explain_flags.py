"""The flags of `cpinfer explain`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from cpinfer.config import KV_CACHE_DTYPES
from cpinfer.errors import UserError
from cpinfer.layout.capacity import DTYPE_BYTES
from cpinfer.layout.machines import MACHINES
from cpinfer_tools.lengths import length

# Flags that plans alone read, and those that they do not.
OF_PLANS = (
    "machine", "batch", "new_tokens", "gpu_gib", "hbm_tb_s", "tflops", "link_gb_s", "network_gb_s",
)  # fmt: skip
NOT_OF_PLANS = (
    "num_q_heads", "num_kv_heads", "num_layers", "head_dim", "kv_lora_rank", "qk_rope_head_dim", "max_model_len",
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Bad flags end like any other bad input: one message, and one JSON line when that was asked for."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def parse_flags(argv: Sequence[str], prog: str | None, description: str | None) -> argparse.Namespace:
    """What a command line says. UserError for flags that are none, or that what is asked for does not read."""
    args = _parser(prog, description).parse_args(argv)
    _check_flags(args)
    return args


def _check_flags(args: argparse.Namespace) -> None:
    """UserError for a flag that what was asked for does not read."""
    unread = NOT_OF_PLANS if args.plan else OF_PLANS
    given = [f"--{name.replace('_', '-')}" for name in unread if getattr(args, name) is not None]
    if given and args.plan:
        raise UserError(f"{', '.join(given)}: --plan reads the model's config.json. Leave it out, or change it there.")
    if given:
        raise UserError(f"{', '.join(given)} is of plans. Add --plan, or leave it out.")


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def _parser(prog: str | None, description: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    layout = parser.add_argument_group("layout")
    layout.add_argument("--config", metavar="FILE", help="a rollout config; flags win over it")
    layout.add_argument(
        "--gpus", type=positive_int, help="list the legal layouts of so many ranks (sizes given narrow it)"
    )
    layout.add_argument("--tp", type=int, help="ranks that share the weights (default 1)")
    layout.add_argument("--pcp", type=int, help="ranks that share a prefill (default 1)")
    layout.add_argument("--dcp", type=int, help="KV shards of a sequence (default pcp)")
    layout.add_argument("--dp", type=int, help="independent replicas (default 1)")
    layout.add_argument("--interleave", type=int, help="tokens dealt to a shard at a time (default block size)")
    layout.add_argument("--block-size", type=int, help="tokens of one shard per KV block (default 16)")
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="FOLDER", help="a folder with a config.json (default: the config's model)")
    model.add_argument("--num-q-heads", type=int)
    model.add_argument("--num-kv-heads", type=int, help="not with MLA, whose latent counts as one")
    model.add_argument("--num-layers", type=positive_int)
    model.add_argument("--head-dim", type=positive_int)
    model.add_argument("--kv-lora-rank", type=positive_int, metavar="R", help="MLA: width of the latent")
    model.add_argument("--qk-rope-head-dim", type=positive_int, metavar="D", help="MLA: width of the rotated key")
    model.add_argument("--dtype", choices=sorted(DTYPE_BYTES), help="of activations and KV cache (default bfloat16)")
    model.add_argument(
        "--kv-cache-dtype", choices=KV_CACHE_DTYPES, help="of the KV cache alone, as the config key has it"
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--seq-len",
        type=length,
        metavar="N",
        help="the split of N tokens, as 12000 or 12k; of a plan, each prompt",
    )
    load.add_argument("--kv-cache-gib", type=positive_number, help="KV pool per rank")
    load.add_argument("--max-model-len", type=length, metavar="N", help="tokens of a sequence for max_concurrency")
    plan = parser.add_argument_group("plan")
    plan.add_argument("--plan", action="store_true", help="which layouts fit, and what they take")
    plan.add_argument("--machine", choices=sorted(MACHINES), help="whose GPUs (default h100)")
    plan.add_argument("--gpus-per-host", type=positive_int, metavar="N", help="(default: the machine's, or all)")
    plan.add_argument("--batch", type=positive_int, metavar="N", help="prompts in all (default 1)")
    plan.add_argument("--new-tokens", type=length, metavar="N", help="of each answer (default 256)")
    plan.add_argument("--gpu-gib", type=positive_number, help="memory of a GPU; these figures win over the machine's")
    plan.add_argument("--hbm-tb-s", type=positive_number, help="bandwidth of that memory, TB/s")
    plan.add_argument("--tflops", type=positive_number, help="of products in the dtype, TFLOP/s")
    plan.add_argument("--link-gb-s", type=positive_number, help="what a GPU receives on its host, GB/s")
    plan.add_argument("--network-gb-s", type=positive_number, help="what a GPU receives from other hosts, GB/s")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser
