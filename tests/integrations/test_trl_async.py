"""TRL's AsyncGRPO trainer, its worker and its client unmodified, by the weights that it trains.

They need a GPU with FlashAttention-3, and vLLM's side of a transfer: tests/stand_ins has both for this machine.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from cpinfer.errors import UserError
from cpinfer_integrations.trl_async import answering
from launching import BIN, ROOT, free_port, launch

WORKER = "tests/integrations/async_grpo_worker.py"

pytestmark = pytest.mark.timeout(240)


def trained(folder: Path, num_steps: int, sender: str) -> dict[str, Any]:
    path = f"{ROOT / 'tests' / 'stand_ins'}:{ROOT / 'tests'}"
    command = [str(BIN / "python"), WORKER, str(folder), str(free_port()), str(num_steps), sender]
    finished = launch(command, 220, {"PYTHONPATH": path, "TRL_EXPERIMENTAL_SILENCE": "1"})
    assert finished.returncode == 0, finished
    assert "did not exit" not in finished.stderr, finished  # the worker's last requests are answered, too
    found: dict[str, Any] = finished.summary
    assert found["model_version"] == num_steps + 1
    assert all(step["rollout/vllm_retry_total"] is None for step in found["steps"])
    first = found["steps"][0]  # whose samples are of the policy itself
    assert first["sample/staleness_max"] == 0
    assert first["ratio"] == pytest.approx(1, abs=1e-5) and first["kl"] == pytest.approx(0, abs=1e-6)
    return found


@pytest.mark.slow
def test_steps_by_shared_weights(tmp_path: Path) -> None:
    found = trained(tmp_path, 2, "shared")
    assert len(found["steps"]) == 2 and found["num_transfers"] == 0
    assert found["steps"][0]["tools/call_frequency"] > 0


@pytest.mark.slow
def test_it_learns_with_its_own_client_of_vllm(tmp_path: Path) -> None:
    found = trained(tmp_path, 12, "default")
    rewards = [step["reward"] for step in found["steps"]]
    assert sum(rewards[:3]) / 3 < 0.75 and sum(rewards[-3:]) / 3 > 0.9
    assert found["num_transfers"] == 13


def test_a_job_of_many_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="2 processes; 1 was wanted"), answering(SimpleNamespace()):
        pass
