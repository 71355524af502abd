"""Simulated engines on two hosts: KV moves between them as it does between real ones."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from namespaces import Wire
from program import Failed
from sides import Side

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))

from sim_harness import reference


def tokens_of(length: int, key: int) -> list[int]:
    return [(i * 7 + key * 31 + i * i % 13) % 250 + 3 for i in range(length)]


async def test_prefill_on_one_host_decode_on_the_other(sim_sides: list[Side]) -> None:
    prompt = tokens_of(700, key=1)
    ticket, matched, end = await sim_sides[1].ask("prepare", tokens=prompt)
    assert matched == 0 and end == len(prompt) - 1
    sent = await sim_sides[0].ask("send", tokens=prompt, ticket=ticket)
    assert sent["transport"] == "sim_tcp" and sent["sent_tokens"] == len(prompt) - 1
    tokens, cached = await sim_sides[1].ask("generate", tokens=prompt, max_new=8, ticket=ticket)
    assert tokens == reference(prompt, 8) and cached == len(prompt) - 1


async def test_a_send_that_is_cancelled_leaves_nothing(sim_sides: list[Side]) -> None:
    prompt = tokens_of(6000, key=2)
    ticket, _, _ = await sim_sides[1].ask("prepare", tokens=prompt)
    sending = asyncio.ensure_future(sim_sides[0].ask("send", tokens=prompt, ticket=ticket))
    await asyncio.sleep(0.15)
    assert await sim_sides[0].ask("cancel")
    with pytest.raises(Failed):
        await sending
    with pytest.raises(Failed, match="ticket"):
        await sim_sides[1].ask("generate", tokens=prompt, max_new=2, ticket=ticket)


async def test_a_wire_that_is_pulled_out_fails_the_send_in_time(sim_sides: list[Side], wire: Wire) -> None:
    prompt = tokens_of(3000, key=3)
    ticket, _, _ = await sim_sides[1].ask("prepare", tokens=prompt, ttl_ms=3000)
    wire.up(False)
    try:
        with pytest.raises(Failed) as failure:
            await sim_sides[0].ask("send", tokens=prompt, ticket=ticket)
    finally:
        wire.up(True)
    assert failure.value.code in ("UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED")
