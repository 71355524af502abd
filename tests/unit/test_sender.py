"""The sending side: against a receiver that is played, a real one, and one or the other dying."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from engine_harness import CODES, HOST, EngineNode, Wire, process, refused, two, until
from fake_runtime import TINY, FakeRuntime, answer

from kvmesh.dataplane.slots import to_runs
from kvmesh.endpoint import sender, tickets
from kvmesh.errors import Aborted, FailedPrecondition, NotFound, Unavailable
from kvmesh.grpcx import Server, channel, rpc
from kvmesh.process import ProcessRef
from kvmesh.v1 import common_pb2, kv_pb2_grpc
from kvmesh.v1 import kv_pb2 as pb

PROMPT = [(i * 37) % 200 + 1 for i in range(100)]
PAGE16 = dataclasses.replace(TINY, page_size=16)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(tickets, "LOOK_S", 0.02)
    monkeypatch.setattr(sender, "LOOK_S", 0.02)
    monkeypatch.setattr(sender, "BACKOFF_S", (0.01, 0.1))


def busy(node: EngineNode) -> list[str]:
    """What the sender has under way."""
    return [t.get_name() for t in node.sender._tasks._tasks if "look" not in t.get_name()]


# A played receiver

Script = Callable[["PlayedReceiver", Any, Any], Awaitable[None]]


class PlayedReceiver(kv_pb2_grpc.KvPeerServicer):
    """KvPeer that does what `script` says, with slots of `runtime`'s pool."""

    def __init__(self, runtime: FakeRuntime, script: Script) -> None:
        self.runtime, self.script = runtime, script
        self.begins: list[pb.WriteBegin] = []
        self.stopped: list[int] = []
        self.refuse_stopped = 0
        self.endpoint = common_pb2.Endpoint(name="played", incarnation=secrets.token_hex(16))
        self.slots = runtime.slots(list(range(1, 100)))

    def ticket(self, matched: int = 0, end: int = 99) -> common_pb2.Ticket:
        print_ = self.runtime.layout.fingerprint
        return common_pb2.Ticket(receiver=self.endpoint, id=1, matched=matched, end=end, layout_fingerprint=print_)

    def grant(self, count: int = 99, **fields: Any) -> pb.WriteResponse:
        runs = to_runs(self.slots[:count])
        values = {"transport": "shm", "slots": runs, "pools": self.runtime.pools["shm"], "max_ms": 5000, **fields}
        return pb.WriteResponse(grant=pb.WriteGrant(**values))

    @rpc
    async def Write(self, requests: Any, context: Any) -> None:
        request = await anext(requests)
        self.begins.append(request.begin)
        await self.script(self, requests, context)

    @rpc
    async def Stopped(self, request: pb.StoppedRequest, context: Any) -> pb.StoppedResponse:
        if self.refuse_stopped:
            self.refuse_stopped -= 1
            raise Unavailable("not now")
        self.stopped.append(request.write_id)
        return pb.StoppedResponse()


@asynccontextmanager
async def played(script: Script) -> AsyncIterator[tuple[EngineNode, PlayedReceiver]]:
    """A real sender and a played receiver."""
    node, far = EngineNode("p"), FakeRuntime()
    far.writes = node.runtime.writes
    await node.start()
    await far.start()
    receiver = PlayedReceiver(far, script)
    server = Server(
        "127.0.0.1:0", lambda s: kv_pb2_grpc.add_KvPeerServicer_to_server(receiver, s), ["kvmesh.v1.KvPeer"]
    )
    receiver.endpoint.address = server.address
    await server.start()
    try:
        yield node, receiver
        await node.settled()
    finally:
        await node.stop()
        await server.stop(0)
        await far.stop()


async def grants(receiver: PlayedReceiver, requests: Any, context: Any) -> None:
    await context.write(receiver.grant())
    done = await anext(requests)
    assert done.WhichOneof("event") == "done"
    await context.write(pb.WriteResponse(committed=pb.WriteCommitted(filled=99)))


