"""The engine's gRPC services: check requests, and hand them to receiver, sender and runtime."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

from opentelemetry.trace import Span, SpanKind

from kvmesh.detokenize import TextStream
from kvmesh.endpoint.calls import REQUEST_S, Context, KvCalls, check_owner, check_send
from kvmesh.endpoint.receiver import Receiver
from kvmesh.endpoint.sender import Sender, Sent
from kvmesh.endpoint.tickets import Ticket, TicketBook
from kvmesh.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    MeshError,
    NotFound,
)
from kvmesh.grpcx import rpc, time_left
from kvmesh.ranges import check_range, check_tokens
from kvmesh.sampling import check_sampling, max_new_tokens
from kvmesh.telemetry import Telemetry, extract, fail, now_ns, record_span
from kvmesh.tokenizer import Tokenizers
from kvmesh.v1 import engine_pb2, engine_pb2_grpc, kv_pb2
from services.engine.base import Outputs, Runtime
from services.engine.generation import Generation
from services.engine.metrics import Totals
from services.engine.status import DEFAULT_INTERVAL_MS, MAX_INTERVAL_MS, MIN_INTERVAL_MS, Status

NAMES = ["kvmesh.v1.KvEndpoint", "kvmesh.v1.KvPeer", "kvmesh.v1.Engine"]
MAX_HOTTEST = 1000
_ID = re.compile(r"[A-Za-z0-9._:#-]{1,128}")

T = TypeVar("T")
_OTHERS: dict[type[BaseException], str] = {asyncio.CancelledError: Cancelled.status, GeneratorExit: Cancelled.status}


class _Run:
    """A StartGenerate that runs, also before the runtime knows of it."""

    def __init__(self) -> None:
        self._outputs: Outputs | None = None
        self._aborted = False

    def set(self, outputs: Outputs) -> None:
        """What the runtime gives."""
        self._outputs = outputs
        if self._aborted:
            outputs.abort()

    def abort(self) -> None:
        """Ends it, now or as soon as it has begun."""
        self._aborted = True
        if self._outputs is not None:
            self._outputs.abort()


class EngineService(KvCalls, engine_pb2_grpc.EngineServicer):
    """All three services of one engine. What it is given stays its giver's."""

    def __init__(
        self,
        runtime: Runtime,
        book: TicketBook,
        receiver: Receiver,
        sender: Sender,
        status: Status,
        tokenizers: Tokenizers,
        telemetry: Telemetry,
    ) -> None:
        super().__init__(receiver)
        self._runtime = runtime
        self._book = book
        self._sender = sender
        self._status = status
        self._tokenizers = tokenizers
        self._tracer = telemetry.tracer
        self._model = status.info.model
        self._running: dict[str, _Run] = {}
        self.totals = Totals()
        # Leaves the registry, and ends the process if told to.
        self.leave: Callable[[bool], Awaitable[None]] = _nowhere

    @contextmanager
    def _call(self, name: str, context: Context, **attributes: int | str) -> Iterator[Span]:
        """Span and count of one sub-request."""
        parent = extract(context.invocation_metadata())
        span = self._tracer.start_span(f"engine.{name}", context=parent, kind=SpanKind.SERVER)
        if span.is_recording():
            for key, value in attributes.items():
                span.set_attribute(f"kvmesh.{key}", value)
        status = "OK"
        try:
            yield span
        except BaseException as error:
            status = error.status if isinstance(error, MeshError) else _OTHERS.get(type(error), Internal.status)
            fail(span, error)
            raise
        finally:
            self.totals.call(name, status)
            span.end()

    def _check_prompt(self, token_ids: Any, model: str, owner: str) -> None:
        if model and model != self._model.name:
            raise NotFound(f"model = {model!r} is not served here; this is {self._model.name}")
        check_owner(owner)
        check_tokens(token_ids, self._model.vocab_size, self._model.context_length)

    @rpc
    async def PrepRecv(self, request: kv_pb2.PrepRecvRequest, context: Context) -> kv_pb2.PrepRecvResponse:
        """Reserves slots."""
        with self._call("prep_recv", context, request_id=request.owner, end=request.end) as span:
            token_ids = request.token_ids[:]
            self._check_prompt(token_ids, request.model, request.owner)
            return await self._prepare(request, token_ids, context, span)

    @rpc
    async def RemoteSend(self, request: kv_pb2.RemoteSendRequest, context: Context) -> kv_pb2.RemoteSendResponse:
        """Sends KV to another endpoint."""
        ticket = request.ticket
        arrived = time.monotonic_ns()
        receiver = ticket.receiver.name
        with self._call("remote_send", context, request_id=request.owner, receiver=receiver, ticket=ticket.id) as span:
            token_ids = request.token_ids[:]
            self._check_prompt(token_ids, request.model, request.owner)
            begin, end = check_send(request, len(token_ids), self._runtime.layout)
            sent = await self._in_time(self._sender.send(token_ids, begin, end, ticket), context)
            self.totals.sent_tokens += end - begin
            self.totals.sent_bytes += sent.bytes
            self._record(span, sent, arrived)
            return sent.response(end - begin, arrived)

    def _record(self, span: Span, sent: Sent, arrived: int) -> None:
        if not span.is_recording():
            return
        report, shift = sent.report, now_ns() - time.monotonic_ns()
        span.set_attributes(
            {
                "kvmesh.bytes": sent.bytes,
                "kvmesh.transport": sent.transport,
                "kvmesh.cached": report.cached,
                "kvmesh.computed": report.computed,
            }
        )
        record_span(self._tracer, "engine.queue", span, shift + arrived, shift + report.began_ns)
        if report.computed:
            attributes = {"kvmesh.computed": report.computed, "kvmesh.cached": report.cached}
            record_span(
                self._tracer, "engine.prefill", span, shift + report.began_ns, shift + report.prefilled_ns, attributes
            )
        for piece in report.pieces:
            moved = {"kvmesh.tokens": piece.tokens, "kvmesh.bytes": piece.bytes, "kvmesh.transport": sent.transport}
            record_span(self._tracer, "engine.transfer", span, shift + piece.begin_ns, shift + piece.end_ns, moved)

    @rpc
    async def StartGenerate(self, request: engine_pb2.StartGenerateRequest, context: Context) -> None:  # type: ignore[override]
        """Generates. Answers by context.write: so a cancel is raised here, not in a forgotten iterator."""
        request_id = request.request_id or uuid.uuid4().hex
        if not _ID.fullmatch(request_id):
            raise InvalidArgument(f"request_id = {request_id[:200]!r} is not [A-Za-z0-9._:#-], 1 to 128 characters")
        if request_id in self._running:
            raise AlreadyExists(f"request_id = {request_id!r} is running here")
        run = self._running[request_id] = _Run()
        about: dict[str, int | str] = {"request_id": request_id, "prompt_tokens": len(request.token_ids)}
        try:
            with self._call("start_generate", context, **about) as span:
                await self._in_time(self._generate(request, run, context, span), context)
        finally:
            del self._running[request_id]

    async def _in_time(self, work: Coroutine[Any, Any, T], context: Context) -> T:
        """Raises DeadlineExceeded when the caller's deadline passes first."""
        try:
            async with asyncio.timeout(time_left(context, REQUEST_S)):
                return await work
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline passed") from None

    async def _generate(
        self, request: engine_pb2.StartGenerateRequest, run: _Run, context: Context, span: Span
    ) -> None:
        token_ids, model = request.token_ids[:], self._model
        self._check_prompt(token_ids, request.model, "")
        check_sampling(request.sampling, model.vocab_size, model.context_length, len(token_ids))
        generated = request.generated
        if generated >= len(token_ids):
            raise InvalidArgument(f"generated = {generated} is not below the number of token_ids, {len(token_ids)}")
        text = await self._text(request, token_ids)
        max_new = max_new_tokens(request.sampling, model.context_length, len(token_ids))
        begin, _ = check_range(request.begin, len(token_ids), len(token_ids))
        if begin == len(token_ids):
            raise InvalidArgument(f"begin = {request.begin} leaves no token of {len(token_ids)} to prefill")
        ticket: Ticket | None = None
        if request.HasField("ticket"):
            ticket = self._book.get(request.ticket)
            self._book.check_use(ticket, begin)
        elif begin:
            raise InvalidArgument(f"begin = {request.begin} without a ticket")
        if span.is_recording():
            span.set_attribute("kvmesh.begin", begin)
        generation = Generation(len(token_ids), text, self._tracer, span)
        reservation = None if ticket is None else ticket.reservation
        outputs = self._runtime.generate(token_ids, request.sampling, max_new, reservation, generated)
        if ticket is not None:
            # Not before: a call that is refused leaves the ticket as it was.
            self._book.use(ticket, begin)
        run.set(outputs)
        # Python numbers take ten times the room of the message, and an answer takes long.
        del token_ids
        async with aclosing(generation.run(outputs)) as messages:
            async for message in messages:
                self.totals.generated_tokens += len(message.chunk.token_ids)
                await context.write(message)

    async def _text(self, request: engine_pb2.StartGenerateRequest, token_ids: list[int]) -> TextStream | None:
        """What finds stop strings, if there are any to find."""
        stops = request.sampling.stop_strings
        if not stops:
            return None
        tokenizer = await self._tokenizers.get(self._model.path)
        if tokenizer is None:
            raise InvalidArgument(f"sampling.stop_strings: model {self._model.name} has no tokenizer to find them with")
        begin = len(token_ids) - request.generated
        stream = TextStream(tokenizer.detokenizer(token_ids[:begin]), stops)
        for token in token_ids[begin:]:
            stream.add(token)
        return stream

    @rpc
    async def Abort(self, request: engine_pb2.AbortRequest, context: Context) -> engine_pb2.AbortResponse:
        """Ends a running generation."""
        run = self._running.get(request.request_id)
        if run is not None:
            run.abort()
        return engine_pb2.AbortResponse(found=run is not None)

    @rpc
    async def Flush(self, request: engine_pb2.FlushRequest, context: Context) -> engine_pb2.FlushResponse:
        """Empties the prefix cache."""
        await self._runtime.flush()
        return engine_pb2.FlushResponse()

    @rpc
    async def Hottest(self, request: engine_pb2.HottestRequest, context: Context) -> engine_pb2.HottestResponse:
        """Contexts used last."""
        if not 1 <= request.count <= MAX_HOTTEST:
            raise InvalidArgument(f"count = {request.count} is not between 1 and {MAX_HOTTEST}")
        found = await self._runtime.hottest(request.count)
        contexts = [engine_pb2.HotContext(token_ids=c.token_ids, idle_seconds=max(0.0, c.idle)) for c in found]
        return engine_pb2.HottestResponse(contexts=contexts)

    @rpc
    async def Leave(self, request: engine_pb2.LeaveRequest, context: Context) -> engine_pb2.LeaveResponse:
        """Out of the registry."""
        await self.leave(request.stop)
        return engine_pb2.LeaveResponse()

    @rpc
    async def WatchStatus(
        self, request: engine_pb2.WatchStatusRequest, context: Context
    ) -> AsyncIterator[engine_pb2.EngineStatus]:
        """Streams the engine's state."""
        interval = request.interval_ms or DEFAULT_INTERVAL_MS
        if not MIN_INTERVAL_MS <= interval <= MAX_INTERVAL_MS:
            raise InvalidArgument(
                f"interval_ms = {interval} is not 0 or between {MIN_INTERVAL_MS} and {MAX_INTERVAL_MS}"
            )
        async with aclosing(self._status.watch(interval / 1000, request.cache)) as statuses:
            async for status in statuses:
                yield status


async def _nowhere(stop: bool) -> None:
    raise FailedPrecondition("this engine is in no registry")
