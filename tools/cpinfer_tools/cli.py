"""The command `cpinfer`: one name for all tools, each of which is imported when it is asked for.

    cpinfer init demo                              configs, prompts and tiny models to try it with
    cpinfer rollout --config configs/single.json   one process
    torchrun --nproc-per-node 2 -m cpinfer_tools rollout --config configs/pcp2.json
    cpinfer explain --gpus 8 --num-q-heads 64 --num-kv-heads 8

`python -m cpinfer_tools` is the same, for launchers that start modules.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

import cpinfer
from cpinfer.errors import unknown_word
from cpinfer.packages import missing_package

EXIT_BAD_INPUT = 2


@dataclass(frozen=True)
class Command:
    """A tool: the module whose `main(argv, prog)` it is, and what it is for, in a line."""

    module: str
    summary: str
    extra: str | None = None  # what brings all that it needs


COMMANDS: Mapping[str, Command] = {
    "init": Command("cpinfer_tools.init", "write the shipped configs, prompts and tiny models to a folder"),
    "rollout": Command("cpinfer_tools.rollout", "generate from a file of prompts"),
    "eval": Command("cpinfer_tools.evaluation.eval_longctx", "long-context tasks, generated and scored"),
    "serve": Command("cpinfer_tools.serve", "answer HTTP clients of OpenAI's interface", "serve"),
    "explain": Command("cpinfer_tools.explain", "what a layout does, before anything runs (numpy alone)"),
    "compare": Command("cpinfer_tools.verify.compare", "the same evaluation over several layouts", "eval"),
    "mismatch": Command("cpinfer_tools.verify.mismatch", "rollout logprobs beside the training forward's", "eval"),
    "check-rollout": Command("cpinfer_tools.verify.check_rollout", "a rollout's results beside Transformers'"),
    "reference-eval": Command("cpinfer_tools.verify.reference_eval", "the same evaluation by Transformers alone"),
    "train-grpo": Command("cpinfer_tools.grpo.train_grpo", "GRPO by TRL with rollouts from cpinfer", "rl"),
    "build-kernels": Command("cpinfer_tools.build_kernels", "compile FlashInfer's kernels before a job asks for them"),
    "gpu-check": Command("cpinfer_tools.gpu.gpu_check", "check and measure on a GPU, stage by stage"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The whole command line. Exit codes are the tool's: 0 done, 1 failure, 2 bad input."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        _parser().print_help(sys.stderr)
        return EXIT_BAD_INPUT
    args = _parser().parse_args(argv)
    if args.command not in COMMANDS:
        print(f"cpinfer: {unknown_word('command', args.command, COMMANDS)} See cpinfer --help.", file=sys.stderr)
        return EXIT_BAD_INPUT
    return run(args.command, args.arguments, prog=f"cpinfer {args.command}")


def run(name: str, arguments: Sequence[str], prog: str | None = None) -> int:
    """One tool. A package that it needs and that is an extra of ours is named, with how to install it."""
    command = COMMANDS[name]
    try:
        tool = import_module(command.module)
    except ModuleNotFoundError as error:
        missing = missing_package(error.name or "", f"cpinfer {name}", command.extra)
        if missing is None:
            raise
        print(f"{command.module.rpartition('.')[2]}: {missing}", file=sys.stderr)
        return EXIT_BAD_INPUT
    code: int = tool.main(arguments, prog)
    return code


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="cpinfer",
        usage="cpinfer COMMAND ...",
        description=f"{__doc__}\ncommands (cpinfer COMMAND --help tells more):\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cpinfer {cpinfer.__version__}")
    # DeepSpeed's launcher puts it behind the module, before everything else.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser
