"""Sums in shared memory on the processes it was started with; each rank writes what came of each case.

torchrun --nproc-per-node 2 tests/distributed/shared_sum_worker.py OUTPUT sums stand_in ...
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import cpinfer
from cpinfer.comm import shared_sum
from cpinfer.comm.bootstrap import Launch, default_group
from cpinfer.comm.losses import is_peer_loss, is_timeout
from cpinfer.comm.shared_sum import SharedSum, SharedSumGroup, open_shared_sum
from cpinfer.config import SamplingParams
from cpinfer.layout.grid import RankGrid
from cpinfer.ops.cpu_kernels import compiling
from tiny_models import FAMILIES, make_model, prompts_of

SHAPES = [(), (0, 3), (1,), (3, 5), (64, 512), (129, 1001), (400, 2000)]
# Ties between two neighbours in bfloat16, numbers of no size, and no numbers.
ODD = [[1.0, -0.0, float("inf"), float("inf"), 1e-40, 3e38], [2**-8, -0.0, 1.0, -float("inf"), 1e-41, 3e38]]


def opened(why_not: str | None = None, limit_s: float = 60.0) -> SharedSum | str:
    topology = cpinfer.Topology.from_world(RankGrid(tp_size=dist.get_world_size()))
    ranks = topology.replica_ranks
    return open_shared_sum(topology.replica, ranks, len(ranks), lambda: limit_s, why_not)


def shared(limit_s: float = 60.0) -> SharedSum:
    found = opened(limit_s=limit_s)
    assert isinstance(found, SharedSum), found
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
    for dtype in shared_sum.DTYPES:
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


def stand_in() -> dict[str, Any]:
    """A group that sums so, for all that torch asks of a group."""
    total, rank, size = shared(), dist.get_rank(), dist.get_world_size()
    group: Any = SharedSumGroup(dist.group.WORLD, total)
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
    shared_sum.dist.all_gather_into_tensor(gathered, torch.tensor([float(rank)]), group=group)
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
    except Exception as error:
        kinds = {"lost": is_peer_loss(error), "timeout": is_timeout(error)}
        took_s = time.monotonic() - began_s
        return {"error": type(error).__name__, "message": str(error), "took_s": took_s, **kinds}
    return {"error": None}


def differ() -> dict[str, Any]:
    outcome = {}
    for name, x in (("size", torch.zeros(4 + dist.get_rank())), ("dtype", torch.zeros(4, dtype=of_rank(0)))):
        total = shared()
        outcome[name] = error_of(lambda x=x, total=total: total.all_reduce(x))
        outcome[f"{name}, again"] = error_of(lambda x=x, total=total: total.all_reduce(x))
        dist.barrier()
    return outcome


def of_rank(rank: int) -> torch.dtype:
    return torch.float32 if dist.get_rank() == rank else torch.bfloat16


def refused() -> dict[str, Any]:
    """Rank 1 cannot, in one way after another."""
    is_one, outcome = dist.get_rank() == 1, {}
    ways = {
        "no compiler": mock.patch.object(compiling.shutil, "which", lambda name: None),
        "another host": mock.patch.object(shared_sum, "_host", lambda: ["another"]),
        "another file": mock.patch.object(shared_sum.os, "pread", lambda *given: b"another"),
        "no locks": mock.patch.object(shared_sum.fcntl, "lockf", no_locks),
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
    return sum("cpinfer sums" in line for line in [*files, *mapped])


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
        all_reduce = SharedSum.all_reduce

        def counted(self: SharedSum, x: Tensor, all_reduce: Any = all_reduce, summed: Any = summed) -> Tensor:
            summed.append(x.numel())
            return all_reduce(self, x)

        with (
            mock.patch.object(SharedSum, "all_reduce", counted),
            cpinfer.attach(model, launched.topology, tp_all_reduce=way) as attached,
        ):
            results = attached.generate(prompts_of((3, 40), vocab_size=128), greedy)
            outcome[way] = {
                "tokens": [list(r.token_ids) for r in results],
                "logprobs": [list(r.logprobs) for r in results],
                "stand_ins": sum(type(module.mp_group) is SharedSumGroup for module in layers),
                "num_sums": len(summed),
            }
        outcome[way]["restored"] = all(m.mp_group is group for m, group in zip(layers, groups, strict=True))
    outcome["num_layers"] = len(layers)
    outcome["left_open"] = num_segments()
    launched.topology.close()
    return outcome


CASES = {f.__name__: f for f in (sums, many, stand_in, differ, refused, late, leaves, killed, engine)}


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
