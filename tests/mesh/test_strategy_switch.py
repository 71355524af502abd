"""Strategies are switched while requests run: none fails, each answer is right and says what it was served by."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from direct import DirectEngine
from hf_reference import Comparison
from otlp_collector import CollectedSpan, Collector
from prompts import prompt

from kvmesh.client import AsyncClient, Result

AT_ONCE, NEW = 8, 10
# How often each of the strategies comes into force, at least so long, and for so many answers.
ROUNDS, FOR_S, ANSWERS = 2, 1.0, 10
PARAMS: dict[str, dict[str, object]] = {"prefill_decode": {"min_remote": 4}, "balanced_prefill_decode": {"ratio": 0.4}}
PROMPTS = [prompt(length, "switch", i) for i in range(4) for length in (1, 30, 90, 250, 600)]


async def test_while_requests_run(
    client: AsyncClient,
    engines: list[DirectEngine],
    comparison: Comparison,
    collector: Collector,
    note: Callable[[str], None],
) -> None:
    before = await client.strategy()
    cycle = ROUNDS * [s.name for s in await client.strategies()]
    assert set(PARAMS) < set(cycle) >= {"adaptive", "context_migration", "data_parallel", "store_backed"}
    results: list[tuple[list[int], Result]] = []
    done = asyncio.Event()
    progress = asyncio.Condition()

    async def ask(worker: int) -> None:
        turn = worker
        while not done.is_set():
            token_ids = PROMPTS[turn % len(PROMPTS)]
            turn += 7
            answer = client.generate(token_ids, temperature=0, ignore_eos=True, max_new_tokens=NEW, timeout=60)
            result = await answer.wait()
            async with progress:
                results.append((token_ids, result))
                progress.notify_all()

    async def more(count: int) -> None:
        async with asyncio.timeout(60), progress:
            wanted = len(results) + count
            await progress.wait_for(lambda: len(results) >= wanted)

    def named(spans: list[CollectedSpan]) -> list[tuple[str, int]]:
        served = ((s.attributes.get("kvmesh.strategy"), s.attributes.get("kvmesh.strategy_revision")) for s in spans)
        return [(name, revision) for name, revision in served if name is not None and revision is not None]

    revisions = {before.revision: before.name}
    try:
        async with asyncio.TaskGroup() as group:
            for worker in range(AT_ONCE):
                group.create_task(ask(worker))
            await more(ANSWERS)
            for name in cycle:
                choice = await client.set_strategy(name, PARAMS.get(name, {}))
                assert choice.name == name and choice.revision > max(revisions)
                revisions[choice.revision] = name
                await asyncio.gather(more(ANSWERS), asyncio.sleep(FOR_S))
            done.set()
    finally:
        await client.set_strategy(before.name)

    for token_ids, result in results:
        assert result.strategy == revisions[result.strategy_revision]
        assert result.attempts == 1
        comparison.check("switching strategies", result.strategy, token_ids, result.token_ids, NEW)
    assert {result.strategy_revision for _, result in results} == set(revisions)
    assert any(share.sent_bytes for _, result in results for share in result.shares)
    for _, result in results:
        spans = await asyncio.to_thread(collector.wait, result.trace_id, lambda spans: bool(named(spans)), 20)
        assert set(named(spans)) == {(result.strategy, result.strategy_revision)}
    note(f"strategies: switched {len(cycle)} times among {len(set(cycle))} during {len(results)} requests, none failed")
