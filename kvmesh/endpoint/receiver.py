"""The receiving side: reserves slots, grants writes into them, and makes what has arrived usable."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from kvmesh.aio import Tasks
from kvmesh.dataplane.choice import choose
from kvmesh.dataplane.layout import Layout, refusal
from kvmesh.dataplane.slots import Slots, to_runs
from kvmesh.endpoint.base import Arrival, KvHolder
from kvmesh.endpoint.tickets import Ticket, TicketBook, Writer
from kvmesh.errors import Aborted, DataLoss, DeadlineExceeded, FailedPrecondition, InvalidArgument, Unavailable
from kvmesh.process import ProcessRef
from kvmesh.v1 import kv_pb2 as pb
from kvmesh.v1.common_pb2 import KvLayout
from kvmesh.v1.common_pb2 import Ticket as TicketMessage

log = logging.getLogger(__name__)

DEFAULT_TTL_MS, MIN_TTL_MS, MAX_TTL_MS = 30_000, 100, 600_000
MAX_WAIT_MS = 600_000
# A writer says what it wants, and that it is done, within so many seconds; the write itself has the ticket's life.
WORD_S = 10.0
# Ways that a writer may find unusable before it is refused.
MAX_GRANTS = 6


class _Way:
    """How one write gets here: the transport, and our part of it if it is two-sided."""

    def __init__(self, begin: pb.WriteBegin, ticket: Ticket, same_host: bool) -> None:
        self.begin = begin
        self.ticket = ticket
        self.same_host = same_host
        self.slots: Slots = ticket.slots[begin.begin - ticket.matched : begin.end - ticket.matched]
        self.transport = ""
        self.arrival: Arrival | None = None
        # The sender itself writes into the slots, as far as we know.
        self.direct = False
        self.failed: set[str] = set()
        self.grants = 0

    @property
    def reused(self) -> bool:
        """It goes over a connection of an earlier write."""
        return self.arrival is not None and not all(pool.meeting.fresh for pool in self.arrival.pools)

    @property
    def left(self) -> float:
        """Seconds of the ticket's life."""
        return max(0.001, self.ticket.expires - time.monotonic())


