"""Agents against the policy in training: a tool-using agent, written for OpenAI's interface, inside a GRPO loop.

    python examples/agents_in_training.py
    torchrun --nproc-per-node 2 examples/agents_in_training.py

Four books say what people sell, and three of them are empty, which nobody tells the policy. The agent asks it, looks up
what it calls for, and hands the answer back, until it names a thing. The fewer look-ups, the more reward: which book to
ask is what there is to learn. docs/guides/agents.md goes through this file.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import openai
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import cpinfer
from cpinfer_integrations.lending import lend
from cpinfer_integrations.server import serving

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "grpo-tiny"
SELLS = {
    " Alice": " boats",
    " Boris": " apples",
    " Carla": " keys",
    " Dora": " maps",
    " Edgar": " drums",
    " Flora": " lamps",
    " Gus": " hats",
    " Hanna": " kites",
}
NAMES, THINGS = tuple(SELLS), tuple(SELLS.values())
BOOKS = (" northern", " southern", " eastern", " western")
KEPT_BOOK = " southern"  # all others are empty

LOOKUP: Any = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "What somebody sells, by one of the books.",
        "parameters": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "book": {"type": "string", "enum": BOOKS}},
            "required": ["name", "book"],
        },
    },
}

# How a chat is written for the model, and how a call is read from its answer: what every tokenizer for tools needs.
END = "<|end|>"
CHAT_TEMPLATE = (
    "{% if tools %}<|tools|>{% for tool in tools %}{{ tool.function.name }}{% endfor %}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<|call|>{{ call.function | tojson }}<|/call|>{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open": "<|call|>",
            "close": "<|/call|>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": END, "content": "text"},
    },
}
# A model that begins with nothing, on a CPU, has the parts of a call that never change as a token each.
PARTS = ("lookup", "nothing", '{"name": "lookup", "arguments": {"name": "', '", "book": "', '"}}')
SPECIAL = ("<|tools|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|call|>", "<|/call|>")

MAX_TURNS = 3
GROUP_SIZE = 8
NUM_CLIENTS = 16  # episodes that a rank has under way together


@dataclass(frozen=True)
class Turn:
    """One answer of the policy, as the server told it: no text is tokenized again."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    weights_version: int


@dataclass(frozen=True)
class Episode:
    """The turns of a conversation, and what its end was worth."""

    turns: list[Turn]
    reward: float


@dataclass(frozen=True)
class Step:
    """What a step of training came to."""

    mean_reward: float
    mismatch: float  # largest |logprob in training - logprob of the server| of a token
    cached: float  # share of all prompt tokens whose KV was there: of earlier turns, of others in the group
    rollout_s: float
    train_s: float


# The agent: it knows an address, and nothing of training.


def lookup(name: str, book: str) -> str:
    """The tool."""
    return SELLS.get(name, "nothing") if book == KEPT_BOOK else "nothing"


def solve(client: openai.OpenAI, name: str, seed: int) -> Episode:
    """One conversation, until an answer calls nothing or the turns are over."""
    messages: list[Any] = [{"role": "user", "content": name}]
    turns: list[Turn] = []
    num_lookups = 0
    for _ in range(MAX_TURNS):
        answer: dict[str, Any] = client.chat.completions.create(
            model="policy",
            messages=messages,
            tools=[LOOKUP],
            temperature=1.0,
            max_tokens=16,
            seed=seed,
            logprobs=True,
            extra_body={"return_token_ids": True},
        ).to_dict()
        choice = answer["choices"][0]
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        turns.append(Turn(choice["prompt_token_ids"], choice["token_ids"], logprobs, answer["weights_version"]))
        message = choice["message"]
        if not message.get("tool_calls"):
            is_right = num_lookups > 0 and message["content"] == SELLS[name]
            return Episode(turns, 1 / num_lookups if is_right else 0.0)
        messages.append(message)
        num_lookups += len(message["tool_calls"])
        for call in message["tool_calls"]:
            found = run_tool(call["function"]["arguments"])
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": found})
    return Episode(turns, 0.0)


def run_tool(arguments: str) -> str:
    """What the tool says; a policy that learns also asks what cannot be asked."""
    try:
        return lookup(**json.loads(arguments))
    except TypeError as error:
        return str(error)


# Training: rollouts over HTTP, and a step on exactly the tokens that were sampled.


def train(num_steps: int, num_warm_steps: int) -> Iterator[Step]:
    """A policy from nothing: a few supervised steps on how to call, then GRPO on what to call."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    warm_up(model, tokenizer, num_warm_steps)
    num_ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    trained = DistributedDataParallel(model) if num_ranks > 1 else model
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, weight_decay=0.0)
    config = {"prefill_context_parallel_size": num_ranks, "kv_cache_gib": 0.02, "block_size": 4}
    lent = lend(trained, config)
    own_names = NAMES[rank::num_ranks]  # each rank has agents, and gradients, of its own

    for step in range(num_steps):
        began_s = time.perf_counter()
        with (
            cpinfer.rollout_phase(lent, config, tokenizer=tokenizer, weights_version=step) as engine,
            serving(engine, port=0) as server,
        ):
            groups = server.run(partial(agents, names=own_names, step=step))
            num_cached, num_computed = engine.stats.num_cached_prefill_tokens, engine.stats.num_computed_prefill_tokens
        assert groups is not None, "every rank has agents"
        rolled_out_s = time.perf_counter()

        turns, advantages = with_advantages(groups)
        assert {turn.weights_version for turn in turns} == {step}, "on-policy: these weights sampled all of it"
        logprobs = logprobs_of(trained, turns, tokenizer.pad_token_id)
        weights = torch.cat([torch.full_like(row, a) for row, a in zip(logprobs, advantages, strict=True)])
        loss = -(weights * torch.cat(logprobs)).sum() / (len(groups) * GROUP_SIZE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()

        sampled = torch.tensor([logprob for turn in turns for logprob in turn.logprobs])
        mismatch = (torch.cat(logprobs).detach() - sampled).abs().max()
        reward = torch.tensor([episode.reward for group in groups for episode in group]).mean()
        if num_ranks > 1:
            dist.all_reduce(reward, dist.ReduceOp.SUM)
            dist.all_reduce(mismatch, dist.ReduceOp.MAX)
        yield Step(
            reward.item() / num_ranks,
            mismatch.item(),
            num_cached / (num_cached + num_computed),
            rolled_out_s - began_s,
            time.perf_counter() - rolled_out_s,
        )
    lent.topology.close()


def agents(url: str, names: Sequence[str], step: int) -> list[list[Episode]]:
    """A group of episodes for each name, many under way together."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    with ThreadPoolExecutor(NUM_CLIENTS) as threads:
        groups = [
            [threads.submit(solve, client, name, seed_of(step, name, i)) for i in range(GROUP_SIZE)] for name in names
        ]
    return [[episode.result() for episode in group] for group in groups]


