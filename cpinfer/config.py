"""The config: one file, JSON or TOML, keys as users know them from vLLM and DeepSpeed. These classes are the schema.

    EngineConfig     what an engine reads
    ParallelConfig   sizes of a layout, and how long its ranks wait for each other
    JobConfig        both, and sampling and lending: for a job with a model of its own
    LaunchConfig     the same for a job whose model is loaded for it

Each is also what it is made of: who wants an `EngineConfig` takes a `JobConfig`, and nothing is copied or checked again
on the way. Tools add keys of their own (`RunConfig`, in `cpinfer_tools`); one file serves all. `parse_config` turns
plain data into a config and refuses what it does not know; `load_config` reads a file, applies overrides and resolves
relative paths against the file's folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from cpinfer.config_file import path_from, read_config_file
from cpinfer.errors import UserError, quoted, unknown_word
from cpinfer.other_engines_keys import own_keys
from cpinfer.refusals import refuse
from cpinfer.schema import Bounds, Checked, parse_object, require
from cpinfer.schema import key as _key
from cpinfer.strict_json import NotJSONError, parse_json

# Who shards weights by tensor parallelism: DeepSpeed's AutoTP, or Transformers.
Provider = Literal["autotp", "transformers"]

# Bounds that nobody needs to pass, and below which nothing that is computed from them overflows or takes forever.
_RANKS = Bounds(1, 2**16)
_TOKENS = Bounds(1, 2**30)
_TOKEN_ID = Bounds(0, 2**31 - 1)
_SEED = Bounds(0, 2**64 - 1)
_COUNT = Bounds(0, 2**31 - 1)
_SHARE = Bounds(0, 1)
_SECONDS = Bounds(0.001, 2e6)  # libraries count them in milliseconds, in 32 bits

C = TypeVar("C", bound="JobConfig")
E = TypeVar("E", bound="EngineConfig")

# What `kv_cache_dtype` calls the dtypes of torch; None is the model's own.
KV_CACHE_DTYPES = {"auto": None, "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
# Other names for some of them: one thing has one, by which runs that are continued are compared.
_SAME_KV_CACHE_DTYPES = {None: "auto", "fp8": "fp8_e4m3"}


@dataclass(frozen=True)
class SamplingParams(Checked):
    """How the tokens of one request are chosen."""

    # Temperature, penalty and bias: together they keep float32 logits finite.
    temperature: float = _key("0 is greedy", 1.0, within=Bounds(1e-5, 1e30, or_zero=True))
    top_k: int = _key("keep the k likeliest tokens; 0 (or -1) keeps all", 0, within=Bounds(-1, 2**31 - 1))
    top_p: float = _key(
        "keep the likeliest tokens that hold this much probability together", 1.0, within=Bounds(0, 1, above_low=True)
    )
    min_p: float = _key("keep tokens at least this likely relative to the likeliest", 0.0, within=_SHARE)
    repetition_penalty: float = _key(
        "above 1 makes tokens of the prompt and of the answer less likely", 1.0, within=Bounds(1e-5, 1e5)
    )
    max_new_tokens: int = _key("longest answer, in tokens", 128, within=_TOKENS)
    n: int = _key("samples per prompt", 1, within=Bounds(1, 2**16))
    seed: int = _key(
        "with it the text is a function of prompt, sample and model alone, but for near-ties", 0, within=_SEED
    )
    stop: tuple[str, ...] = _key(
        "texts that end an answer; they are cut off `text`, not off `token_ids`", (), any_text=True
    )
    stop_token_ids: tuple[int, ...] = _key("tokens that end an answer, beside the model's own", (), within=_TOKEN_ID)
    ignore_eos: bool = _key("do not end at the model's end-of-text tokens", False)
    min_new_tokens: int = _key(
        "tokens before any that may end an answer, by stop token or stop string", 0, within=Bounds(0, 2**30)
    )
    logit_bias: tuple[tuple[int, float], ...] = _key(
        "added to the logits of tokens; in JSON an object by token id", (), within=(_TOKEN_ID, Bounds(-1e20, 1e20))
    )
    top_logprobs: int = _key(
        "report so many of the likeliest tokens at each place, with raw logprobs", 0, within=Bounds(0, 1024)
    )
    prompt_logprobs: bool = _key(
        "report raw logprobs of the prompt's tokens, with `top_logprobs` also the likeliest in their places; all of "
        "the prompt is computed then, whatever is cached",
        False,
    )
    kept_token_ids: bool = _key(
        "report for each token the ids that top_k, top_p and min_p left to draw from; none where over 1024 are left",
        False,
    )
    routed_experts: bool = _key("report which experts each token that was run went through", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k == -1:  # as others say it
            object.__setattr__(self, "top_k", 0)
        require("" not in self.stop, "stop", list(self.stop), "free of empty strings")
        ok = self.min_new_tokens <= self.max_new_tokens
        require(ok, "min_new_tokens", self.min_new_tokens, f'at most "max_new_tokens" ({self.max_new_tokens})')
        biased = [token for token, _ in self.logit_bias]
        require(len(set(biased)) == len(biased), "logit_bias", self.logit_bias, "free of repeated token ids")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def cut_by(self) -> tuple[str, ...]:
        """What cuts the distribution of a token to a kept set, by key. Nothing does under greedy decoding."""
        cuts = {"top_k": self.top_k > 0, "top_p": self.top_p < 1, "min_p": self.min_p > 0}
        return () if self.greedy else tuple(key for key, does in cuts.items() if does)

    @property
    def shaped_by(self) -> tuple[str, ...]:
        """What beside temperature and cuts shapes the distribution of a token, by key."""
        shapes = {
            "repetition_penalty": self.repetition_penalty != 1,
            "logit_bias": bool(self.logit_bias),
            "min_new_tokens": self.min_new_tokens > 0,
        }
        return tuple(key for key, does in shapes.items() if does)

    @cached_property
    def distribution(self) -> tuple[object, ...]:
        """What shapes the distribution of a token: rows that agree in it are sampled in one pass."""
        shape = (self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        return (*shape, self.logit_bias, self.top_logprobs, self.kept_token_ids)


@dataclass(frozen=True)
class TensorParallel(Checked):
    """The framework's own tensor parallelism."""

    tp_size: int | None = _key("ranks that share the weights of one replica (tp); default: 1", None, within=_RANKS)
    provider: Provider = _key(
        "who shards the weights of a model that a tool loads: DeepSpeed's AutoTP, or Transformers", "autotp"
    )

    @property
    def cuts_states(self) -> bool:
        """Whether a rank keeps its part of the states of linear attention: Transformers' plan leaves them whole."""
        return self.provider != "transformers"


