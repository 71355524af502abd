"""The store's gRPC services: check requests, and hand them to receiver, sender and store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING

from opentelemetry.trace import Span, SpanKind

from kvmesh.endpoint.calls import REQUEST_S, Context, KvCalls, check_owner, check_send
from kvmesh.endpoint.receiver import Receiver
from kvmesh.endpoint.sender import Sender, Sent
from kvmesh.errors import DeadlineExceeded, InvalidArgument, NotFound
from kvmesh.grpcx import rpc, time_left
from kvmesh.ranges import check_range, check_tokens
from kvmesh.telemetry import Telemetry, extract, fail, now_ns, record_span
from kvmesh.v1 import kv_pb2, kvstore_pb2_grpc
from kvmesh.v1 import kvstore_pb2 as pb
from kvmesh.v1.common_pb2 import Ticket
from services.kvstore.holder import StoreHolder
from services.kvstore.prompt import Prompt
from services.kvstore.status import DEFAULT_INTERVAL_MS, MAX_INTERVAL_MS, MIN_INTERVAL_MS, Status
from services.kvstore.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator


NAMES = ["kvmesh.v1.KvEndpoint", "kvmesh.v1.KvPeer", "kvmesh.v1.KvStore"]
SALT_CHARS = 256
DEFAULT_PIN_MS, MIN_PIN_MS, MAX_PIN_MS = 3_600_000, 1000, 604_800_000
# A prompt is checked against the vocabulary, not against a context length: the store computes nothing.
MAX_TOKENS = 16 << 20


class StoreService(KvCalls, kvstore_pb2_grpc.KvStoreServicer):
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
        super().__init__(receiver)
        self._store = store
        self._holder = holder
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
        check_owner(owner)
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
            return await self._prepare(request, prompt, context, span)

    @rpc
    async def RemoteSend(self, request: kv_pb2.RemoteSendRequest, context: Context) -> kv_pb2.RemoteSendResponse:
        """Sends what is here of a range to an engine or another store."""
        ticket, arrived = request.ticket, time.monotonic_ns()
        attributes = {"request_id": request.owner, "receiver": ticket.receiver.name}
        with self._span("store.remote_send", context, ticket=ticket.id, **attributes) as span:
            prompt = self._prompt(request.token_ids, request.model, request.salt, request.owner)
            begin, end = check_send(request, len(prompt), self._holder.layout)
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
