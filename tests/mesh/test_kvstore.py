"""The KV store with real engines: what it keeps outlives them, and itself; what is damaged is a miss."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from direct import DirectEngine
from hf_reference import Comparison
from mesh_process import RunningMesh, running
from prompts import prompt

from kvmesh.client import AsyncClient, Result
from kvmesh.dataplane.layout import Layout
from kvmesh.grpcx import channel
from kvmesh.local.spans import Span, settled_trace
from kvmesh.local.state import MeshDir
from kvmesh.modelfolder import layout_of
from kvmesh.v1 import kvstore_pb2 as pb
from kvmesh.v1.kvstore_pb2_grpc import KvStoreStub
from kvmesh.v1.router_pb2 import MeshStore

BLOCK, NEW = 64, 16
STORE = "kvstore-0"
# Of the test of bounds: as many blocks as are in memory.
WHOLE_PROMPT = 31 * BLOCK
# 31 blocks in memory, 60 on disk.
MEMORY, DISK = 4 << 20, 8 << 20
LENGTH = 500
WHOLE = LENGTH // BLOCK * BLOCK


@pytest.fixture(scope="module")
def disk(mesh_home: Path) -> Path:
    """The folder of the store's disk tier."""
    return mesh_home / "store-disk"


@pytest.fixture(scope="module")
def store_mesh(mesh_home: Path, model: Path, disk: Path) -> Iterator[RunningMesh]:
    """One engine and one small store."""
    arguments = ["--engines", "1", "--kv-tokens", "12288", "--stores", "1"]
    arguments += ["--store-memory", str(MEMORY), "--store-disk", f"{disk}:{DISK}"]
    yield from running(RunningMesh(mesh_home, "stores", model, arguments))


@pytest.fixture
async def router(store_mesh: RunningMesh) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(store_mesh.address("router")) as connected:
        yield connected


async def store_when(router: AsyncClient, holds: Callable[[MeshStore], bool], timeout: float = 30) -> MeshStore:
    """The store as the router sees it, once it is connected, has written all, and `holds`."""
    async with asyncio.timeout(timeout):
        while True:
            (store,) = (await router.mesh()).stores or [MeshStore()]
            if store.connected and not store.stats.unwritten and not store.stats.tickets and holds(store):
                return store
            await asyncio.sleep(0.1)


async def engine_up(router: AsyncClient) -> None:
    async with asyncio.timeout(60):
        while not any(engine.connected for engine in (await router.mesh()).engines):
            await asyncio.sleep(0.1)


async def ask(router: AsyncClient, tokens: list[int], **params: Any) -> Result:
    answer = router.generate(
        tokens, strategy="store_backed", strategy_params=params, temperature=0, ignore_eos=True, max_new_tokens=NEW,
        timeout=60,
    )  # fmt: skip
    result = await answer.wait()
    assert result.attempts == 1 and len(result.token_ids) == NEW
    return result


def shares(result: Result) -> tuple[int, int, int]:
    """(received, prefilled, cached) of the engine."""
    (engine,) = [s for s in result.shares if s.engine == "engine-0"]
    return engine.received_tokens, engine.prefilled_tokens, engine.cached_tokens


def spans_of(mesh: RunningMesh, result: Result) -> list[Span]:
    with mesh.at_home():
        return settled_trace(result.request_id, [MeshDir(mesh.name).traces], patience=5)


async def flush(mesh: RunningMesh) -> None:
    """The engine forgets all that it has cached."""
    async with DirectEngine("engine-0", mesh.address("engine-0")) as engine:
        await engine.flush()


def restart_store(mesh: RunningMesh, disk: Path) -> None:
    """Kills the store, without a chance to write anything, and starts it again on the same disk."""
    mesh.kill(STORE)
    mesh.start_store_beside(STORE, "--memory", str(MEMORY), "--disk", f"{disk / STORE}:{DISK}")