async def test_what_the_sender_says():
    async with played(grants) as (p, receiver):
        sent = await p.send(PROMPT, receiver.ticket())
        (begin,) = receiver.begins
        assert (begin.begin, begin.end, begin.ticket, begin.sender) == (0, 99, receiver.ticket(), p.endpoint)
        me = ProcessRef.current()
        assert begin.location == pb.WriterLocation(
            host_id=HOST, processes=[pb.Process(pid=me.pid, start_ticks=me.start_ticks)]
        )
        assert list(begin.transports) == ["shm"] and begin.layout == p.runtime.layout.message()
        assert begin.write_id >= 1
        assert (sent.sent_tokens, sent.sent_bytes, sent.transport) == (99, 99 * TINY.bytes_per_token, "shm")
        assert receiver.runtime.has(PROMPT, 0, 99, receiver.slots.tolist())
        # Stopped is for broken writes.
        await p.send(PROMPT, receiver.ticket())
        assert receiver.begins[1].write_id != begin.write_id
        assert receiver.stopped == []


def ends_with(error: Exception, granted: bool) -> Script:
    async def script(receiver: PlayedReceiver, requests: Any, context: Any) -> None:
        if granted:
            await context.write(receiver.grant())
            await anext(requests)
        raise error

    return script


@pytest.mark.parametrize("granted", [False, True])
@pytest.mark.parametrize("error", [NotFound("x"), FailedPrecondition("x"), Aborted("x"), Unavailable("x")], ids=repr)
async def test_the_receivers_refusals_are_passed_on(error, granted):
    async with played(ends_with(error, granted)) as (p, receiver):
        code, details = await refused(p.send(PROMPT, receiver.ticket()))
        assert (code, details) == (error.code, "receiver played: x")
        await until(lambda: receiver.stopped == [1])
        assert p.runtime.sending == 0


async def early(receiver: PlayedReceiver, requests: Any, context: Any) -> None:
    """Gives up while the copy is under way."""
    await context.write(receiver.grant())
    await p_at.wait()
    raise Aborted("taken back")


p_at = asyncio.Event()


async def test_a_receiver_that_gives_up_during_the_copy_stops_it():
    global p_at
    p_at = asyncio.Event()
    async with played(early) as (p, receiver):
        copying, stopping = p.runtime.gate("piece"), p.runtime.gate("stopping")
        call = p.send(PROMPT, receiver.ticket())
        await copying.reached()
        p_at.set()
        await stopping.reached()
        # The runtime still writes: neither an answer nor Stopped yet.
        await asyncio.sleep(0.05)
        assert receiver.stopped == [] and not call.done()
        stopping.open()
        assert await refused(call) == (CODES.ABORTED, "receiver played: taken back")
        await until(lambda: receiver.stopped == [1])


async def says_nothing(receiver: PlayedReceiver, requests: Any, context: Any) -> None:
    await asyncio.Event().wait()


async def grants_and_says_nothing(receiver: PlayedReceiver, requests: Any, context: Any) -> None:
    await context.write(receiver.grant())
    await asyncio.Event().wait()


@pytest.mark.parametrize(("script", "due"), [(says_nothing, "grant"), (grants_and_says_nothing, "committed")])
async def test_a_receiver_that_says_nothing(monkeypatch, script, due):
    monkeypatch.setattr(sender, "WORD_S", 0.1)
    async with played(script) as (p, receiver):
        code, details = await refused(p.send(PROMPT, receiver.ticket()))
        assert code is CODES.UNAVAILABLE and f"where {due} was due" in details
        await until(lambda: receiver.stopped == [1])


def answers(*messages: Callable[[PlayedReceiver], pb.WriteResponse]) -> Script:
    async def script(receiver: PlayedReceiver, requests: Any, context: Any) -> None:
        for message in messages:
            await context.write(message(receiver))

    return script


COMMITTED = pb.WriteResponse(committed=pb.WriteCommitted(filled=99))


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (answers(), "is not grant"),
        (answers(lambda _: COMMITTED), "is not grant"),
        (answers(lambda _: pb.WriteResponse()), "is not grant"),
        (answers(lambda r: r.grant(98)), "98 slots for 99 tokens"),
        (answers(lambda r: r.grant(pools=[])), ""),
        (answers(lambda r: r.grant(slots=pb.SlotRuns(starts=[500], lengths=[99]))), "rows 1 to 512"),
        (answers(lambda r: r.grant(slots=pb.SlotRuns(starts=[0], lengths=[99]))), "rows 1 to 512"),
    ],
)
async def test_a_receiver_that_talks_nonsense_is_not_written_to(script, says):
    async with played(script) as (p, receiver):
        code, details = await refused(p.send(PROMPT, receiver.ticket()))
        assert code in (CODES.INTERNAL, CODES.INVALID_ARGUMENT) and says in details
        assert p.runtime.calls["send"] == 0
        await until(lambda: receiver.stopped == [1])