@dataclass(frozen=True)
class RolloutConfig(Checked):
    """How a trainer lends its model for a rollout phase."""

    gather: Literal["full", "layerwise", "tp_shards"] = _key(
        "weights that ZeRO-3 or FSDP has sharded: all at once, a layer when it is needed, or each rank's slice of "
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
    tool_loop: Literal["async", "lockstep"] = _key(
        "a TRL trainer's tools: in threads, while other samples decode, or one at a time in TRL's order; samples are "
        "the same",
        "async",
    )
    tool_timeout_s: float | None = _key(
        "seconds after which a call of a tool has failed, as if it had raised; default: it may take forever",
        None,
        within=_SECONDS,
    )


@dataclass(frozen=True)
class EngineConfig(Checked):
    """What an engine reads, and nothing else. The sizes of its layout are the topology's."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _key(
        "of weights, activations and KV cache; auto is what the weights have", "auto"
    )
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"] | None = _key(
        "auto is `dtype`; else K and V are rounded to fp8 when they are made, so more tokens fit. fp8 is fp8_e4m3",
        "auto",
    )
    # What there is to choose from is in registries, which check it before anything loads.
    backend: str = _key("attention kernels: `flashinfer`, `cpu`, `torch`, or `auto`, the fastest that can", "auto")
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
    max_model_len: int | None = _key(
        "tokens of a prompt and its answer together; default: what the model was made for (under yarn its factor times "
        "its original length). More is warned of",
        None,
        within=_TOKENS,
    )
    max_num_seqs: int = _key("sequences that run at once", 256, within=Bounds(1, 2**20))
    max_session_tokens: int | None = _key(
        "tokens whose KV a home keeps for sessions between their turns; default: what running requests leave room for",
        None,
        within=_COUNT,
    )
    max_num_batched_tokens: int = _key("tokens that one step computes at most", 8192, within=_TOKENS)
    enable_prefix_caching: bool = _key("keep KV of finished sequences, for prompts that begin alike", True)
    state_cache_gib: float = _key(
        "per rank, beside the KV pool: states behind prompts of models with linear attention, for prompts that begin "
        "alike; with 0 each is computed whole",
        0.0,
        within=Bounds(0, 2**14),
    )
    prepacked_weights_gib: float = _key(
        "per rank, on CPU, beside the KV pool: copies of linear layers' weights in the order that oneDNN multiplies "
        "in, of as many layers as it suffices for; with 0 none",
        0.0,
        within=Bounds(0, 2**14),
    )
    collectives: Literal["auto", "group"] = _key(
        "by what ranks exchange; auto is shared memory on CPU, between ranks of one host, else process groups", "auto"
    )
    context_exchange: Literal["auto", "queries", "kv"] = _key(
        "what travels when a prompt continues cached KV; auto moves fewer bytes, alone what computes less", "auto"
    )
    context_workspace_tokens: int = _key("cached tokens gathered at a time, when KV travels", 65536, within=_TOKENS)
    decode_exchange: str = _key(
        "how partial attention comes back: `a2a`, all-to-all; `ag_rs`, all-gather and reduce-scatter; `replicate_q`, "
        "all rows on all ranks",
        "a2a",
    )
    cascade_attention: Literal["auto", "on", "off"] = _key(
        "samples of one prompt attend to it together in decode; auto where that is known to be faster (so far on CPU)",
        "auto",
    )
    cuda_graphs: bool = _key(
        "replay decode steps from CUDA graphs, by number of sequences (FlashInfer, models without experts)", False
    )
    deterministic: bool = _key(
        "the same bits of every logit in every layout, batch and chunk, whatever is cached (on CUDA not yet run)",
        False,
    )
    deterministic_kv_shards: int = _key(
        "virtual KV shards whose order `deterministic` keeps: a multiple of every dcp that is to give the same bits",
        8,
        within=Bounds(1, 2**10),
    )
    check_ranks: Literal["samples", "full"] = _key(
        "by what engines see, when they attach, that ranks hold equal weights: a few elements of each, or all",
        "samples",
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
    def interleave(self) -> int:
        return self.cp_kv_cache_interleave_size or self.block_size

    def cache_dtype(self, dtype: str) -> str:
        """What the KV cache of a model has.

        Args:
            dtype: the model's, as torch calls it.

        Returns:
            The cache's, likewise.
        """
        return KV_CACHE_DTYPES[self.kv_cache_dtype or "auto"] or dtype


@dataclass(frozen=True)
class ParallelConfig(Checked):
    """How a job's ranks are laid out, and how long they wait for each other. A size that is null is not said."""

    tensor_parallel: TensorParallel = _key("tensor parallelism", factory=TensorParallel)
    prefill_context_parallel_size: int | None = _key(
        "ranks that share the prefill of a prompt (pcp); default: 1", None, within=_RANKS
    )
    decode_context_parallel_size: int | Literal["auto"] | None = _key(
        "KV shards of a sequence (dcp); default: pcp; auto is pcp or 1, whichever decodes a phase sooner", None,
        within=_RANKS,
    )  # fmt: skip
    data_parallel_size: int | None = _key(
        "independent replicas (dp); default: what is left of the world", None, within=_RANKS
    )
    collective_timeout_s: float = _key(
        "seconds that ranks wait for one that has stopped, is stuck or is too slow, before they end and name it; at "
        "least half an hour where it may build kernels or load weights",
        300.0,
        within=_SECONDS,
    )

    @property
    def tp_size(self) -> int:
        return self.tensor_parallel.tp_size or 1

    @property
    def pcp_size(self) -> int:
        return self.prefill_context_parallel_size or 1

    @property
    def dcp_size(self) -> int:
        said = self.decode_context_parallel_size
        return said if isinstance(said, int) else self.pcp_size  # "auto" is that, or less


@dataclass(frozen=True)
class JobConfig(EngineConfig, ParallelConfig):
    """What a job with a model of its own says of its rollouts: the keys above, and these."""

    model: str | None = _key("Hugging Face id, or folder (relative to the config file)", None)
    sampling: SamplingParams = _key("how tokens are chosen", factory=SamplingParams)
    rollout: RolloutConfig = _key("rollout phases inside a trainer", factory=RolloutConfig)

    def seen_from(self, folder: Path) -> Self:
        """With its relative paths made ones from here.

        Args:
            folder: that of the config file.

        Returns:
            The same, but for its paths.
        """
        model = self.model
        # A hub id looks like a relative path, so a name is a folder when there is one, or when it says so itself.
        if model is not None and (model.startswith((".", "/", "~")) or _is_folder(folder / model)):
            return dataclasses.replace(self, model=path_from(folder, model))
        return self


# What stands for a config where a caller gives one.
ConfigLike = EngineConfig | Mapping[str, Any] | str | PathLike[str] | None


@dataclass(frozen=True)
class LaunchConfig(JobConfig):
    """The same for a job whose model is loaded for it, in the dtype that is said here."""

    dtype: Literal["float32", "bfloat16", "float16"] = _key("of weights, activations and KV cache", "bfloat16")


# Keys that tools' `RunConfig` has beyond a job's. A file that says them too serves attach and trainers as well.
KEYS_OF_TOOLS = frozenset(
    ("generation_config", "input", "output", "evaluation", "comparison", "training", "server", "wandb")
)
# Where editors look up what keys there are.
KEY_OF_EDITORS = "$schema"


def load_config(path: str | PathLike[str], overrides: Sequence[str] = ()) -> JobConfig:
    """What a config file says to a job.

    Args:
        path: of a file in JSON, or in TOML if it ends in `.toml`. It may be that of a run: what only tools read in it
            is left out.
        overrides: `a.b=value`, values in JSON, else text; they win over the file.

    Returns:
        The config, its relative paths resolved against the file's folder.

    Raises:
        UserError: naming the file, for anything that cannot be read or understood.
    """
    return load_as(JobConfig, path, overrides)


def parse_config(data: Mapping[str, Any]) -> JobConfig:
    """What plain data says to a job.

    Args:
        data: the keys of a `JobConfig`, as JSON has them.

    Returns:
        The config.

    Raises:
        UserError: for an unknown key (naming the nearest), a wrong type or an illegal value.
    """
    return parse_as(JobConfig, data)


def job_config(given: ConfigLike) -> JobConfig:
    """A `JobConfig` of what a caller has: one, an `EngineConfig`, plain data, the path of a file, or nothing.

    UserError for anything else, and as `parse_config` and `load_config` have it.
    """
    if isinstance(given, JobConfig):
        return given
    if isinstance(given, EngineConfig):
        return JobConfig(**vars(given))
    if isinstance(given, (str, PathLike)):
        return load_config(given)
    if given is None or isinstance(given, Mapping):
        return parse_config(given or {})
    raise UserError(f"the config is {quoted(given)}; an object, a dict, the path of a file or None was wanted.")


def with_keys(config: E, keys: Mapping[str, Any]) -> E:
    """The config with some of the engine's keys changed. UserError for an unknown one, and for an illegal value."""
    own, known = own_keys(keys, ""), [field.name for field in dataclasses.fields(EngineConfig)]
    for name in own:
        if name in (field.name for field in dataclasses.fields(ParallelConfig)):
            raise UserError(f'"{name}" is no key of an engine: the layout is the topology\'s. Say it there.')
        if name == "sampling":
            raise UserError('"sampling" is no key of an engine, which takes it with each call. Give it to generate.')
        if name not in known:
            raise UserError(unknown_word("key", name, known, ""))
    return dataclasses.replace(config, **own) if own else config


def load_as(
    cls: type[C], path: str | PathLike[str], overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> C:
    """Read a config file, apply `a.b=value` overrides (values in JSON, else text), resolve its relative paths.

    The file may be that of a run: what only tools read in it is left out where `cls` does not know it. `defaults`,
    plain data of a tool's own, stand where neither file nor overrides say anything. UserError, naming the file, for
    anything that cannot be read or understood.
    """
    path = Path(path)
    try:
        data = read_config_file(path)
        for override in overrides:
            apply_override(data, override)
        return parse_as(cls, _over(defaults or {}, data)).seen_from(path.parent)
    except UserError as error:
        raise type(error)(f"config {path}: {error}") from error


def parse_as(cls: type[C], data: Mapping[str, Any]) -> C:
    """A config from plain data, which may be that of a run: what only tools read is passed over by others.

    UserError for an unknown key (naming the nearest), wrong type or illegal value.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"found {quoted(data)}; an object with config keys was wanted.")
    not_for_us = (KEYS_OF_TOOLS | {KEY_OF_EDITORS}) - {field.name for field in dataclasses.fields(cls)}
    return parse_object(cls, own_keys({name: data[name] for name in data if name not in not_for_us}, ""))


def config_to_dict(config: EngineConfig) -> dict[str, Any]:
    """Plain data that, parsed as a config of the same class, gives an equal one."""
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


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long to be one
        return False
