"""The config: one JSON file, keys as users know them from vLLM and DeepSpeed. These classes are the only schema.

`parse_config` turns plain data into a `Config` and refuses what it does not know; `load_config` reads a file, applies
overrides and resolves relative paths against the file's folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from cpinfer.errors import UserError, quoted
from cpinfer.refusals import refuse
from cpinfer.schema import Bounds, Checked, parse_object, require
from cpinfer.schema import key as _key
from cpinfer.strict_json import NotJSONError, parse_json, read_text

# Bounds that nobody needs to pass, and below which nothing that is computed from them overflows or takes forever.
_RANKS = Bounds(1, 2**16)
_TOKENS = Bounds(1, 2**30)
_TOKEN_ID = Bounds(0, 2**31 - 1)
_SEED = Bounds(0, 2**64 - 1)
_COUNT = Bounds(0, 2**31 - 1)
_SHARE = Bounds(0, 1)

# What `kv_cache_dtype` calls the dtypes of torch; None is the model's own.
KV_CACHE_DTYPES = {"auto": None, "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
# Other names for some of them: one thing has one, by which runs that are continued are compared.
_SAME_KV_CACHE_DTYPES = {None: "auto", "fp8": "fp8_e4m3"}


@dataclass(frozen=True)
class SamplingParams(Checked):
    """How the tokens of one request are chosen."""

    # Temperature, penalty and bias: together they keep float32 logits finite.
    temperature: float = _key("0 is greedy", 1.0, within=Bounds(1e-5, 1e30, or_zero=True))
    top_k: int = _key("keep the k likeliest tokens; 0 keeps all", 0, within=_COUNT)
    top_p: float = _key(
        "keep the likeliest tokens that hold this much probability together", 1.0, within=Bounds(0, 1, above_low=True)
    )
    min_p: float = _key("keep tokens at least this likely relative to the likeliest", 0.0, within=_SHARE)
    repetition_penalty: float = _key(
        "above 1 makes tokens of the prompt and of the answer less likely", 1.0, within=Bounds(1e-5, 1e5)
    )
    max_new_tokens: int = _key("longest answer, in tokens", 128, within=_TOKENS)
    n: int = _key("samples per prompt", 1, within=Bounds(1, 2**16))
    seed: int = _key("with it the text is a function of the prompt, the sample and the model alone", 0, within=_SEED)
    stop: tuple[str, ...] = _key(
        "texts that end an answer; they are cut off `text`, not off `token_ids`", (), any_text=True
    )
    stop_token_ids: tuple[int, ...] = _key("tokens that end an answer, beside the model's own", (), within=_TOKEN_ID)
    ignore_eos: bool = _key("do not end at the model's end-of-text tokens", False)
    min_new_tokens: int = _key("no end of any kind before so many tokens", 0, within=Bounds(0, 2**30))
    logit_bias: tuple[tuple[int, float], ...] = _key(
        "added to the logits of tokens; in JSON an object by token id", (), within=(_TOKEN_ID, Bounds(-1e20, 1e20))
    )
    top_logprobs: int = _key(
        "report so many of the likeliest tokens at each place, with raw logprobs", 0, within=Bounds(0, 1024)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require("" not in self.stop, "stop", list(self.stop), "free of empty strings")
        ok = self.min_new_tokens <= self.max_new_tokens
        require(ok, "min_new_tokens", self.min_new_tokens, f'at most "max_new_tokens" ({self.max_new_tokens})')
        biased = [token for token, _ in self.logit_bias]
        require(len(set(biased)) == len(biased), "logit_bias", self.logit_bias, "free of repeated token ids")

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
class TensorParallel(Checked):
    """The framework's own tensor parallelism."""

    tp_size: int = _key("ranks that share the weights of one replica", 1, within=_RANKS)
    provider: Literal["autotp", "transformers"] = _key(
        "who shards the weights of a model that a tool loads: DeepSpeed's AutoTP, or Transformers", "autotp"
    )


@dataclass(frozen=True)
class WandbConfig(Checked):
    """Where the summary of a run is logged."""

    project: str = _key("W&B project", "cpinfer")
    name: str | None = _key("run name; default: the name of the output", None)
    group: str | None = _key("run group", None)
    mode: Literal["auto", "online", "offline"] = _key(
        "auto is online with WANDB_API_KEY, offline without it or where WANDB_MODE says so", "auto"
    )