async def test_a_receiver_that_ends_the_stream_during_the_copy():
    async with played(answers(lambda r: r.grant())) as (p, receiver):
        p.runtime.gate("piece")
        code, details = await refused(p.send(PROMPT, receiver.ticket()))
        assert (code, details) == (CODES.ABORTED, "the receiver ended the write")
        await until(lambda: receiver.stopped == [1])


async def test_the_ticket_ends_during_the_copy():
    async def script(receiver: PlayedReceiver, requests: Any, context: Any) -> None:
        await context.write(receiver.grant(max_ms=50))
        await asyncio.Event().wait()

    async with played(script) as (p, receiver):
        p.runtime.gate("piece")
        code, details = await refused(p.send(PROMPT, receiver.ticket()))
        assert code is CODES.ABORTED and "life of 0.1 s" in details
        await until(lambda: receiver.stopped == [1])


async def test_stopped_is_said_until_it_is_heard(monkeypatch):
    monkeypatch.setattr(sender, "STOPPED_TRIES", 3)
    async with played(ends_with(Aborted("x"), True)) as (p, receiver):
        # More often than a receiver is tried that may be dead: this one lives.
        receiver.refuse_stopped = 5
        await refused(p.send(PROMPT, receiver.ticket()))
        await until(lambda: receiver.stopped == [1], timeout=10)


@pytest.mark.parametrize("fault", [Aborted("the send was ended: no room"), Unavailable("stopping"), ValueError("bug")])
async def test_a_send_that_fails_here(fault):
    async with played(grants) as (p, receiver):
        p.runtime.faults["piece"] = fault
        code, details = await refused(p.send(PROMPT, receiver.ticket()))
        if isinstance(fault, ValueError):
            assert code is CODES.INTERNAL and "bug" not in details
        else:
            assert (code, details) == (fault.code, str(fault))
        await until(lambda: receiver.stopped == [1])


async def test_a_wrong_address_does_no_lasting_harm():
    """A ticket with somebody else's address fails; the receiver's own address works after that."""
    async with played(grants) as (p, receiver):
        wrong = receiver.ticket()
        wrong.receiver.address = "127.0.0.1:1"
        code, details = await refused(p.send(PROMPT, wrong))
        assert code is CODES.UNAVAILABLE and details.startswith("receiver played: ")
        assert (await p.send(PROMPT, receiver.ticket())).sent_tokens == 99


@pytest.mark.parametrize("address", ["no such host:1", "127.0.0.1", "", "256.1.1.1:70000"])
async def test_addresses_that_are_none(address):
    async with played(grants) as (p, receiver):
        ticket = receiver.ticket()
        ticket.receiver.address = address
        code, details = await refused(p.send(PROMPT, ticket))
        assert code in (CODES.INVALID_ARGUMENT, CODES.UNAVAILABLE), details


# A real receiver


async def test_bytes_arrive_where_they_should():
    async with two() as (p, d):
        ticket = await d.prepare(PROMPT)
        rows = d.runtime.slots(d.runtime.reservations[1].pages).tolist()
        sent = await p.send(PROMPT, ticket)
        assert d.runtime.has(PROMPT, 0, 99, rows)
        assert (sent.cached_tokens, sent.computed_tokens, sent.sent_tokens) == (0, 99, 99)
        assert (sent.sent_bytes, sent.transport, sent.chunks) == (99 * TINY.bytes_per_token, "shm", 4)
        assert 0 <= sent.tail_seconds < sent.compute_seconds + sent.send_seconds
        result = await d.generate(PROMPT, 6, ticket=ticket, begin=99)
        assert result.tokens == answer(PROMPT, 6)
        assert result.finished.usage.cached_tokens == 99
        # p has it all now, d as well.
        again = await d.prepare(PROMPT)
        assert again.matched == 99
        sent = await p.send(PROMPT, again)
        assert (sent.cached_tokens, sent.computed_tokens, sent.sent_tokens, sent.sent_bytes) == (99, 0, 0, 0)
        await d.release(again)


