"""Layouts for a model, a machine and its work: which fit, what they take, and what they wait for, best first.

A rank's memory is its weights, the KV pool, activations of the largest step, buffers of gathers and what the runtime
takes; a layout fits when one sequence of the wanted length has room in the pool. Seconds are `cost_model`'s. The order
is that of the seconds in which all sequences are prefilled and answered.

    GPU memory  | weights | activations | workspace | runtime |        KV pool: what is left, or what is given        |

Why pcp goes across hosts before tp does, in bytes that a rank receives per token that it computes, and layer:

>>> from cpinfer.layout.capacity import KVLayout
>>> from cpinfer.layout.step_traffic import PrefillWork, prefill_moved
>>> llama = ModelSizes(num_layers=1, hidden_size=8192, vocab_size=128256, num_q_heads=64, num_kv_heads=8,
...     kv_head=KVLayout(1, 128, 128), layer_params=0, windows=(None,))
>>> for grid in RankGrid(tp_size=8, pcp_size=2, dcp_size=2), RankGrid(tp_size=16):
...     work = PrefillWork.of([8192], [0], grid.pcp_size)
...     print({m.axis: m.received_bytes // work.split.part_len for m in prefill_moved(llama, grid, work, Widths())})
{'pcp': 512, 'tp': 57344, 'replica': 0}
{'tp': 61440, 'replica': 0}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cpinfer.layout.advice import LayoutOption
from cpinfer.layout.capacity import CACHE_DTYPE_BYTES, DTYPE_BYTES
from cpinfer.layout.cost_model import Rates, StepSeconds, decode_step, groups_of, prefill
from cpinfer.layout.grid import RankGrid
from cpinfer.layout.machines import RUNTIME_BYTES, Machine
from cpinfer.layout.shards import KVSharding
from cpinfer.layout.step_traffic import ModelSizes, Widths

_GIB = 2**30
# Prompts that are looked at step by step; more of them take as many times as long.
_MAX_PROMPTS = 64
_TRAVELS = {
    "tp": "all-reduces over tp",
    "pcp": "gathers over pcp",
    "dcp": "queries and states over dcp",
    "replica": "agreement on tokens",
}


@dataclass(frozen=True)
class PlannedModel:
    """A model, as its memory and its cost see it.

    Attributes:
        sizes: what seconds depend on.
        layer_bytes: weights that tensor parallelism divides.
        other_bytes: weights that every rank has a copy of.
        mlp_size: width of the MLP that a token passes, its experts together.
    """

    sizes: ModelSizes
    layer_bytes: int
    other_bytes: int
    mlp_size: int


@dataclass(frozen=True)
class Work:
    """What is to be done, and how the engine is configured.

    Attributes:
        prompt_tokens: of each prompt.
        new_tokens: of each answer.
        num_sequences: prompts on the whole machine, each with one answer.
        step_tokens: `max_num_batched_tokens`.
        max_num_seqs: of a replica, as the config's key.
        workspace_tokens: `context_workspace_tokens`.
        block_size: tokens of a KV block.
        interleave: tokens dealt to a shard at a time.
        dtype: of weights and activations.
        cache_dtype: of the KV cache.
        wire_dtype: of partial outputs that travel.
        kv_cache_gib: KV pool of a rank; None is what is left.
        cuda_graphs: whether decode steps are replayed.
    """

    prompt_tokens: int
    new_tokens: int
    num_sequences: int
    step_tokens: int = 8192
    max_num_seqs: int = 256
    workspace_tokens: int = 65536
    block_size: int = 16
    interleave: int = 16
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    wire_dtype: str = "bfloat16"
    kv_cache_gib: float | None = None
    cuda_graphs: bool = False

    @property
    def widths(self) -> Widths:
        """Bytes per value."""
        return Widths(DTYPE_BYTES[self.dtype], CACHE_DTYPE_BYTES[self.cache_dtype], DTYPE_BYTES[self.wire_dtype])

    @property
    def sequence_tokens(self) -> int:
        """Of a prompt with its answer, whose last token is never cached."""
        return self.prompt_tokens + max(0, self.new_tokens - 1)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the rank that needs the most, of `gpu` that there are.

    `kv_pool` is given, or what is left, which may be below 0. `kv_of_sequence` is what one sequence of the wanted
    length takes of it, its share of states included.
    """

    gpu: int
    weights: int
    activations: int
    workspace: int
    runtime: int
    kv_pool: int
    kv_of_sequence: int

    @property
    def kept(self) -> int:
        """All but the pool."""
        return self.weights + self.activations + self.workspace + self.runtime

    @property
    def unfit(self) -> str | None:
        """Why a layout does not fit, in a sentence; None where it does."""
        if self.weights > self.gpu:
            return f"does not fit: a GPU would hold {_gib(self.weights)} of weights, and has {_gib(self.gpu)}."
        if self.kept + self.kv_pool > self.gpu or self.kv_pool <= 0:
            return (
                f"does not fit: {_gib(self.weights)} of weights, {_gib(self.kept - self.weights)} of activations, "
                f"buffers and runtime and a KV pool of {_gib(max(0, self.kv_pool))}, on a GPU of {_gib(self.gpu)}."
            )
        if self.kv_of_sequence > self.kv_pool:
            return (
                f"does not fit: a sequence takes {_gib(self.kv_of_sequence)} of KV on a rank, where there are "
                f"{_gib(self.kv_pool)} beside {_gib(self.weights)} of weights."
            )
        return None


