"""Real engines as the field of a kill campaign."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from direct import DirectEngine
from hf_reference import Comparison
from kill_campaign import Field
from mesh_process import RunningMesh

from kvmesh.client import AsyncClient

BACK_S, REST_S = 120.0, 40.0
# One death in so many is that of SGLang's scheduler alone.
SCHEDULER = 4


class MeshField(Field):
    """Engines of a mesh that was started with the staged strategy's folder."""

    longest, most, send_s, prefill_s = 1500, 160, 0.15, 0.15

    def __init__(self, mesh: RunningMesh, client: AsyncClient, comparison: Comparison, folder: Path) -> None:
        self.mesh, self.client, self.comparison, self.folder = mesh, client, comparison, folder
        self._frozen: set[str] = set()

    @property
    def engines(self) -> Sequence[str]:
        return self.mesh.engines

    async def freeze(self, name: str) -> None:
        self._frozen.add(name)
        await asyncio.to_thread(self.mesh.freeze, name)

    async def kill(self, name: str, draw: random.Random) -> None:
        if name not in self._frozen and not draw.randrange(SCHEDULER):
            await asyncio.to_thread(self.mesh.kill, name, "sglang::scheduler")
        else:
            await asyncio.to_thread(self.mesh.kill_whole, name)
        self._frozen.discard(name)

    async def restart(self, name: str) -> None:
        await self.mesh.restart_beside(name)
        async with asyncio.timeout(BACK_S):
            while True:
                engines = (await self.client.mesh()).engines
                up = {e.member.endpoint.name: e.member.endpoint.address for e in engines if e.connected}
                if up.get(name) == self.mesh.address(name):
                    return
                await asyncio.sleep(0.05)

    def prepare(self, prompt: list[int], count: int) -> None:
        self.comparison.reference.tokens(prompt, count)

    def check(self, state: str, prompt: list[int], tokens: list[int], count: int) -> None:
        self.comparison.check("kill campaign", state, prompt, tokens, count)

    async def at_rest(self, names: Sequence[str]) -> None:
        async with AsyncExitStack() as stack:
            for name in names:
                engine = await stack.enter_async_context(DirectEngine(name, self.mesh.address(name)))
                await engine.at_rest(REST_S)