@dataclass(frozen=True)
class EvaluationConfig(Checked):
    """What `tools/eval_longctx.py` asks a model."""

    tasks: tuple[str, ...] = _key("long-context tasks, made from a seed; all of them when empty", ())
    task_file: str | None = _key("questions, JSON Lines (relative to the config file), instead of `tasks`", None)
    lengths: tuple[int, ...] = _key("tokens of a prompt and its answer together", (4096,), within=_TOKENS)
    num_samples: int | None = _key(
        "samples per task and length; default: 10, or all of a file", None, within=Bounds(1, 10**5)
    )
    depths: tuple[float, ...] = _key(
        "where the needle lies, as shares of the haystack; samples take them in turn",
        (0.0, 0.25, 0.5, 0.75, 1.0),
        within=_SHARE,
    )
    seeds: tuple[int, ...] = _key("sampling seeds: each is one run over all samples", (0,), within=_SEED)
    num_shots: int = _key(
        "examples before each question of a gsm8k file, from its first lines", 5, within=Bounds(0, 10**5)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not (self.tasks and self.task_file), "task_file", self.task_file, "left out where `tasks` are named")
        for name in ("lengths", "depths", "seeds"):
            require(bool(getattr(self, name)), name, getattr(self, name), "a list of one or more")
        for name in ("tasks", "lengths", "depths", "seeds"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), name, values, "free of repetitions")


@dataclass(frozen=True)
class ComparisonConfig(Checked):
    """What `tools/compare.py` makes of an evaluation: the same one over several layouts."""

    layouts: tuple[str, ...] = _key('names such as "tp4_pcp2_dcp4", or configs; the first is the reference', ())
    tolerance: float | None = _key(
        "largest logprob difference that passes; default: 1e-4 in float32, 0.05 in half precision",
        None,
        within=Bounds(0, 1e6),
    )


@dataclass(frozen=True)
class RolloutConfig(Checked):
    """How a trainer lends its model for a rollout phase."""

    gather: Literal["full", "layerwise", "tp_shards"] = _key(
        "weights that ZeRO-3 or FSDP has dealt out: all at once, a layer when it is needed, or each rank's slice of "
        "tensor parallelism over `tp_size` lent ranks",
        "full",
    )
    mismatch_every: int = _key(
        "compare rollout logprobs with the training forward's in every so many phases; 0 never does", 1, within=_COUNT
    )
    overlong_prompts: Literal["error", "truncate_left"] = _key(
        "a TRL trainer's prompts that are too long: one that can never run is an error and ends the run; or each is "
        "cut to the last tokens that leave room for a whole answer",
        "error",
    )


@dataclass(frozen=True)
class TrainingConfig(Checked):
    """What `tools/train_grpo.py` trains, and how."""

    reward: str = _key('a reward of the tool, or "FILE.py:FUNCTION" as TRL calls it (relative to the config file)', "")
    num_steps: int = _key("optimiser steps", 100, within=Bounds(1, 10**8))
    learning_rate: float = _key("of AdamW, constant", 1e-6, within=Bounds(0, 1e3, above_low=True))
    batch_size: int = _key("samples per process and step", 8, within=Bounds(1, 2**16))
    num_generations: int = _key(
        "samples per prompt: the group that rewards are compared in", 8, within=Bounds(2, 2**16)
    )
    kl_coef: float = _key(
        "weight of the KL to the model before training, which is kept beside it; 0 keeps none, LoRA needs none",
        0.0,
        within=Bounds(0, 1e6),
    )
    entropy_coef: float = _key("weight of the entropy bonus", 0.0, within=Bounds(0, 1e6))
    zero_stage: Literal[0, 1, 2, 3] | None = _key("DeepSpeed ZeRO stage; null trains with DDP, without DeepSpeed", 0)
    lora_rank: int = _key(
        "train a LoRA adapter of this rank on all linear layers; 0 trains all weights", 0, within=Bounds(0, 2**16)
    )
    fresh_weights: bool = _key(
        "start from random weights instead of the model's; with `kl_coef` they are written to initial/ beside the "
        "output, for the second model",
        False,
    )
    generator: Literal["cpinfer", "transformers"] = _key("who generates the rollouts", "cpinfer")
    seed: int = _key(
        "of weights, order of prompts and, with `sampling.seed`, of samples: GRPOConfig's seed",
        0,
        within=Bounds(0, 2**31 - 1),
    )


