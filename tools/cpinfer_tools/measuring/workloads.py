"""The models and prompts that the benchmarks run, made from seeds, and the least time they could take.

Letters: T prompt tokens, H query heads, D head dim, L layers, N generated tokens.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FLOAT32_BYTES = 4
# Of logits: answers that part here are both right. A choice: the gap between the two likeliest tokens has a median of
# about 1 here, rounding moves it by less than 1e-4.
NEAR_TIE = 1e-3


@dataclass(frozen=True)
class ModelShape:
    """A random Qwen2-like model in float32."""

    num_layers: int = 4
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_q_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    vocab_size: int = 1024
    seed: int = 0

    @property
    def layer_params(self) -> int:
        attention = 2 * self.hidden_size * self.head_dim * (self.num_q_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def params_per_token(self) -> int:
        """Weights that multiply every token, the vocabulary aside."""
        return self.num_layers * self.layer_params

    @property
    def vocab_params(self) -> int:
        return self.hidden_size * self.vocab_size

    @property
    def kv_bytes_per_token(self) -> int:
        return self.num_layers * self.num_kv_heads * 2 * self.head_dim * FLOAT32_BYTES

    @property
    def flops_per_pair(self) -> int:
        """Of one query-key pair, all heads and layers: a dot product and a weighted sum of D each."""
        return 4 * self.num_q_heads * self.head_dim * self.num_layers


QUICK_SHAPE = ModelShape(
    num_layers=2, hidden_size=128, intermediate_size=96, num_q_heads=4, num_kv_heads=2, head_dim=32, vocab_size=128
)


def make_model(shape: ModelShape) -> Any:
    """The model of a shape, the same on every call and rank; no token ends a text.

    As Transformers initialises it, attention is flat and adds next to nothing to a token's own embedding: greedy
    answers then repeat one token whatever the prompt says, and comparing them shows nothing. Here attention logits have
    a std of about 3 and attention's output is as large as the embedding, so answers vary, and change with any key.
    """
    from transformers import Qwen2Config

    config = Qwen2Config(
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.num_q_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    return random_model(config, shape.seed, normal(peaked_stds(shape.hidden_size)))


def peaked_stds(hidden_size: int) -> dict[str, float]:
    """Of weights by the ends of their names, for models whose answers vary: see `make_model`."""
    unit = hidden_size**-0.5  # with weights of this std a normalised token projects to values of std 1
    return {
        **dict.fromkeys(("q_proj.bias", "k_proj.bias"), 1.0),  # logits of std 1.5^2 + 1
        **dict.fromkeys(("q_proj", "k_proj"), 1.5 * unit),
        **dict.fromkeys(("v_proj", "o_proj"), unit),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 0.2 * unit),
        "embed_tokens": 1.0,
        "lm_head": 4.5 * unit,
    }


def normal(stds: Mapping[str, float]) -> dict[str, Callable[[Any], object]]:
    """What draws weights of these standard deviations, for `random_model`."""
    return {end: methodcaller("normal_", std=std) for end, std in stds.items()}


def random_model(config: Any, seed: int, draws: Mapping[str, Callable[[Any], object]]) -> Any:
    """A config's model in float32, the same on every call and rank.

    `draws` gives weights their values, in place, by the end of their names without ".weight"; others are as
    Transformers initialises them.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            stem = f".{name.removesuffix('.weight')}"
            for draw in (draw for end, draw in draws.items() if stem.endswith(f".{end}")):
                draw(weight)
    return model


