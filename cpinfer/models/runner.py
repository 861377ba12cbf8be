"""The model under our attention: attach, run steps, give it back exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from cpinfer.errors import UserError
from cpinfer.models.attention_steps import AttentionStep
from cpinfer.models.spec import ModelSpec

ATTENTION_NAME = "cpinfer"


def attend_by_step(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cp_step: AttentionStep | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that Transformers calls in every layer: hands the layer over to the step that runs.

    query `[1, H, T, D]`, key and value `[1, K, T, D]`, all after RoPE; returns `[1, T, H, D]`. `cp_step` arrives as a
    keyword argument of the model's forward. RuntimeError when it is missing: someone else ran the model.
    """
    if cp_step is None:
        raise RuntimeError(
            "this model is attached to a cpinfer engine, which alone may run it; leave the `with cpinfer.attach(...)` "
            "block before training or calling it"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return cp_step.attend(module.layer_idx, q, k, v, scale=scaling).unsqueeze(0), None


class ModelRunner:
    """Runs steps of an attached model. Made by `attached`."""

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        self._model = model
        self.spec = spec
        embeddings = model.get_input_embeddings().weight
        self.device: torch.device = embeddings.device
        self.dtype: torch.dtype = embeddings.dtype

    @torch.no_grad()
    def forward(self, token_ids: Tensor, positions: Tensor, step: AttentionStep, keep: Tensor) -> Tensor:
        """`[N, vocab]` float32 logits of the packed tokens `keep [N]`; the other tokens never meet the vocabulary.

        token_ids, positions `[T]`, T and N at least 1: models crash on zero rows.
        """
        # `forward`, not a call: hooks on the outermost module belong to training. DeepSpeed's AutoTP has one that
        # pickles the arguments of the first batch to compare them between ranks, once.
        output = self._model.forward(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            attention_mask=None,
            use_cache=False,
            logits_to_keep=keep,
            cp_step=step,
        )
        return output.logits[0].float()


@contextmanager
def attached(model: Any, spec: ModelSpec, tp_size: int) -> Iterator[ModelRunner]:
    """Put our attention into `model` for the length of the block; on the way out everything is as it was.

    UserError when the model holds other heads than tensor parallelism of `tp_size` gives it.
    """
    _check_heads(model, spec, tp_size)
    AttentionInterface.register(ATTENTION_NAME, attend_by_step)
    config = model.config
    before = config._attn_implementation
    training = {module: module.training for module in model.modules()}
    config._attn_implementation = ATTENTION_NAME
    model.eval()
    try:
        yield ModelRunner(model, spec)
    finally:
        config._attn_implementation = before
        for module, mode in training.items():
            module.training = mode


def _check_heads(model: Any, spec: ModelSpec, tp_size: int) -> None:
    heads = spec.heads(tp_size)
    wanted = {"q_proj": heads.q_heads_per_rank, "k_proj": heads.kv_heads_per_rank, "v_proj": heads.kv_heads_per_rank}
    for name, module in model.named_modules():
        for projection, want in wanted.items():
            weight = getattr(getattr(module, projection, None), "weight", None)
            if weight is None or weight.dim() != 2:
                continue
            have = weight.shape[0] / spec.head_dim
            if have != want:
                raise UserError(
                    f"{name}.{projection} holds {have:g} heads on this rank; with {spec.num_q_heads} query and "
                    f"{spec.num_kv_heads} KV heads over tp={tp_size} it should hold {want}. "
                    "Call expand_kv_heads before sharding when tp exceeds the KV heads, and check tp_size."
                )
