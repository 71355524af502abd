"""Slots under a write that broke off are nobody's, until the writer has stopped or is dead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from direct import DirectEngine, spare
from played_writer import PlayedWrite, script
from prompts import prompt

from kvmesh.v1.common_pb2 import Ticket

TOKENS = prompt(101, "quarantine")
SLOTS = 100


async def in_quarantine(engine: DirectEngine, slots: int = SLOTS, locked: int = 0) -> None:
    """Waits until so many slots are in quarantine, and fails unless they are away from everybody else.

    `locked`: slots of the same ticket that were filled before; they stay in the cache.
    """
    load = await engine.until(lambda load: load.quarantined_slots > 0)
    assert (load.quarantined_slots, load.reserved_slots, load.tickets) == (slots, 0, 0)
    assert load.running_slots == locked
    assert spare(load) == engine.info.total_slots - slots - locked


@asynccontextmanager
async def writer(engine: DirectEngine, ticket: Ticket) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that has been granted a write into `ticket`."""
    process = await asyncio.create_subprocess_exec(
        *script(engine.address, ticket, engine.info.layout),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        await said(process, b"granted")
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def said(process: asyncio.subprocess.Process, word: bytes) -> None:
    assert process.stdout is not None
    async with asyncio.timeout(30):
        assert (await process.stdout.readline()).startswith(word)


async def test_a_writer_that_broke_off_and_lives(engines: list[DirectEngine]) -> None:
    engine = engines[1]
    ticket = await engine.prepare(TOKENS)
    async with writer(engine, ticket) as process:
        assert process.stdin is not None
        process.stdin.write(b"break\n")
        await said(process, b"broken")
        await in_quarantine(engine)
        # It could still write: nothing is given back, whoever asks.
        assert await engine.release(ticket) is False
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await engine.generate(TOKENS, ticket, begin=0)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        answer = await engine.generate(TOKENS, max_new_tokens=2)
        assert answer.finished.usage.cached_tokens == 0
        load = await engine.until(lambda load: not load.running_requests)
        assert load.quarantined_slots == SLOTS
        process.kill()
    assert spare(await engine.at_rest()) == engine.info.total_slots


async def test_a_writer_that_dies_during_the_write(engines: list[DirectEngine]) -> None:
    engine = engines[1]
    ticket = await engine.prepare(TOKENS)
    async with writer(engine, ticket) as process:
        load = await engine.until(lambda load: load.tickets == 1)
        assert (load.reserved_slots, load.quarantined_slots) == (SLOTS, 0)
        process.kill()
    assert spare(await engine.at_rest()) == engine.info.total_slots
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await engine.generate(TOKENS, ticket, begin=0)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_writer_that_says_that_it_stopped(engines: list[DirectEngine]) -> None:
    engine = engines[1]
    ticket = await engine.prepare(TOKENS)
    async with PlayedWrite(engine.peer, ticket, engine.info.layout) as write:
        grant = await write.begin()
        assert sum(grant.slots.lengths) == SLOTS
        write.call.cancel()
        await in_quarantine(engine)
        await write.stopped()
        assert (await engine.at_rest()).free_slots == engine.info.total_slots


async def test_a_writer_that_said_so_before_the_stream_broke(engines: list[DirectEngine]) -> None:
    engine = engines[1]
    ticket = await engine.prepare(TOKENS)
    async with PlayedWrite(engine.peer, ticket, engine.info.layout) as write:
        await write.begin()
        await write.stopped()
        write.call.cancel()
        assert (await engine.at_rest()).free_slots == engine.info.total_slots


@pytest.mark.parametrize("how", ["released", "expired"])
async def test_a_ticket_that_ends_during_a_write(how: str, engines: list[DirectEngine]) -> None:
    engine = engines[1]
    ticket = await engine.prepare(TOKENS, ttl_ms=500 if how == "expired" else 30_000)
    async with PlayedWrite(engine.peer, ticket, engine.info.layout) as write:
        await write.begin()
        if how == "released":
            assert await engine.release(ticket) is True
        async with asyncio.timeout(10):
            assert await write.call.code() is grpc.StatusCode.ABORTED
        # The writer was told, and has not answered yet.
        await in_quarantine(engine)
        await write.stopped()
        assert (await engine.at_rest()).free_slots == engine.info.total_slots


async def test_what_was_sent_before_the_break_stays(engines: list[DirectEngine]) -> None:
    sender, receiver = engines
    ticket = await receiver.prepare(TOKENS)
    await sender.send(TOKENS, ticket, end=40)
    async with PlayedWrite(receiver.peer, ticket, receiver.info.layout) as write:
        await write.begin(begin=40)
        write.call.cancel()
        await in_quarantine(receiver, SLOTS - 40, locked=40)
    load = await receiver.at_rest()
    assert load.cached_slots == 40


async def test_a_ticket_that_expires_during_a_real_send(engines: list[DirectEngine]) -> None:
    sender, receiver = engines
    token_ids = prompt(3900, "expires")
    ticket = await receiver.prepare(token_ids, ttl_ms=100)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await sender.send(token_ids, ticket)
    assert caught.value.code() in (grpc.StatusCode.ABORTED, grpc.StatusCode.NOT_FOUND)
    for engine in engines:
        await engine.at_rest()