async def test_without_the_send_the_tokens_differ():
    """The tests' own eyes: slots that nobody wrote to are seen."""
    async with two() as (p, d):
        p.runtime.compute = lambda *args: None  # type: ignore[method-assign]
        ticket = await d.prepare(PROMPT)
        await p.send(PROMPT, ticket)
        result = await d.generate(PROMPT, 6, ticket=ticket, begin=99)
        assert result.tokens != answer(PROMPT, 6)


async def test_only_what_is_missing_is_sent():
    async with two() as (p, d):
        await d.generate(PROMPT[:60], 1)
        ticket = await d.prepare(PROMPT)
        assert ticket.matched == 60
        sent = await p.send(PROMPT, ticket, begin=-40, end=-1)
        assert (sent.sent_tokens, sent.computed_tokens) == (39, 99)
        assert d.runtime.holds(PROMPT, 99)
        assert (await d.generate(PROMPT, 3, ticket=ticket, begin=99)).tokens == answer(PROMPT, 3)


async def test_two_senders_one_after_another():
    async with two() as (p, d):
        other = EngineNode("q", FakeRuntime(writes=p.runtime.writes))
        await other.start()
        ticket = await d.prepare(PROMPT)
        await p.send(PROMPT, ticket, end=50)
        assert (await other.send(PROMPT, ticket, begin=50)).sent_tokens == 49
        assert (await d.generate(PROMPT, 3, ticket=ticket, begin=-1)).tokens == answer(PROMPT, 3)
        await other.settled()
        await other.stop()


async def test_two_senders_at_once():
    """One of them is told that the other writes."""
    async with two() as (p, d):
        gate = p.runtime.gate("piece")
        ticket = await d.prepare(PROMPT)
        first = asyncio.ensure_future(p.send(PROMPT, ticket))
        await gate.reached()
        code, details = await refused(p.send(PROMPT, ticket))
        assert code is CODES.FAILED_PRECONDITION and "being written into by p" in details
        gate.open()
        await first
        await d.release(ticket)


async def test_both_ways_at_once_and_many():
    async with two() as (p, d):
        prompts = [[(i * k) % 200 + 1 for i in range(40)] for k in (3, 7, 11, 13, 17, 19)]

        async def one(a: EngineNode, b: EngineNode, prompt: list[int]) -> None:
            ticket = await b.prepare(prompt)
            await a.send(prompt, ticket)
            assert (await b.generate(prompt, 3, ticket=ticket, begin=39)).tokens == answer(prompt, 3)

        await asyncio.gather(*(one(*((p, d) if i % 2 else (d, p)), prompt) for i, prompt in enumerate(prompts)))


async def test_to_oneself():
    async with two() as (p, _):
        ticket = await p.prepare(PROMPT)
        await p.send(PROMPT, ticket)
        assert (await p.generate(PROMPT, 3, ticket=ticket, begin=99)).tokens == answer(PROMPT, 3)


async def test_pages_of_sixteen():
    async with two(FakeRuntime(layout=PAGE16), FakeRuntime(layout=PAGE16)) as (p, d):
        ticket = await d.prepare(PROMPT)
        assert ticket.end == 96
        code, details = await refused(p.send(PROMPT, ticket, end=50))
        assert code is CODES.INVALID_ARGUMENT and "page size 16" in details
        assert (await p.send(PROMPT, ticket, end=48)).sent_tokens == 48
        assert (await p.send(PROMPT, ticket, begin=48)).sent_tokens == 48
        result = await d.generate(PROMPT, 5, ticket=ticket, begin=96)
        assert result.tokens == answer(PROMPT, 5) and result.finished.usage.cached_tokens == 96


async def test_bfloat16():
    layout = dataclasses.replace(TINY, dtype="bfloat16")
    async with two(FakeRuntime(layout=layout), FakeRuntime(layout=layout)) as (p, d):
        ticket = await d.prepare(PROMPT)
        assert (await p.send(PROMPT, ticket)).sent_bytes == 99 * TINY.bytes_per_token // 2
        assert (await d.generate(PROMPT, 5, ticket=ticket, begin=99)).tokens == answer(PROMPT, 5)