@dataclass(frozen=True)
class Workload:
    """Prompts as token ids, how many tokens each is to be continued by, and how many samples there are of each.

    `num_shared`: tokens that all prompts begin with, which bounds count once.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: tuple[int, ...]
    num_samples: int = 1
    num_shared: int = 0

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.max_new_tokens):
            raise ValueError(f"{len(self.prompts)} prompts, {len(self.max_new_tokens)} lengths of answers")

    @property
    def num_generated_tokens(self) -> int:
        return self.num_samples * sum(self.max_new_tokens)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    def samples(self) -> list[tuple[tuple[int, ...], int]]:
        """(prompt, tokens wanted) of every sample, those of a prompt side by side."""
        return [(p, n) for p, n in zip(self.prompts, self.max_new_tokens, strict=True) for _ in range(self.num_samples)]

    def kv_blocks(self, block_size: int) -> int:
        """Blocks of KV when all samples run at once and share nothing."""
        return sum(-(-(len(p) + n) // block_size) for p, n in self.samples())

    def described(self) -> str:
        lens, new = list(map(len, self.prompts)), self.max_new_tokens
        shared = f" ({self.num_shared:,} of them shared)" if self.num_shared else ""
        return (
            f"{len(lens)} prompt(s) of {_range(lens)} tokens{shared} x {self.num_samples} sample(s), "
            f"{_range(new)} new tokens; "
            f"{self.num_prompt_tokens:,} prompt tokens (each prompt once), {self.num_generated_tokens:,} generated"
        )


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}..{high:,}"


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Random token ids, the same on every call."""
    rng = random.Random(seed)
    return tuple(tuple(rng.randrange(vocab_size) for _ in range(n)) for n in lengths)


def spread(low: int, high: int, num: int, *, geometric: bool, seed: int) -> list[int]:
    """`num` lengths from `low` to `high`, both included, evenly spaced (or by equal factors), in random order.

    >>> sorted(spread(32, 512, 5, geometric=True, seed=0))
    [32, 64, 128, 256, 512]
    """
    steps = [i / (num - 1) for i in range(num)]
    values = [round(low * (high / low) ** x if geometric else low + (high - low) * x) for x in steps]
    random.Random(seed).shuffle(values)
    return values


def engine_workloads(shape: ModelShape, *, quick: bool) -> list[Workload]:
    """A GRPO group, a ragged batch with a long tail of answers, one long prompt, many short ones, and many questions
    about one document."""
    vocab = shape.vocab_size
    if quick:
        groups, samples, group_len, group_new = 2, 2, 32, 8
        ragged, lens, new = 4, (8, 48), (4, 16)
        long_len, long_new = 256, 8
        short, questions, document = 8, 4, 96
    else:
        groups, samples, group_len, group_new = 8, 8, 512, 128
        ragged, lens, new = 32, (64, 1024), (32, 512)
        long_len, long_new = 16384, 64
        short, questions, document = 256, 64, 8192
    ragged_lens = spread(*lens, ragged, geometric=False, seed=11)
    return [
        Workload("group", random_prompts([group_len] * groups, vocab, 1), (group_new,) * groups, samples),
        # Equal factors: many short answers and a few long ones, as rollouts have.
        Workload(
            "ragged",
            random_prompts(ragged_lens, vocab, 2),
            tuple(spread(*new, ragged, geometric=True, seed=12)),
        ),
        Workload("long", random_prompts([long_len], vocab, 3), (long_new,)),
        Workload("short", random_prompts([32] * short, vocab, 4), (16,) * short),
        Workload(
            "shared",
            tuple(
                (*random_prompts([document], vocab, 5)[0], *question)
                for question in random_prompts([32] * questions, vocab, 6)
            ),
            (16,) * questions,
            num_shared=document,
        ),
    ]


@dataclass(frozen=True)
class Speed:
    """What a rank reaches on this machine while the other ranks do the same."""

    gflop_per_s: float
    gbyte_per_s: float


