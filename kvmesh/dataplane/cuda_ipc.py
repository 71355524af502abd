"""NEVER RUN on a GPU: there was none where this was written.

Transport "cuda_ipc": pools on GPUs of one host, also two processes on one GPU, and pools in shared memory that both
sides pin, a KV store's. The receiver exports its pool once; the sender maps it once and keeps the mapping while the
receiver lives; each piece of a transfer is one kernel (two where keys and values differ in size) that copies all layers
into the receiver's slots, on a stream of its own.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeAlias

from kvmesh.dataplane.base import CannotConnect, Connection, Pool, Transport
from kvmesh.dataplane.cuda import RowCopier, pointers, table
from kvmesh.dataplane.cuda_driver import CudaDriver, CudaError, IpcMemory
from kvmesh.dataplane.layout import ITEM_BYTES, Layout, refusal
from kvmesh.dataplane.shm import SharedMemory, ShmTransport, open_pool
from kvmesh.dataplane.slots import Slots
from kvmesh.errors import InvalidArgument
from kvmesh.process import ProcessRef
from kvmesh.v1.kv_pb2 import CudaAllocation, CudaMemory, KvPool, Process

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# Addresses of K, and of V, of each layer.
Tables: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"


class CudaStream:
    """A stream of our own on one device, with events for what it is to wait for, and for its end."""

    def __init__(self, device: torch.device | str) -> None:
        import torch

        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device=device)

    def fence(self) -> object:
        """Stands for all that the calling thread has launched on its current stream."""
        import torch

        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait_for(self, fence: object) -> None:
        """What is launched on our stream from now on runs after the fence."""
        self._stream.wait_event(fence)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Launches go to our stream; returns when they have run. Waits for that stream only."""
        import torch

        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield
            end = torch.cuda.Event(blocking=True)
            end.record(self._stream)
        end.synchronize()


class CudaIpcTransport(Transport):
    """For a pool on one GPU, or for one that lies in `shared`, and is reached by `device` (the first GPU).

    `memory`, `stream` and `kernels` are the driver's, torch's and SGLang's unless given.
    """

    name = "cuda_ipc"

    def __init__(
        self,
        pool: Pool,
        memory: IpcMemory | None = None,
        stream: Any = None,
        kernels: Any = None,
        *,
        shared: SharedMemory | None = None,
        device: torch.device | str = "cuda:0",
    ) -> None:
        self._pool = pool
        self._device = pool.keys[0].device if shared is None else device
        self._pinned = 0
        try:
            self._copier = RowCopier(pool.layout, self._device, kernels)
        except (ImportError, ValueError) as error:
            raise CannotConnect(f"no kernel for this pool: {error}") from error
        try:
            self._memory = memory or CudaDriver()
            self._stream = stream or CudaStream(self._device)
            # Before anything is pinned: it may fail as well.
            self._ours = table(pool.keys, self._device), table(pool.values, self._device)
            if shared is None:
                self._description = self._describe()
            else:
                self._description = ShmTransport(shared, pool).describe()
                self._pin(pool, shared.size)
                self._pinned = pool.keys[0].data_ptr()
        except CudaError as error:
            raise CannotConnect(f"the pool cannot be shared: {error}") from error

    def _pin(self, pool: Pool, size: int) -> None:
        """A pool in shared memory begins with the first layer's keys."""
        with self._stream():
            self._memory.pin(pool.keys[0].data_ptr(), size)

    def _describe(self) -> KvPool:
        bases: list[int] = []
        memory = CudaMemory(device=_uuid(self._device))
        for tensor in (*self._pool.keys, *self._pool.values):
            address = tensor.data_ptr()
            base, size = self._memory.allocation(address)
            if base not in bases:
                bases.append(base)
                memory.allocations.append(CudaAllocation(handle=self._memory.export(address), bytes=size))
            memory.parts.append(bases.index(base))
            memory.offsets.append(address - base)
        me = ProcessRef.current()
        return KvPool(
            process=Process(pid=me.pid, start_ticks=me.start_ticks),
            rows=self._pool.rows,
            layout=self._pool.layout.message(),
            cuda=memory,
        )

    def describe(self) -> KvPool:
        """Process, form and handles."""
        return self._description

    def fence(self) -> object:
        """Of the calling thread's stream."""
        return self._stream.fence()

    def connect(self, peer: KvPool) -> CudaIpcConnection:
        """Maps the peer's pool."""
        layout = Layout.of(peer.layout)
        if difference := refusal(self._pool.layout, layout):
            raise InvalidArgument(f"the peer's pool has another layout: {difference}")
        mapped = ExitStack()
        try:
            theirs = self._map(peer, layout, mapped) if peer.HasField("cuda") else self._map_shared(peer, mapped)
        except BaseException as error:
            with contextlib.suppress(CudaError):
                mapped.close()
            if isinstance(error, CudaError):
                raise CannotConnect(f"the pool of process {peer.process.pid} cannot be mapped: {error}") from error
            raise
        return CudaIpcConnection(self, mapped, theirs, peer.rows)

    def _map(self, peer: KvPool, layout: Layout, mapped: ExitStack) -> Tables:
        """A pool on a GPU."""
        owner = ProcessRef(peer.process.pid, peer.process.start_ticks)
        opened: list[int] = []
        with self._stream():
            for allocation in peer.cuda.allocations:
                # One by one: those before a failure are to be closed.
                opened.append(self._memory.open(allocation.handle))
                mapped.callback(self._memory.close, opened[-1])
        # Looked at after the opening, as in shm.
        if not owner.alive():
            raise CannotConnect(f"process {owner.pid}, which had the pool, is gone")
        keys, values = _addresses(peer, layout, opened)
        return pointers(keys, self._device), pointers(values, self._device)

    def _map_shared(self, peer: KvPool, mapped: ExitStack) -> Tables:
        """A pool in shared memory."""
        shared, theirs = open_pool(peer)
        mapped.callback(shared.close)
        self._pin(theirs, shared.size)
        # The views hold the memory where it is.
        mapped.callback(_unpin, self._memory, theirs)
        return table(theirs.keys, self._device), table(theirs.values, self._device)

    def close(self) -> None:
        """Lets go of what is pinned."""
        pinned, self._pinned = self._pinned, 0
        if pinned:
            with self._stream():
                try:
                    self._memory.unpin(pinned)
                except CudaError as error:
                    log.warning("memory stays pinned: %s", error)


