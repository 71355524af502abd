"""Engines and stores of a mesh of our own, called directly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc.aio

from kvmesh import grpcx
from kvmesh.local.mesh import stages
from kvmesh.local.options import MeshOptions
from kvmesh.local.state import MeshDir
from kvmesh.local.supervisor import LocalMesh
from kvmesh.v1.common_pb2 import SamplingParams, Ticket
from kvmesh.v1.engine_pb2 import FlushRequest, StartGenerateRequest
from kvmesh.v1.engine_pb2_grpc import EngineStub
from kvmesh.v1.kv_pb2 import PrepRecvRequest, ReleaseRequest, RemoteSendRequest
from kvmesh.v1.kv_pb2_grpc import KvEndpointStub

TRANSPORTS = ("shm", "gloo")
CALL_S = 300.0


class Peer:
    """One engine or store, called directly."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._kv: Any = KvEndpointStub(channel)
        self._engine: Any = EngineStub(channel)

    async def prepare(self, prompt: list[int], end: int) -> Ticket:
        request = PrepRecvRequest(token_ids=prompt, end=end, ttl_ms=300_000, wait_ms=10_000)
        return (await self._kv.PrepRecv(request, timeout=CALL_S)).ticket

    async def send(self, prompt: list[int], ticket: Ticket, end: int) -> Any:
        request = RemoteSendRequest(token_ids=prompt, begin=ticket.matched, end=end, ticket=ticket)
        return await self._kv.RemoteSend(request, timeout=CALL_S)

    async def release(self, ticket: Ticket) -> None:
        await self._kv.Release(ReleaseRequest(ticket=ticket), timeout=CALL_S)

    async def generate(self, prompt: list[int], ticket: Ticket | None = None, begin: int = 0) -> None:
        """Up to the first token."""
        sampling = SamplingParams(max_new_tokens=1, temperature=0, ignore_eos=True)
        request = StartGenerateRequest(token_ids=prompt, sampling=sampling, ticket=ticket, begin=begin)
        async for _ in self._engine.StartGenerate(request, timeout=CALL_S):
            pass

    async def flush(self) -> None:
        """The engine forgets all KV; it needs a moment to drop the last request."""
        async with asyncio.timeout(20):
            while True:
                with suppress(grpc.aio.AioRpcError):
                    await self._engine.Flush(FlushRequest(), timeout=CALL_S)
                    return
                await asyncio.sleep(0.05)


@asynccontextmanager
async def peers_of(
    options: MeshOptions, model: Path, arguments: list[str]
) -> AsyncIterator[tuple[list[Peer], list[Peer]]]:
    """Starts a mesh, and stops it: its engines, which get `arguments`, and its stores."""
    async with LocalMesh(MeshDir(options.name), str(model)) as mesh, AsyncExitStack() as stack:
        await mesh.start(stages(options, model, arguments), options.start_timeout)

        async def peers(role: str) -> list[Peer]:
            addresses = [c.address for c in mesh.children if c.spec.role == role]
            return [Peer(await stack.enter_async_context(grpcx.channel(address))) for address in addresses]

        yield await peers("engine"), await peers("kvstore")
