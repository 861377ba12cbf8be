"""What several parity tests start from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cpinfer.attention.backends.base import AttentionNeeds
from cpinfer.attention.backends.flashinfer.backend import FlashInferBackend
from fake_flashinfer import checked_backend, fake_flashinfer


@pytest.fixture
def on_flashinfer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[AttentionNeeds]]:
    """Engines made after it is called take FlashInfer, and check it; what each needed is in the list it gives."""

    def take(version: str) -> list[AttentionNeeds]:
        asked: list[AttentionNeeds] = []

        def made(name: str, device: torch.device, needs: AttentionNeeds) -> FlashInferBackend:
            asked.append(needs)
            return checked_backend(device, needs, fake_flashinfer(version))

        monkeypatch.setattr("cpinfer.engine.needs.make_backend", made)
        return asked

    return take
