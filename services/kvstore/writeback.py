"""Writing behind: blocks go to disk after they have come, in one task that also removes files."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from kvmesh.aio import Tasks
from services.kvstore.blockfile import HEADER_BYTES
from services.kvstore.disk import DiskFolder
from services.kvstore.index import Entry, Index
from services.kvstore.memory import BlockMemory

log = logging.getLogger(__name__)

# Blocks written in one go: so many bytes, at most so many blocks.
BATCH_BYTES, BATCH = 32 << 20, 32


class WriteBack:
    """The only one who writes and removes files. `on_change` is called when blocks may have become evictable."""

    def __init__(self, index: Index, pool: BlockMemory, disk: DiskFolder, on_change: Callable[[], None]) -> None:
        self._index, self._pool, self._disk = index, pool, disk
        self._on_change = on_change
        self._queue: deque[Entry] = deque()
        self._wake = asyncio.Event()
        self._rest = asyncio.Event()
        self._rest.set()
        self._failing = False
        self._tasks = Tasks()

    def start(self) -> None:
        """Begins."""
        self._tasks.start(self._run(), "write blocks to disk")

    @property
    def waiting(self) -> int:
        """Blocks still to be written."""
        return len(self._queue)

    def add(self, entry: Entry) -> None:
        """Has it written, unless it is on disk or waits already."""
        if not entry.disk and not entry.unwritten:
            entry.unwritten = True
            self._queue.append(entry)
            self.wake()

    def wake(self) -> None:
        """There may be something to do."""
        self._rest.clear()
        self._wake.set()

    async def flush(self, timeout: float) -> bool:
        """Waits until all is written and removed, so many seconds at most; whether it is."""
        try:
            async with asyncio.timeout(timeout):
                await self._rest.wait()
        except TimeoutError:
            return False
        return True

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            while self._queue or self._index.doomed:
                await self._remove()
                await self._write()
            self._rest.set()
            await self._wake.wait()

    async def _remove(self) -> bool:
        """Whether the files that were to go are gone."""
        doomed, self._index.doomed = self._index.doomed, {}
        if not doomed:
            return True
        try:
            await asyncio.to_thread(self._disk.remove, list(doomed))
        except OSError as error:
            # They count on, and are looked for again at the next start.
            self._failed(error)
            return False
        self._index.disk_bytes -= sum(doomed.values())
        return True

    async def _write(self) -> None:
        size = self._disk.cost(HEADER_BYTES + self._pool.block_bytes)
        batch: list[Entry] = []
        planned = 0
        while self._queue and len(batch) < BATCH and (len(batch) + 1) * size <= max(size, BATCH_BYTES):
            entry = self._queue.popleft()
            if entry.block is None:
                entry.unwritten = False
            elif self._index.make_disk_room(planned + size, self._disk.limit):
                planned += size
                self._index.lock([entry])
                batch.append(entry)
            else:
                entry.unwritten = False
        if batch:
            try:
                if await self._remove():
                    # Counted before it is there: the bound holds at every moment.
                    self._index.disk_bytes += planned
                    await self._write_batch(batch, size)
                else:
                    for entry in batch:
                        entry.unwritten = False
            finally:
                self._index.unlock(batch)
        self._on_change()

    async def _write_batch(self, batch: list[Entry], size: int) -> None:
        done = 0
        try:
            for entry in batch:
                assert entry.block is not None
                await asyncio.to_thread(self._disk.write, entry.key, self._pool.views(entry.block))
                self._index.written(entry, size)
                done += 1
            self._failing = False
        except OSError as error:
            self._failed(error)
        finally:
            for entry in batch[done:]:
                entry.unwritten = False
                self._index.disk_bytes -= size

    def _failed(self, error: OSError) -> None:
        self._index.counts.disk_errors += 1
        if not self._failing:
            log.error("the disk tier fails: %s; what it does not take stays in memory", error)
        self._failing = True

    async def close(self) -> None:
        """Stops, with what is not written left unwritten."""
        await self._tasks.close()
