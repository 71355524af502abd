"""Engines, processes of their own, are killed at every stage: each stream goes on as if nothing had happened."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from kill_campaign import STAGES, STRATEGY_DIR, Field, Tally, campaign
from sim_harness import reference
from sim_processes import SimProcesses

from kvmesh.client import AsyncClient

SEEDS = 20


class SimField(Field):
    """Simulated engines."""

    longest, most, send_s, prefill_s = 1500, 40, 0.06, 0.06

    def __init__(self, mesh: SimProcesses, client: AsyncClient) -> None:
        self.mesh, self.client, self.folder = mesh, client, mesh.tmp
        self._known: dict[tuple[int, ...], list[int]] = {}

    @property
    def engines(self) -> Sequence[str]:
        return [name for name in self.mesh.names if name in self.mesh.processes]

    async def freeze(self, name: str) -> None:
        self.mesh.signal(name, signal.SIGSTOP)

    async def kill(self, name: str, draw: random.Random) -> None:
        await self.mesh.kill(name)

    async def restart(self, name: str) -> None:
        await self.mesh.start_engine(name)
        await self.mesh.connected(name)

    def prepare(self, prompt: list[int], count: int) -> None:
        self._known[tuple(prompt)] = reference(prompt, count)

    def check(self, state: str, prompt: list[int], tokens: list[int], count: int) -> None:
        assert tokens == self._known[tuple(prompt)], state

    async def at_rest(self, names: Sequence[str]) -> None:
        await self.mesh.at_rest(list(names))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.timeout(180)
async def test_a_stage_with_all_seeds(tmp_path: Path, stage: str) -> None:
    mesh = SimProcesses(3, tmp=tmp_path)
    mesh.router_settings = {"strategy_dir": str(STRATEGY_DIR), "trace_ratio": 0.0}
    async with mesh, AsyncClient(mesh.servers[0].address) as client:
        await campaign(SimField(mesh, client), range(SEEDS), tally := Tally(), [stage])
    assert tally.kills[stage] == SEEDS and tally.met[stage] >= SEEDS // 4
