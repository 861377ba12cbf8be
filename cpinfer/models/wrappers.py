"""What may stand around a causal LM: torch.compile, DDP, adapters (PEFT), a value head. Inside is the model that runs.

Known by what the objects have, so that nothing of their libraries is imported.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import nn

from cpinfer.errors import UserError
from cpinfer.models.adapters import refuse_adapters_outside_modules
from cpinfer.refusals import refuse

_REPLICATED = frozenset(("DistributedDataParallel", "DataParallel"))
_ENGINE = "DeepSpeedEngine"


def unwrapped(model: Any) -> Any:
    """The Hugging Face model inside whatever wraps it, its adapters in place; any other object as it is.

    UnsupportedError for FSDP1, and for adapters that do not act in the modules they change.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def without_replication(model: Any) -> Any:
    """`model` without torch.compile and DDP around it: what is left computes the same in eager mode on this rank."""
    while (inner := _compiled_or_replicated(model)) is not None:
        model = inner
    return model


def without_engine(model: Any) -> Any:
    """The module that DeepSpeed's training engine holds; any other object as it is.

    Not for engines of ours: who attaches to a module says so, since the engine's own forward is then not to be called.
    """
    return model._modules["module"] if _ENGINE in _class_names(model) else model


def refuse_all_but_models(model: Any, who: str) -> None:
    """UserError when `model` is no Hugging Face model, nor known to be around one; it names one that is inside.

    `who`: what was given it.
    """
    if is_hugging_face(unwrapped(model)):
        return
    given = f"{who} was given a {type(model).__name__}; a Hugging Face model was wanted. "
    if isinstance(model, (str, PathLike)):
        raise UserError(f"{given}Load it first, with AutoModelForCausalLM.from_pretrained.")
    if isinstance(model, (tuple, list)):
        raise UserError(f"{given}Pass the model of it alone, as of what deepspeed.initialize or prepare returns.")
    named = model.named_modules() if isinstance(model, nn.Module) else ()
    name = next((name for name, module in named if is_hugging_face(module)), None)
    if name is None:
        raise UserError(f"{given}Of a framework's engine pass its .module.")
    raise UserError(f"{given}There is one in it, as .{name}: pass that.")


def is_hugging_face(model: Any) -> bool:
    """Whether it has the config of a Hugging Face model."""
    return hasattr(getattr(model, "config", None), "to_dict")


def refuse_all_but_causal_lms(model: Any) -> None:
    """UserError when a Hugging Face model gives no logits over its vocabulary."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or getattr(model, "base_model_prefix", None) not in getattr(model, "_modules", ()):
        raise UserError(
            f"attach was given a {type(model).__name__}, which has no logits over the vocabulary; a causal LM was "
            "wanted. Load it with AutoModelForCausalLM, or pass the causal LM that is inside it or around it."
        )


def _inside(model: Any) -> Any | None:
    """What `model` wraps, None when it wraps nothing."""
    if "FullyShardedDataParallel" in _class_names(model):
        raise refuse("fsdp1", f"a {type(model).__name__}")
    inner = _compiled_or_replicated(model)
    return _adapted(model) if inner is None else inner


def _compiled_or_replicated(model: Any) -> Any | None:
    children = getattr(model, "_modules", {})
    if "_orig_mod" in children:
        return children["_orig_mod"]
    return children.get("module") if _class_names(model) & _REPLICATED else None


def _adapted(model: Any) -> Any | None:
    """What adapters or a value head were put around."""
    children = getattr(model, "_modules", {})
    if "pretrained_model" in children:
        return children["pretrained_model"]
    adapters = getattr(model, "peft_config", None)
    if adapters is None:
        return None
    refuse_adapters_outside_modules(adapters)
    # A PeftModel holds a tuner, and that the model. Where adapters were loaded without PeftModel there is none.
    return getattr(children.get("base_model"), "_modules", {}).get("model")


def _class_names(model: Any) -> set[str]:
    return {cls.__name__ for cls in type(model).__mro__}