class Receiver:
    """PrepRecv, Release and KvPeer over one holder of KV and its ticket book."""

    def __init__(self, holder: KvHolder, book: TicketBook, host_id: str, checksum: bool = False) -> None:
        self._holder = holder
        self._book = book
        self._host_id = host_id
        self._checksum = checksum
        self._tasks = Tasks()

    async def prepare(
        self,
        token_ids: Sequence[int],
        end: int,
        ttl_ms: int,
        wait: float,
        owner: str,
        sender_layout: KvLayout | None = None,
    ) -> TicketMessage:
        """Reserves slots up to `end`, rounded down to a block; waits `wait` seconds for room. Raises MeshError.

        `sender_layout`: of the KV that is to come, if that is known.
        """
        if sender_layout is not None:
            self._check_layout(sender_layout)
        block = self._holder.block_tokens
        end = end // block * block
        reservation = await self._holder.reserve(token_ids, end, wait)
        ticket = self._book.open(reservation, end, owner, ttl_ms / 1000)
        ticket.layout.CopyFrom(self._holder.layout.message())
        return ticket

    def release(self, ticket: TicketMessage) -> bool:
        """Takes a ticket back."""
        return self._book.release(ticket)

    async def write(self, requests: AsyncIterator[pb.WriteRequest], context: Any) -> None:
        """One KvPeer.Write from its first to its last message."""
        first = await self._word(requests, "begin")
        begin = first.begin
        ticket = self._book.get(begin.ticket)
        self._check_layout(begin.layout)
        same_host = begin.location.host_id == self._host_id
        transport = choose(begin.transports, self._holder.pools, same_host)
        if begin.end % (page := self._holder.layout.page_size):
            raise InvalidArgument(f"end = {begin.end} is no multiple of the page size {page}")
        key = (begin.sender.incarnation, begin.write_id)
        writer = Writer(key, begin.sender.name, self._processes(begin.location))
        self._book.begin_write(ticket, begin.begin, begin.end, writer)
        way = _Way(begin, ticket, same_host)
        filled: int | None = None
        in_doubt = True
        try:
            await context.write(pb.WriteResponse(grant=self._grant(way, transport)))
            while (word := await self._next(requests, way)).WhichOneof("event") == "another":
                await context.write(pb.WriteResponse(grant=await self._another(way, word.another)))
            await self._arrived(way)
            in_doubt = False
            if ticket.revoked.is_set():
                raise Aborted(f"ticket {ticket.id} was taken back during the write")
            if word.done.sums:
                await self._holder.verify(way.slots, [(s.tokens, tuple(s.ranks)) for s in word.done.sums])
            elif self._checksum and begin.end > begin.begin:
                raise DataLoss("the sender gave no checksums, and they are required here")
            await self._publish(ticket, begin.end)
            filled = begin.end
        finally:
            if in_doubt and way.arrival is not None:
                # We ourselves write what comes in: nobody gets the slots before that has ended.
                self._tasks.start(self._stop(way.arrival, ticket, key), f"end the write of {begin.sender.name}")
            else:
                self._book.end_write(ticket, filled, in_doubt)
                if in_doubt and not way.direct:
                    self._book.writer_stopped(key)
        # Last: who hears of it may use the ticket at once.
        await context.write(pb.WriteResponse(committed=pb.WriteCommitted(filled=filled)))

    def _check_layout(self, theirs: KvLayout) -> None:
        if difference := refusal(self._holder.layout, Layout.of(theirs)):
            raise FailedPrecondition(f"the sender's KV has another layout: {difference}")

    async def _stop(self, arrival: Arrival, ticket: Ticket, key: tuple[str, int]) -> None:
        await _end(arrival.task)
        self._book.end_write(ticket, None, in_doubt=True)
        # No need to wait for the sender.
        self._book.writer_stopped(key)

    async def close(self) -> None:
        """Ends what is under way."""
        await self._tasks.drain(1.0)
        await self._tasks.close()

    async def _publish(self, ticket: Ticket, upto: int) -> None:
        try:
            await self._holder.publish(ticket.reservation, upto)
        except BaseException:
            # Whether others use these slots by now is not known: nobody may write into them again.
            ticket.revoked.set()
            raise

    def stopped(self, sender_incarnation: str, write_id: int) -> None:
        """The writer of a broken write has stopped."""
        self._book.writer_stopped((sender_incarnation, write_id))

    async def _word(self, requests: AsyncIterator[pb.WriteRequest], event: str) -> pb.WriteRequest:
        try:
            async with asyncio.timeout(WORD_S):
                request = await anext(requests, None)
        except TimeoutError:
            raise DeadlineExceeded(f"the writer did not say {event} within {WORD_S:g} s") from None
        return _check(request, event)

    async def _next(self, requests: AsyncIterator[pb.WriteRequest], way: _Way) -> pb.WriteRequest:
        """Waits for `done` or `another`.

        Raises Aborted when the ticket is taken back, InvalidArgument for another message, Unavailable when our part of
        it fails.
        """
        ticket = way.ticket
        word = asyncio.ensure_future(anext(requests, None))
        taken = asyncio.ensure_future(ticket.revoked.wait())
        try:
            waiting: set[asyncio.Future[Any]] = {word, taken}
            if way.arrival is not None:
                waiting.add(way.arrival.task)
            deadline = time.monotonic() + max(0.1, way.left) + 1.0
            while not word.done() and not taken.done() and (left := deadline - time.monotonic()) > 0:
                done, _ = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if way.arrival is not None and way.arrival.task in done:
                    waiting.discard(way.arrival.task)
                    if not word.done() and _failed(way.arrival.task):
                        # The writer finds out as well, and may want another way.
                        deadline = min(deadline, time.monotonic() + WORD_S)
            if taken.done() or not word.done():
                if way.arrival is not None and way.arrival.task.done():
                    way.arrival.task.result()
                raise Aborted(f"ticket {ticket.id} was taken back during the write")
            request = word.result()
        finally:
            word.cancel()
            taken.cancel()
            await asyncio.gather(word, taken, return_exceptions=True)
        return _check(request, "done", "another")

    async def _another(self, way: _Way, word: pb.WriteAnother) -> pb.WriteGrant:
        """Another way for a writer that cannot use the one that it was granted."""
        if word.transport != way.transport:
            raise InvalidArgument(f"another.transport = {word.transport!r} was not granted: {way.transport} was")
        if way.grants >= MAX_GRANTS:
            raise Unavailable(f"{way.grants} ways were tried; the last failed: {word.reason}")
        name = way.begin.sender.name
        if not (again := way.reused):
            way.failed.add(word.transport)
        log.warning("%s cannot write through %s: %s", name, word.transport, word.reason)
        # It says so once it has stopped.
        way.direct = False
        if way.arrival is not None:
            await _end(way.arrival.task)
            way.arrival = None
        try:
            transport = choose(way.begin.transports, self._holder.pools, way.same_host, way.failed)
        except FailedPrecondition as error:
            raise Unavailable(f"{error}; the last failed: {word.reason}") from None
        return self._grant(way, transport, fresh=again)

    async def _arrived(self, way: _Way) -> None:
        """Two-sided: waits until our part is over. Raises Unavailable."""
        if way.arrival is None:
            return
        taken = asyncio.ensure_future(way.ticket.revoked.wait())
        try:
            task = way.arrival.task
            await asyncio.wait({task, taken}, timeout=way.left, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Aborted(f"ticket {way.ticket.id} was taken back during the write")
            task.result()
        finally:
            taken.cancel()

    def _processes(self, location: pb.WriterLocation) -> tuple[ProcessRef, ...]:
        if location.host_id != self._host_id:
            return ()
        return tuple(ProcessRef(p.pid, p.start_ticks) for p in location.processes)

    def _grant(self, way: _Way, transport: str, fresh: bool = False) -> pb.WriteGrant:
        way.transport = transport
        way.grants += 1
        pools = self._holder.pools[transport]
        if self._holder.two_sided(transport) and len(way.slots):
            sender = way.begin.sender.incarnation
            way.arrival = self._holder.accept(transport, sender, way.slots, way.left, fresh)
            pools = way.arrival.pools
        way.direct = way.arrival is None
        return pb.WriteGrant(
            transport=transport,
            slots=to_runs(way.slots),
            pools=pools,
            max_ms=max(1, int(1000 * way.left)),
            checksum=self._checksum,
        )


async def _end(task: asyncio.Task[None]) -> None:
    """Cancels a task and waits for its end, whatever it is."""
    task.cancel()
    await asyncio.wait({task})
    _failed(task)


def _failed(task: asyncio.Task[None]) -> bool:
    return task.cancelled() or task.exception() is not None


def _check(request: pb.WriteRequest | None, *events: str) -> pb.WriteRequest:
    """Raises InvalidArgument unless `request` is one of `events`; None: the writer says no more."""
    if request is None or request.WhichOneof("event") not in events:
        raise InvalidArgument(f"the next message of a write must be {events[0]}")
    return request
