"""How simulated KV reaches another pool's slots: by a call within a process; between processes, see sockets.

What travels is one 64-bit number a token; it takes as long as real KV would, on the links of both sides.
"""

from __future__ import annotations

import abc
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvmesh.dataplane.choice import SIMULATED
from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.slots import Slots
from kvmesh.errors import InvalidArgument, Unavailable
from kvmesh.process import ProcessRef
from kvmesh.sim.links import Link
from kvmesh.v1.kv_pb2 import KvPool, Process

# What stands for the KV of tokens, one number each.
Values: TypeAlias = npt.NDArray[np.uint64]
# Within a host, and between hosts.
TRANSPORT, TCP_TRANSPORT = SIMULATED, "sim_tcp"


class Cells(Protocol):
    """A pool of `total` slots, rows 1 to `total`, and what is in each row."""

    @property
    def total(self) -> int: ...

    @property
    def values(self) -> Values: ...


class Inbox:
    """The receiving end of one pool: what comes takes its time on `link`, then it is in the slots."""

    def __init__(self, cells: Cells, link: Link) -> None:
        self._cells = cells
        self._link = link

    @property
    def total(self) -> int:
        """Slots of the pool."""
        return self._cells.total

    async def take(self, slots: Slots, values: Values, size: int) -> None:
        """One chunk. Raises InvalidArgument for slots that the pool has not."""
        if len(slots) and not (slots.min() > 0 and slots.max() <= self._cells.total):
            raise InvalidArgument(f"slots are not rows 1 to {self._cells.total} of the pool")
        await self._link.carry(size)
        self._cells.values[slots] = values


class Peers(abc.ABC):
    """The way from one engine to the pools of others."""

    @abc.abstractmethod
    async def open(self, inbox: Inbox, layout: Layout, rows: int) -> dict[str, list[KvPool]]:
        """Lets others write to `inbox`; how they find it by each transport, best first, once a rank."""

    @abc.abstractmethod
    async def write(self, pool: KvPool, slots: Slots, values: Values, size: int) -> None:
        """Returns when it is in the other's slots. Raises CannotConnect, Unavailable, Aborted.

        However it ends, nothing of it is written any more.
        """

    @abc.abstractmethod
    def forget(self, pool: KvPool) -> None:
        """That pool is gone."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Ends everything."""


class LocalPeers(Peers):
    """Engines of one process, which share one instance."""

    def __init__(self) -> None:
        self._inboxes: dict[int, Inbox] = {}

    async def open(self, inbox: Inbox, layout: Layout, rows: int) -> dict[str, list[KvPool]]:
        """Under a number."""
        number = len(self._inboxes) + 1
        self._inboxes[number] = inbox
        me = ProcessRef.current()
        process = Process(pid=me.pid, start_ticks=me.start_ticks)
        return {TRANSPORT: [KvPool(process=process, fd=number, rows=rows, layout=layout.message())] * layout.ranks}

    async def write(self, pool: KvPool, slots: Slots, values: Values, size: int) -> None:
        """A call."""
        inbox = self._inboxes.get(pool.fd)
        if inbox is None:
            raise Unavailable("the receiver's pool is gone")
        await inbox.take(slots, values, size)

    def forget(self, pool: KvPool) -> None:
        """Nothing is kept."""

    async def close(self) -> None:
        """Nothing is kept."""
