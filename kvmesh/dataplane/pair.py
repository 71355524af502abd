"""Two-sided transports: the sender gathers rows into frames and sends them, the receiver scatters them into its pool.

Each write has a link of its own while it lasts, so that a stuck or dead peer fails that write alone. A link that ended
a write well is kept for the next one between the same two. The receiver names links; names are unique for all time, as
they begin with a number drawn at its start.

A frame is on its way in one buffer while the next is gathered into, or the one before is scattered from, the other.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmesh.dataplane.base import CannotConnect, Connection, Pool, Reception, TwoSidedTransport
from kvmesh.dataplane.layout import Layout, refusal
from kvmesh.dataplane.link import RECEIVER, SENDER, IdleLinks, Link, Links
from kvmesh.dataplane.meet import MeetingPoint, call, pair_store
from kvmesh.dataplane.slots import Slots
from kvmesh.dataplane.staging import Frame, FramePool, frame_rows
from kvmesh.errors import Internal, InvalidArgument, Unavailable
from kvmesh.process import be_nice
from kvmesh.v1.kv_pb2 import KvPool, Meeting

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# The first number of each frame's header, then its rows, then whether another frame of the same piece follows.
MAGIC = 0x6B766D657368
# Once both are there, how long connecting may take.
JOIN_S = 10.0
# How long a frame may take: a link that is slower than FRAME_BYTES in this time is taken for dead.
STALL_S = 15.0
# Pairs of frames for each direction: what more writes at once wait for.
PAIRS = 8


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds: to connect, and for each frame."""

    join: float = JOIN_S
    stall: float = STALL_S


