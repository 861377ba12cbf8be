"""Which layouts a machine allows, best first: for one long prompt, and for many sequences.

A layout is judged by what it fixes whatever the hardware: how many ranks work on a prompt, how many tokens the same
bytes hold, how much travels, and whether tp stays within a host. It is not judged by weights, which take `1/tp` of the
model on every rank and must fit, nor by seconds; `planning` does both, for a model and a machine.

The published advice (vLLM's "Context Parallel Deployment" and the guide of vllm-ascend) counts KV shards inside TP, on
top of pcp. In our terms, where `dcp` counts all shards of a sequence, it is one rule: pcp=2 and `dcp = pcp * rep`, with
`rep = max(1, tp / num_kv_heads)` copies of each KV head turned into shards. MLA has one (latent) KV head, so there
`rep = tp` and all tp ranks take part.

Where `dcp / pcp` does not divide `rep`, groups mix KV heads: each rank stores all heads of its group, so that sequences
get no longer than at `dcp = pcp * rep`, and more travels. Such layouts are listed, behind unmixed ones of equal merit.

>>> [option.sizes.dcp_size for option in legal_layouts(8, num_q_heads=64, num_kv_heads=2) if option.is_advised]
[2, 2, 4]
>>> str(for_long_prompt(legal_layouts(8, num_q_heads=64, num_kv_heads=8))[0].sizes)
'tp=4 pcp=2 dcp=2'
>>> str(for_long_prompt(legal_layouts(8, num_q_heads=128, num_kv_heads=1))[0].sizes)
'tp=4 pcp=2 dcp=8'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cpinfer.layout.capacity import KVLayout
from cpinfer.layout.grid import RankGrid, legal_dcp_sizes
from cpinfer.layout.heads import HeadPlacement
from cpinfer.layout.rules import LayoutSizes, layout_errors
from cpinfer.layout.traffic import decode_collectives


@dataclass(frozen=True)
class LayoutOption:
    """One legal layout of a machine and what it fixes.

    `kv_head`: what one KV head caches; unknown, its K and V are as wide as a query, whose width is then the unit of all
    that travels. `hidden_size`: of a token; None is as wide as its query heads, or with a latent as what of them is
    rotated. `ranks_per_host`: None for one host.
    """

    sizes: LayoutSizes
    kv_head: KVLayout = KVLayout(1, 1, 1)
    hidden_size: int | None = None
    ranks_per_host: int | None = None

    @property
    def grid(self) -> RankGrid:
        return RankGrid(self.sizes.tp_size, self.sizes.pcp_size, self.sizes.dcp_size, self.sizes.dp_size)

    @property
    def heads(self) -> HeadPlacement:
        return HeadPlacement(self.sizes.num_q_heads, self.sizes.num_kv_heads, self.sizes.tp_size)

    @property
    def is_advised(self) -> bool:
        """Whether it follows the published advice (head of this module), which is for tp within a host."""
        return self.sizes.pcp_size == 2 and self.sizes.dcp_size == 2 * self.heads.rep and not self.tp_spans_hosts

    @property
    def tp_spans_hosts(self) -> bool:
        """Whether ranks of a tp group are on several hosts."""
        return self.ranks_per_host is not None and self.ranks_per_host % self.sizes.tp_size != 0

    @property
    def is_mixed(self) -> bool:
        """Whether some DCP group stores several sets of KV heads."""
        return self.heads.mixes_heads(self.grid)

    @property
    def longest_sequence(self) -> float:
        """Tokens of the longest sequence, in units of what one rank holds of one KV head.

        All ranks have the same blocks, so those count that store the most heads.
        """
        return self.grid.dcp_size / self.heads.max_stored_heads(self.grid)

    @property
    def total_tokens(self) -> float:
        """Tokens that all homes of all replicas hold, in the same unit."""
        return self.longest_sequence * self.grid.num_homes * self.grid.dp_size

    @property
    def collectives_per_layer(self) -> int:
        """Collectives of a decode step: attention's, and the two all-reduces of tensor parallelism."""
        return decode_collectives(self.grid.dcp_size) + (2 if self.grid.tp_size > 1 else 0)

    @property
    def prefill_values(self) -> float:
        """Values that a rank receives per prompt token and layer: K/V gather and all-reduces."""
        places = self.grid.dcp_size if self.is_mixed else self.grid.pcp_size
        gather = (places - 1) * self.heads.kv_heads_per_rank * self.kv_head.width
        return (gather + self._all_reduce_values) / self.grid.pcp_size

    @property
    def decode_values(self) -> float:
        """Values that a rank receives per running sequence of the machine and layer."""
        sends_new_kv = self.grid.pcp_size > 1 or self.is_mixed
        of_queries = self.heads.q_heads_per_rank * (self.kv_head.k_dim + self.kv_head.v_dim)
        new = self.heads.kv_heads_per_rank * self.kv_head.width if sends_new_kv else 0
        exchange = (self.grid.dcp_size - 1) * (of_queries + new)
        return (exchange + self._all_reduce_values) / (self.grid.pcp_size * self.grid.dp_size)

    @property
    def _all_reduce_values(self) -> float:
        """Two ring all-reduces of a token's hidden state."""
        of_head = self.kv_head.k_dim - self.kv_head.v_dim if self.kv_head.v_is_prefix_of_k else self.kv_head.k_dim
        hidden_size = self.hidden_size or self.sizes.num_q_heads * of_head
        return 4 * hidden_size * (self.grid.tp_size - 1) / self.grid.tp_size


