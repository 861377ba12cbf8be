"""What the routers of a whole model choose, under Transformers alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cpinfer.engine.request import RolloutResult
from cpinfer.kv_cache.expert_record import Experts


@torch.no_grad()
def experts_of(model: Any, token_ids: list[int]) -> Experts:
    """`[tokens, layers, experts]`: what its routers give for a sequence, in one forward."""
    found: list[torch.Tensor] = []
    routers = [module for name, module in model.named_modules() if name.endswith((".gate", ".router"))]
    handles = [router.register_forward_hook(lambda *hooked: found.append(hooked[-1][2])) for router in routers]
    model(torch.tensor([token_ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(found, dim=1).numpy()


def num_other_experts(model: Any, result: RolloutResult) -> int:
    """Tokens of a result whose experts are others."""
    experts, wanted = result.routed_experts, experts_of(model, [*result.prompt_token_ids, *result.token_ids][:-1])
    assert experts is not None and experts.dtype == np.int16 and experts.shape == wanted.shape
    return int((experts != wanted).any(axis=(1, 2)).sum())
