"""Writes `configs/recall-tiny`: a 1M-parameter Qwen2 that recalls facts from its prompt, written down, not trained.

An inference engine is best tested with a model whose answer depends on *where* every key sits: lose a KV shard, or
merge the shards' attention evenly, and sentences come out wrong. Random weights cannot show that, and trained ones
cannot be downloaded everywhere, so an induction circuit is put into the weights by hand.

    residual stream, 256 dims, in slices of 32: one slice for each of the two K/V heads

      [0, 64)   A  code of this token        embedding writes it
     [64, 128)  B  code of the token before  layer 0 writes it: q and k are constants that RoPE turns to offset -1
    [128, 192)  C  code of the next token    layer 1 writes it: q reads A, k reads B, v reads A: "Alice" finds the
                                             token whose predecessor was "Alice", and copies it. lm_head reads C
    [192, 256)     noise

What is measured: exact match of the whole greedy answer, stop token included, on fresh prompts. One teacher-forced
pass per prompt tells it: greedy decoding writes the answer exactly when the argmax agrees at every answer position.
Prose goes to stderr; the last line of stdout is one JSON object.
"""

import argparse
import json
import math
import random
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

from cpinfer_tools.evaluation.longctx.recall_text import (
    DOES,
    EXCERPT,
    FILLER,
    NAMES,
    PAD,
    STOP,
    TEMPLATES,
    THINGS,
    filler_sentence,
    pieces,
)

ROOT = Path(__file__).resolve().parents[2]


VOCAB_SIZE = 768
MIN_RECORDS, MAX_RECORDS = 4, 8
RECORD_TOKENS, FRAME_TOKENS = 6, 4  # " Remember: NAME DOES THINGS;" and, around all of them, "..." with " Recall: NAME"
ANSWER_TOKENS = 3  # " DOES THINGS;"

HIDDEN, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, INTERMEDIATE = 256, 2, 8, 2, 32, 256
HEADS_PER_KV = NUM_HEADS // NUM_KV_HEADS
# Pair i of a head turns by THETA**(-i/16) a token. So large a base leaves pairs 0..4 to tell offsets apart (1 rad to
# 1e-4 rad) and makes pairs 5..15 stand still: over 32k tokens the fastest of them turns by 0.33 rad.
THETA = 1e16
MOVING = np.arange(5)
STILL = np.concatenate([np.arange(5, 16), np.arange(21, 32)])  # pair i is dims i and i + 16 in Qwen2's layout
PREVIOUS_SHARPNESS = 40.0  # nats for each moving pair of layer 0: 32k other offsets together weigh 0.07 % of offset -1
PEAK_LOGIT = 13.0  # logit of a token that layer 1 attends to with all its weight: p about 0.98 in this vocabulary
NOISE = 0.01
MODEL_SEED = 0


@dataclass(frozen=True)
class Prompt:
    """One question: `prompt` as a user types it, `answer` as the model should go on, up to its stop token."""

    id: str
    prompt: str
    answer: str


def make_tokenizer() -> Qwen2Tokenizer:
    """One token for each word of the lists, space before it included; everything else is spelled in single bytes.

    The words are *added* tokens over a byte-level BPE that has no merges: transformers rebuilds the tokenizer of any
    Qwen2 model as byte-level BPE, and words made by merging alone would take 1500 more entries for their prefixes.
    """
    tokenizer = Qwen2Tokenizer(
        vocab={byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))},
        merges=[],
        unk_token=None,  # no byte is unknown
        eos_token=STOP,
        pad_token=PAD,
    )
    frame = sorted({word for template in TEMPLATES for word in re.findall(r"[A-Za-z]+", re.sub("{.*?}", "", template))})
    spoken = ["Remember", "Recall", *NAMES, *DOES, *THINGS, *frame, *chain.from_iterable(FILLER.values())]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (EXCERPT, *(" " + word for word in spoken))])
    if len(tokenizer) != VOCAB_SIZE or len(set(spoken)) != len(spoken):
        raise ValueError(f"the word lists make {len(tokenizer)} tokens of {len(spoken)} words; wanted {VOCAB_SIZE}")
    return tokenizer


