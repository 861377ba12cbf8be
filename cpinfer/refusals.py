"""The one table of what is refused, by name. docs/reference/refusals.md is printed from it (`make docs`).

A feature that lands takes its row away; everything else in the package asks this table for its words.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpinfer.errors import UnsupportedError


@dataclass(frozen=True)
class Refusal:
    """One unsupported thing: `what` it is, and what to do `instead`."""

    what: str
    instead: str


REFUSALS: dict[str, Refusal] = {
    "speculative_decoding": Refusal("speculative decoding", "Remove the key; decoding is one token per step."),
    "pipeline_parallel": Refusal("pipeline parallelism", "Use tensor and context parallelism: tp x pcp x dp."),
    "multimodal": Refusal("multimodal models", "Load the text model alone."),
    "recurrent": Refusal(
        "recurrent and hybrid models (state instead of KV) but those of the table of families",
        "Use one of the table, or a model with softmax attention only.",
    ),
    "encoder_decoder": Refusal("encoder-decoder models", "Use a decoder-only causal LM."),
    "quantized_weights": Refusal(
        "quantized weights in a model that is loaded",
        "Load it with cpinfer.models.loading.load_model, which dequantizes fp8 and mxfp4; or call model.dequantize() "
        "where its method has that (bitsandbytes); or load the checkpoint that it was made from.",
    ),
    "quantized_checkpoint": Refusal(
        "checkpoints quantized otherwise than by fp8 or mxfp4, which are dequantized as they load",
        "Take the checkpoint that it was made from. Or, where Transformers can dequantize the method (bitsandbytes), "
        "convert it: from_pretrained(...).dequantize().save_pretrained(...).",
    ),
    "device_map": Refusal(
        "weights on several devices of a rank, or offloaded (device_map)",
        "Load the model without device_map and move it to one device.",
    ),
    "family": Refusal(
        "model families without a row in the table of families",
        "Use one of those in the table, or add a row (docs/extending/family.md).",
    ),
    "other_name": Refusal(
        "families under a model_type of their own that are one of the table",
        "Set model_type in its config.json to that one, and take out auto_map.",
    ),
    "remote_code": Refusal(
        "models that bring code of their own (auto_map)",
        "Such code is never run; use one of those in the table of families.",
    ),
    "layer_type": Refusal("attention other than full and sliding-window (chunked, ...)", "Use another model."),
    "bidirectional": Refusal("bidirectional attention", "Set use_bidirectional_attention to false."),
    "length_dependent_rope": Refusal(
        "RoPE whose frequencies depend on the longest position of a step (longrope; dynamic beyond the config's "
        "max_position_embeddings)",
        "Set another rope_type, or stay within max_position_embeddings.",
    ),
    "transformers_tp": Refusal(
        "tensor parallelism by Transformers where its plan leaves attention unsharded",
        'Set tensor_parallel.provider to "autotp".',
    ),
    "transformers_tp_copies": Refusal(
        "tensor parallelism by Transformers over more ranks than KV heads",
        'Set tensor_parallel.provider to "autotp", or a smaller tp_size.',
    ),
    "family_tp": Refusal(
        "tensor parallelism of families whose code, or whose plan, cannot be cut over ranks",
        "Use tp_size 1, and pcp and dcp instead.",
    ),
    "fused_heads": Refusal(
        "tensor parallelism of GPT-BigCode without multi_query (its heads are fused one by one)", "Use tp_size 1."
    ),
    "latent_adapter": Refusal(
        "adapters on kv_b_proj of latent attention (its weight is used without calling it)",
        "Merge the adapter into the weight, or leave this projection out of it.",
    ),
    "prepacked_device": Refusal(
        "prepacked weights on other devices than CPU, without oneDNN, or in bfloat16 where it has no such products",
        "Leave out prepacked_weights_gib.",
    ),
    "prepacked_sharded": Refusal(
        "prepacked weights of a model whose weights are sharded (they come and go while it runs)",
        'Leave out prepacked_weights_gib, or set rollout.gather to "full".',
    ),
    "prepacked_autocast": Refusal(
        "prepacked weights under autocast (it multiplies in another dtype)", "Leave out prepacked_weights_gib."
    ),
    "deterministic_device": Refusal(
        "deterministic mode on other devices than CPU and CUDA", "Leave out deterministic."
    ),
    "deterministic_triton": Refusal(
        "deterministic mode on CUDA without Triton (its kernels are written in it)",
        "Install triton, or leave out deterministic.",
    ),
    "deterministic_capability": Refusal(
        "deterministic mode on GPUs before Ampere (compute capability 8.0)", "Leave out deterministic."
    ),
    "invariant_device": Refusal("invariant training on other devices than CPU", "Leave out invariant_training."),
    "deterministic_tp": Refusal(
        "deterministic mode over more than two tensor-parallel ranks (an all-reduce of more adds them in an order that "
        "depends on where in the message a number stands)",
        "Use tp_size 1 or 2, and pcp and dcp for the other ranks.",
    ),
    "cpu_backend_device": Refusal(
        "the CPU kernel on other devices", 'Set backend to "auto": it takes what is made for the device.'
    ),
    "cpu_backend_dtype": Refusal(
        "the CPU kernel in float64 (it sums in float32)", 'Set backend to "torch", or dtype to "float32".'
    ),
    "routed_experts": Refusal(
        "sampling.routed_experts of models whose experts are not called with the numbers of those that rows go through",
        "Leave routed_experts out.",
    ),
    "flashinfer_device": Refusal("FlashInfer on other devices than CUDA", 'Set backend to "torch", or "auto".'),
    "flashinfer_dtype": Refusal(
        "FlashInfer in float32 (its kernels take half precision)", 'Set backend to "torch", or dtype to "bfloat16".'
    ),
    "flashinfer_capability": Refusal(
        "FlashInfer on GPUs before Turing, and in bfloat16 before Ampere",
        'Set backend to "torch", or dtype to "float16" on Turing.',
    ),
    "flashinfer_head_dim": Refusal(
        "FlashInfer with head dims other than 64, 128, 256 and DeepSeek's", 'Set backend to "torch", or "auto".'
    ),
    "flashinfer_fp8_latents": Refusal(
        "FlashInfer over latents in fp8, but for e4m3 under bfloat16 on Hopper",
        'Set backend to "torch", or kv_cache_dtype to "auto".',
    ),
    "flashinfer_family": Refusal(
        "kernel families that return no lse or read no page table (trtllm-gen, cudnn, cutlass, cute-dsl)",
        'Set backend to "flashinfer": it takes its FlashAttention kernels.',
    ),
    "adapter_outside_modules": Refusal(
        "adapters that do not sit in the modules they change (prompt learning, X-LoRA, activated LoRA, ...)",
        "Use LoRA or another kind that changes single modules.",
    ),
    "adapter_tp": Refusal(
        "adapters under tensor parallelism (its slices of weights are not those of adapters)",
        "Use tp_size 1, or merge the adapter into the weights.",
    ),
    "lent_tp": Refusal(
        'rollout.gather "tp_shards" for families whose heads are not projected by q_proj, k_proj, v_proj and o_proj',
        'Use "full" or "layerwise".',
    ),
    "layerwise_replicas": Refusal(
        'rollout.gather "layerwise" with several replicas of the model (they would take different steps, and all ranks '
        "gather together)",
        'Lend all data-parallel ranks to one replica (prefill_context_parallel_size), or use "full".',
    ),
    "tp_shards_owner": Refusal(
        'rollout.gather "tp_shards" for weights that are not sharded by ZeRO-3 alone', 'Use "full" or "layerwise".'
    ),
    "engine_autocast": Refusal(
        "DeepSpeed's torch_autocast (it is around the engine's forward, not the model's)",
        "Use DeepSpeed's \"bf16\", or Accelerate's mixed_precision.",
    ),
    "deepspeed_shared_memory": Refusal(
        "tensor parallelism of fewer ranks than the job has beside DeepSpeed's sums in shared memory "
        "(deepspeed_shm_comm, for CPU: they add up what all ranks of the job have, whatever the group, and hang where "
        "one is not there)",
        'Set deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False before deepspeed.init_distributed.',
    ),
    "deepspeed_continuous_batch_size": Refusal(
        "continuous_batch_size in DeepSpeed's SamplingConfig (the batching of its HybridEngineRollout)",
        "Leave it None: batching is continuous anyway, of at most max_num_seqs requests of cpinfer's config.",
    ),
    "fsdp1": Refusal("FSDP1 (FullyShardedDataParallel)", "Use FSDP2: fully_shard, or fsdp_version 2 under Accelerate."),
    "fsdp_root": Refusal(
        "FSDP2 whose outermost fully_shard was called on a wrapper that is no PeftModel",
        "Call fully_shard on the causal LM, its layers, or the PeftModel.",
    ),
    "fsdp_tp": Refusal("FSDP2 together with tensor parallelism", "Use FSDP2 alone, or tensor parallelism with DDP."),
    "trl_vllm": Refusal(
        "TRL's vLLM beside its own rollouts (use_vllm, vllm_structured_outputs_regex)",
        "Leave both out of GRPOConfig: cpinfer generates.",
    ),
    "trl_transformers_generation": Refusal(
        "GRPOConfig's options of Transformers' generation (generation_kwargs, cache_implementation, "
        "use_transformers_continuous_batching)",
        "Leave them out, and put what cpinfer knows of them under `sampling` of its config.",
    ),
    "trl_tools": Refusal(
        "tools and environments of a GRPOTrainer with a rollout_func (TRL asks for later turns past it)",
        "Leave rollout_func out, and make the trainer by cpinfer_integrations.trl.with_cpinfer(GRPOTrainer, config).",
    ),
    "trl_environment_copies": Refusal(
        "environments of a GRPOTrainer whose ranks train on the same data (tensor parallelism of its own)",
        "Train with data-parallel ranks alone, or use tools, which have no state that rewards read.",
    ),
    "trl_mask_truncated": Refusal(
        "TRL's mask_truncated_completions with answers that end otherwise than by an end-of-text token",
        "Set it to False, or end answers by tokens that the model's generation_config has as eos_token_id.",
    ),
    "state_deterministic": Refusal(
        "deterministic mode with linear attention (nobody has shown yet that its states have equal bits)",
        "Leave out deterministic.",
    ),
    "invariant_states": Refusal(
        "invariant training of linear attention (rollouts go on from states, training from the first token)",
        "Leave invariant_training out for such models.",
    ),
    "state_cuda_graphs": Refusal("CUDA graphs with linear attention", "Leave out cuda_graphs."),
    "state_replicas": Refusal(
        'decode_exchange "replicate_q" with linear attention (the state of a sequence lies on one rank)', 'Use "a2a".'
    ),
    "replicate_q": Refusal('decode_exchange "replicate_q" where dcp > pcp', 'Use "a2a", or a dcp of at most pcp.'),
}


def refuse(key: str, found: str) -> UnsupportedError:
    """The error to raise for row `key` of the table; `found` says where it was met."""
    refusal = REFUSALS[key]
    return UnsupportedError(f"{found}: cpinfer does not support {refusal.what} yet. {refusal.instead}")


def not_yet_table() -> str:
    """The table of docs/reference/refusals.md, in Markdown."""
    rows = [f"| {r.what} | {r.instead} |" for r in REFUSALS.values()]
    return "\n".join(["| refused | instead |", "|---|---|", *rows])
