"""What WatchStatus streams: the engine's description, its load, and what comes into and goes out of its cache."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

from kvmesh.endpoint.tickets import TicketBook
from kvmesh.errors import Unavailable
from kvmesh.v1 import engine_pb2 as pb
from services.engine.base import Runtime

DEFAULT_INTERVAL_MS, MIN_INTERVAL_MS, MAX_INTERVAL_MS = 1000, 20, 60_000
# Between two load messages, however much changes.
PERIOD_S = 0.02
# Cache changes kept for one watcher; one that is further behind gets a snapshot.
CHANGES = 100_000


class _Watcher:
    """What one stream has yet to be told."""

    def __init__(self, cache: bool) -> None:
        self.cache = cache
        self.wake = asyncio.Event()
        self.load = True
        self.snapshot = cache
        # Whether a block came (True) or went: the last word on it counts.
        self.changes: dict[int, bool] = {}

    def change(self, stored: Sequence[int], removed: Sequence[int]) -> None:
        if self.snapshot:
            return
        self.changes.update(dict.fromkeys(stored, True))
        self.changes.update(dict.fromkeys(removed, False))
        if len(self.changes) > CHANGES:
            self.restart()

    def restart(self) -> None:
        self.snapshot = self.cache
        self.changes = {}


class Status:
    """All watchers of one engine, and the blocks in its cache once anybody has asked for them."""

    def __init__(self, info: pb.EngineInfo, runtime: Runtime, book: TicketBook) -> None:
        self.info = info
        self._runtime = runtime
        self._book = book
        self._watchers: set[_Watcher] = set()
        self._blocks: set[int] = set()
        self._closed = False
        runtime.on_load = self._changed
        runtime.on_cache = self._cache_changed
        book.on_change = self._changed

    def load(self) -> pb.LoadReport:
        """The engine now."""
        now, quarantined = self._runtime.load, self._book.quarantined
        return pb.LoadReport(
            running_requests=now.running,
            waiting_requests=now.waiting,
            waiting_reservations=now.waiting_reservations,
            waiting_tokens=now.waiting_tokens,
            tickets=self._book.count,
            sending=now.sending,
            free_slots=now.free,
            cached_slots=now.cached,
            running_slots=now.in_use,
            reserved_slots=max(0, now.reserved - quarantined),
            quarantined_slots=quarantined,
        )

    async def watch(self, interval: float, cache: bool) -> AsyncGenerator[pb.EngineStatus, None]:
        """Messages of one stream, for ever. Raises Unavailable when the engine stops."""
        watcher = _Watcher(cache)
        self._watchers.add(watcher)
        sequence = 1
        try:
            if cache:
                self._runtime.watch_cache()
            yield pb.EngineStatus(sequence=sequence, info=self.info)
            due = time.monotonic()
            while not self._closed:
                for status in self._news(watcher, time.monotonic() >= due):
                    sequence += 1
                    status.sequence = sequence
                    yield status
                    if status.HasField("load"):
                        due = time.monotonic() + interval
                await asyncio.sleep(PERIOD_S)
                try:
                    async with asyncio.timeout(max(0.0, due - time.monotonic())):
                        await watcher.wake.wait()
                except TimeoutError:
                    pass
                watcher.wake.clear()
            raise Unavailable("the engine is stopping")
        finally:
            self._watchers.discard(watcher)

    def _news(self, watcher: _Watcher, due: bool) -> list[pb.EngineStatus]:
        news: list[pb.EngineStatus] = []
        if watcher.load or due:
            watcher.load = False
            news.append(pb.EngineStatus(load=self.load()))
        if watcher.snapshot:
            watcher.snapshot = False
            news.append(pb.EngineStatus(cache=pb.CacheChange(snapshot=True, stored=self._blocks)))
        elif watcher.changes:
            changes, watcher.changes = watcher.changes, {}
            change = pb.CacheChange(
                stored=[block for block, there in changes.items() if there],
                removed=[block for block, there in changes.items() if not there],
            )
            news.append(pb.EngineStatus(cache=change))
        return news

    def _changed(self) -> None:
        for watcher in self._watchers:
            watcher.load = True
            watcher.wake.set()

    def _cache_changed(self, stored: Sequence[int], removed: Sequence[int], snapshot: bool) -> None:
        if snapshot:
            self._blocks.clear()
        self._blocks.update(stored)
        self._blocks.difference_update(removed)
        for watcher in self._watchers:
            if watcher.cache:
                if snapshot:
                    watcher.restart()
                else:
                    watcher.change(stored, removed)
                watcher.wake.set()

    def close(self) -> None:
        """Ends every stream."""
        self._closed = True
        for watcher in self._watchers:
            watcher.wake.set()
