"""Copies rows of the store's pool into peers' pools, beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from kvmesh.dataplane.base import Connection, Pool, Transport, TwoSidedTransport
from kvmesh.dataplane.checksum import checksum as checksum_of
from kvmesh.dataplane.checksum import compare
from kvmesh.dataplane.slots import Slots
from kvmesh.dataplane.ways import Ways
from kvmesh.endpoint.base import Arrival, Destination, Piece
from kvmesh.endpoint.local import LocalArrivals
from kvmesh.errors import DataLoss, MeshError, Unavailable
from kvmesh.v1.kv_pb2 import KvPool
from services.kvstore.carrier import PIECE_BYTES, Carrier

# Copies at once that can wait for their peers.
WAITING = 64


class Mover(Carrier):
    """The ways between `pool` and others over `transports`, which it owns.

    Copies through one-sided transports take turns in one thread, and keep their connections. One through a two-sided
    transport has a thread and a connection of its own, since it can wait for its peer.
    """

    def __init__(self, transports: Mapping[str, Transport], pool: Pool) -> None:
        self.pools = {name: [transport.describe()] for name, transport in transports.items()}
        self._transports = transports
        self._arrivals = LocalArrivals(transports)
        self._pool = pool
        self._rows = max(64, PIECE_BYTES // pool.layout.bytes_per_token)
        self._ways = Ways()
        self._thread = ThreadPoolExecutor(1, "kvstore-mover", initializer=_alone)
        self._threads = ThreadPoolExecutor(WAITING, "kvstore-send", initializer=_alone)

    async def copy(self, source: Slots, to: Destination) -> list[Piece]:
        """As the base says."""
        if not len(source):
            return []
        if isinstance(self._transports[to.transport], TwoSidedTransport):
            return await self._copy_apart(source, to)

        pieces: list[Piece] = []
        for source_part, target_part in self._parts(source, to.slots):
            copying = asyncio.get_running_loop().run_in_executor(self._thread, self._copy, source_part, target_part, to)
            try:
                pieces.append(await asyncio.shield(copying))
            except asyncio.CancelledError:
                while not copying.done():
                    await asyncio.wait({copying})
                _seen(copying)
                raise
        return pieces

    def _parts(self, source: Slots, target: Slots) -> Iterator[tuple[Slots, Slots]]:
        for at in range(0, len(source), self._rows):
            yield source[at : at + self._rows], target[at : at + self._rows]

    async def _copy_apart(self, source: Slots, to: Destination) -> list[Piece]:
        """Through a two-sided transport. A cancel does not wait for the peer: what is written is written by it."""
        run = asyncio.get_running_loop().run_in_executor
        connecting = run(self._threads, self._transports[to.transport].connect, to.pools[0])
        try:
            connection = await asyncio.shield(connecting)
        except asyncio.CancelledError:
            connecting.add_done_callback(_drop)
            raise
        pieces: list[Piece] = []
        try:
            for source_part, target_part in self._parts(source, to.slots):
                writing = run(self._threads, self._write, connection, source_part, target_part, to.checksum)
                writing.add_done_callback(_seen)
                pieces.append(await asyncio.shield(writing))
        except BaseException:
            connection.abort()
            raise
        finally:
            connection.close()
        return pieces

    def two_sided(self, transport: str) -> bool:
        """As the base says."""
        return self._arrivals.two_sided(transport)

    def accept(self, transport: str, sender: str, slots: Slots, seconds: float, fresh: bool) -> Arrival:
        """As the base says."""
        return self._arrivals.accept(transport, sender, slots, seconds, fresh)

    async def verify(self, slots: Slots, sums: Sequence[tuple[int, Sequence[int]]]) -> None:
        """As the base says."""
        if any(len(ranks) != 1 for _, ranks in sums):
            raise DataLoss("checksums are not of one rank")
        pairs = [(tokens, ranks[0]) for tokens, ranks in sums]
        run = asyncio.get_running_loop().run_in_executor
        if error := await run(self._thread, compare, self._pool, slots, pairs):
            raise DataLoss(error)

    def forget(self, peers: Sequence[KvPool]) -> None:
        """Closes the ways into these pools."""
        for peer in peers:
            self._thread.submit(self._ways.close, peer.SerializeToString(deterministic=True))

    def _copy(self, source: Slots, target: Slots, to: Destination) -> Piece:
        """Over a connection that is kept, unless something goes wrong on it."""
        peer, transport = to.pools[0], self._transports[to.transport]
        name = peer.SerializeToString(deterministic=True)
        try:
            connection = self._ways.get(name, lambda: transport.connect(peer))
            return self._write(connection, source, target, to.checksum)
        except BaseException:
            self._ways.close(name)
            raise

    def _write(self, connection: Connection, source: Slots, target: Slots, checksum: bool) -> Piece:
        begin = time.monotonic_ns()
        try:
            count = connection.write(source, target)
        except MeshError:
            raise
        except Exception as error:
            raise Unavailable(f"copying to the receiver failed: {type(error).__name__}: {error}") from error
        end = time.monotonic_ns()
        sums = (checksum_of(self._pool, source),) if checksum else ()
        return Piece(begin, end, len(source), count, sums)

    async def close(self) -> None:
        """As the base says."""
        for transport in self._transports.values():
            transport.close()
        self._thread.submit(self._ways.close_all)
        self._thread.shutdown(wait=True)
        # Those that still connect end by their own deadlines.
        self._threads.shutdown(wait=False, cancel_futures=True)


def _drop(connecting: asyncio.Future[Connection]) -> None:
    with contextlib.suppress(Exception, asyncio.CancelledError):
        connection = connecting.result()
        connection.abort()
        connection.close()


def _seen(work: asyncio.Future[Piece]) -> None:
    """A failure that nobody waits for any more is not to be reported as forgotten."""
    if not work.cancelled():
        work.exception()


def _alone() -> None:
    import torch

    # Copies of a few hundred KiB each: several threads spend more time on meeting than on copying.
    torch.set_num_threads(1)
