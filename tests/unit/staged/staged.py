"""A built-in strategy that says at each sub-request where it is, and waits there if it is to.

What it says are lines of the file `note`: a stage, and the engines at it. Before a stage in `hold` it waits until there
is the file `note`.go.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from kvmesh.strategy import (
    Choices,
    Chunk,
    Chunks,
    Engine,
    Generating,
    Load,
    Mesh,
    Pace,
    Request,
    SamplingParams,
    TicketHandle,
    strategy,
)
from services.router.strategies.balanced_prefill_decode import balanced_prefill_decode
from services.router.strategies.data_parallel import data_parallel
from services.router.strategies.prefill_decode import prefill_decode

INNER = {s.name: s for s in (data_parallel, prefill_decode, balanced_prefill_decode)}
HOLD_S = 20.0


class Stages:
    """Tells of stages; only of the first attempt."""

    def __init__(self, note: str, hold: str) -> None:
        self._note, self._hold = note, hold.split(",")

    async def reach(self, stage: str, *engines: str) -> None:
        """Says it, then waits if it is to."""
        if not self._note:
            return
        self._say(f"{stage} {' '.join(engines)}\n")
        go, deadline = Path(f"{self._note}.go"), time.monotonic() + HOLD_S
        while stage in self._hold and not go.exists() and time.monotonic() < deadline:
            await asyncio.sleep(0.002)

    def _say(self, line: str) -> None:
        with open(self._note, "a") as file:
            file.write(line)


class StagedGeneration(Generating):
    """Starts with the first chunk that is asked for."""

    def __init__(
        self,
        engine: StagedEngine,
        token_ids: Sequence[int],
        ticket: TicketHandle | None,
        sampling: SamplingParams | None,
    ) -> None:
        self._engine, self._asked = engine, (token_ids, ticket, sampling)
        self._inner: Generating | None = None

    async def __anext__(self) -> Chunk:
        """The next one."""
        if self._inner is None:
            await self._engine.stages.reach("start_generate", self._engine.name)
            self._inner = self._engine.inner.start_generate(*self._asked)
        return await self._inner.__anext__()

    def cancel(self) -> None:
        """Ends it."""
        if self._inner is not None:
            self._inner.cancel()


class StagedEngine(Engine):
    """An engine whose calls are told of."""

    def __init__(self, inner: Engine, stages: Stages) -> None:
        self.inner, self.stages = inner, stages
        self.name, self.labels = inner.name, inner.labels
        self.incarnation, self.total_slots = inner.incarnation, inner.total_slots

    @property
    def load(self) -> Load:
        """The engine's."""
        return self.inner.load

    @property
    def pace(self) -> Pace:
        """The engine's."""
        return self.inner.pace

    async def prep_recv(self, token_ids: Sequence[int], end: int, *, wait: float = 10.0) -> TicketHandle:
        """PrepRecv."""
        await self.stages.reach("prep_recv", self.name)
        ticket = await self.inner.prep_recv(token_ids, end, wait=wait)
        await self.stages.reach("prepared", self.name)
        return ticket

    async def remote_send(
        self,
        token_ids: Sequence[int],
        ticket: TicketHandle,
        begin: int | None = None,
        end: int | None = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """RemoteSend."""
        await self.stages.reach("remote_send", self.name, ticket.engine)
        await self.inner.remote_send(token_ids, ticket, begin, end, timeout=timeout)
        await self.stages.reach("sent", self.name, ticket.engine)

    def start_generate(
        self, token_ids: Sequence[int], ticket: TicketHandle | None = None, sampling: SamplingParams | None = None
    ) -> Generating:
        """StartGenerate."""
        return StagedGeneration(self, token_ids, ticket, sampling)

    async def release(self, ticket: TicketHandle) -> None:
        """Release."""
        await self.inner.release(ticket)


@strategy
async def staged(
    request: Request,
    mesh: Mesh,
    *,
    inner: Annotated[str, Choices(*INNER)] = "prefill_decode",
    note: str = "",
    hold: str = "",
) -> Chunks:
    """Runs `inner`, and says how far it is."""
    stages = Stages(note if request.attempt == 1 else "", hold)
    engines: list[Engine] = [StagedEngine(engine, stages) for engine in mesh.engines]
    async for chunk in INNER[inner](request, Mesh(engines, mesh.policies, mesh.stores)):
        yield chunk
