"""The trainer's side of a transfer to which nobody listens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass
class NCCLTrainerSendWeightsArgs:
    group: Any
    packed: bool


@dataclass
class _Group:
    store: Any = None
    socket: Any = None


class NCCLWeightTransferEngine:
    num_transfers: ClassVar[int] = 0

    @staticmethod
    def trainer_init(init_info: dict[str, Any]) -> Any:
        opened = _Group()
        opened.group = _Group()
        return opened

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: NCCLTrainerSendWeightsArgs) -> None:
        for _ in iterator:
            pass
        NCCLWeightTransferEngine.num_transfers += 1
