"""From a runtime's outputs to the messages of StartGenerate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import INVALID_SPAN, NoOpTracer

from kvmesh.detokenize import Detokenizer, TextStream
from kvmesh.errors import Internal, ResourceExhausted, Unavailable
from kvmesh.v1 import common_pb2
from kvmesh.v1.engine_pb2 import StartGenerateResponse
from services.engine.base import Ending, Output, Outputs
from services.engine.generation import Generation

EOS = 257


def by_bytes(ids: Sequence[int]) -> str:
    return bytes(i for i in ids if i < 256).decode(errors="replace")


def text(*stops: str) -> TextStream:
    return TextStream(Detokenizer(by_bytes, frozenset({EOS}), [65]), stops)


class Given(Outputs):
    """Outputs that are all there; counts how often they were abandoned."""

    def __init__(self, *outputs: Output | Ending) -> None:
        super().__init__(self._count)
        self.abandoned = 0
        for output in outputs:
            self.put(Output(ending=output) if isinstance(output, Ending) else output)

    def _count(self) -> None:
        self.abandoned += 1


def tokens(*ids: int) -> Output:
    return Output(list(ids), [-float(i) for i in ids])


async def run(outputs: Outputs, stream: TextStream | None = None) -> list[StartGenerateResponse]:
    generation = Generation(3, stream, NoOpTracer(), INVALID_SPAN)
    async with asyncio.timeout(5), aclosing(generation.run(outputs)) as messages:
        return [message async for message in messages]


def ids(messages: list[StartGenerateResponse]) -> list[list[int]]:
    """Of each chunk; the last message is no chunk."""
    assert [m.WhichOneof("event") for m in messages] == ["chunk"] * (len(messages) - 1) + ["finished"]
    return [list(m.chunk.token_ids) for m in messages[:-1]]


async def test_tokens_come_as_they_are():
    outputs = Given(tokens(1, 2), tokens(3), Ending("length"))
    outputs.cached_tokens = 2
    messages = await run(outputs)
    assert ids(messages) == [[1, 2], [3]]
    assert [list(m.chunk.logprobs) for m in messages[:-1]] == [[-1, -2], [-3]]
    finished = messages[-1].finished
    assert finished.reason == common_pb2.FINISH_REASON_LENGTH and finished.WhichOneof("matched") is None
    usage = finished.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (3, 2, 3)
    assert outputs.abandoned == 0


async def test_an_output_without_tokens_is_no_message():
    assert ids(await run(Given(Output(), tokens(1), Output(), Ending("length")))) == [[1]]
    assert ids(await run(Given(Ending("length")))) == []


@pytest.mark.parametrize(("ending", "token"), [(Ending("stop", 3), 3), (Ending("stop"), 2)])
async def test_the_stop_token_is_named(ending, token):
    finished = (await run(Given(tokens(1, 2), ending)))[-1].finished
    assert finished.reason == common_pb2.FINISH_REASON_STOP_TOKEN and finished.stop_token_id == token
    assert finished.HasField("stop_token_id")


async def test_the_stop_token_may_be_zero():
    finished = (await run(Given(tokens(7, 0), Ending("stop", 0))))[-1].finished
    assert finished.WhichOneof("matched") == "stop_token_id" and finished.stop_token_id == 0


async def test_aborted():
    outputs = Given(tokens(1))
    outputs.abort()
    messages = await run(outputs)
    assert ids(messages) == [[1]] and messages[-1].finished.reason == common_pb2.FINISH_REASON_ABORT
    assert outputs.abandoned == 1
    # Again, or behind the end: nothing more.
    outputs.abort()
    outputs.close()
    assert outputs.abandoned == 1
    ended = Given(tokens(1), Ending("length"))
    ended.abort()
    assert (await run(ended))[-1].finished.reason == common_pb2.FINISH_REASON_LENGTH and ended.abandoned == 0


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("Out of memory even after retracting all", ResourceExhausted),
        ("KV cache out of memory", ResourceExhausted),
        ("the engine is stopping", Unavailable),
        ("division by zero", Internal),
    ],
)
async def test_failures(message, kind):
    outputs = Given(tokens(1), Ending("failed", message=message))
    with pytest.raises(kind, match=message):
        await run(outputs)
    assert outputs.abandoned == 0


async def test_retractions_and_times():
    outputs = Given(tokens(1), Ending("length", retractions=2))
    outputs.began_ns = time.monotonic_ns() + 1_000_000
    usage = (await run(outputs))[-1].finished.usage
    assert usage.retractions == 2 and 0 < usage.queue_seconds < 0.1
    assert usage.prefill_seconds >= 0 and usage.decode_seconds >= 0
    # One that never began waited all the time.
    usage = (await run(Given(Ending("length"))))[-1].finished.usage
    assert (usage.prefill_seconds, usage.decode_seconds) == (0, 0) and usage.queue_seconds >= 0


# Stop strings


async def test_a_stop_string_ends_it_where_it_ends():
    outputs = Given(tokens(*b"ab"), tokens(*b"cSTOPxyz"), tokens(*b"more"))
    messages = await run(outputs, text("STOP"))
    assert ids(messages) == [[*b"ab"], [*b"cSTOP"]]
    assert [len(m.chunk.logprobs) for m in messages[:-1]] == [2, 5]
    finished = messages[-1].finished
    assert finished.reason == common_pb2.FINISH_REASON_STOP_STRING and finished.stop_string == "STOP"
    assert finished.usage.completion_tokens == 7
    # The runtime does not go on for nobody.
    assert outputs.abandoned == 1


async def test_a_stop_string_over_several_outputs():
    outputs = Given(*(tokens(b) for b in b"hello world"), Ending("length"))
    messages = await run(outputs, text("nothing", "o w"))
    assert ids(messages) == [[b] for b in b"hello w"]
    assert messages[-1].finished.stop_string == "o w"


async def test_a_stop_string_that_only_begins():
    messages = await run(Given(tokens(*b"abSTO"), Ending("length")), text("STOP"))
    assert ids(messages) == [[*b"abSTO"]] and messages[-1].finished.reason == common_pb2.FINISH_REASON_LENGTH


async def test_the_stop_token_comes_before_a_stop_string_that_only_begins():
    messages = await run(Given(tokens(*b"abSTO", EOS), Ending("stop", EOS)), text("STOP"))
    assert messages[-1].finished.stop_token_id == EOS


# Who does not want the rest


async def test_closing_the_stream_abandons_the_request():
    outputs = Given(tokens(1), tokens(2))
    generation = Generation(3, None, NoOpTracer(), INVALID_SPAN)
    async with aclosing(generation.run(outputs)) as messages:
        async for message in messages:
            assert list(message.chunk.token_ids) == [1]
            break
    assert outputs.abandoned == 1


async def test_a_cancel_while_it_waits_abandons_the_request():
    outputs = Given(tokens(1))
    task = asyncio.ensure_future(run(outputs))
    await asyncio.sleep(0.01)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert outputs.abandoned == 1


# Spans


def tracer() -> tuple[TracerProvider, InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider, exporter


@pytest.mark.parametrize("how", ["ended", "closed"])
async def test_spans_of_what_has_happened(how):
    provider, exporter = tracer()
    trace = provider.get_tracer("test")
    root = trace.start_span("engine.start_generate")
    outputs = Given(tokens(1), *([Ending("length")] if how == "ended" else []))
    generation = Generation(3, None, trace, root)
    outputs.began_ns = time.monotonic_ns()
    async with aclosing(generation.run(outputs)) as messages:
        async for _ in messages:
            if how == "closed":
                break
    root.end()
    spans = {s.name: s for s in exporter.get_finished_spans()}
    assert set(spans) == {"engine.queue", "engine.prefill", "engine.decode", "engine.start_generate"}
    for name in ("engine.queue", "engine.prefill", "engine.decode"):
        parent = spans[name].parent
        assert parent is not None and parent.span_id == spans["engine.start_generate"].context.span_id
    assert spans["engine.queue"].end_time == spans["engine.prefill"].start_time
    assert spans["engine.prefill"].end_time == spans["engine.decode"].start_time
    assert [e.name for e in spans["engine.start_generate"].events] == ["first_token"]


async def test_no_spans_of_what_has_not_happened():
    provider, exporter = tracer()
    trace = provider.get_tracer("test")
    root = trace.start_span("engine.start_generate")
    with pytest.raises(Internal):
        async for _ in Generation(3, None, trace, root).run(Given(Ending("failed", message="x"))):
            pass
    assert [s.name for s in exporter.get_finished_spans()] == ["engine.queue"]
