"""A running StartGenerate as an iterator of chunks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
import grpc.aio

from kvmesh.errors import Internal, MeshError, Unavailable
from kvmesh.strategy import Chunk, Generating, TicketHandle
from kvmesh.telemetry import fail, inject
from kvmesh.v1.common_pb2 import SamplingParams
from kvmesh.v1.engine_pb2 import GenerateFinished, StartGenerateRequest, StartGenerateResponse
from services.router.attempt import Attempt
from services.router.hearing import cancelled
from services.router.link import EngineLink

# After the last message, how long the call may take to end.
END_S = 1.0
_REFUSED = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION)


class Generation(Generating):
    """Starts at once; ends with the engine's last chunk, an error, or `cancel`."""

    def __init__(
        self,
        attempt: Attempt,
        link: EngineLink,
        token_ids: Sequence[int],
        ticket: TicketHandle | None,
        sampling: SamplingParams,
    ) -> None:
        self._attempt, self._link = attempt, link
        self._token_ids, self._ticket, self._sampling = token_ids, ticket, sampling
        self._begun = self._finished = self._over = False
        # Why the engine is given up, once it hangs.
        self._silent = ""
        self._id = attempt.generation_id()
        self._begin = 0 if ticket is None else ticket.filled
        self._received = 0 if ticket is None else ticket.filled - ticket.matched
        left = attempt.budget()
        attempt.use(link)
        self._span = attempt.child("start_generate", link, begin=self._begin, end=len(token_ids))
        self._open(left)
        attempt.running(self)
        link.hearing.running(self._hang)

    def _open(self, timeout: float) -> None:
        request = StartGenerateRequest(
            request_id=self._id,
            token_ids=self._token_ids,
            begin=self._begin,
            ticket=None if self._ticket is None else self._ticket.proto,
            sampling=self._sampling,
            model=self._attempt.request.model,
            generated=max(0, len(self._token_ids) - self._attempt.request.prompt_tokens),
        )
        self._attempt.charge(self._link, len(self._token_ids) - self._begin)
        self._link.meter.prefilling(len(self._token_ids) - self._begin)
        self._call = self._link.engine.StartGenerate(request, timeout=timeout, metadata=inject(self._span))

    async def __anext__(self) -> Chunk:
        """The next tokens; the last chunk has `finished`. Raises MeshError."""
        while not self._over:
            try:
                if not self._finished:
                    message = await self._call.read()
                else:
                    async with asyncio.timeout(END_S):
                        message = await self._call.read()
            except grpc.aio.AioRpcError as error:
                if not self._finished:
                    self._failed(error)
            except TimeoutError:
                self._call.cancel()
            except asyncio.CancelledError:
                if self._silent and not self._finished and not cancelled():
                    self._give_up()
                self.cancel()
                raise
            else:
                if isinstance(message, StartGenerateResponse):
                    return self._take(message)
                if not self._finished:
                    cut = Internal(f"{self._link.name}: generation ended without a last message")
                    self._end(self._attempt.blame(self._link, cut))
                    raise cut
            if self._finished:
                self._end()
        raise StopAsyncIteration

    def cancel(self) -> None:
        """Ends the call; the engine frees what it held."""
        if not self._over:
            self._call.cancel()
            self._end(None if self._finished else asyncio.CancelledError("cancelled"))

    def _hang(self, reason: str) -> None:
        self._silent = reason
        self._call.cancel()

    def _give_up(self) -> None:
        """Raises what a hanging engine comes to."""
        failure = self._attempt.blame(self._link, Unavailable(self._silent))
        self._end(failure)
        raise failure

    def _take(self, message: StartGenerateResponse) -> Chunk:
        if not self._begun:
            self._begun = True
            self._attempt.begun(self._link)
            if self._ticket is not None:
                self._attempt.used(self._ticket)
            if message.HasField("chunk"):
                self._span.add_event("first_token")
        if message.HasField("chunk"):
            chunk = message.chunk
            self._attempt.ledger.generated(self._link.name, len(chunk.token_ids))
            return Chunk(list(chunk.token_ids), self._link.name, list(chunk.logprobs))
        self._finish(message.finished)
        return Chunk((), self._link.name, finished=message.finished)

    def _finish(self, end: GenerateFinished) -> None:
        self._finished = True
        self._attempt.settle(self._link)
        self._attempt.ledger.finished(self._link.name, end, self._received)
        self._link.breaker.good()
        self._link.meter.prefilling(min(0, self._begin - end.usage.cached_tokens))
        self._link.meter.generated(end.usage, self._link.load.running)
        if self._span.is_recording():
            usage = end.usage
            self._span.set_attributes(
                {
                    "gen_ai.usage.input_tokens": usage.prompt_tokens,
                    "gen_ai.usage.output_tokens": usage.completion_tokens,
                    "kvmesh.cached": usage.cached_tokens,
                    "kvmesh.queue_s": usage.queue_seconds,
                    "kvmesh.prefill_s": usage.prefill_seconds,
                    "kvmesh.decode_s": usage.decode_seconds,
                }
            )

    def _failed(self, error: grpc.aio.AioRpcError) -> None:
        """Goes on without the ticket if that is what the engine refused; else raises the MeshError."""
        ticket, code = self._ticket, error.code()
        if ticket is not None and not self._begun:
            in_doubt = not ticket.certain and code == grpc.StatusCode.INVALID_ARGUMENT
            if code in _REFUSED or in_doubt:
                try:
                    left = self._attempt.budget()
                except MeshError as late:
                    self._end(late)
                    raise
                self._span.add_event("ticket_refused", {"kvmesh.reason": error.details() or code.name})
                self._attempt.release_later(ticket)
                self._ticket, self._begin, self._received = None, 0, 0
                self._open(left)
                return
        self._link.suspect |= code == grpc.StatusCode.UNAVAILABLE
        failure = self._attempt.failure(self._link, error)
        self._end(failure)
        raise failure from error

    def _end(self, error: BaseException | None = None) -> None:
        self._over = True
        self._attempt.ended(self)
        self._link.hearing.ended(self._hang)
        self._attempt.settle(self._link)
        if self._begun and not self._finished:
            matched = self._begin - self._received
            self._attempt.ledger.broken(self._link.name, len(self._token_ids), self._begin, matched)
        if error is not None:
            fail(self._span, error)
        self._span.end()
