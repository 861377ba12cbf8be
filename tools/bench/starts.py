"""How long a job takes to start, beside one that does nothing but what any job of DeepSpeed and Transformers does.

    python tools/bench/starts.py               # minutes; writes a card to tools/bench/results/
    python tools/bench/starts.py --quick       # a minute; one round of 2 ranks, no card: only shows that it works

Each way is a job under `deepspeed --num_gpus N`, from before the launcher is started until the last rank is ready:

- the launcher alone: a rank is ready as soon as it runs, before it imports torch
- Transformers alone: a process group of torch's over gloo, then `AutoModelForCausalLM.from_pretrained`; the floor of a
  layout without tensor parallelism, for which ours imports no DeepSpeed
- DeepSpeed and Transformers alone: `deepspeed.init_distributed` over gloo, then `from_pretrained`; the floor of the
  other layouts, though it cuts no weights
- cpinfer rollout: with prefill and decode context parallelism, until its engine is attached to the model

They take turns within rounds. The model is configs/recall-tiny, whose bytes take no time. Beside the time stand the
seconds of processors that all ranks, without the launcher, have taken until they were ready: other programs on the
machine change those less. Before the rounds DeepSpeed's floor and a rollout run once, untimed: both compile functions
once on a machine, and files are then in the page cache.

Beside that, without a launcher: seconds of a processor that the imports take, and `explain`.

Every rank has to say that it is ready. Of a floor the first then answers a prompt, and a rollout answers some; a wrong
answer, or an exit code that is not 0, fails the benchmark before there is a table. Tables go to stderr, the last
stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpinfer_tools.measuring.harness import (
    ROOT,
    Timing,
    WorkersFailedError,
    bench_parser,
    free_port,
    has_time_for_another,
    rotated,
    run_bench,
    say,
    table,
    write_card,
)
from cpinfer_tools.verify.comparison.launches import launch, sigterm_interrupts

CONFIGS = ROOT / "configs"
MODEL = CONFIGS / "recall-tiny"
PROMPTS = CONFIGS / "recall-tiny-prompts.jsonl"
NUM_PROMPTS = 4
# What jobs have in their environment beside what this process has.
ENVIRON = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
# By the number of ranks.
LAYOUTS = {2: "pcp2.json", 4: "tp2_pcp2_dcp2.json", 8: "pcp2_dcp2.json"}
LAUNCHER, TRANSFORMERS, DEEPSPEED, OURS = "launcher", "transformers", "deepspeed", "ours"
WAYS = {
    LAUNCHER: "the launcher alone",
    TRANSFORMERS: "Transformers alone",
    DEEPSPEED: "DeepSpeed and Transformers alone",
    OURS: "cpinfer rollout",
}
# One after another in one process; what the tool imports is the last.
IMPORTS = ("torch", "transformers.modeling_utils", "deepspeed", "cpinfer_tools.rollout")
EXPLAIN = "cpinfer explain"
EXPLAIN_COMMAND = ("-m", "cpinfer_tools", "explain", "--config", str(CONFIGS / LAYOUTS[8]))
EXPLAIN_TARGET_S = 0.3
NUM_EXPLAINS = 5  # in a round: one takes little, and varies
WITHIN_S = 240.0


@dataclass(frozen=True)
class Start:
    """Of one job: seconds until its last rank was ready, and those of processors that its ranks took until then."""

    ready_s: float
    processors_s: float


# By the number of ranks, then by the way.
Jobs = dict[int, dict[str, list[Start]]]


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("starts", parse_args(argv), argv, bench, work)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = bench_parser(__doc__, budget_s=300)
    told = "of each job, in turn (default: 2 8)"
    parser.add_argument("--ranks", type=int, nargs="+", choices=list(LAYOUTS), default=[2, 8], help=told)
    args = parser.parse_args(argv)
    if args.quick:
        args.ranks, args.rounds = [2], 1
    return args


def bench(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """All rounds, then the tables, the card, the summary."""
    jobs, parts, num_rounds = rounds(args)
    sections = [
        ("From the start of the launcher until the last rank is ready", job_table(jobs)),
        ("Without a launcher: seconds of a processor", part_table(parts)),
    ]
    for _, body in sections:
        say(body)
    resolved = {
        "model": MODEL.name,
        "layouts": {n: json.loads((CONFIGS / LAYOUTS[n]).read_text(encoding="utf-8")) for n in jobs},
        "environment": ENVIRON,
        "num_prompts": NUM_PROMPTS,
        "rounds": num_rounds,
    }
    card = write_card("starts", "How long a job takes to start", sections, resolved, args, argv)
    print(json.dumps({**summary(jobs, parts), "card": None if card is None else str(card)}))
    return 0


def rounds(args: argparse.Namespace) -> tuple[Jobs, dict[str, list[float]], int]:
    """What each job and each part took in each round, and the number of rounds."""
    jobs: Jobs = {num_ranks: {way: [] for way in ways_of(num_ranks)} for num_ranks in dict.fromkeys(args.ranks)}
    parts: dict[str, list[float]] = {part: [] for part in (*IMPORTS, EXPLAIN)}
    with sigterm_interrupts():  # so that jobs end with us
        if not args.quick:
            for way in (DEEPSPEED, OURS):
                started(way, min(jobs))
        begin_s, done = time.monotonic(), 0
        while has_time_for_another(done, time.monotonic() - begin_s, args.budget_s, args.rounds):
            for num_ranks, ways in jobs.items():
                for way in rotated(list(ways), done):
                    ways[way].append(started(way, num_ranks))
                    say(f"starts: {WAYS[way]} on {num_ranks} ranks: {ways[way][-1].ready_s:.2f} s")
            for part, seconds in imports_s().items():
                parts[part].append(seconds)
            parts[EXPLAIN] += [explain_s() for _ in range(NUM_EXPLAINS)]
            done += 1
    return jobs, parts, done


def ways_of(num_ranks: int) -> list[str]:
    """Those of a number of ranks."""
    layout = json.loads((CONFIGS / LAYOUTS[num_ranks]).read_text(encoding="utf-8"))
    return [way for way in WAYS if way != TRANSFORMERS or "tensor_parallel" not in layout]


def started(way: str, num_ranks: int) -> Start:
    """One job, from before its launcher is started to its end. It leaves nothing behind.

    WorkersFailedError when it fails or takes too long, or what it answers is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="cpinfer-starts-") as name:
        folder = Path(name)
        lines = sorted(PROMPTS.read_text(encoding="utf-8").splitlines(), key=len)[:NUM_PROMPTS]
        (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        task = {"way": way, "folder": name, "config": str(CONFIGS / LAYOUTS[num_ranks])}
        (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(num_ranks)]
        launcher += ["--master_port", str(free_port())]
        command = [*launcher, str(Path(__file__).resolve()), "--worker", str(folder / "task.json")]
        begin_s = time.monotonic()
        ended = launch(command, folder / "log", WITHIN_S, {**os.environ, **ENVIRON})
        if ended.returncode != 0:
            how = f"exit code {ended.returncode}" if ended.returncode is not None else f"no end within {WITHIN_S:g} s"
            raise WorkersFailedError(f"{WAYS[way]} on {num_ranks} ranks: {how}; see above")
        if way == OURS:
            check_answers(folder)
        return start_of(folder, num_ranks, begin_s)


def start_of(folder: Path, num_ranks: int, begin_s: float) -> Start:
    """What the ranks of a job that began at `begin_s` have said. WorkersFailedError when one has not."""
    said = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("ready*")}
    wanted = {f"ready{rank}" for rank in range(num_ranks)}
    if said.keys() != wanted:
        raise WorkersFailedError(f"ready are {sorted(said)}, wanted {sorted(wanted)}")
    at_s, processor_s = zip(*said.values(), strict=True)
    return Start(max(at_s) - begin_s, sum(processor_s))


