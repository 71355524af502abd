"""How simulated KV reaches another engine's slots: over a socket between processes, by a call within one.

What travels is one 64-bit number a token; it takes as long as real KV would, on the links of both sides.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import socket
import struct

import numpy as np

from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.slots import Slots
from kvmesh.errors import Aborted, InvalidArgument, MeshError, Unavailable
from kvmesh.process import ProcessRef
from kvmesh.v1.kv_pb2 import KvPool, Process
from services.engine.sim.content import Values
from services.engine.sim.kv import KvCache
from services.engine.sim.links import Link

log = logging.getLogger(__name__)

TRANSPORT = "sim"
# (tokens, bytes that they stand for); then the slots, int64, and the values, uint64.
_HEAD = struct.Struct("<QQ")
_WRITTEN = b"\x01"
CONNECT_S = 5.0
# A chunk that takes longer than this is given up.
WRITE_S = 120.0


class Inbox:
    """The receiving end of one pool: what comes takes its time on `link`, then it is in the slots."""

    def __init__(self, cache: KvCache, link: Link) -> None:
        self._cache = cache
        self._link = link

    async def take(self, slots: Slots, values: Values, size: int) -> None:
        """One chunk. Raises InvalidArgument for slots that the pool has not."""
        if len(slots) and not (slots.min() > 0 and slots.max() <= self._cache.total):
            raise InvalidArgument(f"slots are not rows 1 to {self._cache.total} of the pool")
        await self._link.carry(size)
        self._cache.values[slots] = values


class Peers(abc.ABC):
    """The way from one engine to the pools of others."""

    @abc.abstractmethod
    async def open(self, inbox: Inbox, layout: Layout, rows: int) -> list[KvPool]:
        """Lets others write to `inbox`; how they find it, once a rank."""

    @abc.abstractmethod
    async def write(self, pool: KvPool, slots: Slots, values: Values, size: int) -> None:
        """Returns when it is in the other's slots. Raises Unavailable, Aborted."""

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

    async def open(self, inbox: Inbox, layout: Layout, rows: int) -> list[KvPool]:
        """Under a number."""
        number = len(self._inboxes) + 1
        self._inboxes[number] = inbox
        me = ProcessRef.current()
        process = Process(pid=me.pid, start_ticks=me.start_ticks)
        return [KvPool(process=process, fd=number, rows=rows, layout=layout.message())] * layout.ranks

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


class SocketPeers(Peers):
    """Engines of one host: a Unix socket without a file, named after process and descriptor."""

    def __init__(self) -> None:
        self._server: asyncio.Server | None = None
        self._inbox: Inbox | None = None
        self._streams: dict[str, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = {}
        self._serving: set[asyncio.StreamWriter] = set()

    async def open(self, inbox: Inbox, layout: Layout, rows: int) -> list[KvPool]:
        """Listens."""
        self._inbox = inbox
        me = ProcessRef.current()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        pool = KvPool(
            process=Process(pid=me.pid, start_ticks=me.start_ticks),
            fd=listener.fileno(),
            rows=rows,
            layout=layout.message(),
        )
        try:
            listener.bind(_name(pool))
            self._server = await asyncio.start_unix_server(self._serve, sock=listener)
        except BaseException:
            listener.close()
            raise
        return [pool] * layout.ranks

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self._inbox is not None
        self._serving.add(writer)
        try:
            while True:
                tokens, size = _HEAD.unpack(await reader.readexactly(_HEAD.size))
                body = await reader.readexactly(16 * tokens)
                slots, values = np.frombuffer(body, np.int64, tokens), np.frombuffer(body, np.uint64, offset=8 * tokens)
                gone = asyncio.ensure_future(reader.read(1))
                taken = asyncio.ensure_future(self._inbox.take(slots, values, size))
                # A sender that hangs up has given up: nothing of it may arrive later.
                await asyncio.wait({gone, taken}, return_when=asyncio.FIRST_COMPLETED)
                if not taken.done() or gone.done():
                    taken.cancel()
                    await asyncio.wait({taken})
                    return
                gone.cancel()
                await asyncio.wait({gone})
                taken.result()
                writer.write(_WRITTEN)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except MeshError as error:
            log.warning("a peer's write is refused: %s", error)
        finally:
            self._serving.discard(writer)
            writer.close()

    async def write(self, pool: KvPool, slots: Slots, values: Values, size: int) -> None:
        """Over a connection of its own for the time."""
        name = _name(pool)
        idle = self._streams.setdefault(name, [])
        reader, writer = idle.pop() if idle else await self._connect(name)
        whole = False
        try:
            writer.write(_HEAD.pack(len(slots), size) + slots.astype(np.int64).tobytes() + values.tobytes())
            async with asyncio.timeout(WRITE_S):
                whole = await reader.readexactly(1) == _WRITTEN
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
            raise Aborted(f"the receiver did not take a chunk: {type(error).__name__}") from error
        finally:
            if whole:
                idle.append((reader, writer))
            else:
                writer.close()

    async def _connect(self, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        # uvloop does not connect to sockets without a file by itself.
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.settimeout(CONNECT_S)
        try:
            await asyncio.to_thread(made.connect, name)
            made.setblocking(False)
            return await asyncio.open_unix_connection(sock=made)
        except OSError as error:
            made.close()
            raise Unavailable(f"the receiver's pool cannot be reached: {error}") from error
        except BaseException:
            made.close()
            raise

    def forget(self, pool: KvPool) -> None:
        """Hangs up."""
        for _, writer in self._streams.pop(_name(pool), []):
            writer.close()

    async def close(self) -> None:
        """Hangs up, and listens no more."""
        for streams in self._streams.values():
            for _, writer in streams:
                writer.close()
        self._streams.clear()
        for writer in list(self._serving):
            writer.close()
        if self._server is not None:
            self._server.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._server.wait_closed()


def _name(pool: KvPool) -> str:
    return f"\0kvmesh-sim-{pool.process.pid}-{pool.process.start_ticks}-{pool.fd}"
