"""Engines as a strategy sees them: sub-requests as calls to the real ones, on account of an attempt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import TypeVar

import grpc
import grpc.aio

from kvmesh.errors import InvalidArgument
from kvmesh.pace import Pace
from kvmesh.strategy import Engine, Generating, Load, TicketHandle
from kvmesh.telemetry import fail, inject
from kvmesh.v1.common_pb2 import SamplingParams
from kvmesh.v1.kv_pb2 import PrepRecvRequest, RemoteSendRequest
from services.router.attempt import Attempt
from services.router.generation import Generation
from services.router.link import EngineLink
from services.router.silence import Silence

T = TypeVar("T")

# A ticket outlives a long queue at the sender, but not for long the router that forgot it.
TICKET_TTL_S = 60.0
# Beyond its wait for slots, what PrepRecv may take.
PREPARE_S = 5.0


class EngineHandle(Engine):
    """One engine for one attempt."""

    # What the span of a send is called.
    send_span = "remote_send"
    # What stores are to keep the KV under.
    salt = ""

    def __init__(self, attempt: Attempt, link: EngineLink) -> None:
        self.name = link.name
        self.labels = link.labels
        self.incarnation = link.member.endpoint.incarnation
        self.total_slots = 0 if link.info is None else link.info.total_slots
        self._attempt = attempt
        self._link = link

    @property
    def load(self) -> Load:
        """As reported, plus credit."""
        return self._link.load

    @property
    def pace(self) -> Pace:
        """As measured by this router."""
        return self._link.meter.pace

    def cached(self, token_ids: Sequence[int]) -> int:
        """By the engine's cache events."""
        size = self._link.block_tokens
        return size * self._link.cached_blocks(self._attempt.blocks.of(token_ids, size))

    def expect(self, tokens: int) -> None:
        """As credit, until the call that takes its place, or the request's end."""
        self._attempt.use(self._link)
        self._attempt.charge(self._link, tokens)

    async def prep_recv(self, token_ids: Sequence[int], end: int, *, wait: float = 10.0) -> TicketHandle:
        """PrepRecv."""
        a, link = self._attempt, self._link
        left = a.budget()
        request = PrepRecvRequest(
            token_ids=token_ids,
            end=end,
            ttl_ms=int(1000 * min(TICKET_TTL_S, max(1.0, left))),
            wait_ms=int(1000 * max(0.0, min(wait, left))),
            owner=a.request.request_id,
            model=a.request.model,
            salt=self.salt,
        )
        a.use(link)
        a.charge(link, 0)
        span = a.child("prep_recv", link, end=end)
        link.acquire()
        try:
            call = link.kv.PrepRecv(request, timeout=min(left, wait + PREPARE_S), metadata=inject(span))
            outcome = asyncio.ensure_future(_outcome(call))
            # Cancelling must not lose a ticket that is on its way: only the waiting ends, then the answer is released.
            waiting = asyncio.shield(outcome)
            a.running(waiting)
            try:
                with Silence(a, waiting, link) as silence:
                    reply = await waiting
            except asyncio.CancelledError:
                a.abandon(link, call, outcome)
                if silence.broke:
                    a.settle(link)
                    raise silence.failure() from None
                raise
            finally:
                a.ended(waiting)
            if isinstance(reply, grpc.aio.AioRpcError):
                link.suspect |= reply.code() == grpc.StatusCode.UNAVAILABLE
                a.settle(link)
                raise a.failure(link, reply) from reply
            t = reply.ticket
            ticket = TicketHandle(self.name, t, t.matched, t.end, t.matched)
            a.hold(ticket)
            if span.is_recording():
                span.set_attributes({"kvmesh.ticket": t.id, "kvmesh.matched": t.matched, "kvmesh.end": t.end})
            return ticket
        except BaseException as error:
            fail(span, error)
            raise
        finally:
            span.end()
            link.release()

    async def remote_send(
        self,
        token_ids: Sequence[int],
        ticket: TicketHandle,
        begin: int | None = None,
        end: int | None = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """RemoteSend."""
        a, link = self._attempt, self._link
        begin = ticket.filled if begin is None else begin
        end = ticket.end if end is None else end
        if begin == end:
            return
        left = a.budget()
        if not a.holds(ticket):
            raise InvalidArgument(f"ticket {ticket.proto.id} of {ticket.engine} was used or released")
        a.use(link)
        a.charge(link, end - begin)
        link.meter.prefilling(end - begin)
        span = a.child(self.send_span, link, begin=begin, end=end, receiver=ticket.engine)
        request = RemoteSendRequest(
            token_ids=token_ids,
            begin=begin,
            end=end,
            ticket=ticket.proto,
            owner=a.request.request_id,
            model=a.request.model,
            salt=self.salt,
        )
        began = time.monotonic()
        call = link.kv.RemoteSend(
            request, timeout=left / 2 if timeout is None else min(left, timeout), metadata=inject(span)
        )
        a.running(call)
        # Until there is an answer nobody here knows what the receiver has.
        certain, ticket.certain = ticket.certain, False
        try:
            with Silence(a, call, link, a.link(ticket.engine)) as silence:
                reply = await call
            ticket.filled, ticket.certain = begin + reply.sent_tokens, certain
            a.ledger.sent(self.name, ticket.engine, reply)
            link.meter.prefilling(reply.computed_tokens - (end - begin))
            link.meter.sent(reply, time.monotonic() - began)
            link.breaker.good()
            if span.is_recording():
                span.set_attributes(
                    {
                        "kvmesh.bytes": reply.sent_bytes,
                        "kvmesh.tokens": reply.sent_tokens,
                        "kvmesh.computed": reply.computed_tokens,
                        "kvmesh.cached": reply.cached_tokens,
                        "kvmesh.transport": reply.transport,
                    }
                )
        except grpc.aio.AioRpcError as error:
            # UNAVAILABLE here may mean the receiver: whether this engine lives, its status stream tells.
            fail(span, failure := a.blame_for_send(link, ticket.engine, error))
            raise failure from error
        except asyncio.CancelledError as error:
            if silence.broke:
                fail(span, failure := silence.failure())
                raise failure from None
            fail(span, error)
            raise
        finally:
            a.ended(call)
            a.settle(link)
            span.end()

    def start_generate(
        self, token_ids: Sequence[int], ticket: TicketHandle | None = None, sampling: SamplingParams | None = None
    ) -> Generating:
        """StartGenerate."""
        if ticket is not None and ticket.engine != self.name:
            raise InvalidArgument(f"ticket {ticket.proto.id} is of {ticket.engine}, not of {self.name}")
        if ticket is not None and not self._attempt.holds(ticket):
            raise InvalidArgument(f"ticket {ticket.proto.id} of {ticket.engine} was used or released")
        sampling = self._attempt.request.sampling if sampling is None else sampling
        return Generation(self._attempt, self._link, token_ids, ticket, sampling)

    async def release(self, ticket: TicketHandle) -> None:
        """Release."""
        await self._attempt.release(ticket)


class Handles:
    """Handles of one attempt, each made when it is first asked for: a link has one."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self._made: dict[EngineLink, EngineHandle] = {}

    def of(self, link: EngineLink) -> EngineHandle:
        """That link's."""
        if (handle := self._made.get(link)) is None:
            handle = self._made[link] = EngineHandle(self.attempt, link)
        return handle


async def _outcome(call: Awaitable[T]) -> T | grpc.aio.AioRpcError:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        return error
