"""The receiving side: PrepRecv, Release, and KvPeer.Write played by a writer that does what the test says."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import grpc
import pytest
from engine_harness import CODES, HOST, EngineNode, refused, until
from fake_runtime import CONTEXT, TINY, VOCAB, FakeRuntime, chain, kv

from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.shm import SharedMemory
from kvmesh.dataplane.slots import from_runs
from kvmesh.endpoint import receiver, tickets
from kvmesh.errors import Internal, ResourceExhausted, Unavailable
from kvmesh.process import ProcessRef
from kvmesh.v1 import common_pb2
from kvmesh.v1 import kv_pb2 as pb

PROMPT = [(i * 37) % 200 + 1 for i in range(100)]


class Played:
    """One KvPeer.Write of a writer that is alive until the test says otherwise."""

    numbers = iter(range(1, 1_000_000))

    def __init__(
        self,
        node: EngineNode,
        ticket: common_pb2.Ticket,
        begin: int | None = None,
        end: int | None = None,
        *,
        write_id: int | None = None,
        processes: Sequence[ProcessRef] | None = None,
        host: str = HOST,
        layout: Layout | None = None,
        transports: Sequence[str] = ("shm",),
        tokens: Sequence[int] = PROMPT,
    ) -> None:
        self.node, self.tokens = node, tokens
        self.write_id = next(self.numbers) if write_id is None else write_id
        of = [ProcessRef.current()] if processes is None else processes
        self.begin = pb.WriteBegin(
            ticket=ticket,
            begin=ticket.matched if begin is None else begin,
            end=ticket.end if end is None else end,
            sender=common_pb2.Endpoint(name="p", address="127.0.0.1:1", incarnation="p" * 32),
            location=pb.WriterLocation(
                host_id=host, processes=[pb.Process(pid=p.pid, start_ticks=p.start_ticks) for p in of]
            ),
            layout=(layout or node.runtime.layout).message(),
            transports=transports,
            write_id=self.write_id,
        )
        self.call: Any = node.peer.Write(timeout=20)

    async def granted(self) -> pb.WriteGrant:
        await self.call.write(pb.WriteRequest(begin=self.begin))
        answer = await self.call.read()
        assert answer is not grpc.aio.EOF and answer.WhichOneof("event") == "grant"
        return answer.grant

    def fill(self, grant: pb.WriteGrant) -> None:
        """Writes the KV where the grant says."""
        (pool,) = grant.pools
        owner = ProcessRef(pool.process.pid, pool.process.start_ticks)
        memory = SharedMemory.open(owner, pool.fd, pool.bytes)
        layout = Layout.of(pool.layout)
        keys, values = memory.tensors(layout, pool.rows)
        rows = from_runs(grant.slots, pool.rows).tolist()
        for i, (k, v) in enumerate(kv(layout, self.tokens, self.begin.begin, self.begin.end)):
            keys[i][rows], values[i][rows] = k, v
        memory.close()

    async def say_done(self) -> None:
        await self.call.write(pb.WriteRequest(done=pb.WriteDone(bytes=1)))

    async def committed(self) -> int:
        await self.say_done()
        answer = await self.call.read()
        assert answer is not grpc.aio.EOF and answer.WhichOneof("event") == "committed"
        await self.call.done_writing()
        assert await self.call.read() is grpc.aio.EOF and await self.call.code() is CODES.OK
        return answer.committed.filled

    async def whole(self) -> int:
        self.fill(await self.granted())
        return await self.committed()

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """What the call ends with, whatever comes before."""
        async with asyncio.timeout(10):
            return await self.call.code(), await self.call.details()

    async def refused(self) -> tuple[grpc.StatusCode, str]:
        await self.call.write(pb.WriteRequest(begin=self.begin))
        return await self.status()

    async def stopped(self) -> None:
        request = pb.StoppedRequest(sender_incarnation="p" * 32, write_id=self.write_id)
        await self.node.peer.Stopped(request, timeout=10)


@pytest.fixture
async def node(request, monkeypatch) -> AsyncIterator[EngineNode]:
    monkeypatch.setattr(tickets, "LOOK_S", 0.01)
    made = EngineNode("d", FakeRuntime(**getattr(request, "param", {})))
    await made.start()
    try:
        yield made
        await made.settled()
    finally:
        await made.stop()


async def broken_off(node: EngineNode, **fields: Any) -> tuple[common_pb2.Ticket, Played]:
    """A ticket whose writer got its grant and then broke the stream."""
    ticket = await node.prepare(PROMPT)
    writer = Played(node, ticket, **fields)
    await writer.granted()
    writer.call.cancel()
    await until(lambda: node.book.count == 0)
    return ticket, writer


# PrepRecv


async def test_slots_are_reserved_and_given_back(node):
    ticket = await node.prepare(PROMPT, end=-1, owner="r1")
    assert (ticket.matched, ticket.end, ticket.receiver) == (0, 99, node.endpoint)
    assert node.runtime.load.reserved == 99 and node.book.count == 1
    assert await node.release(ticket) is True
    assert await node.release(ticket) is False
    await until(lambda: node.runtime.load.free == 512)


async def test_what_is_cached_is_not_reserved(node):
    first = await node.prepare(PROMPT, end=40)
    await Played(node, first).whole()
    ticket = await node.prepare(PROMPT)
    assert (ticket.matched, ticket.end) == (40, 99)
    assert node.runtime.load.reserved == 59
    # All of it.
    whole = await node.prepare(PROMPT, end=40)
    assert (whole.matched, whole.end) == (40, 40)
    for one in (first, ticket, whole):
        assert await node.release(one)


@pytest.mark.parametrize("end", [0, -100, -1, 100])
async def test_ends(node, end):
    ticket = await node.prepare(PROMPT, end=end)
    assert ticket.end == (end if end >= 0 else 100 + end)
    assert await node.release(ticket) is True


@pytest.mark.parametrize("node", [{"layout": dataclasses.replace(TINY, page_size=16)}], indirect=True)
@pytest.mark.parametrize(("end", "rounded"), [(15, 0), (16, 16), (99, 96), (100, 96), (-1, 96)])
async def test_ends_are_rounded_down_to_a_page(node, end, rounded):
    ticket = await node.prepare(PROMPT, end=end)
    assert ticket.end == rounded and node.runtime.load.reserved == rounded
    await node.release(ticket)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"token_ids": []}, "token_ids is empty"),
        ({"token_ids": [1, VOCAB]}, f"token_ids[1] = {VOCAB}"),
        ({"token_ids": [1] * (CONTEXT + 1)}, f"{CONTEXT + 1} tokens"),
        ({"end": 101}, "end = 101"),
        ({"end": -101}, "end = -101"),
        ({"ttl_ms": 99}, "ttl_ms = 99"),
        ({"ttl_ms": 600_001}, "ttl_ms = 600001"),
        ({"wait_ms": 600_001}, "wait_ms = 600001"),
        ({"owner": "o" * 129}, "owner has 129 characters"),
    ],
    ids=lambda v: "" if isinstance(v, dict) else v,
)
async def test_bad_arguments_reserve_nothing(node, fields, says):
    request = pb.PrepRecvRequest(**{"token_ids": PROMPT, "end": -1, **fields})
    code, details = await refused(node.kv.PrepRecv(request, timeout=10))
    assert code is CODES.INVALID_ARGUMENT and says in details
    assert node.runtime.calls["reserve"] == 0


async def test_an_unknown_model(node):
    code, details = await refused(node.kv.PrepRecv(pb.PrepRecvRequest(token_ids=PROMPT, model="other"), timeout=10))
    assert code is CODES.NOT_FOUND and "'other'" in details and "tiny" in details
    ticket = await node.prepare(PROMPT, end=0, model="tiny")
    assert ticket.end == 0
    await node.release(ticket)


async def test_a_guessed_ticket_opens_nothing(node):
    ticket = await node.prepare(PROMPT, end=8)
    assert len(ticket.secret) == 16
    guessed = common_pb2.Ticket()
    guessed.CopyFrom(ticket)
    for secret in (b"", bytes(16), ticket.secret[:-1]):
        guessed.secret = secret
        code, details = await refused(node.kv.Release(pb.ReleaseRequest(ticket=guessed), timeout=10))
        assert code is CODES.PERMISSION_DENIED and "ticket.secret" in details
        code, details = await Played(node, guessed, 0, 8).refused()
        assert code is CODES.PERMISSION_DENIED and "ticket.secret" in details
    await node.release(ticket)


async def test_no_room_now(node):
    ticket = await node.prepare([1] * 500, end=500)
    request = pb.PrepRecvRequest(token_ids=PROMPT, end=-1)
    code, details = await refused(node.kv.PrepRecv(request, timeout=10))
    assert code is CODES.RESOURCE_EXHAUSTED and "99 slots" in details
    assert node.runtime.load.waiting_reservations == 0 and node.book.count == 1
    await node.release(ticket)


async def test_room_is_waited_for(node):
    ticket = await node.prepare([1] * 500, end=500)
    waiting = asyncio.ensure_future(node.prepare(PROMPT, wait_ms=5000))
    await until(lambda: node.runtime.load.waiting_reservations == 1)
    # No longer than that.
    began = time.monotonic()
    code, _ = await refused(node.kv.PrepRecv(pb.PrepRecvRequest(token_ids=[7] * 20, end=20, wait_ms=50), timeout=10))
    assert code is CODES.RESOURCE_EXHAUSTED and 0.05 <= time.monotonic() - began < 2
    await node.release(ticket)
    assert await node.release(await waiting) is True


async def test_the_deadline_ends_the_wait_with_a_clear_answer(node):
    ticket = await node.prepare([1] * 500, end=500)
    request = pb.PrepRecvRequest(token_ids=PROMPT, end=-1, wait_ms=60_000)
    code, details = await refused(node.kv.PrepRecv(request, timeout=0.4))
    assert code is CODES.RESOURCE_EXHAUSTED, details
    await node.release(ticket)


async def test_a_caller_that_leaves_while_it_waits_holds_nothing(node):
    ticket = await node.prepare([1] * 500, end=500)
    call = node.kv.PrepRecv(pb.PrepRecvRequest(token_ids=PROMPT, end=-1, wait_ms=60_000))
    await until(lambda: node.runtime.load.waiting_reservations == 1)
    call.cancel()
    await until(lambda: node.runtime.load.waiting_reservations == 0)
    await node.release(ticket)
    assert node.book.count == 0


async def test_a_caller_that_leaves_before_the_runtime_answers_holds_nothing(node):
    gate = node.runtime.gate("reserve")
    call = node.kv.PrepRecv(pb.PrepRecvRequest(token_ids=PROMPT, end=-1))
    await gate.reached()
    call.cancel()
    await until(lambda: node.service.totals.calls == {("prep_recv", "CANCELLED"): 1})
    gate.open()
    await until(lambda: not node.runtime.reservations)
    assert node.book.count == 0


@pytest.mark.parametrize("delay", [0, 1, 2, 3, 5, 8])
async def test_a_caller_that_leaves_at_any_other_moment(node, delay):
    """Whether the answer was on its way or not: what was reserved is free at the ticket's end at the latest."""
    call = node.kv.PrepRecv(pb.PrepRecvRequest(token_ids=PROMPT, end=-1, ttl_ms=100))
    for _ in range(delay):
        await asyncio.sleep(0.0005)
    call.cancel()
    with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
        await call
        raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("fault", "code"),
    [(Unavailable("the engine is stopping"), "UNAVAILABLE"), (ResourceExhausted("full"), "RESOURCE_EXHAUSTED")],
)
async def test_failures_of_the_runtime_are_told(node, fault, code):
    node.runtime.faults["reserve"] = fault
    assert (await refused(node.kv.PrepRecv(pb.PrepRecvRequest(token_ids=PROMPT)))) == (CODES[code], str(fault))
    assert node.book.count == 0