def check_answers(folder: Path) -> None:
    """WorkersFailedError unless a rollout has answered every prompt, and rightly."""
    found = json.loads((folder / "results.jsonl.summary.json").read_text(encoding="utf-8"))
    right = found["num_prompts"], found["num_answers_retrieved"]
    if right != (NUM_PROMPTS, NUM_PROMPTS):
        raise WorkersFailedError(f"of {NUM_PROMPTS} prompts {right[0]} were answered, {right[1]} rightly")


def imports_s() -> dict[str, float]:
    """Seconds of a processor until each of `IMPORTS` is there, those before it included, and the interpreter's own."""
    times = "".join(f"import {name}; times.append(time.process_time())\n" for name in IMPORTS)
    printed = output("-c", f"import time; times = []\n{times}print(times)")
    return dict(zip(IMPORTS, json.loads(printed.splitlines()[-1]), strict=True))


def explain_s() -> float:
    """Seconds of a processor that `explain` takes. WorkersFailedError when it draws no grid."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    printed = output(*EXPLAIN_COMMAND)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if "pcp1 |" not in printed:
        raise WorkersFailedError(f"explain drew no grid:\n{printed}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def output(*arguments: str) -> str:
    """What Python prints. WorkersFailedError when it fails, or takes too long."""
    command, env = [sys.executable, *arguments], {**os.environ, **ENVIRON}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, env=env, cwd=ROOT)
    except subprocess.TimeoutExpired as error:
        raise WorkersFailedError(f"{' '.join(command)} did not end within {WITHIN_S:g} s") from error
    if done.returncode != 0:
        raise WorkersFailedError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def timings(starts: Sequence[Start]) -> tuple[Timing, Timing]:
    """Until ready, and of processors."""
    return Timing(tuple(each.ready_s for each in starts)), Timing(tuple(each.processors_s for each in starts))


def floor_of(ways: Iterable[str]) -> str:
    """The least that a job of a layout with these ways has to do."""
    return TRANSFORMERS if TRANSFORMERS in ways else DEEPSPEED


def over_floor(ways: Mapping[str, Sequence[Start]], way: str) -> tuple[float, float]:
    """A way's medians over the floor's: until ready, and of processors."""
    mine, floor = timings(ways[way]), timings(ways[floor_of(ways)])
    return mine[0].median_s / floor[0].median_s, mine[1].median_s / floor[1].median_s


def job_table(jobs: Mapping[int, Mapping[str, Sequence[Start]]]) -> str:
    """A row for each way on each number of ranks."""
    rows = []
    for num_ranks, ways in jobs.items():
        for way, starts in ways.items():
            figures = zip(timings(starts), over_floor(ways, way), strict=True)
            row = [text for timing, ratio in figures for text in (str(timing), f"{ratio:.2f}")]
            rows.append([str(num_ranks), WAYS[way], *row])
    header = ["ranks", "way", "until ready", "over the floor", "processors, all ranks", "over the floor"]
    told = (
        "Medians (least..most). Ranks of the launcher alone have not imported torch; those of the floors have a "
        "process group and the whole model, a rollout's an engine attached to its part of it. Without tensor "
        f"parallelism, on 2 ranks, a rollout imports no DeepSpeed, so that {WAYS[TRANSFORMERS]} is the floor; else it "
        f"is {WAYS[DEEPSPEED]}, which cuts no weights, as a rollout does by AutoTP."
    )
    return f"{table(header, rows)}\n\n{told}"


def part_table(parts: Mapping[str, Sequence[float]]) -> str:
    """A row for each import, those before it included, and for `explain`."""
    rows = []
    for part, seconds in parts.items():
        timing = Timing(tuple(seconds))
        over = ": **over**" if timing.median_s > EXPLAIN_TARGET_S else ""
        what = f"`{part}`" if part == EXPLAIN else f"`import {part}`"
        what = f"{what}, after those above" if part in IMPORTS[1:] else what
        rows.append([what, str(timing), f"below {EXPLAIN_TARGET_S:g} s{over}" if part == EXPLAIN else ""])
    return table(["until it is done", "processor", "target"], rows)


def summary(jobs: Mapping[int, Mapping[str, Sequence[Start]]], parts: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The figures of the last line."""

    def figures(starts: Sequence[Start]) -> dict[str, Any]:
        ready, processors = timings(starts)
        return {"ready_s": ready.as_json(), "processors_s": processors.as_json()}

    return {
        "benchmark": "starts",
        "jobs": {n: {way: figures(starts) for way, starts in ways.items()} for n, ways in jobs.items()},
        "over_floor": {n: over_floor(ways, OURS)[0] for n, ways in jobs.items()},
        "processor_s": {part: Timing(tuple(seconds)).as_json() for part, seconds in parts.items()},
        "explain_target_s": EXPLAIN_TARGET_S,
    }


