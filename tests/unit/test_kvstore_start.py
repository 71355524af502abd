"""Starting a store: its settings, where it learns its layout, and its place in the mesh."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fake_engine import FakeEngine
from router_harness import Harness
from store_harness import LAYOUT

from kvmesh.dataplane.layout import Layout
from kvmesh.errors import FailedPrecondition, InvalidArgument
from kvmesh.grpcx import channel
from kvmesh.modelfolder import layout_of, model_digest
from kvmesh.sizes import parse_place, parse_size
from kvmesh.v1 import kvstore_pb2 as pb
from kvmesh.v1 import router_pb2
from kvmesh.v1.kvstore_pb2_grpc import KvStoreStub
from services.kvstore.cli import KvStoreConfig, kvstore
from services.kvstore.main import start

CONFIG = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "vocab_size": 1000,
    "torch_dtype": "float32",
    "max_position_embeddings": 4096,
}


def model_folder(path: Path, **changes: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    (path / "model.safetensors").write_bytes(b"weights")
    return path


@asynccontextmanager
async def started(**settings: Any) -> AsyncIterator[pb.StoreInfo]:
    """A running store, as it describes itself."""
    async with AsyncExitStack() as stack:
        config = KvStoreConfig(**{"trace_ratio": 0.0, "memory": "1MiB", **settings})
        server = await start(config, stack)
        ch = channel(server.address)
        stack.push_async_callback(ch.close, None)
        stub: Any = KvStoreStub(ch)
        info = (await stub.Stats(pb.StatsRequest(), timeout=5)).info
        assert info.endpoint.address == server.address
        yield info


async def test_told_a_model_then_known_by_the_disk(tmp_path: Path) -> None:
    folder, disk = model_folder(tmp_path / "toy"), f"{tmp_path / 'kv'}:1GiB"
    async with started(model=str(folder), disk=disk) as info:
        assert Layout.of(info.layout) == layout_of(folder, "auto", 1)
        assert Layout.of(info.layout) == Layout(model_digest(folder), "float32", 2, 2, 8, 8, 1)
        assert info.model.name == "toy" and info.model.vocab_size == 1000 and info.disk_bytes == 1 << 30
        assert 0 < info.memory_bytes <= 1 << 20
        # No second store on the same folder.
        with pytest.raises(FailedPrecondition, match="in use by another store"):
            async with started(model=str(folder), disk=disk):
                pass
    async with started(disk=disk) as info:
        assert info.model.name == "toy"
    other = model_folder(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(FailedPrecondition, match="holds the KV of toy in another layout"):
        async with started(model=str(other), disk=disk):
            pass
    # What was refused let go of the folder.
    async with started(disk=disk):
        pass


async def test_learned_from_an_engine_of_the_mesh(tmp_path: Path) -> None:
    async with Harness(1, tmp=tmp_path) as h:
        h.engines[0].layout = LAYOUT.message()
        async with started(layout_of=h.engines[0].endpoint.address) as info:
            assert Layout.of(info.layout) == LAYOUT and info.model.name == "fake"
        async with started(registry=h.registry.address, name="s") as info:
            assert Layout.of(info.layout) == LAYOUT
            # The router has seen that engine without a layout: it does not take the store for its own.
            mesh = router_pb2.GetMeshResponse()
            async with asyncio.timeout(5):
                while not (mesh.stores and mesh.stores[0].connected):
                    mesh = await h.router.GetMesh(router_pb2.GetMeshRequest(), timeout=5)
                    await asyncio.sleep(0.02)
            assert mesh.stores[0].member.endpoint.name == "s" and mesh.stores[0].info == info
        async with asyncio.timeout(5):
            while (await h.router.GetMesh(router_pb2.GetMeshRequest(), timeout=5)).stores:
                await asyncio.sleep(0.02)


async def test_it_waits_for_an_engine_of_its_model(tmp_path: Path) -> None:
    async with Harness(0, tmp=tmp_path) as h:
        starting = started(registry=h.registry.address, model_name="wanted")
        waiting = asyncio.ensure_future(starting.__aenter__())
        for name, model in (("e0", "other"), ("e1", "wanted")):
            assert not waiting.done()
            engine = FakeEngine(name, h.mesh, {})
            engine.model, engine.layout = model, LAYOUT.message()
            await engine.start(h.registry.address)
            h._stack.push_async_callback(engine.stop)
        async with asyncio.timeout(10):
            assert (await waiting).model.name == "wanted"
        await starting.__aexit__(None, None, None)


async def test_metrics_tell_how_full_it_is(tmp_path: Path) -> None:
    folder, announced = model_folder(tmp_path / "toy"), tmp_path / "address"
    async with started(model=str(folder), metrics="127.0.0.1:0", announce=str(announced)) as info:
        address = (tmp_path / "address.metrics").read_text().strip()
        with await asyncio.to_thread(urllib.request.urlopen, f"http://{address}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    assert f'kvmesh_kvstore_blocks{{place="memory_free"}} {info.memory_blocks:.1f}' in text
    assert "kvmesh_kvstore_damaged_blocks_total 0.0" in text and 'place="disk"' in text


async def test_several_ranks_are_refused_by_name(tmp_path: Path) -> None:
    async with Harness(1, tmp=tmp_path) as h:
        h.engines[0].layout = Layout("00" * 16, "float32", 2, 2, 8, 8, 1, ranks=2).message()
        with pytest.raises(FailedPrecondition, match="2 tensor-parallel ranks"):
            async with started(layout_of=h.engines[0].endpoint.address):
                pass


async def test_too_little_memory_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "toy")
    with pytest.raises(InvalidArgument, match=r"memory = 4096 bytes has no room for two blocks.*49152 are needed"):
        async with started(model=str(folder), memory="4096"):
            pass


BAD = {
    "registry is missing": [],
    "memory = '8 apples'": ["--memory", "8 apples"],
    "disk = '/data'": ["--disk", "/data"],
    "disk = 'much'": ["--disk", "/data:much"],
    "ttl = -1": ["--ttl", "-1"],
    "dtype = 'int8'": ["--dtype", "int8"],
    "address 'x'": ["--layout-of", "x"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings_are_usage_errors(message: str) -> None:
    given = [] if not BAD[message] else ["--registry", "127.0.0.1:1", *BAD[message]]
    result = CliRunner().invoke(kvstore, given)
    assert result.exit_code == 2 and message in result.output.replace("\n", " ")


async def test_weights_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "toy")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(InvalidArgument, match=r"model = .*toy' cannot be read: .*model.safetensors"):
        async with started(model=str(folder)):
            pass


def test_sizes() -> None:
    assert parse_size("8GiB", "x") == 8 << 30 and parse_size("1.5 KiB", "x") == 1536
    assert parse_size("500MB", "x") == 500_000_000 and parse_size("4096", "x") == 4096
    assert parse_place("/a:b/c:1TiB", "x") == ("/a:b/c", 1 << 40)
    with pytest.raises(InvalidArgument, match="x = '8gib'"):
        parse_size("8gib", "x")


def test_a_folder_that_does_not_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"has no config\.json"):
        layout_of(tmp_path, "auto", 1)
    folder = model_folder(tmp_path / "toy", torch_dtype="int8")
    with pytest.raises(InvalidArgument, match="dtype = 'auto'"):
        layout_of(folder, "auto", 1)
    assert layout_of(folder, "bfloat16", 16).page_size == 16
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    with pytest.raises(InvalidArgument, match="has no num_attention_heads"):
        layout_of(bare, "float32", 1)