@dataclass(frozen=True)
class Plan:
    """A layout, and what becomes of the work in it. `unfit` says why it does not fit; the rest is then None.

    `sequences_at_once` and rates are those of the whole machine, `prefill` of one prompt, `decode` of a step of all
    sequences that run at once. `seconds`: of all the work.
    """

    option: LayoutOption
    memory: RankMemory
    unfit: str | None
    sequences_at_once: int | None = None
    prefill: StepSeconds | None = None
    decode: StepSeconds | None = None
    seconds: float | None = None
    tokens_per_s: float | None = None
    reason: str = ""


def plan_layouts(options: Sequence[LayoutOption], model: PlannedModel, machine: Machine, work: Work) -> list[Plan]:
    """The plans of layouts, the quickest first, behind them those that do not fit, the least too large first."""
    rates = machine.rates(work.dtype), machine.rates(work.dtype, cuda_graphs=work.cuda_graphs)
    plans = [_plan(option, model, machine, rates, work) for option in options]
    fitting = sorted((p for p in plans if p.unfit is None), key=_order)
    return fitting + sorted((p for p in plans if p.unfit is not None), key=lambda p: p.memory.kept)


def _order(each: Plan) -> tuple[float, float]:
    """Seconds, and where hosts are what all wait for, those of devices."""
    steps = [step for step in (each.prefill, each.decode) if step is not None]
    return each.seconds or 0.0, sum(step.products + step.attention + step.links for step in steps)