class PairTransport(TwoSidedTransport):
    """For any pool that torch can index. `host` is the address that peers reach this process at."""

    def __init__(
        self,
        pool: Pool,
        links: Links,
        host: str,
        patience: Patience | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name = links.name  # type: ignore[misc]
        self._pool = pool
        self._links = links
        self._patience = patience or Patience()
        self.id = secrets.token_hex(16)
        self._point = MeetingPoint(host)
        # Links that we were the receiver of, and the sender.
        self._inbound, self._outbound = IdleLinks(), IdleLinks()
        rows = frame_rows(pool.layout)
        pinned = str(device) == "cpu" and pool.keys[0].device.type == "cuda"
        self._frames_in, self._frames_out = (FramePool(pool.layout, rows, PAIRS, device, pinned) for _ in range(2))

    def describe(self) -> KvPool:
        """Form, and where the store is; the pair is each write's."""
        meeting = Meeting(address=self._point.address, pair=self.id)
        return KvPool(rows=self._pool.rows, layout=self._pool.layout.message(), meeting=meeting)

    def connect(self, peer: KvPool) -> PairConnection:
        """The sender's end of one write."""
        if difference := refusal(self._pool.layout, Layout.of(peer.layout)):
            raise InvalidArgument(f"the peer's pool has another layout: {difference}")
        meeting = peer.meeting
        link = self._outbound.take(meeting.pair)
        if link is None:
            if not meeting.fresh:
                raise CannotConnect("the connection of an earlier write is not there any more")
            link = self._join(meeting)
        return PairConnection(self._pool, link, meeting.pair, self._outbound, self._frames_out, self._patience)

    def _join(self, meeting: Meeting) -> Link:
        """Raises CannotConnect."""
        deadline = time.monotonic() + self._patience.join
        try:
            with call(meeting.address, meeting.pair, deadline) as where:
                left = max(0.01, deadline - time.monotonic())
                return self._links.join(pair_store(where, left), SENDER, left)
        except Exception as error:
            raise CannotConnect(f"{self.name} to {meeting.address}: {_first_line(error)}") from error

    def accept(self, meeting: Meeting, slots: Slots, seconds: float, done: Callable[[str], None]) -> PairReception:
        """The receiver's end of one write, in a thread of its own."""
        reception = PairReception(self, meeting, slots, time.monotonic() + seconds, done)
        threading.Thread(target=reception.run, name=f"kvmesh-{self.name}-in", daemon=True).start()
        return reception

    def fence(self) -> object:
        """As the base says: only devices need one."""
        device = self._pool.keys[0].device
        return _fence(device) if device.type == "cuda" else None

    def close(self) -> None:
        """Ends all links that no write uses; nobody connects any more."""
        self._point.close()
        self._inbound.close()
        self._outbound.close()

    # For receptions

    def meet(self, pair: str, deadline: float, cancelled: Callable[[], bool]) -> Link:
        """Waits for the sender, then connects. Raises Unavailable and others."""
        with self._point.meet(pair, deadline, cancelled) as where:
            seconds = min(self._patience.join, max(0.01, deadline - time.monotonic()))
            return self._links.join(pair_store(where, seconds), RECEIVER, seconds)


class PairConnection(Connection):
    """The sender's end of one write."""

    def __init__(
        self, pool: Pool, link: Link, name: str, idle: IdleLinks, frames: FramePool, patience: Patience
    ) -> None:
        self._pool = pool
        self._link = link
        self._name = name
        self._idle = idle
        self._frames = frames
        self._patience = patience
        self._broken = False

    def write(self, source: Slots, target: Slots) -> int:
        """Sends rows `source`; the receiver knows where they go."""
        try:
            with self._frames.borrow(time.monotonic() + self._patience.stall, lambda: self._broken) as frames:
                try:
                    with self._link.scope():
                        self._send(frames, source)
                except BaseException:
                    # Before the frames are somebody else's.
                    self.abort()
                    raise
        except BaseException:
            self._broken = True
            raise
        return len(source) * self._pool.layout.bytes_per_token

    def _send(self, frames: tuple[Frame, Frame], source: Slots) -> None:
        size, stall = frames[0].rows, self._patience.stall
        last = None
        for i, at in enumerate(range(0, len(source), size)):
            rows = source[at : at + size]
            if self._broken:
                raise Unavailable("it was given up")
            data = frames[i % 2].gather(self._pool, rows)
            more = at + size < len(source)
            header = self._link.send_header([MAGIC, len(rows), int(more)])
            sent = self._link.send(data)
            # The one before must be gone until its buffer is gathered into again.
            if last is not None:
                last.wait(time.monotonic() + stall)
            header.wait(time.monotonic() + stall)
            last = sent
        if last is not None:
            last.wait(time.monotonic() + stall)

    def wait_for(self, fence: object) -> None:
        """As the base says."""
        self._link.wait_for(fence)

    def abort(self) -> None:
        """Closes the link for both sides. A frame that is on its way holds its staging memory until it is given up:
        gloo does not wake who waits for one that is half sent.
        """
        self._broken = True
        self._link.abort()

    def close(self) -> None:
        """Keeps the link for the next write, unless something went wrong on it. After an abort also during a write."""
        if self._broken:
            self._link.abort()
            # The others to the same receiver may be as dead.
            self._idle.drop(self._name.partition("/")[0] + "/")
        else:
            self._idle.put(self._name, self._link)


class PairReception(Reception):
    """The receiver's end of one write."""

    def __init__(
        self, transport: PairTransport, meeting: Meeting, slots: Slots, deadline: float, done: Callable[[str], None]
    ) -> None:
        self._transport = transport
        self._meeting = meeting
        self._slots = slots
        self._deadline = deadline
        self._done = done
        # Held while rows are written.
        self._lock = threading.Lock()
        self._cancelled = False
        self._link: Link | None = None

    def cancel(self) -> None:
        """The thread may need a moment longer, but does not touch the pool."""
        with self._lock:
            self._cancelled = True
            link = self._link
        if link is not None:
            link.abort()
        else:
            self._transport._point.wake()

    def run(self) -> None:
        """The thread."""
        be_nice()
        error = ""
        try:
            self._receive()
        except Exception as failure:
            error = f"{type(failure).__name__}: {_first_line(failure)}"
            if not isinstance(failure, (Unavailable, RuntimeError, OSError)):
                log.exception("a reception failed")
        finally:
            self._done(error)

    def _receive(self) -> None:
        t, pair = self._transport, self._meeting.pair
        link = t._inbound.take(pair)
        if link is None:
            if not self._meeting.fresh:
                raise Unavailable("the connection of an earlier write is not there any more")
            link = t.meet(pair, self._deadline, lambda: self._cancelled)
        with self._lock:
            cancelled, self._link = self._cancelled, link
        try:
            if cancelled:
                raise Unavailable("it was cancelled")
            at = 0
            with link.scope():
                while at < len(self._slots):
                    at = self._piece(link, at)
        except BaseException:
            link.abort()
            raise
        with self._lock:
            # A cancel from now on must not end what the next write uses.
            self._link = None
            if self._cancelled:
                raise Unavailable("it was cancelled")
        t._inbound.put(pair, link)

    def _piece(self, link: Link, at: int) -> int:
        """Takes the frames of one piece; how far the slots are filled then."""
        t, stall = self._transport, self._transport._patience.stall
        pending, header = link.recv_header()
        # The sender may be computing.
        pending.wait(self._deadline)
        rows, more = self._read(header, at)
        with t._frames_in.borrow(time.monotonic() + stall, lambda: self._cancelled) as frames:
            try:
                i = 0
                data = link.recv(frames[0].bytes(rows))
                while True:
                    begin, count, goes_on = at, rows, more
                    at += rows
                    if goes_on:
                        pending, header = link.recv_header()
                    data.wait(time.monotonic() + stall)
                    if goes_on:
                        pending.wait(time.monotonic() + stall)
                        rows, more = self._read(header, at)
                        data = link.recv(frames[1 - i].bytes(rows))
                    self._scatter(link, frames[i], begin, count)
                    if not goes_on:
                        return at
                    i = 1 - i
            except BaseException:
                # Before the frames are somebody else's.
                link.abort()
                raise

    def _read(self, header: torch.Tensor, at: int) -> tuple[int, bool]:
        magic, rows, more = header.tolist()
        if magic != MAGIC or not 1 <= rows <= min(self._transport._frames_in.rows, len(self._slots) - at):
            raise Internal(f"a frame of {rows} rows came where {len(self._slots) - at} are due")
        return rows, bool(more)

    def _scatter(self, link: Link, frame: Frame, at: int, rows: int) -> None:
        with self._lock:
            if self._cancelled:
                raise Unavailable("it was cancelled")
            frame.scatter(self._transport._pool, self._slots[at : at + rows])
            # Before the lock is let go: after a cancel nothing may be written.
            frame.settle(self._transport._pool)
            link.settle(time.monotonic() + self._transport._patience.stall)


def _fence(device: torch.device | str) -> object:
    import torch

    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0][:300]
