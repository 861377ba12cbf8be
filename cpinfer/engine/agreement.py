"""How replicated schedulers stay alike: after each step, one gather of what was sampled, from the ranks that sampled.

Every rank sends a record per row it computed; of the copies on tp ranks, the first is the authority. A rank whose
logits are not numbers says so in the record, and all ranks raise the same error instead of drifting apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cpinfer.comm.axis import AxisComm
from cpinfer.engine.request import SampledToken
from cpinfer.errors import EngineFaultError

_OK, _FAULT = 0, 1
_TOKEN, _LOGPROB, _PROCESSED, _STATUS, _WIDTH = range(5)


def agree_on_tokens(
    replica: AxisComm,
    tp_size: int,
    places: Sequence[tuple[int, int]],
    own: Sequence[SampledToken | None],
    device: torch.device,
) -> list[SampledToken]:
    """The tokens of a step, the same on every rank; none when the step samples none.

    `places[i]` is (pcp rank, row there) that computed token i; `own` are this rank's rows, None where its logits were
    not finite. EngineFaultError, on every rank, when any rank reports such a row.
    """
    if not places:  # as every rank knows: chunks of prompts that go on in another step
        return []
    num_rows = max(row for _, row in places) + 1
    record = torch.zeros(num_rows, _WIDTH, dtype=torch.int32)
    for row, token in enumerate(own):
        if token is None:
            record[row, _STATUS] = _FAULT
        else:
            record[row, _TOKEN] = token.token_id
            logprobs = torch.tensor([token.logprob, token.processed_logprob], dtype=torch.float32)
            record[row, _LOGPROB : _PROCESSED + 1] = logprobs.view(torch.int32)
    records = replica.all_gather(record.to(device)).cpu()
    faults = (records[..., _STATUS] == _FAULT).any(dim=1).nonzero().flatten().tolist()
    if faults:
        raise EngineFaultError(
            f"logits are not finite on rank(s) {faults} of the replica; check the model's weights and dtype"
        )
    tokens = records[..., _TOKEN].tolist()
    both = records[..., _LOGPROB : _PROCESSED + 1].contiguous().view(torch.float32).tolist()
    return [SampledToken(tokens[p * tp_size][row], *both[p * tp_size][row]) for p, row in places]


def smallest(replica: AxisComm, value: int, device: torch.device) -> int:
    """The smallest `value` of all ranks: what they can all afford."""
    return int(replica.all_gather(torch.tensor([value], device=device)).min())
