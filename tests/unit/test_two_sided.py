"""Transfers between engine services where the receiver takes part: over gloo, with fake runtimes."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import engine_harness
import grpc
import pytest
from engine_harness import EngineNode, refused, until
from fake_runtime import answer
from pair_runtime import PairRuntime, tiny

from kvmesh.endpoint import receiver as receiver_module

CODES = grpc.StatusCode
PROMPT = [(7 * i) % 250 for i in range(150)]


def two(a: PairRuntime, b: PairRuntime, hosts: tuple[str, str] = ("one", "two")):
    """A sender and a receiver on different hosts."""
    return engine_harness.two(a, b, hosts)


async def moved(p: EngineNode, d: EngineNode, tokens: list[int], transport: str = "gloo") -> None:
    """Sends a prompt's KV and generates from it: the tokens are those of one engine alone."""
    ticket = await d.prepare(tokens)
    report = await p.send(tokens, ticket)
    assert report.transport == transport
    assert report.sent_tokens == len(tokens) - 1 - ticket.matched
    assert report.sent_bytes == report.sent_tokens * p.runtime.layout.bytes_per_token
    result = await d.generate(tokens, 4, ticket=ticket, begin=len(tokens) - 1)
    assert result.tokens == answer(tokens, 4)
    assert result.finished.usage.cached_tokens == len(tokens) - 1


async def test_hosts_apart_are_served_by_gloo():
    async with two(tiny(), tiny()) as (p, d):
        for n in (2, 33, 150):
            await moved(p, d, [n, *PROMPT[1:n]])
        # One connection for all.
        assert (d.runtime.calls["fresh"], d.runtime.calls["accept"]) == (0, 3)
        assert len(d.runtime.transports["gloo"]._inbound) == 1


async def test_one_host_prefers_shared_memory():
    async with two(tiny(), tiny(), ("same", "same")) as (p, d):
        await moved(p, d, PROMPT, "shm")
        assert d.runtime.calls["accept"] == 0


async def test_what_may_be_used_can_be_forced():
    async with two(tiny(names=("gloo",)), tiny(), ("same", "same")) as (p, d):
        await moved(p, d, PROMPT, "gloo")


async def test_no_way_between_two_hosts():
    async with two(tiny(names=("shm",)), tiny()) as (p, d):
        ticket = await d.prepare(PROMPT)
        code, text = await refused(p.send(PROMPT, ticket))
        assert code == CODES.FAILED_PRECONDITION and "shm: sender and receiver are on different hosts" in text
        await d.release(ticket)


async def test_many_at_once_both_ways():
    async with two(tiny(), tiny()) as (p, d):
        prompts = [[i, *PROMPT[: 20 + i]] for i in range(10)]
        pairs = [(p, d) if i % 2 else (d, p) for i in range(10)]
        await asyncio.gather(*(moved(*pair, tokens) for pair, tokens in zip(pairs, prompts, strict=True)))


# Another way


async def test_another_transport_when_the_first_cannot_connect(caplog):
    a = tiny()
    a.broken.add("shm")
    async with two(a, tiny(), ("same", "same")) as (p, d):
        await moved(p, d, PROMPT, "gloo")
        assert "d is not reached through shm" in caplog.text and "asking for another way" in caplog.text
        assert "p cannot write through shm: shm is broken on purpose" in caplog.text
        # For a while it is not even tried.
        await moved(p, d, [9, *PROMPT], "gloo")
        assert a.calls["shm"] == 1


async def test_no_other_transport_left():
    a = tiny()
    a.broken |= {"shm", "gloo"}
    async with two(a, tiny(), ("same", "same")) as (p, d):
        ticket = await d.prepare(PROMPT)
        code, text = await refused(p.send(PROMPT, ticket))
        assert code == CODES.UNAVAILABLE and "gloo is broken on purpose" in text


async def test_a_stale_connection_is_made_anew():
    a, b = tiny(), tiny()
    async with two(a, b) as (p, d):
        await moved(p, d, PROMPT)
        # Only one side knows that it is gone.
        a.transports["gloo"]._outbound.take(next(iter(a.transports["gloo"]._outbound._links)))
        await moved(p, d, [1, *PROMPT])
        assert b.calls["fresh"] == 1
        b.transports["gloo"]._inbound.drop("")
        await moved(p, d, [2, *PROMPT])
        await moved(p, d, [3, *PROMPT])
        assert b.calls["fresh"] == 2


# Failures


async def test_a_released_ticket_ends_the_write():
    a, b = tiny(), tiny()
    async with two(a, b) as (p, d):
        gate = a.gate("piece", free=1)
        ticket = await d.prepare(PROMPT)
        call = p.send(PROMPT, ticket)
        await gate.reached()
        await d.release(ticket)
        code, _ = await refused(call)
        assert code == CODES.ABORTED
        gate.open()
        # The receiver need not wait for the sender: it has stopped its own part.
        await until(lambda: not b.reservations)
        await p.settled()
        await moved(p, d, [1, *PROMPT])


async def test_a_cancelled_send_gives_everything_back():
    a, b = tiny(), tiny()
    async with two(a, b) as (p, d):
        gate = a.gate("piece", free=1)
        call = p.send(PROMPT, await d.prepare(PROMPT))
        await gate.reached()
        call.cancel()
        gate.open()
        await d.settled()
        await moved(p, d, [1, *PROMPT])


