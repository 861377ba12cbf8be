"""A small model that calls a tool, and reads its answer: what it says next depends on all that came before.

Its chat template is Qwen3's, as TRL ships it. Four places are scripted, and in them the model's own attention, over
random weights, decides between what the script allows:

    assistant\\n  ->  a call, or one of the words          a call's beginning  ->  one of the names
    a name       ->  the end of the call                  the end of a call, a word  ->  <|im_end|>
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from transformers import AutoTokenizer, Qwen2Config

from tiny_models import TINY, make_model

FOLDER = Path(__file__).parents[1] / "configs" / "grpo-tiny"
END, CALL, END_OF_CALL = "<|im_end|>", '<tool_call>\n{"name": "follow", "arguments": {"name": "', '"}}\n</tool_call>'
NAMES = (" Alice", " Boris", " Carla", " Dora")
WORDS = (" Remember", " Recall")
# Dimensions of the residual stream that no layer writes to: a token's embedding goes through them to the logits.
NUM_SCRIPTED = 4


@functools.cache
def _tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    tokenizer.add_special_tokens({"eos_token": END, "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens([CALL, END_OF_CALL, "assistant\n"])
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def tool_tokenizer() -> Any:
    """One of the caller's own: trainers write to it."""
    return copy.deepcopy(_tokenizer())


def ids_of(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """The ids of texts that are one token each."""
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert all(len(one) == 1 for one in ids), ids
    return [one[0] for one in ids]


def tool_model(words: Sequence[str] = WORDS, eagerness: float = 1.035, **config: Any) -> Any:
    """The model. `words`: what it may say in place of a call, which it does the rarer the more eager it is."""
    return copy.deepcopy(_model(tuple(words), eagerness, **config))


@functools.cache
def _model(words: tuple[str, ...], eagerness: float, **config: Any) -> Any:
    tokenizer = _tokenizer()
    eos = tokenizer.eos_token_id
    vocabulary = {"vocab_size": len(tokenizer), "eos_token_id": eos, "pad_token_id": tokenizer.pad_token_id}
    model = make_model(Qwen2Config(**{**TINY, **vocabulary, "max_position_embeddings": 2048, **config}))
    call, end_of_call, assistant = ids_of(tokenizer, [CALL, END_OF_CALL, "assistant\n"])
    names, said = ids_of(tokenizer, NAMES), ids_of(tokenizer, words)
    script: list[tuple[list[int], list[int]]] = [
        ([assistant], [call, *said]),
        ([call], names),
        (names, [end_of_call]),
        ([end_of_call, *said], [eos]),
    ]
    assert len(script) == NUM_SCRIPTED
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[-NUM_SCRIPTED:] = 0
                weight *= 10  # what has been read counts for more than the token that reads
            elif weight.dim() == 2:
                weight[:, -NUM_SCRIPTED:] = 0
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        typical = embedding.abs().mean(), head.abs().mean()
        for place, (tokens, followers) in enumerate(script, start=-NUM_SCRIPTED):
            embedding[tokens, place] = 10 * typical[0]
            head[followers, place] = 1000 * typical[1]
        head[call, -NUM_SCRIPTED] *= eagerness
        for beginning, followers in ("", [call, *said]), (CALL, names):
            # Of what all conversations have in common nothing decides, or each would go on alike.
            common = torch.stack([_last_state(model, tokenizer, name, beginning) for name in NAMES]).mean(dim=0)
            common[-NUM_SCRIPTED:] = 0
            head[followers] -= torch.outer(head[followers] @ common, common) / common.square().sum()
    model.generation_config.eos_token_id = eos
    return model


def _last_state(model: Any, tokenizer: Any, name: str, beginning: str) -> torch.Tensor:
    prompt = tokenizer.apply_chat_template(
        chats([name])[0], tools=[follow], add_generation_prompt=True, return_dict=False, tokenize=False
    )
    ids = tokenizer.encode(prompt + beginning, add_special_tokens=False, return_tensors="pt")
    state: torch.Tensor = model.model(ids).last_hidden_state[0, -1]
    return state


def follow(name: str) -> str:
    """Whom to ask next.

    Args:
        name: whom to ask.
    """
    return {"Alice": "Boris knows", "Boris": "Carla", "Carla": "Dora or Alice"}.get(name.strip(), "nobody")


def chats(names: Sequence[str]) -> list[list[Mapping[str, str]]]:
    """A question about each name."""
    return [[{"role": "user", "content": f"Recall:{name}"}] for name in names]
