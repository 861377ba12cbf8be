"""A training forward whose logits are those of deterministic rollouts, bit for bit.

The model runs as its trainer calls it, but for two things: attention in the order that the engine's deterministic mode
keeps (`ops/ordered_attention.py`), and rows whose bits depend on no other row (`invariant_rows`). Batches, and padding
on either side, change nothing then. Gradients are those of ordinary attention. Latent attention attends to its latents
as they are, as rollouts do: what they are expanded to would be rounded otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from cpinfer.attention.layer import AttentionLayer
from cpinfer.attention.steps import AttentionStep
from cpinfer.config import ConfigLike, job_config
from cpinfer.errors import UserError
from cpinfer.layout.rows import AttentionRows, ends_of
from cpinfer.models.attachment import attending_by, replaced
from cpinfer.models.attention_keywords import windows_told
from cpinfer.models.autocast import CastStep
from cpinfer.models.gated_delta_net import is_gated_delta_net
from cpinfer.models.invariant_rows import invariant_checkpointing, invariant_rows
from cpinfer.models.latent_attention import check_latent_projections, is_latent_attention, latent_attention
from cpinfer.models.local_weights import has_fsdp
from cpinfer.models.wrappers import unwrapped, without_engine
from cpinfer.ops.ordered_attention import OrderedAttention
from cpinfer.ops.states import count_sinks
from cpinfer.refusals import refuse

# What the attention of each order is registered under begins so.
_NAME = "cpinfer_ordered"


@contextmanager
def invariant_training(model: Any, config: ConfigLike = None) -> Iterator[None]:
    """In the block, forwards of `model` give the logits of rollouts with `deterministic`, bit for bit.

    Also in batches, padded on either side. Around whatever calls the model: TRL's trainers, `training_logprobs`, a loop
    of one's own. Local; nothing of the model is changed beyond the block. On CPU.

    Args:
        model: what is trained, or what wraps it (DDP, DeepSpeed's engine, PEFT).
        config: of the engine whose rollouts are meant: `deterministic_kv_shards`, `block_size` and
            `cp_kv_cache_interleave_size` count.

    Yields:
        Nothing.

    Raises:
        UserError: for what is no Hugging Face model; in the block, for positions that are not those of the tokens that
            the mask leaves, and masks of other things than padding.
        UnsupportedError: for a device that is no CPU, linear attention, or adapters on `kv_b_proj` of
            latent attention.
    """
    wanted, inner = job_config(config), unwrapped(without_engine(model))
    if not hasattr(getattr(inner, "config", None), "to_dict"):
        raise UserError(
            f"invariant_training was given a {type(inner).__name__}; a Hugging Face model was wanted, or DDP, PEFT or "
            "DeepSpeed's engine around one."
        )
    check_latent_projections(inner)
    if any(map(is_gated_delta_net, inner.modules())):
        raise refuse("invariant_states", f"a {type(inner).__name__}")
    device = next(inner.parameters()).device
    if device.type != "cpu":
        raise refuse("invariant_device", f"device {device}")
    shards, interleave = wanted.deterministic_kv_shards, wanted.interleave
    name = f"{_NAME}_{shards}_{interleave}"
    AttentionInterface.register(name, partial(_attend, num_shards=shards, interleave=interleave))
    AttentionMaskInterface.register(name, flash_attention_mask)  # which is that of padding alone
    with ExitStack() as stack:
        stack.enter_context(windows_told(inner))
        stack.enter_context(attending_by(inner, name, gathered_by_fsdp=has_fsdp(model)))
        stack.enter_context(replaced(inner, "forward", _by_rows(inner, inner.forward, name)))
        for module in filter(is_latent_attention, inner.modules()):
            stack.enter_context(replaced(module, "forward", partial(_latent_forward, module, (shards, interleave))))
        yield


def trains_invariantly(model: Any) -> bool:
    """Whether this is inside of a block of `invariant_training` of `model`, or of what it wraps."""
    return str(getattr(unwrapped(without_engine(model)).config, "_attn_implementation", "")).startswith(_NAME)


def _by_rows(model: Any, forward: Any, implementation: str) -> Any:
    """`forward` of a model, whose rows depend on no other, and whose positions count the tokens of the mask."""
    signature = inspect.signature(forward)
    dropouts = {name: part for name, part in model.named_modules() if isinstance(part, _DropoutNd)}

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if model.config._attn_implementation != implementation:  # an engine that is attached in the block runs it
            return forward(*args, **kwargs)
        for name, part in dropouts.items():
            _refuse_dropout(part.p * part.training, name)
        bound = signature.bind(*args, **kwargs)
        given = {**kwargs, **bound.arguments}
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if mask is not None and getattr(mask, "ndim", 0) != 2:
            raise UserError(
                "attention_mask is not [batch, tokens], of padding: rollouts attend to all tokens before, or to those "
                "in a layer's window. Give the mask that the tokenizer gives."
            )
        if mask is None and positions is not None:
            mask = torch.ones_like(positions)
        if mask is not None:
            counted = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
            if positions is None:
                bound.arguments.pop("position_ids", None)  # None that was given by its place
                args, kwargs = bound.args, {**bound.kwargs, "position_ids": counted}
            elif not torch.equal((positions * mask).expand_as(counted), counted * mask):
                raise UserError(
                    "position_ids are not those of the tokens that attention_mask leaves, which are 0, 1, 2, ... in "
                    "every row: rollouts know no others, and of sequences packed into a row one each. Leave them out."
                )
        with invariant_rows(), invariant_checkpointing(model):  # which a trainer may turn on in the block
            return forward(*args, **kwargs)

    return run


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    num_shards: int,
    interleave: int,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: query `[B, H, T, D]`, key and value `[B, K, T, .]`, to `[B, T, H, V]`.

    `attention_mask [B, T]` is of padding; None for none. Padding gets zeros.
    """
    _refuse_dropout(dropout)
    _refuse_cached(query.shape[2], key.shape[2])
    if s_aux is not None and len(s_aux) != query.shape[1]:
        raise UserError(
            f"a layer has {len(s_aux)} attention sinks and {query.shape[1]} query heads on this rank: its heads are "
            "sharded, its sinks are not. Train such models in this block without tensor parallelism."
        )
    if torch.is_autocast_enabled(query.device.type):  # which left them in several dtypes; rollouts cast them, too
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    mask = query.new_ones(len(query), query.shape[2], dtype=torch.bool) if attention_mask is None else attention_mask
    out = _OrderedTraining.apply(
        query, key, value, s_aux, mask.bool(), (num_shards, interleave), scaling, sliding_window, softcap
    )
    return out, None


def _latent_forward(
    module: Any,
    order: tuple[int, int],
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The forward of a module of latent attention, `[B, T, hidden]` to the same."""
    _refuse_dropout(module.attention_dropout * module.training)
    B, T, _ = hidden_states.shape

    def flat(x: Tensor) -> Tensor:
        """`[1, B * T, .]` of RoPE's numbers `[B or 1, T, .]`."""
        return x.expand(B, T, -1).reshape(1, B * T, -1)

    embeddings = position_embeddings
    embeddings = flat(embeddings) if isinstance(embeddings, Tensor) else tuple(map(flat, embeddings))
    mask = hidden_states.new_ones(B, T, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    step: AttentionStep = _LatentTraining(mask, order, others.get("cache", others.get("past_key_values")))
    if torch.is_autocast_enabled(hidden_states.device.type):
        step = CastStep(step, torch.get_autocast_dtype(hidden_states.device.type))
    out, _ = latent_attention(module, hidden_states.reshape(1, B * T, -1), embeddings, step)
    return out.view(B, T, -1), None


class _LatentTraining:
    """The step of a batch whose padding `mask [B, T]` leaves out, over latents that nobody cached."""

    def __init__(self, mask: Tensor, order: tuple[int, int], cache: Any) -> None:
        self.num_tokens = mask.numel()
        self._mask = mask
        self._order = order
        self._cache = cache

    def attend(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B * T, H, V]` for q `[B * T, H, N + R]` and latents k `[B * T, 1, C + R]`, of which v are the first C."""
        query, key = (x.unflatten(0, self._mask.shape).transpose(1, 2) for x in (layer.absorb(q), k))
        latents, rotated = key.split([v.shape[-1], key.shape[-1] - v.shape[-1]], dim=-1)
        if self._cache is not None:  # which the model made, or the caller has filled
            _refuse_cached(query.shape[2], self._cache.update(latents, rotated, layer.index)[0].shape[2])
        out = _OrderedTraining.apply(query, key, latents, None, self._mask, self._order, layer.scale, None, None)
        return layer.project(out.flatten(0, 1))


def _refuse_dropout(dropout: float, where: str = "attention") -> None:
    if dropout:
        raise UserError(
            f"dropout of {where} is {dropout:g}, which rollouts know nothing of. Set it to 0 (attention_dropout, "
            "lora_dropout or what else the config calls it)."
        )


def _refuse_cached(num_queries: int, num_keys: int) -> None:
    if num_queries != num_keys:
        raise UserError("a cache of keys was given; training forwards are of whole sequences. Set use_cache to False.")


class _OrderedTraining(torch.autograd.Function):
    """Forward in order; backward through ordinary attention, computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        mask: Tensor,
        order: tuple[int, int],
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, sinks, mask)
        ctx.rest = scale, window, soft_cap
        B, H, T, _ = query.shape
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        at = mask.flatten().nonzero().squeeze(-1)  # the tokens, row after row
        rows = _rows_of(mask, at, window)
        out, lse = OrderedAttention(rows, *order).run(q[at], k, v, scale=scale, soft_cap=soft_cap)
        if sinks is not None:
            out = count_sinks(out, lse, sinks)
        found = query.new_zeros(B * T, H, v.shape[-1])
        found[at] = out.to(query.dtype)
        return found.view(B, T, H, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        *given, mask = ctx.saved_tensors
        scale, window, soft_cap = ctx.rest
        with torch.enable_grad():
            again: list[Any] = [None if x is None else x.detach().requires_grad_() for x in given]
            query, key, value, sinks = again
            out = _ordinary(query, key, value, sinks, mask, scale, window, soft_cap)
            found = iter(torch.autograd.grad(out, [x for x in again if x is not None], grads[0]))
        return (*(None if x is None else next(found) for x in again), *[None] * 5)


def _rows_of(mask: Tensor, at: Tensor, window: int | None) -> AttentionRows:
    """A causal row for every sequence of a batch, over its tokens: those of `[B * T]` that `mask` leaves."""
    lens = mask.sum(dim=-1).numpy().astype(np.int32)
    slots = at.numpy()
    tables = [slots[a:b] for a, b in pairwise(ends_of(lens).tolist())]
    rows = AttentionRows.build(lens, lens, tables, block_size=1, causal=True)
    return rows if window is None else rows.within(window)


def _ordinary(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    mask: Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """`[B, T, H, V]` as the definition has it. Padding sees itself: a softmax over nothing has no gradient."""
    T, group = query.shape[2], query.shape[1] // key.shape[1]
    place = torch.arange(T)
    sees = place[:, None] >= place
    if window is not None:
        sees = sees & (place[:, None] - place < window)
    sees = (sees & mask[:, None, :]) | torch.eye(T, dtype=torch.bool)
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    if sinks is None and soft_cap is None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=sees[:, None], scale=scale)
    else:
        scores = (query @ key.transpose(-1, -2)).float() * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        scores = scores.masked_fill(~sees[:, None], -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :T]
        out = weights.to(value.dtype) @ value
    return (out * mask[:, None, :, None]).transpose(1, 2)
