"""Machines to plan for: what their data sheets say of a GPU and of what lies between GPUs.

A data sheet says what cannot be exceeded. Of that a step reaches a share; the shares here are assumptions that no
measurement of this project stands behind yet (`gpu_check` sets its figures beside them), and so are latencies and the
host's seconds. They move predictions of all layouts alike, the order of layouts less.

>>> h100 = MACHINES["h100"]
>>> rates = h100.rates("bfloat16")
>>> f"{rates.memory_bandwidth / 1e12:.2f} TB/s, {rates.network.bandwidth / 1e9:.0f} GB/s between hosts"
'2.68 TB/s, 40 GB/s between hosts'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from cpinfer.layout.cost_model import Link, Rates

# Of the figure on the data sheet, what steps are taken to reach.
FLOPS_SHARE, MEMORY_SHARE, LINK_SHARE = 0.6, 0.8, 0.8
# Seconds of a tiny collective over two GPUs, on a host and between hosts.
LINK_LATENCY_S, NETWORK_LATENCY_S = 10e-6, 25e-6
# Of all launches of a layer, one by one, and of those that an exchange of decode states adds.
LAUNCH_S, EXCHANGE_LAUNCH_S = 200e-6, 60e-6
# Of a GPU's memory, what the runtime takes: CUDA's context, buffers of collectives, fragments.
RUNTIME_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Machine:
    """Hosts of one kind of GPU.

    Attributes:
        title: what it is, for people.
        gpus_per_host: GPUs of a host.
        gpu_bytes: memory of a GPU.
        memory_bandwidth: bytes per second of it.
        flops_16: FLOP per second of products in bfloat16 or float16, without sparsity.
        flops_32: of products in float32, without tensor cores.
        link_bandwidth: bytes per second that a GPU receives from others of its host.
        network_bandwidth: that it receives from other hosts, by its own port.
        sources: where the figures are published; figures that were given have none.
    """

    title: str
    gpus_per_host: int
    gpu_bytes: float
    memory_bandwidth: float
    flops_16: float
    flops_32: float
    link_bandwidth: float
    network_bandwidth: float
    sources: Mapping[str, str] = field(default_factory=dict)

    def rates(self, dtype: str, *, cuda_graphs: bool = False) -> Rates:
        """Of a GPU in a dtype of activations. `cuda_graphs`: steps are replayed, so that no launch is waited for."""
        flops = FLOPS_SHARE * (self.flops_32 if dtype == "float32" else self.flops_16)
        return Rates(
            product_flops=((1, flops),),
            attention_flops=flops,
            memory_bandwidth=MEMORY_SHARE * self.memory_bandwidth,
            link=Link(LINK_SHARE * self.link_bandwidth, LINK_LATENCY_S),
            network=Link(LINK_SHARE * self.network_bandwidth, NETWORK_LATENCY_S),
            ranks_per_host=self.gpus_per_host,
            layer_s=0.0 if cuda_graphs else LAUNCH_S,
            exchange_s=0.0 if cuda_graphs else EXCHANGE_LAUNCH_S,
            host_overlaps=True,
        )


_HOPPER = "nvidia.com/en-us/data-center/h100"
_HOPPER_SOURCES = {
    "flops": f"{_HOPPER}: 1,979 TFLOPS in bfloat16 with sparsity, half of it without; 67 in float32",
    "link": f"{_HOPPER}: NVLink 900 GB/s, half of it each way",
    "network": "docs.nvidia.com/dgx/dgxh100-user-guide: eight ConnectX-7 ports of 400 Gb/s, one for each GPU",
}
MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        "h100": Machine(
            "hosts of 8 H100 SXM",
            gpus_per_host=8,
            gpu_bytes=80e9,
            memory_bandwidth=3.35e12,
            flops_16=989.4e12,
            flops_32=67e12,
            link_bandwidth=450e9,
            network_bandwidth=50e9,
            sources={**_HOPPER_SOURCES, "memory": f"{_HOPPER}: 80 GB, 3.35 TB/s"},
        ),
        "h200": Machine(
            "hosts of 8 H200 SXM",
            gpus_per_host=8,
            gpu_bytes=141e9,
            memory_bandwidth=4.8e12,
            flops_16=989.4e12,
            flops_32=67e12,
            link_bandwidth=450e9,
            network_bandwidth=50e9,
            sources={**_HOPPER_SOURCES, "memory": "nvidia.com/en-us/data-center/h200: 141 GB, 4.8 TB/s"},
        ),
        "b200": Machine(
            "hosts of 8 B200",
            gpus_per_host=8,
            gpu_bytes=180e9,
            memory_bandwidth=8e12,
            flops_16=2.25e15,
            flops_32=75e12,
            link_bandwidth=900e9,
            network_bandwidth=50e9,
            sources={
                "memory": "nvidia.com/en-us/data-center/dgx-b200: 1,440 GB and 64 TB/s of eight",
                "flops": "nvidia.com/en-us/data-center/hgx: 36 PFLOPS in bfloat16 of eight with sparsity, half of it "
                "without; 600 TFLOPS in float32",
                "link": "nvidia.com/en-us/data-center/dgx-b200: NVLink 14.4 TB/s of eight, half of it each way",
                "network": "nvidia.com/en-us/data-center/dgx-b200: ports of 400 Gb/s (ConnectX-7), one for each GPU",
            },
        ),
    }
)
