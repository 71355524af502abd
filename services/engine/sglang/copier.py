"""The threads that copy KV to peers, beside the scheduler's."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvmesh.dataplane.base import Connection, Pool, Transport, TwoSidedTransport
from kvmesh.dataplane.checksum import checksum, compare
from kvmesh.dataplane.slots import Slots
from kvmesh.dataplane.ways import Ways
from kvmesh.process import be_nice
from kvmesh.v1.kv_pb2 import KvPool

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Stream:
    """The copies of one send job, in order. Written to by the copier; read by the scheduler once `idle`."""

    transport: str
    peer: bytes
    checksum: bool = False
    # (begin ns, end ns, tokens, bytes) of each copy, and its checksum.
    pieces: list[int] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)
    error: str = ""
    # What failed is the connecting.
    unconnected: bool = False
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
    fence: object


class Copier:
    """Owns the connections. All methods are for the scheduler's thread.

    One-sided transports share one thread. A write through a two-sided one has a thread of its own, since it can wait
    for its peer. `wake` is called from these threads after each copy.
    """

    def __init__(self, transports: dict[str, Transport], pool: Pool, wake: Callable[[], None]) -> None:
        self._transports = transports
        self._pool = pool
        self._wake = wake
        self._finished: queue.SimpleQueue[Stream] = queue.SimpleQueue()
        self._shared = _Shared(self)
        self._lanes: dict[int, _Lane] = {}

    def open(self, stream: Stream) -> None:
        """Before the first `submit`: begins to connect, where connecting takes time."""
        if isinstance(self._transports.get(stream.transport), TwoSidedTransport):
            self._lanes[id(stream)] = _Lane(self, stream)

    def submit(self, stream: Stream, source: Slots, target: Slots) -> None:
        """Copies rows `source` of our pool to rows `target` of the stream's peer, after what was submitted before."""
        stream.pending += 1
        # One that is not there fails in the thread, as connecting does.
        transport = self._transports.get(stream.transport)
        work = _Piece(stream, source, target, None if transport is None else transport.fence())
        lane = self._lanes.get(id(stream))
        if lane is not None:
            lane.put(work)
        else:
            self._shared.work.put(work)

    def cancel(self, stream: Stream) -> None:
        """Copies nothing more; one that waits for its peer ends soon."""
        stream.cancelled = True
        if (lane := self._lanes.get(id(stream))) is not None:
            lane.abort()

    def close(self, stream: Stream) -> None:
        """After the last copy of it."""
        if (lane := self._lanes.pop(id(stream), None)) is not None:
            lane.put(None)

    def forget(self, peer: bytes) -> None:
        """Closes the way into `peer`, after what was submitted before."""
        self._shared.work.put(peer)

    def verify(self, slots: Slots, tokens: list[int], sums: list[int], done: Callable[[str], None]) -> None:
        """Compares checksums of our rows, in the shared thread; `done` gets what is wrong."""

        def look() -> None:
            try:
                error = compare(self._pool, slots, zip(tokens, sums, strict=True))
            except Exception as failure:
                log.exception("a checksum failed")
                error = f"{type(failure).__name__}: {failure}"
            done(error)

        self._shared.work.put(look)

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

    # For the threads

    def connect(self, stream: Stream) -> Connection:
        """Raises what the transport raises; the stream knows of it then."""
        try:
            return self._transports[stream.transport].connect(KvPool.FromString(stream.peer))
        except Exception as error:
            stream.unconnected = True
            stream.error = f"{type(error).__name__}: {error}"
            raise

    def over(self, stream: Stream) -> None:
        """One of its copies has ended."""
        self._finished.put(stream)
        self._wake()

    def copy(self, piece: _Piece, way: Callable[[], Connection]) -> bool:
        """One copy; whether it went well. `way` gives the connection."""
        stream = piece.stream
        try:
            if not stream.cancelled and not stream.error:
                begin = time.monotonic_ns()
                connection = way()
                if piece.fence is not None:
                    connection.wait_for(piece.fence)
                count = connection.write(piece.source, piece.target)
                # Else it may have been answered already.
                if not stream.cancelled:
                    stream.pieces += (begin, time.monotonic_ns(), len(piece.source), count)
                if stream.checksum:
                    stream.sums.append(checksum(self._pool, piece.source))
            return True
        except Exception as error:
            stream.error = stream.error or f"{type(error).__name__}: {error}"
            return False


class _Shared:
    """The thread for one-sided transports."""

    def __init__(self, copier: Copier) -> None:
        self._copier = copier
        self.work: queue.SimpleQueue[_Piece | bytes | Callable[[], None]] = queue.SimpleQueue()
        self._ways = Ways()
        threading.Thread(target=self._run, name="kvmesh-copier", daemon=True).start()

    def _run(self) -> None:
        be_nice()
        while True:
            work = self.work.get()
            if isinstance(work, bytes):
                self._ways.close(work)
            elif isinstance(work, _Piece):
                if not self._copier.copy(work, lambda stream=work.stream: self._way(stream)):  # type: ignore[misc]
                    self._ways.close(work.stream.peer)
                self._copier.over(work.stream)
            else:
                work()

    def _way(self, stream: Stream) -> Connection:
        return self._ways.get(stream.peer, lambda: self._copier.connect(stream))


class _Lane:
    """The thread of one stream through a two-sided transport."""

    def __init__(self, copier: Copier, stream: Stream) -> None:
        self._copier = copier
        self._stream = stream
        self._work: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        # What the thread copies, until it has ended or nobody waits for that any more.
        self._current: _Piece | None = None
        threading.Thread(target=self._run, name="kvmesh-send", daemon=True).start()

    def put(self, piece: _Piece | None) -> None:
        """None ends it."""
        self._work.put(piece)
        if self._stream.cancelled:
            self.abort()

    def abort(self) -> None:
        """Of a stream that is cancelled: all that was submitted is over, whenever the thread finds out.

        It may be connecting, or waiting for a peer that is gone: that is not waited for (Connection.abort).
        """
        with self._lock:
            connection = self._connection
            over = [] if self._current is None else [self._current]
            self._current = None
            ended = False
            while not self._work.empty():
                piece = self._work.get()
                if piece is None:
                    ended = True
                else:
                    over.append(piece)
            if ended:
                self._work.put(None)
        for piece in over:
            self._copier.over(piece.stream)
        if connection is not None:
            connection.abort()

    def _run(self) -> None:
        be_nice()
        try:
            connection = self._copier.connect(self._stream)
        except Exception as error:
            log.info("no connection: %s", error)
            connection = None
        with self._lock:
            self._connection = connection
        while (piece := self._next()) is not None:
            # A stream with an error copies nothing.
            self._copier.copy(piece, lambda: connection or _no_connection())
            with self._lock:
                ours, self._current = self._current is piece, None
            if ours:
                self._copier.over(piece.stream)
        with self._lock:
            self._connection = None
        if connection is not None:
            if self._stream.cancelled or self._stream.error:
                connection.abort()
            connection.close()

    def _next(self) -> _Piece | None:
        while True:
            piece = self._work.get()
            with self._lock:
                if piece is None or not self._stream.cancelled:
                    self._current = piece
                    return piece
            self._copier.over(piece.stream)


def _no_connection() -> Connection:
    raise AssertionError("a stream with an error copies nothing")