# What each rank runs. Nothing is imported before it is a way's turn.


def work(task: dict[str, Any]) -> int:
    folder, rank = Path(task["folder"]), os.environ["RANK"]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the launcher has set it; cards say CPU

    def ready() -> None:
        said = json.dumps([time.monotonic(), sum(os.times()[:4])])
        (folder / f"ready{rank}").write_text(said, encoding="utf-8")

    if task["way"] == LAUNCHER:
        ready()
        return 0
    if task["way"] == OURS:
        return rollout(folder, task["config"], ready)
    return plain(folder, task["way"] == DEEPSPEED, ready)


def plain(folder: Path, by_deepspeed: bool, ready: Callable[[], None]) -> int:
    """A job of Transformers, and of DeepSpeed where it is wanted; 1 when its model answers wrongly."""
    import torch

    if by_deepspeed:
        import deepspeed

        deepspeed.init_distributed("gloo")
    else:
        torch.distributed.init_process_group("gloo")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, trust_remote_code=False)
    ready()
    right = torch.distributed.get_rank() > 0 or answers(model, folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0 if right else 1


def answers(model: Any, folder: Path) -> bool:
    """Whether the model answers the first prompt rightly."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False)
    line = json.loads((folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[0])
    ids = tokenizer(line["prompt"], return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    text = tokenizer.decode(tokens)
    if line["answer"] not in text:
        say(f"starts: {line['answer']!r} was to be answered, not {text!r}")
    return line["answer"] in text


def rollout(folder: Path, config: str, ready: Callable[[], None]) -> int:
    """`cpinfer rollout`, as tools/rollout.py starts it."""
    from cpinfer_tools.cli import run

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().partition("attached to ")[1]:
                ready()

    logger = logging.getLogger("cpinfer.engine.attach")
    logger.setLevel(logging.DEBUG)  # ranks behind the first say it at this level
    logger.propagate = False
    logger.addHandler(Listener())
    files = ["--input", str(folder / "prompts.jsonl"), "--output", str(folder / "results.jsonl")]
    return run("rollout", ["--config", config, *files])


if __name__ == "__main__":
    sys.exit(main())
