"""Check and measure cpinfer on a GPU, stage by stage.

    cpinfer gpu-check                                    # everything that one GPU can show
    cpinfer gpu-check --only parity                      # one stage
    cpinfer gpu-check --build                            # compile what the stages ask for, and nothing else
    torchrun --nproc-per-node 8 -m cpinfer_tools gpu-check --only comm   # the exchanges, over NCCL
    cpinfer gpu-check --device cpu                       # smoke: tiny, torch alone; shows that the tool works
    cpinfer gpu-check --smoke                            # the same on the GPU, by FlashInfer

- parity         kernels and layouts against attention in float32
- model          whole models, played ranks against Transformers
- deterministic  the same bits in several layouts, chunks and batches, by the kernels of the deterministic mode
- graphs         decode replayed from CUDA graphs against the same steps launch by launch
- throughput     prefill, decode and merge, each with its bound
- plan           prefill and decode beside what the model of cost predicts
- rollouts       tokens per second beside Transformers
- comm           the exchanges between processes; needs torchrun

FlashInfer's kernels are compiled first, some minutes for each module: parity asks for the most, 12 modules, and 19 on
Hopper. Their time is reported by itself, not in a stage's. Beside a stage's time stands its budget, an estimate, since
no stage has run on a GPU yet. Cards of what was measured on a GPU, gpu_<stage>_<name of the GPU>.md, go to
tools/bench/results of a clone, else to results/. A table goes to stderr, the last stdout line of rank 0 is one JSON
object. Exit codes: 0 all targets reached, 1 one missed or a stage failed, 2 nothing could be run.
"""

from __future__ import annotations

# Before torch: it asks which process started this one.
import cpinfer  # isort: skip  # noqa: F401

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cpinfer.attention.backends.base import AttentionNeeds
from cpinfer.comm.bootstrap import Launch, default_group, end_with_launcher
from cpinfer_tools.gpu import build, comm, deterministic, graphs, model, parity, plan, rollouts, throughput
from cpinfer_tools.gpu.stage import Found, Setting
from cpinfer_tools.measuring.harness import RESULTS, Card, say, slug, table, versions

STAGES: Mapping[str, Callable[[Setting], Found]] = {
    "parity": parity.run,
    "model": model.run,
    "deterministic": deterministic.run,
    "graphs": graphs.run,
    "throughput": throughput.run,
    "plan": plan.run,
    "rollouts": rollouts.run,
    "comm": comm.run,
}
# What the stages ask of FlashInfer; the others have kernels of Triton alone, or none.
NEEDS: Mapping[str, Callable[[Setting], Iterable[AttentionNeeds]]] = {
    "parity": parity.needs,
    "model": model.needs,
    "graphs": graphs.needs,
    "throughput": throughput.needs,
    "rollouts": rollouts.needs,
}
# Seconds that a stage should take at most once its kernels are there.
BUDGET_S: Mapping[str, int] = {
    "parity": 180,
    "model": 240,
    "deterministic": 240,
    "graphs": 120,
    "throughput": 240,
    "plan": 120,
    "rollouts": 480,
    "comm": 120,
}
EXIT_DONE, EXIT_MISSED, EXIT_BAD_INPUT = 0, 1, 2


def main(argv: Sequence[str] | None = None, prog: str | None = None, *, results: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=STAGES, action="append", help="run this stage; may be repeated")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a smoke run")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that the tool works on the device")
    parser.add_argument("--build", action="store_true", help="compile the kernels of the stages, and run none of them")
    parser.add_argument("--no-card", action="store_true", help="write no cards")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # launchers append it; ignored
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        say("gpu_check: there is no CUDA device. On CPU only a smoke run is possible: --device cpu.")
        return EXIT_BAD_INPUT
    launch = Launch.from_environ(os.environ)
    is_smoke = args.smoke or args.device == "cpu"
    device = torch.device("cpu") if args.device == "cpu" else launch.device
    setting = Setting(device, is_smoke)
    command = "cpinfer gpu-check " + " ".join(argv if argv is not None else sys.argv[1:])
    names, stages = args.only or list(STAGES), {}
    end_with_launcher(os.environ, program="gpu_check")
    with default_group(launch):
        if setting.is_cuda and any(name in NEEDS for name in names):
            stages["build"] = _run(partial(_build, names), setting)
            if launch.rank == 0:
                _print("build", stages["build"])
        for name in () if args.build else names:
            if launch.rank == 0:
                say(f"gpu_check: {name}, within {BUDGET_S[name]} s ...")
            stages[name] = told = _run(STAGES[name], setting)
            if launch.rank == 0:
                _print(name, told)
                if not is_smoke and not args.no_card and told["figures"]:
                    say(f"  -> {_write_card(name, told, command.strip(), setting, results)}")
    if launch.rank == 0:
        print(json.dumps({"device": _device_name(device), "is_smoke": is_smoke, "stages": stages}), flush=True)
    return EXIT_DONE if all(told["ok"] is not False for told in stages.values()) else EXIT_MISSED


def _build(names: Sequence[str], setting: Setting) -> Found:
    return build.run(setting, [needs for name in names if name in NEEDS for needs in NEEDS[name](setting)])


def _run(stage: Callable[[Setting], Found], setting: Setting) -> dict[str, Any]:
    """What a stage says, as plain data. One that fails is not ok; the others still run."""
    start_s = time.perf_counter()
    try:
        found, error = stage(setting), None
    except Exception as caught:
        if dist.is_initialized():  # the other ranks wait in a collective: all must end
            raise
        found, error = Found(), traceback.format_exc()
        say(error)
        error = f"{type(caught).__name__}: {caught}"
    return {
        "ok": False if error else found.ok,
        "wall_s": time.perf_counter() - start_s,
        "figures": [figure.as_json() for figure in found.figures],
        "notes": list(found.notes),
        "error": error,
    }


def _rows(figures: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.4g}"

    words = {None: "", True: "yes", False: "**NO**"}
    return [
        [
            figure["name"],
            f"{number(figure['value'])} {figure['unit']}".strip(),
            number(figure["bound"]),
            "" if figure["share_of_bound"] is None else f"{figure['share_of_bound']:.1%}",
            number(figure["target"]),
            words[figure["ok"]],
        ]
        for figure in figures
    ]


HEADER = ["", "measured", "bound", "of it", "target", "reached"]


def _print(name: str, told: Mapping[str, Any]) -> None:
    if told["figures"]:
        say(table(HEADER, _rows(told["figures"])))
    for note in told["notes"]:
        say(f"  {note}")
    say(f"gpu_check: {name}: {'ok' if told['ok'] else told['ok']}, {told['wall_s']:.0f} s\n")


def _write_card(name: str, told: Mapping[str, Any], command: str, setting: Setting, folder: Path) -> Path:
    gpu = _device_name(setting.device)
    notes = [("Notes", "\n".join(f"- {note}" for note in told["notes"]))] if told["notes"] else []
    card = Card(
        theme=f"gpu_{name}",
        title=f"GPU check: {name}",
        command=command,
        sections=(("Figures", table(HEADER, _rows(told["figures"]))), *notes),
        resolved={"stage": name, "dtype": str(setting.dtype), "wall_s": round(told["wall_s"], 1)},
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu_{name}_{slug(gpu)}.md"
    path.write_text(card.text(gpu, {**versions(), "cuda": torch.version.cuda}), encoding="utf-8")
    return path


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
