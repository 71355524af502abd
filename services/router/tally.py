"""How many requests run and wait in all workers of a router: a line of shared memory for each."""

from __future__ import annotations

import mmap
import os
import struct

# Running, waiting.
_LINE = struct.Struct("=QQ")


class Tally:
    """The lines of all workers in the file `fd`, which stays its opener's; `mine` is the one that `put` writes."""

    def __init__(self, fd: int, workers: int, mine: int) -> None:
        self._map = mmap.mmap(fd, workers * _LINE.size)
        self._workers = workers
        self._mine = mine

    @staticmethod
    def create(workers: int) -> int:
        """A file of that many lines, in memory; who opens it closes it."""
        fd = os.memfd_create("kvmesh-router")
        os.ftruncate(fd, workers * _LINE.size)
        return fd

    def put(self, running: int, waiting: int) -> None:
        """Mine are so many."""
        _LINE.pack_into(self._map, self._mine * _LINE.size, running, waiting)

    @property
    def sums(self) -> tuple[int, int]:
        """(running, waiting) of all workers."""
        lines = [_LINE.unpack_from(self._map, i * _LINE.size) for i in range(self._workers)]
        return sum(r for r, _ in lines), sum(w for _, w in lines)

    def clear(self, worker: int) -> None:
        """That worker is dead."""
        _LINE.pack_into(self._map, worker * _LINE.size, 0, 0)

    def close(self) -> None:
        """Lets go of the memory."""
        self._map.close()