@pytest.mark.parametrize("change", [{"heads": 1}, {"dtype": "float16"}, {"model_digest": "1" * 32}])
async def test_another_layout_is_refused_by_the_receiver_too(change):
    async with two(b=FakeRuntime(layout=dataclasses.replace(TINY, **change))) as (p, d):
        ticket = await d.prepare(PROMPT)
        code, details = await refused(p.send(PROMPT, ticket))
        assert code is CODES.FAILED_PRECONDITION and "layout" in details
        # Were the ticket not to say so, the receiver would.
        ticket.layout_fingerprint = p.runtime.layout.fingerprint
        code, details = await refused(p.send(PROMPT, ticket))
        name = next(iter(change))
        assert code is CODES.FAILED_PRECONDITION and f"{name} is" in details
        await d.release(ticket)


async def test_another_host():
    async with two() as (p, d):
        d.receiver._host_id = "elsewhere"
        ticket = await d.prepare(PROMPT)
        code, details = await refused(p.send(PROMPT, ticket))
        assert code is CODES.FAILED_PRECONDITION and "different hosts" in details
        await d.release(ticket)


async def test_no_common_transport():
    async with two() as (p, d):
        ticket = await d.prepare(PROMPT)
        d.runtime.pools["nccl"] = d.runtime.pools.pop("shm")
        code, details = await refused(p.send(PROMPT, ticket))
        d.runtime.pools["shm"] = d.runtime.pools.pop("nccl")
        assert code is CODES.FAILED_PRECONDITION and "shm: not here; the receiver has nccl" in details
        await d.release(ticket)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"begin": 50, "end": 40}, "begin = 50, end = 40"),
        ({"end": 101}, "end = 101"),
        ({"end": -101}, "end = -101"),
        ({"end": 100}, "the ticket has slots for 20 to 99"),
        ({"begin": 19}, "the ticket has slots for 20 to 99"),
        ({"begin": 21}, "ticket 1 holds 20"),
        ({"owner": "o" * 129}, "owner"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
async def test_bad_arguments(fields, says):
    async with two() as (p, d):
        await d.generate(PROMPT[:20], 1)
        ticket = await d.prepare(PROMPT)
        assert ticket.matched == 20
        ticket.id = 1
        code, details = await refused(p.send(PROMPT, ticket, **fields))
        assert code is CODES.INVALID_ARGUMENT and says in details
        assert (await p.send(PROMPT, ticket)).sent_tokens == 79
        await d.release(ticket)


@pytest.mark.parametrize("tokens", [[], [1, 400], [1] * 3000])
async def test_bad_prompts(tokens):
    async with two() as (p, d):
        ticket = await d.prepare(PROMPT)
        code, _ = await refused(p.send(tokens, ticket, begin=0, end=0))
        assert code is CODES.INVALID_ARGUMENT
        code, _ = await refused(p.send(PROMPT, ticket, model="other"))
        assert code is CODES.NOT_FOUND
        await d.release(ticket)


@pytest.mark.parametrize("how", ["unknown", "released", "expired", "used"])
async def test_tickets_that_are_not_there(how):
    async with two() as (p, d):
        ticket = await d.prepare(PROMPT, ttl_ms=100 if how == "expired" else 0)
        if how == "expired":
            await until(lambda: d.book.count == 0)
        elif how == "used":
            await d.generate(PROMPT, 1, ticket=ticket)
        else:
            await d.release(ticket)
        if how == "unknown":
            ticket.id = 99
        code, details = await refused(p.send(PROMPT, ticket))
        assert code is CODES.NOT_FOUND and details.startswith("receiver d: ticket.id = ")
        # The refused sender says that it has stopped; nobody minds.
        await until(lambda: not busy(p))
        assert p.runtime.calls["send"] == 0


async def test_a_ticket_of_a_former_life():
    async with two() as (p, d):
        ticket = await d.prepare(PROMPT)
        ticket.receiver.incarnation = "f" * 32
        code, details = await refused(p.send(PROMPT, ticket))
        assert code is CODES.FAILED_PRECONDITION and "not this life" in details
        ticket.receiver.incarnation = d.endpoint.incarnation
        await d.release(ticket)


async def test_the_senders_memory_is_full():
    async with two(FakeRuntime(total_slots=64)) as (p, d):
        ticket = await d.prepare(PROMPT)
        code, details = await refused(p.send(PROMPT, ticket))
        assert code is CODES.ABORTED and "no room" in details
        await until(lambda: d.book.count == 0)


# Cancelled, late, taken back

# Where, and how many pieces have been copied before.
POINTS = [("send", 0), ("piece", 0), ("piece", 1), ("piece", 3), ("copied", 0)]


@pytest.mark.parametrize("how", ["cancelled", "late", "released", "expired"])
@pytest.mark.parametrize(("point", "free"), POINTS)
async def test_an_end_at_every_stage_of_a_write(point, free, how):
    """Until the sender's runtime has stopped, the slots are nobody's; then they are free."""
    async with two() as (p, d):
        gate, stopping = p.runtime.gate(point, free), p.runtime.gate("stopping")
        ticket = await d.prepare(PROMPT, ttl_ms=500 if how == "expired" else 60_000)
        call = p.send(PROMPT, ticket, timeout=0.5 if how == "late" else 20)
        await gate.reached()
        if how == "cancelled":
            call.cancel()
        elif how == "released":
            assert await d.release(ticket) is True
        await stopping.reached()
        if how in ("released", "expired"):
            await until(lambda: d.book.quarantined == 99)
        await asyncio.sleep(0.03)
        assert d.runtime.load.reserved == 99 and d.runtime.freed == []
        stopping.open()
        if how == "cancelled":
            with pytest.raises(asyncio.CancelledError):
                await call
        else:
            code, _ = await refused(call)
            assert code is (CODES.DEADLINE_EXCEEDED if how == "late" else CODES.ABORTED)
        await until(lambda: d.runtime.freed == [1])
        code, _ = await refused(p.send(PROMPT, ticket))
        assert code is CODES.NOT_FOUND
        # Both go on as if nothing had been.
        p.runtime.gates.clear()
        ticket = await d.prepare(PROMPT)
        await p.send(PROMPT, ticket)
        assert (await d.generate(PROMPT, 3, ticket=ticket, begin=99)).tokens == answer(PROMPT, 3)


@pytest.mark.parametrize("point", ["publish", "published"])
@pytest.mark.parametrize("how", ["cancelled", "late", "released"])
async def test_an_end_while_the_receiver_publishes(point, how):
    async with two() as (p, d):
        gate = d.runtime.gate(point)
        ticket = await d.prepare(PROMPT)
        call = p.send(PROMPT, ticket, timeout=0.5 if how == "late" else 20)
        await gate.reached()
        if how == "released":
            assert await d.release(ticket) is True
            gate.open()
            assert (await call).sent_tokens == 99
        elif how == "cancelled":
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        else:
            assert (await refused(call))[0] is CODES.DEADLINE_EXCEEDED
        await until(lambda: d.book.count == 0)
        gate.open()
        await until(lambda: d.runtime.freed == [1])
        assert d.book.quarantined == 0


@pytest.mark.parametrize("seed", range(6))
async def test_cancels_at_any_moment(seed):
    """Not at gates: wherever the loop happens to be."""
    async with two() as (p, d):
        ticket = await d.prepare(PROMPT)
        call = p.send(PROMPT, ticket)
        for _ in range(seed * 4):
            await asyncio.sleep(0)
        await asyncio.sleep(0.0007 * seed)
        call.cancel()
        try:
            await call
        except asyncio.CancelledError:
            await until(lambda: not busy(p))
        await d.release(ticket)


async def test_the_wait_for_a_grant_is_cancelled():
    async with played(says_nothing) as (p, receiver):
        call = p.send(PROMPT, receiver.ticket())
        await until(lambda: len(receiver.begins) == 1)
        call.cancel()
        await until(lambda: receiver.stopped == [1])
        assert p.runtime.calls["send"] == 0


async def test_failures_of_sends_are_the_callers_business(caplog):
    """The caller is told; the log need not be."""
    async with two() as (p, d):
        ticket = await d.prepare(PROMPT)
        await d.release(ticket)
        with caplog.at_level(logging.INFO):
            await refused(p.send(PROMPT, ticket))
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING], caplog.text


