"""Stage comm: the exchanges of decode over several processes, one per GPU over NCCL. For users: it has never run here.

    torchrun --nproc-per-node 8 -m cpinfer_tools gpu-check --only comm

What comes back is checked against what one process computes from the same states, then timed. Bound: bytes received,
at the rate that a plain all-gather of as many bytes reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from cpinfer.attention.exchanges.all_to_all import AllToAllExchange
from cpinfer.comm.topology import Topology
from cpinfer.layout.grid import RankGrid
from cpinfer.ops.states import merge_states
from cpinfer_tools.gpu.stage import Figure, Found, Setting, median_s

# States in half precision are what they are before they travel: only their merging differs, in float32.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5}


def run(setting: Setting) -> Found:
    """Microseconds of gathering queries and of returning states, dcp over all processes."""
    if not dist.is_initialized():
        return Found(
            notes=("needs several processes: torchrun --nproc-per-node N -m cpinfer_tools gpu-check --only comm",)
        )
    size, rank = dist.get_world_size(), dist.get_rank()
    R, H, D = (2, 2, 8) if setting.is_smoke else (32, 32, 128)
    topology = Topology.from_world(RankGrid(1, size, size))
    try:
        exchange = AllToAllExchange(topology.dcp, pcp_size=size, wire_dtype=setting.dtype)
        # Every rank knows all states, so each can tell what it should get.
        generator = torch.Generator().manual_seed(0)
        outs = torch.randn(size, size * R, H, D, generator=generator).to(setting.device, setting.dtype)
        lses = torch.randn(size, size * R, H, generator=generator).to(setting.device)
        got = exchange.return_partials((outs[rank], lses[rank]))
        mine = slice(rank * R, (rank + 1) * R)
        want = merge_states([(outs[s, mine].float(), lses[s, mine]) for s in range(size)])
        error = max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))
        q = outs[rank, mine].contiguous()
        gathered = exchange.gather_rows(q)
        moved = q.new_empty(size, *q.shape)
        num_wrong = float((gathered.view_as(moved)[rank] != q).sum())
        repeats = 3 if setting.is_smoke else 50
        return_s = _slowest(partial(exchange.return_partials, (outs[rank], lses[rank])), setting, repeats)
        gather_s = _slowest(partial(exchange.gather_rows, q), setting, repeats)
        plain_s = _slowest(partial(topology.dcp.all_gather, q, moved), setting, repeats)
    finally:
        topology.close()
    rate = (size - 1) * q.nbytes / plain_s
    returned = (size - 1) * R * H * (D * setting.dtype.itemsize + 4)
    return Found(
        (
            Figure(f"{size} ranks: states returned, largest error", error, "", target=TOLERANCE[setting.dtype]),
            Figure(f"{size} ranks: gathered queries that are wrong", num_wrong, "", target=0),
            Figure(f"{size} ranks: gather of queries", gather_s * 1e6, "us", bound=plain_s * 1e6),
            Figure(
                f"{size} ranks: return of states, packed and merged", return_s * 1e6, "us", bound=returned / rate * 1e6
            ),
        )
    )


def _slowest(call: Callable[[], object], setting: Setting, repeats: int) -> float:
    """Seconds on the slowest rank; each call waits for all of them."""
    seconds: Tensor = torch.tensor(median_s(call, setting.device, repeats), device=setting.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)
