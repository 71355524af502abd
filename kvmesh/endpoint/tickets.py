"""Tickets: who may write into which slots and generate from them, for how long, and who gives the slots back.

States of a ticket: held → (writing → held)* → used, released or expired. One that is released or expires while a write
is under way is revoked: its slots stay away from others until the writer has stopped, or is known to be dead.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TypeAlias

from kvmesh.aio import Tasks
from kvmesh.dataplane.slots import Slots
from kvmesh.endpoint.base import Reservation
from kvmesh.errors import FailedPrecondition, InvalidArgument, MeshError, NotFound, PermissionDenied
from kvmesh.process import ProcessRef
from kvmesh.v1.common_pb2 import Endpoint
from kvmesh.v1.common_pb2 import Ticket as TicketMessage

log = logging.getLogger(__name__)

WriteKey: TypeAlias = tuple[str, int]

# Ends that are remembered, for the sake of the message; and writes that were said to have stopped.
REMEMBERED = 1024
SECRET_BYTES = 16
# How often writers in doubt are looked at.
LOOK_S = 0.2


@dataclass(eq=False, slots=True)
class Writer:
    """Who writes into a ticket."""

    # Its incarnation, and the number that it gave to the write.
    key: WriteKey
    name: str
    # Empty: they cannot be looked at from here.
    processes: tuple[ProcessRef, ...]
    # It said so itself.
    stopped: bool = False

    def dead(self) -> bool:
        """Whether all its processes are dead."""
        return bool(self.processes) and not any(p.alive() for p in self.processes)


@dataclass(eq=False, slots=True)
class Ticket:
    """Slots for [matched:end) of one prompt; the KV of [0:filled) is there. `slots` are all of [matched:end)."""

    id: int
    reservation: int
    owner: str
    matched: int
    end: int
    filled: int
    slots: Slots
    expires: float
    secret: bytes = field(repr=False)
    writer: Writer | None = None
    # Set when it was taken back during a write.
    revoked: asyncio.Event = field(default_factory=asyncio.Event)
    timer: asyncio.TimerHandle | None = None


def _check_secret(ticket: Ticket, message: TicketMessage) -> None:
    if not hmac.compare_digest(ticket.secret, message.secret):
        raise PermissionDenied(f"ticket.secret is not that of ticket {ticket.id}")


class TicketBook:
    """All tickets of one endpoint. `free` gives a reservation back; `now` is the monotonic clock in seconds."""

    def __init__(
        self, endpoint: Endpoint, fingerprint: str, free: Callable[[int], Coroutine[None, None, None]]
    ) -> None:
        self._endpoint = endpoint
        self._fingerprint = fingerprint
        self._free = free
        self._tasks = Tasks()
        self._ids = itertools.count(1)
        self._tickets: dict[int, Ticket] = {}
        self._ended: OrderedDict[int, str] = OrderedDict()
        self._writers: dict[WriteKey, Writer] = {}
        self._stopped: OrderedDict[WriteKey, None] = OrderedDict()
        # Revoked tickets whose writer has broken off without a word.
        self._doubtful: dict[WriteKey, Ticket] = {}
        self._looking: asyncio.Task[None] | None = None
        self.on_change: Callable[[], None] = lambda: None

    @property
    def count(self) -> int:
        """Tickets held."""
        return len(self._tickets)

    @property
    def quarantined(self) -> int:
        """Slots that wait for a writer to stop."""
        revoked = (t for t in self._tickets.values() if t.revoked.is_set())
        return sum(t.end - t.filled for t in (*revoked, *self._doubtful.values()))

    def open(self, reservation: Reservation, end: int, owner: str, ttl: float) -> TicketMessage:
        """A new ticket for `reservation`, which is the book's from now on; `ttl` in seconds."""
        loop = asyncio.get_running_loop()
        ticket = Ticket(
            next(self._ids),
            reservation.id,
            owner,
            reservation.matched,
            end,
            reservation.matched,
            reservation.slots,
            time.monotonic() + ttl,
            secrets.token_bytes(SECRET_BYTES),
        )
        ticket.timer = loop.call_later(ttl, self._expire, ticket)
        self._tickets[ticket.id] = ticket
        self.on_change()
        return TicketMessage(
            receiver=self._endpoint,
            id=ticket.id,
            matched=ticket.matched,
            end=end,
            expires_unix_ms=int(1000 * (time.time() + ttl)),
            layout_fingerprint=self._fingerprint,
            secret=ticket.secret,
        )

    def get(self, message: TicketMessage) -> Ticket:
        """The ticket held under `message`. Raises NotFound, PermissionDenied, FailedPrecondition for a former life."""
        self._check_life(message)
        ticket = self._tickets.get(message.id)
        if ticket is None or ticket.revoked.is_set():
            how = "was taken back" if ticket is not None else self._ended.get(message.id, "is unknown")
            raise NotFound(f"ticket.id = {message.id} {how}")
        _check_secret(ticket, message)
        return ticket

    def _check_life(self, message: TicketMessage) -> None:
        ours, theirs = self._endpoint, message.receiver
        if theirs.incarnation != ours.incarnation:
            raise FailedPrecondition(
                f"ticket.receiver = {theirs.name} {theirs.incarnation[:8]} is not this life of {ours.name}, "
                f"{ours.incarnation[:8]}"
            )

    def begin_write(self, ticket: Ticket, begin: int, end: int, writer: Writer) -> None:
        """Lets `writer` write tokens [begin:end). Raises InvalidArgument, FailedPrecondition."""
        if any(writer.key in known for known in (self._writers, self._stopped, self._doubtful)):
            raise InvalidArgument(f"write_id = {writer.key[1]} of {writer.name} was used before")
        if ticket.writer is not None:
            raise FailedPrecondition(f"ticket {ticket.id} is being written into by {ticket.writer.name}")
        if begin != ticket.filled or not begin <= end <= ticket.end:
            raise InvalidArgument(
                f"begin = {begin}, end = {end}: ticket {ticket.id} holds {ticket.filled}, and ends at {ticket.end}"
            )
        ticket.writer = self._writers[writer.key] = writer

    def end_write(self, ticket: Ticket, filled: int | None, in_doubt: bool) -> None:
        """The write is over: `filled` is how far now, None when nothing came of it.

        `in_doubt`: the writer may still be at it; the ticket is taken back, and its slots wait for the writer's end.
        """
        writer, ticket.writer = ticket.writer, None
        assert writer is not None, "no write was begun"
        del self._writers[writer.key]
        if filled is not None:
            ticket.filled = filled
        if in_doubt and not writer.stopped:
            log.info(
                "%s broke off its write into ticket %d; the slots wait until it has stopped", writer.name, ticket.id
            )
            self._forget(ticket, "was taken back: its writer broke off")
            ticket.writer = writer
            self._doubtful[writer.key] = ticket
            if self._looking is None or self._looking.done():
                self._looking = self._tasks.start(self._look(), "look after broken writes")
        elif in_doubt:
            self._close(ticket, "was taken back: its writer broke off")
        elif ticket.revoked.is_set():
            self._close(ticket, "was taken back")
        self.on_change()

    def writer_stopped(self, key: WriteKey) -> None:
        """The writer has stopped, and will not write any more. An unknown one is no error."""
        self._stopped[key] = None
        if len(self._stopped) > REMEMBERED:
            self._stopped.popitem(last=False)
        if (writer := self._writers.get(key)) is not None:
            writer.stopped = True
        if (ticket := self._doubtful.pop(key, None)) is not None:
            self._give_back(ticket)

    def check_use(self, ticket: Ticket, begin: int) -> None:
        """Raises FailedPrecondition while it is being written into, InvalidArgument unless it is filled to `begin`."""
        if ticket.writer is not None:
            raise FailedPrecondition(f"ticket {ticket.id} is still being written into by {ticket.writer.name}")
        if begin != ticket.filled:
            raise InvalidArgument(f"begin = {begin}, but ticket {ticket.id} is filled to {ticket.filled}")

    def use(self, ticket: Ticket, begin: int) -> int:
        """Ends the ticket for the sake of a generation; its reservation is the caller's now. Raises as `check_use`."""
        self.check_use(ticket, begin)
        self._forget(ticket, "was used")
        self.on_change()
        return ticket.reservation

    def release(self, message: TicketMessage) -> bool:
        """Takes a ticket back; whether it was held. Raises FailedPrecondition for a former life's, PermissionDenied."""
        self._check_life(message)
        ticket = self._tickets.get(message.id)
        if ticket is None or ticket.revoked.is_set():
            return False
        _check_secret(ticket, message)
        self._revoke(ticket, "was released")
        return True

    def _expire(self, ticket: Ticket) -> None:
        log.info("ticket %d of %s expired", ticket.id, ticket.owner or "nobody")
        self._revoke(ticket, "has expired")

    def _revoke(self, ticket: Ticket, how: str) -> None:
        if ticket.writer is None:
            self._close(ticket, how)
        else:
            ticket.revoked.set()
        self.on_change()

    def _close(self, ticket: Ticket, how: str) -> None:
        self._forget(ticket, how)
        self._give_back(ticket)

    def _forget(self, ticket: Ticket, how: str) -> None:
        if ticket.timer is not None:
            ticket.timer.cancel()
        self._tickets.pop(ticket.id, None)
        self._ended[ticket.id] = how
        if len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)

    def _give_back(self, ticket: Ticket) -> None:
        self._tasks.start(self._free(ticket.reservation), f"give back ticket {ticket.id}")
        self.on_change()

    async def _look(self) -> None:
        """Gives slots back whose writers are dead."""
        while self._doubtful:
            await asyncio.sleep(LOOK_S)
            for key, ticket in list(self._doubtful.items()):
                if ticket.writer is not None and ticket.writer.dead():
                    log.warning("%s is dead: the slots of ticket %d are free", ticket.writer.name, ticket.id)
                    self.writer_stopped(key)

    async def close(self) -> None:
        """Forgets everything: the endpoint stops."""
        for ticket in list(self._tickets.values()):
            self._forget(ticket, "was taken back")
            ticket.revoked.set()
        if self._looking is not None:
            self._looking.cancel()
        try:
            await self._tasks.drain(1.0)
        except MeshError as error:
            log.debug("slots are not given back: %s", error)
        await self._tasks.close()
