"""Collectives in shared memory on the processes it was started with; each rank writes what came of each case.

torchrun --nproc-per-node 2 tests/distributed/shared_memory_worker.py OUTPUT sums stand_in ...
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import cpinfer
from cpinfer.comm import segments, shared_memory
from cpinfer.comm.axis import AxisComm
from cpinfer.comm.bootstrap import Launch, default_group
from cpinfer.comm.losses import is_peer_loss, is_timeout
from cpinfer.comm.segments import SharingAxis, open_segments
from cpinfer.comm.shared_memory import SUMMED_DTYPES, SharedMemory, SharedMemoryComm, SharedMemoryGroup
from cpinfer.config import SamplingParams
from cpinfer.errors import PeerLostError
from cpinfer.layout.grid import RankGrid
from cpinfer.ops.cpu_kernels import compiling
from tiny_models import FAMILIES, make_model, prompts_of

SHAPES = [(), (0, 3), (1,), (3, 5), (64, 512), (129, 1001), (400, 2000)]
MESSAGES = [(), (0,), (1,), (3, 5), (7, 4001), (200, 2000)]
# Ties between two neighbours in bfloat16, numbers of no size, and no numbers.
ODD = [[1.0, -0.0, float("inf"), float("inf"), 1e-40, 3e38], [2**-8, -0.0, 1.0, -float("inf"), 1e-41, 3e38]]


def opened(why_not: str | None = None, limit_s: float = 60.0) -> SharedMemory | str:
    topology = cpinfer.Topology.from_world(RankGrid(tp_size=dist.get_world_size()))
    axis = SharingAxis(topology.grid.tp_groups, lambda: limit_s, why_not)
    return open_segments(topology.replica, topology.replica_ranks, {"tp": axis})["tp"]


def shared(limit_s: float = 60.0) -> SharedMemory:
    found = opened(limit_s=limit_s)
    assert isinstance(found, SharedMemory), found
    return found


def given(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """What each rank gives."""
    ranks = range(dist.get_world_size())
    return [torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + r)).to(dtype) for r in ranks]


def in_order(terms: list[Tensor]) -> Tensor:
    return reduce(torch.add, [x.float() for x in terms]).to(terms[0].dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def sums() -> dict[str, Any]:
    """Of every dtype, size and stride; sums in the other order and by gloo, to see what can be told apart."""
    total, rank, outcome = shared(), dist.get_rank(), {}
    for dtype in SUMMED_DTYPES:
        wrong, reversed_differs, as_gloo = [], False, True
        for seed, shape in enumerate(SHAPES):
            terms = given(shape, dtype, seed)
            wanted = in_order(terms)
            by_gloo = terms[rank].clone()
            dist.all_reduce(by_gloo)
            x = terms[rank].clone()
            if total.all_reduce(x) is not x or not same_bits(x, wanted):
                wrong.append(str(shape))
            reversed_differs |= not same_bits(in_order(terms[::-1]), wanted)
            as_gloo &= same_bits(by_gloo, wanted)
        terms = given((30, 44), dtype, 50)
        for view in (lambda x: x.t(), lambda x: x[:, ::2], lambda x: x[3:7, 1:].expand(2, 4, 43)[0]):
            x = terms[rank].clone()
            rest = x.clone()
            total.all_reduce(view(x))
            view(rest).copy_(view(in_order(terms)))
            if not same_bits(x, rest):  # what the view leaves out is as it was
                wrong.append(f"strides {view(x).stride()}")
        odd = [torch.tensor(ODD[r % 2]).to(dtype) for r in range(dist.get_world_size())]
        if not same_bits(total.all_reduce(odd[rank].clone()), in_order(odd)):
            wrong.append("odd numbers")
        name = str(dtype).removeprefix("torch.")
        outcome[name] = {"wrong": wrong, "as_gloo": as_gloo, "reversed_differs": reversed_differs}
    total.close()
    return outcome


def many() -> dict[str, Any]:
    """Sums of all sizes in a row, by ranks that are now ahead and now behind."""
    total, rank, num_wrong = shared(), dist.get_rank(), 0
    for seed in range(150):
        terms = (
            given((1 + (seed * 7919) % 90_000,), torch.float32, seed) if seed % 3 else given((7,), torch.float16, seed)
        )
        if seed % 10 == rank:
            time.sleep(0.003)
        num_wrong += not same_bits(total.all_reduce(terms[rank].clone()), in_order(terms))
    total.close()
    return {"num_wrong": num_wrong}


def axis() -> dict[str, Any]:
    """All collectives of an axis, beside those of its process group: of all sizes, dtypes and strides."""
    grid = RankGrid(tp_size=dist.get_world_size())
    group = cpinfer.Topology.from_world(grid).replica
    total, size, rank = shared(), dist.get_world_size(), dist.get_rank()
    comm: AxisComm = SharedMemoryComm(group, total)
    calls: list[int] = []
    exchange = total._exchange

    def counted(*what: Any) -> None:
        calls.append(what[0])
        exchange(*what)

    wrong: list[str] = []
    own_dtypes = (torch.float64, torch.int64, torch.bool)  # sums of these, where there are any, are the group's
    with mock.patch.object(total, "_exchange", counted):
        for seed, (shape, dtype) in enumerate(product(MESSAGES, (*SUMMED_DTYPES, *own_dtypes))):
            terms = given((size, *shape), torch.float32, 1000 + seed)[rank].mul(9).to(dtype)
            for x in (terms, terms.transpose(-1, -2) if terms.dim() > 2 else terms.expand(3, *terms.shape)[1]):
                held = torch.empty(size, *x.shape, dtype=dtype)
                found = {"all_gather": comm.all_gather(x), "all_to_all": comm.all_to_all(x)}
                wanted = {"all_gather": group.all_gather(x), "all_to_all": group.all_to_all(x)}
                found["in place"], wanted["in place"] = comm.all_gather(x, held), wanted["all_gather"]
                wrong += [] if found["in place"].data_ptr() == held.data_ptr() else ["another place"]
                if dtype in SUMMED_DTYPES or dtype == torch.float64:
                    all_terms = wanted["all_gather"].float() if dtype in SUMMED_DTYPES else wanted["all_gather"]
                    found["all_reduce"], wanted["all_reduce"] = comm.all_reduce(x.clone()), sum(all_terms).to(dtype)
                    found["reduce_scatter"], wanted["reduce_scatter"] = comm.reduce_scatter(x), sum(all_terms)[rank]
                    wanted["reduce_scatter"] = wanted["reduce_scatter"].to(dtype)
                wrong += [f"{n} {dtype} {shape}" for n, value in found.items() if not same_bits(value, wanted[n])]
    for other in (torch.empty(size - 1, 4), torch.empty(size, 4, dtype=torch.float64)):
        with pytest.raises(ValueError, match="do not hold"):  # before anybody waits
            comm.all_gather(torch.zeros(4), other)
    total.close()
    return {"wrong": wrong, "calls": {kind: calls.count(kind) for kind in range(4)}, "places": [comm.size, comm.index]}


def interrupted() -> dict[str, Any]:
    """Interrupts come to rank 0 while it waits: a first one waits with it, a second one does not."""
    total, outcome = shared(), {}
    for num in (1, 2):
        if dist.get_rank() == 1:
            time.sleep(1.0)
        else:
            signals = [threading.Timer(0.2 * (i + 1), os.kill, (os.getpid(), signal.SIGINT)) for i in range(num)]
            for each in signals:
                each.start()
        x, began_s = torch.full((3,), dist.get_rank() + 1.0), time.monotonic()
        try:
            total.all_reduce(x)
            error = None
        except (KeyboardInterrupt, PeerLostError) as raised:
            error = type(raised).__name__
        outcome[str(num)] = {"error": error, "x": x.tolist(), "took_s": time.monotonic() - began_s}
    total.close()
    return outcome


def interrupted_between_looks() -> dict[str, Any]:
    """An interrupt comes to rank 0 when it has looked at others, and before it looks again."""
    total, outcome = shared(limit_s=5.0), {}
    for call in ("first", "next"):
        x = torch.full((3,), dist.get_rank() + 1.0)
        if dist.get_rank() == 1:
            time.sleep(0.5)
        elif call == "first":
            sys.settrace(interrupts_behind(SharedMemory._go_on))
        outcome[call] = error_of(lambda x=x: total.all_reduce(x))
        sys.settrace(None)
        dist.barrier()
    return outcome


def interrupts_behind(function: Callable[..., Any]) -> Callable[..., Any]:
    """A trace that raises a KeyboardInterrupt at the first line behind a call of a function."""

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if event == "return" and frame.f_code is function.__code__:
            frame.f_back.f_trace = interrupt
        return trace

    def interrupt(frame: Any, event: str, argument: Any) -> Any:
        sys.settrace(None)
        raise KeyboardInterrupt

    return trace


def left_by_another_thread() -> dict[str, Any]:
    """Rank 0 leaves while a thread of it waits in a collective."""
    total, outcome = shared(), {}
    if dist.get_rank() == 0:
        waits = threading.Thread(target=lambda: outcome.update(error_of(lambda: total.all_reduce(torch.zeros(3)))))
        waits.start()
        time.sleep(0.3)
        total.close()
        waits.join()
    dist.barrier()
    total.close()
    return {**outcome, "left_open": num_segments()}


def left_by_a_fork() -> dict[str, Any]:
    """A process that was forked from rank 1 unwinds what it has from there; rank 1 goes on."""
    total, child = shared(), 0
    if dist.get_rank() == 1:
        child = os.fork()
        if child == 0:
            total.close()
            os._exit(0)
        os.waitpid(child, 0)
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(0.5)  # rank 0 waits, and looks whether it has left
    outcome = error_of(lambda: total.all_reduce(torch.zeros(3)))
    total.close()
    return outcome


def stand_in() -> dict[str, Any]:
    """A group that sums so, for all that torch asks of a group."""
    total, rank, size = shared(), dist.get_rank(), dist.get_world_size()
    group: Any = SharedMemoryGroup(dist.group.WORLD, total)
    calls: list[int] = []
    summed = total.all_reduce

    def counted(x: Tensor) -> Tensor:
        calls.append(x.numel())
        return summed(x)

    ours, maximum, double, later = (torch.full((n,), float(rank + 1)) for n in (5, 6, 7, 8))
    with mock.patch.object(total, "all_reduce", counted):
        dist.all_reduce(ours, group=group)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        double = double.double()
        dist.all_reduce(double, group=group)
        dist.all_reduce(later, group=group, async_op=True).wait()
    gathered = torch.empty(size)
    dist.all_gather_into_tensor(gathered, torch.tensor([float(rank)]), group=group)
    total.close()
    return {
        "summed_here": calls,
        "values": [x[0].item() for x in (ours, maximum, double, later)],
        "gathered": gathered.tolist(),
        "rank": dist.get_rank(group) == rank,
        "size": dist.get_world_size(group) == size,
    }


def error_of(call: Callable[[], Any]) -> dict[str, Any]:
    began_s = time.monotonic()
    try:
        call()
    except (Exception, KeyboardInterrupt) as error:
        kinds = {"lost": is_peer_loss(error), "timeout": is_timeout(error)}
        took_s = time.monotonic() - began_s
        return {"error": type(error).__name__, "message": str(error), "took_s": took_s, **kinds}
    return {"error": None}


def differ() -> dict[str, Any]:
    outcome = {}
    ways = {
        "size": lambda total: total.all_reduce(torch.zeros(4 + dist.get_rank())),
        "dtype": lambda total: total.all_reduce(torch.zeros(4, dtype=of_rank(0))),
        "kind": lambda total: (total.all_to_all if dist.get_rank() else total.all_gather)(torch.zeros(4)),
        "bytes": lambda total: total.all_gather(torch.zeros(4 + dist.get_rank())),
    }
    for name, way in ways.items():
        total = shared()
        outcome[name] = error_of(lambda way=way, total=total: way(total))
        outcome[f"{name}, again"] = error_of(lambda way=way, total=total: way(total))
        dist.barrier()
    return outcome


def of_rank(rank: int) -> torch.dtype:
    return torch.float32 if dist.get_rank() == rank else torch.bfloat16


def refused() -> dict[str, Any]:
    """Rank 1 cannot, in one way after another."""
    is_one, outcome = dist.get_rank() == 1, {}
    ways = {
        "no compiler": mock.patch.object(compiling.shutil, "which", lambda name: None),
        "another host": mock.patch.object(segments, "_host", lambda: ["another"]),
        "another file": mock.patch.object(segments.os, "pread", lambda *given: b"another"),
        "no locks": mock.patch.object(shared_memory.fcntl, "lockf", no_locks),
    }
    for name, way in ways.items():
        compiling.compiled.cache_clear()
        if is_one:
            way.start()
        found = opened()
        if is_one:
            way.stop()
        outcome[name] = found if isinstance(found, str) else None
    compiling.compiled.cache_clear()
    outcome["unwanted"] = opened("not wanted" if is_one else None)
    outcome["left_open"] = num_segments()
    return outcome


def no_locks(*given: Any) -> None:
    raise OSError("no locks here")


def num_segments() -> int:
    """How many this process has mapped or open."""
    files = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return sum("cpinfer collectives" in line for line in [*files, *mapped])


def late() -> dict[str, Any]:
    total = shared(limit_s=0.3)
    if dist.get_rank() == 1:
        time.sleep(1.0)
    outcome = error_of(lambda: total.all_reduce(torch.zeros(3)))  # rank 0 has given its terms, so rank 1 has a sum
    dist.barrier()
    total.close()
    return outcome


def leaves() -> dict[str, Any]:
    total = shared()
    if dist.get_rank() == 1:
        total.all_reduce(torch.zeros(3))
        total.close()
        return {}
    total.all_reduce(torch.zeros(3))  # rank 1 leaves behind it, which is no error in it
    return error_of(lambda: total.all_reduce(torch.zeros(3)))


def killed() -> dict[str, Any]:
    """The last: rank 1 ends in the middle of a run of sums."""
    total = shared()
    total.all_reduce(torch.zeros(3))
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    outcome = error_of(lambda: total.all_reduce(torch.zeros(3)))
    return {**outcome, "left_open": num_segments()}


def engine() -> dict[str, Any]:
    """A model of AutoTP's by both ways, and what its layers hold meanwhile and afterwards."""
    from cpinfer_integrations.deepspeed import launch_inference

    launched = launch_inference(make_model(FAMILIES["qwen2"]), RankGrid(tp_size=2), dtype=torch.float32)
    model, outcome = launched.module, {}
    layers = [module for module in model.modules() if vars(module).get("mp_group") is not None]
    groups = [module.mp_group for module in layers]
    greedy = SamplingParams(temperature=0, max_new_tokens=6)
    for way in ("auto", "group"):
        summed: list[int] = []
        all_reduce = SharedMemory.all_reduce

        def counted(self: SharedMemory, x: Tensor, all_reduce: Any = all_reduce, summed: Any = summed) -> Tensor:
            summed.append(x.numel())
            return all_reduce(self, x)

        with (
            mock.patch.object(SharedMemory, "all_reduce", counted),
            cpinfer.attach(model, launched.topology, collectives=way) as attached,
        ):
            results = attached.generate(prompts_of((3, 40), vocab_size=128), greedy)
            outcome[way] = {
                "tokens": [list(r.token_ids) for r in results],
                "logprobs": [list(r.logprobs) for r in results],
                "stand_ins": sum(type(module.mp_group) is SharedMemoryGroup for module in layers),
                "num_sums": len(summed),
            }
        outcome[way]["restored"] = all(m.mp_group is group for m, group in zip(layers, groups, strict=True))
    outcome["num_layers"] = len(layers)
    outcome["left_open"] = num_segments()
    launched.topology.close()
    return outcome


