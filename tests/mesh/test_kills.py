"""The kill campaign on real engines: `make campaign`, or pytest --kills SEEDS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hf_reference import Comparison
from kill_campaign import STAGES, STRATEGY_DIR, campaign
from kill_field import MeshField
from mesh_process import RunningMesh, running

from kvmesh.client import AsyncClient

# For one kill and the restart that follows.
KILL_S = 60.0


@pytest.mark.timeout(4 * 3600)
async def test_every_stage_with_every_seed(
    pytestconfig: pytest.Config,
    mesh_home: Path,
    model: Path,
    comparison: Comparison,
    tmp_path: Path,
    note: Callable[[str], None],
) -> None:
    seeds = pytestconfig.getoption("kills")
    if not seeds:
        pytest.skip("only with --kills SEEDS: make campaign")
    arguments = ["--engines", "3", "--kv-tokens", "12288", "--trace-ratio", "0", "--strategy-dir", str(STRATEGY_DIR)]
    meshes = running(RunningMesh(mesh_home, "campaign", model, arguments))
    mesh = next(meshes)
    try:
        async with AsyncClient(mesh.address("router")) as client:
            field = MeshField(mesh, client, comparison, tmp_path)
            tally = await campaign(field, range(seeds), limit_s=seeds * len(STAGES) * KILL_S)
    finally:
        for _ in meshes:
            pass
    note(tally.line())
    assert all(tally.kills[stage] == seeds for stage in STAGES)