async def test_a_prefix_outlives_the_engine(
    store_mesh: RunningMesh, router: AsyncClient, comparison: Comparison, note: Callable[[str], None]
) -> None:
    tokens = prompt(LENGTH, "store")
    first = await ask(router, tokens)
    comparison.check("store_backed", "cold", tokens, first.token_ids, NEW)
    assert shares(first) == (0, LENGTH, 0)
    saved = await store_when(router, lambda s: s.stats.stored_blocks >= WHOLE // BLOCK)
    assert saved.stats.disk_blocks == (LENGTH + NEW - 1) // BLOCK
    names = [span.name for span in spans_of(store_mesh, first)]
    assert names.count("save") == 1 and "engine.transfer" in names

    store_mesh.kill("engine-0")
    store_mesh.start_beside("engine-0")
    await engine_up(router)
    second = await ask(router, tokens, write_back="never")
    comparison.check("store_backed", "engine restarted", tokens, second.token_ids, NEW)
    assert second.token_ids == first.token_ids
    # No prefill of what the store gave.
    assert shares(second) == (WHOLE, LENGTH - WHOLE, 0) and second.usage.cached_tokens == WHOLE
    spans = spans_of(store_mesh, second)
    (restore,) = [span for span in spans if span.name == "restore"]
    assert restore.attributes["kvmesh.tokens"] == WHOLE and restore.attributes["kvmesh.transport"] == "shm"
    assert {"store.remote_send", "store.transfer"} <= {span.name for span in spans}
    note(f"store: ttft cold {first.ttft_seconds * 1e3:.0f} ms, restored {second.ttft_seconds * 1e3:.0f} ms")


async def test_a_prefix_outlives_the_store(
    store_mesh: RunningMesh, router: AsyncClient, comparison: Comparison, disk: Path
) -> None:
    tokens = prompt(LENGTH, "store again")
    first = await ask(router, tokens)
    await store_when(router, lambda s: s.stats.disk_blocks >= 2 * (WHOLE // BLOCK))
    restart_store(store_mesh, disk)
    found = await store_when(router, lambda s: s.stats.disk_blocks >= 2 * (WHOLE // BLOCK))
    assert found.stats.memory_used == 0 and found.stats.loaded_blocks == 0
    await flush(store_mesh)
    second = await ask(router, tokens, write_back="never")
    comparison.check("store_backed", "store restarted", tokens, second.token_ids, NEW)
    assert second.token_ids == first.token_ids and shares(second) == (WHOLE, LENGTH - WHOLE, 0)
    after = await store_when(router, lambda s: s.stats.loaded_blocks > 0)
    assert after.stats.loaded_blocks == WHOLE // BLOCK and after.stats.damaged_blocks == 0


async def test_damage_on_disk_is_a_miss(
    store_mesh: RunningMesh, router: AsyncClient, comparison: Comparison, disk: Path
) -> None:
    tokens = prompt(LENGTH, "store damage")
    first = await ask(router, tokens)
    await store_when(router, lambda s: s.stats.disk_blocks >= 3 * (WHOLE // BLOCK))
    store_mesh.kill(STORE)
    files = list((disk / STORE / "blocks").glob("*/*.kv"))
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x40
        path.write_bytes(content)
    store_mesh.start_store_beside(STORE, "--memory", str(MEMORY), "--disk", f"{disk / STORE}:{DISK}")
    await store_when(router, lambda s: s.stats.disk_blocks == len(files))
    await flush(store_mesh)
    second = await ask(router, tokens)
    comparison.check("store_backed", "disk damaged", tokens, second.token_ids, NEW)
    assert second.token_ids == first.token_ids and shares(second) == (0, LENGTH, 0)
    healed = await store_when(router, lambda s: s.stats.damaged_blocks > 0 and s.stats.stored_blocks > 0)
    assert healed.stats.damaged_blocks == WHOLE // BLOCK
    # What was computed again has been saved again.
    await flush(store_mesh)
    third = await ask(router, tokens, write_back="never")
    assert third.token_ids == first.token_ids and shares(third) == (WHOLE, LENGTH - WHOLE, 0)


def disk_bytes(blocks: Path) -> int:
    """What the files take at one moment: a look during which files came or went is made again."""
    for _ in range(1000):
        with contextlib.suppress(FileNotFoundError):
            files = sorted(blocks.glob("*/*"))
            sizes = [path.stat().st_size for path in files]
            if sorted(blocks.glob("*/*")) == files:
                return sum(-(-size // 4096) * 4096 for size in sizes)
    raise AssertionError("the store's files change all the time")


async def test_bounds_hold_under_ten_times_their_size(
    store_mesh: RunningMesh, router: AsyncClient, comparison: Comparison, disk: Path, note: Callable[[str], None]
) -> None:
    blocks = disk / STORE / "blocks"
    most = total = 0
    address = store_mesh.address(STORE)
    async with channel(address) as ch:
        stub: Any = KvStoreStub(ch)
        before = (await stub.Stats(pb.StatsRequest(), timeout=5)).stats
        prompts = [prompt(WHOLE_PROMPT, "bounds", i) for i in range(26)]
        for tokens in prompts:
            await ask(router, tokens)
            reply = await stub.Stats(pb.StatsRequest(), timeout=5)
            stats, info = reply.stats, reply.info
            assert stats.memory_free + stats.memory_used + stats.memory_reserved == info.memory_blocks
            assert info.memory_bytes <= MEMORY and stats.disk_used_bytes <= DISK
            most = max(most, disk_bytes(blocks))
        # The last is saved after its answer.
        async with asyncio.timeout(30):
            while (await stub.Match(pb.MatchRequest(token_ids=prompts[-1]), timeout=5)).matched < WHOLE_PROMPT:
                await asyncio.sleep(0.05)
        last = await store_when(router, lambda s: s.stats.evicted_blocks > 0)
        total = last.stats.stored_blocks - before.stored_blocks
    bytes_stored = total * BLOCK * last.info.layout.bytes_per_token
    assert bytes_stored >= 10 * DISK >= 10 * MEMORY and most <= DISK
    await flush(store_mesh)
    tokens = prompts[-1]
    result = await ask(router, tokens, write_back="never")
    comparison.check("store_backed", "after ten times its size", tokens, result.token_ids, NEW)
    assert shares(result)[0] > 0
    note(f"store: {bytes_stored >> 20} MiB went through {MEMORY >> 20} MiB of memory and {DISK >> 20} MiB of disk")


async def test_the_layout_told_is_the_layout_learned(store_mesh: RunningMesh, router: AsyncClient, model: Path) -> None:
    (store,) = (await router.mesh()).stores
    (engine,) = (await router.mesh()).engines
    assert Layout.of(store.info.layout) == Layout.of(engine.info.layout) == layout_of(model, "auto", 1)
