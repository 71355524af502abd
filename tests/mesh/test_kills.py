"""The kill campaign on real engines: `make campaign`, or pytest --kills SEEDS, or --kills FIRST:END for some seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hf_reference import Comparison
from kill_campaign import STAGES, STRATEGY_DIR, Tally, campaign
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
    if not (asked := pytestconfig.getoption("kills")):
        pytest.skip("only with --kills SEEDS: make campaign")
    first, _, last = asked.rpartition(":")
    seeds = range(int(first or 0), int(last))
    tally = Tally()
    arguments = ["--engines", "3", "--kv-tokens", "12288", "--trace-ratio", "0", "--strategy-dir", str(STRATEGY_DIR)]
    meshes = running(RunningMesh(mesh_home, "campaign", model, arguments))
    mesh = next(meshes)
    try:
        async with AsyncClient(mesh.address("router")) as client:
            field = MeshField(mesh, client, comparison, tmp_path)
            await campaign(field, seeds, tally, limit_s=len(seeds) * len(STAGES) * KILL_S)
    finally:
        note(tally.line())
        for _ in meshes:
            pass
    assert all(tally.kills[stage] == len(seeds) for stage in STAGES)