class CudaIpcConnection(Connection):
    """Into one peer's mapped pool."""

    def __init__(self, transport: CudaIpcTransport, mapped: ExitStack, theirs: Tables, rows: int) -> None:
        self._transport = transport
        self._mapped = mapped
        self._theirs = theirs
        self._rows = rows

    def wait_for(self, fence: object) -> None:
        """Writes from now on run behind what was launched before the fence."""
        self._transport._stream.wait_for(fence)

    def write(self, source: Slots, target: Slots) -> int:
        """One launch; returns when the rows are there."""
        t = self._transport
        if not len(source):
            return 0
        # The kernel would write wherever it is told to.
        for slots, rows in ((source, t._pool.rows), (target, self._rows)):
            if slots.min() < 0 or slots.max() >= rows:
                raise IndexError(f"slots are not rows 0 to {rows - 1} of the pool")
        if len(source) != len(target):
            raise ValueError(f"{len(source)} rows do not go to {len(target)}")
        with t._stream():
            t._copier.copy(t._ours, self._theirs, t._copier.index(source), t._copier.index(target))
        return len(source) * t._pool.layout.bytes_per_token

    def close(self) -> None:
        """Unmaps the peer's pool."""
        with self._transport._stream():
            try:
                self._mapped.close()
            except CudaError as error:
                log.warning("a mapping is not closed: %s", error)


def _unpin(memory: IpcMemory, pool: Pool) -> None:
    memory.unpin(pool.keys[0].data_ptr())


def _addresses(peer: KvPool, layout: Layout, opened: list[int]) -> tuple[list[int], list[int]]:
    """Where K and V of each layer are here. Raises InvalidArgument when they are not within their allocations."""
    memory = peer.cuda
    if not len(memory.parts) == len(memory.offsets) == 2 * layout.layers:
        raise InvalidArgument(f"the peer's pool has {len(memory.parts)} parts, not {2 * layout.layers}")
    addresses: list[int] = []
    for i, (part, offset) in enumerate(zip(memory.parts, memory.offsets, strict=True)):
        dim = layout.k_dim if i < layout.layers else layout.v_dim
        size = peer.rows * layout.heads * dim * ITEM_BYTES[layout.dtype]
        if part >= len(opened) or offset + size > memory.allocations[part].bytes:
            raise InvalidArgument(f"part {i} of the peer's pool is not within its memory")
        addresses.append(opened[part] + offset)
    return addresses[: layout.layers], addresses[layout.layers :]


def _uuid(device: torch.device) -> str:
    import torch

    if device.type != "cuda":
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