async def test_tickets_expire(node):
    before = time.time()
    ticket = await node.prepare(PROMPT, ttl_ms=100)
    assert 0.1 <= ticket.expires_unix_ms / 1000 - before < 1
    await until(lambda: node.book.count == 0)
    code, details = await refused(node.send(PROMPT, ticket))
    assert code is CODES.NOT_FOUND and "has expired" in details
    assert await node.release(ticket) is False


async def test_a_ticket_of_a_former_life_is_not_released(node):
    ticket = await node.prepare(PROMPT)
    other = common_pb2.Ticket.FromString(ticket.SerializeToString())
    other.receiver.incarnation = "f" * 32
    code, details = await refused(node.kv.Release(pb.ReleaseRequest(ticket=other)))
    assert code is CODES.FAILED_PRECONDITION and "ffffffff" in details
    # Nor is one that says nothing.
    code, _ = await refused(node.kv.Release(pb.ReleaseRequest()))
    assert code is CODES.FAILED_PRECONDITION
    assert await node.release(ticket) is True


# Write, as it should be


async def test_a_write_from_begin_to_committed(node):
    ticket = await node.prepare(PROMPT, ttl_ms=30_000)
    writer = Played(node, ticket)
    grant = await writer.granted()
    assert grant.transport == "shm" and 29_000 < grant.max_ms <= 30_000
    assert list(grant.pools) == node.runtime.pools["shm"]
    rows = from_runs(grant.slots, grant.pools[0].rows).tolist()
    assert rows == node.runtime.slots(node.runtime.reservations[1].pages).tolist()
    writer.fill(grant)
    # Nobody finds it before it is done.
    assert not node.runtime.match(PROMPT, 99)
    assert await writer.committed() == 99
    assert node.runtime.holds(PROMPT, 99)
    assert node.book.count == 1 and node.runtime.load.reserved == 0
    await node.release(ticket)