def floor_s(workload: Workload, shape: ModelShape, speed: Speed, tp_size: int = 1) -> float:
    """The least time a workload can take at this speed, when every prompt is computed once and all samples at once.

    Prefill is bound by arithmetic, decode steps as `decode_floor_s` has them.
    """
    shared, again = workload.num_shared, len(workload.prompts) - 1
    pairs = sum(len(p) * (len(p) + 1) // 2 for p in workload.prompts) - again * shared * (shared + 1) // 2
    num_tokens = workload.num_prompt_tokens - again * shared
    flops = 2.0 * shape.params_per_token * num_tokens + shape.flops_per_pair * pairs
    flops += 2.0 * shape.vocab_params * len(workload.prompts)
    seconds = flops / (tp_size * speed.gflop_per_s * 1e9)
    steps = range(1, max(workload.max_new_tokens))
    return seconds + sum(decode_floor_s(workload, shape, speed, step) for step in steps) / tp_size


def decode_floor_s(
    workload: Workload, shape: ModelShape, speed: Speed, step: int, *, prompt_reads: int | None = None
) -> float:
    """The least time of decode step `step`, of all samples that want more tokens than that.

    It is bound by arithmetic or by bytes, whichever is more: weights once, the KV of every sample's own tokens once,
    and that of a prompt once for all of its samples, or `prompt_reads` times. Communication, sampling and everything
    between kernels are free.
    """
    params = shape.params_per_token + shape.vocab_params
    prompts = [len(p) for p, n in zip(workload.prompts, workload.max_new_tokens, strict=True) if n > step]
    num_rows, num_reads = len(prompts) * workload.num_samples, 1 if prompt_reads is None else prompt_reads
    num_keys = sum(prompts) * workload.num_samples + step * num_rows
    flops = 2.0 * params * num_rows + shape.flops_per_pair * num_keys
    read = sum(prompts) - max(0, len(prompts) - 1) * workload.num_shared
    num_bytes = params * FLOAT32_BYTES + shape.kv_bytes_per_token * (read * num_reads + step * num_rows)
    return max(flops / (speed.gflop_per_s * 1e9), num_bytes / (speed.gbyte_per_s * 1e9))


def measure_speed(shape: ModelShape) -> Speed:
    """This rank's speed: a float32 matrix product as large as an MLP's over 2,048 tokens, and a sum over 256 MiB.

    Of torch's product and that by a prepacked weight the faster counts.
    """
    import torch

    from cpinfer.models.prepacking import PrepackedLinear

    x, linear = torch.randn(2048, shape.hidden_size), torch.nn.Linear(shape.hidden_size, shape.intermediate_size)
    packed = PrepackedLinear(linear)
    packed.pack()
    big = torch.ones(64 * 2**20)
    with torch.no_grad():
        product_s = min(_best_s(lambda: linear(x)), _best_s(lambda: packed.forward(x)))
    sum_s = _best_s(lambda: big.sum())
    flops = 2 * x.shape[0] * linear.weight.numel()
    return Speed(gflop_per_s=flops / product_s / 1e9, gbyte_per_s=big.nbytes / sum_s / 1e9)


def _best_s(call: Any, repeats: int = 5) -> float:
    import time

    best = float("inf")
    for _ in range(repeats + 1):
        start_s = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start_s)
    return best


def near_tie_margin(model: Any, prompt: Sequence[int], given: Sequence[int], other: Sequence[int]) -> float:
    """How much likelier the model finds one of two answers' first differing tokens, in logprob; inf for no such token.

    `model` is whole, in this process. Within rounding of 0 both answers are right.
    """
    import torch

    at = next((i for i, (a, b) in enumerate(zip(given, other, strict=False)) if a != b), None)
    if at is None or len(given) != len(other):
        return float("inf")
    ids = torch.tensor([[*prompt, *given[:at]]])
    with torch.no_grad():
        logits: torch.Tensor = model(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    return abs(float(logits[given[at]] - logits[other[at]]))


def partings(
    model: Any, workload: Workload, given: Sequence[Sequence[int]], other: Sequence[Sequence[int]]
) -> Iterator[tuple[int, float]]:
    """The samples whose answers differ, each with its `near_tie_margin`."""
    for i, (prompt, _) in enumerate(workload.samples()):
        if given[i] != other[i]:
            yield i, near_tie_margin(model, prompt, given[i], other[i])


def shape_as_dict(shape: ModelShape) -> dict[str, Any]:
    """Plain data that `ModelShape(**data)` turns back."""
    return dataclasses.asdict(shape)
