"""WatchStatus: the engine's description, its load, and what comes into and goes out of its cache."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from engine_harness import CODES, EngineNode, refused, until
from fake_runtime import CONTEXT, EOS, VOCAB

from kvmesh.blocks import BLOCK_TOKENS, block_hashes
from kvmesh.endpoint.tickets import Writer
from kvmesh.errors import Unavailable
from kvmesh.v1.engine_pb2 import CacheChange, EngineStatus, FlushRequest, LoadReport, WatchStatusRequest
from services.engine import status

PROMPT = [(i * 37) % 200 + 1 for i in range(200)]


@pytest.fixture
async def node() -> AsyncIterator[EngineNode]:
    made = EngineNode("d")
    await made.start()
    try:
        yield made
        await made.settled()
    finally:
        await made.stop()


class Watch:
    """One stream."""

    def __init__(self, node: EngineNode, interval_ms: int = 60_000, cache: bool = False) -> None:
        self.call: Any = node.engine.WatchStatus(WatchStatusRequest(interval_ms=interval_ms, cache=cache))
        self.count = 0

    async def next(self, event: str | None = None) -> EngineStatus:
        """The next message, of kind `event` if given."""
        while True:
            async with asyncio.timeout(10):
                message = await self.call.read()
            assert message is not grpc.aio.EOF
            self.count += 1
            assert message.sequence == self.count
            if event is None or message.WhichOneof("event") == event:
                return message

    async def load(self, predicate: Any) -> LoadReport:
        """The next load report for which `predicate` holds."""
        while not predicate(report := (await self.next("load")).load):
            pass
        return report

    async def silent(self, seconds: float) -> bool:
        """Whether nothing comes for so long. The last use of the stream."""
        read = asyncio.ensure_future(self.call.read())
        done, _ = await asyncio.wait({read}, timeout=seconds)
        self.call.cancel()
        await asyncio.gather(read, return_exceptions=True)
        return not done

    def close(self) -> None:
        self.call.cancel()


def total(load: LoadReport) -> int:
    return load.free_slots + load.cached_slots + load.running_slots + load.reserved_slots + load.quarantined_slots


async def test_it_begins_with_the_description_and_the_load(node):
    watch = Watch(node)
    first = await watch.next()
    assert first.WhichOneof("event") == "info"
    info = first.info
    assert info.endpoint == node.endpoint and info.layout == node.runtime.layout.message()
    assert (info.model.vocab_size, info.model.context_length, list(info.model.eos_token_ids)) == (VOCAB, CONTEXT, [EOS])
    assert (info.total_slots, list(info.transports), info.cache_block_tokens) == (512, ["shm"], BLOCK_TOKENS)
    second = await watch.next()
    assert second.load == LoadReport(free_slots=512)
    watch.close()


async def test_every_change_is_told_within_moments(node):
    watch = Watch(node)
    await watch.next("load")
    ticket = await node.prepare(PROMPT, end=100)
    load = await watch.load(lambda r: r.tickets == 1 and r.reserved_slots == 100)
    assert total(load) == 512
    waiting = asyncio.ensure_future(node.prepare([5] * 500, end=500, wait_ms=10_000))
    await watch.load(lambda r: r.waiting_reservations == 1)
    await node.release(ticket)
    await watch.load(lambda r: r.waiting_reservations == 0 and r.reserved_slots == 500)
    await node.release(await waiting)
    gate = node.runtime.gate("token")
    call = node.call(PROMPT, 2)
    await gate.reached()
    load = await watch.load(lambda r: r.running_requests == 1 and r.running_slots == 200)
    assert total(load) == 512
    gate.open()
    async for _ in call:
        pass
    load = await watch.load(lambda r: r.running_requests == 0)
    assert total(load) == 512 and load.cached_slots >= 200
    watch.close()


async def test_quarantined_slots_are_told_and_add_up(node):
    watch = Watch(node)
    ticket = await node.prepare(PROMPT, end=100)
    held = node.book.get(ticket)
    node.book.begin_write(held, 0, 100, Writer(("p", 1), "p", ()))
    await node.release(ticket)
    load = await watch.load(lambda r: r.quarantined_slots == 100)
    assert (load.tickets, load.reserved_slots, total(load)) == (1, 0, 512)
    node.book.end_write(held, None, in_doubt=True)
    load = await watch.load(lambda r: r.tickets == 0)
    assert (load.quarantined_slots, load.reserved_slots, total(load)) == (100, 0, 512)
    node.book.writer_stopped(("p", 1))
    load = await watch.load(lambda r: r.free_slots == 512)
    assert total(load) == 512
    watch.close()


async def test_without_changes_there_is_a_report_each_interval(node):
    watch = Watch(node, interval_ms=50)
    await watch.next("load")
    began = time.monotonic()
    for _ in range(4):
        await watch.next("load")
    assert 0.15 <= time.monotonic() - began < 5
    watch.close()
    # A long interval is silent.
    watch = Watch(node)
    await watch.next("load")
    assert await watch.silent(0.15)


async def test_many_changes_are_not_many_messages(node):
    watch = Watch(node)
    await watch.next("load")
    before, began = watch.count, time.monotonic()
    while time.monotonic() - began < 0.3:
        node.book.on_change()
        await asyncio.sleep(0.001)
    # Whatever came until now.
    while True:
        read = asyncio.ensure_future(watch.next())
        done, _ = await asyncio.wait({read}, timeout=0.1)
        if not done:
            read.cancel()
            break
    assert 2 <= watch.count - before <= (time.monotonic() - began) / 0.02 + 1
    watch.close()


@pytest.mark.parametrize("interval", [1, 19, 60_001])
async def test_intervals_out_of_range(node, interval):
    call = node.engine.WatchStatus(WatchStatusRequest(interval_ms=interval))
    code, details = await refused(call.read())
    assert code is CODES.INVALID_ARGUMENT and f"interval_ms = {interval}" in details


async def test_the_end_of_the_engine_ends_the_streams(node):
    watches = [Watch(node), Watch(node, 20), Watch(node, cache=True)]
    for watch in watches:
        await watch.next("load")
    node.status.close()
    for watch in watches:
        code, details = await refused(_to_the_end(watch))
        assert (code, details) == (CODES.UNAVAILABLE, "the engine is stopping")
    assert not node.status._watchers
    # Later ones end at once.
    code, _ = await refused(_to_the_end(Watch(node)))
    assert code is CODES.UNAVAILABLE


async def _to_the_end(watch: Watch) -> None:
    while True:
        await watch.next()


async def test_watchers_that_leave_are_forgotten(node):
    watches = [Watch(node) for _ in range(5)]
    for watch in watches:
        await watch.next("load")
    assert len(node.status._watchers) == 5
    for watch in watches:
        watch.close()
    await until(lambda: not node.status._watchers)


# Cache


async def test_the_cache_is_told_from_a_snapshot_on(node):
    await node.generate(PROMPT, 1)
    assert node.runtime.calls["watch_cache"] == 0
    watch = Watch(node, cache=True)
    first = (await watch.next("cache")).cache
    assert first.snapshot and sorted(first.stored) == sorted(block_hashes(PROMPT)) and not first.removed
    other = [7, *PROMPT]
    await node.generate(other, 1)
    change = (await watch.next("cache")).cache
    assert not change.snapshot and list(change.stored) == block_hashes(other) and not change.removed
    # Somebody who comes later gets all of it.
    later = Watch(node, cache=True)
    snapshot = (await later.next("cache")).cache
    assert snapshot.snapshot and sorted(snapshot.stored) == sorted(block_hashes(PROMPT) + block_hashes(other))
    watch.close()
    later.close()


async def test_who_does_not_ask_is_not_told_of_the_cache(node):
    asking, watch = Watch(node, cache=True), Watch(node)
    await asking.next("cache")
    await watch.next("load")
    await node.generate(PROMPT, 1)
    await asking.next("cache")
    while True:
        read = asyncio.ensure_future(watch.next())
        done, _ = await asyncio.wait({read}, timeout=0.1)
        if not done:
            read.cancel()
            break
        assert read.result().WhichOneof("event") == "load"
    asking.close()
    watch.close()


async def test_evictions_and_flushes_are_told(node):
    watch = Watch(node, cache=True)
    await watch.next("cache")
    await node.generate(PROMPT, 1)
    assert list((await watch.next("cache")).cache.stored) == block_hashes(PROMPT)
    ticket = await node.prepare([9] * 512, end=512)
    gone = (await watch.next("cache")).cache
    assert sorted(gone.removed) == sorted(block_hashes(PROMPT)) and not gone.stored
    await node.release(ticket)
    await node.generate(PROMPT, 1)
    await watch.next("cache")
    await node.engine.Flush(FlushRequest(), timeout=10)
    assert (await watch.next("cache")).cache == CacheChange(snapshot=True)
    watch.close()


@pytest.mark.parametrize("there", [True, False])
async def test_the_last_word_on_a_block_counts(node, there):
    """Within one message a block is either stored or removed: else nobody could tell which came last."""
    watch = Watch(node, cache=True)
    await watch.next("cache")
    for i in range(5):
        node.runtime.on_cache(*(([1, 2], [], False) if (i % 2 == 0) == there else ([], [1, 3], False)))
    change = (await watch.next("cache")).cache
    assert sorted(change.stored) == ([1, 2] if there else [2])
    assert sorted(change.removed) == ([3] if there else [1, 3])
    watch.close()


async def test_a_slow_watcher_gets_a_snapshot(node, monkeypatch):
    monkeypatch.setattr(status, "CHANGES", 10)
    watch = Watch(node, cache=True)
    await watch.next("cache")
    node.runtime.on_cache(list(range(1, 21)), [], False)
    node.runtime.on_cache([], [20], False)
    change = (await watch.next("cache")).cache
    assert change.snapshot and sorted(change.stored) == list(range(1, 20))
    watch.close()


async def test_a_reader_that_applies_the_changes_always_has_the_cache(node):
    """Whatever happens, in whatever order, and however it is cut into messages."""
    rng = random.Random(5)
    watch = Watch(node, cache=True)
    truth: set[int] = set()
    have: set[int] = set()
    for _ in range(300):
        if rng.random() < 0.02:
            truth = set(rng.sample(range(50), 5))
            node.runtime.on_cache(sorted(truth), [], True)
        else:
            stored = rng.sample(range(50), rng.randrange(4))
            removed = [b for b in rng.sample(range(50), rng.randrange(4)) if b not in stored]
            truth = (truth | set(stored)) - set(removed)
            node.runtime.on_cache(stored, removed, False)
        if rng.random() < 0.2:
            await asyncio.sleep(0.005)
    node.runtime.on_cache([999], [], False)
    truth.add(999)
    while 999 not in have:
        change = (await watch.next("cache")).cache
        if change.snapshot:
            have.clear()
        have |= set(change.stored)
        have -= set(change.removed)
        assert not set(change.stored) & set(change.removed)
    assert have == truth
    watch.close()


async def test_a_runtime_that_is_gone_leaves_no_watcher(node):
    def gone() -> None:
        raise Unavailable("the engine is stopping")

    node.runtime.watch_cache = gone  # type: ignore[method-assign]
    call = node.engine.WatchStatus(WatchStatusRequest(cache=True))
    code, _ = await refused(call.read())
    assert code is CODES.UNAVAILABLE
    await until(lambda: not node.status._watchers)