async def test_two_writes_one_after_another(node):
    ticket = await node.prepare(PROMPT)
    assert await Played(node, ticket, 0, 33).whole() == 33
    assert node.runtime.holds(PROMPT, 33) and node.runtime.load.reserved == 66
    # Nothing at all is a write as well.
    assert await Played(node, ticket, 33, 33).whole() == 33
    # Of another writer.
    assert await Played(node, ticket, 33, 99).whole() == 99
    assert node.runtime.holds(PROMPT, 99)
    await node.release(ticket)


async def test_a_write_behind_what_was_cached(node):
    first = await node.prepare(PROMPT, end=50)
    await Played(node, first).whole()
    await node.release(first)
    ticket = await node.prepare(PROMPT)
    assert ticket.matched == 50
    grant = await (writer := Played(node, ticket)).granted()
    assert sum(grant.slots.lengths) == 49
    writer.fill(grant)
    await writer.committed()
    assert node.runtime.holds(PROMPT, 99)
    await node.release(ticket)


async def test_two_tickets_for_one_prompt_are_written_side_by_side(node):
    """Both have slots of their own; the second one's are not needed in the end."""
    one, two = await node.prepare(PROMPT), await node.prepare(PROMPT)
    assert node.runtime.load.reserved == 198
    writers = [Played(node, one), Played(node, two)]
    for writer in writers:
        writer.fill(await writer.granted())
    for writer in writers:
        assert await writer.committed() == 99
    load = node.runtime.load
    assert (load.reserved, load.in_use, load.free) == (0, 99, 512 - 99)
    assert node.runtime.holds(PROMPT, 99)
    for ticket in (one, two):
        await node.release(ticket)


