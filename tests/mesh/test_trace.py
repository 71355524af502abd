"""The trace of one request, as an OTLP collector and `kvmesh trace` get it."""

from __future__ import annotations

import uuid
from collections import Counter
from itertools import pairwise

from direct import DirectEngine
from mesh_process import RunningMesh
from otlp_collector import CollectedSpan, Collector
from prompts import prompt

from kvmesh.client import AsyncClient

# Three chunks of 512.
TOKENS, NEW = 1201, 12
SLACK_NS = 2_000_000
SUB_REQUESTS = {"prep_recv": "engine-1", "remote_send": "engine-0", "start_generate": "engine-1"}


def complete(spans: list[CollectedSpan]) -> bool:
    names = Counter(span.name for span in spans)
    moved = sum(span.attributes["kvmesh.tokens"] for span in spans if span.name == "engine.transfer")
    engine = [f"engine.{name}" for name in SUB_REQUESTS]
    return all(names[name] for name in ("router.generate", *SUB_REQUESTS, *engine)) and moved == TOKENS - 1


def check_times(spans: list[CollectedSpan]) -> None:
    """Fails unless every span is within its parent."""
    known = {span.id: span for span in spans}
    for span in spans:
        assert span.start <= span.end
        if span.parent:
            parent = known[span.parent]
            assert parent.start - SLACK_NS <= span.start, (span, parent)
            assert span.end <= parent.end + SLACK_NS, (span, parent)


def follow(*spans: CollectedSpan) -> None:
    """Fails unless they come one after another."""
    for before, after in pairwise(spans):
        assert before.end <= after.start + SLACK_NS, (before, after)


async def test_one_prefill_decode_request(
    mesh: RunningMesh, collector: Collector, client: AsyncClient, engines: list[DirectEngine]
) -> None:
    request_id = f"traced-{uuid.uuid4().hex[:8]}"
    answer = client.generate(
        prompt(TOKENS, "trace"),
        strategy="prefill_decode",
        request_id=request_id,
        temperature=0,
        ignore_eos=True,
        max_new_tokens=NEW,
    )
    result = await answer.wait()
    shares = {share.engine: share for share in result.shares}
    spans = collector.wait(result.trace_id, complete, 20)
    assert complete(spans), sorted(span.name for span in spans)
    check_times(spans)

    def children(parent: CollectedSpan) -> dict[str, list[CollectedSpan]]:
        found: dict[str, list[CollectedSpan]] = {}
        for span in spans:
            if span.parent == parent.id:
                found.setdefault(span.name, []).append(span)
        return found

    (root,) = [span for span in spans if not span.parent]
    assert (root.name, root.service) == ("router.generate", "kvmesh.router")
    assert root.attributes["kvmesh.request_id"] == request_id
    assert root.attributes["gen_ai.usage.input_tokens"] == TOKENS
    assert root.attributes["gen_ai.usage.output_tokens"] == NEW
    assert list(children(root)) == ["strategy prefill_decode"]
    (strategy,) = children(root)["strategy prefill_decode"]
    asked = children(strategy)
    assert list(asked) == list(SUB_REQUESTS) and all(len(same) == 1 for same in asked.values())
    follow(*(asked[name][0] for name in SUB_REQUESTS))

    served: dict[str, CollectedSpan] = {}
    for name, engine in SUB_REQUESTS.items():
        sub = asked[name][0]
        assert (sub.service, sub.attributes["kvmesh.engine"]) == ("kvmesh.router", engine)
        assert list(children(sub)) == [f"engine.{name}"]
        (served[name],) = children(sub)[f"engine.{name}"]
        assert (served[name].service, served[name].instance) == ("kvmesh.engine", engine)
        assert served[name].attributes["kvmesh.request_id"] == request_id
    assert not children(served["prep_recv"])

    sent = children(served["remote_send"])
    assert set(sent) == {"engine.queue", "engine.prefill", "engine.transfer"}
    (queue,), (prefill,), transfers = (sent[name] for name in ("engine.queue", "engine.prefill", "engine.transfer"))
    follow(queue, prefill)
    follow(*transfers)
    assert prefill.attributes["kvmesh.computed"] == TOKENS - 1
    assert len(transfers) >= 2
    # Copying overlaps with computing: the first chunk goes before the last one is there.
    assert transfers[0].start < prefill.end
    assert {span.attributes["kvmesh.transport"] for span in transfers} == {"shm"}
    assert sum(span.attributes["kvmesh.tokens"] for span in transfers) == TOKENS - 1
    moved = sum(span.attributes["kvmesh.bytes"] for span in transfers)
    layout = engines[0].info.layout
    assert moved == (TOKENS - 1) * layout.bytes_per_token * layout.ranks
    assert (
        moved == served["remote_send"].attributes["kvmesh.bytes"] == asked["remote_send"][0].attributes["kvmesh.bytes"]
    )
    assert moved == shares["engine-0"].sent_bytes

    generated = children(served["start_generate"])
    assert list(generated) == ["engine.queue", "engine.prefill", "engine.decode"]
    (queue,), (prefill,), (decode,) = generated.values()
    follow(queue, prefill, decode)
    first = served["start_generate"].events["first_token"]
    assert abs(first - prefill.end) <= SLACK_NS and abs(first - decode.start) <= SLACK_NS
    assert asked["start_generate"][0].events["first_token"] >= first - SLACK_NS
    assert decode.attributes["gen_ai.usage.output_tokens"] == NEW
    assert len(spans) == 2 + 3 + 3 + 2 + len(transfers) + 3

    # The same from the files.
    code, out, errors = await mesh.run("trace", request_id)
    assert code == 0, errors
    shown = Counter(line.split("  ")[0] for line in (line.strip() for line in out.splitlines()))
    for name, count in Counter(span.name for span in spans).items():
        assert shown[name] == count, (name, out)


async def test_a_request_that_was_never_made(mesh: RunningMesh) -> None:
    code, _, errors = await mesh.run("trace", "never-made")
    assert code == 1
    assert "never-made" in errors


async def test_a_cancelled_request_shows_as_such(collector: Collector, client: AsyncClient) -> None:
    answer = client.generate(prompt(50, "cancelled"), ignore_eos=True, max_new_tokens=2000, request_id="given-up")
    async for _ in answer:
        break
    answer.cancel()

    def ended(spans: list[CollectedSpan]) -> bool:
        return any(span.name == "router.generate" for span in spans) and len(spans) >= 4

    # The result, and with it the trace id, never came: it is found by the request's id.
    trace_id = collector.find("kvmesh.request_id", "given-up", 20)
    spans = collector.wait(trace_id, ended, 20)
    marked = {span.name for span in spans if span.attributes.get("kvmesh.cancelled")}
    assert {"router.generate", "engine.start_generate"} <= marked, spans
