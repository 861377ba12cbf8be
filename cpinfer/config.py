"""The config: one JSON file, keys as users know them from vLLM and DeepSpeed. These classes are the only schema.

`parse_config` turns plain data into a `Config` and refuses what it does not know; `load_config` reads a file, applies
overrides and resolves relative paths against the file's folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from cpinfer.errors import UserError
from cpinfer.refusals import refuse

T = TypeVar("T")


def _key(help: str, default: Any = dataclasses.MISSING, factory: Any = dataclasses.MISSING) -> Any:
    """A field with the sentence that the README's table of keys prints for it."""
    return field(default=default, default_factory=factory, metadata={"help": help})


# What `kv_cache_dtype` calls the dtypes of torch; None is the model's own.
KV_CACHE_DTYPES = {"auto": None, "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
# Other names for some of them: one thing has one, by which runs that are continued are compared.
_SAME_KV_CACHE_DTYPES = {None: "auto", "fp8": "fp8_e4m3"}


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen."""

    temperature: float = _key("0 is greedy", 1.0)
    top_k: int = _key("keep the k likeliest tokens; 0 keeps all", 0)
    top_p: float = _key("keep the likeliest tokens that hold this much probability together", 1.0)
    min_p: float = _key("keep tokens at least this likely relative to the likeliest", 0.0)
    repetition_penalty: float = _key("above 1 makes tokens of the prompt and of the answer less likely", 1.0)
    max_new_tokens: int = _key("longest answer, in tokens", 128)
    n: int = _key("samples per prompt", 1)
    seed: int = _key("with it the text is a function of the prompt, the sample and the model alone", 0)
    stop: tuple[str, ...] = _key("texts that end an answer; they are cut off `text`, not off `token_ids`", ())
    stop_token_ids: tuple[int, ...] = _key("tokens that end an answer, beside the model's own", ())
    ignore_eos: bool = _key("do not end at the model's end-of-text tokens", False)
    min_new_tokens: int = _key("no end of any kind before so many tokens", 0)
    logit_bias: tuple[tuple[int, float], ...] = _key("added to the logits of tokens; in JSON an object by token id", ())
    top_logprobs: int = _key("report so many of the likeliest tokens at each place, with raw logprobs", 0)

    def __post_init__(self) -> None:
        # Below 1e-5 logits divided by it overflow float32.
        ok = self.temperature == 0 or 1e-5 <= self.temperature < math.inf
        _check(ok, "temperature", self.temperature, "0 (greedy), or at least 1e-5 and finite")
        _check(self.top_k >= 0, "top_k", self.top_k, "at least 0 (0 keeps all tokens)")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        penalty = self.repetition_penalty
        _check(0 < penalty < math.inf, "repetition_penalty", penalty, "above 0 and finite")
        _check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _check(self.n >= 1, "n", self.n, "at least 1")
        _check(0 <= self.seed < 2**64, "seed", self.seed, "in [0, 2**64)")
        _check(self.min_new_tokens >= 0, "min_new_tokens", self.min_new_tokens, "at least 0")
        _check(self.top_logprobs >= 0, "top_logprobs", self.top_logprobs, "at least 0")
        finite = all(math.isfinite(bias) for _, bias in self.logit_bias)
        _check(finite, "logit_bias", dict(self.logit_bias), "finite for every token")
        _check("" not in self.stop, "stop", list(self.stop), "free of empty strings")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def shaped_by(self) -> tuple[str, ...]:
        """What beside the temperature shapes the distribution of a token, by key."""
        shapes = {
            "top_k": self.top_k > 0,
            "top_p": self.top_p < 1,
            "min_p": self.min_p > 0,
            "repetition_penalty": self.repetition_penalty != 1,
            "logit_bias": bool(self.logit_bias),
            # An answer has a token at least: nothing may end before it anyway.
            "min_new_tokens": self.min_new_tokens > 1,
        }
        return tuple(key for key, does in shapes.items() if does)

    @cached_property
    def distribution(self) -> tuple[object, ...]:
        """What shapes the distribution of a token: rows that agree in it are sampled in one pass."""
        shape = (self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        return (*shape, self.logit_bias, self.top_logprobs)


@dataclass(frozen=True)
class TensorParallel:
    """The framework's own tensor parallelism."""

    tp_size: int = _key("ranks that share the weights of one replica", 1)
    provider: Literal["autotp", "transformers"] = _key(
        "who shards the weights of a model that a tool loads: DeepSpeed's AutoTP, or Transformers", "autotp"
    )

    def __post_init__(self) -> None:
        _check(self.tp_size >= 1, "tp_size", self.tp_size, "at least 1")


@dataclass(frozen=True)
class WandbConfig:
    """Where the summary of a run is logged."""

    project: str = _key("W&B project", "cpinfer")
    name: str | None = _key("run name; default: the name of the output", None)
    group: str | None = _key("run group", None)
    mode: Literal["auto", "online", "offline"] = _key(
        "auto is online with WANDB_API_KEY, offline without it or where WANDB_MODE says so", "auto"
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """What `tools/eval_longctx.py` asks a model."""

    tasks: tuple[str, ...] = _key("long-context tasks, made from a seed; all of them when empty", ())
    task_file: str | None = _key("questions, JSON Lines (relative to the config file), instead of `tasks`", None)
    lengths: tuple[int, ...] = _key("tokens of a prompt and its answer together", (4096,))
    num_samples: int | None = _key("samples per task and length; default: 10, or all of a file", None)
    depths: tuple[float, ...] = _key(
        "where the needle lies, as shares of the haystack; samples take them in turn", (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    seeds: tuple[int, ...] = _key("sampling seeds: each is one run over all samples", (0,))
    num_shots: int = _key("examples before each question of a gsm8k file, from its first lines", 5)

    def __post_init__(self) -> None:
        _check(not (self.tasks and self.task_file), "task_file", self.task_file, "left out where `tasks` are named")
        ok = bool(self.lengths) and all(length >= 1 for length in self.lengths)
        _check(ok, "lengths", self.lengths, "one or more, each at least 1")
        _check(self.num_samples is None or self.num_samples >= 1, "num_samples", self.num_samples, "at least 1")
        ok = bool(self.depths) and all(0 <= depth <= 1 for depth in self.depths)
        _check(ok, "depths", self.depths, "one or more, each in [0, 1]")
        ok = bool(self.seeds) and all(0 <= seed < 2**64 for seed in self.seeds)
        _check(ok, "seeds", self.seeds, "one or more, each in [0, 2**64)")
        _check(self.num_shots >= 0, "num_shots", self.num_shots, "at least 0")
        for name in ("tasks", "lengths", "depths", "seeds"):
            values = getattr(self, name)
            _check(len(set(values)) == len(values), name, values, "free of repetitions")


@dataclass(frozen=True)
class ComparisonConfig:
    """What `tools/compare.py` makes of an evaluation: the same one over several layouts."""

    layouts: tuple[str, ...] = _key('names such as "tp4_pcp2_dcp4", or configs; the first is the reference', ())
    tolerance: float | None = _key(
        "largest logprob difference that passes; default: 1e-4 in float32, 0.05 in half precision", None
    )

    def __post_init__(self) -> None:
        ok = self.tolerance is None or 0 <= self.tolerance < math.inf
        _check(ok, "tolerance", self.tolerance, "at least 0 and finite")


@dataclass(frozen=True)
class RolloutConfig:
    """How a trainer lends its model for a rollout phase."""

    gather: Literal["full", "layerwise", "tp_shards"] = _key(
        "weights that ZeRO-3 or FSDP has dealt out: all at once, a layer when it is needed, or each rank's slice of "
        "tensor parallelism over `tp_size` lent ranks",
        "full",
    )
    mismatch_every: int = _key(
        "compare rollout logprobs with the training forward's in every so many phases; 0 never does", 1
    )

    def __post_init__(self) -> None:
        _check(self.mismatch_every >= 0, "mismatch_every", self.mismatch_every, "at least 0")


@dataclass(frozen=True)
class TrainingConfig:
    """What `tools/train_grpo.py` trains, and how."""

    reward: str = _key('a reward of the tool, or "FILE.py:FUNCTION" as TRL calls it (relative to the config file)', "")
    num_steps: int = _key("optimiser steps", 100)
    learning_rate: float = _key("of AdamW, constant", 1e-6)
    batch_size: int = _key("samples per process and step", 8)
    num_generations: int = _key("samples per prompt: the group that rewards are compared in", 8)
    kl_coef: float = _key("weight of the KL to the model before training; 0 keeps no second model", 0.0)
    entropy_coef: float = _key("weight of the entropy bonus", 0.0)
    zero_stage: Literal[0, 1, 2, 3] | None = _key("DeepSpeed ZeRO stage; null trains with DDP, without DeepSpeed", 0)
    lora_rank: int = _key("train a LoRA adapter of this rank on all linear layers; 0 trains all weights", 0)
    fresh_weights: bool = _key("start from random weights instead of the model's", False)
    generator: Literal["cpinfer", "transformers"] = _key("who generates the rollouts", "cpinfer")
    seed: int = _key("of weights, order of prompts and samples", 0)

    def __post_init__(self) -> None:
        _check(self.num_steps >= 1, "num_steps", self.num_steps, "at least 1")
        _check(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "above 0 and finite")
        _check(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _check(self.num_generations >= 2, "num_generations", self.num_generations, "at least 2")
        _check(0 <= self.kl_coef < math.inf, "kl_coef", self.kl_coef, "at least 0 and finite")
        _check(0 <= self.entropy_coef < math.inf, "entropy_coef", self.entropy_coef, "at least 0 and finite")
        _check(self.lora_rank >= 0, "lora_rank", self.lora_rank, "at least 0")
        _check(0 <= self.seed < 2**31, "seed", self.seed, "in [0, 2**31)")


@dataclass(frozen=True)
class Config:
    """Everything a run needs to know. Sizes left null are worked out from the others and from the world."""

    model: str | None = _key("Hugging Face id, or folder (relative to the config file)", None)
    dtype: Literal["float32", "bfloat16", "float16"] = _key("of weights, activations and KV cache", "bfloat16")
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"] | None = _key(
        "auto is `dtype`; else K and V are rounded to fp8 when they are made, so more tokens fit. fp8 is fp8_e4m3",
        "auto",
    )
    backend: Literal["auto", "torch", "flashinfer"] = _key("attention kernels", "auto")
    tensor_parallel: TensorParallel = _key("tensor parallelism", factory=TensorParallel)
    prefill_context_parallel_size: int = _key("ranks that share the prefill of a prompt (pcp)", 1)
    decode_context_parallel_size: int | None = _key("KV shards of a sequence (dcp); default: pcp", None)
    data_parallel_size: int | None = _key("independent replicas (dp); default: what is left of the world", None)
    cp_kv_cache_interleave_size: int | None = _key("tokens dealt to a KV shard at a time; default: block_size", None)
    cp_wire_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _key(
        "dtype in which partial attention outputs travel; auto is `dtype` (lse is always float32)", "auto"
    )
    block_size: int = _key("tokens of one shard per KV block", 16)
    kv_cache_gib: float | None = _key("KV pool per rank; default: half the free memory on CUDA, 0.25 on CPU", None)
    max_num_seqs: int = _key("sequences that run at once", 256)
    max_num_batched_tokens: int = _key("tokens that one step computes at most", 8192)
    enable_prefix_caching: bool = _key("keep KV of finished sequences, for prompts that begin alike", True)
    context_exchange: Literal["auto", "queries", "kv"] = _key(
        "what travels when a prompt continues cached KV; auto is what moves fewer bytes, alone what computes less",
        "auto",
    )
    context_workspace_tokens: int = _key("cached tokens that are gathered at a time, when KV travels", 65536)
    decode_exchange: Literal["a2a", "ag_rs", "replicate_q"] = _key(
        "how partial attention comes back: all-to-all, all-gather and reduce-scatter, or all rows on all ranks",
        "a2a",
    )
    cascade_attention: Literal["auto", "on", "off"] = _key(
        "samples of one prompt attend to it together in decode; auto where that is known to be faster (so far on CPU)",
        "auto",
    )
    cuda_graphs: bool = _key(
        "replay decode steps from CUDA graphs, by number of sequences (FlashInfer, models without experts)", False
    )
    check_ranks: Literal["samples", "full"] = _key(
        "by what engines see, when they attach, that ranks hold equal weights: a few elements of each, or all",
        "samples",
    )
    sampling: SamplingParams = _key("how tokens are chosen", factory=SamplingParams)
    input: str | None = _key("prompts, JSON Lines (relative to the config file)", None)
    output: str | None = _key("results, JSON Lines; default: a new folder under runs/", None)
    evaluation: EvaluationConfig = _key("long-context evaluation", factory=EvaluationConfig)
    comparison: ComparisonConfig = _key("comparison of layouts", factory=ComparisonConfig)
    rollout: RolloutConfig = _key("rollout phases inside a trainer", factory=RolloutConfig)
    training: TrainingConfig = _key("reinforcement learning with TRL", factory=TrainingConfig)
    collective_timeout_s: float = _key(
        "seconds that a collective may wait for a rank before those that wait end; more than the slowest needs to load "
        "weights and build kernels",
        600.0,
    )
    wandb: WandbConfig | None = _key(
        "log to W&B: an object with `project`, `name`, `group`, `mode`; without it nothing is", None
    )

    def __post_init__(self) -> None:
        sizes = ("prefill_context_parallel_size", "block_size", "max_num_seqs", "max_num_batched_tokens")
        for name in (*sizes, "context_workspace_tokens"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("decode_context_parallel_size", "data_parallel_size", "cp_kv_cache_interleave_size"):
            value = getattr(self, name)
            _check(value is None or value >= 1, name, value, "at least 1")
        if self.kv_cache_dtype in _SAME_KV_CACHE_DTYPES:
            object.__setattr__(self, "kv_cache_dtype", _SAME_KV_CACHE_DTYPES[self.kv_cache_dtype])
        gib = self.kv_cache_gib
        _check(gib is None or 0 < gib < math.inf, "kv_cache_gib", gib, "above 0 and finite")
        timeout_s = self.collective_timeout_s
        # Libraries count it in milliseconds, in 32 bits.
        _check(0.001 <= timeout_s <= 2e6, "collective_timeout_s", timeout_s, "at least 0.001 and at most 2000000")
        ok = self.cascade_attention != "on" or not self.cuda_graphs
        _check(
            ok, "cascade_attention", self.cascade_attention, '"auto" or "off" with cuda_graphs, whose rows are fixed'
        )
        if self.backend == "flashinfer" and self.dtype == "float32":
            raise refuse("flashinfer_dtype", 'backend="flashinfer" with dtype="float32"')

    @property
    def tp_size(self) -> int:
        return self.tensor_parallel.tp_size

    @property
    def pcp_size(self) -> int:
        return self.prefill_context_parallel_size

    @property
    def dcp_size(self) -> int:
        return self.decode_context_parallel_size or self.pcp_size

    @property
    def interleave(self) -> int:
        return self.cp_kv_cache_interleave_size or self.block_size

    def cache_dtype(self, dtype: str) -> str:
        """What the KV cache of a model in `dtype` has, both as torch calls them."""
        return KV_CACHE_DTYPES[self.kv_cache_dtype or "auto"] or dtype


# Keys that other engines know and this one refuses by name, with the row of the table that says why.
_REFUSED_KEYS = {
    "speculative_config": "speculative_decoding",
    "speculative_model": "speculative_decoding",
    "num_speculative_tokens": "speculative_decoding",
    "pipeline_parallel": "pipeline_parallel",
    "pipeline_parallel_size": "pipeline_parallel",
    "limit_mm_per_prompt": "multimodal",
    "quantization": "quantized_weights",
}
# Values of known keys, likewise.
_REFUSED_VALUES = {
    ("backend", value): "flashinfer_family" for value in ("trtllm", "trtllm-gen", "cudnn", "cutlass", "cute-dsl")
}
# What asks for nothing may stand in a config that was written for another engine.
_ASKS_FOR_NOTHING = {"pipeline_parallel_size": ("null", "1")}


def load_config(path: str | Path, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None) -> Config:
    """Read a config file, apply `a.b=value` overrides (values in JSON, else text), resolve its relative paths.

    `defaults`, plain data of a tool's own, stand where neither says anything.

    UserError, naming the file, for anything that cannot be read or understood.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}. Give the path of a JSON file with --config.") from error
    except ValueError as error:
        raise UserError(f"config {path}: not valid JSON: {error}.") from error
    try:
        if not isinstance(data, dict):
            raise UserError(f"the file holds a {type(data).__name__}, an object with config keys was wanted.")
        for override in overrides:
            apply_override(data, override)
        data = _over(defaults or {}, data)
        return _resolve_paths(parse_config(data), path.parent)
    except UserError as error:
        raise type(error)(f"config {path}: {error}") from error


def parse_config(data: Mapping[str, Any]) -> Config:
    """A `Config` from plain data. UserError for an unknown key (naming the nearest), wrong type or illegal value."""
    return _parse_object(Config, data, "")


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain data that `parse_config` turns back into an equal config."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[no-any-return]


def apply_override(data: dict[str, Any], override: str) -> None:
    """Put `a.b=value` into plain config data; the value is JSON, else text."""
    key, eq, text = override.partition("=")
    if not eq or not key:
        raise UserError(f"--set {override!r} is not of the form a.b=value.")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    *parents, last = key.split(".")
    for parent in parents:
        inner = data.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {override!r}: {parent!r} is {inner!r}, not an object with keys of its own.")
        data = inner
    data[last] = value


def _over(defaults: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with what `defaults` have beside it, at every depth."""
    merged = {**defaults, **data}
    for key in defaults.keys() & data.keys():
        if isinstance(defaults[key], Mapping) and isinstance(data[key], Mapping):
            merged[key] = _over(defaults[key], data[key])
    return merged


def _resolve_paths(config: Config, folder: Path) -> Config:
    def at(path: str) -> str:
        return str(folder / Path(path).expanduser())

    def resolve(path: str | None) -> str | None:
        return None if path is None else at(path)

    model = config.model
    # A hub id looks like a relative path, so a name counts as a folder when there is one, or when it says so itself.
    if model is not None and ((folder / model).is_dir() or model.startswith((".", "/", "~"))):
        model = resolve(model)
    reward = config.training.reward
    return dataclasses.replace(
        config,
        model=model,
        input=resolve(config.input),
        output=resolve(config.output),
        evaluation=dataclasses.replace(config.evaluation, task_file=resolve(config.evaluation.task_file)),
        training=dataclasses.replace(config.training, reward=at(reward) if ":" in reward else reward),
    )


def _parse_object(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    hints = typing.get_type_hints(cls)
    for key, value in data.items():
        harmless = _ASKS_FOR_NOTHING.get(key, ("null", "false", "0"))
        if key in _REFUSED_KEYS and json.dumps(value, default=str) not in harmless:
            raise refuse(_REFUSED_KEYS[key], f'key "{where}{key}"')
        if isinstance(value, str) and (where + key, value) in _REFUSED_VALUES:
            raise refuse(_REFUSED_VALUES[where + key, value], f'key "{where}{key}" is "{value}"')
        if key not in hints and key not in _REFUSED_KEYS:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.0)
            raise UserError(f'unknown key "{where}{key}"; the nearest known key is "{where}{near[0]}".')
    return cls(**{k: _parse_value(hints[k], v, where + k) for k, v in data.items() if k in hints})


def _parse_value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        hint = next(a for a in args if a is not type(None))
        origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _parse_object(typing.cast("type[Any]", hint), value, where + ".")
    if origin is Literal and value in args:
        return value
    if origin is tuple and args[-1] is not ... and isinstance(value, (list, tuple)) and len(value) == len(args):
        return tuple(_parse_value(arg, item, where) for arg, item in zip(args, value, strict=True))
    if origin is tuple and typing.get_origin(args[0]) is tuple and isinstance(value, Mapping):
        # Pairs are written as an object, whose keys JSON makes texts.
        value = [[int(key) if str(key).isdigit() else key, item] for key, item in value.items()]
    if origin is tuple and args[-1] is ... and isinstance(value, (list, tuple)):
        return tuple(_parse_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    # bool is an int to Python, but `"n": true` is a mistake to everyone else.
    if isinstance(hint, type) and isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        return value
    raise UserError(f'"{where}" is {json.dumps(value, default=str)}; {_wanted(hint)} was wanted.')


def _wanted(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(a) for a in args)
    if origin is tuple and args[-1] is not ...:
        return "a pair of " + " and ".join(map(_wanted, args))
    if origin is tuple:
        return f"a list, each item {_wanted(args[0])},"
    if dataclasses.is_dataclass(hint):
        return "an object with keys " + ", ".join(f.name for f in dataclasses.fields(hint))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[hint]


def _check(ok: bool, name: str, value: Any, wanted: str) -> None:
    if not ok:
        raise UserError(f'"{name}" is {json.dumps(value)}; it must be {wanted}.')
