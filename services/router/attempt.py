"""One run of a strategy for one request: owner of all that the strategy starts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Protocol

import grpc
import grpc.aio
from opentelemetry.trace import Span, SpanKind, Tracer, set_span_in_context

from kvmesh.aio import Tasks
from kvmesh.errors import Cancelled, DeadlineExceeded, Internal, MeshError, Unavailable, from_rpc
from kvmesh.strategy import Request, TicketHandle
from kvmesh.telemetry import inject
from kvmesh.v1.common_pb2 import Ticket
from kvmesh.v1.kv_pb2 import PrepRecvResponse, ReleaseRequest
from services.router.kvindex import PromptBlocks
from services.router.ledger import Ledger
from services.router.link import EngineLink

log = logging.getLogger(__name__)

RELEASE_S = 5.0
# How long a reservation that nobody waits for any more may take to say what is to be released.
ABANDONED_S = 0.5


class Cancellable(Protocol):
    """A running call."""

    def cancel(self) -> object:
        """Ends it now."""


class Attempt:
    """Calls, tickets, credits and spans of one run. `close` ends and returns what is left of them, without waiting.

    `background` outlives the attempt: releases run there, each within a few seconds.
    """

    def __init__(self, request: Request, ledger: Ledger, tracer: Tracer, span: Span, background: Tasks) -> None:
        self.request = request
        self.ledger = ledger
        self.blocks = PromptBlocks()
        self._tracer = tracer
        self._span = span
        self._traced = span.is_recording()
        self._background = background
        self._links: dict[str, EngineLink] = {}
        self._calls: set[Cancellable] = set()
        self._tickets: dict[tuple[str, int], TicketHandle] = {}
        self._credits: dict[str, int] = {}
        self._failures: list[tuple[MeshError, str]] = []
        self._generations = 0
        self._closed = False

    @property
    def span(self) -> Span:
        """The parent of all that it does."""
        return self._span

    def budget(self, at_most: float | None = None) -> float:
        """Seconds that a sub-request may take. Raises DeadlineExceeded, or Cancelled when the attempt is over."""
        if self._closed:
            raise Cancelled(f"request {self.request.request_id} is over: no more sub-requests")
        left = self.request.remaining()
        if left <= 0:
            raise DeadlineExceeded("the request's deadline passed")
        return left if at_most is None else min(left, at_most)

    def generation_id(self) -> str:
        """An id for StartGenerate: the request's own, then with a number, as an engine may still have the first."""
        self._generations += 1
        own, number = self.request.request_id, f"{self.request.attempt}.{self._generations}"
        return own if number == "1.1" else f"{own[:110]}#{number}"

    def child(self, name: str, link: EngineLink, **attributes: int | str) -> Span:
        """A span of a sub-request on that engine, to be ended by the caller; attributes get the prefix `kvmesh.`."""
        if not self._traced:
            return self._span
        span = self._tracer.start_span(name, context=set_span_in_context(self._span), kind=SpanKind.CLIENT)
        span.set_attribute("kvmesh.engine", link.name)
        for key, value in attributes.items():
            span.set_attribute(f"kvmesh.{key}", value)
        return span

    def use(self, link: EngineLink) -> None:
        """Keeps the link's channel open until the attempt is over."""
        if link.name not in self._links:
            self._links[link.name] = link
            link.acquire()

    def link(self, name: str) -> EngineLink | None:
        """The engine of that name, if it is in use."""
        return self._links.get(name)

    def charge(self, link: EngineLink, tokens: int) -> None:
        """Counts one request of `tokens` as load of the engine, in place of what this attempt charged it with."""
        self.settle(link)
        self._credits[link.name] = link.charge(1, tokens)

    def begun(self, link: EngineLink) -> None:
        """The engine has prefilled what it was charged with."""
        if (number := self._credits.get(link.name)) is not None:
            link.begun(number)

    def settle(self, link: EngineLink) -> None:
        """The engine is done with what it was charged with."""
        if (number := self._credits.pop(link.name, None)) is not None:
            link.settle(number)

    def running(self, call: Cancellable) -> None:
        """`call` is to be cancelled with the attempt, until `ended`."""
        self._calls.add(call)

    def ended(self, call: Cancellable) -> None:
        """`call` is over."""
        self._calls.discard(call)

    def hold(self, ticket: TicketHandle) -> None:
        """`ticket` is to be released with the attempt, until `used`."""
        self._tickets[ticket.engine, ticket.proto.id] = ticket

    def used(self, ticket: TicketHandle) -> None:
        """The engine has taken `ticket`."""
        self._tickets.pop((ticket.engine, ticket.proto.id), None)

    def holds(self, ticket: TicketHandle) -> bool:
        """Whether `ticket` is neither used nor released."""
        return (ticket.engine, ticket.proto.id) in self._tickets

    def failure(self, link: EngineLink, error: grpc.aio.AioRpcError) -> MeshError:
        """The MeshError of a failed call, remembered as the engine's."""
        result = from_rpc(error, link.name)
        if isinstance(result, Cancelled):
            result = Unavailable(f"{link.name}: the call was cancelled there")
        elif type(result) is MeshError:
            result = Internal(str(result))
        return self.blame(link, result)

    def blame(self, link: EngineLink, error: MeshError) -> MeshError:
        """Remembers that `error` comes from this engine, and charges it with what is a fault."""
        self._failures.append((error, link.name))
        if isinstance(error, Internal | Unavailable):
            link.failed()
        return error

    def blame_for_send(self, link: EngineLink, receiver: str, error: grpc.aio.AioRpcError) -> MeshError:
        """As `failure`, for a RemoteSend from `link`: charges the side that is at fault, the receiver as well."""
        result = from_rpc(error, link.name)
        if not (result.told and isinstance(result, Unavailable)):
            return self.failure(link, error)
        # The sender lives, and says that it cannot reach the receiver; or that it is stopping, which is nobody's fault.
        self._failures.append((result, link.name))
        if "stopping" not in str(result) and (other := self._links.get(receiver)) is not None:
            other.failed()
        return result

    def culprit(self, error: BaseException) -> str | None:
        """The engine that `error` comes from; None when it comes from elsewhere."""
        return next((name for known, name in self._failures if known is error), None)

    async def release(self, ticket: TicketHandle) -> None:
        """Gives `ticket` back now; does nothing when it is used or released. Never raises."""
        if self.holds(ticket):
            self.used(ticket)
            await asyncio.shield(self._in_background(self._links[ticket.engine], ticket.proto))

    def release_later(self, ticket: TicketHandle) -> None:
        """Gives `ticket` back in the background."""
        if self.holds(ticket):
            self.used(ticket)
            self._in_background(self._links[ticket.engine], ticket.proto)

    def abandon(self, link: EngineLink, call: Cancellable, outcome: asyncio.Task[Any]) -> None:
        """Nobody waits for this PrepRecv any more: releases what it may yet have reserved."""
        self._own(link, self._release_reserved(link, call, outcome))

    def close(self) -> None:
        """Cancels every running call and releases every ticket. Later sub-requests raise Cancelled."""
        if self._closed:
            return
        self._closed = True
        for call in list(self._calls):
            call.cancel()
        self._calls.clear()
        for ticket in list(self._tickets.values()):
            self.release_later(ticket)
        for link in self._links.values():
            self.settle(link)
            link.release()

    def _in_background(self, link: EngineLink, ticket: Ticket) -> asyncio.Task[Any]:
        return self._own(link, self._release(link, ticket))

    def _own(self, link: EngineLink, work: Coroutine[Any, Any, None]) -> asyncio.Task[Any]:
        link.acquire()
        task = self._background.start(work, f"release on {link.name}")
        task.add_done_callback(lambda _: link.release())
        return task

    async def _release(self, link: EngineLink, ticket: Ticket) -> None:
        span = self.child("release", link, ticket=ticket.id)
        try:
            await link.kv.Release(ReleaseRequest(ticket=ticket), timeout=RELEASE_S, metadata=inject(span))
        except grpc.aio.AioRpcError as error:
            # A dead engine holds nothing; a living one takes the ticket back when it expires.
            log.info("%s did not release ticket %d: %s", link.name, ticket.id, error.code().name)
        finally:
            span.end()

    async def _release_reserved(self, link: EngineLink, call: Cancellable, outcome: asyncio.Task[Any]) -> None:
        await asyncio.wait([outcome], timeout=ABANDONED_S)
        if not outcome.done():
            call.cancel()
            await asyncio.wait([outcome], timeout=ABANDONED_S)
        if outcome.done() and not outcome.cancelled() and isinstance(reply := outcome.result(), PrepRecvResponse):
            await self._release(link, reply.ticket)
