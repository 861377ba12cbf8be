"""A GRPO run with TRL: its trainer, with rollouts by cpinfer or by Transformers, and a line for every step."""

from __future__ import annotations

import io
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from cpinfer.colocate.mismatch import Mismatch
from cpinfer.comm.bootstrap import Launch
from cpinfer.models.invariant_training import invariant_training
from cpinfer.models.loading import fresh_model, load_model
from cpinfer_integrations.trl import PhaseRecord, make_rollout_func
from cpinfer_tools.grpo.rewards import Reward
from cpinfer_tools.progress import loading
from cpinfer_tools.run_config import RunConfig

Line = dict[str, Any]
# What of TRL's log goes into a line, under our names.
_FROM_LOG = {
    "reward": "reward",
    "reward_std": "reward_std",
    "loss": "loss",
    "entropy": "entropy",
    "kl": "kl",
    "completions/mean_length": "completion_tokens_mean",
    "step_time": "step_s",
}


@dataclass
class Trained:
    """What a run leaves behind: a line for every optimiser step, and the phases where cpinfer generated."""

    lines: list[Line] = field(default_factory=list)
    phases: list[PhaseRecord] = field(default_factory=list)

    @property
    def mismatch(self) -> Mismatch:
        """Of all tokens of all phases that were measured."""
        return Mismatch.merge(phase.mismatch for phase in self.phases if phase.mismatch is not None)


def train(
    config: RunConfig,
    prompts: Sequence[Mapping[str, Any]],
    reward: Reward,
    tokenizer: Any,
    folder: Path,
    device: torch.device,
    on_step: Callable[[Line], None],
) -> Trained:
    """Train by `config.training`; `on_step` sees each line as it comes. Collective over all ranks.

    `prompts` are rows of a TRL dataset: `prompt`, a text or a chat, and whatever the reward wants to know of it. The
    default process group must exist where there are several ranks.
    """
    training = config.training
    set_seed(training.seed)
    # TRL tells the hub which trainer runs on what; nothing leaves the machine that the config does not send.
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    if training.zero_stage is not None:
        from cpinfer_integrations.deepspeed import init_distributed

        init_distributed()
    warnings.simplefilter("ignore", FutureWarning)  # what TRL and Transformers still call of each other's old names
    path = _initial_weights(config, folder)
    arguments = _arguments(config, folder, device)
    # After the arguments: under ZeRO-3 Transformers then deals the weights out while it loads them.
    named = f"{'random weights of ' if path is None else ''}{path or config.model} in {config.dtype}"
    with loading("train_grpo", named, shown=not dist.is_initialized() or dist.get_rank() == 0) as loaded:
        dtype = _dtype(config)
        if path is None:
            model = fresh_model(str(config.model), dtype)
        else:
            model = load_model(path, dtype, on_read=loaded.on_read)
    rollouts = make_rollout_func(config) if training.generator == "cpinfer" else None
    with (
        redirect_stdout(io.StringIO()),  # DeepSpeed and TRL print on every rank what nobody asked for
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=[reward],
            args=arguments,
            train_dataset=Dataset.from_list([dict(row) for row in prompts]),
            processing_class=tokenizer,
            rollout_func=rollouts,
            peft_config=_adapter(training.lora_rank),
        )
    trained = Trained(phases=[] if rollouts is None else rollouts.records)
    clock = _Clock(trainer._generate)
    trainer._generate = clock  # both generators are timed where TRL calls them

    def on_log(step: int, logs: Mapping[str, Any]) -> None:
        line = _line(step, logs, clock.seconds[-1], trained.phases)
        trained.lines.append(line)
        on_step(line)

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_OnLog(on_log))
    # What is sampled deterministically is trained by a forward of the same bits.
    is_exact = config.deterministic and rollouts is not None
    try:
        with invariant_training(trainer.model, config) if is_exact else nullcontext():
            trainer.train()
    finally:
        if rollouts is not None:
            rollouts.close()
    trainer.accelerator.free_memory()
    return trained


class _Clock:
    """A call, with the seconds that each took."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.seconds: list[float] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start_s = time.perf_counter()
        result = self._call(*args, **kwargs)
        self.seconds.append(time.perf_counter() - start_s)
        return result


class _OnLog(TrainerCallback):  # type: ignore[misc]
    """Hands the log of each step on."""

    def __init__(self, on_log: Callable[[int, Mapping[str, Any]], None]) -> None:
        self._on_log = on_log

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if logs is not None and "reward" in logs:  # not the totals at the end
            self._on_log(state.global_step, logs)


def _line(step: int, logs: Mapping[str, Any], generate_s: float, phases: Sequence[PhaseRecord]) -> Line:
    line: Line = {"step": step, **{name: float(logs[key]) for key, name in _FROM_LOG.items() if key in logs}}
    if not phases:
        return {**line, "rollout_s": generate_s}
    phase = phases[-1]
    # Measuring the mismatch is no part of a rollout: who does not want to know it sets mismatch_every to 0.
    return {**line, "rollout_s": generate_s - phase.mismatch_s, **phase.metrics()}


def _arguments(config: RunConfig, folder: Path, device: torch.device) -> GRPOConfig:
    training, sampling = config.training, config.sampling
    deepspeed = None
    if training.zero_stage is not None:
        deepspeed = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": training.zero_stage},
            "bf16": {"enabled": "auto"},
            # torch's AdamW: DeepSpeed's own for CPU would have to be compiled first.
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }
    on_cpu = device.type == "cpu"
    return GRPOConfig(
        output_dir=str(folder),
        use_cpu=on_cpu,
        # Named without a process group, a backend makes Accelerate look for one.
        ddp_backend="gloo" if on_cpu and dist.is_initialized() else None,
        deepspeed=deepspeed,
        bf16=config.dtype == "bfloat16",
        fp16=config.dtype == "float16",
        seed=training.seed,
        max_steps=training.num_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=training.batch_size,
        num_generations=training.num_generations,
        max_completion_length=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p or None,
        repetition_penalty=sampling.repetition_penalty,
        beta=training.kl_coef,
        entropy_coef=training.entropy_coef,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def _initial_weights(config: RunConfig, folder: Path) -> str | None:
    """Where the weights lie that training begins with; None for random ones that need not lie anywhere. Collective.

    TRL loads the reference model of a KL term from the path that the policy's config names. The first process of each
    node writes them, before DeepSpeed knows of a model that it would deal out.
    """
    training = config.training
    if not training.fresh_weights:
        return str(config.model)
    if training.kl_coef == 0 or training.lora_rank > 0:  # an adapter's reference is the model without it
        return None
    path = folder / "initial"
    if Launch.from_environ(os.environ).local_rank == 0:
        fresh_model(str(config.model), _dtype(config)).save_pretrained(path)
    if dist.is_initialized():
        dist.barrier()
    return str(path)


def _adapter(rank: int) -> Any | None:
    if rank == 0:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _dtype(config: RunConfig) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype
