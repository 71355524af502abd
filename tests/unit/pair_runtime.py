"""The FAKE runtime with a two-sided transport beside shared memory: KV goes through threads and gloo."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from fake_runtime import TINY, FakeRuntime, Node

from kvmesh.dataplane.base import CannotConnect, Transport
from kvmesh.dataplane.checksum import checksum as checksum_of
from kvmesh.dataplane.gloo import GlooLinks
from kvmesh.dataplane.pair import PairTransport, Patience
from kvmesh.dataplane.slots import Slots
from kvmesh.endpoint.base import Arrival, Destination, Piece, SendReport
from kvmesh.endpoint.local import LocalArrivals
from kvmesh.errors import Aborted, DataLoss

HOST = "127.0.0.1"


class PairRuntime(FakeRuntime):
    """`names`: the transports that it has. `broken`: those that cannot connect. `corrupt`: rows changed on the way."""

    def __init__(self, *args: Any, names: Sequence[str] = ("shm", "gloo"), stall: float = 2.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.names = names
        self.stall = stall
        self.broken: set[str] = set()
        self.corrupt = False
        # Until it is set, receptions that are cancelled go on.
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.made: list[Any] = []

    async def start(self) -> None:
        await super().start()
        assert self.pool is not None and self.transport is not None
        self.transports: dict[str, Transport] = {"shm": self.transport}
        if "gloo" in self.names:
            self.transports["gloo"] = PairTransport(self.pool, GlooLinks(HOST), HOST, Patience(5.0, self.stall))
        self.arrivals = LocalArrivals(self.transports)
        self.shm = self.pools["shm"][0]
        self.pools = {name: [self.transports[name].describe()] for name in self.names}

    async def stop(self) -> None:
        for transport in self.transports.values():
            transport.close()
        self.transports.clear()
        del self.arrivals
        await super().stop()

    def _move(self, pages: Sequence[int], source: str, target: str) -> None:
        pools, self.pools = self.pools, {"shm": [self.shm]}
        super()._move(pages, source, target)
        self.pools = pools

    def two_sided(self, transport: str) -> bool:
        return self.arrivals.two_sided(transport)

    def accept(self, transport: str, sender: str, slots: Slots, seconds: float, fresh: bool) -> Arrival:
        self.calls["fresh" if fresh else "accept"] += 1
        self._fault("accept")
        arrival = self.arrivals.accept(transport, sender, slots, seconds, fresh)
        # From now until its end these rows are written into.
        self.writes.begin(self.shm, slots)
        task = asyncio.create_task(self._slow_to_end(arrival.task))
        task.add_done_callback(lambda _: self.writes.end(self.shm, slots))
        return Arrival(arrival.pools, task)

    async def _slow_to_end(self, task: asyncio.Task[None]) -> None:
        try:
            await task
        finally:
            while not self.may_end.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await self.may_end.wait()

    async def verify(self, slots: Slots, sums: Sequence[tuple[int, Sequence[int]]]) -> None:
        self.calls["verify"] += 1
        assert self.pool is not None
        at = 0
        for tokens, ranks in sums:
            if [checksum_of(self.pool, slots[at : at + tokens])] != list(ranks):
                raise DataLoss(f"the KV of tokens {at} to {at + tokens} of the transfer is not what was sent")
            at += tokens
        assert at == len(slots)

    async def send(self, token_ids: Sequence[int], begin: int, end: int, to: Destination) -> SendReport:
        transport, peer, slots = to.transport, to.pools[0], to.slots
        self.calls[transport] += 1
        if transport in self.broken:
            raise CannotConnect(f"{transport} is broken on purpose")
        self.sending += 1
        self._last += 1
        owner = f"s{self._last}"
        path = self.match(token_ids, end)
        self._lock(path, +1)
        self._changed()
        one_sided = not self.two_sided(transport)
        if one_sided:
            self.writes.begin(peer, slots)
        connecting = asyncio.ensure_future(asyncio.to_thread(self.transports[transport].connect, peer))
        try:
            await asyncio.wait({connecting})
            connection = connecting.result()
            self.made.append(connection)
            try:
                return await self._send_over(connection, token_ids, begin, end, path, owner, to)
            except BaseException:
                connection.abort()
                raise
            finally:
                connection.close()
        finally:
            self.sending -= 1
            self._lock(path, -1)
            if one_sided:
                self.writes.end(peer, slots)

    async def _send_over(
        self,
        connection: Any,
        token_ids: Sequence[int],
        begin: int,
        end: int,
        path: list[Node],
        owner: str,
        to: Destination,
    ) -> SendReport:
        size = self.layout.page_size
        cached = len(path) * size
        report = SendReport(cached, end - cached, time.monotonic_ns(), time.monotonic_ns())
        if end > cached:
            pages = self._take((end - cached) // size, owner)
            if pages is None:
                raise Aborted("the send was ended: no room")
            self.compute(token_ids, cached, end, self._rows(pages))
            path = self._insert(token_ids, path, pages, owner)
        rows = np.asarray(self._rows([n.page for n in path]), np.int64)
        for at in range(begin, end, self.chunk):
            upto = min(end, at + self.chunk)
            await self._at("piece")
            part, began = rows[at:upto], time.monotonic_ns()
            sent = np.zeros_like(part) if self.corrupt else part
            writing = asyncio.ensure_future(
                asyncio.to_thread(connection.write, sent, to.slots[at - begin : upto - begin])
            )
            try:
                count = await asyncio.shield(writing)
            except asyncio.CancelledError:
                connection.abort()
                await asyncio.wait({writing})
                writing.exception()
                raise
            assert self.pool is not None
            sums = (checksum_of(self.pool, part),) if to.checksum else ()
            report.pieces.append(Piece(began, time.monotonic_ns(), upto - at, count, sums))
        return report


def tiny(**kwargs: Any) -> PairRuntime:
    """A small one."""
    return PairRuntime(512, TINY, **kwargs)