# Write, refused


@pytest.mark.parametrize(
    ("begin", "end"), [(1, 99), (0, 100), (50, 40), (99, 99), (2**31, 2**31)], ids=lambda v: str(v)
)
async def test_ranges_that_do_not_fit(node, begin, end):
    ticket = await node.prepare(PROMPT)
    code, details = await Played(node, ticket, begin, end).refused()
    assert code is CODES.INVALID_ARGUMENT and f"begin = {begin}, end = {end}: ticket 1 holds 0" in details
    assert await Played(node, ticket).whole() == 99
    await node.release(ticket)


@pytest.mark.parametrize("node", [{"layout": dataclasses.replace(TINY, page_size=16)}], indirect=True)
async def test_parts_of_a_page_are_refused(node):
    """A page that is filled in part could be neither published nor given back."""
    ticket = await node.prepare(PROMPT)
    code, details = await Played(node, ticket, 0, 40).refused()
    assert code is CODES.INVALID_ARGUMENT and "page" in details and "40" in details
    assert await Played(node, ticket, 0, 32).whole() == 32
    assert await Played(node, ticket, 32, 96).whole() == 96
    await node.release(ticket)


@pytest.mark.parametrize("how", ["unknown", "released", "expired", "used"])
async def test_tickets_that_are_not_there(node, how):
    ticket = await node.prepare(PROMPT, ttl_ms=100 if how == "expired" else 60_000)
    if how == "unknown":
        await node.release(ticket)
        ticket.id = 77
    elif how == "released":
        await node.release(ticket)
    elif how == "expired":
        await until(lambda: node.book.count == 0)
    else:
        await node.generate(PROMPT, 1, ticket=ticket, begin=0)
    code, details = await Played(node, ticket).refused()
    wanted = {"unknown": "ticket.id = 77 is unknown", "expired": "has expired"}.get(how, f"was {how}")
    assert code is CODES.NOT_FOUND and wanted in details


