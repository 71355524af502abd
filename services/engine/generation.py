"""StartGenerate: a running generation, from the runtime's outputs to the messages of the stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

from opentelemetry.trace import Span, Tracer

from kvmesh.detokenize import TextStream
from kvmesh.errors import Internal, InvalidArgument, ResourceExhausted, Unavailable
from kvmesh.telemetry import now_ns, record_span
from kvmesh.v1 import common_pb2
from kvmesh.v1 import engine_pb2 as pb
from services.engine.base import Ending, Output, Outputs

_REASONS = {
    "stop": common_pb2.FINISH_REASON_STOP_TOKEN,
    "length": common_pb2.FINISH_REASON_LENGTH,
    "abort": common_pb2.FINISH_REASON_ABORT,
}


class Generation:
    """One request that runs. `text` is there when stop strings are to be found."""

    def __init__(self, prompt_tokens: int, text: TextStream | None, tracer: Tracer, span: Span) -> None:
        self._prompt_tokens = prompt_tokens
        self._text = text
        self._tracer = tracer
        self._span = span
        self._arrived = time.monotonic_ns()
        self._began = self._first = self._cached = 0
        self._count = 0
        self._last: int | None = None

    async def run(self, outputs: Outputs) -> AsyncGenerator[pb.StartGenerateResponse, None]:
        """The messages; the last has `finished`. Raises MeshError when the runtime gives up."""
        try:
            async for output in outputs:
                self._began, self._cached = outputs.began_ns, outputs.cached_tokens
                if output.ending is not None:
                    yield self._ended(output.ending)
                    return
                chunk, stop = self._take(output)
                if chunk is not None:
                    yield pb.StartGenerateResponse(chunk=chunk)
                if stop is not None:
                    finished = self._finished(common_pb2.FINISH_REASON_STOP_STRING)
                    finished.finished.stop_string = stop
                    yield finished
                    return
        finally:
            outputs.close()
            self._record()

    def _take(self, output: Output) -> tuple[common_pb2.TokenChunk | None, str | None]:
        """(what to send, the stop string that it completes): tokens behind a stop string are dropped."""
        if not self._first and output.token_ids:
            self._first = time.monotonic_ns()
        used, stop = len(output.token_ids), None
        if self._text is not None:
            for i, token in enumerate(output.token_ids):
                _, stop = self._text.add(token)
                if stop is not None:
                    used = i + 1
                    break
        if not used:
            return None, None
        self._count += used
        self._last = output.token_ids[used - 1]
        return common_pb2.TokenChunk(token_ids=output.token_ids[:used], logprobs=output.logprobs[:used]), stop

    def _ended(self, ending: Ending) -> pb.StartGenerateResponse:
        if ending.reason == "failed":
            if "ut of memory" in ending.message:
                raise ResourceExhausted(ending.message)
            if ending.refused:
                raise InvalidArgument(ending.message)
            raise Unavailable(ending.message) if "stopping" in ending.message else Internal(ending.message)
        finished = self._finished(_REASONS[ending.reason], ending)
        token = ending.token if ending.token is not None else self._last
        if ending.reason == "stop" and token is not None:
            finished.finished.stop_token_id = token
        elif ending.reason == "length" and self._text is not None and (stop := self._text.finish()[1]) is not None:
            finished.finished.reason = common_pb2.FINISH_REASON_STOP_STRING
            finished.finished.stop_string = stop
        return finished

    def _finished(
        self, reason: common_pb2.FinishReason.ValueType, ending: Ending | None = None
    ) -> pb.StartGenerateResponse:
        now = time.monotonic_ns()
        began = self._began or now
        first = self._first or now
        usage = common_pb2.GenerateUsage(
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached,
            completion_tokens=self._count,
            retractions=0 if ending is None else ending.retractions,
            queue_seconds=max(0, began - self._arrived) / 1e9,
            prefill_seconds=max(0, first - began) / 1e9,
            decode_seconds=max(0, now - first) / 1e9,
        )
        if self._span.is_recording():
            self._span.set_attribute("kvmesh.cached", usage.cached_tokens)
            self._span.set_attribute("gen_ai.usage.output_tokens", self._count)
        return pb.StartGenerateResponse(finished=pb.GenerateFinished(reason=reason, usage=usage))

    def _record(self) -> None:
        """Spans of what has happened, as far as it has."""
        if not self._span.is_recording():
            return
        # Spans are on the wall clock, runtimes on the monotonic one.
        shift = now_ns() - time.monotonic_ns()
        end = time.monotonic_ns()
        began, first = self._began or end, self._first or end
        record_span(self._tracer, "engine.queue", self._span, shift + self._arrived, shift + began)
        if self._began:
            record_span(self._tracer, "engine.prefill", self._span, shift + began, shift + first)
        if self._first:
            self._span.add_event("first_token", timestamp=shift + first)
            attributes = {"gen_ai.usage.output_tokens": self._count}
            record_span(self._tracer, "engine.decode", self._span, shift + first, shift + end, attributes)
