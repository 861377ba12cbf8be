"""The model under our attention: attach, run steps, give it back exactly as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from cpinfer.attention.layer import AttentionLayer
from cpinfer.attention.linear_attention import LinearStep
from cpinfer.attention.steps import AttentionStep
from cpinfer.errors import UserError
from cpinfer.models.adapters import AdapterState, adapter_state, refuse_adapters_under_tp
from cpinfer.models.attachment import (
    Attachment,
    attending_by,
    claimed,
    exchanged,
    places_of,
    replaced,
    uncompiled,
)
from cpinfer.models.attention_keywords import HandedStep, windows_told
from cpinfer.models.autocast import CastStep, autocast_dtype
from cpinfer.models.decoder_layers import check_layers, decoder_layers, is_attention
from cpinfer.models.gated_delta_net import LinearHeads, gated_delta_net, is_gated_delta_net
from cpinfer.models.hooks import hooks_disabled
from cpinfer.models.latent_attention import check_latent_projections, is_latent_attention, latent_attention
from cpinfer.models.layer_order import EveryLayerOnce
from cpinfer.models.linear_cuts import heads_in_use
from cpinfer.models.local_weights import (
    dtype_in_use,
    has_fsdp,
    is_dealt_out,
    is_fsdp,
    local,
    refuse_unusable_weights,
    shape_in_use,
)
from cpinfer.models.prepacking import PrepackedLinears, prepackable
from cpinfer.models.routed_experts import ExpertLayers
from cpinfer.models.spec import ModelSpec
from cpinfer.models.unpadded_moe import UnpaddedMoE, is_moe_block
from cpinfer.models.wrappers import refuse_all_but_causal_lms, unwrapped, without_replication
from cpinfer.refusals import refuse

ATTENTION_NAME = "cpinfer"


@dataclass(frozen=True)
class RankStep:
    """What travels through the model's forward as `cp_step`: the step, and the query heads that this rank computes.

    The same step serves layers of linear attention, where the model has any.
    """

    step: AttentionStep | EveryLayerOnce
    q_heads: range


def attend_by_step(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cp_step: RankStep | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that Transformers calls in every layer: hands the layer over to the step that runs.

    query `[1, H, T, D]`, key and value `[1, K, T, D]`, all after RoPE; returns `[1, T, H, D]`. `cp_step` arrives as a
    keyword argument of the model's forward. RuntimeError when it is missing: someone else ran the model.
    """
    cp_step = _wanted(cp_step)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    sinks = None if s_aux is None else local(s_aux)
    if sinks is not None and len(sinks) != q.shape[1]:  # AutoTP leaves all heads' sinks on every rank
        sinks = sinks[cp_step.q_heads.start : cp_step.q_heads.stop]
    layer = AttentionLayer(module.layer_idx, scaling, softcap, sliding_window, sinks)
    return cp_step.step.attend(layer, q, k, v).unsqueeze(0), None


def _wanted(cp_step: RankStep | None) -> RankStep:
    if cp_step is None:
        raise RuntimeError(
            "this model is attached to a cpinfer engine, which alone may run it; leave the `with cpinfer.attach(...)` "
            "block before training, calling or copying it"
        )
    return cp_step