def make_prompt(rng: random.Random, num_tokens: int, name: str) -> Prompt:
    """A prompt of exactly `num_tokens` tokens: records scattered over filler, one of them asked for at the end."""
    num_records = min(rng.randint(MIN_RECORDS, MAX_RECORDS), (num_tokens - FRAME_TOKENS) // RECORD_TOKENS)
    if num_records < 1:
        raise ValueError(f"num_tokens={num_tokens}; wanted at least {FRAME_TOKENS + RECORD_TOKENS}, for one record")
    records = list(zip(*(rng.sample(column, num_records) for column in (NAMES, DOES, THINGS)), strict=True))
    room = num_tokens - FRAME_TOKENS - RECORD_TOKENS * num_records
    sentences: list[list[str]] = []
    while (missing := room - sum(map(len, sentences))) > 0:
        sentences.append(
            pieces(" " + filler_sentence(rng))[-missing:]
        )  # the last one made may lose its head, to hit the length
    head = sentences.pop() if sentences else []  # comes first, after the dots of an excerpt
    for record in records:
        sentences.insert(rng.randint(0, len(sentences)), pieces(" Remember: {} {} {};".format(*record)))
    subject, does, things = rng.choice(records)
    text = "".join(chain([EXCERPT], head, *sentences))
    return Prompt(name, f"{text} Recall: {subject}", f" {does} {things}")


def make_prompts(rng: random.Random, lengths: Sequence[int]) -> list[Prompt]:
    """One prompt for each length in tokens, in order."""
    return [make_prompt(rng, length, f"recall-{i:03d}") for i, length in enumerate(lengths)]


def shipped_prompts() -> list[Prompt]:
    """The 64 prompts of `recall-tiny-prompts.jsonl`: seed 0, lengths log-uniform in 30..2000, none left out."""
    rng = random.Random(0)
    return make_prompts(rng, [round(math.exp(rng.uniform(math.log(30), math.log(2000)))) for _ in range(64)])


def golay_code() -> NDArray[np.float32]:
    """Signs `[1024, 22]`: the extended binary Golay code, shortened twice. Any two rows differ in 8 places or more.

    One row is one token's code for one K/V head, so no two tokens correlate above 6/22 where random signs reach 0.8.
    A row is a multiple of Golay's generator polynomial, and its parity. Integers only: the same on every machine.
    """
    generator = np.array([1, 0, 1, 0, 1, 1, 1, 0, 0, 0, 1, 1] + [0] * 9)  # x^11 + x^9 + x^7 + x^6 + x^5 + x + 1
    messages = np.arange(1024)[:, None] >> np.arange(10) & 1
    rows = messages @ np.array([np.roll(generator, i) for i in range(10)]) % 2
    bits = np.concatenate([rows, rows.sum(axis=1, keepdims=True) % 2], axis=1)
    return (1 - 2 * bits).astype(np.float32)


def make_weights(sharpness: float) -> dict[str, torch.Tensor]:
    """The state dict of a Qwen2ForCausalLM, float32. `sharpness`: nats by which layer 1 prefers an exact match."""
    rng = np.random.default_rng(MODEL_SEED)
    weights: dict[str, NDArray[np.float32]] = {}

    def add(name: str, *shape: int, base: float = 0.0) -> NDArray[np.float32]:
        weights[name] = (base + NOISE * rng.standard_normal(shape)).astype(np.float32)
        return weights[name]

    code = golay_code()
    # Each K/V head gets the code in an order of its own: tokens that are close for one head are not for the other.
    codes = [code[rng.permutation(len(code))[:VOCAB_SIZE]] for _ in range(NUM_KV_HEADS)]
    section = NUM_KV_HEADS * HEAD_DIM
    a, b, c = ([start + g * HEAD_DIM + STILL for g in range(NUM_KV_HEADS)] for start in (0, section, 2 * section))
    # A section holds 44 signs, so the RMS that each norm divides by is known; reading weights multiply it back in.
    rms = [math.sqrt(n * NUM_KV_HEADS * len(STILL) / HIDDEN) for n in (1, 2, 3)]

    root = HEAD_DIM**0.25  # on q and on k it undoes attention's 1 / sqrt(D), so that gains are in nats
    step_gain = root * math.sqrt(PREVIOUS_SHARPNESS)
    match_gain = root * math.sqrt(sharpness / len(STILL)) * rms[1]
    step = THETA ** (-MOVING / (HEAD_DIM // 2))  # radians by which RoPE turns the moving pairs from token to token
    projections = (("q", NUM_HEADS), ("k", NUM_KV_HEADS), ("v", NUM_KV_HEADS))

    embedding = add("model.embed_tokens.weight", VOCAB_SIZE, HIDDEN)
    for layer in range(NUM_LAYERS):
        at = f"model.layers.{layer}."
        add(at + "input_layernorm.weight", HIDDEN, base=1.0)
        q, k, v = (add(f"{at}self_attn.{name}_proj.weight", n * HEAD_DIM, HIDDEN) for name, n in projections)
        q_bias, k_bias, _ = (add(f"{at}self_attn.{name}_proj.bias", n * HEAD_DIM) for name, n in projections)
        o = add(at + "self_attn.o_proj.weight", HIDDEN, NUM_HEADS * HEAD_DIM)
        add(at + "post_attention_layernorm.weight", HIDDEN, base=1.0)
        add(at + "mlp.gate_proj.weight", INTERMEDIATE, HIDDEN)
        add(at + "mlp.up_proj.weight", INTERMEDIATE, HIDDEN)
        add(at + "mlp.down_proj.weight", HIDDEN, INTERMEDIATE)

        for g in range(NUM_KV_HEADS):
            v[g * HEAD_DIM + STILL, a[g]] += rms[layer]
            if layer == 0:
                k_bias[g * HEAD_DIM + MOVING] += step_gain
            else:
                k[g * HEAD_DIM + STILL, b[g]] += match_gain
        for h in range(NUM_HEADS):
            g, j = divmod(h, HEADS_PER_KV)
            if layer == 0:
                # Turned back by one step: q at position m then meets k at m - 1 with every pair aligned.
                q_bias[h * HEAD_DIM + MOVING] += step_gain * np.cos(step)
                q_bias[h * HEAD_DIM + HEAD_DIM // 2 + MOVING] -= step_gain * np.sin(step)
            else:
                q[h * HEAD_DIM + STILL, a[g]] += match_gain
            # Each head of a group writes a quarter of the code, so that none of the eight is idle.
            target = (b, c)[layer][g]
            o[target[j::HEADS_PER_KV], h * HEAD_DIM + STILL[j::HEADS_PER_KV]] += 1.0
    add("model.norm.weight", HIDDEN, base=1.0)
    lm_head = add("lm_head.weight", VOCAB_SIZE, HIDDEN)
    for g in range(NUM_KV_HEADS):
        embedding[:, a[g]] += codes[g]
        lm_head[:, c[g]] += codes[g] * (PEAK_LOGIT * rms[2] / (NUM_KV_HEADS * len(STILL)))
    return {name: torch.from_numpy(weight) for name, weight in weights.items()}


def model_config(stop_id: int, pad_id: int) -> dict[str, Any]:
    """config.json. By hand, because `save_pretrained` would write the installed version of transformers into it."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "tie_word_embeddings": False,  # lm_head reads another section than the one the embedding writes
        "eos_token_id": stop_id,
        "pad_token_id": pad_id,
        "dtype": "float32",
    }


def write_model(output: Path, sharpness: float, *, with_prompts: bool = True) -> None:
    """Writes weights, configs and tokenizer into `output`, the shipped prompts beside it; the same bytes every time."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    stop_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    # The question is the whole prompt: nothing may stand between the name asked for and the answer.
    chat_template = (
        "{% for message in messages %}{{ ' ' if not loop.first }}{{ message['content'] | trim }}"
        "{{ ';' if message['role'] == 'assistant' }}{% endfor %}"
    )
    documents: dict[str, dict[str, Any]] = {
        "config.json": model_config(stop_id, pad_id),
        "generation_config.json": {"do_sample": False, "eos_token_id": stop_id, "pad_token_id": pad_id},
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": STOP,
            "pad_token": PAD,
            "unk_token": None,
            "model_max_length": 32768,
            "clean_up_tokenization_spaces": False,
            "chat_template": chat_template,
        },
    }
    for name, document in documents.items():
        (output / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (output / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    weights = safetensors.torch.save(make_weights(sharpness), metadata={"format": "pt"})
    (output / "model.safetensors").write_bytes(weights)
    if not with_prompts:
        return
    lines = [json.dumps(asdict(prompt)) + "\n" for prompt in shipped_prompts()]
    output.with_name(output.name + "-prompts.jsonl").write_text("".join(lines), encoding="utf-8")


@torch.inference_mode()
def evaluate(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Exact match of the greedy answers to `prompts`, all equally long in tokens, and how sure the model is of them.

    A margin is the correct token's logit less the best other one, at its smallest over an answer; below 0 it is wrong.
    A probability is the correct token's at temperature 1, one for every answer position.
    """
    texts = [prompt.prompt + prompt.answer + STOP for prompt in prompts]
    tokens = torch.tensor([tokenizer(text)["input_ids"] for text in texts])  # [N, T]
    margins, probabilities, largest = [], [], 0.0
    batch_size = max(1, 4096 // tokens.shape[1])
    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size]
        labels = batch[:, -ANSWER_TOKENS:, None]
        logits = model(batch[:, :-1], logits_to_keep=ANSWER_TOKENS, use_cache=False).logits  # [B, 3, V]
        correct = logits.gather(-1, labels)
        others = logits.scatter(-1, labels, -math.inf).amax(-1, keepdim=True)
        margins += (correct - others).amin((1, 2)).tolist()
        probabilities += (correct - logits.logsumexp(-1, keepdim=True)).exp().flatten().tolist()
        largest = max(largest, logits.abs().max().item())
    return {
        "num_prompts": len(prompts),
        "accuracy": sum(margin > 0 for margin in margins) / len(prompts),
        "margin_median_nats": round(statistics.median(margins), 3),
        "margin_min_nats": round(min(margins), 3),
        "answer_token_p_median": round(statistics.median(probabilities), 5),
        "answer_token_p_min": round(min(probabilities), 5),
        "logit_abs_max": round(largest, 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the model, then measures it and writes `accuracy.json` beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "configs" / "recall-tiny")
    parser.add_argument("--sharpness", type=float, default=16.0, help="logit of an exact match in layer 1, in nats")
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 1024, 2048, 4096, 8192, 16384], help="tokens")
    parser.add_argument("--num-prompts", type=int, default=500, help="fresh prompts for each length")
    parser.add_argument("--num-prompts-long", type=int, default=50, help="instead, for lengths over 8192")
    parser.add_argument("--eval-seed", type=int, default=1, help="0 is the shipped prompts' own, and is refused")
    parser.add_argument("--skip-prompts", action="store_true", help="write the model alone: the prompts are there")
    parser.add_argument("--skip-eval", action="store_true")
    args = parser.parse_args(argv)
    if args.eval_seed == 0:
        parser.error("--eval-seed=0 made the shipped prompts; accuracy is measured on others, use any other seed")

    write_model(args.output, args.sharpness, with_prompts=not args.skip_prompts)
    size_bytes = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"wrote {args.output}: {size_bytes / 1e6:.2f} MB", file=sys.stderr)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "tools/dev/make_recall_tiny.py", *(sys.argv[1:] if argv is None else argv)]),
        "versions": {m.__name__: str(m.__version__) for m in (torch, transformers, tokenizers, np)},
        "sharpness_nats": args.sharpness,
        "eval_seed": args.eval_seed,
        "by_length_tokens": {},
    }
    if not args.skip_eval:
        model = AutoModelForCausalLM.from_pretrained(args.output, trust_remote_code=False).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.output, trust_remote_code=False)
        print("tokens  prompts  accuracy  margin median/min, nats  p median/min", file=sys.stderr)
        for length in args.lengths:
            num_prompts = args.num_prompts if length <= 8192 else args.num_prompts_long
            rng = random.Random(f"{args.eval_seed}, {length} tokens")
            row = evaluate(model, tokenizer, make_prompts(rng, [length] * num_prompts))
            report["by_length_tokens"][str(length)] = row
            print(
                f"{length:6d}  {num_prompts:7d}  {row['accuracy']:8.3f}"
                f"  {row['margin_median_nats']:12.2f} / {row['margin_min_nats']:6.2f}"
                f"  {row['answer_token_p_median']:.4f} / {row['answer_token_p_min']:.4f}",
                file=sys.stderr,
            )
        (args.output / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({**report, "size_bytes": size_bytes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