async def test_slots_wait_for_the_end_of_our_own_part_whatever_the_sender_says():
    """Else a frame that is being scattered would land in somebody else's slots."""
    a, b = tiny(), tiny()
    b.may_end = asyncio.Event()
    async with two(a, b) as (p, d):
        gate = a.gate("piece", free=1)
        call = p.send(PROMPT, await d.prepare(PROMPT))
        await gate.reached()
        call.cancel()
        gate.open()
        # The sender has said that it stopped.
        await until(lambda: bool(d.book._stopped))
        await p.settled()
        assert b.reservations and d.book.count == 1
        b.may_end.set()
        await d.settled()


async def test_no_doubt_is_left_when_nothing_was_granted_that_a_sender_writes_itself(monkeypatch):
    """A sender on another host that dies after it asked for another way: nobody could tell of its end."""
    a, b = tiny(), tiny()
    a.broken.add("gloo")
    async with two(a, b) as (p, d):
        monkeypatch.setattr(p.sender, "_say_stopped", lambda peer, write_id: asyncio.sleep(0))
        code, text = await refused(p.send(PROMPT, await d.prepare(PROMPT)))
        assert code == CODES.UNAVAILABLE and "gloo is broken on purpose" in text
        await d.settled()


async def test_a_failed_write_gives_everything_back():
    a, b = tiny(), tiny()
    async with two(a, b) as (p, d):
        gate = a.gate("piece", free=2)
        call = p.send(PROMPT, await d.prepare(PROMPT))
        await gate.reached()
        # As if the wire were cut: both ends of the connection fail.
        a.made[-1].abort()
        gate.open()
        code, _ = await refused(call)
        assert code == CODES.UNAVAILABLE
        await d.settled()
        await moved(p, d, [1, *PROMPT])


async def test_a_silent_sender_holds_slots_no_longer_than_the_ticket_lives():
    a, b = tiny(), tiny()
    async with two(a, b) as (p, d):
        gate = a.gate("piece", free=1)
        call = p.send(PROMPT, await d.prepare(PROMPT, ttl_ms=700))
        await gate.reached()
        code, _ = await refused(call)
        assert code in (CODES.ABORTED, CODES.NOT_FOUND)
        await until(lambda: not b.reservations)
        gate.open()


async def test_a_receiver_that_stops_taking(monkeypatch):
    """Our part fails, the sender does not notice: the write ends all the same."""
    monkeypatch.setattr(receiver_module, "WORD_S", 0.3)
    a, b = tiny(), tiny()
    async with two(a, b) as (p, d):
        await moved(p, d, PROMPT)
        gate = a.gate("piece")
        b.transports["gloo"]._inbound.drop("")
        call = p.send([1, *PROMPT], await d.prepare([1, *PROMPT]))
        await gate.reached()
        code, text = await refused(call)
        assert code == CODES.UNAVAILABLE and "did not arrive" in text
        gate.open()


# Checksums


@asynccontextmanager
async def checked(a: PairRuntime, b: PairRuntime, who: str, hosts: tuple[str, str]):
    async with two(a, b, hosts) as (p, d):
        if who in ("sender", "both"):
            p.sender._checksum = True
        if who in ("receiver", "both"):
            d.receiver._checksum = True
        yield p, d


@pytest.mark.parametrize("hosts", [("one", "two"), ("same", "same")], ids=["gloo", "shm"])
@pytest.mark.parametrize("who", ["sender", "receiver", "both"])
async def test_checksums_of_good_transfers(who, hosts):
    b = tiny()
    async with checked(tiny(), b, who, hosts) as (p, d):
        await moved(p, d, PROMPT, "gloo" if hosts[0] != hosts[1] else "shm")
        assert b.calls["verify"] == 1


@pytest.mark.parametrize("hosts", [("one", "two"), ("same", "same")], ids=["gloo", "shm"])
async def test_a_corrupting_transport_is_found_out_before_a_token(hosts):
    a, b = tiny(), tiny()
    a.corrupt = True
    async with checked(a, b, "receiver", hosts) as (p, d):
        ticket = await d.prepare(PROMPT)
        code, text = await refused(p.send(PROMPT, ticket))
        assert code == CODES.DATA_LOSS and "is not what was sent" in text
        # Nothing of it can be generated from, or found by others.
        code, _ = await refused(d.generate(PROMPT, 4, ticket=ticket, begin=len(PROMPT) - 1))
        assert code == CODES.INVALID_ARGUMENT
        assert b.calls["publish"] == 0 and not b.match(PROMPT, len(PROMPT) - 1)
        await d.release(ticket)
        assert (await d.generate(PROMPT, 4)).tokens == answer(PROMPT, 4)


async def test_without_checksums_nothing_is_verified():
    a, b = tiny(), tiny()
    a.corrupt = True
    async with two(a, b) as (p, d):
        ticket = await d.prepare(PROMPT)
        await p.send(PROMPT, ticket)
        result = await d.generate(PROMPT, 4, ticket=ticket, begin=len(PROMPT) - 1)
        # The negative control: the corruption is a real one.
        assert result.tokens != answer(PROMPT, 4) and b.calls["verify"] == 0
