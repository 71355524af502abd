"""Real engine services over fake runtimes, each on a port of 127.0.0.1; as a program, one of them in a process."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from fake_runtime import CONTEXT, EOS, VOCAB, FakeRuntime, Writes

from kvmesh.blocks import BLOCK_TOKENS
from kvmesh.config import TraceConfig
from kvmesh.endpoint.receiver import Receiver
from kvmesh.endpoint.sender import Sender
from kvmesh.endpoint.tickets import TicketBook
from kvmesh.grpcx import Server, channel, split_address
from kvmesh.telemetry import Telemetry
from kvmesh.tokenizer import Tokenizers
from kvmesh.v1 import common_pb2, engine_pb2, engine_pb2_grpc, kv_pb2, kv_pb2_grpc
from services.engine.service import NAMES, EngineService
from services.engine.status import Status

CODES = grpc.StatusCode
HOST = "this-host"


class EngineNode:
    """One engine: runtime, ticket book, receiver, sender, status, and stubs of its services."""

    def __init__(
        self,
        name: str = "e0",
        runtime: FakeRuntime | None = None,
        *,
        host: str = HOST,
        model_path: str = "",
        telemetry: Telemetry | None = None,
    ) -> None:
        self.name, self.host, self.model_path = name, host, model_path
        self.runtime = runtime or FakeRuntime()
        self._telemetry = telemetry or Telemetry("engine", name, TraceConfig(trace_ratio=0))

    async def start(self) -> None:
        r = self.runtime
        await r.start()
        self.endpoint = common_pb2.Endpoint(name=self.name, incarnation=secrets.token_hex(16))
        self.book = TicketBook(self.endpoint, r.layout.fingerprint, r.free)
        self.receiver = Receiver(r, self.book, self.host)
        self.sender = Sender(self.endpoint, r, self.host)
        self.tokenizers = Tokenizers()
        info = engine_pb2.EngineInfo(
            endpoint=self.endpoint,
            model=engine_pb2.ModelInfo(
                name="tiny", path=self.model_path, vocab_size=VOCAB, context_length=CONTEXT, eos_token_ids=[EOS]
            ),
            layout=r.layout.message(),
            total_slots=r.total_slots,
            transports=list(r.pools),
            cache_block_tokens=BLOCK_TOKENS,
        )
        self.status = Status(info, r, self.book)
        service = EngineService(r, self.book, self.receiver, self.sender, self.status, self.tokenizers, self._telemetry)
        self.service = service

        def register(server: Any) -> None:
            kv_pb2_grpc.add_KvEndpointServicer_to_server(service, server)
            kv_pb2_grpc.add_KvPeerServicer_to_server(service, server)
            engine_pb2_grpc.add_EngineServicer_to_server(service, server)

        self.server = Server("127.0.0.1:0", register, NAMES)
        self.endpoint.address = info.endpoint.address = self.server.address
        await self.server.start()
        self.channel = channel(self.server.address)
        self.kv = kv_pb2_grpc.KvEndpointStub(self.channel)
        self.peer = kv_pb2_grpc.KvPeerStub(self.channel)
        self.engine = engine_pb2_grpc.EngineStub(self.channel)

    async def stop(self) -> None:
        self.status.close()
        await self.channel.close(None)
        await self.server.stop(0)
        await self.receiver.close()
        await self.sender.close()
        await self.book.close()
        await self.tokenizers.close()
        await self.runtime.stop()

    async def prepare(self, tokens: Sequence[int], end: int | None = None, **fields: Any) -> common_pb2.Ticket:
        request = kv_pb2.PrepRecvRequest(token_ids=tokens, end=len(tokens) - 1 if end is None else end, **fields)
        return (await self.kv.PrepRecv(request, timeout=10)).ticket

    def send(
        self, tokens: Sequence[int], ticket: common_pb2.Ticket, begin: int | None = None, end: int | None = None,
        timeout: float = 20, **fields: Any,
    ) -> Any:  # fmt: skip
        """A RemoteSend call: all that the ticket has room for."""
        first, last = ticket.matched if begin is None else begin, ticket.end if end is None else end
        request = kv_pb2.RemoteSendRequest(token_ids=tokens, begin=first, end=last, ticket=ticket, **fields)
        return self.kv.RemoteSend(request, timeout=timeout)

    async def release(self, ticket: common_pb2.Ticket) -> bool:
        return (await self.kv.Release(kv_pb2.ReleaseRequest(ticket=ticket), timeout=10)).released

    def call(
        self,
        tokens: Sequence[int],
        max_new: int = 4,
        ticket: common_pb2.Ticket | None = None,
        begin: int = 0,
        timeout: float = 20,
        sampling: common_pb2.SamplingParams | None = None,
        **fields: Any,
    ) -> Any:
        params = common_pb2.SamplingParams(max_new_tokens=max_new)
        params.MergeFrom(sampling or common_pb2.SamplingParams())
        request = engine_pb2.StartGenerateRequest(
            token_ids=tokens, begin=begin, ticket=ticket, sampling=params, **fields
        )
        return self.engine.StartGenerate(request, timeout=timeout)

    async def generate(self, tokens: Sequence[int], max_new: int = 4, **fields: Any) -> Answer:
        return await collect(self.call(tokens, max_new, **fields))

    async def settled(self) -> None:
        """Waits until nothing is held, sent or generated, then checks that no slot is lost."""
        async with asyncio.timeout(15):
            while self.book.count or self.book.quarantined or self.runtime.reservations or not self.runtime.idle:
                await asyncio.sleep(0.005)
        self.runtime.check_all_free()


@dataclass
class Answer:
    tokens: list[int]
    logprobs: list[float]
    finished: engine_pb2.GenerateFinished


async def collect(call: Any) -> Answer:
    """A whole StartGenerate."""
    tokens: list[int] = []
    logprobs: list[float] = []
    finished = None
    async for message in call:
        assert finished is None, "a message behind the last"
        if message.WhichOneof("event") == "chunk":
            tokens += message.chunk.token_ids
            logprobs += message.chunk.logprobs
        else:
            finished = message.finished
    assert finished is not None
    return Answer(tokens, logprobs, finished)


async def refused(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    """The status that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(10):
            await call
    return caught.value.code(), caught.value.details() or ""


