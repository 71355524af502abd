"""The store's gRPC services: check requests, and hand them to receiver, sender and store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from opentelemetry.trace import Span, SpanKind

from kvmesh.dataplane.layout import difference
from kvmesh.endpoint.receiver import DEFAULT_TTL_MS, MAX_TTL_MS, MAX_WAIT_MS, MIN_TTL_MS, Receiver
from kvmesh.endpoint.sender import Sender, Sent
from kvmesh.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound
from kvmesh.grpcx import rpc, time_left
from kvmesh.ranges import check_range, check_tokens
from kvmesh.telemetry import Telemetry, extract, fail, now_ns, record_span
from kvmesh.v1 import kv_pb2, kv_pb2_grpc, kvstore_pb2_grpc
from kvmesh.v1 import kvstore_pb2 as pb
from kvmesh.v1.common_pb2 import Ticket
from services.kvstore.holder import StoreHolder
from services.kvstore.prompt import Prompt
from services.kvstore.status import DEFAULT_INTERVAL_MS, MAX_INTERVAL_MS, MIN_INTERVAL_MS, Status
from services.kvstore.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    import grpc.aio

NAMES = ["kvmesh.v1.KvEndpoint", "kvmesh.v1.KvPeer", "kvmesh.v1.KvStore"]
OWNER_CHARS, SALT_CHARS = 128, 256
# What a call without a deadline may take.
REQUEST_S = 300.0
DEFAULT_PIN_MS, MIN_PIN_MS, MAX_PIN_MS = 3_600_000, 1000, 604_800_000
# A prompt is checked against the vocabulary, not against a context length: the store computes nothing.
MAX_TOKENS = 16 << 20

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class StoreService(kv_pb2_grpc.KvEndpointServicer, kv_pb2_grpc.KvPeerServicer, kvstore_pb2_grpc.KvStoreServicer):
    """All three services of one store. What it is given stays its giver's."""

    def __init__(
        self,
        store: Store,
        holder: StoreHolder,
        receiver: Receiver,
        sender: Sender,
        status: Status,
        telemetry: Telemetry,
    ) -> None:
        self._store = store
        self._holder = holder
        self._receiver = receiver
        self._sender = sender
        self._status = status
        self._tracer = telemetry.tracer
        self._model = status.info.model

    @contextmanager
    def _span(self, name: str, context: Context, **attributes: int | str) -> Iterator[Span]:
        span = self._tracer.start_span(name, context=extract(context.invocation_metadata()), kind=SpanKind.SERVER)
        if span.is_recording():
            span.set_attributes({f"kvmesh.{key}": value for key, value in attributes.items()})
        try:
            yield span
        except BaseException as error:
            fail(span, error)
            raise
        finally:
            span.end()

    def _prompt(self, token_ids: Sequence[int], model: str, salt: str, owner: str = "") -> Prompt:
        if model and model != self._model.name:
            raise NotFound(f"model = {model!r} is not kept here; this is {self._model.name}")
        if len(owner) > OWNER_CHARS:
            raise InvalidArgument(f"owner has {len(owner)} characters, at most {OWNER_CHARS} are kept")
        if len(salt) > SALT_CHARS:
            raise InvalidArgument(f"salt has {len(salt)} characters, at most {SALT_CHARS} are taken")
        prompt = self._holder.prompt(token_ids, salt)
        check_tokens(prompt, self._model.vocab_size or 1 << 32, MAX_TOKENS)
        return prompt

    @rpc
    async def PrepRecv(self, request: kv_pb2.PrepRecvRequest, context: Context) -> kv_pb2.PrepRecvResponse:
        """Reserves blocks."""
        with self._span("store.prep_recv", context, request_id=request.owner, end=request.end) as span:
            prompt = self._prompt(request.token_ids, request.model, request.salt, request.owner)
            _, end = check_range(0, request.end, len(prompt))
            ttl = request.ttl_ms or DEFAULT_TTL_MS
            if not MIN_TTL_MS <= ttl <= MAX_TTL_MS:
                raise InvalidArgument(f"ttl_ms = {ttl} is not 0 or between {MIN_TTL_MS} and {MAX_TTL_MS}")
            if request.wait_ms > MAX_WAIT_MS:
                raise InvalidArgument(f"wait_ms = {request.wait_ms} is more than {MAX_WAIT_MS}")
            # A little earlier than the caller's deadline: a clear answer beats none.
            wait = min(request.wait_ms / 1000, time_left(context, REQUEST_S) - 0.05)
            layout = request.sender_layout if request.HasField("sender_layout") else None
            ticket = await self._receiver.prepare(prompt, end, ttl, wait, request.owner, layout)
            # A ticket of a caller that has gone already is nobody's.
            if context.cancelled() or context.done():
                self._receiver.release(ticket)
            if span.is_recording():
                span.set_attributes({"kvmesh.ticket": ticket.id, "kvmesh.matched": ticket.matched})
            return kv_pb2.PrepRecvResponse(ticket=ticket)

    @rpc
    async def RemoteSend(self, request: kv_pb2.RemoteSendRequest, context: Context) -> kv_pb2.RemoteSendResponse:
        """Sends what is here of a range to an engine or another store."""
        ticket, arrived = request.ticket, time.monotonic_ns()
        attributes = {"request_id": request.owner, "receiver": ticket.receiver.name}
        with self._span("store.remote_send", context, ticket=ticket.id, **attributes) as span:
            prompt = self._prompt(request.token_ids, request.model, request.salt, request.owner)
            begin, end = check_range(request.begin, request.end, len(prompt))
            if not ticket.receiver.address:
                raise InvalidArgument("ticket.receiver.address is empty")
            if end > ticket.end or begin < ticket.matched:
                raise InvalidArgument(
                    f"begin = {begin}, end = {end}: the ticket has slots for {ticket.matched} to {ticket.end}"
                )
            ours = self._holder.layout
            if ticket.layout_fingerprint != ours.fingerprint:
                raise FailedPrecondition(
                    f"the receiver's KV has another layout: {difference(ours.message(), ticket.layout)}"
                )
            if begin % ours.page_size or end % ours.page_size:
                raise InvalidArgument(
                    f"begin = {begin}, end = {end} are no multiples of the page size {ours.page_size}"
                )
            left = time_left(context, REQUEST_S)
            counts = self._store.index.counts
            counts.asked_tokens += end - begin
            try:
                async with asyncio.timeout(left):
                    reply = await self._send(span, prompt, begin, end, ticket, arrived, left)
            except TimeoutError:
                raise DeadlineExceeded("the deadline passed before the KV had arrived") from None
            counts.sent_tokens += reply.sent_tokens
            return reply

    async def _send(
        self, span: Span, prompt: Prompt, begin: int, end: int, ticket: Ticket, arrived: int, left: float
    ) -> kv_pb2.RemoteSendResponse:
        size = self._store.pool.tokens
        # The last block may be needed in part only; one that begins before `begin` is needed all the same.
        keys = prompt.keys[: -(-end // size)]
        async with self._store.hold(keys, left / 2) as entries:
            loaded = time.monotonic_ns()
            upto = min(end, len(entries) * size)
            if span.is_recording():
                span.set_attributes({"kvmesh.cached": upto, "kvmesh.computed": 0, "kvmesh.bytes": 0})
            if upto <= begin:
                return kv_pb2.RemoteSendResponse(cached_tokens=upto)
            sent = await self._sender.send(prompt, begin, upto, ticket)
        self._record(span, sent, arrived, loaded)
        return sent.response(upto - begin, arrived)

    def _record(self, span: Span, sent: Sent, arrived: int, loaded: int) -> None:
        if not span.is_recording():
            return
        shift = now_ns() - time.monotonic_ns()
        span.set_attributes({"kvmesh.bytes": sent.bytes, "kvmesh.transport": sent.transport})
        record_span(self._tracer, "store.load", span, shift + arrived, shift + loaded)
        for piece in sent.report.pieces:
            moved = {"kvmesh.tokens": piece.tokens, "kvmesh.bytes": piece.bytes, "kvmesh.transport": sent.transport}
            record_span(self._tracer, "store.transfer", span, shift + piece.begin_ns, shift + piece.end_ns, moved)

    @rpc
    async def Release(self, request: kv_pb2.ReleaseRequest, context: Context) -> kv_pb2.ReleaseResponse:
        """Takes a ticket back; what has arrived stays."""
        return kv_pb2.ReleaseResponse(released=self._receiver.release(request.ticket))

    @rpc
    async def Write(self, requests: AsyncIterator[kv_pb2.WriteRequest], context: Context) -> None:  # type: ignore[override]
        """A peer writes into a ticket."""
        await self._receiver.write(requests, context)

    @rpc
    async def Stopped(self, request: kv_pb2.StoppedRequest, context: Context) -> kv_pb2.StoppedResponse:
        """A peer has stopped writing."""
        self._receiver.stopped(request.sender_incarnation, request.write_id)
        return kv_pb2.StoppedResponse()

    @rpc
    async def Match(self, request: pb.MatchRequest, context: Context) -> pb.MatchResponse:
        """What is here of a prompt."""
        prompt = self._prompt(request.token_ids, request.model, request.salt)
        size = self._store.pool.tokens
        entries = self._store.index.chain(prompt.keys)
        in_memory = sum(entry.block is not None for entry in entries)
        return pb.MatchResponse(matched=len(entries) * size, in_memory=in_memory * size)

    @rpc
    async def Pin(self, request: pb.PinRequest, context: Context) -> pb.PinResponse:
        """Pins what is here of a prompt."""
        prompt = self._prompt(request.token_ids, request.model, request.salt)
        _, end = check_range(0, request.end, len(prompt))
        ttl = request.ttl_ms or DEFAULT_PIN_MS
        if not MIN_PIN_MS <= ttl <= MAX_PIN_MS:
            raise InvalidArgument(f"ttl_ms = {ttl} is not 0 or between {MIN_PIN_MS} and {MAX_PIN_MS}")
        entries = self._store.index.chain(prompt.keys[: end // self._store.pool.tokens])
        self._store.pin(entries, ttl / 1000)
        return pb.PinResponse(pinned=len(entries) * self._store.pool.tokens)

    @rpc
    async def Unpin(self, request: pb.UnpinRequest, context: Context) -> pb.UnpinResponse:
        """Ends pins."""
        prompt = self._prompt(request.token_ids, request.model, request.salt)
        _, end = check_range(0, request.end, len(prompt))
        entries = self._store.index.chain(prompt.keys[: end // self._store.pool.tokens])
        pinned = [entry for entry in entries if entry.pinned]
        self._store.index.pin(pinned, 0)
        return pb.UnpinResponse(unpinned=len(pinned) * self._store.pool.tokens)

    @rpc
    async def Evict(self, request: pb.EvictRequest, context: Context) -> pb.EvictResponse:
        """Drops blocks."""
        size = self._store.pool.tokens
        if request.all == bool(request.token_ids):
            raise InvalidArgument("give either token_ids or all = true")
        if request.all:
            entries = self._store.index.entries()
        else:
            prompt = self._prompt(request.token_ids, request.model, request.salt)
            begin, _ = check_range(request.begin, len(prompt), len(prompt))
            entries = self._store.index.chain(prompt.keys)[-(-begin // size) :]
        return pb.EvictResponse(evicted=self._store.evict(entries) * size)

    @rpc
    async def Stats(self, request: pb.StatsRequest, context: Context) -> pb.StatsResponse:
        """Description and figures."""
        return pb.StatsResponse(info=self._status.info, stats=self._status.stats())

    @rpc
    async def WatchStatus(self, request: pb.WatchStoreRequest, context: Context) -> AsyncIterator[pb.StoreStatus]:
        """Streams the figures."""
        interval = request.interval_ms or DEFAULT_INTERVAL_MS
        if not MIN_INTERVAL_MS <= interval <= MAX_INTERVAL_MS:
            raise InvalidArgument(
                f"interval_ms = {interval} is not 0 or between {MIN_INTERVAL_MS} and {MAX_INTERVAL_MS}"
            )
        async with aclosing(self._status.watch(interval / 1000)) as statuses:
            async for status in statuses:
                yield status
