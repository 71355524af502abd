"""Simulated KV between processes: a Unix socket without a file within a host, TCP between hosts.

Whoever connects first shows the secret that only the pool's description has, which is given out with a grant.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import socket
import struct
from typing import TypeAlias

import numpy as np

from kvmesh.dataplane.base import CannotConnect
from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.slots import Slots
from kvmesh.errors import Aborted, InvalidArgument, MeshError
from kvmesh.grpcx import join_address, split_address
from kvmesh.process import ProcessRef
from kvmesh.sim.peers import TCP_TRANSPORT, TRANSPORT, Inbox, Peers, Values
from kvmesh.v1.kv_pb2 import KvPool, Meeting, Process

log = logging.getLogger(__name__)

Stream: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]

# The greeting is this and the secret; READY is the answer.
HELLO, READY = b"kvmesh sim 1\n", b"\x01"
SECRET_BYTES = 16
# (tokens, bytes that they stand for); then the slots, int64, and the values, uint64.
_HEAD = struct.Struct("<QQ")
_WRITTEN = b"\x01"
CONNECT_S = 5.0
# A chunk that takes longer than this is given up.
WRITE_S = 120.0
# How long a writer that gives up waits for the receiver to say that it has stopped.
HANG_UP_S = 2.0
# Who has connected and not greeted; more are turned away.
STRANGERS = 64
# A TCP connection whose other end says nothing is looked after: idle seconds, seconds between looks, looks.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


class SocketPeers(Peers):
    """`host`: the address that other hosts reach this one at; empty: none does."""

    def __init__(self, host: str = "") -> None:
        self._host = host
        self._secret = secrets.token_hex(SECRET_BYTES)
        self._servers: list[asyncio.Server] = []
        self._inbox: Inbox | None = None
        self._idle: dict[str, list[Stream]] = {}
        self._serving: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self._strangers = 0

    async def open(self, inbox: Inbox, layout: Layout, rows: int) -> dict[str, list[KvPool]]:
        """Listens; without TCP, and with a warning, where its address is none of this machine's."""
        try:
            return await self._open(inbox, layout, rows)
        except BaseException:
            await self.close()
            raise

    async def _open(self, inbox: Inbox, layout: Layout, rows: int) -> dict[str, list[KvPool]]:
        self._inbox = inbox
        meeting = Meeting(pair=self._secret, fresh=True)
        me = ProcessRef.current()
        near, listener = KvPool(rows=rows, layout=layout.message(), meeting=meeting), socket.socket(socket.AF_UNIX)
        near.process.CopyFrom(Process(pid=me.pid, start_ticks=me.start_ticks))
        near.fd = listener.fileno()
        try:
            listener.bind(_name(near))
            self._servers.append(await asyncio.start_unix_server(self._serve, sock=listener))
        except BaseException:
            listener.close()
            raise
        pools = {TRANSPORT: [near] * layout.ranks}
        if self._host:
            try:
                meeting.address = await self._listen()
            except OSError as error:
                log.warning("no transport %s: no data port on %r: %s", TCP_TRANSPORT, self._host, error)
            else:
                far = KvPool(rows=rows, layout=layout.message(), meeting=meeting)
                pools[TCP_TRANSPORT] = [far] * layout.ranks
        return pools

    async def _listen(self) -> str:
        found = await asyncio.get_running_loop().getaddrinfo(self._host, 0, type=socket.SOCK_STREAM)
        server = await asyncio.start_server(self._serve, str(found[0][4][0]), 0, family=found[0][0])
        self._servers.append(server)
        return join_address(self._host, server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving[writer] = task
        try:
            if await self._greeted(reader, writer):
                while True:
                    await self._take(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            pass
        except MeshError as error:
            log.warning("a peer's write is refused: %s", error)
        finally:
            self._serving.pop(writer, None)
            writer.close()

    async def _greeted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if self._strangers >= STRANGERS:
            return False
        self._strangers += 1
        try:
            ours = HELLO + self._secret.encode()
            async with asyncio.timeout(CONNECT_S):
                theirs = await reader.readexactly(len(ours))
        finally:
            self._strangers -= 1
        if not hmac.compare_digest(ours, theirs):
            log.warning("a connection to the data port is refused: it does not know the secret")
            return False
        _look_after(writer)
        writer.write(READY)
        return True

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One chunk. Raises IncompleteReadError when the sender has hung up: nothing of it may arrive later."""
        assert self._inbox is not None
        tokens, size = _HEAD.unpack(await reader.readexactly(_HEAD.size))
        if tokens > self._inbox.total:
            raise InvalidArgument(f"a chunk of {tokens} tokens is more than the pool of {self._inbox.total} holds")
        body = await reader.readexactly(16 * tokens)
        slots, values = np.frombuffer(body, np.int64, tokens), np.frombuffer(body, np.uint64, offset=8 * tokens)
        gone = asyncio.ensure_future(reader.read(1))
        taken = asyncio.ensure_future(self._inbox.take(slots, values, size))
        try:
            await asyncio.wait({gone, taken}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done() or not taken.done():
                raise asyncio.IncompleteReadError(b"", None)
            taken.result()
        finally:
            for future in (gone, taken):
                future.cancel()
            await asyncio.wait({gone, taken})
        writer.write(_WRITTEN)
        await writer.drain()

    async def write(self, pool: KvPool, slots: Slots, values: Values, size: int) -> None:
        """Over a connection of its own for the time."""
        name = _name(pool)
        idle = self._idle.setdefault(name, [])
        reader, writer = idle.pop() if idle else await self._connect(pool)
        whole = False
        try:
            writer.write(_HEAD.pack(len(slots), size) + slots.astype(np.int64).tobytes() + values.tobytes())
            async with asyncio.timeout(WRITE_S):
                whole = await reader.readexactly(1) == _WRITTEN
            if not whole:
                raise Aborted("the receiver did not take a chunk: it is not one of us")
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
            raise Aborted(f"the receiver did not take a chunk: {type(error).__name__}") from error
        finally:
            if whole:
                self._idle.setdefault(name, []).append((reader, writer))
            else:
                await _hang_up(reader, writer)

    async def _connect(self, pool: KvPool) -> Stream:
        self._sweep()
        stream: Stream | None = None
        try:
            async with asyncio.timeout(CONNECT_S):
                stream = await (_far(pool.meeting.address) if pool.meeting.address else _near(_name(pool)))
                reader, writer = stream
                _look_after(writer)
                writer.write(HELLO + pool.meeting.pair.encode())
                if await reader.readexactly(1) != READY:
                    raise ConnectionError("it is not one of us")
        except (asyncio.IncompleteReadError, OSError) as error:
            if stream is not None:
                stream[1].close()
            why = f"within {CONNECT_S:g} s" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
            raise CannotConnect(f"the receiver's pool cannot be reached: {why}") from error
        except BaseException:
            if stream is not None:
                stream[1].close()
            raise
        return stream

    def _sweep(self) -> None:
        """Lets go of connections whose other end has gone."""
        for name, streams in list(self._idle.items()):
            for stream in [s for s in streams if s[0].at_eof() or s[1].is_closing()]:
                streams.remove(stream)
                stream[1].close()
            if not streams:
                del self._idle[name]

    def forget(self, pool: KvPool) -> None:
        """Hangs up."""
        for _, writer in self._idle.pop(_name(pool), []):
            writer.close()

    async def close(self) -> None:
        """Hangs up, and listens no more."""
        for streams in self._idle.values():
            for _, writer in streams:
                writer.close()
        self._idle.clear()
        tasks = set(self._serving.values())
        for writer in self._serving:
            writer.close()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)
        for server in self._servers:
            server.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await server.wait_closed()


async def _near(name: str) -> Stream:
    # uvloop does not connect to sockets without a file by itself.
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(CONNECT_S)
    try:
        await asyncio.to_thread(made.connect, name)
        made.setblocking(False)
        return await asyncio.open_unix_connection(sock=made)
    except BaseException:
        made.close()
        raise


async def _far(address: str) -> Stream:
    return await asyncio.open_connection(*split_address(address))


async def _hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Returns when the receiver has stopped with what it was sent, or has had time to."""
    try:
        with contextlib.suppress(OSError, TimeoutError):
            writer.write_eof()
            async with asyncio.timeout(HANG_UP_S):
                while await reader.read(64):
                    pass
    finally:
        writer.close()


def _look_after(writer: asyncio.StreamWriter) -> None:
    made = writer.get_extra_info("socket")
    if made.family in (socket.AF_INET, socket.AF_INET6):
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in _KEEPALIVE:
            made.setsockopt(socket.IPPROTO_TCP, option, seconds)


def _name(pool: KvPool) -> str:
    if pool.meeting.address:
        return f"{pool.meeting.address} {pool.meeting.pair}"
    return f"\0kvmesh-sim-{pool.process.pid}-{pool.process.start_ticks}-{pool.fd}"
