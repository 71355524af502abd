"""Two stores exchange KV over gRPC and shared memory: the endpoint's protocol, and the store's own calls."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from store_harness import BLOCK, LAYOUT, VOCAB, kv_node, prompt, until

from kvmesh.dataplane.layout import Layout
from kvmesh.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from kvmesh.v1 import kvstore_pb2 as pb


async def test_a_prefix_goes_from_store_to_store() -> None:
    async with kv_node("a") as a, kv_node("b") as b:
        tokens = prompt(3.5)
        await a.fill(tokens, 10)
        assert await a.match(tokens) == (3 * BLOCK, 3 * BLOCK)
        ticket = await b.prepare(tokens)
        # Rounded down to whole blocks.
        assert (ticket.matched, ticket.end) == (0, 3 * BLOCK)
        assert await b.match(tokens) == (0, 0)
        reply = await a.send(tokens, ticket)
        assert (reply.sent_tokens, reply.cached_tokens, reply.transport) == (3 * BLOCK, 3 * BLOCK, "shm")
        assert reply.sent_bytes == 3 * BLOCK * LAYOUT.bytes_per_token
        assert b.content(tokens) == [10, 11, 12]
        assert b.stats.tickets == 1 and b.stats.locked == 3
        assert await b.release(ticket)
        await until(lambda: b.stats.locked == 0)
        assert b.stats.memory_reserved == 0 and b.stats.memory_free == 5
        # What is here already is matched: nothing is left to send.
        again = await b.prepare(tokens)
        assert again.matched == again.end == 3 * BLOCK


async def test_a_store_sends_what_it_has_from_within_a_block() -> None:
    async with kv_node("a") as a, kv_node("b") as b:
        tokens = prompt(4)
        await a.fill(tokens[: 2 * BLOCK], 20)
        await b.fill(tokens[:BLOCK], 7)
        ticket = await b.prepare(tokens)
        assert ticket.matched == BLOCK
        reply = await a.send(tokens, ticket)
        assert reply.sent_tokens == BLOCK and reply.cached_tokens == 2 * BLOCK
        assert b.content(tokens) == [7, 21]
        # It has no more; that is no error.
        reply = await a.send(tokens, ticket, begin=2 * BLOCK)
        assert reply.sent_tokens == 0 and reply.sent_bytes == 0
        assert (a.stats.asked_tokens, a.stats.sent_tokens) == (3 * BLOCK + 2 * BLOCK, BLOCK)
        # Half a block first, then the rest of it: published once it is whole.
        other = prompt(1, key=5)
        await a.fill(other, 30)
        ticket = await b.prepare(other)
        await a.send(other, ticket, end=40)
        assert await b.match(other) == (0, 0)
        await a.send(other, ticket, begin=40)
        assert b.content(other) == [30]


async def test_salts_keep_prompts_apart() -> None:
    async with kv_node("a") as a, kv_node("b") as b:
        tokens = prompt(2)
        await a.fill(tokens, 1, salt="tenant-1")
        assert await a.match(tokens) == (0, 0)
        assert await a.match(tokens, salt="tenant-2") == (0, 0)
        assert await a.match(tokens, salt="tenant-1") == (2 * BLOCK, 2 * BLOCK)
        ticket = await b.prepare(tokens, salt="tenant-1")
        assert (await a.send(tokens, ticket, salt="tenant-2")).sent_tokens == 0
        assert (await a.send(tokens, ticket, salt="tenant-1")).sent_tokens == 2 * BLOCK
        assert await b.match(tokens, salt="tenant-1") == (2 * BLOCK, 2 * BLOCK)
        assert await b.match(tokens) == (0, 0)


async def test_memory_is_bounded_and_the_least_recently_used_goes_first() -> None:
    async with kv_node("a", blocks=8) as a:
        for key in range(40):
            await a.fill(prompt(2, key), key)
            assert a.stats.memory_free + a.stats.memory_used == 8
        assert [await a.match(prompt(2, key)) for key in range(34, 40)] == [(0, 0), (0, 0), *[(2 * BLOCK,) * 2] * 4]
        assert a.stats.evicted_blocks == 72
        # Use counts: 36 is used again, so that 37 goes. Of a chain the end goes first.
        ticket = await a.prepare(prompt(2, 36))
        await a.release(ticket)
        await until(lambda: a.stats.locked == 0)
        await a.fill(prompt(1, 50), 0)
        assert await a.match(prompt(2, 36)) == (2 * BLOCK, 2 * BLOCK)
        assert await a.match(prompt(2, 37)) == (BLOCK, BLOCK)


async def test_reservations_wait_for_room_and_are_refused_by_name() -> None:
    async with kv_node("a", blocks=4) as a:
        held = await a.prepare(prompt(3, 1), ttl_ms=60_000)
        with pytest.raises(ResourceExhausted, match="2 blocks are needed, of 4 1 are free, 3 reserved"):
            await a.prepare(prompt(2, 2))
        with pytest.raises(ResourceExhausted, match="5 blocks are needed"):
            await a.prepare(prompt(5, 2), wait_ms=5000)
        with pytest.raises(ResourceExhausted):
            await a.prepare(prompt(2, 2), wait_ms=100)
        assert a.stats.waiting == 0 and a.stats.memory_free == 1
        # One that waits gets what another gives back.

        waiting = asyncio.ensure_future(a.prepare(prompt(4, 3), wait_ms=5000))
        await until(lambda: a.stats.waiting == 1)
        await a.release(held)
        ticket = await waiting
        assert ticket.end == 4 * BLOCK and a.stats.memory_free == 0
        await a.release(ticket)
        await until(lambda: a.stats.memory_free == 4 and a.stats.memory_reserved == 0)


async def test_a_caller_that_gives_up_waiting_leaves_nothing() -> None:

    async with kv_node("a", blocks=4) as a:
        held = await a.prepare(prompt(4, 1), ttl_ms=60_000)
        calls = [asyncio.ensure_future(a.prepare(prompt(2, key), wait_ms=5000)) for key in (2, 3)]
        await until(lambda: a.stats.waiting == 2)
        for call in calls:
            call.cancel()
        await until(lambda: a.stats.waiting == 0)
        await a.release(held)
        await until(lambda: a.stats.memory_free == 4 and a.stats.memory_reserved == 0 and a.stats.tickets == 0)


async def test_tickets_that_expire_give_their_blocks_back() -> None:
    async with kv_node("a", blocks=4) as a, kv_node("b") as b:
        tokens = prompt(3)
        await b.fill(tokens, 5)
        ticket = await a.prepare(tokens, ttl_ms=100)
        await until(lambda: a.stats.memory_free == 4)
        with pytest.raises(NotFound, match="has expired"):
            await b.send(tokens, ticket)
        assert b.stats.locked == 0 and b.stats.sending == 0


async def test_pins_outlive_pressure_until_they_end() -> None:
    async with kv_node("a", blocks=8) as a:
        kept = prompt(3)
        await a.fill(kept, 1)
        pinned = await a.call(a.admin.Pin, pb.PinRequest(token_ids=kept, end=-1, ttl_ms=60_000))
        assert pinned.pinned == 2 * BLOCK
        for key in range(1, 20):
            await a.fill(prompt(2, key), key)
        assert await a.match(kept) == (2 * BLOCK, 2 * BLOCK)
        with pytest.raises(ResourceExhausted, match="half"):
            await a.call(a.admin.Pin, pb.PinRequest(token_ids=prompt(2, 19), end=2 * BLOCK))
            await a.call(a.admin.Pin, pb.PinRequest(token_ids=prompt(2, 18), end=2 * BLOCK))
        unpinned = await a.call(a.admin.Unpin, pb.UnpinRequest(token_ids=kept, end=len(kept)))
        assert unpinned.unpinned == 2 * BLOCK
        for key in range(20, 40):
            await a.fill(prompt(2, key), key)
        assert await a.match(kept) == (0, 0)


async def test_blocks_age_and_pins_end_with_time() -> None:
    now = 1000.0
    async with kv_node("a", blocks=8, ttl=60, clock=lambda: now) as a:
        old, used, kept = prompt(1, 1), prompt(1, 2), prompt(1, 3)
        for tokens in (old, used, kept):
            await a.fill(tokens, 1)
        await a.call(a.admin.Pin, pb.PinRequest(token_ids=kept, end=BLOCK, ttl_ms=100_000))
        now += 50
        await a.release(await a.prepare(used))
        now += 20
        assert [(await a.match(t))[0] for t in (old, used, kept)] == [0, BLOCK, BLOCK]
        await until(lambda: a.stats.locked == 0)
        a.store.index.expire()
        assert a.stats.expired_blocks == 1 and a.stats.memory_free == 6
        now += 90
        assert a.stats.pinned == 0
        a.store.index.expire()
        assert a.stats.memory_free == 8


async def test_evict_drops_what_nobody_uses() -> None:
    async with kv_node("a") as a:
        tokens = prompt(4)
        await a.fill(tokens, 1)
        evicted = await a.call(a.admin.Evict, pb.EvictRequest(token_ids=tokens, begin=BLOCK + 1))
        assert evicted.evicted == 2 * BLOCK and (await a.match(tokens))[0] == 2 * BLOCK
        ticket = await a.prepare(tokens[:BLOCK])
        assert (await a.call(a.admin.Evict, pb.EvictRequest(all=True))).evicted == BLOCK
        await a.release(ticket)
        await until(lambda: a.stats.locked == 0)
        assert (await a.call(a.admin.Evict, pb.EvictRequest(all=True))).evicted == BLOCK
        assert a.stats.memory_free == 8


async def test_bad_input_is_refused_by_name() -> None:
    other = Layout("11" * 16, "bfloat16", layers=2, heads=2, k_dim=8, v_dim=8, page_size=1)
    async with kv_node("a") as a, kv_node("b", layout=other) as b:
        tokens = prompt(2)
        await a.fill(tokens, 1)
        with pytest.raises(InvalidArgument, match="token_ids is empty"):
            await a.prepare([])
        with pytest.raises(InvalidArgument, match=rf"token_ids\[1\] = {VOCAB}"):
            await a.match([1, VOCAB])
        with pytest.raises(InvalidArgument, match="end = 129"):
            await a.prepare(tokens, end=129)
        with pytest.raises(NotFound, match="model = 'else'"):
            await a.prepare(tokens, model="else")
        with pytest.raises(InvalidArgument, match="salt has 257 characters"):
            await a.prepare(tokens, salt="x" * 257)
        with pytest.raises(InvalidArgument, match="ttl_ms = 5"):
            await a.prepare(tokens, ttl_ms=5)
        with pytest.raises(InvalidArgument, match="either token_ids or all"):
            await a.call(a.admin.Evict, pb.EvictRequest())
        ticket = await b.prepare(tokens)
        with pytest.raises(FailedPrecondition, match="dtype is bfloat16 there and float32 here"):
            await a.send(tokens, ticket)
        with pytest.raises(FailedPrecondition, match="dtype is float32 there and bfloat16 here"):
            await b.prepare(tokens, sender_layout=LAYOUT.message())
        # Also when the ticket lies: the receiver looks at the sender's layout itself.
        ticket.layout_fingerprint = LAYOUT.fingerprint
        with pytest.raises(FailedPrecondition, match="dtype is float32 there and bfloat16 here"):
            await a.send(tokens, ticket)
        assert a.stats.locked == 0 and a.stats.memory_reserved == 0


async def test_engines_with_larger_pages_exchange_too() -> None:
    layout = Layout("00" * 16, "float32", layers=2, heads=2, k_dim=8, v_dim=8, page_size=16)
    async with kv_node("a", layout=layout) as a, kv_node("b", layout=layout) as b:
        tokens = prompt(2.5)
        await a.fill(tokens, 3)
        ticket = await b.prepare(tokens)
        assert ticket.end == 2 * BLOCK
        with pytest.raises(InvalidArgument, match="page size 16"):
            await a.send(tokens, ticket, end=BLOCK + 1)
        assert (await a.send(tokens, ticket)).sent_tokens == 2 * BLOCK
        assert b.content(tokens) == [3, 4]


async def test_the_status_stream_describes_then_counts(tmp_path: Path) -> None:
    async with kv_node("a", disk=tmp_path / "kv") as a:
        await a.fill(prompt(2), 1)
        await a.store.flush(5)
        call = a.admin.WatchStatus(pb.WatchStoreRequest(interval_ms=20), timeout=10)
        first, second = await call.read(), await call.read()
        call.cancel()
        assert first.info.model.name == "toy" and first.info.block_tokens == BLOCK and first.info.memory_blocks == 8
        assert Layout.of(first.info.layout) == LAYOUT and list(first.info.transports) == ["shm", "gloo"]
        assert second.stats.memory_used == 2 and second.stats.disk_blocks == 2 and second.stats.written_blocks == 2
        with pytest.raises(InvalidArgument, match="interval_ms = 5"):
            await a.call(
                lambda r, timeout: a.admin.WatchStatus(r, timeout=timeout).read(), pb.WatchStoreRequest(interval_ms=5)
            )