class ModelRunner:
    """Runs steps of an attached model. Made by `attached`.

    `entry` is called for a forward: of the model, or of what brings its weights. The states of `spec` are those that
    this rank keeps, of its own heads.
    """

    def __init__(
        self,
        attachment: Attachment,
        entry: Any,
        spec: ModelSpec,
        q_heads: range,
        unpadded_moe: UnpaddedMoE,
        handed: HandedStep,
        dtype: torch.dtype,
        cast: torch.dtype | None,
        around: Callable[[], AbstractContextManager[Any]],
        prepacked: PrepackedLinears,
    ) -> None:
        self._around = around
        self.prepacked = prepacked
        self._attachment = attachment
        self._entry = entry
        self._model = model = attachment.model
        self._cast = cast
        self._adapters = adapter_state(model)
        self._q_heads = q_heads
        self._real_rows = unpadded_moe
        self.expert_layers = ExpertLayers.of(model)
        self._handed = handed
        self.spec = spec
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.weights_dtype: torch.dtype = dtype
        self.dtype: torch.dtype = cast or dtype

    def check_unchanged(self) -> None:
        """ModelChangedError when the model is not the one that was attached: other dtypes, modules, attention, mode."""
        self._attachment.check()

    @property
    def has_other_adapters(self) -> bool:
        """Whether other adapters are in effect than when they were last noticed."""
        return self._adapters != adapter_state(self._model)

    def notice_adapters(self) -> None:
        """From now on those that are in effect now are no other ones."""
        self._adapters = adapter_state(self._model)

    @property
    def adapters(self) -> AdapterState:
        """Which adapters were in effect when they were last noticed."""
        return self._adapters

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """What the model's generation_config says, as plain data."""
        found = getattr(self._model, "generation_config", None)
        return {} if found is None else found.to_dict()

    @property
    def has_experts(self) -> bool:
        return any(map(is_moe_block, self._model.modules()))

    @property
    def weights_come_and_go(self) -> bool:
        """Whether weights are sharded, and gathered while the model runs."""
        return _come_and_go(self._model, self._attachment.gathered_by_fsdp)

    @property
    def vocab_size(self) -> int:
        """Rows of the table of token embeddings."""
        return int(self._model.get_input_embeddings().num_embeddings)

    def named_modules(self) -> Iterator[tuple[str, Any]]:
        """The modules of the model as it is attached, by name."""
        yield from self._model.named_modules()

    def holds(self, value: object) -> bool:
        """Whether a module of the model has this object as an attribute."""
        return bool(places_of(self._model, value))

    def exchanging(self, found: object, other: object) -> AbstractContextManager[None]:
        """A block in which modules of the model that hold the object `found` hold `other` in its place."""
        return exchanged(self._model, found, other)

    def weight_places(self) -> tuple[int, ...]:
        """Where the weights lie in memory: what was captured reads them there."""
        return tuple(local(weight).data_ptr() for weight in self._model.parameters())

    @torch.no_grad()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        step: AttentionStep,
        keep: Tensor | None,
        linear: LinearStep | None = None,
    ) -> Tensor:
        """`[N, vocab]` float32 logits of the packed tokens `keep [N]`, None for all; others never meet the vocabulary.

        token_ids, positions `[T]`, T and N at least 1: models crash on zero rows. `linear`: the step of layers of
        linear attention, where the model has any. EngineFaultError when a layer did not take its attention from its
        step.
        """
        self._real_rows.count = step.num_tokens
        precision: AbstractContextManager[Any] = nullcontext()
        if self._cast is not None:
            step, precision = CastStep(step, self._cast), torch.autocast(self.device.type, self._cast)
        layers = EveryLayerOnce(step, self.spec.windows, linear, self.spec.linear_layers)
        cp_step = RankStep(layers, self._q_heads)
        with precision, self._around(), self._handed.over(cp_step):
            output = self._entry(
                input_ids=token_ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                attention_mask=None,
                use_cache=False,
                logits_to_keep=0 if keep is None else keep,  # 0 is all
                return_dict=True,  # whatever the config says
                cp_step=cp_step,
            )
        layers.check_complete()
        return output.logits[0].float()


@contextmanager
def attached(
    outermost: Any,
    spec: ModelSpec,
    tp_size: int,
    tp_rank: int = 0,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    prepacked_bytes: int = 0,
) -> Iterator[ModelRunner]:
    """Put our attention into a model for the length of the block; on the way out everything is as it was.

    `outermost` is the model, or what `unwrapped` knows around it; forwards run in the context `around`, and linear
    layers by copies of their weights of up to `prepacked_bytes`, once they are packed. UserError, before anything is
    changed, when it is no causal LM, is attached already, holds other heads than tensor parallelism of `tp_size` gives
    it, layers that do not count themselves in order, or weights or adapters that cannot be in effect.
    """
    outermost, model = without_replication(outermost), unwrapped(outermost)
    entry, gathered_by_fsdp = _entry(outermost, model), has_fsdp(outermost)
    _check_model(model, spec, tp_size, gathered_by_fsdp)
    linear = None
    if spec.states is not None:
        linear = heads_in_use(model, spec.states, tp_size, tp_rank, gathered_by_fsdp=gathered_by_fsdp)
    AttentionInterface.register(ATTENTION_NAME, attend_by_step)
    training = {module: module.training for module in outermost.modules()}
    unpadded_moe, handed = UnpaddedMoE(), HandedStep()
    with ExitStack() as stack:
        stack.enter_context(claimed(model))
        stack.enter_context(uncompiled(outermost))
        # AutoTP's pickles the arguments of the first batch to compare them between ranks, once: training's business.
        stack.enter_context(hooks_disabled(entry, "deepspeed", inside=False))
        for module in model.modules():
            for name, value in _replacements(module, spec, tp_size, linear, unpadded_moe, handed):
                stack.enter_context(replaced(module, name, value))
        stack.enter_context(windows_told(model))
        stack.callback(_set_modes, training)
        model.eval()
        attending = attending_by(model, ATTENTION_NAME, gathered_by_fsdp=gathered_by_fsdp)
        attachment = stack.enter_context(attending)
        dtype, cast = dtype_in_use(outermost, decoder_layers(model)[0]), autocast_dtype(outermost, model)
        q_heads, own = (
            spec.heads(tp_size).q_heads(tp_rank),
            replace(spec, states=None if linear is None else linear.own),
        )
        prepacked = PrepackedLinears()
        if prepacked_bytes:
            prepacked = stack.enter_context(_prepacked(model, prepacked_bytes, cast, gathered_by_fsdp))
        yield ModelRunner(attachment, entry, own, q_heads, unpadded_moe, handed, dtype, cast, around, prepacked)


def _come_and_go(model: Any, gathered_by_fsdp: bool) -> bool:
    return gathered_by_fsdp or any(map(is_dealt_out, model.parameters()))


