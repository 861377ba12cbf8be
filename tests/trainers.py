"""Small training jobs of every kind that lends its model, and what must not change of them in a rollout phase."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from cpinfer.models.decoder_layers import decoder_layers
from tiny_models import FAMILIES, make_model

BATCH = (1, 24)


@dataclass
class Trainer:
    """One job: `trained` is what its loop calls forward on; `whole` makes all its parameters whole for a block.

    `family`: that of tests/tiny_models.py whose model it trains.
    """

    trained: Any
    module: Any
    optimizer: Any
    backward: Callable[[torch.Tensor], Any]
    step: Callable[[], Any]
    whole: Callable[[], AbstractContextManager[Any]] = nullcontext
    family: str = "qwen2"

    def micro_step(self) -> float:
        """One forward and backward, on tokens from the global random numbers. The loss."""
        ids = torch.randint(0, 128, BATCH)
        loss = self.trained(input_ids=ids, labels=ids, use_cache=False).loss
        self.backward(loss)
        return float(loss.detach())

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of the whole weights."""
        with self.whole(), torch.random.fork_rng(devices=[]):
            shapes = {name: x.shape for name, x in make_model(FAMILIES[self.family]).named_parameters()}
            return {name: whole_tensor(x, shapes[name]) for name, x in self.module.named_parameters()}


def whole_tensor(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A copy of a weight with all that FSDP or tensor parallelism keeps of it elsewhere."""
    if hasattr(x, "full_tensor"):
        return x.full_tensor().detach().clone()
    x = x.detach().contiguous()
    if x.shape == shape:
        return x.clone()
    from deepspeed.utils import groups

    tp_group = groups.get_tensor_model_parallel_group()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(tp_group))]
    dist.all_gather(parts, x, group=tp_group)
    return torch.cat(parts, dim=next(dim for dim, size in enumerate(x.shape) if size != shape[dim]))


def deepspeed_trainer(stage: int, model: Any = None, autotp: int = 1, micro_steps: int = 2) -> Trainer:
    import deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        "zero_optimization": {
            "stage": stage,
            # Small enough for tiny models: norms are kept whole, all else is sharded.
            "stage3_param_persistence_threshold": 100,
            "stage3_prefetch_bucket_size": 20000,
        },
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
    }
    if autotp > 1:
        config["tensor_parallel"] = {"autotp_size": autotp}
    engine, optimizer, *_ = deepspeed.initialize(
        model=make_model(FAMILIES["qwen2"]) if model is None else model, config=config
    )
    engine.train()

    def whole() -> AbstractContextManager[Any]:
        if stage < 3:
            return nullcontext()
        dealt_out = [p for p in engine.module.parameters() if p.ds_status.name == "NOT_AVAILABLE"]
        return deepspeed.zero.GatheredParameters(dealt_out)

    return Trainer(engine, engine.module, optimizer, engine.backward, engine.step, whole)


def torch_trainer(trained: Any, module: Any, optimizer: Any = None) -> Trainer:
    """DDP, FSDP2, or a bare model, with Adam on its parameters, which steps every other time."""
    optimizer = optimizer or torch.optim.Adam(trained.parameters(), lr=1e-2)
    trained.train()
    calls: list[int] = []

    def step() -> None:
        calls.append(1)
        if len(calls) % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()

    return Trainer(trained, module, optimizer, lambda loss: loss.backward(), step)


def accelerate_trainer(wrapper: str, mixed_precision: str, model: Any = None) -> Trainer:
    """What `Accelerator.prepare` makes of a model: `wrapper` is "ddp" or "fsdp2".

    On CPU Accelerate takes an FSDP plugin and makes DDP, without a word, so it is told that this is an FSDP job.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    model = make_model(FAMILIES["qwen2"]) if model is None else model
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=mixed_precision)
    if wrapper == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=sorted({type(layer).__name__ for layer in decoder_layers(model)}),
        )
        if mixed_precision != "no":
            plugin.set_mixed_precision(mixed_precision)
        AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    trained, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-2))
    trainer = torch_trainer(trained, accelerator.unwrap_model(trained), optimizer)
    trainer.backward = accelerator.backward
    return trainer


def photograph(trainer: Trainer) -> dict[str, Any]:
    """Everything of a job that a phase could change, as far as it can be seen from outside."""
    modules = dict(trainer.module.named_modules())
    return {
        "rng": torch.get_rng_state(),
        "modules": {name: (id(m), type(m), m.training) for name, m in modules.items()},
        "attributes": {
            name: {key: id(value) for key, value in vars(m).items() if not key.startswith("_") and key != "training"}
            for name, m in modules.items()
        },
        "hooks": {
            (name, kind): (id(getattr(m, kind)), [(key, id(hook)) for key, hook in getattr(m, kind).items()])
            for name, m in modules.items()
            for kind in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
        },
        "parameters": {
            name: (id(x), local(x).data_ptr(), x.requires_grad, str(getattr(x, "ds_status", "")))
            for name, x in trainer.module.named_parameters()
        },
        "values": {name: local(x).detach().clone() for name, x in trainer.module.named_parameters()},
        "partitions": {
            name: x.ds_tensor.clone() for name, x in trainer.module.named_parameters() if hasattr(x, "ds_tensor")
        },
        "gradients": {
            name: local(x.grad).clone() for name, x in trainer.module.named_parameters() if x.grad is not None
        },
        "optimizer": list(_tensors(_state_of(trainer.optimizer))),
        "coordinator": _coordinator_of(trainer.trained),
        "attention": trainer.module.config._attn_implementation,
        "config": copy.deepcopy(trainer.module.config.to_dict()),
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs, by name."""
    return [key for key in before if not _same(before[key], after[key])]


def local(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def _coordinator_of(trained: Any) -> dict[str, Any]:
    """What ZeRO-3 has written down of the order in which modules run, and where in it it is."""
    offload = getattr(getattr(trained, "optimizer", None), "parameter_offload", None)
    if offload is None:
        return {}
    state = vars(offload.get_param_coordinator())
    return {
        key: value if isinstance(value, (int, str)) else (id(value), len(value) if hasattr(value, "__len__") else None)
        for key, value in state.items()
    }


def _state_of(optimizer: Any) -> Any:
    inner = getattr(optimizer, "optimizer", optimizer)
    return [list(inner.state.values()), [group["params"] for group in inner.param_groups]]


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield local(tree).detach().clone()
    elif isinstance(tree, dict):
        for key in sorted(tree, key=str):
            yield from _tensors(tree[key])
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def everywhere(found: Any) -> list[Any]:
    """What every rank has found."""
    all_found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_found, found)
    return all_found
