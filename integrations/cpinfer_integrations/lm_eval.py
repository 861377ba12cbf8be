"""lm-eval: the public harness on the same engine, as its model `cpinfer`.

    python -m cpinfer_integrations.lm_eval --model cpinfer --model_args config=FILE --tasks TASK
    torchrun --nproc-per-node 2 -m cpinfer_integrations.lm_eval --model cpinfer --model_args config=FILE --tasks TASK

lm-eval has no way to announce a model to its own command (seen in 0.4.13), so this one registers it and hands over.
lm-eval runs on every process and deals documents by `rank` and `world_size`: these are **dp** coordinates here, so that
all ranks of a replica ask the engine for the same things, and the replicas share the documents. Tokens, prefixes and
truncation are those of lm-eval's own `hf` model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from tqdm import tqdm

from cpinfer.comm.bootstrap import PEER_GRACE_S, Launch, default_group, die, end_with_launcher
from cpinfer.comm.topology import Topology
from cpinfer.config import LaunchConfig, SamplingParams, apply_override, load_as, parse_as
from cpinfer.engine.attach import attach, config_errors
from cpinfer.engine.engine import Engine
from cpinfer.engine.prompts import naming
from cpinfer.engine.request import Prompt
from cpinfer.errors import UserError
from cpinfer.models.loading import known_weights, load_spec, load_tokenizer, model_sampling
from cpinfer.packages import named
from cpinfer.schema import require
from cpinfer_integrations.launching import grid_for, launch_inference
from cpinfer_integrations.lm_eval_requests import answer_text, by_document, in_batches, prompt_id, sampling_of

try:
    from lm_eval import utils
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    raise named(error, __name__) from error

__all__ = ["CpinferLM", "main"]

# What lm-eval's own command line adds to every model's arguments; the engine batches, and knows its device, by itself.
_IGNORED = ("batch_size", "max_batch_size", "device", "trust_remote_code")
# Arguments of the model itself; all others are keys of a config.
_OWN_TEXT = ("add_bos_token", "prefix_token_id", "max_length", "max_gen_toks", "enable_thinking", "think_end_token")
_OWN = (*_OWN_TEXT, "generation_config")

# ((context, continuation), context tokens, continuation tokens), as lm-eval passes them.
_Scored = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("cpinfer")
class CpinferLM(TemplateLM):
    """An engine as lm-eval sees a model. Every rank of the topology holds one and lm-eval runs on each.

    With an engine that a job holds, pass it to `lm_eval.simple_evaluate(CpinferLM(engine, topology, tokenizer), ...)`.

    Args:
        engine: awake, attached by the job.
        topology: the one it was attached with.
        tokenizer: the model's.
        max_length: tokens of the longest context with its answer, default: the model's; longer ones lose their
            beginning.
        max_gen_toks: tokens of an answer whose task sets no limit.
        add_bos_token: None leaves that to the tokenizer.
        prefix_token_id: stands where a context is empty; default: BOS, else EOS.
        enable_thinking: handed to the chat template; None is not.
        think_end_token: a text or a token id; cuts an answer's text up to its last occurrence.
        generation_config: "model" takes what the model's generation_config says of sampling (a repetition penalty, a
            top_k) where a task says nothing, as `hf` does; "ignore" takes nothing of it.

    Raises:
        UserError: for a `max_length` beyond the model's positions, and for a generation_config that is not known.
    """

    def __init__(
        self,
        engine: Engine,
        topology: Topology,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
        generation_config: Literal["ignore", "model"] = "ignore",
    ) -> None:
        super().__init__()
        _check_own(max_length, generation_config, engine.max_positions)
        self.engine = engine
        self.topology = topology
        self.tokenizer = tokenizer
        self.max_length = max_length or engine.max_positions
        self.max_gen_toks = max_gen_toks
        self._add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        self._template_args = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._think_end_token = think_end_token
        self._model_sampling = SamplingParams() if generation_config == "ignore" else engine.default_sampling_params()
        # lm-eval's own words for where it is: dp coordinates, for it deals documents by them.
        self._rank = topology.coords.dp_rank
        self._world_size = topology.grid.dp_size
        self._device = torch.device("cpu")  # of the counts that it exchanges
        self._model_info: dict[str, Any] = {}
        self._closing = ExitStack()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> CpinferLM:
        """The model of `key=value,key=value`, as `create_from_arg_obj` has it."""
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> CpinferLM:
        """The model that lm-eval's `--model_args` name: `config=FILE` or `pretrained=MODEL`, and more config keys.

        Loads it over the ranks of the default process group; without one, in this process alone. UserError for anything
        that can be found wrong before that. Collective.
        """
        args = {key: value for key, value in arg_dict.items() if key not in _IGNORED}
        own = {key: args.pop(key) for key in _OWN if key in args}
        config = _config(args)
        assert config.model is not None
        launch = _launch()
        spec = load_spec(config.model).with_max_model_len(config.max_model_len)
        _check_own(own.get("max_length"), own.get("generation_config", "ignore"), spec.max_positions)
        if own.get("generation_config") == "model":
            model_sampling(config.model)  # what is wrong with it shows here
        errors = config_errors(spec, config, config.data_parallel_size or 1)
        if errors:
            raise UserError(" ".join(errors))
        grid = grid_for(config, launch.world_size)
        bos = own.get("add_bos_token")
        tokenizer = load_tokenizer(config.model, **({} if bos is None else {"add_bos_token": bos}))
        if tokenizer is None:
            raise UserError(f"model {config.model} has no tokenizer; lm-eval's tasks are text and need one.")
        known_weights(config.model, getattr(torch, config.dtype))  # what is wrong with its files shows here
        with ExitStack() as stack:
            module, topology = launch_inference(config, grid, launch.device)
            stack.callback(topology.close)
            engine = stack.enter_context(attach(module, topology, config, tokenizer=tokenizer))
            model = cls(engine, topology, tokenizer, **own)
            model._closing = stack.pop_all()
        layout = {"tp": grid.tp_size, "pcp": grid.pcp_size, "dcp": grid.dcp_size, "dp": grid.dp_size}
        model._model_info = {"model_source_name": config.model, "model_dtype": config.dtype, "layout": layout}
        return model

    def close(self) -> None:
        """Give back the model that `create_from_arg_obj` loaded; an engine that was passed in is left alone."""
        self._closing.close()

    def get_model_info(self) -> dict[str, Any]:
        return self._model_info

    # Tokens.

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no EOS token, which ends answers in lm-eval; set eos_token in tokenizer_config.json."
            )
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text to score; one that starts with the prefix token as text gets no second one."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        return self._encode(string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as one prompt; a template that refuses system messages gets them left out, as with `hf`."""
        try:
            return self._templated(chat_history, add_generation_prompt)
        except Exception:  # templates are programs of the model's author and raise what they like
            spoken = [message for message in chat_history if message["role"] != "system"]
            if len(spoken) == len(chat_history):
                raise
            return self._templated(spoken, add_generation_prompt)

    def _templated(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._template_args,
            )
        )

    def _encode(self, string: str, add_special_tokens: bool | None) -> list[int]:
        flag = self._add_bos_token if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer.encode(string, **({} if flag is None else {"add_special_tokens": flag})))

    def _encode_prompt(self, string: str, params: SamplingParams) -> tuple[int, ...]:
        """The last tokens of a text to continue that leave room for a whole answer."""
        room = self.max_length - params.max_new_tokens
        if room <= 0:
            raise UserError(
                f"max_gen_toks={params.max_new_tokens} leaves no room for a prompt; "
                f"max_length={self.max_length} must be larger."
            )
        bos = self.tokenizer.bos_token
        return tuple(self._encode(string, False if bos is not None and string.startswith(bos) else None)[-room:])

    def _encode_scored(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and of what continues it; the prefix token stands for a context that has none.

        A continuation may have none either: an empty one, or one whose text makes other tokens of the context's.
        """
        if context:
            pair: tuple[list[int], list[int]] = self._encode_pair(context, continuation)
            if pair[0]:
                return pair
            tokens = pair[1]  # the context was spaces, which count to the continuation
        else:
            tokens = self.tok_encode(continuation, add_special_tokens=False)
        prefix = [self.prefix_token_id]
        return (prefix, tokens[1:]) if tokens[:1] == prefix else (prefix, tokens)

    # What lm-eval asks for.

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): its log-probability, and whether greedy decoding would have written it."""
        self._same_on_all_ranks("loglikelihood", [request.args for request in requests])
        pairs = [(request.args, *self._encode_scored(*request.args)) for request in requests]
        with by_document(requests):
            return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each (text,): the log-probability of all of it, read in windows of `max_length` tokens."""
        self._same_on_all_ranks("loglikelihood_rolling", [request.args for request in requests])
        windows: list[_Scored] = []
        owners: list[Any] = []  # of each window
        ends = []
        for request in requests:
            (string,) = request.args
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *utils.make_disjoint_window(window)) for window in rolling]
            owners += [request] * (len(windows) - len(owners))
            ends.append(len(windows))
        with by_document(owners):
            scores = [logprob for logprob, _ in self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)]
        totals = [sum(scores[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        for request, total in zip(requests, totals, strict=True):
            self._remember("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A text for each (context, generation arguments), up to the first of its stop strings.

        Requests that ask the same of the same tokens become one prompt with as many samples, dealt out in their order.
        """
        self._same_on_all_ranks("generate_until", [request.args for request in requests])
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        asked: dict[tuple[tuple[int, ...], SamplingParams], list[int]] = {}
        with by_document(requests):
            for index, request in enumerate(requests):
                with naming("request", index):
                    context, gen_kwargs = request.args
                    params = sampling_of(gen_kwargs, eos, self.max_gen_toks, self._model_sampling)
                    asked.setdefault((self._encode_prompt(context, params), params), []).append(index)
        # Longest first. Greedy answers to one question are all the same.
        order = sorted(asked.items(), key=lambda item: (-len(item[0][0]), item[0][0]))
        prompts = [Prompt(place, prompt_id(*question), question[0]) for place, (question, _) in enumerate(order)]
        sampling = [replace(params, n=1 if params.greedy else len(indices)) for (_, params), indices in order]
        texts = [""] * len(requests)
        total = sum(params.n for params in sampling)
        with by_document([requests[indices[0]] for _, indices in order]):
            for result in self._bar(self.engine.stream(prompts, sampling), total, "Generating", disable_tqdm):
                (_, params), indices = order[result.prompt_index]
                text = answer_text(result.token_ids, params, self.tokenizer, self._think_end_token)
                for index in indices if params.greedy else [indices[result.sample_index]]:
                    self._remember("generate_until", requests[index].args, text)
                    texts[index] = text
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[_Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Longest first, and those of one context together, in calls that the KV pool can hold.

        What has no token is certain, as to `hf`. A UserError's place is that of the request among these.
        """
        pairs = []
        for i, (_given, context, continuation) in enumerate(requests):
            with naming("request", i):
                pairs.append(self._truncated(context, continuation))
        scored = [i for i, (_, continuation) in enumerate(pairs) if continuation]
        order = sorted(scored, key=lambda i: (-len(pairs[i][0]), pairs[i][0], i))
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        batches = in_batches(order, pairs, self.engine.kv_capacity_tokens)
        for batch in self._bar(batches, None, "Scoring", disable_tqdm):
            try:
                results = self.engine.score([pairs[i] for i in batch])
            except UserError as error:
                error.place = None if error.place is None else batch[error.place]
                raise
            for i, result in zip(batch, results, strict=True):
                answers[i] = (result.logprob, result.is_greedy)
                texts = requests[i][0]
                if texts is not None:  # windows of a longer text are remembered with it
                    self._remember("loglikelihood", texts, answers[i])
        return answers

    def _truncated(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """What fits, cut from the left: the last token of a continuation is looked up and takes no position."""
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation has {len(continuation)} tokens, max_length={self.max_length}; "
                "continuations are not truncated."
            )
        kept = [*context, *continuation][-(self.max_length + 1) :]
        return kept[: -len(continuation) or None], continuation

    # Between processes.

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """What each dp replica holds, one after the other."""
        return torch.cat([part.reshape(-1) for part in self._gather(tensor.cpu())])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """What each dp replica holds, on all ranks of replica `dst`."""
        gathered = self._gather(obj)
        return gathered if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for all replicas."""
        if self.world_size > 1:
            dist.barrier()

    def _gather(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        # Ranks of one replica hold the same; its writer speaks for it.
        told: list[Any] = [None] * self.topology.grid.world_size
        dist.all_gather_object(told, value if self.topology.is_writer else None)
        return told[:: self.topology.grid.ranks_per_replica]

    def _same_on_all_ranks(self, what: str, requests: Sequence[Any]) -> None:
        """RuntimeError when the ranks of a replica were asked different things, which would leave them waiting."""
        digest = hashlib.sha256(json.dumps([what, *requests], default=repr).encode()).digest()
        mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(_comm_device())
        if not (self.topology.replica.all_gather(mine) == mine).all():
            raise RuntimeError(
                f"the ranks of a replica were asked for different {what} requests ({len(requests)} on rank "
                f"{self.topology.rank}); with --use_cache, delete its files: they differ between ranks"
            )

    def _remember(self, attribute: str, key: Sequence[Any], answer: Any) -> None:
        """Put an answer into lm-eval's cache at once; with several ranks it does so after the call, all at the same."""
        if self.topology.replica.size == 1:
            self.cache_hook.add_partial(attribute, key, answer)

    def _bar(self, items: Any, total: int | None, title: str, disable_tqdm: bool) -> Any:
        return tqdm(items, total=total, desc=title, disable=self._is_silent(disable_tqdm) or None, file=sys.stderr)

    def _is_silent(self, disable_tqdm: bool) -> bool:
        return disable_tqdm or self.topology.rank != 0


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """lm-eval's command line with the model `cpinfer`, on the processes that a launcher started.

    Args:
        argv: lm-eval's arguments.
        environ: the environment, in which launchers say who this process is.

    Returns:
        The exit status.
    """
    launch = Launch.from_environ(environ)
    end_with_launcher(environ, program="lm_eval")
    # lm-eval reads sys.argv; the DeepSpeed launcher has put its own argument there.
    sys.argv = [argv[0], *(arg for arg in argv[1:] if not arg.startswith(("--local_rank=", "--local-rank=")))]
    if launch.rank != 0:
        logging.disable(logging.WARNING)  # one voice
    try:
        with default_group(launch, _timeout_s(sys.argv)):
            try:
                cli_evaluate()
            except UserError as error:  # every rank of a replica finds the same
                if launch.rank != 0:
                    time.sleep(PEER_GRACE_S)  # a launcher ends all ranks with the first, which speaks if it can
                print(f"lm_eval: {error}", file=sys.stderr, flush=True)
                return 2
        return 0
    except SystemExit:  # --help, and arguments that lm-eval does not know
        raise
    except BaseException as error:
        if launch.world_size == 1:
            raise
        die(launch, error, program="lm_eval")


def _check_own(max_length: Any, generation_config: Any, max_positions: int) -> None:
    """UserError for arguments of the model itself that it cannot have."""
    if max_length is not None and (type(max_length) is not int or not 1 <= max_length <= max_positions):
        raise UserError(
            f"max_length={max_length} was asked for; the model has {max_positions} positions here. "
            "Lower it, or raise max_model_len."
        )
    require(generation_config in ("ignore", "model"), "generation_config", generation_config, '"ignore" or "model"')


def _timeout_s(argv: Sequence[str]) -> float:
    """What the model arguments say of collectives, which begin before lm-eval reads them; what is wrong it will say."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model_args", "-a", nargs="*", default=[])
    try:
        given = parser.parse_known_args(argv[1:])[0].model_args
        args = utils.simple_parse_args_string(",".join(given))
        keys = ("config", "pretrained", "collective_timeout_s")
        return _config({key: args[key] for key in keys if key in args}).collective_timeout_s
    except (ValueError, SystemExit):
        return LaunchConfig.collective_timeout_s


def _config(args: Mapping[str, Any]) -> LaunchConfig:
    """The config of model arguments: a file, a model, or both, and keys that win over the file's."""
    path = args.get("config")
    model = args.get("pretrained")
    overrides = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in args.items()
        if key not in ("config", "pretrained")
    ]
    if model is not None:
        # A folder is meant from here, not from where the config lies.
        overrides.append(f"model={Path(model).resolve() if Path(model).is_dir() else model}")
    if path is not None:
        config = load_as(LaunchConfig, path, overrides)
    else:
        data: dict[str, Any] = {}
        for override in overrides:
            apply_override(data, override)
        config = parse_as(LaunchConfig, data)
    if config.model is None:
        raise UserError("no model is named; give --model_args config=FILE with a model in it, or pretrained=MODEL.")
    return config


def _launch() -> Launch:
    """Where this process is in the default process group; one process without one."""
    if not dist.is_initialized():
        return Launch()
    return Launch(dist.get_rank(), dist.get_node_local_rank(fallback_rank=0), dist.get_world_size())


def _comm_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


if __name__ == "__main__":
    import os

    sys.exit(main(sys.argv, os.environ))
