"""Transport "shm": pools in shared memory of one host. The sender maps the receiver's pool and writes into it.

The memory is a memfd: it has no name, peers open it through /proc/PID/fd, and it is gone with the last process that
maps it. Peers must run under the same user and see each other's process numbers.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

from kvmesh.dataplane.base import CannotConnect, Connection, Pool, Transport
from kvmesh.dataplane.layout import Layout, refusal
from kvmesh.dataplane.slots import Slots, joint_runs
from kvmesh.errors import InvalidArgument
from kvmesh.process import ProcessRef
from kvmesh.v1.kv_pb2 import KvPool, Process

if TYPE_CHECKING:
    import torch

# Below this many rows a stretch, one indexed copy beats a copy for each stretch (benchmarks/transport.py).
SHORT_RUN = 4


class SharedMemory:
    """A mapped piece of shared memory."""

    def __init__(self, fd: int, size: int, populate: bool) -> None:
        flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0)
        self.fd = fd
        self.size = size
        self._map: mmap.mmap | None = mmap.mmap(fd, size, flags=flags)

    @staticmethod
    def create(size: int, name: str) -> SharedMemory:
        """New memory, all zero and present. `name` is for people who look into /proc. Raises OSError, MemoryError."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            # The first touch of a page is several times as dear as a copy into it.
            return SharedMemory(fd, size, populate=True)
        except BaseException:
            os.close(fd)
            raise

    @staticmethod
    def open(owner: ProcessRef, fd: int, size: int) -> SharedMemory:
        """The memory that `owner` has under `fd`. Raises CannotConnect, InvalidArgument."""
        try:
            ours = os.open(f"/proc/{owner.pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise CannotConnect(f"the pool of process {owner.pid} cannot be opened: {error.strerror}") from error
        try:
            # Looked at after the open: had the number passed on to another process before, it has other ticks.
            if not owner.alive():
                raise CannotConnect(f"process {owner.pid}, which had the pool, is gone")
            if os.fstat(ours).st_size != size:
                raise InvalidArgument(f"the pool of process {owner.pid} has not the {size} bytes that it should have")
            return SharedMemory(ours, size, populate=False)
        except BaseException:
            os.close(ours)
            raise

    def tensors(self, layout: Layout, rows: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(K, V) of each layer, shape [rows, heads, dim], as views of the memory."""
        import torch

        assert self._map is not None, "closed"
        dtype = getattr(torch, layout.dtype)
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        at = 0
        for i, size in enumerate(layout.part_bytes(rows)):
            dim = layout.v_dim if i % 2 else layout.k_dim
            flat = torch.frombuffer(self._map, dtype=dtype, count=rows * layout.heads * dim, offset=at)
            (values if i % 2 else keys).append(flat.view(rows, layout.heads, dim))
            at += size
        return keys, values

    def close(self) -> None:
        """Closes the descriptor; the mapping goes with its last view."""
        os.close(self.fd)
        # Not closed: tensors keep the map that they look at, but do not keep it from being closed under them.
        self._map = None


def create_pool(layout: Layout, rows: int, name: str) -> tuple[SharedMemory, Pool]:
    """A pool in new shared memory."""
    memory = SharedMemory.create(sum(layout.part_bytes(rows)), name)
    return memory, Pool(layout, *memory.tensors(layout, rows))


def open_pool(peer: KvPool) -> tuple[SharedMemory, Pool]:
    """Another process's pool, as it describes it. Raises CannotConnect, InvalidArgument."""
    layout = Layout.of(peer.layout)
    if peer.bytes != sum(layout.part_bytes(peer.rows)):
        raise InvalidArgument(f"a pool of {peer.rows} rows has not {peer.bytes} bytes")
    owner = ProcessRef(peer.process.pid, peer.process.start_ticks)
    memory = SharedMemory.open(owner, peer.fd, peer.bytes)
    return memory, Pool(layout, *memory.tensors(layout, peer.rows))


class ShmTransport(Transport):
    """For a pool that lies in `memory`."""

    name = "shm"

    def __init__(self, memory: SharedMemory, pool: Pool) -> None:
        self._memory = memory
        self._pool = pool

    def describe(self) -> KvPool:
        """Process, descriptor and form."""
        me = ProcessRef.current()
        return KvPool(
            process=Process(pid=me.pid, start_ticks=me.start_ticks),
            fd=self._memory.fd,
            bytes=self._memory.size,
            rows=self._pool.rows,
            layout=self._pool.layout.message(),
        )

    def connect(self, peer: KvPool) -> ShmConnection:
        """Maps the peer's pool."""
        layout = Layout.of(peer.layout)
        if difference := refusal(self._pool.layout, layout):
            raise InvalidArgument(f"the peer's pool has another layout: {difference}")
        return ShmConnection(self._pool, *open_pool(peer))


class ShmConnection(Connection):
    """Into one peer's mapped pool."""

    def __init__(self, ours: Pool, memory: SharedMemory, theirs: Pool) -> None:
        self._memory = memory
        self._ours = ours
        self._theirs: Pool | None = theirs
        self._pairs = [
            *zip(theirs.keys, ours.keys, strict=True),
            *zip(theirs.values, ours.values, strict=True),
        ]

    def write(self, source: Slots, target: Slots) -> int:
        """Copies stretch by stretch, or by index when the slots are scattered."""
        import torch

        runs = joint_runs(source, target)
        if len(runs) * SHORT_RUN <= len(source):
            for theirs, ours in self._pairs:
                for at, to, count in runs:
                    theirs[to : to + count].copy_(ours[at : at + count])
        else:
            rows, into = torch.tensor(source), torch.tensor(target)
            for theirs, ours in self._pairs:
                theirs.index_copy_(0, into, ours.index_select(0, rows))
        return len(source) * self._ours.layout.bytes_per_token

    def close(self) -> None:
        """Unmaps the peer's pool."""
        self._pairs.clear()
        self._theirs = None
        self._memory.close()
