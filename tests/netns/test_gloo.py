"""Prefill on one host, decode on another, over gloo; and the wire between them pulled out."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hf_reference import Comparison
from namespaces import Wire
from program import Failed
from prompts import prompt, sharing
from sides import KV_TOKENS, Side

NEW = 16


async def disaggregated(sender: Side, receiver: Side, tokens: list[int], **fields: Any) -> tuple[list[int], Any]:
    """(tokens generated, the send's report): prefill here, decode there."""
    ticket, matched, end = await receiver.ask("prepare", tokens=tokens, **fields)
    report = await sender.ask("send", tokens=tokens, ticket=ticket) if end > matched else None
    generated, cached = await receiver.ask("generate", tokens=tokens, ticket=ticket, max_new=NEW)
    assert cached == end
    return generated, report


async def test_the_engines_are_on_different_hosts(sides: list[Side]) -> None:
    for side in sides:
        info = await side.ask("info")
        assert info["transports"] == ["shm", "gloo"]


async def test_tokens_are_those_of_transformers(sides: list[Side], comparison: Comparison) -> None:
    sender, receiver = sides
    for length in (2, 3, 17, 65, 300, 511, 513, 1000, 2000):
        tokens = prompt(length, "gloo")
        generated, report = await disaggregated(sender, receiver, tokens)
        comparison.check("gloo", "cold", tokens, generated, NEW)
        assert report["transport"] == "gloo"
        assert (report["sent_tokens"], report["computed_tokens"]) == (length - 1, length - 1)
        # The other way, with a prefix that both have in part.
        other = sharing(tokens)
        generated, _ = await disaggregated(receiver, sender, other)
        comparison.check("gloo", "shared prefix", other, generated, NEW)


async def test_many_at_once(sides: list[Side], comparison: Comparison) -> None:
    prompts = [prompt(200 + 10 * i, "at once", i) for i in range(8)]

    async def one(i: int, tokens: list[int]) -> None:
        generated, _ = await disaggregated(sides[i % 2], sides[1 - i % 2], tokens)
        comparison.check("gloo", "at once", tokens, generated, NEW)

    await asyncio.gather(*(one(i, tokens) for i, tokens in enumerate(prompts)))


@pytest.mark.parametrize("ttl_ms", [6_000, 60_000], ids=["a short ticket", "a long ticket"])
async def test_the_wire_is_pulled_out_in_mid_transfer(
    sides: list[Side], wire: Wire, comparison: Comparison, ttl_ms: int
) -> None:
    sender, receiver = sides
    tokens = prompt(2000, "cut", ttl_ms)
    # Computed before, so that what is left is the transfer.
    await sender.ask("generate", tokens=tokens, max_new=1)
    ticket, _, _ = await receiver.ask("prepare", tokens=tokens, ttl_ms=ttl_ms)
    wire.slow("4mbit")
    began = time.monotonic()
    sending = asyncio.create_task(sender.ask("send", tokens=tokens, ticket=ticket))
    try:
        # 4 MB at half a megabyte a second.
        await asyncio.sleep(1.5)
        assert not sending.done()
        wire.up(False)
        with pytest.raises(Failed) as failed:
            await sending
        took = time.monotonic() - began
        assert failed.value.code in ("ABORTED", "UNAVAILABLE"), str(failed.value)
        # A frame under way is given up after 15 s at the latest, whatever the ticket's life.
        assert took < 25
        # With the wire still out: no slot is lost on either side, and both serve on.
        for side in sides:
            load = await side.ask("rest", timeout=30)
            assert int(load["free_slots"]) + int(load.get("cached_slots", 0)) == KV_TOKENS
        for side in sides:
            other = prompt(40, "alone")
            generated, _ = await side.ask("generate", tokens=other, max_new=NEW)
            comparison.check("alone", "wire out", other, generated, NEW)
        # None of it was published: the receiver has nothing of this prompt.
        ticket, matched, _ = await receiver.ask("prepare", tokens=tokens)
        assert matched == 0
        await receiver.ask("release", ticket=ticket)
    finally:
        wire.up(True)
        wire.slow(None)
    # Transfers work again, both ways.
    for pair in (sides, sides[::-1]):
        again = prompt(700, "again", ttl_ms, pair[0] is sender)
        generated, report = await until_served(*pair, again)
        assert report["transport"] == "gloo"
        comparison.check("gloo", "wire back", again, generated, NEW)


async def until_served(sender: Side, receiver: Side, tokens: list[int]) -> tuple[list[int], Any]:
    """A transfer, tried until the gRPC channel has found out that the wire is back."""
    deadline = time.monotonic() + 30
    while True:
        ticket, _, _ = await receiver.ask("prepare", tokens=tokens)
        try:
            report = await sender.ask("send", tokens=tokens, ticket=ticket)
            generated, _ = await receiver.ask("generate", tokens=tokens, ticket=ticket, max_new=NEW)
            return generated, report
        except Failed as failed:
            if failed.code != "UNAVAILABLE" or time.monotonic() > deadline:
                raise
            await receiver.ask("release", ticket=ticket)
            await asyncio.sleep(0.2)
