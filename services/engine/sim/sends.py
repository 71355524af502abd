"""Sends: prefill what is missing, and carry each chunk over as soon as it is computed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvmesh.dataplane.slots import Slots
from kvmesh.errors import Aborted
from kvmesh.sim.carry import carry
from kvmesh.sim.links import Link
from kvmesh.sim.peers import Peers, Values
from kvmesh.sim.profile import Profile
from kvmesh.v1.kv_pb2 import KvPool
from services.engine.base import Piece, SendReport
from services.engine.sim.content import Ids
from services.engine.sim.faults import Faults
from services.engine.sim.job import Job
from services.engine.sim.kv import KvCache, Node
from services.engine.sim.scheduler import Scheduler


class Sends:
    """All sends of one engine."""

    def __init__(
        self,
        profile: Profile,
        scheduler: Scheduler,
        cache: KvCache,
        link: Link,
        peers: Peers,
        faults: Faults,
        now: Callable[[], float],
    ) -> None:
        self._profile = profile
        self._scheduler = scheduler
        self._cache = cache
        self._link = link
        self._peers = peers
        self._faults = faults
        self._now = now
        self.count = 0

    async def send(self, ids: Ids, begin: int, end: int, pools: Sequence[KvPool], slots: Slots) -> SendReport:
        """As Runtime.send."""
        self.count += 1
        send = _Send(Job(ids[:end], end), self._cache, begin, self._now)
        try:
            if self._faults.take("fail_transfers"):
                raise Aborted("fault on demand: the transfer failed")
            dropped = self._faults.take("drop_transfers")
            self._scheduler.submit(send.job)
            pieces: list[Piece] = []
            while (chunk := await send.chunk()) is not None:
                at, values = chunk
                # Cancelling waits for the chunk that is on its way.
                pieces.append(
                    await self._carry(
                        pools[0], slots[at - begin : at - begin + len(values)], values, send.last, dropped
                    )
                )
            cached = min(send.cached, end)
            return SendReport(
                cached, end - cached, int(send.job.began * 1e9), int((send.prefilled or self._now()) * 1e9), pieces
            )
        finally:
            self.count -= 1
            self._scheduler.abort(send.job)
            send.close()
            self._scheduler.wake()

    async def _carry(self, pool: KvPool, slots: Slots, values: Values, last: bool, dropped: bool) -> Piece:
        began = self._now()
        size = int(len(values) * self._profile.bytes_per_token * self._faults.slow)
        latency = self._profile.transfer.latency * self._faults.slow if last else 0.0
        await carry(self._link, self._peers, pool, slots, values, size, latency=latency, dropped=dropped)
        sent = len(values) * self._profile.bytes_per_token
        return Piece(int(began * 1e9), int(self._now() * 1e9), len(values), sent)


class _Send:
    """One send's job, and the chunks of [begin:end) that are computed and not yet carried."""

    def __init__(self, job: Job, cache: KvCache, begin: int, now: Callable[[], float]) -> None:
        self.job = job
        self.cached = 0
        # When the last pass was over.
        self.prefilled = 0.0
        self._now = now
        self._cache = cache
        self._sent = begin
        self._ready: asyncio.Queue[tuple[int, Values] | str] = asyncio.Queue()
        self._locks: list[Node] = []
        # Nothing is left to be handed out.
        self.last = begin >= job.end
        job.on_ready = self._on_ready
        job.on_failed = self._ready.put_nowait

    def _on_ready(self) -> None:
        job = self.job
        self.cached, self.prefilled = job.cached, self._now()
        if job.done > self._sent:
            assert job.node is not None
            self._cache.lock(job.node)
            self._locks.append(job.node)
            values = self._cache.values[job.slots[self._sent : job.done]]
            self._ready.put_nowait((self._sent, values))
            self._sent = job.done

    async def chunk(self) -> tuple[int, Values] | None:
        """The next: (first token, KV); None after the last. Raises Aborted when the prefill failed."""
        if self.last:
            return None
        got = await self._ready.get()
        if isinstance(got, str):
            raise Aborted(f"the prefill failed: {got}")
        self.last = got[0] + len(got[1]) >= self.job.end
        return got

    def close(self) -> None:
        """Lets go of what was copied."""
        for node in self._locks:
            self._cache.unlock(node)
        self._locks.clear()
