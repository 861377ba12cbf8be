"""Accelerate jobs, on both routes that work on CPU: their mesh, groups and weights are used as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from cpinfer.layout.grid import RankGrid
from cpinfer_integrations.accelerate import topology_from, topology_from_mesh
from launching import Finished, accelerate, forked, launch

WORKER = "tests/integrations/accelerate_worker.py"
MULTI_CPU = ("--multi_gpu",)
DEEPSPEED = ("--use_deepspeed", "--zero_stage", "0")


def check(grids: dict[str, list[int]], folder: Path, num_ranks: int = 2, route: Sequence[str] = MULTI_CPU) -> None:
    command = accelerate(num_ranks, WORKER, str(folder), *grids, route=route)
    env = {"ACCELERATE_USE_CPU": "true"} if route == MULTI_CPU else {}
    check_outcomes(launch(command, timeout_s=90, env=env), grids, num_ranks)


def check_outcomes(finished: Finished, grids: dict[str, list[int]], num_ranks: int = 2) -> None:
    assert finished.returncode == 0, finished
    assert finished.summary["num_processes"] == num_ranks, finished
    outcomes: list[dict[str, Any]] = finished.summary["outcomes"]
    assert {outcome["kind"]: outcome["grid"] for outcome in outcomes} == grids
    for outcome in outcomes:
        assert all(outcome["same_tokens"]), outcome
        assert outcome["weights_untouched"] and outcome["modes_restored"], outcome
        assert outcome["hooks_untouched"] and outcome["attention_restored"], outcome
        assert outcome["tp_group_is_the_meshs"], outcome
        # Every axis runs on a group of the mesh or on the job's own, so there is nothing to create.
        assert outcome["created"] == [], outcome


def test_a_multi_cpu_job_lends_its_ranks_and_a_mesh_its_axes(tmp_path: Path) -> None:
    check({"plain": [1, 2, 2, 1], "mesh:cp=2": [1, 2, 2, 1], "mesh:tp=2": [2, 1, 1, 1]}, tmp_path)


OF_DEEPSPEED = [("deepspeed:cp=2", [1, 2, 2, 1]), ("deepspeed:tp=2", [2, 1, 1, 1])]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "grid"), OF_DEEPSPEED)
def test_a_deepspeed_job_is_used_by_its_accelerators_mesh(kind: str, grid: list[int], tmp_path: Path) -> None:
    check({kind: grid}, tmp_path, route=DEEPSPEED)


def test_ranks_with_the_environment_of_a_deepspeed_job_are_used_by_their_accelerators_mesh(tmp_path: Path) -> None:
    """What `accelerate launch --use_deepspeed --zero_stage 0` tells its processes."""
    env = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}
    for kind, grid in OF_DEEPSPEED:
        finished = forked(2, WORKER, str(tmp_path), kind, timeout_s=90, env=env)
        check_outcomes(finished, {kind: grid})


@pytest.mark.slow
def test_data_parallel_ranks_of_a_mesh_are_lent_and_with_cp_stay_replicas(tmp_path: Path) -> None:
    grids = {"mesh:dp_shard=2,tp=2": [2, 2, 2, 1], "mesh:dp_shard=2,cp=2": [1, 2, 2, 2]}
    check(grids, tmp_path, num_ranks=4)


def test_one_process_needs_no_groups() -> None:
    topology = topology_from(Accelerator())
    assert topology.grid == RankGrid() and topology.owned_groups == ()


def accelerator_with(num_processes: int = 1, **deepspeed_config: Any) -> Any:
    plugin = SimpleNamespace(deepspeed_config=deepspeed_config)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    return SimpleNamespace(state=state, torch_device_mesh=None, num_processes=num_processes)


def test_deepspeeds_own_tensor_parallelism_is_sent_to_its_own_adapter() -> None:
    with pytest.raises(ValueError, match=r"autotp_size=2.*cpinfer_integrations\.deepspeed\.topology_from"):
        topology_from(accelerator_with(tensor_parallel={"autotp_size": 2}))


def test_a_pcp_that_does_not_divide_the_replicas_is_refused() -> None:
    with pytest.raises(ValueError, match="pcp=3 does not divide the job's 4 replica"):
        topology_from(accelerator_with(num_processes=4), pcp_size=3)


@pytest.mark.parametrize(("names", "shape"), [(("tp", "cp"), (2, 2)), (("cp",), (2,))])
def test_a_mesh_in_another_order_or_over_fewer_ranks_is_refused(
    names: tuple[str, ...], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    mesh = SimpleNamespace(
        mesh=torch.arange(math.prod(shape)).view(shape), mesh_dim_names=names, shape=torch.Size(shape)
    )
    with pytest.raises(ValueError, match="all 4 ranks in order, with tp as the last axis, were wanted"):
        topology_from_mesh(mesh)
