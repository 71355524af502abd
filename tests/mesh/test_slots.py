"""No slot is lost: not by requests that are given up at any moment, not by tickets that nobody uses."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable

from direct import DirectEngine, idle, spare
from mesh_process import RunningMesh
from prompts import prompt, sharing

from kvmesh.client import AsyncClient

REQUESTS, AT_ONCE, TICKETS = 200, 10, 100
STRATEGIES = ("data_parallel", "prefill_decode", "balanced_prefill_decode")


async def one(client: AsyncClient, number: int, lane: asyncio.Semaphore, outcomes: Counter[str]) -> None:
    """One of a mixed lot; a third are cancelled within 60 ms of their start."""
    draw = random.Random(f"slots {number}")
    base = prompt(draw.choice((4, 40, 150, 400, 900)), "slots", draw.randrange(6))
    token_ids = sharing(base, number) if draw.random() < 0.5 else base
    tokens = draw.randint(1, 12)
    sampling = {"temperature": 0} if draw.random() < 0.5 else {"temperature": 1, "seed": number}
    async with lane:
        answer = client.generate(
            token_ids,
            strategy=draw.choice(STRATEGIES),
            ignore_eos=True,
            max_new_tokens=tokens,
            timeout=60,
            **sampling,
        )
        running = asyncio.create_task(answer.wait())
        if number % 3 == 0:
            done, _ = await asyncio.wait({running}, timeout=draw.uniform(0, 0.06))
            if not done:
                running.cancel()
                await asyncio.wait({running})
                outcomes["cancelled"] += 1
                return
        result = await running
    assert len(result.token_ids) == tokens and result.attempts == 1
    outcomes["answered"] += 1


async def test_after_many_requests_and_tickets_every_slot_is_free_or_cached(
    mesh: RunningMesh, client: AsyncClient, engines: list[DirectEngine], note: Callable[[str], None]
) -> None:
    lane, outcomes = asyncio.Semaphore(AT_ONCE), Counter[str]()
    async with asyncio.TaskGroup() as group:
        for number in range(REQUESTS):
            group.create_task(one(client, number, lane, outcomes))
    assert outcomes.total() == REQUESTS
    assert outcomes["cancelled"] >= REQUESTS // 10

    for number in range(TICKETS):
        engine = engines[number % 2]
        token_ids = prompt(random.Random(number).randint(2, 300), "tickets", number // 8)
        await engine.prepare(token_ids, ttl_ms=200, wait_ms=10_000)

    for engine in engines:
        load = await engine.at_rest()
        assert idle(load) and spare(load) == engine.info.total_slots
        assert load.cached_slots > 0
        await engine.flush()
    assert (await client.mesh()).running_requests == 0
    for name in ("engine-0", "engine-1"):
        assert mesh.alive(name)
        assert "leak" not in mesh.logs[f"{name}.log"].lower()
    note(
        f"slots: {REQUESTS} requests ({outcomes['cancelled']} cancelled) and {TICKETS} expired tickets: "
        "every slot of both engines free or cached"
    )


async def test_one_slot_that_is_held_is_noticed(engines: list[DirectEngine]) -> None:
    """What the test above looks at would tell a single lost slot."""
    engine = engines[0]
    total = engine.info.total_slots
    await engine.generate(prompt(50, "noticed"), max_new_tokens=4)
    await engine.at_rest()
    for slots in (1, 77):
        ticket = await engine.prepare(prompt(slots, "held"), end=slots)
        load = await engine.until(lambda load: load.tickets == 1)
        assert spare(load) == total - slots and load.reserved_slots == slots
        assert await engine.release(ticket)
        assert spare(await engine.at_rest()) == total