def layout() -> dict[str, Any]:
    """An engine whose ranks share prefill and KV by both ways, and on which axes it exchanged here."""
    topology = cpinfer.Topology.from_world(RankGrid(pcp_size=2, dcp_size=2))
    model, outcome = make_model(FAMILIES["qwen2"]), {}
    for exchange, way in product(("a2a", "ag_rs", "replicate_q"), ("auto", "group")):
        kinds: list[int] = []
        run = SharedMemory._exchange

        def counted(self: SharedMemory, kind: int, *what: Any, run: Any = run, kinds: Any = kinds) -> None:
            kinds.append(kind)
            run(self, kind, *what)

        with (
            mock.patch.object(SharedMemory, "_exchange", counted),
            cpinfer.attach(model, topology, collectives=way, decode_exchange=exchange) as engine,
        ):
            results = engine.generate(
                prompts_of((3, 150), vocab_size=128), SamplingParams(temperature=1, seed=3, n=2, max_new_tokens=6)
            )
            outcome[f"{exchange} {way}"] = {
                "tokens": [list(r.token_ids) for r in results],
                "logprobs": [list(r.logprobs) for r in results],
                "kinds": sorted(set(kinds)),
                "same_topology": engine.topology is topology,
            }
    outcome["left_open"] = num_segments()
    topology.close()
    return outcome


CASES = {
    f.__name__: f
    for f in (
        *(sums, many, axis, stand_in, differ, refused, late, leaves, killed, engine, layout),
        *(interrupted, interrupted_between_looks, left_by_another_thread, left_by_a_fork),
    )
}


def main(output: str, names: list[str]) -> None:
    launch = Launch.from_environ(os.environ)
    with default_group(launch):
        for name in names:
            dist.barrier()
            outcome = CASES[name]()
            with open(f"{output}.{launch.rank}", "a", encoding="utf-8") as file:
                file.write(json.dumps({name: outcome}) + "\n")
        if "killed" in names:
            os._exit(0)  # nobody is left to end the group with


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