def rank_memory(option: LayoutOption, model: PlannedModel, machine: Machine, work: Work) -> RankMemory:
    """What a rank of a layout needs: weights and pool as the engine cuts them, the others estimated.

    Activations: what a layer has at once of the tokens of a step (its input, normed; queries, keys, values and output;
    gate, up and product of the MLP), and logits in float32. Workspace: what is sent and gathered of new keys and
    values, and of cached ones, expanded where they are latents.
    """
    sizes, grid, b = model.sizes, option.grid, work.widths.dtype
    heads, sharding = sizes.heads(grid), KVSharding(grid.dcp_size, work.interleave, work.block_size)
    stored = sizes.kv_layout(heads.max_stored_heads(grid))
    tokens = -(-min(work.step_tokens, work.prompt_tokens * work.num_sequences) // grid.pcp_size)
    own = sizes.kv_layout(heads.kv_heads_per_rank)
    k_dim, v_dim = sizes.expanded_head or (sizes.kv_head.k_dim, sizes.kv_head.v_dim)
    expanded = heads.q_heads_per_rank * (k_dim + v_dim) if sizes.expanded_head else 0
    per_token = 4 * sizes.hidden_size + heads.q_heads_per_rank * (k_dim + v_dim) + own.values_per_token
    per_token += 3 * model.mlp_size // grid.tp_size
    rows = min(work.num_sequences, work.max_num_seqs)
    gathered = tokens * grid.pcp_size * (own.values_per_token + expanded)
    places = grid.pcp_size if grid.context_runs_over_pcp else grid.dcp_size
    if work.prompt_tokens > work.step_tokens:
        at_once = min(work.workspace_tokens, work.step_tokens) if sizes.expanded_head else work.workspace_tokens
        context = min(work.prompt_tokens, at_once)
        gathered += context * (stored.values_per_token + expanded) * (2 if places == 1 else 1) + context // places
    weights = -(-model.layer_bytes // grid.tp_size) + model.other_bytes
    activations = tokens * per_token * b + rows * sizes.vocab_size * 2 * 4
    kept = weights + activations + gathered * b + RUNTIME_BYTES
    pool = int(machine.gpu_bytes) - kept if work.kv_cache_gib is None else int(work.kv_cache_gib * _GIB)
    local = sharding.num_blocks(work.sequence_tokens) * work.block_size
    of_sequence = local * stored.bytes_per_token(len(sizes.windows), work.cache_dtype)
    states = sizes.rank_states(grid)
    if states is not None:
        of_sequence += -(-states.bytes_per_sequence(work.dtype) // grid.row_ranks)
    return RankMemory(int(machine.gpu_bytes), weights, activations, gathered * b, RUNTIME_BYTES, pool, of_sequence)


def _plan(option: LayoutOption, model: PlannedModel, machine: Machine, rates: tuple[Rates, Rates], work: Work) -> Plan:
    memory = rank_memory(option, model, machine, work)
    if memory.unfit is not None:
        return Plan(option, memory, memory.unfit)
    grid, widths = option.grid, work.widths
    wanted = -(-work.num_sequences // grid.dp_size)
    room = memory.kv_pool // memory.kv_of_sequence * grid.num_homes
    at_once = min(wanted, room, work.max_num_seqs)
    one = prefill(model.sizes, grid, rates[0], [work.prompt_tokens], work.step_tokens, widths)
    # Prompts that fill steps take as many times as long as one; those that share steps are looked at together.
    seen = 1 if work.prompt_tokens >= work.step_tokens else min(wanted, _MAX_PROMPTS)
    prompts = prefill(model.sizes, grid, rates[0], [work.prompt_tokens] * seen, work.step_tokens, widths)
    context = work.prompt_tokens + work.new_tokens // 2
    decode = decode_step(model.sizes, grid, rates[1], [context] * at_once, widths)
    seconds = prompts.seconds * wanted / seen + -(-wanted // at_once) * work.new_tokens * decode.seconds
    return Plan(
        option,
        memory,
        None,
        sequences_at_once=min(work.num_sequences, at_once * grid.dp_size),
        prefill=one,
        decode=decode,
        seconds=seconds,
        tokens_per_s=work.num_sequences * work.new_tokens / seconds,
        reason=" ".join(_reasons(option, machine, one, decode, at_once, wanted, work)),
    )


def _reasons(
    option: LayoutOption, machine: Machine, one: StepSeconds, decode: StepSeconds, at_once: int, wanted: int, work: Work
) -> Iterator[str]:
    yield f"Prefill waits for {_limit(one, option.grid, machine)}, decode for {_limit(decode, option.grid, machine)}."
    if option.tp_spans_hosts:
        yield "tp spans hosts."
    if at_once < wanted:
        why = "max_num_seqs allows" if at_once == work.max_num_seqs else "the KV pool has room for"
        yield f"Of a replica's {wanted} sequences {why} {at_once} at once."


def _limit(step: StepSeconds, grid: RankGrid, machine: Machine) -> str:
    """What takes the longest of a step, for people: linear layers, attention, an axis over a link, or the host."""
    if step.host > step.products + step.attention + step.links:
        return "the host's launches"
    parts = {"linear layers": step.products, "attention": step.attention, "links": step.links}
    part = max(parts, key=lambda name: parts[name])
    axis = step.busiest_axis
    if part != "links" or axis is None:
        return part
    spans = any(len({rank // machine.gpus_per_host for rank in group}) > 1 for group in groups_of(grid, axis))
    return f"{_TRAVELS[axis]}, {'between hosts' if spans else 'within a host'}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB"
