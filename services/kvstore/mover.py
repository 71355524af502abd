"""Copies rows of the store's pool into peers' pools, in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from kvmesh.dataplane.base import Connection, Transport
from kvmesh.dataplane.slots import Slots
from kvmesh.endpoint.base import Piece
from kvmesh.errors import MeshError, Unavailable
from kvmesh.v1.kv_pb2 import KvPool

log = logging.getLogger(__name__)

# Ways into peers that are kept open; the least recently used one goes first.
CONNECTIONS = 64
# A copy takes so many bytes at a time: a cancel waits for one piece.
PIECE_BYTES = 16 << 20


class Mover:
    """Owner of the connections of one pool."""

    def __init__(self, transports: Mapping[str, Transport], bytes_per_token: int) -> None:
        self._transports = transports
        self._rows = max(64, PIECE_BYTES // bytes_per_token)
        self._connections: OrderedDict[bytes, Connection] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "kvstore-mover", initializer=_alone)

    async def copy(self, transport: str, peer: KvPool, source: Slots, target: Slots) -> list[Piece]:
        """Copies rows `source` of our pool to rows `target` of the peer's. Raises Unavailable.

        Nothing is being written any more when it returns or raises.
        """
        pieces: list[Piece] = []
        loop = asyncio.get_running_loop()
        for at in range(0, len(source), self._rows):
            part = slice(at, at + self._rows)
            work = loop.run_in_executor(self._thread, self._copy, transport, peer, source[part], target[part])
            try:
                pieces.append(await asyncio.shield(work))
            except asyncio.CancelledError:
                while not work.done():
                    await asyncio.wait({work})
                raise
        return pieces

    def forget(self, peers: Sequence[KvPool]) -> None:
        """Closes the ways into these pools."""
        for peer in peers:
            self._thread.submit(self._close, peer.SerializeToString(deterministic=True))

    def _copy(self, transport: str, peer: KvPool, source: Slots, target: Slots) -> Piece:
        name = peer.SerializeToString(deterministic=True)
        begin = time.monotonic_ns()
        try:
            count = self._connection(transport, peer, name).write(source, target)
        except Exception as error:
            self._close(name)
            if isinstance(error, MeshError):
                raise
            raise Unavailable(f"copying to the receiver failed: {type(error).__name__}: {error}") from error
        return Piece(begin, time.monotonic_ns(), len(source), count)

    def _connection(self, transport: str, peer: KvPool, name: bytes) -> Connection:
        connection = self._connections.get(name)
        if connection is None:
            connection = self._connections[name] = self._transports[transport].connect(peer)
            if len(self._connections) > CONNECTIONS:
                self._close(next(iter(self._connections)))
        self._connections.move_to_end(name)
        return connection

    def _close(self, name: bytes) -> None:
        if (connection := self._connections.pop(name, None)) is not None:
            connection.close()

    def close(self) -> None:
        """Closes all of them."""
        for name in list(self._connections):
            self._thread.submit(self._close, name)
        self._thread.shutdown(wait=True)


def _alone() -> None:
    import torch

    # Copies of a few hundred KiB each: several threads spend more time on meeting than on copying.
    torch.set_num_threads(1)