def legal_layouts(
    num_ranks: int,
    num_q_heads: int,
    num_kv_heads: int,
    *,
    tp_size: int | None = None,
    pcp_size: int | None = None,
    dcp_size: int | None = None,
    dp_size: int | None = None,
    kv_head: KVLayout | None = None,
    hidden_size: int | None = None,
    ranks_per_host: int | None = None,
) -> list[LayoutOption]:
    """Every legal layout that uses all `num_ranks`, with the given sizes where they are given; empty when none does.

    `kv_head`, `hidden_size` and `ranks_per_host` as `LayoutOption` has them.
    """

    def wanted(size: int, given: int | None) -> bool:
        return given is None or size == given

    options = []
    for tp in _divisors(num_ranks):
        for pcp in _divisors(num_ranks // tp):
            sizes = LayoutSizes(tp, pcp, 1, num_q_heads, num_kv_heads, dp_size=num_ranks // (tp * pcp))
            if not (wanted(tp, tp_size) and wanted(pcp, pcp_size) and wanted(sizes.dp_size, dp_size)):
                continue
            for dcp in legal_dcp_sizes(tp, pcp):
                option = replace(sizes, dcp_size=dcp)
                if wanted(dcp, dcp_size) and not layout_errors(option):
                    options.append(LayoutOption(option, kv_head or KVLayout(1, 1, 1), hidden_size, ranks_per_host))
    return options


def for_long_prompt(options: Sequence[LayoutOption]) -> list[LayoutOption]:
    """Best first: tp within hosts, most ranks on a prompt, the longest sequence, unmixed, advised, least traffic."""
    return sorted(
        options,
        key=lambda o: (
            o.tp_spans_hosts,
            -o.grid.ranks_per_replica,
            -o.longest_sequence,
            o.is_mixed,
            not o.is_advised,
            o.prefill_values,
        ),
    )


def for_many_sequences(options: Sequence[LayoutOption]) -> list[LayoutOption]:
    """Best first: tp within hosts, most tokens in all, least decode traffic, unmixed, fewest collectives, ranks."""
    return sorted(
        options,
        key=lambda o: (
            o.tp_spans_hosts,
            -o.total_tokens,
            o.decode_values,
            o.is_mixed,
            o.collectives_per_layer,
            -o.grid.ranks_per_replica,
        ),
    )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
