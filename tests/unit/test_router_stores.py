"""KV stores in the router: restore, save, several stores, and stores that fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from fake_engine import answer
from fake_store import BLOCK, FakeStore
from router_harness import Harness

from kvmesh.blocks import block_hashes
from kvmesh.errors import ResourceExhausted, Unavailable
from kvmesh.stores import Held, rendezvous
from kvmesh.v1 import router_pb2
from kvmesh.v1.engine_pb2 import LoadReport
from services.router.seen import Seen


def prompt(length: int, key: int = 0) -> list[int]:
    return [(key * 31 + i * 7 + i // 97) % 250 for i in range(length)]


async def until_connected(h: Harness, count: int) -> router_pb2.GetMeshResponse:
    """The mesh, once so many stores are up at the router."""
    async with asyncio.timeout(5):
        while True:
            mesh = await h.router.GetMesh(router_pb2.GetMeshRequest(), timeout=5)
            if sum(store.connected for store in mesh.stores) == count:
                return mesh
            await asyncio.sleep(0.02)


@asynccontextmanager
async def with_stores(h: Harness, count: int = 1) -> AsyncIterator[list[FakeStore]]:
    async with AsyncExitStack() as stack:
        stores = [FakeStore(f"s{i}", h.mesh) for i in range(count)]
        for store in stores:
            await store.start(h.registry.address)
            stack.push_async_callback(store.stop)
        await until_connected(h, count)
        yield stores


async def generate(h: Harness, tokens: list[int], max_new: int = 8, **params: Any) -> Any:
    texts = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in params.items()}
    return await h.generate(tokens, max_new, strategy="store_backed", strategy_params=texts)


def test_what_a_cache_is_worth_beside_a_store() -> None:
    assert Held().worth(100, 0.1, 0.3) == 100
    held = Held(80, 50)
    assert [held.worth(cached, 0.1, 0.5) for cached in (0, 50, 80, 100)] == [0, 5, 20, 40]


async def test_the_engine_is_chosen_by_what_each_tier_spares(tmp_path: Path) -> None:
    tokens = prompt(16 * BLOCK)
    async with Harness(2, tmp=tmp_path) as h, with_stores(h) as [store]:
        # The one that has it all has a request more than the other: 256 tokens of 1,024.
        caching = h.engines[1]
        caching.blocks = block_hashes(tokens)
        await caching.report(LoadReport(free_slots=1000, running_requests=1))

        async def chosen() -> str:
            r = await generate(h, tokens, 1, policy="kv_aware", write_back="never")
            return next(s.engine for s in r.done.shares if s.decoded_tokens)

        async with asyncio.timeout(5):
            while await chosen() != "e1":
                await asyncio.sleep(0.02)
        store.kept = [("", tokens)]
        assert await chosen() == "e0"
        store.on_disk = True
        assert await chosen() == "e1"
        await h.idle()


async def test_what_was_computed_is_saved_and_restored(tmp_path: Path) -> None:
    async with Harness(1, tmp=tmp_path) as h, with_stores(h) as [store]:
        engine, tokens = h.engines[0], prompt(200)
        first = await generate(h, tokens)
        assert first.tokens == answer(tokens, 8)
        # Nothing there yet, which is no error; then prompt and answer are saved, in whole blocks.
        assert store.methods()[0] == "RemoteSend" and first.share("e0").received_tokens == 0
        await store.until(lambda: bool(store.kept) and not store.tickets)
        assert store.kept == [("", tokens[: 3 * BLOCK])]
        save = engine.requests("RemoteSend")[0]
        assert save.begin == 0 and save.end == 3 * BLOCK and list(save.token_ids) == tokens[: 3 * BLOCK]

        second = await generate(h, tokens)
        assert second.tokens == first.tokens
        assert second.share("e0").received_tokens == 3 * BLOCK and second.share("s0").sent_bytes > 0
        assert engine.requests("StartGenerate")[-1].begin == 3 * BLOCK
        assert second.done.usage.cached_tokens == 3 * BLOCK
        # It is all there: the second save finds nothing to send.
        await store.until(lambda: store.methods().count("PrepRecv") == 2 and not store.tickets)
        assert len(engine.requests("RemoteSend")) == 1
        await h.idle()


async def test_the_answer_is_saved_too(tmp_path: Path) -> None:
    async with Harness(1, tmp=tmp_path) as h, with_stores(h) as [store]:
        tokens = prompt(100)
        result = await generate(h, tokens, 29)
        # The last token of the answer has no KV: 100 + 28 make two blocks.
        await store.until(lambda: bool(store.kept))
        assert store.kept == [("", [*tokens, *result.tokens[:28]])]
        follow_up = [*tokens, *result.tokens, 5, 6, 7]
        again = await generate(h, follow_up)
        assert again.share("e0").received_tokens == 2 * BLOCK and again.tokens == answer(follow_up, 8)


async def test_an_engine_that_has_it_restores_nothing(tmp_path: Path) -> None:
    async with Harness(1, tmp=tmp_path) as h, with_stores(h) as [store]:
        tokens = prompt(200)
        store.kept = [("", tokens)]
        h.engines[0].cached = tokens[:180]
        result = await generate(h, tokens, write_back="never")
        assert result.tokens == answer(tokens, 8) and store.methods() == []
        # Below min_restore; with another, it is.
        h.engines[0].cached = tokens[:130]
        result = await generate(h, tokens, write_back="never", min_restore=60)
        assert result.share("e0").received_tokens == 3 * BLOCK - 130
        await h.idle()


async def test_second_use_saves_what_two_requests_share(tmp_path: Path) -> None:
    async with Harness(1, tmp=tmp_path) as h, with_stores(h) as [store]:
        shared = prompt(150, 1)
        one, two = [*shared, *prompt(150, 2)], [*shared, *prompt(150, 3)]
        await generate(h, one, write_back="second")
        await generate(h, two, write_back="second")
        await store.until(lambda: bool(store.kept))
        assert store.kept == [("", shared[: 2 * BLOCK])]
        assert store.methods().count("PrepRecv") == 1


async def test_never_saves_nothing(tmp_path: Path) -> None:
    async with Harness(1, tmp=tmp_path) as h, with_stores(h) as [store]:
        for _ in range(2):
            await generate(h, prompt(200), write_back="never")
        assert store.methods() == ["RemoteSend"] * 2 and store.kept == []


async def test_tenants_are_kept_apart_when_asked_for(tmp_path: Path) -> None:
    async with Harness(1, tmp=tmp_path) as h, with_stores(h) as [store]:
        tokens = prompt(200)

        async def of(tenant: str, per_tenant: str) -> Any:
            params = {"per_tenant": per_tenant, "write_back": "never"}
            return await h.generate(tokens, strategy="store_backed", strategy_params=params, tenant=tenant)

        store.kept = [("alice", tokens)]
        assert (await of("alice", "true")).share("e0").received_tokens == 3 * BLOCK
        assert (await of("bob", "true")).share("e0").received_tokens == 0
        assert (await of("alice", "false")).share("e0").received_tokens == 0


async def test_short_prompts_and_a_mesh_without_stores_go_by_themselves(tmp_path: Path) -> None:
    async with Harness(2, tmp=tmp_path) as h:
        tokens = prompt(200)
        assert (await generate(h, tokens)).tokens == answer(tokens, 8)
        async with with_stores(h) as [store]:
            assert (await generate(h, prompt(63))).tokens == answer(prompt(63), 8)
            assert store.methods() == []


async def test_a_store_that_fails_costs_its_hits_and_nothing_else(tmp_path: Path) -> None:
    async with Harness(1, tmp=tmp_path) as h, with_stores(h) as [store]:
        tokens = prompt(200)
        store.kept = [("", tokens)]
        store.faults["RemoteSend"] = Unavailable("told to fail")
        result = await generate(h, tokens, write_back="never")
        assert result.tokens == answer(tokens, 8) and result.done.attempts == 1
        assert result.share("e0").received_tokens == 0
        del store.faults["RemoteSend"]
        store.faults["PrepRecv"] = ResourceExhausted("told to be full")
        result = await generate(h, tokens)
        assert result.tokens == answer(tokens, 8)
        await store.until(lambda: "PrepRecv" in store.methods())
        await h.idle()
        # One that hangs is given `patience`.
        gate = store.gates["RemoteSend"] = asyncio.Event()
        result = await generate(h, tokens, write_back="never", patience=0.2)
        assert result.tokens == answer(tokens, 8) and result.done.attempts == 1
        gate.set()
        await h.idle()


async def test_a_store_that_dies_is_left_out(tmp_path: Path) -> None:
    async with Harness(1, tmp=tmp_path) as h, with_stores(h) as [store]:
        tokens = prompt(200)
        await store.kill()
        await until_connected(h, 0)
        assert (await generate(h, tokens)).tokens == answer(tokens, 8)


async def test_a_save_ends_with_its_engine_and_leaves_nothing(tmp_path: Path) -> None:
    async with Harness(1, tmp=tmp_path) as h, with_stores(h) as [store]:
        engine = h.engines[0]
        engine.faults["RemoteSend"] = Unavailable("told to fail")
        await generate(h, prompt(200))
        await store.until(lambda: "Release" in store.methods())
        assert store.kept == [] and not store.tickets
        assert (await generate(h, prompt(200, 1))).tokens == answer(prompt(200, 1), 8)


async def test_several_stores_share_the_prompts_and_a_loss_moves_only_its_own(tmp_path: Path) -> None:
    prompts = [prompt(200, key) for key in range(24)]
    names = ["s0", "s1", "s2"]
    owners = [rendezvous(names, tokens) for tokens in prompts]
    assert {owners.count(name) for name in names}.isdisjoint({0})
    async with Harness(1, tmp=tmp_path) as h, with_stores(h, 3) as stores:
        for tokens in prompts:
            await generate(h, tokens)
        for store in stores:
            mine = [tokens for tokens, owner in zip(prompts, owners, strict=True) if owner == store.name]
            await store.until(lambda store=store, mine=mine: len(store.kept) == len(mine))  # type: ignore[misc]
            assert sorted(kept for _, kept in store.kept) == sorted(tokens[: 3 * BLOCK] for tokens in mine)
        await stores[1].kill()
        await until_connected(h, 2)
        for tokens, owner in zip(prompts, owners, strict=True):
            result = await generate(h, tokens, write_back="never")
            assert result.tokens == answer(tokens, 8)
            assert result.share("e0").received_tokens == (0 if owner == "s1" else 3 * BLOCK)


async def test_restore_and_save_are_in_the_trace(tmp_path: Path) -> None:
    async with Harness(1, tmp=tmp_path) as h, with_stores(h) as [store]:
        tokens = prompt(200)
        await generate(h, tokens)
        await store.until(lambda: bool(store.kept) and not store.tickets)
        await generate(h, tokens)
        await store.until(lambda: store.methods().count("Release") == 2)
    spans = [json.loads(line) for path in h.traces.glob("router-*.jsonl") for line in path.read_text().splitlines()]
    spans.sort(key=lambda span: span["start_time"])
    by_id = {span["context"]["span_id"]: span for span in spans}
    restores = [span for span in spans if span["name"] == "restore"]
    saves = [span for span in spans if span["name"] == "save"]
    assert [s["attributes"]["kvmesh.tokens"] for s in restores] == [0, 3 * BLOCK]
    assert all(by_id[s["parent_id"]]["name"] == "strategy store_backed" for s in (*restores, *saves))
    assert len(saves) == 2 and {s["attributes"]["kvmesh.engine"] for s in saves} == {"s0"}
    parts = [[s["name"] for s in spans if s["parent_id"] == save["context"]["span_id"]] for save in saves]
    assert parts[0] == ["prep_recv", "remote_send", "release"] and parts[1] == ["prep_recv", "release"]


async def test_the_mesh_tells_of_its_stores(tmp_path: Path) -> None:
    async with Harness(1, tmp=tmp_path) as h, with_stores(h, 2):
        mesh = await until_connected(h, 2)
        assert [s.member.endpoint.name for s in mesh.stores] == ["s0", "s1"]
        assert mesh.stores[0].info.block_tokens == BLOCK and [e.member.endpoint.name for e in mesh.engines] == ["e0"]


def test_rendezvous_is_even_and_moves_little() -> None:
    prompts = [prompt(BLOCK, key) for key in range(600)]
    four = [rendezvous(["a", "b", "c", "d"], tokens) for tokens in prompts]
    assert all(100 < four.count(name) < 200 for name in "abcd")
    three = [rendezvous(["a", "b", "d"], tokens) for tokens in prompts]
    assert all(now == before for before, now in zip(four, three, strict=True) if before != "c")
    assert rendezvous([], prompts[0]) is None and rendezvous(["a"], prompts[0][:-1]) is None
    # What comes after the first block changes nothing.
    assert rendezvous(["a", "b", "c"], [*prompts[0], 1]) == rendezvous(["a", "b", "c"], [*prompts[0], 2])


def test_seen_forgets_what_is_least_lately_seen() -> None:
    seen = Seen(6)
    one, two = block_hashes(prompt(4 * BLOCK, 1)), block_hashes(prompt(4 * BLOCK, 2))
    assert seen.add(one) == 0 and seen.add(one) == 4
    assert seen.add(two) == 0
    # Two of the first are left, and these are its beginning.
    assert seen.add(one) == 2