async def test_a_ticket_of_a_former_life(node):
    ticket = await node.prepare(PROMPT)
    ticket.receiver.incarnation = "f" * 32
    code, details = await Played(node, ticket).refused()
    assert code is CODES.FAILED_PRECONDITION and "not this life" in details
    ticket.receiver.incarnation = node.endpoint.incarnation
    await node.release(ticket)


async def test_one_writer_at_a_time(node):
    ticket = await node.prepare(PROMPT)
    first = Played(node, ticket)
    grant = await first.granted()
    code, details = await Played(node, ticket).refused()
    assert code is CODES.FAILED_PRECONDITION and "being written into by p" in details
    first.fill(grant)
    assert await first.committed() == 99
    await node.release(ticket)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"heads": 1}, "heads is 1 there and 2 here"),
        ({"layers": 3, "k_dim": 8}, "layers is 3 there and 2 here, k_dim is 8 there and 4 here"),
        ({"dtype": "bfloat16"}, "dtype is bfloat16 there and float32 here"),
        ({"model_digest": "1" * 32}, f"model_digest is {'1' * 32} there and {'0' * 32} here"),
        ({"page_size": 16}, "page_size is 16 there and 1 here"),
        ({"v_dim": 2}, "v_dim is 2 there and 6 here"),
        ({"ranks": 2, "heads": 1}, "heads is 1 there and 2 here, ranks is 2 there and 1 here"),
    ],
)
async def test_another_layout(node, change, says):
    other = dataclasses.replace(TINY, **change)
    refusal = (CODES.FAILED_PRECONDITION, f"the sender's KV has another layout: {says}")
    # Before anything is reserved, where the sender is known.
    assert await refused(node.prepare(PROMPT, sender_layout=other.message())) == refusal
    assert not node.runtime.reservations and not node.book.count
    ticket = await node.prepare(PROMPT, sender_layout=TINY.message())
    assert Layout.of(ticket.layout) == TINY
    assert await Played(node, ticket, layout=other).refused() == refusal
    await node.release(ticket)


async def test_a_layout_that_is_none(node):
    ticket = await node.prepare(PROMPT)
    writer = Played(node, ticket)
    writer.begin.layout.dtype = "int4"
    code, details = await writer.refused()
    assert code in (CODES.INVALID_ARGUMENT, CODES.FAILED_PRECONDITION) and "int4" in details
    await node.release(ticket)


