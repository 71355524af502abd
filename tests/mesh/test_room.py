"""A receiver without room: waiting for it, in turn, as long as was asked for."""

from __future__ import annotations

import asyncio
import time

import grpc
import grpc.aio
import pytest
from direct import DirectEngine
from prompts import prompt

from kvmesh.client import AsyncClient
from kvmesh.errors import DeadlineExceeded, ResourceExhausted
from kvmesh.v1.common_pb2 import Ticket

LARGE = 4000


async def fill(engine: DirectEngine) -> list[Ticket]:
    """Takes all but a few slots, as tickets of LARGE slots."""
    count = engine.info.total_slots // LARGE
    return [await engine.prepare(prompt(LARGE, "fill", i), end=LARGE) for i in range(count)]


async def refused(work: object, *codes: grpc.StatusCode) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await work  # type: ignore[misc]
    assert caught.value.code() in codes, caught.value
    return caught.value.details() or ""


async def test_no_room_is_told_at_once_or_after_the_wait(engines: list[DirectEngine]) -> None:
    engine = engines[1]
    tickets = await fill(engine)
    exhausted = grpc.StatusCode.RESOURCE_EXHAUSTED
    text = await refused(engine.prepare(prompt(1000, "late"), end=1000), exhausted)
    assert "1000 slots" in text
    begun = time.monotonic()
    await refused(engine.prepare(prompt(1000, "late"), end=1000, wait_ms=300), exhausted)
    assert time.monotonic() - begun >= 0.29
    # The wait is cut by the deadline of the call.
    late = (exhausted, grpc.StatusCode.DEADLINE_EXCEEDED)
    begun = time.monotonic()
    await refused(engine.prepare(prompt(1000, "late"), end=1000, wait_ms=60_000, timeout=0.5), *late)
    assert time.monotonic() - begun < 20
    load = await engine.until(lambda load: not load.waiting_reservations)
    assert load.tickets == len(tickets) and load.reserved_slots == LARGE * len(tickets)
    for ticket in tickets:
        assert await engine.release(ticket)


async def test_those_who_wait_are_served_in_turn(engines: list[DirectEngine]) -> None:
    engine = engines[1]
    tickets = await fill(engine)
    large = asyncio.create_task(engine.prepare(prompt(LARGE, "large"), end=LARGE, wait_ms=30_000))
    await engine.until(lambda load: load.waiting_reservations == 1)
    # Would fit, but was not first.
    small = asyncio.create_task(engine.prepare(prompt(10, "small"), end=10, wait_ms=30_000))
    await engine.until(lambda load: load.waiting_reservations == 2)
    assert not large.done() and not small.done()
    assert await engine.release(tickets.pop())
    for ticket in (await large, await small, *tickets):
        assert await engine.release(ticket)


async def test_room_is_taken_from_the_cache(engines: list[DirectEngine]) -> None:
    engine = engines[1]
    for i in range(4):
        await engine.generate(prompt(3000, "cached", i), max_new_tokens=1)
    load = await engine.at_rest()
    assert load.free_slots < LARGE
    for ticket in await fill(engine):
        assert await engine.release(ticket)


async def test_who_stops_waiting_leaves_nothing_and_the_next_is_served(engines: list[DirectEngine]) -> None:
    engine = engines[1]
    tickets = await fill(engine)
    large = asyncio.create_task(engine.prepare(prompt(LARGE, "large"), end=LARGE, wait_ms=30_000))
    await engine.until(lambda load: load.waiting_reservations == 1)
    small = asyncio.create_task(engine.prepare(prompt(10, "small"), end=10, wait_ms=30_000))
    await engine.until(lambda load: load.waiting_reservations == 2)
    large.cancel()
    assert await engine.release(await small)
    load = await engine.until(lambda load: not load.waiting_reservations)
    assert load.tickets == len(tickets)
    for ticket in tickets:
        assert await engine.release(ticket)


async def test_a_request_waits_for_room_and_gets_it(client: AsyncClient, engines: list[DirectEngine]) -> None:
    held = [(engine, ticket) for engine in engines for ticket in await fill(engine)]
    token_ids = prompt(1000, "waits")
    fields = {"strategy": "prefill_decode", "temperature": 0, "ignore_eos": True, "max_new_tokens": 4}
    begun = time.monotonic()
    with pytest.raises((ResourceExhausted, DeadlineExceeded)):
        await client.generate(token_ids, timeout=2, **fields).wait()
    assert time.monotonic() - begun < 20
    waiting = asyncio.create_task(client.generate(token_ids, timeout=60, **fields).wait())
    await engines[1].until(lambda load: load.waiting_reservations == 1)
    for engine, ticket in held:
        await engine.release(ticket)
    assert len((await waiting).token_ids) == 4