# The other side dies


async def test_the_receiver_dies_during_the_write():
    async with two() as (p, d):
        ticket = await d.prepare(PROMPT)
        other = await d.prepare(PROMPT[:20], end=20)
        await p.send(PROMPT[:20], other)
        assert p.runtime.connections == 1
        gate = p.runtime.gate("piece", 1)
        call = p.send(PROMPT, ticket)
        await gate.reached()
        await d.server.stop(0)
        code, details = await refused(call)
        assert code is CODES.UNAVAILABLE and details.startswith("receiver d: ")
        # Its pool is let go of.
        assert p.runtime.calls["forget"] == 1 and p.runtime.connections == 0
        code, _ = await refused(p.send(PROMPT, ticket))
        assert code is CODES.UNAVAILABLE
        # What this one would do at its end.
        d.receiver.stopped(p.endpoint.incarnation, 2)
        for held in (ticket, other):
            d.receiver.release(held)


async def test_another_life_of_the_receiver_takes_the_place_of_the_former():
    async with two() as (p, d):
        ticket = await d.prepare(PROMPT)
        await p.send(PROMPT, ticket)
        await d.release(ticket)
        again = EngineNode("d", FakeRuntime(writes=p.runtime.writes))
        await again.start()
        other = await again.prepare(PROMPT)
        await p.send(PROMPT, other)
        assert p.runtime.connections == 1 and len(p.sender._peers) == 1
        await again.release(other)
        await again.settled()
        await again.stop()


