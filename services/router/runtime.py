"""Runs strategies: attempts, deadlines, and going on elsewhere when an engine fails."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.trace import Span, Tracer, set_span_in_context

from kvmesh.aio import Tasks
from kvmesh.errors import DeadlineExceeded, Internal, MeshError, Unavailable
from kvmesh.sampling import max_new_tokens
from kvmesh.strategy import ENGINE_FAILURES, Chunk, Chunks, Mesh, Request, Strategy
from kvmesh.telemetry import fail
from kvmesh.v1.common_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP_TOKEN, SamplingParams
from kvmesh.v1.engine_pb2 import GenerateFinished, ModelInfo
from services.router.attempt import Attempt
from services.router.handles import Handles
from services.router.ledger import Ledger
from services.router.livepool import LivePool
from services.router.policies import all_policies
from services.router.roster import Roster
from services.router.saver import Saver
from services.router.view import MeshView

log = logging.getLogger(__name__)

ATTEMPTS = 3
# What a strategy's own clean-up may take.
CLOSE_S = 2.0


@dataclass(slots=True)
class Job:
    """A checked request, and how it is to be served."""

    request: Request
    model: ModelInfo
    strategy: Strategy
    params: dict[str, Any]
    ledger: Ledger
    span: Span
    # Tokens that went out, over all attempts.
    streamed: list[int] = field(default_factory=list)


class Runtime:
    """Runs jobs over the mesh of `view`. Owns the background releases."""

    def __init__(self, view: MeshView, tracer: Tracer) -> None:
        self._view = view
        self._tracer = tracer
        self._policies = all_policies()
        self._background = Tasks()
        self._saver = Saver(tracer, self._background)

    async def run(self, job: Job) -> AsyncGenerator[Chunk, None]:
        """The answer, the last chunk with `finished`. Close it when leaving early (contextlib.aclosing).

        When an engine fails, goes on from prompt plus streamed tokens without that engine, ATTEMPTS times in all.
        Raises MeshError.
        """
        excluded: set[str] = set()
        failure: MeshError | None = None
        while (links := self._view.candidates(job.model.name, excluded)) and job.ledger.attempts < ATTEMPTS:
            job.ledger.attempts += 1
            request = _going_on(job)
            span = self._span(job)
            attempt = Attempt(request, job.ledger, self._tracer, span, self._background)
            chunks = job.strategy(request, self._mesh(attempt, links), **job.params)
            try:
                finished = False
                async for chunk in chunks:
                    job.streamed.extend(chunk.token_ids)
                    finished = chunk.finished is not None
                    yield chunk
                if not finished:
                    raise Internal(f"strategy {job.strategy.name} ended before the answer did")
                return
            except GeneratorExit:
                raise
            except asyncio.CancelledError as error:
                fail(span, error)
                raise
            except Exception as error:
                failure = _mesh_error(job, error)
                fail(span, failure)
                culprit = attempt.culprit(failure)
                if culprit is None or not isinstance(failure, ENGINE_FAILURES):
                    if failure is error:
                        raise
                    raise failure from error
                excluded.add(culprit)
                log.info("%s: attempt %d failed: %s", request.request_id, request.attempt, failure)
            finally:
                attempt.close()
                await _close(job, chunks)
                if span is not job.span:
                    span.end()
            if job.request.remaining() <= 0:
                raise DeadlineExceeded(f"the deadline passed after {len(job.streamed)} tokens")
            if (end := _complete(job)) is not None:
                yield Chunk((), "", finished=end)
                return
        raise failure or Unavailable(f"no engine that serves {job.model.name} is alive")

    def _mesh(self, attempt: Attempt, links: Roster) -> Mesh:
        stores = self._saver.handles(attempt, self._view.stores.candidates(links), links.by_name)
        return Mesh(LivePool(links, Handles(attempt)), self._policies, stores)

    def _span(self, job: Job) -> Span:
        if not job.span.is_recording():
            return job.span
        span = self._tracer.start_span(f"strategy {job.strategy.name}", context=set_span_in_context(job.span))
        span.set_attribute("kvmesh.attempt", job.ledger.attempts)
        for name, value in job.params.items():
            span.set_attribute(f"kvmesh.param.{name}", value)
        return span

    async def close(self) -> None:
        """Lets releases under way finish, a second at most; saves end."""
        await self._saver.close()
        await self._background.drain(1.0)
        await self._background.close()


def _going_on(job: Job) -> Request:
    """The request of the next attempt: what was streamed is prompt now."""
    if not job.streamed:
        return dataclasses.replace(job.request, attempt=job.ledger.attempts)
    prompt = job.request.token_ids
    sampling = SamplingParams()
    sampling.CopyFrom(job.request.sampling)
    sampling.max_new_tokens = _allowed(job) - len(job.streamed)
    return dataclasses.replace(
        job.request,
        token_ids=(*prompt, *job.streamed),
        sampling=sampling,
        attempt=job.ledger.attempts,
        generated=len(job.streamed),
    )


def _allowed(job: Job) -> int:
    return max_new_tokens(job.request.sampling, job.model.context_length, len(job.request.token_ids))


def _complete(job: Job) -> GenerateFinished | None:
    """The end that the failed engine did not come to tell, if the tokens streamed are all there is."""
    sampling = job.request.sampling
    eos: Sequence[int] = () if sampling.ignore_eos else job.model.eos_token_ids
    if job.streamed and job.streamed[-1] in (*eos, *sampling.stop_token_ids):
        return GenerateFinished(reason=FINISH_REASON_STOP_TOKEN, stop_token_id=job.streamed[-1])
    if len(job.streamed) >= _allowed(job):
        return GenerateFinished(reason=FINISH_REASON_LENGTH)
    return None


def _mesh_error(job: Job, error: Exception) -> MeshError:
    """`error` itself, or out of a task group, or INTERNAL for a strategy that is wrong."""
    while isinstance(error, ExceptionGroup):
        known = error.subgroup(MeshError)
        error = (known or error).exceptions[0]
    if isinstance(error, MeshError):
        return error
    log.error("strategy %s failed", job.strategy.name, exc_info=error)
    return Internal(f"strategy {job.strategy.name} failed with {type(error).__name__}; see the router's log")


async def _close(job: Job, chunks: Chunks) -> None:
    """Runs the strategy's clean-up; what it does wrong there is logged."""
    try:
        async with asyncio.timeout(CLOSE_S):
            await chunks.aclose()  # type: ignore[attr-defined]
    except Exception as error:
        log.error("strategy %s did not end", job.strategy.name, exc_info=error)