async def test_another_host(node):
    ticket = await node.prepare(PROMPT)
    code, details = await Played(node, ticket, host="elsewhere").refused()
    assert code is CODES.FAILED_PRECONDITION and "different hosts" in details
    await node.release(ticket)


@pytest.mark.parametrize(("offered", "says"), [((), "none"), (("nccl", "gloo"), "nccl: not here; gloo: not here")])
async def test_no_common_transport(node, offered, says):
    ticket = await node.prepare(PROMPT)
    code, details = await Played(node, ticket, transports=offered).refused()
    assert code is CODES.FAILED_PRECONDITION
    assert details == f"no common transport: of the sender's, {says}; the receiver has shm"
    # The first one of those offered that is here.
    writer = Played(node, ticket, transports=["nccl", "shm"])
    assert (await writer.granted()).transport == "shm"
    assert await writer.committed() == 99
    await node.release(ticket)


async def test_messages_out_of_order(node):
    ticket = await node.prepare(PROMPT)
    done_first = Played(node, ticket)
    await done_first.say_done()
    nothing, empty = Played(node, ticket), Played(node, ticket)
    await nothing.call.done_writing()
    await empty.call.write(pb.WriteRequest())
    for writer in (done_first, nothing, empty):
        assert await writer.status() == (CODES.INVALID_ARGUMENT, "the next message of a write must be begin")
    assert node.book.get(ticket).writer is None
    await node.release(ticket)


@pytest.mark.parametrize("how", ["begin", "empty", "half-close"])
async def test_no_done_where_it_is_due(node, how):
    """The writer may still be writing: its slots are not anybody's until it says that it has stopped."""
    ticket = await node.prepare(PROMPT)
    writer = Played(node, ticket)
    await writer.granted()
    if how == "half-close":
        await writer.call.done_writing()
    else:
        await writer.call.write(pb.WriteRequest(begin=writer.begin if how == "begin" else None))
    assert await writer.status() == (CODES.INVALID_ARGUMENT, "the next message of a write must be done")
    assert (node.book.count, node.book.quarantined, node.runtime.load.reserved) == (0, 99, 99)
    await writer.stopped()


async def test_a_writer_that_says_nothing(node, monkeypatch):
    monkeypatch.setattr(receiver, "WORD_S", 0.05)
    ticket = await node.prepare(PROMPT)
    code, details = await Played(node, ticket).status()
    assert code is CODES.DEADLINE_EXCEEDED and "did not say begin within 0.05 s" in details
    await node.release(ticket)


async def test_a_number_that_is_in_use(node):
    one, two = await node.prepare(PROMPT), await node.prepare(PROMPT)
    first = Played(node, one, write_id=5_000_001)
    await first.granted()
    code, details = await Played(node, two, write_id=5_000_001).refused()
    assert code is CODES.INVALID_ARGUMENT and "write_id = 5000001" in details
    first.call.cancel()
    await until(lambda: node.book.quarantined == 99)
    code, _ = await Played(node, two, write_id=5_000_001).refused()
    assert code is CODES.INVALID_ARGUMENT
    await first.stopped()
    code, _ = await Played(node, two, write_id=5_000_001).refused()
    assert code is CODES.INVALID_ARGUMENT
    assert await Played(node, two, write_id=5_000_002).whole() == 99
    await node.release(two)


# Taken back during a write


