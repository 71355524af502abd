"""Giving up, at every stage of a request, leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import grpc.aio
import pytest
from direct import DirectEngine, Load, spare
from prompts import prompt

from kvmesh.client import AsyncClient
from kvmesh.errors import DeadlineExceeded
from kvmesh.v1 import engine_pb2
from kvmesh.v1.common_pb2 import FINISH_REASON_ABORT

# Several chunks of prefill: long enough to be met in the middle of it.
LONG = 3900


async def cancelled(call: object) -> None:
    call.cancel()  # type: ignore[attr-defined]
    with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
        await call  # type: ignore[misc]


async def test_during_remote_send(engines: list[DirectEngine]) -> None:
    sender, receiver = engines
    token_ids = prompt(LONG, "send")
    ticket = await receiver.prepare(token_ids)
    call = sender.send(token_ids, ticket)
    await sender.until(lambda load: load.sending == 1 and load.running_requests == 1)
    await cancelled(call)
    # Taken back with the write that broke: the sender has said that it stopped.
    for engine in engines:
        assert spare(await engine.at_rest()) == engine.info.total_slots
    assert await receiver.release(ticket) is False


async def test_while_a_remote_send_waits_for_its_turn(engines: list[DirectEngine]) -> None:
    sender, receiver = engines
    running = [asyncio.create_task(sender.generate(prompt(LONG, "ahead", i), max_new_tokens=1)) for i in range(2)]
    await sender.until(lambda load: load.running_requests + load.waiting_requests == 2)
    token_ids = prompt(400, "behind")
    ticket = await receiver.prepare(token_ids)
    call = sender.send(token_ids, ticket)
    await sender.until(lambda load: load.sending == 1)
    await cancelled(call)
    await receiver.at_rest()
    await asyncio.gather(*running)


async def test_during_the_prefill_of_a_generation(engines: list[DirectEngine]) -> None:
    engine = engines[0]
    call = engine.start(prompt(LONG, "prefill"), max_new_tokens=10)
    await engine.until(lambda load: load.running_requests == 1)
    call.cancel()
    assert spare(await engine.at_rest()) == engine.info.total_slots


async def test_during_the_decoding(engines: list[DirectEngine]) -> None:
    engine = engines[0]
    call = engine.start(prompt(100, "decode"), max_new_tokens=2000)
    for _ in range(3):
        await call.read()
    call.cancel()
    assert spare(await engine.at_rest()) == engine.info.total_slots


async def test_the_deadline_ends_a_generation(engines: list[DirectEngine], client: AsyncClient) -> None:
    with pytest.raises(DeadlineExceeded):
        await client.generate(prompt(100, "late"), ignore_eos=True, max_new_tokens=3000, timeout=0.3).wait()
    for engine in engines:
        await engine.at_rest()


async def test_abort_ends_a_generation(engines: list[DirectEngine]) -> None:
    engine = engines[0]
    call = engine.start(prompt(100, "abort"), request_id="to-abort", max_new_tokens=3000)
    first = await call.read()
    assert first.HasField("chunk")
    reply = await engine.engine.Abort(engine_pb2.AbortRequest(request_id="to-abort"), timeout=10)
    assert reply.found
    tokens, last = len(first.chunk.token_ids), None
    while (message := await call.read()) is not grpc.aio.EOF:
        tokens += len(message.chunk.token_ids)
        last = message
    assert last is not None and last.finished.reason == FINISH_REASON_ABORT
    assert last.finished.usage.completion_tokens == tokens < 3000
    again = await engine.engine.Abort(engine_pb2.AbortRequest(request_id="to-abort"), timeout=10)
    assert not again.found
    await engine.at_rest()


# Where the request is when its client gives up: (engine, what it reports).
STAGES: dict[str, tuple[int, Callable[[Load], bool]] | None] = {
    "at once": None,
    "prefill at the sender": (0, lambda load: load.sending == 1 and load.running_requests == 1),
    "ticket at the receiver": (1, lambda load: load.tickets == 1 and load.reserved_slots > 0),
    "decoding": (1, lambda load: load.running_requests == 1),
}


@pytest.mark.parametrize("stage", STAGES)
async def test_a_client_that_gives_up(stage: str, client: AsyncClient, engines: list[DirectEngine]) -> None:
    answer = client.generate(
        prompt(LONG, stage), strategy="prefill_decode", ignore_eos=True, max_new_tokens=100, timeout=60
    )
    running = asyncio.create_task(answer.wait())
    if (where := STAGES[stage]) is None:
        await asyncio.sleep(0)
    else:
        await engines[where[0]].until(where[1])
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
    for engine in engines:
        assert spare(await engine.at_rest()) == engine.info.total_slots
    async with asyncio.timeout(10):
        while (await client.mesh()).running_requests:
            await asyncio.sleep(0.01)


async def test_a_client_that_gives_up_after_a_few_tokens(client: AsyncClient, engines: list[DirectEngine]) -> None:
    for strategy in ("data_parallel", "prefill_decode", "balanced_prefill_decode"):
        answer = client.generate(prompt(200, strategy), strategy=strategy, ignore_eos=True, max_new_tokens=2000)
        seen = 0
        async for delta in answer:
            seen += len(delta.token_ids)
            if seen >= 3:
                break
        answer.cancel()
        for engine in engines:
            assert spare(await engine.at_rest()) == engine.info.total_slots
