"""What the store says of itself, and how full it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from kvmesh.endpoint.tickets import TicketBook
from kvmesh.errors import Unavailable
from kvmesh.v1 import kvstore_pb2 as pb
from kvmesh.v1.common_pb2 import Endpoint
from kvmesh.v1.engine_pb2 import ModelInfo
from services.kvstore.disk import Served
from services.kvstore.holder import StoreHolder
from services.kvstore.store import Store

DEFAULT_INTERVAL_MS, MIN_INTERVAL_MS, MAX_INTERVAL_MS = 1000, 20, 60_000


def describe(endpoint: Endpoint, served: Served, store: Store, holder: StoreHolder) -> pb.StoreInfo:
    """The store, which does not change."""
    model = ModelInfo(
        name=served.model, path=served.path, vocab_size=served.vocab_size, context_length=served.context_length
    )
    return pb.StoreInfo(
        endpoint=endpoint,
        model=model,
        layout=holder.layout.message(),
        block_tokens=store.pool.tokens,
        memory_blocks=store.pool.blocks,
        memory_bytes=store.pool.bytes,
        disk_bytes=0 if store.disk is None else store.disk.limit,
        transports=list(holder.pools),
    )


class Status:
    """Its figures, once or as a stream."""

    def __init__(self, info: pb.StoreInfo, store: Store, holder: StoreHolder, book: TicketBook) -> None:
        self.info = info
        self._store, self._holder, self._book = store, holder, book
        self._closed = asyncio.Event()

    def stats(self) -> pb.StoreStats:
        """The store now."""
        store, index = self._store, self._store.index
        counts = index.counts
        return pb.StoreStats(
            memory_free=store.pool.free,
            memory_used=len(index.memory),
            memory_reserved=store.reserved,
            unwritten=store.unwritten,
            disk_blocks=len(index.disk),
            disk_used_bytes=index.disk_bytes,
            pinned=index.pinned,
            locked=index.locked,
            tickets=self._book.count,
            sending=self._holder.sending,
            waiting=store.waiting,
            asked_tokens=counts.asked_tokens,
            sent_tokens=counts.sent_tokens,
            stored_blocks=counts.stored,
            loaded_blocks=counts.loaded,
            written_blocks=counts.written,
            evicted_blocks=counts.evicted,
            expired_blocks=counts.expired,
            damaged_blocks=counts.damaged,
            disk_errors=counts.disk_errors,
        )

    async def watch(self, interval: float) -> AsyncGenerator[pb.StoreStatus, None]:
        """The description, then the figures each `interval` seconds. Raises Unavailable when the store stops."""
        yield pb.StoreStatus(info=self.info)
        while not self._closed.is_set():
            yield pb.StoreStatus(stats=self.stats())
            try:
                async with asyncio.timeout(interval):
                    await self._closed.wait()
            except TimeoutError:
                continue
        raise Unavailable("the store is stopping")

    def close(self) -> None:
        """Ends every stream."""
        self._closed.set()
