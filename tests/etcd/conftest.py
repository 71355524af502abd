from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator

import grpc.aio
import pytest

from kvmesh.grpcx import channel
from kvmesh.local.etcd import EtcdProcess
from kvmesh.v1 import registry_pb2_grpc as pbg
from services.registry.base import Backend
from services.registry.etcd import EtcdBackend
from services.registry.memory import MemoryBackend
from services.registry.server import serving


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdProcess]:
    """One etcd for all tests that leave it running."""
    process = EtcdProcess(tmp_path_factory.mktemp("etcd"))
    asyncio.run(process.start())
    yield process
    asyncio.run(process.stop())


@pytest.fixture
async def own_etcd(tmp_path) -> AsyncIterator[EtcdProcess]:
    """An etcd that the test may break."""
    process = EtcdProcess(tmp_path / "etcd")
    await process.start()
    yield process
    await process.stop()


@pytest.fixture(scope="session")
def prefixes() -> Iterator[str]:
    return (f"/kvmesh-test/{i}" for i in itertools.count())


@pytest.fixture(params=["memory", "etcd"])
async def backend(request, etcd, prefixes) -> Backend:
    return MemoryBackend() if request.param == "memory" else EtcdBackend(etcd.address, next(prefixes))


@pytest.fixture
async def registry(backend) -> AsyncIterator[pbg.RegistryStub]:
    """A stub of a registry over each backend."""
    async with serving(backend, "127.0.0.1:0") as server, channel(server.address) as ch:
        async with asyncio.timeout(10):
            await backend.wait_ready()
        yield pbg.RegistryStub(ch)


@pytest.fixture
async def own_registry(own_etcd) -> AsyncIterator[tuple[str, grpc.aio.Channel]]:
    """(address, channel) of a registry over `own_etcd`."""
    backend = EtcdBackend(own_etcd.address)
    async with serving(backend, "127.0.0.1:0") as server, channel(server.address) as ch:
        async with asyncio.timeout(10):
            await backend.wait_ready()
        yield server.address, ch