async def test_many_receivers_are_not_all_kept(monkeypatch):
    monkeypatch.setattr(sender, "IDLE_PEERS", 2)
    async with two() as (p, d):
        nodes = [EngineNode(f"r{i}", FakeRuntime(64, writes=p.runtime.writes)) for i in range(4)]
        for node in nodes:
            await node.start()
            ticket = await node.prepare(PROMPT[:30])
            await p.send(PROMPT[:30], ticket)
            await node.release(ticket)
        assert len(p.sender._peers) <= 3 and p.runtime.connections <= 3
        for node in nodes:
            await node.settled()
            await node.stop()
        ticket = await d.prepare(PROMPT)
        await p.send(PROMPT, ticket)
        await d.release(ticket)


async def test_the_stream_breaks_while_both_live():
    """The receiver keeps the slots until the sender has stopped and got through to say so."""
    async with two() as (p, d), Wire(d.server.address) as wire:
        d.endpoint.address = wire.address
        ticket = await d.prepare(PROMPT)
        gate, stopping = p.runtime.gate("piece", 1), p.runtime.gate("stopping")
        call = p.send(PROMPT, ticket)
        await gate.reached()
        wire.cut()
        await until(lambda: d.book.quarantined == 99)
        await stopping.reached()
        wire.mend()
        await asyncio.sleep(0.1)
        # The sender lives, and may write: neither time nor a look at its process frees them.
        assert d.runtime.freed == [] and d.book.quarantined == 99
        stopping.open()
        code, _ = await refused(call)
        assert code is CODES.UNAVAILABLE
        await until(lambda: d.runtime.freed == [1])


async def test_the_receiver_is_out_of_reach_for_long(monkeypatch):
    """Stopped is said until it is heard, for as long as the receiver lives: else its slots were lost for ever."""
    monkeypatch.setattr(sender, "STOPPED_TRIES", 2)
    async with two() as (p, d), Wire(d.server.address) as wire:
        d.endpoint.address = wire.address
        ticket = await d.prepare(PROMPT)
        gate = p.runtime.gate("piece", 1)
        call = p.send(PROMPT, ticket)
        await gate.reached()
        wire.cut()
        code, _ = await refused(call)
        assert code is CODES.UNAVAILABLE
        await asyncio.sleep(0.3)
        assert d.book.quarantined == 99
        wire.mend()
        await until(lambda: d.runtime.freed == [1], timeout=8)


@pytest.fixture
async def near() -> AsyncIterator[EngineNode]:
    """An engine of this process, for peers in others."""
    node = EngineNode("near")
    await node.start()
    try:
        yield node
        await node.settled()
    finally:
        await node.stop()