@dataclass(frozen=True)
class Config(Checked):
    """Everything a run needs to know. Sizes left null are worked out from the others and from the world."""

    model: str | None = _key("Hugging Face id, or folder (relative to the config file)", None)
    dtype: Literal["float32", "bfloat16", "float16"] = _key("of weights, activations and KV cache", "bfloat16")
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"] | None = _key(
        "auto is `dtype`; else K and V are rounded to fp8 when they are made, so more tokens fit. fp8 is fp8_e4m3",
        "auto",
    )
    backend: Literal["auto", "torch", "flashinfer"] = _key("attention kernels", "auto")
    tensor_parallel: TensorParallel = _key("tensor parallelism", factory=TensorParallel)
    prefill_context_parallel_size: int = _key("ranks that share the prefill of a prompt (pcp)", 1, within=_RANKS)
    decode_context_parallel_size: int | None = _key("KV shards of a sequence (dcp); default: pcp", None, within=_RANKS)
    data_parallel_size: int | None = _key(
        "independent replicas (dp); default: what is left of the world", None, within=_RANKS
    )
    cp_kv_cache_interleave_size: int | None = _key(
        "tokens dealt to a KV shard at a time; default: block_size", None, within=_TOKENS
    )
    cp_wire_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _key(
        "dtype in which partial attention outputs travel; auto is `dtype` (lse is always float32)", "auto"
    )
    block_size: int = _key("tokens of one shard per KV block", 16, within=Bounds(1, 2**16))
    kv_cache_gib: float | None = _key(
        "KV pool per rank; default: half the free memory on CUDA, 0.25 on CPU",
        None,
        within=Bounds(0, 2**14, above_low=True),
    )
    max_num_seqs: int = _key("sequences that run at once", 256, within=Bounds(1, 2**20))
    max_num_batched_tokens: int = _key("tokens that one step computes at most", 8192, within=_TOKENS)
    enable_prefix_caching: bool = _key("keep KV of finished sequences, for prompts that begin alike", True)
    context_exchange: Literal["auto", "queries", "kv"] = _key(
        "what travels when a prompt continues cached KV; auto is what moves fewer bytes, alone what computes less",
        "auto",
    )
    context_workspace_tokens: int = _key(
        "cached tokens that are gathered at a time, when KV travels", 65536, within=_TOKENS
    )
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
        within=Bounds(0.001, 2e6),  # libraries count it in milliseconds, in 32 bits
    )
    wandb: WandbConfig | None = _key(
        "log to W&B: an object with `project`, `name`, `group`, `mode`; without it nothing is", None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv_cache_dtype in _SAME_KV_CACHE_DTYPES:
            object.__setattr__(self, "kv_cache_dtype", _SAME_KV_CACHE_DTYPES[self.kv_cache_dtype])
        ok = self.cascade_attention != "on" or not self.cuda_graphs
        require(
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
_ASKS_FOR_NOTHING = {"pipeline_parallel_size": (None, 1)}


def load_config(path: str | Path, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None) -> Config:
    """Read a config file, apply `a.b=value` overrides (values in JSON, else text), resolve its relative paths.

    `defaults`, plain data of a tool's own, stand where neither says anything.

    UserError, naming the file, for anything that cannot be read or understood.
    """
    path = Path(path)
    try:
        data = parse_json(read_text(path))
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}. Give the path of a JSON file with --config.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config {path}: not valid JSON: {error}.") from error
    except UserError as error:
        raise UserError(f"config {path}: {error}") from error
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
    if not isinstance(data, Mapping):
        raise UserError(f"found {quoted(data)}; an object with config keys was wanted.")
    return parse_object(Config, _own_keys(data, ""))


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain data that `parse_config` turns back into an equal config."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[no-any-return]


def apply_override(data: dict[str, Any], override: str) -> None:
    """Put `a.b=value` into plain config data; the value is JSON, else text."""
    name, eq, text = override.partition("=")
    if not eq or not name:
        raise UserError(f"--set {quoted(override)} is not of the form a.b=value.")
    try:
        value = parse_json(text)
    except NotJSONError:
        value = text
    except UserError as error:
        raise UserError(f"--set {quoted(override)}: {error}") from error
    *parents, last = name.split(".")
    for parent in parents:
        inner = data.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UserError(
                f"--set {quoted(override)}: {quoted(parent)} is {quoted(inner)}, not an object with keys of its own."
            )
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
        try:
            return str(folder / Path(path).expanduser())
        except RuntimeError as error:  # ~somebody whom nobody knows
            raise UserError(f"{quoted(path)} is no path: {error}.") from error

    def resolve(path: str | None) -> str | None:
        return None if path is None else at(path)

    model = config.model
    # A hub id looks like a relative path, so a name counts as a folder when there is one, or when it says so itself.
    if model is not None and (model.startswith((".", "/", "~")) or _is_folder(folder / model)):
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


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long to be one
        return False


def _own_keys(data: Mapping[Any, Any], where: str) -> dict[Any, Any]:
    """The data without other engines' keys. UnsupportedError where one of them, or a value, asks for something."""
    own = {}
    for name, value in data.items():
        if name in _REFUSED_KEYS:
            if not any(type(value) is type(x) and value == x for x in _ASKS_FOR_NOTHING.get(name, (None, False, 0))):
                raise refuse(_REFUSED_KEYS[name], f'key "{where}{name}"')
            continue
        if isinstance(value, str) and (f"{where}{name}", value) in _REFUSED_VALUES:
            raise refuse(_REFUSED_VALUES[f"{where}{name}", value], f'key "{where}{name}" is "{value}"')
        is_object = isinstance(value, Mapping) and not where  # a config is two levels deep
        own[name] = _own_keys(value, f"{name}.") if is_object else value
    return own
