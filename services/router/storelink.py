"""The KV stores as the router sees them: a link to each that is registered."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvmesh.aio import Tasks
from kvmesh.grpcx import channel
from kvmesh.membership import Connect
from kvmesh.v1.engine_pb2 import EngineInfo, LoadReport
from kvmesh.v1.kvstore_pb2 import StoreInfo, StoreStats, WatchStoreRequest
from kvmesh.v1.kvstore_pb2_grpc import KvStoreStub
from kvmesh.v1.registry_pb2 import MEMBER_KIND_KVSTORE, Member
from kvmesh.v1.router_pb2 import MeshStore
from services.router.hearing import BEAT_S
from services.router.link import EngineLink

log = logging.getLogger(__name__)


class StoreLink(EngineLink):
    """One incarnation of one store: alive, and dead, as an engine is."""

    def __init__(self, member: Member, tasks: Tasks, on_change: Callable[[], None], connect: Connect = channel) -> None:
        super().__init__(member, tasks, on_change, connect)
        self.store = KvStoreStub(self._channel)
        self.about = StoreInfo()
        self.stats = StoreStats()

    def _watch_status(self) -> Any:
        return self.store.WatchStatus(WatchStoreRequest(interval_ms=int(BEAT_S * 1000)))

    def _deliver(self, status: Any) -> None:
        if status.HasField("info"):
            about = self.about = status.info
            self._describe(EngineInfo(endpoint=about.endpoint, model=about.model, layout=about.layout))
        else:
            self.stats = status.stats
            self.report = LoadReport(tickets=self.stats.tickets, sending=self.stats.sending)
            self.reported = time.monotonic()
            self._credits.reported(self.reported)
            self._load_changed()
        self.suspect = False


class StoreLinks:
    """Stores by name, kept in step with the registry."""

    def __init__(self, connect: Connect = channel) -> None:
        self.links: dict[str, StoreLink] = {}
        self._connect = connect
        self._tasks = Tasks()
        self._changed = asyncio.Event()

    def _link_changed(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait_connected(self, count: int) -> None:
        """Waits until `count` stores are up; the caller sets the deadline."""
        while sum(link.connected for link in self.links.values()) < count:
            await self._changed.wait()

    def update(self, members: Mapping[str, Member]) -> None:
        """Makes the links those of the stores in `members`; a new incarnation gets a new link."""
        stores = {m.endpoint.name: m for m in members.values() if m.kind == MEMBER_KIND_KVSTORE}
        for name, link in list(self.links.items()):
            if name not in stores or stores[name].endpoint != link.member.endpoint:
                log.info("store %s left", name)
                del self.links[name]
                link.retire()
        for name, member in stores.items():
            if name not in self.links:
                log.info("store %s at %s", name, member.endpoint.address)
                self.links[name] = StoreLink(member, self._tasks, self._link_changed, self._connect)

    def candidates(self, engines: Sequence[EngineLink]) -> list[StoreLink]:
        """Links to the stores that are up and keep KV that these engines can use."""
        if not self.links:
            return []
        kinds = {(e.info.model.name, e.info.layout.fingerprint) for e in engines if e.info is not None}
        return [
            link
            for link in self.links.values()
            if link.connected
            and not (link.suspect or link.suspended)
            and (link.about.model.name, link.about.layout.fingerprint) in kinds
        ]

    def describe(self, now: float) -> list[MeshStore]:
        """What GetMesh says of them; `now` by time.monotonic()."""
        return [
            MeshStore(
                member=link.member,
                info=link.about,
                stats=link.stats,
                connected=link.connected,
                stats_age_seconds=now - link.reported,
            )
            for _, link in sorted(self.links.items())
        ]

    async def close(self) -> None:
        """Closes every link."""
        await self._tasks.close()
        await asyncio.gather(*(link.close() for link in self.links.values()))
        self.links.clear()
