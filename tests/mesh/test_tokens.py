"""The answers are those of Hugging Face transformers, whatever way a request goes through the mesh."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from direct import DirectEngine, idle
from hf_reference import Comparison
from played_writer import PlayedWrite
from prompts import LENGTHS, prompt, sharing

from kvmesh.client import AsyncClient, Result

NEW = 16
AT_ONCE = 8
# The shortest prompts are sent as well.
STRATEGIES = {
    "data_parallel": {},
    "prefill_decode": {"min_remote": 1},
    "balanced_prefill_decode": {"ratio": 0.3},
}
PROMPTS = [prompt(length, "tokens") for length in LENGTHS]
by_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


async def at_rest(client: AsyncClient) -> None:
    """Waits until the router sees no engine busy: equal engines are chosen by name then."""
    async with asyncio.timeout(20):
        while not all(idle(engine.load) for engine in (await client.mesh()).engines):
            await asyncio.sleep(0.005)


async def ask(client: AsyncClient, strategy: str, token_ids: list[int]) -> Result:
    answer = client.generate(
        token_ids,
        strategy=strategy,
        strategy_params=STRATEGIES[strategy],
        temperature=0,
        ignore_eos=True,
        max_new_tokens=NEW,
        timeout=60,
    )
    result = await answer.wait()
    assert (result.strategy, result.reason, result.attempts) == (strategy, "length", 1)
    assert sum(s.decoded_tokens for s in result.shares) == result.usage.completion_tokens == NEW
    return result


def sent_up_to(strategy: str, n: int) -> int:
    """How far the decoding engine gets the KV of a prompt of `n` tokens from the other one."""
    if strategy == "data_parallel":
        return 0
    return n - 1 if strategy == "prefill_decode" else min(n - 1, round(n * 0.7))


def check_way(result: Result, strategy: str, n: int, matched: int, token_bytes: int, sender_has: int = 0) -> None:
    """Fails unless every token was prefilled, found and sent where the strategy says; `matched`: at the decoder."""
    shares = {s.engine: s for s in result.shares}
    sent = max(0, sent_up_to(strategy, n) - matched)
    if not sent:
        (only,) = [s for s in result.shares if s.prefilled_tokens or s.decoded_tokens]
        assert (only.received_tokens, only.sent_bytes) == (0, 0)
        assert only.prefilled_tokens + only.cached_tokens == n
        return
    sender, decoder = shares["engine-0"], shares["engine-1"]
    assert (sender.sent_bytes, sender.transport) == (sent * token_bytes, "shm")
    assert decoder.received_tokens == sent and decoder.sent_bytes == 0
    assert decoder.cached_tokens == matched and decoder.prefilled_tokens == n - matched - sent
    assert sender.cached_tokens == sender_has
    assert sender.prefilled_tokens == sent_up_to(strategy, n) - sender_has
    assert (sender.decoded_tokens, decoder.decoded_tokens) == (0, NEW)


@by_strategy
async def test_one_at_a_time(
    strategy: str, client: AsyncClient, engines: list[DirectEngine], comparison: Comparison
) -> None:
    layout = engines[0].info.layout
    token_bytes = layout.bytes_per_token * layout.ranks
    for token_ids in PROMPTS:
        n = len(token_ids)
        for engine in engines:
            await engine.flush()
        await at_rest(client)
        cold = await ask(client, strategy, token_ids)
        comparison.check(strategy, "cold", token_ids, cold.token_ids, NEW)
        check_way(cold, strategy, n, 0, token_bytes)

        await at_rest(client)
        warm = await ask(client, strategy, token_ids)
        comparison.check(strategy, "warm", token_ids, warm.token_ids, NEW)
        assert warm.usage.cached_tokens == n - 1
        assert sum(s.sent_bytes for s in warm.shares) == 0

        other = sharing(token_ids)
        await at_rest(client)
        shared = await ask(client, strategy, other)
        comparison.check(strategy, "shared prefix", other, shared.token_ids, NEW)
        assert max(s.cached_tokens for s in shared.shares) >= max(1, n * 2 // 3)

        if sent_up_to(strategy, n):
            await engines[1].flush()
            await at_rest(client)
            half = await ask(client, strategy, token_ids)
            comparison.check(strategy, "warm sender", token_ids, half.token_ids, NEW)
            check_way(half, strategy, n, 0, token_bytes, sender_has=sent_up_to(strategy, n))


@by_strategy
async def test_eight_at_once(
    strategy: str, client: AsyncClient, engines: list[DirectEngine], comparison: Comparison
) -> None:
    # Long and short ones side by side.
    groups = [PROMPTS[i :: len(PROMPTS) // AT_ONCE] for i in range(len(PROMPTS) // AT_ONCE)]
    assert {len(group) for group in groups} == {AT_ONCE}
    for state in ("cold", "warm"):
        for group in groups:
            results = await asyncio.gather(*(ask(client, strategy, token_ids) for token_ids in group))
            for token_ids, result in zip(group, results, strict=True):
                comparison.check(strategy, f"{state} {AT_ONCE} at once", token_ids, result.token_ids, NEW)
            moved = [sum(s.sent_bytes for s in r.shares) for r in results]
            sends = [state == "cold" and sent_up_to(strategy, len(token_ids)) > 0 for token_ids in group]
            if strategy == "data_parallel":
                used = {s.engine for r in results for s in r.shares}
                assert not any(moved) and (state == "warm" or used == {"engine-0", "engine-1"})
            elif state == "cold":
                assert [m > 0 for m in moved] == sends


async def test_the_same_prompt_eight_at_once(
    client: AsyncClient, engines: list[DirectEngine], comparison: Comparison
) -> None:
    token_ids = prompt(333, "the same")
    for strategy in STRATEGIES:
        results = await asyncio.gather(*(ask(client, strategy, token_ids) for _ in range(AT_ONCE)))
        for result in results:
            comparison.check(strategy, f"the same {AT_ONCE} at once", token_ids, result.token_ids, NEW)


async def test_without_the_transfer_the_tokens_differ(
    engines: list[DirectEngine], comparison: Comparison, note: Callable[[str], None]
) -> None:
    """Else the tests above would show nothing."""
    sender, receiver = engines
    lengths = [40, 80, 120, 200, 300, 400, 500, 600, 800, 1000]
    differ = 0
    try:
        for length in lengths:
            token_ids = prompt(length, "nothing is sent")
            expected = comparison.reference.tokens(token_ids, NEW)
            # Before the other half: slots that had the KV once may be given out again.
            ticket = await receiver.prepare(token_ids)
            async with PlayedWrite(receiver.peer, ticket, receiver.info.layout) as write:
                await write.begin()
                assert (await write.done()).filled == ticket.end
            unsent = await receiver.generate(token_ids, ticket, max_new_tokens=NEW)
            assert unsent.finished.usage.cached_tokens == length - 1
            differ += unsent.token_ids != expected
            await receiver.flush()

            ticket = await receiver.prepare(token_ids)
            await sender.send(token_ids, ticket)
            sent = await receiver.generate(token_ids, ticket, max_new_tokens=NEW)
            comparison.check("sub-requests", "direct", token_ids, sent.token_ids, NEW)
            assert sent.finished.usage.cached_tokens == length - 1
            await receiver.flush()
    finally:
        # What nobody wrote must not stay in the cache.
        await receiver.flush()
    note(f"tokens: with the transfer left out {differ} of {len(lengths)} answers differ")
    assert differ >= 9
