"""The receiving side: reserves slots, grants writes into them, and makes what has arrived usable."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from kvmesh.dataplane.layout import Layout, refusal
from kvmesh.dataplane.slots import to_runs
from kvmesh.endpoint.base import KvHolder
from kvmesh.endpoint.tickets import Ticket, TicketBook, Writer
from kvmesh.errors import Aborted, DeadlineExceeded, FailedPrecondition, InvalidArgument
from kvmesh.process import ProcessRef
from kvmesh.v1 import kv_pb2 as pb
from kvmesh.v1.common_pb2 import Ticket as TicketMessage

log = logging.getLogger(__name__)

DEFAULT_TTL_MS, MIN_TTL_MS, MAX_TTL_MS = 30_000, 100, 600_000
MAX_WAIT_MS = 600_000
# A writer says what it wants, and that it is done, within so many seconds; the write itself has the ticket's life.
WORD_S = 10.0


class Receiver:
    """PrepRecv, Release and KvPeer over one holder of KV and its ticket book."""

    def __init__(self, holder: KvHolder, book: TicketBook, host_id: str) -> None:
        self._holder = holder
        self._book = book
        self._host_id = host_id

    async def prepare(self, token_ids: list[int], end: int, ttl_ms: int, wait: float, owner: str) -> TicketMessage:
        """Reserves slots up to `end`, rounded down to a block; waits `wait` seconds for room. Raises MeshError."""
        block = self._holder.block_tokens
        end = end // block * block
        reservation = await self._holder.reserve(token_ids, end, wait)
        return self._book.open(reservation, end, owner, ttl_ms / 1000)

    def release(self, ticket: TicketMessage) -> bool:
        """Takes a ticket back."""
        return self._book.release(ticket)

    async def write(self, requests: AsyncIterator[pb.WriteRequest], context: Any) -> None:
        """One KvPeer.Write from its first to its last message."""
        first = await self._word(requests, "begin")
        begin = first.begin
        ticket = self._book.get(begin.ticket)
        transport = self._choose(begin)
        if begin.end % (page := self._holder.layout.page_size):
            raise InvalidArgument(f"end = {begin.end} is no multiple of the page size {page}")
        key = (begin.sender.incarnation, begin.write_id)
        writer = Writer(key, begin.sender.name, self._processes(begin.location))
        self._book.begin_write(ticket, begin.begin, begin.end, writer)
        filled: int | None = None
        in_doubt = True
        try:
            await context.write(pb.WriteResponse(grant=self._grant(ticket, transport, begin)))
            await self._wait_done(requests, ticket)
            in_doubt = False
            if ticket.revoked.is_set():
                raise Aborted(f"ticket {ticket.id} was taken back during the write")
            await self._publish(ticket, begin.end)
            filled = begin.end
        finally:
            self._book.end_write(ticket, filled, in_doubt)
        # Last: who hears of it may use the ticket at once.
        await context.write(pb.WriteResponse(committed=pb.WriteCommitted(filled=filled)))

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

    async def _wait_done(self, requests: AsyncIterator[pb.WriteRequest], ticket: Ticket) -> None:
        """Waits for `done`. Raises Aborted when the ticket is taken back, InvalidArgument for another message."""
        word = asyncio.ensure_future(anext(requests, None))
        taken = asyncio.ensure_future(ticket.revoked.wait())
        try:
            left = max(0.1, ticket.expires - time.monotonic()) + 1.0
            await asyncio.wait({word, taken}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not word.done():
                raise Aborted(f"ticket {ticket.id} was taken back during the write")
            request = word.result()
        finally:
            word.cancel()
            taken.cancel()
            await asyncio.gather(word, taken, return_exceptions=True)
        _check(request, "done")

    def _choose(self, begin: pb.WriteBegin) -> str:
        if difference := refusal(self._holder.layout, Layout.of(begin.layout)):
            raise FailedPrecondition(f"the sender's KV has another layout: {difference}")
        if begin.location.host_id != self._host_id:
            raise FailedPrecondition("sender and receiver are on different hosts, and no transport here crosses hosts")
        for name in begin.transports:
            if name in self._holder.pools:
                return name
        offered, ours = ", ".join(begin.transports) or "none", ", ".join(self._holder.pools) or "none"
        raise FailedPrecondition(f"no common transport: the sender has {offered}, the receiver has {ours}")

    def _processes(self, location: pb.WriterLocation) -> tuple[ProcessRef, ...]:
        if location.host_id != self._host_id:
            return ()
        return tuple(ProcessRef(p.pid, p.start_ticks) for p in location.processes)

    def _grant(self, ticket: Ticket, transport: str, begin: pb.WriteBegin) -> pb.WriteGrant:
        slots = ticket.slots[begin.begin - ticket.matched : begin.end - ticket.matched]
        return pb.WriteGrant(
            transport=transport,
            slots=to_runs(slots),
            pools=self._holder.pools[transport],
            max_ms=max(1, int(1000 * (ticket.expires - time.monotonic()))),
        )


def _check(request: pb.WriteRequest | None, event: str) -> pb.WriteRequest:
    """Raises InvalidArgument unless `request` is `event`; None: the writer says no more."""
    if request is None or request.WhichOneof("event") != event:
        raise InvalidArgument(f"the next message of a write must be {event}")
    return request
