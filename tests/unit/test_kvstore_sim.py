"""The KV store of simulated engines: all of a store but the bytes."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from rich.console import Console
from router_harness import Result
from sim_harness import fast, reference
from sim_processes import SimProcesses

from kvmesh.dataplane.layout import Layout
from kvmesh.errors import FailedPrecondition, InvalidArgument
from kvmesh.grpcx import channel
from kvmesh.local.show_stores import stores_part
from kvmesh.sim.profile import load_profile
from kvmesh.v1 import engine_pb2, engine_pb2_grpc, kv_pb2, kv_pb2_grpc
from kvmesh.v1 import kvstore_pb2 as pb
from kvmesh.v1.kvstore_pb2_grpc import KvStoreStub
from services.kvstore.blockfile import HEADER_BYTES
from services.kvstore.cli import KvStoreConfig
from services.kvstore.disk import DiskFolder, Served
from services.kvstore.main import start
from services.kvstore.sim import SimMemory, served

BLOCK = 64
BLOCK_BYTES = BLOCK * load_profile("tiny-cpu").bytes_per_token


def tokens_of(blocks: int, key: int = 0) -> list[int]:
    return [(key * 31 + i * 7 + i * i % 11) % 250 + 3 for i in range(blocks * BLOCK + 1)]


class Mesh(SimProcesses):
    """Simulated engines and stores that are processes, and what tests ask of them."""

    async def serve(self, tokens: list[int], **params: str) -> Result:
        """Greedy, by way of the store; the answer is the model's."""
        result = await self.generate(tokens, 4, strategy="store_backed", strategy_params=params)
        assert result.tokens == reference(tokens, 4)
        return result

    async def saved(self, store: str, blocks: int) -> pb.StoreStats:
        """The store's figures once so many blocks have come, and nothing is under way."""
        async with asyncio.timeout(20):
            while True:
                stats = (await self.stats(store)).stats
                if stats.stored_blocks >= blocks and not (stats.tickets or stats.unwritten or stats.locked):
                    return stats
                await asyncio.sleep(0.02)

    async def stats(self, store: str) -> pb.StatsResponse:
        async with channel(self.address(store)) as ch:
            stub: Any = KvStoreStub(ch)
            return await stub.Stats(pb.StatsRequest(), timeout=5)

    async def flush(self, engine: str) -> None:
        async with channel(self.address(engine)) as ch:
            stub: Any = engine_pb2_grpc.EngineStub(ch)
            await stub.Flush(engine_pb2.FlushRequest(), timeout=5)


async def test_prefixes_come_back_from_the_store(tmp_path: Path) -> None:
    disk = f"{tmp_path / 'kv'}:1GiB"
    async with Mesh(1, tmp=tmp_path) as h:
        await h.start_store("store", disk=disk)
        tokens = tokens_of(5)
        first = await h.serve(tokens)
        assert first.share("s0").received_tokens == 0
        stats = await h.saved("store", 5)
        assert stats.written_blocks == 5 and stats.disk_used_bytes == 5 * (BLOCK_BYTES + 4096)

        # The engine has lost it: all of it comes from the store's memory.
        await h.flush("s0")
        second = await h.serve(tokens)
        assert second.share("s0").received_tokens == 5 * BLOCK and second.share("s0").prefilled_tokens <= 1
        assert second.share("store").sent_bytes == 5 * BLOCK_BYTES

        # Another life of both: from the store's disk.
        await h.kill("store")
        await h.kill("s0")
        await h.start_engine("s0")
        await h.connected("s0")
        await h.start_store("store", disk=disk)
        third = await h.serve(tokens)
        assert third.share("s0").received_tokens == 5 * BLOCK
        assert (await h.stats("store")).stats.loaded_blocks == 5
        await h.at_rest(["s0"])
        said = (tmp_path / "store.log").read_text()
        assert "SIMULATED" in said and "Traceback" not in said


async def test_memory_and_disk_stay_in_bounds_and_what_is_gone_is_a_miss(tmp_path: Path) -> None:
    async with Mesh(1, tmp=tmp_path) as h:
        # Room for 8 blocks beside the padding, and for 12 on disk.
        disk = tmp_path / "kv"
        limit = 12 * (BLOCK_BYTES + 4096)
        await h.start_store("store", memory=str(9 * BLOCK_BYTES), disk=f"{disk}:{limit}")
        for key in range(6):
            await h.serve(tokens_of(4, key))
            stats = await h.saved("store", 4 * (key + 1))
            assert stats.memory_used + stats.memory_free == 8 and stats.disk_used_bytes <= limit
        assert stats.evicted_blocks == 24 - 12 and stats.disk_blocks == 12
        assert len(list(disk.rglob("*.kv"))) == 12
        await h.flush("s0")
        assert (await h.serve(tokens_of(4, 0), write_back="never")).share("s0").received_tokens == 0
        assert (await h.serve(tokens_of(4, 3), write_back="never")).share("s0").received_tokens == 4 * BLOCK
        await h.at_rest(["s0"])


async def test_a_store_that_is_killed_costs_its_hits(tmp_path: Path) -> None:
    async with Mesh(2, tmp=tmp_path) as h:
        await h.start_store("store")
        tokens = tokens_of(4)
        await h.serve(tokens)
        await h.saved("store", 4)
        await h.kill("store")
        assert [r.tokens for r in await asyncio.gather(*(h.serve(tokens_of(4, key)) for key in range(4)))]
        await h.at_rest(["s0", "s1"])