def far_send(far: grpc.aio.Channel, ticket: common_pb2.Ticket, tokens: list[int] = PROMPT) -> Any:
    request = pb.RemoteSendRequest(token_ids=tokens, begin=ticket.matched, end=99, ticket=ticket)
    return kv_pb2_grpc.KvEndpointStub(far).RemoteSend(request, timeout=20)


async def line(child: asyncio.subprocess.Process) -> str:
    assert child.stdout is not None
    async with asyncio.timeout(10):
        return (await child.stdout.readline()).decode().strip()


async def test_a_peer_is_killed_during_its_write_and_between_ours(near):
    """Its memory would stay for as long as we map it; ours it may write into until it is dead."""
    async with process(gates={"piece": 2}) as (child, address), channel(address) as far:
        request = pb.PrepRecvRequest(token_ids=PROMPT, end=99)
        theirs = (await kv_pb2_grpc.KvEndpointStub(far).PrepRecv(request, timeout=10)).ticket
        await near.send(PROMPT[:50], theirs, end=50)
        assert near.runtime.connections == 1
        ticket = await near.prepare([7, *PROMPT], end=99)
        ((number, held),) = near.runtime.reservations.items()
        rows = near.runtime.slots(held.pages).tolist()
        call = far_send(far, ticket, [7, *PROMPT])
        assert await line(child) == "piece"
        # It has written already, into memory that it maps.
        assert near.runtime.has([7, *PROMPT], 0, 64, rows[:64])
        assert not near.runtime.has([7, *PROMPT], 0, 99, rows)
        child.kill()
        code, _ = await refused(call)
        assert code is CODES.UNAVAILABLE
        await until(lambda: near.runtime.freed == [number])
        assert near.book.quarantined == 0 and not near.runtime.match([7, *PROMPT], 99)
        await until(lambda: near.runtime.connections == 0)


async def test_a_sender_that_hangs_goes_on_and_ends(near):
    """Stopped by the system, it is alive: the slots wait for it. At its end it stops writing before it goes."""
    gates = {"piece": 2, "stopping": 0, "copied": 1}
    async with process(gates=gates) as (child, address), channel(address) as far:
        ticket = await near.prepare(PROMPT)
        call = far_send(far, ticket)
        assert await line(child) == "piece"
        os.kill(child.pid, signal.SIGSTOP)
        assert await near.release(ticket) is True
        await until(lambda: near.book.count == 0)
        await asyncio.sleep(0.1)
        assert near.book.quarantined == 99 and near.runtime.freed == []
        os.kill(child.pid, signal.SIGCONT)
        assert await line(child) == "stopping"
        await asyncio.sleep(0.05)
        assert near.book.quarantined == 99
        os.kill(child.pid, signal.SIGUSR1)
        code, _ = await refused(call)
        assert code is CODES.ABORTED
        await until(lambda: near.runtime.freed == [1])
        # It is as good as before.
        ticket = await near.prepare(PROMPT)
        await far_send(far, ticket)
        assert (await near.generate(PROMPT, 3, ticket=ticket, begin=99)).tokens == answer(PROMPT, 3)
        ticket = await near.prepare([7, *PROMPT], end=99)
        call = far_send(far, ticket, [7, *PROMPT])
        assert await line(child) == "copied"
        child.terminate()
        code, _ = await refused(call)
        assert code in (CODES.UNAVAILABLE, CODES.CANCELLED)
        assert await asyncio.wait_for(child.wait(), 10) == 0
        await until(lambda: not near.runtime.reservations)


async def test_closing_the_sender_ends_its_writes():
    async with two() as (p, d):
        gate = p.runtime.gate("piece")
        ticket = await d.prepare(PROMPT)
        call = p.send(PROMPT, ticket)
        await gate.reached()
        await p.sender.close()
        assert await refused(call) == (CODES.UNAVAILABLE, "the sender is stopping")
        assert len(p.sender._tasks) == 0 and p.runtime.sending == 0
        # Nobody was left to say Stopped; the end of the process is what the receiver waits for.
        await until(lambda: d.book.quarantined == 99)
        d.receiver.stopped(p.endpoint.incarnation, 1)
