"""KV stores on two hosts, and a wire that fails: nothing is lost, nobody waits longer than said, and it works again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from namespaces import ADDRESSES, Wire
from program import Failed, Program

pytestmark = pytest.mark.asyncio(loop_scope="module")

BLOCK, BLOCKS = 64, 12
# Seconds that a frame may take, by store. None of the tests has to wait for the patient one.
STORES = {"hasty": 2.0, "patient": 300.0}


def tokens(blocks: int, key: int) -> list[int]:
    return [(key * 131 + i * 7 + i // BLOCK) % 1000 for i in range(blocks * BLOCK)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(wire: Wire) -> AsyncIterator[list[Program]]:
    sides = [Program(wire, side, "store_side.py", ADDRESSES[side], STORES) for side in range(2)]
    try:
        await asyncio.gather(*(side.start() for side in sides))
        yield sides
    finally:
        for side in sides:
            await side.kill()


@pytest_asyncio.fixture(loop_scope="module")
async def stores(both: list[Program], wire: Wire) -> AsyncIterator[list[Program]]:
    """Both sides, each with the same stores; all must be at rest in the end."""
    try:
        yield both
    finally:
        wire.up(True)
        wire.slow(None)
    for side in both:
        for store in STORES:
            stats = await side.ask("rest", store=store)
            assert int(stats.get("memory_free", 0)) + int(stats.get("memory_used", 0)) == BLOCKS


async def moved(a: Program, b: Program, store: str, prompt: list[int], value: int) -> Any:
    """Fills `a`, sends to `b`, and looks at what has come."""
    await a.ask("fill", store=store, tokens=prompt, value=value)
    ticket = await b.ask("prepare", store=store, tokens=prompt)
    try:
        report = await a.ask("send", store=store, tokens=prompt, ticket=ticket)
    finally:
        await b.ask("release", store=store, ticket=ticket)
    expected = [value + i for i in range(len(prompt) // BLOCK)]
    assert await b.ask("content", store=store, tokens=prompt) == expected
    return report


async def until_moved(a: Program, b: Program, store: str, prompt: list[int], value: int) -> Any:
    """Tried until gRPC has found out that the wire is back."""
    async with asyncio.timeout(40):
        while True:
            try:
                return await moved(a, b, store, prompt, value)
            except Failed as failed:
                if failed.code != "UNAVAILABLE":
                    raise
                await asyncio.sleep(0.1)


async def test_stores_on_two_hosts(stores: list[Program]) -> None:
    a, b = stores
    info = await a.ask("info", store="hasty")
    assert info["transports"] == ["shm", "gloo"]
    for key in range(3):
        report = await moved(a, b, "hasty", tokens(3, key), 10 * key)
        assert (report["transport"], report["sent_tokens"]) == ("gloo", 3 * BLOCK)
    # Both ways at once.
    pairs = [(a, b, "hasty", 20), (b, a, "hasty", 21), (a, b, "patient", 22), (b, a, "patient", 23)]
    await asyncio.gather(*(moved(*pair, store, tokens(2, key), key) for *pair, store, key in pairs))


async def begun(
    sender: Program, receiver: Program, store: str, prompt: list[int], wire: Wire, **ticket: int
) -> asyncio.Future[Any]:
    """A transfer of 16 MiB that is under way, over a wire that takes 2.5 MB a second now."""
    await sender.ask("fill", store=store, tokens=prompt, value=1)
    prepared = await receiver.ask("prepare", store=store, tokens=prompt, **ticket)
    wire.slow("20mbit")
    sending = asyncio.ensure_future(sender.ask("send", store=store, tokens=prompt, ticket=prepared))
    await asyncio.sleep(1.0)
    assert not sending.done()
    return sending


async def test_the_wire_is_pulled_out_in_mid_transfer(stores: list[Program], wire: Wire) -> None:
    a, b = stores
    prompt = tokens(8, 30)
    await moved(a, b, "hasty", tokens(1, 31), 90)
    sending = await begun(a, b, "hasty", prompt, wire)
    wire.up(False)
    with pytest.raises(Failed) as failed:
        await sending
    assert failed.value.code in ("ABORTED", "UNAVAILABLE")
    # The wire is still out: nothing of it was published, no block is lost, and both go on.
    assert await b.ask("match", store="hasty", tokens=prompt) == [0, 0]
    for side in stores:
        await side.ask("rest", store="hasty")
        await side.ask("fill", store="hasty", tokens=tokens(2, 5), value=50)
    wire.slow(None)
    wire.up(True)
    for pair, key in (((a, b), 6), ((b, a), 7)):
        report = await until_moved(*pair, "hasty", tokens(4, key), 10 * key)
        assert report["transport"] == "gloo"


async def test_a_cancel_does_not_wait_for_a_dead_wire(stores: list[Program], wire: Wire) -> None:
    a, b = stores
    sending = await begun(a, b, "patient", tokens(8, 40), wire, ttl_ms=5000)
    wire.up(False)
    assert await a.ask("locked", store="patient", count=8) == 1
    await a.ask("cancel", store="patient")
    await a.ask("idle", store="patient")
    with pytest.raises(Failed, match="CancelledError"):
        await sending
    # The other side has heard nothing of it: there the ticket's life ends it.
    await b.ask("rest", store="patient")
    wire.slow(None)
    wire.up(True)
    await until_moved(a, b, "patient", tokens(2, 6), 60)


async def test_the_receiver_dies_in_mid_transfer(stores: list[Program], wire: Wire) -> None:
    a, _ = stores
    other = Program(wire, 1, "store_side.py", ADDRESSES[1], STORES)
    await other.start()
    try:
        sending = await begun(a, other, "patient", tokens(8, 41), wire)
    finally:
        await other.kill()
    with pytest.raises(Failed) as failed:
        await sending
    assert failed.value.code == "UNAVAILABLE"
    await a.ask("rest", store="patient")


async def test_the_sender_dies_in_mid_transfer(stores: list[Program], wire: Wire) -> None:
    _, b = stores
    other = Program(wire, 0, "store_side.py", ADDRESSES[0], STORES)
    await other.start()
    try:
        prompt = tokens(8, 42)
        sending = await begun(other, b, "patient", prompt, wire)
    finally:
        await other.kill()
    with pytest.raises(Failed, match="GONE"):
        await sending
    # It takes part itself, and so it knows: no waiting for the ticket's end.
    await b.ask("rest", store="patient")
    assert await b.ask("match", store="patient", tokens=prompt) == [0, 0]