@contextmanager
def _prepacked(
    model: Any, granted_bytes: int, cast: torch.dtype | None, gathered_by_fsdp: bool
) -> Iterator[PrepackedLinears]:
    """Linear layers of `model` that run by copies, once they are packed; behind the block there are none."""
    if _come_and_go(model, gathered_by_fsdp):
        raise refuse("prepacked_sharded", f"a {type(model).__name__}")
    if cast is not None:
        raise refuse("prepacked_autocast", f"autocast to {cast}")
    prepacked = prepackable(model, granted_bytes)
    with ExitStack() as stack:
        for module, linear in prepacked.by_module.items():
            stack.enter_context(replaced(module, "forward", linear.forward))
        stack.callback(prepacked.release)  # who holds on to the engine holds no copies
        yield prepacked


def _check_model(model: Any, spec: ModelSpec, tp_size: int, gathered_by_fsdp: bool) -> None:
    refuse_all_but_causal_lms(model)
    refuse_unusable_weights(model)
    if tp_size > 1:
        refuse_adapters_under_tp(model)
    check_layers(model, spec.windows)
    _check_heads(model, spec, tp_size, gathered_by_fsdp)
    check_latent_projections(model)


def _entry(outermost: Any, model: Any) -> Any:
    """The module whose call runs `model`, with the hooks that bring its weights."""
    if is_fsdp(model) or not is_fsdp(outermost):
        return model
    if not hasattr(outermost, "peft_config"):
        raise refuse("fsdp_root", f"a {type(outermost).__name__}")
    return outermost


def _replacements(
    module: Any,
    spec: ModelSpec,
    tp_size: int,
    linear: LinearHeads | None,
    unpadded_moe: UnpaddedMoE,
    handed: HandedStep,
) -> Iterator[tuple[str, Any]]:
    """The attributes of a module that are others while the engine runs it, beside its config."""
    heads = spec.heads(tp_size)
    if is_latent_attention(module):
        yield "forward", partial(_latent_forward, module)
    elif linear is not None and is_gated_delta_net(module):
        yield "forward", partial(_linear_forward, module, linear)
        if linear.own != spec.states:
            yield from linear.counts.items()
    elif is_moe_block(module):
        returns_scores = spec.traits.returns_router_scores
        yield "forward", partial(unpadded_moe.forward, module.forward, returns_scores=returns_scores)
    elif "c_attn" in module._modules:
        # GPT-BigCode cuts its fused projection by a size that AutoTP leaves at that of all heads.
        yield "embed_dim", heads.q_heads_per_rank * spec.head_dim
    elif is_attention(module):
        # Where a module counts its heads itself, they are those of this rank.
        own = {"num_heads": heads.q_heads_per_rank, "num_key_value_heads": heads.kv_heads_per_rank}
        yield from ((name, number) for name, number in own.items() if name in vars(module))
        if spec.traits.layers_drop_keywords:
            yield "forward", partial(handed.forward, module.forward)


def _set_modes(training: Mapping[Any, bool]) -> None:
    for module, mode in training.items():
        module.training = mode


def _latent_forward(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    cp_step: RankStep | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    return latent_attention(module, hidden_states, position_embeddings, _wanted(cp_step).step)


def _linear_forward(
    module: Any, heads: LinearHeads, hidden_states: Tensor, cp_step: RankStep | None = None, **_: Any
) -> Tensor:
    step = _wanted(cp_step).step
    assert isinstance(step, EveryLayerOnce), "the runner counts layers"
    return gated_delta_net(module, hidden_states, step, heads)


def _check_heads(model: Any, spec: ModelSpec, tp_size: int, gathered_by_fsdp: bool) -> None:
    """Every projection to heads has as many rows on this rank as its heads take."""
    heads = spec.heads(tp_size)
    q_heads, kv_heads, latent = heads.q_heads_per_rank, heads.kv_heads_per_rank, spec.latent
    per_head = spec.head_dim * (2 if spec.traits.has_query_gates else 1)  # queries and their gates
    rows = {"q_proj": q_heads * per_head, "q_b_proj": q_heads * spec.head_dim}
    if latent is not None:
        rows["kv_b_proj"] = q_heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    else:
        rows["k_proj"] = rows["v_proj"] = kv_heads * spec.head_dim
        rows["c_attn"] = rows["qkv_proj"] = (q_heads + 2 * kv_heads) * spec.head_dim
    for name, module in model.named_modules():
        if is_gated_delta_net(module):  # heads of its own
            continue
        for projection, want in rows.items():
            linear = module._modules.get(projection)
            if linear is None:
                continue
            weight = getattr(linear, "weight", None)
            shape = () if weight is None else shape_in_use(weight, gathered_by_fsdp=gathered_by_fsdp)
            if len(shape) != 2:
                raise refuse("quantized_weights", f"{name}.{projection} is a {type(linear).__name__} with no matrix")
            have = shape[0]
            if have != want:
                raise UserError(
                    f"{name}.{projection} has {have} rows on this rank, {have / spec.head_dim:g} heads; with "
                    f"{spec.num_q_heads} query and {spec.num_kv_heads} KV heads over tp={tp_size} it should have "
                    f"{want}. Call expand_kv_heads before sharding when tp exceeds the KV heads, and check tp_size."
                )