def with_advantages(groups: Sequence[Sequence[Episode]]) -> tuple[list[Turn], list[float]]:
    """The turns of all episodes, each with the advantage of its episode in its group."""
    turns: list[Turn] = []
    advantages: list[float] = []
    for group in groups:
        rewards = torch.tensor([episode.reward for episode in group])
        relative = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for episode, advantage in zip(group, relative.tolist(), strict=True):
            turns += episode.turns
            advantages += [advantage] * len(episode.turns)
    return turns, advantages


def seed_of(step: int, name: str, sample: int) -> int:
    """One for every episode: the same run draws the same samples, on any number of ranks."""
    return (step * len(NAMES) + NAMES.index(name)) * GROUP_SIZE + sample


def logprobs_of(model: Any, turns: Sequence[Turn], pad_token_id: int) -> list[torch.Tensor]:
    """The logprobs of each answer's tokens in the training forward, with gradients."""
    rows = [torch.tensor([*turn.prompt_token_ids, *turn.token_ids]) for turn in turns]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    # The token at position p is told by the logits at p - 1.
    logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logprobs = torch.log_softmax(logits, dim=-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return [
        row[len(turn.prompt_token_ids) - 1 : len(turn.prompt_token_ids) - 1 + len(turn.token_ids)]
        for row, turn in zip(logprobs, turns, strict=True)
    ]


def make_tokenizer() -> Any:
    """That of configs/grpo-tiny, with the tokens, the chat template and the response template of an agent."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    tokenizer.add_special_tokens({"eos_token": END, "additional_special_tokens": list(SPECIAL)})
    tokenizer.add_tokens(list(PARTS))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


def make_model(tokenizer: Any) -> Any:
    """The small model of configs/grpo-tiny with random weights, the same in every run."""
    torch.manual_seed(0)
    eos = tokenizer.eos_token_id
    config = AutoConfig.from_pretrained(FOLDER, vocab_size=len(tokenizer), eos_token_id=eos)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = eos
    return model


def warm_up(model: Any, tokenizer: Any, num_steps: int) -> None:
    """Supervised steps on conversations in which books and things are drawn: which book is kept they do not say."""
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(num_steps):
        turns = [turn for _ in range(16) for turn in drawn_turns(draw, tokenizer)]
        loss = -torch.cat(logprobs_of(model, turns, tokenizer.pad_token_id)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def drawn_turns(draw: random.Random, tokenizer: Any) -> Iterator[Turn]:
    """A conversation that asks any book, says what it is told, and asks again where that is nothing."""
    name = draw.choice(NAMES)
    messages: list[Any] = [{"role": "user", "content": name}]
    thing = "nothing"
    for _ in range(MAX_TURNS):
        if thing == "nothing":
            arguments = {"name": name, "book": draw.choice(BOOKS)}
            call = {"type": "function", "function": {"name": "lookup", "arguments": arguments}}
            answer: dict[str, Any] = {"role": "assistant", "tool_calls": [call]}
        else:
            answer = {"role": "assistant", "content": thing}
        prompt, whole = (
            tokenizer.apply_chat_template(
                chat, tools=[LOOKUP], add_generation_prompt=chat is messages, return_dict=False
            )
            for chat in (messages, [*messages, answer])
        )
        yield Turn(prompt, whole[len(prompt) :], [], 0)
        if thing != "nothing":
            return
        thing = draw.choice((*THINGS, *["nothing"] * len(THINGS)))
        messages += [answer, {"role": "tool", "content": thing}]


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and print what each step came to; the last line is all rewards as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="of GRPO")
    parser.add_argument("--warm-steps", type=int, default=150, help="supervised ones before them")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # a small model has no work for more, and sums in one order have the same last bits
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    began_s = time.perf_counter()
    steps: list[Step] = []
    for step in train(args.steps, args.warm_steps):
        if is_first:
            print(
                f"step {len(steps):2d}  mean reward {step.mean_reward:.3f}  mismatch {step.mismatch:.1e}  "
                f"cached {step.cached:.0%}  rollout {step.rollout_s:.2f} s  train {step.train_s:.2f} s",
                flush=True,
            )
        steps.append(step)
    if is_first:
        found = {"rewards": [round(step.mean_reward, 4) for step in steps], "wall_s": time.perf_counter() - began_s}
        print(json.dumps({**found, "max_mismatch": max((step.mismatch for step in steps), default=None)}))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
