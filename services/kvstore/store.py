"""The two tiers together: finding, holding, filling and giving up blocks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from kvmesh.aio import Tasks
from kvmesh.errors import ResourceExhausted
from services.kvstore.blockfile import HEADER_BYTES, DamagedError
from services.kvstore.disk import DiskFolder
from services.kvstore.index import Entry, Index
from services.kvstore.memory import BlockMemory
from services.kvstore.writeback import WriteBack

log = logging.getLogger(__name__)

# How often what is too old is looked for; how long the last blocks may take to reach the disk at the end.
SWEEP_S, FLUSH_S = 5.0, 10.0
# Reads of files side by side.
READERS = 4


class Store:
    """Blocks by key. `disk` may be None. What it is given is its own from `start` on."""

    def __init__(
        self, pool: BlockMemory, disk: DiskFolder | None, ttl: float = 0.0, clock: Callable[[], float] = time.time
    ) -> None:
        self.pool = pool
        self.disk = disk
        self.index = Index(pool, ttl, clock)
        self._behind = None if disk is None else WriteBack(self.index, pool, disk, self._changed)
        self._waiting: deque[tuple[int, asyncio.Future[list[int]]]] = deque()
        self._loading: dict[bytes, asyncio.Task[None]] = {}
        self._readers = asyncio.Semaphore(READERS)
        self._tasks = Tasks()
        self._clock = clock
        # Blocks taken and not yet put.
        self.reserved = 0

    async def start(self) -> None:
        """Finds what is on disk, and begins to write behind."""
        if self.disk is not None and self._behind is not None:
            found, self.index.counts.damaged = await asyncio.to_thread(self.disk.scan)
            size = self.disk.cost(HEADER_BYTES + self.pool.block_bytes)
            for block in found:
                self.index.on_disk(block.key, size, block.used)
            # The folder may have been given less room than before.
            self.index.make_disk_room(0, self.disk.limit)
            self._behind.start()
            self._behind.wake()
            if found:
                log.info("%d blocks are on disk, %d bytes", len(found), self.index.disk_bytes)
        self._tasks.start(self._sweep(), "drop what is too old")

    @property
    def waiting(self) -> int:
        """Those that wait for memory."""
        return len(self._waiting)

    @property
    def unwritten(self) -> int:
        """Blocks still to be written to disk."""
        return 0 if self._behind is None else self._behind.waiting

    async def take(self, count: int, wait: float) -> list[int]:
        """So many blocks of memory, first come first served; waits `wait` seconds. Raises ResourceExhausted."""
        if count <= self.pool.blocks and not self._waiting and self.index.make_room(count):
            return self._taken(count)
        if wait <= 0 or count > self.pool.blocks:
            raise self._full(count)
        turn: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        try:
            async with asyncio.timeout(wait):
                return await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.give(turn.result())
            if isinstance(error, TimeoutError):
                raise self._full(count) from None
            raise
        finally:
            if (count, turn) in self._waiting:
                self._waiting.remove((count, turn))
                self._changed()

    def _taken(self, count: int) -> list[int]:
        self.reserved += count
        return self.pool.take(count)

    def _full(self, count: int) -> ResourceExhausted:
        return ResourceExhausted(
            f"no room in the store's memory: {count} blocks are needed, of {self.pool.blocks} {self.pool.free} are "
            f"free, {self.reserved} reserved, {self.unwritten} still to be written to disk"
        )

    def give(self, blocks: Sequence[int]) -> None:
        """Takes back blocks that were taken and not put."""
        for block in blocks:
            self.pool.give(block)
        self.reserved -= len(blocks)
        self._changed()

    def put(self, keys: Sequence[bytes], blocks: Sequence[int]) -> list[Entry]:
        """These blocks hold the KV of these keys now. They are locked: the caller unlocks."""
        entries = [self.index.put(key, block) for key, block in zip(keys, blocks, strict=True)]
        self.reserved -= len(blocks)
        self.index.counts.stored += len(blocks)
        self.index.lock(entries)
        self.index.touch(entries)
        if self._behind is not None:
            for entry in entries:
                self._behind.add(entry)
        return entries

    def find(self, keys: Sequence[bytes]) -> list[Entry]:
        """The entries of `keys` up to the first that is missing, locked and used: the caller unlocks."""
        entries = self.index.chain(keys)
        self.index.lock(entries)
        self.index.touch(entries)
        return entries

    def unlock(self, entries: Sequence[Entry]) -> None:
        """Gives up what `find` and `put` have locked."""
        self.index.unlock(entries)
        self._changed()

    @asynccontextmanager
    async def hold(self, keys: Sequence[bytes], wait: float) -> AsyncGenerator[list[Entry], None]:
        """The entries of `keys` up to the first that is missing or damaged, in memory, for as long as this lasts."""
        found = self.find(keys)
        try:
            yield await self._load(found, wait)
        finally:
            self.unlock(found)

    async def _load(self, entries: Sequence[Entry], wait: float) -> list[Entry]:
        """Reads what is only on disk; the leading entries that are in memory after it."""
        absent = [e for e in entries if e.block is None and e.key not in self._loading]
        # More would leave no room for anybody else.
        absent = absent[: self.pool.blocks // 2]
        if absent:
            try:
                blocks = await self.take(len(absent), wait)
            except ResourceExhausted as error:
                log.info("%d blocks stay on disk: %s", len(absent), error)
                blocks = []
            for entry, block in zip(absent, blocks, strict=False):
                if entry.block is None and entry.key not in self._loading:
                    self._begin_load(entry, block)
                else:
                    self.give([block])
        running = [task for e in entries if (task := self._loading.get(e.key)) is not None]
        if running:
            await asyncio.wait(running)
        whole = next((i for i, entry in enumerate(entries) if entry.block is None), len(entries))
        return list(entries[:whole])

    def _begin_load(self, entry: Entry, block: int) -> None:
        # A task of its own: others may wait for it when this caller is gone.
        self.index.lock([entry])
        task = self._loading[entry.key] = self._tasks.start(self._read(entry, block), "read a block")
        task.add_done_callback(lambda _: self._loading.pop(entry.key, None))

    async def _read(self, entry: Entry, block: int) -> None:
        assert self.disk is not None
        placed = False
        try:
            async with self._readers:
                await _finish(asyncio.to_thread(self.disk.read, entry.key, self.pool.views(block)))
            self.index.counts.loaded += 1
            # Else it has been received meanwhile.
            if entry.block is None:
                self.index.placed(entry, block)
                placed = True
        except (DamagedError, OSError) as error:
            log.warning("block %s on disk is damaged, and dropped: %s", entry.key.hex(), error)
            self.index.counts.damaged += 1
            self.index.lose_file(entry)
        finally:
            self.index.unlock([entry])
            if placed:
                self.reserved -= 1
            else:
                self.give([block])

    def evict(self, entries: Sequence[Entry]) -> int:
        """Drops those that nobody uses; how many."""
        free = [entry for entry in entries if not entry.locks]
        for entry in free:
            self.index.drop(entry)
        self._changed()
        return len(free)

    def pin(self, entries: Sequence[Entry], seconds: float) -> None:
        """Pins them. Raises ResourceExhausted when more than half of the store would be."""
        new = sum(1 for entry in entries if entry.pinned <= self._clock())
        room = self.pool.blocks
        if self.disk is not None:
            room = max(room, self.disk.limit // self.disk.cost(self.pool.block_bytes))
        if self.index.pinned + new > room // 2:
            raise ResourceExhausted(f"{self.index.pinned} blocks are pinned, and {new} more are over half of {room}")
        self.index.pin(entries, self._clock() + seconds)

    def _changed(self) -> None:
        if self._behind is not None and self.index.doomed:
            self._behind.wake()
        while self._waiting:
            count, turn = self._waiting[0]
            if not turn.done():
                if not self.index.make_room(count):
                    return
                turn.set_result(self._taken(count))
            self._waiting.popleft()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.index.expire()
            self._changed()

    async def flush(self, timeout: float) -> bool:
        """Waits until all is on disk that is to go there; whether it is."""
        return self._behind is None or await self._behind.flush(timeout)

    async def close(self) -> None:
        """Writes what is to be written, and lets go of memory and disk."""
        if not await self.flush(FLUSH_S):
            log.warning("%d blocks did not reach the disk", self.unwritten)
        await self._tasks.close()
        if self._behind is not None:
            await self._behind.close()
        if self.disk is not None:
            self.disk.close()
        self.pool.close()


async def _finish(work: Coroutine[Any, Any, None]) -> None:
    """Awaits a thread's work to its end, also when cancelled: until then it uses memory of ours."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            await asyncio.wait({task})
        raise
