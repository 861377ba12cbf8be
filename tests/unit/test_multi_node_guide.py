"""The guide to several hosts and its recipes: bytes as the formulas have them, command lines that the tools read."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.traffic import decode_bytes, prefill_bytes
from cpinfer_tools import rollout
from cpinfer_tools.cli import COMMANDS
from cpinfer_tools.evaluation import eval_longctx

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "multi-node.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))

HIDDEN, HEADS, KV_HEADS, TP, TOKENS, BYTES = 8192, 64, 8, 8, 131_072, 2


def all_reduces(rows: int) -> int:
    return 2 * 2 * (TP - 1) * rows * HIDDEN * BYTES // TP


def test_the_bytes_of_the_guide_are_those_of_the_formulas():
    kv = KVLayout(num_heads=KV_HEADS // TP, k_dim=128, v_dim=128)
    decode = decode_bytes(2, 1, HEADS // TP, kv, BYTES, sends_new_kv=True).total
    prefill = prefill_bytes(2, TOKENS // 2, kv, BYTES)
    wanted = [all_reduces(TOKENS // 2), prefill, all_reduces(1), decode]
    assert all(f"{count:,} bytes" in GUIDE for count in wanted), wanted
    assert f"A factor of {wanted[0] // prefill} in prefill, of {wanted[2] // decode} in decode." in GUIDE


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """What Slurm gives a job, as far as the recipes ask: `srun` runs its task once, what it starts is written down."""
    for name, body in {
        "scontrol": "printf 'node-%s\\n' $(seq 0 20000)",  # more than a pipe holds: who reads one line breaks it
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "torchrun": f'printf "%q " torchrun "$@" > {tmp_path}/started',
        "python": f'printf "%q " python "$@" > {tmp_path}/started; echo $RANK/$WORLD_SIZE >> {tmp_path}/world',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[0-1]", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}
    task = {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16"}
    return {**job, **task, "CONFIG": "configs/pcp2.json", "PATH": f"{tmp_path}:{os.environ['PATH']}"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_starts_a_command_that_the_tools_read(recipe: Path, cluster: dict[str, str], tmp_path: Path):
    subprocess.run(["bash", "-n", recipe], check=True)
    subprocess.run(["bash", recipe], check=True, env=cluster, timeout=20)
    started = shlex.split((tmp_path / "started").read_text())
    if started[0] == "torchrun":
        args = get_args_parser().parse_args(started[1:])
        assert (args.nnodes, args.node_rank, args.nproc_per_node, args.master_addr) == ("2", 1, "8", "node-0")
        assert args.module and args.training_script == "cpinfer_tools"
        words = args.training_script_args
    else:
        assert started[1:3] == ["-m", "cpinfer_tools"] and (tmp_path / "world").read_text() == "9/16\n"
        words = started[3:]
    assert words[0] in COMMANDS
    parse = {"rollout": rollout.parse_args, "eval": eval_longctx.parse_args}[words[0]]
    assert parse(words[1:]).config == "configs/pcp2.json"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_that_it_was_not_run(recipe: Path):
    assert "# NOT RUN on a cluster" in recipe.read_text(encoding="utf-8")


def test_the_hostfile_is_one(tmp_path: Path):
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(ROOT / "examples" / "hostfile")) == {"node-0": 8, "node-1": 8}