async def until(predicate: Callable[[], bool], timeout: float = 15.0) -> None:
    """Waits for what no event tells of."""
    async with asyncio.timeout(timeout):
        while not predicate():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def two(
    a: FakeRuntime | None = None, b: FakeRuntime | None = None, hosts: tuple[str, str] = (HOST, HOST)
) -> AsyncIterator[tuple[EngineNode, EngineNode]]:
    """A sender and a receiver that share what is known of writes; at the end, no slot may be lost."""
    writes = Writes()
    nodes = [EngineNode("p", a, host=hosts[0]), EngineNode("d", b, host=hosts[1])]
    for node in nodes:
        node.runtime.writes = writes
        await node.start()
    try:
        yield nodes[0], nodes[1]
        for node in nodes:
            await node.settled()
    finally:
        for node in nodes:
            await node.stop()


class Wire:
    """A TCP proxy to `address`, which can be cut and mended."""

    def __init__(self, address: str) -> None:
        self._target = split_address(address)
        self._ends: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._whole = True

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error: Any) -> None:
        self.cut()
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Every connection breaks; new ones do too."""
        self._whole = False
        for end in self._ends:
            end.transport.abort()
        self._ends.clear()

    def mend(self) -> None:
        self._whole = True

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._whole:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        self._ends |= {writer, far_writer}
        for source, target in ((reader, far_writer), (far_reader, writer)):
            self._tasks.add(asyncio.create_task(self._pump(source, target)))

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        except OSError:
            pass
        finally:
            target.close()


async def _main(settings: dict[str, Any]) -> None:
    """Serves an engine until SIGTERM; `gates` are closed, each one reached is told, and SIGUSR1 opens those."""
    node = EngineNode(settings["name"], FakeRuntime(chunk=settings.get("chunk", 32)))
    await node.start()
    gates = {name: node.runtime.gate(name, free) for name, free in settings.get("gates", {}).items()}
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, over.set)
    loop.add_signal_handler(signal.SIGUSR1, lambda: [g.open() for g in gates.values() if g.stopped])
    print(node.server.address, flush=True)

    async def tell(name: str) -> None:
        await gates[name].reached(60)
        print(name, flush=True)

    tasks = [asyncio.create_task(tell(name)) for name in gates]
    await over.wait()
    for task in tasks:
        task.cancel()
    await node.stop()


@asynccontextmanager
async def process(**settings: Any) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """(process, address) of an engine that is a process of its own."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, __file__, json.dumps({"name": "far", **settings}), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        async with asyncio.timeout(30):
            address = (await child.stdout.readline()).decode().strip()
        assert address, "the process did not start"
        yield child, address
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


if __name__ == "__main__":
    asyncio.run(_main(json.loads(sys.argv[1])))