async def test_status_says_that_it_is_simulated(tmp_path: Path) -> None:
    async with Mesh(1, tmp=tmp_path) as h:
        await h.start_store("store")
        store = (await h.stores())["store"]
        assert list(store.info.transports) == ["sim", "sim_tcp"] and store.info.model.name == "tiny"
        out = io.StringIO()
        for part in stores_part([store]):
            Console(file=out, width=200).print(part)
        assert "up, sim" in out.getvalue() and "numbers in place of KV" in out.getvalue()


async def test_kv_that_nobody_wrote_is_not_taken_for_a_prefix(tmp_path: Path) -> None:
    """A fault at the sender: what the store was told to keep has not come, and answers show it."""
    async with Mesh(1, tmp=tmp_path, sim_faults="drop_transfers=1") as h:
        await h.start_store("store")
        tokens = tokens_of(3)
        await h.serve(tokens)
        await h.saved("store", 3)
        await h.flush("s0")
        result = await h.generate(tokens, 4, strategy="store_backed")
        assert result.share("s0").received_tokens == 3 * BLOCK and result.tokens != reference(tokens, 4)


async def test_a_real_store_refuses_simulated_engines(tmp_path: Path) -> None:
    async with Mesh(1, tmp=tmp_path) as h:
        for where in ({"layout_of": h.address("s0")}, {"registry": h.registry_address}):
            async with AsyncExitStack() as stack:
                with pytest.raises(FailedPrecondition, match=r"tiny are simulated.*--sim tiny-cpu"):
                    await start(KvStoreConfig(trace_ratio=0.0, memory="1MiB", **where), stack)


async def test_a_simulated_store_refuses_real_kv() -> None:
    async with AsyncExitStack() as stack:
        server = await start(KvStoreConfig(trace_ratio=0.0, sim="tiny-cpu"), stack)
        ch = channel(server.address)
        stack.push_async_callback(ch.close, None)
        stub: Any = kv_pb2_grpc.KvEndpointStub(ch)
        real = Layout("00" * 16, "float32", 2, 2, 32, 32, 1).message()
        request = kv_pb2.PrepRecvRequest(token_ids=tokens_of(1), end=BLOCK, sender_layout=real)
        with pytest.raises(grpc.aio.AioRpcError, match="another layout: model_digest is 0000") as failure:
            await stub.PrepRecv(request, timeout=5)
        assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_a_folder_is_for_one_kind(tmp_path: Path) -> None:
    profile = load_profile("tiny-cpu")
    folder = DiskFolder(str(tmp_path / "kv"), 1 << 20)
    folder.claim(served(profile))
    assert folder.served() == served(profile)
    with pytest.raises(FailedPrecondition, match="holds simulated KV, and this store is for real engines"):
        folder.claim(Served(profile.layout, "tiny", "/models/tiny", 384, 8192))
    folder.close()
    other = DiskFolder(str(tmp_path / "real"), 1 << 20)
    other.claim(Served(profile.layout, "tiny", "/models/tiny", 384, 8192))
    with pytest.raises(FailedPrecondition, match="holds real KV, and this store is for simulated engines"):
        other.claim(served(profile))
    other.close()


async def test_a_folder_of_simulated_kv_needs_the_profile(tmp_path: Path) -> None:
    disk = f"{tmp_path / 'kv'}:1MiB"
    async with AsyncExitStack() as stack:
        await start(KvStoreConfig(trace_ratio=0.0, sim="tiny-cpu", disk=disk), stack)
    async with AsyncExitStack() as stack:
        with pytest.raises(FailedPrecondition, match="simulated"):
            await start(KvStoreConfig(trace_ratio=0.0, disk=disk), stack)


def test_memory_stands_for_real_sizes() -> None:
    for name in ("tiny-cpu", "llama-3.1-70b-fp8-tp4-h100"):
        profile = load_profile(name)
        size = BLOCK * profile.bytes_per_token
        memory = SimMemory(profile.layout, 11 * size + 5)
        assert (memory.blocks, memory.bytes, memory.block_bytes, memory.total) == (10, 11 * size, size, 11 * BLOCK - 1)
        memory.values[3 * BLOCK : 4 * BLOCK] = np.arange(BLOCK, dtype=np.uint64) << np.uint64(40)
        (view,) = memory.views(3)
        assert len(view) == 8 * BLOCK and bytes(view) == memory.values[3 * BLOCK : 4 * BLOCK].tobytes()
        view[:8] = b"\xff" * 8
        assert int(memory.values[3 * BLOCK]) == (1 << 64) - 1
        with pytest.raises(InvalidArgument, match="no room for two blocks"):
            SimMemory(profile.layout, 3 * size - 1)
    assert HEADER_BYTES < 4096


def test_settings_that_contradict_each_other() -> None:
    for fields, said in (({"model": "/m"}, "leave out model"), ({"layout_of": "h:1"}, "leave out layout_of")):
        with pytest.raises(InvalidArgument, match=f"sim = 'tiny-cpu'.*{said}"):
            KvStoreConfig(sim="tiny-cpu", **fields)


def test_no_torch_is_needed(tmp_path: Path) -> None:
    """The image of the simulated store has none."""
    code = """
import asyncio, sys
sys.modules["torch"] = None
from contextlib import AsyncExitStack
from services.kvstore.cli import KvStoreConfig
from services.kvstore.main import start
async def main():
    async with AsyncExitStack() as stack:
        await start(KvStoreConfig(sim="tiny-cpu", trace_ratio=0.0, disk=sys.argv[1]), stack)
asyncio.run(main())
print("served")
"""
    command = [sys.executable, "-c", code, f"{tmp_path / 'kv'}:1MiB"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "served", done.stderr


def test_fast_profiles_keep_their_layout() -> None:
    # Stores of a faster copy of a profile serve its engines.
    assert fast().layout == load_profile("tiny-cpu").layout
