"""A rank of tp=2 x pcp=2 generates; the first says what the axes counted and what the cable did meanwhile.

Under the launchers of test_two_hosts.py, with a host's two ranks as one tp group.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from two_hosts import LINK

import cpinfer
from cpinfer.comm.axis import CountingComm
from cpinfer.comm.bootstrap import Launch, default_group
from cpinfer.config import JobConfig, SamplingParams, TensorParallel
from cpinfer.layout.grid import RankGrid
from cpinfer_integrations.launching import launch_inference

PROMPTS = [[1 + (7 * i + j) % 200 for j in range(1024)] for i in range(4)]


def cable_bytes() -> int:
    """What has come to this host over the cable."""
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if f"{LINK}:" in line)
    return int(line.split(":")[1].split()[0])


def main() -> None:
    launch = Launch.from_environ(os.environ)
    with default_group(launch):
        config = JobConfig(
            model="configs/recall-tiny", dtype="float32", kv_cache_gib=0.05, tensor_parallel=TensorParallel(tp_size=2)
        )
        model, topology = launch_inference(config, RankGrid(2, 2, 2), launch.device)
        counted = {name: CountingComm(getattr(topology, name)) for name in ("pcp", "dcp", "replica")}
        sampling = SamplingParams(temperature=0, max_new_tokens=32, ignore_eos=True)
        with cpinfer.attach(model, dataclasses.replace(topology, **counted), config) as engine:
            engine.generate(PROMPTS[:1], sampling)
            dist.barrier()
            before = cable_bytes(), {name: comm.traffic.received_bytes for name, comm in counted.items()}
            engine.generate(PROMPTS, sampling)
            dist.barrier()
            cable = cable_bytes() - before[0]
            axes = {name: comm.traffic.received_bytes - before[1][name] for name, comm in counted.items()}
        topology.close()
        received = torch.tensor([axes["pcp"], axes["dcp"]])
        dist.all_reduce(received)
        if launch.rank == 0:
            # Both ranks of a host receive their pcp and dcp traffic from the other host; of the ring over all four
            # ranks one of a host's two edges is the cable, over which all that a rank receives has come.
            expected = int(received.sum()) // 2 + axes["replica"]
            print(json.dumps({"cable_bytes": cable, "expected_bytes": expected, **axes}), flush=True)


if __name__ == "__main__":
    main()
