"""Prefill on one host, decode on another, over gloo; and the wire between them pulled out."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hf_reference import Comparison
from namespaces import Wire
from program import Failed
from prompts import prompt, sharing
from sides import KV_TOKENS, Side

NEW = 16


LENGTHS = (2, 3, 17, 65, 300, 511, 513, 1000, 2000)
# How far the sender's part goes, of a prompt of n tokens.
WAYS = {"prefill_decode": lambda n: n - 1, "balanced_prefill_decode": lambda n: min(n - 1, round(n * 0.7))}


async def disaggregated(
    sender: Side, receiver: Side, tokens: list[int], way: str = "prefill_decode", **fields: Any
) -> tuple[list[int], int, dict[str, Any]]:
    """(tokens generated, tokens that the receiver had, the send's report): prefill here, decode there."""
    ticket, matched, end = await receiver.ask("prepare", tokens=tokens, end=WAYS[way](len(tokens)), **fields)
    report = await sender.ask("send", tokens=tokens, ticket=ticket) if end > matched else {}
    generated, cached = await receiver.ask("generate", tokens=tokens, ticket=ticket, max_new=NEW)
    # More where all of the prompt was there.
    assert cached == end or (cached > end and not report)
    if report:
        assert report["transport"] == "gloo" and report["sent_tokens"] == end - matched
        # int64 is text in JSON.
        assert int(report["sent_bytes"]) % report["sent_tokens"] == 0 and report["send_seconds"] > 0
        assert report.get("cached_tokens", 0) + report.get("computed_tokens", 0) == end
    return generated, matched, report


async def test_the_engines_are_on_different_hosts(sides: list[Side]) -> None:
    for side in sides:
        info = await side.ask("info")
        assert info["transports"] == ["shm", "gloo"]


@pytest.mark.parametrize("way", WAYS)
async def test_tokens_are_those_of_transformers(sides: list[Side], comparison: Comparison, way: str) -> None:
    sender, receiver = sides
    for n in LENGTHS:
        tokens, upto = prompt(n, "gloo", way), WAYS[way](n)
        generated, matched, report = await disaggregated(sender, receiver, tokens, way)
        comparison.check(way, "cold", tokens, generated, NEW)
        assert (matched, report["computed_tokens"]) == (0, upto)

        generated, matched, report = await disaggregated(sender, receiver, tokens, way)
        comparison.check(way, "warm", tokens, generated, NEW)
        assert (matched, report) == (upto, {})

        # The other way, with a prefix that both have.
        other = sharing(tokens)
        generated, matched, report = await disaggregated(receiver, sender, other, way)
        comparison.check(way, "shared prefix", other, generated, NEW)
        assert matched >= min(n * 2 // 3, WAYS[way](len(other)) - 1)

        await receiver.ask("flush")
        generated, matched, report = await disaggregated(sender, receiver, tokens, way)
        comparison.check(way, "warm sender", tokens, generated, NEW)
        assert (matched, report["cached_tokens"], report.get("computed_tokens", 0)) == (0, upto, 0)


async def test_a_context_moves_and_goes_on_there(sides: list[Side], comparison: Comparison) -> None:
    source, target = sides
    tokens = prompt(600, "moves")
    first, _ = await source.ask("generate", tokens=tokens, max_new=NEW)
    comparison.check("migration", "before", tokens, first, NEW)
    context = tokens + first[:-1]
    ticket, matched, end = await target.ask("prepare", tokens=context, end=len(context))
    assert (matched, end) == (0, len(context))
    report = await source.ask("send", tokens=context, ticket=ticket)
    assert report["cached_tokens"] == len(context) and report.get("computed_tokens", 0) == 0
    assert await target.ask("release", ticket=ticket)
    longer = context + prompt(50, "and on")
    generated, cached = await target.ask("generate", tokens=longer, max_new=NEW)
    comparison.check("migration", "a longer prompt", longer, generated, NEW)
    assert cached == len(context)


async def test_many_at_once(sides: list[Side], comparison: Comparison) -> None:
    prompts = [prompt(200 + 10 * i, "at once", i) for i in range(8)]
    prompts += [prompt(333, "the same")] * 4

    async def one(i: int, tokens: list[int]) -> None:
        generated, _, _ = await disaggregated(sides[i % 2], sides[1 - i % 2], tokens)
        comparison.check("prefill_decode", "at once", tokens, generated, NEW)

    await asyncio.gather(*(one(i, tokens) for i, tokens in enumerate(prompts)))


@pytest.mark.parametrize("end", ["the ticket", "a cancel"])
async def test_the_wire_is_pulled_out_in_mid_transfer(
    sides: list[Side], wire: Wire, comparison: Comparison, end: str
) -> None:
    sender, receiver = sides
    tokens = prompt(2000, "cut", end)
    # Computed before, so that what is left is the transfer.
    await sender.ask("generate", tokens=tokens, max_new=1)
    ticket, _, _ = await receiver.ask("prepare", tokens=tokens, ttl_ms=5000)
    wire.slow("4mbit")
    sending = asyncio.create_task(sender.ask("send", tokens=tokens, ticket=ticket))
    try:
        # 4 MB at half a megabyte a second.
        await asyncio.sleep(1.5)
        assert not sending.done()
        wire.up(False)
        if end == "a cancel":
            await sender.ask("cancel")
        with pytest.raises(Failed) as failed:
            await sending
        assert failed.value.code in (("CancelledError",) if end == "a cancel" else ("ABORTED", "UNAVAILABLE"))
        # With the wire still out: no slot is lost, though the other side heard nothing of a cancel; a frame on its way,
        # which may take 15 s, is not waited for.
        for side in sides:
            load = await side.ask("rest", timeout=10)
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
        again = prompt(700, "again", end, pair[0] is sender)
        generated = await until_served(*pair, again)
        comparison.check("prefill_decode", "wire back", again, generated, NEW)


async def until_served(sender: Side, receiver: Side, tokens: list[int]) -> list[int]:
    """A transfer, tried until the gRPC channel has found out that the wire is back."""
    async with asyncio.timeout(40):
        while True:
            ticket, _, _ = await receiver.ask("prepare", tokens=tokens)
            try:
                report = await sender.ask("send", tokens=tokens, ticket=ticket)
            except Failed as failed:
                if failed.code != "UNAVAILABLE":
                    raise
                await receiver.ask("release", ticket=ticket)
                await asyncio.sleep(0.1)
                continue
            assert report["transport"] == "gloo"
            generated, _ = await receiver.ask("generate", tokens=tokens, ticket=ticket, max_new=NEW)
            return generated