@pytest.mark.parametrize("how", ["released", "expired"])
async def test_taken_back_during_a_write(node, how):
    ticket = await node.prepare(PROMPT, ttl_ms=150 if how == "expired" else 60_000)
    writer = Played(node, ticket)
    grant = await writer.granted()
    node.runtime.writes.begin(grant.pools[0], from_runs(grant.slots, grant.pools[0].rows))
    if how == "released":
        assert await node.release(ticket) is True
    code, details = await writer.status()
    assert (code, details) == (CODES.ABORTED, "ticket 1 was taken back during the write")
    assert await node.release(ticket) is False
    # Until the writer has stopped, nobody gets these slots.
    await asyncio.sleep(0.05)
    assert node.book.quarantined == 99 and node.runtime.freed == []
    code, _ = await refused(node.kv.PrepRecv(pb.PrepRecvRequest(token_ids=[9] * 420, end=420)))
    assert code is CODES.RESOURCE_EXHAUSTED
    writer.fill(grant)
    node.runtime.writes.end(grant.pools[0], from_runs(grant.slots, grant.pools[0].rows))
    await writer.stopped()
    await until(lambda: node.runtime.freed == [1])
    other = await node.prepare([9] * 420, end=420)
    assert await node.release(other) is True


@pytest.mark.parametrize("node", [{"total_slots": 99}], indirect=True)
async def test_who_waits_gets_the_slots_once_the_writer_has_stopped(node):
    ticket = await node.prepare(PROMPT)
    writer = Played(node, ticket)
    await writer.granted()
    waiting = asyncio.ensure_future(node.prepare([9] * 100, wait_ms=5000))
    await until(lambda: node.runtime.load.waiting_reservations == 1)
    await node.release(ticket)
    await writer.status()
    assert not waiting.done()
    await writer.stopped()
    assert await node.release(await waiting) is True


async def test_taken_back_while_what_came_is_published(node):
    """The writer is told that it arrived, for it did; the ticket is gone nevertheless."""
    gate = node.runtime.gate("publish")
    ticket = await node.prepare(PROMPT)
    writer = Played(node, ticket)
    writer.fill(await writer.granted())
    committed = asyncio.ensure_future(writer.committed())
    await gate.reached()
    assert await node.release(ticket) is True
    gate.open()
    assert await committed == 99
    await until(lambda: node.runtime.freed == [1])
    assert node.runtime.holds(PROMPT, 99)


async def test_done_and_taken_back_at_once(node):
    """Whichever is seen first: committed or aborted, and the slots are free once."""
    seen = set()
    for _ in range(20):
        ticket = await node.prepare(PROMPT)
        writer = Played(node, ticket)
        await writer.granted()
        await asyncio.gather(writer.say_done(), node.release(ticket))
        with suppress(grpc.aio.AioRpcError):
            await writer.call.read()
        seen.add((await writer.status())[0])
        await writer.stopped()
        await until(lambda: not node.runtime.reservations)
    assert seen <= {CODES.OK, CODES.ABORTED}


# Broken writes


async def test_broken_off_until_stopped(node):
    ticket, writer = await broken_off(node)
    assert node.book.quarantined == 99 and node.runtime.load.reserved == 99
    code, details = await Played(node, ticket).refused()
    assert code is CODES.NOT_FOUND and "its writer broke off" in details
    code, _ = await refused(node.generate(PROMPT, 1, ticket=ticket))
    assert code is CODES.NOT_FOUND
    assert await node.release(ticket) is False
    await asyncio.sleep(0.05)
    assert node.runtime.freed == []
    await writer.stopped()
    await until(lambda: node.runtime.freed == [1])
    # Said again, or never heard of: no error, no effect.
    await writer.stopped()
    await node.peer.Stopped(pb.StoppedRequest(sender_incarnation="x", write_id=1), timeout=5)
    assert node.runtime.freed == [1]


async def test_stopped_before_the_break_is_seen(node):
    ticket = await node.prepare(PROMPT)
    writer = Played(node, ticket)
    await writer.granted()
    await writer.stopped()
    assert node.runtime.freed == [] and node.book.count == 1
    writer.call.cancel()
    await until(lambda: node.runtime.freed == [1])
    assert node.book.count == 0 and node.book.quarantined == 0


async def test_stopped_before_it_began(node):
    ticket = await node.prepare(PROMPT)
    writer = Played(node, ticket)
    await writer.stopped()
    code, _ = await writer.refused()
    assert code is CODES.INVALID_ARGUMENT
    await node.release(ticket)


