"""The thread that copies KV to peers, beside the scheduler's."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from kvmesh.dataplane.base import Connection, Transport
from kvmesh.dataplane.slots import Slots
from kvmesh.v1.kv_pb2 import KvPool

# Ways into peers that are kept open; the least recently used one goes first.
CONNECTIONS = 64


@dataclass(eq=False)
class Stream:
    """The copies of one send job, in order. Written to by the copier; read by the scheduler once `idle`."""

    transport: str
    peer: bytes
    # (begin ns, end ns, tokens, bytes) of each copy.
    pieces: list[int] = field(default_factory=list)
    error: str = ""
    cancelled: bool = False
    # Copies handed over and not finished.
    pending: int = 0

    @property
    def idle(self) -> bool:
        """Nothing of it is being written."""
        return self.pending == 0


@dataclass(slots=True)
class _Piece:
    stream: Stream
    source: Slots
    target: Slots


class Copier:
    """Owns the connections. `submit`, `forget` and `finished` are for the scheduler's thread.

    `wake` is called from the copier's thread after each copy.
    """

    def __init__(self, transports: dict[str, Transport], wake: Callable[[], None]) -> None:
        self._transports = transports
        self._wake = wake
        self._work: queue.SimpleQueue[_Piece | bytes] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[Stream] = queue.SimpleQueue()
        self._connections: OrderedDict[bytes, Connection] = OrderedDict()
        threading.Thread(target=self._run, name="kvmesh-copier", daemon=True).start()

    def submit(self, stream: Stream, source: Slots, target: Slots) -> None:
        """Copies rows `source` of our pool to rows `target` of the stream's peer, after what was submitted before."""
        stream.pending += 1
        self._work.put(_Piece(stream, source, target))

    def forget(self, peer: bytes) -> None:
        """Closes the way into `peer`, after what was submitted before."""
        self._work.put(peer)

    def finished(self) -> list[Stream]:
        """Streams of which a copy has ended since the last call, with `pending` brought up to date."""
        streams: list[Stream] = []
        while True:
            try:
                stream = self._finished.get_nowait()
            except queue.Empty:
                return streams
            stream.pending -= 1
            streams.append(stream)

    def _run(self) -> None:
        # Copies must not hold up what they overlap with: the computing of the next chunk.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
        while True:
            work = self._work.get()
            if isinstance(work, bytes):
                self._close(work)
                continue
            try:
                self._copy(work)
            except Exception as error:
                work.stream.error = f"{type(error).__name__}: {error}"
                self._close(work.stream.peer)
            finally:
                self._finished.put(work.stream)
                self._wake()

    def _copy(self, piece: _Piece) -> None:
        stream = piece.stream
        if stream.cancelled or stream.error:
            return
        begin = time.monotonic_ns()
        count = self._connection(stream).write(piece.source, piece.target)
        stream.pieces += (begin, time.monotonic_ns(), len(piece.source), count)

    def _connection(self, stream: Stream) -> Connection:
        connection = self._connections.get(stream.peer)
        if connection is None:
            connection = self._transports[stream.transport].connect(KvPool.FromString(stream.peer))
            self._connections[stream.peer] = connection
            if len(self._connections) > CONNECTIONS:
                self._close(next(iter(self._connections)))
        self._connections.move_to_end(stream.peer)
        return connection

    def _close(self, peer: bytes) -> None:
        if (connection := self._connections.pop(peer, None)) is not None:
            connection.close()