async def test_broken_off_until_dead(node):
    child = await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", "import signal; signal.pause()")
    try:
        _, writer = await broken_off(node, processes=[ProcessRef.of(child.pid)])
        await asyncio.sleep(0.05)
        assert node.runtime.freed == [] and node.book.quarantined == 99
        child.kill()
        await until(lambda: node.runtime.freed == [1])
        assert node.book.quarantined == 0
        await writer.stopped()
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def test_a_writer_whose_number_another_process_has_now_is_dead(node):
    me = ProcessRef.current()
    await broken_off(node, processes=[ProcessRef(me.pid, me.start_ticks - 1)])
    await until(lambda: node.runtime.freed == [1])


async def test_a_writer_of_unknown_place_is_waited_for(node):
    _, writer = await broken_off(node, processes=[])
    await asyncio.sleep(0.05)
    assert node.runtime.freed == [] and node.book.quarantined == 99
    await writer.stopped()


async def test_a_break_before_the_grant_is_read(node):
    ticket = await node.prepare(PROMPT)
    writer = Played(node, ticket)
    await writer.call.write(pb.WriteRequest(begin=writer.begin))
    writer.call.cancel()
    # It may have begun or not: in any case nothing is lost.
    await asyncio.sleep(0.02)
    await writer.stopped()
    await node.release(ticket)


async def test_a_break_between_two_writes_keeps_what_has_arrived(node):
    ticket = await node.prepare(PROMPT)
    await Played(node, ticket, 0, 40).whole()
    writer = Played(node, ticket, 40, 99)
    await writer.granted()
    writer.call.cancel()
    await until(lambda: node.book.quarantined == 59)
    await writer.stopped()
    await until(lambda: node.runtime.freed == [1])
    assert node.runtime.holds(PROMPT, 40)


@pytest.mark.parametrize("point", ["publish", "published"])
async def test_a_break_while_what_came_is_published(node, point):
    """Whether others use these slots by now is not known to us: nobody may write into them again."""
    gate = node.runtime.gate(point)
    ticket = await node.prepare(PROMPT)
    other = await node.prepare(PROMPT)
    writer = Played(node, ticket)
    writer.fill(await writer.granted())
    await writer.say_done()
    await gate.reached()
    writer.call.cancel()
    await until(lambda: node.book.count == 1)
    gate.open()
    code, _ = await Played(node, ticket).refused()
    assert code is CODES.NOT_FOUND
    await until(lambda: node.runtime.freed == [1])
    assert node.book.quarantined == 0
    await node.release(other)


async def test_a_publish_that_fails(node):
    node.runtime.faults["publish"] = Internal("no")
    ticket = await node.prepare(PROMPT)
    writer = Played(node, ticket)
    await writer.granted()
    await writer.say_done()
    assert await writer.status() == (CODES.INTERNAL, "no")
    await until(lambda: node.runtime.freed == [1])
    assert node.book.count == 0


async def test_a_server_that_stops_during_a_write(node):
    """The receiver's own end: nothing hangs, and nothing is given to others."""
    ticket = await node.prepare(PROMPT)
    writer = Played(node, ticket)
    await writer.granted()
    await node.server.stop(0)
    code, _ = await writer.status()
    assert code in (CODES.UNAVAILABLE, CODES.CANCELLED)
    await until(lambda: node.book.quarantined == 99)
    assert node.runtime.freed == []
    node.receiver.stopped("p" * 32, writer.write_id)


def test_the_fake_kv_is_worth_its_name():
    """Neighbours, layers, keys and values differ; else a wrong row could go unseen."""
    (k0, v0), (k1, _) = kv(TINY, PROMPT, 0, 99)
    assert not k0[:, :, :4].equal(v0[:, :, :4]) and not k0.equal(k1)
    assert len(set(chain(PROMPT, 99))) > 60
    assert not k0[1:].equal(k0[:-1])
    assert os.getpid() == ProcessRef.current().pid
