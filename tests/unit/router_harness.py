"""A real registry (embedded) and a real router over fake engines, each on a port of 127.0.0.1."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fake_engine import FakeEngine

from kvmesh.grpcx import Server, channel
from kvmesh.v1 import common_pb2, router_pb2, router_pb2_grpc
from kvmesh.v1.registry_pb2_grpc import add_RegistryServicer_to_server
from services.registry.memory import MemoryBackend
from services.registry.service import NAME as REGISTRY
from services.registry.service import RegistryService
from services.router.cli import RouterConfig
from services.router.main import start


@dataclass
class Result:
    """One whole answer."""

    started: router_pb2.GenerateStarted
    done: router_pb2.GenerateDone
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def share(self, engine: str) -> router_pb2.EngineShare:
        return next(s for s in self.done.shares if s.engine == engine)


class Harness:
    """`async with Harness(2, tmp=…) as h`: engines e0, e1 and a router; everything is stopped at the end."""

    def __init__(
        self, engines: int = 2, *, tmp: Path, path: str = "", labels: list[dict[str, str]] | None = None
    ) -> None:
        self.mesh: dict[str, FakeEngine] = {}
        self.engines = [FakeEngine(f"e{i}", self.mesh, (labels or [{}] * engines)[i], path) for i in range(engines)]
        self.traces = tmp / "traces"
        # Of the routers, in order of their start.
        self.servers: list[Server] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Harness:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _start(self) -> None:
        await self.start_registry("127.0.0.1:0")
        self._stack.push_async_callback(self.stop_registry)
        for engine in self.engines:
            await engine.start(self.registry.address)
            self._stack.push_async_callback(engine.stop)
        self.router = await self.start_router()

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    async def start_registry(self, address: str) -> None:
        """A registry that knows nothing yet."""
        self._backend = MemoryBackend()
        await self._backend.start()
        service = RegistryService(self._backend)
        self.registry = Server(address, lambda s: add_RegistryServicer_to_server(service, s), [REGISTRY])
        await self.registry.start()

    async def stop_registry(self) -> None:
        await self._backend.close()
        await self.registry.stop(0)

    async def start_router(self, **settings: Any) -> Any:
        """A stub of one more router on this mesh."""
        settings = {"wait_engines": len(self.engines), "trace_dir": str(self.traces), **settings}
        if "registry" not in settings:
            settings["registry"] = self.registry.address
        config = RouterConfig(listen="127.0.0.1:0", **settings)
        async with asyncio.timeout(60):
            server = await start(config, self._stack)
        self.servers.append(server)
        ch = channel(server.address)
        self._stack.push_async_callback(ch.close, None)
        return router_pb2_grpc.RouterStub(ch)

    def call(
        self,
        prompt: list[int] | str,
        max_new: int = 8,
        *,
        timeout: float | None = 10.0,
        sampling: common_pb2.SamplingParams | None = None,
        **fields: Any,
    ) -> Any:
        params = common_pb2.SamplingParams(max_new_tokens=max_new, temperature=0)
        params.MergeFrom(sampling or common_pb2.SamplingParams())
        request = router_pb2.GenerateRequest(sampling=params, **fields)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.tokens.ids.extend(prompt)
        return self.router.Generate(request, timeout=timeout)

    async def generate(self, prompt: list[int] | str, max_new: int = 8, **fields: Any) -> Result:
        result = Result(router_pb2.GenerateStarted(), router_pb2.GenerateDone())
        kinds = []
        async for message in self.call(prompt, max_new, **fields):
            kind = message.WhichOneof("event")
            kinds.append(kind)
            if kind == "started":
                result.started = message.started
            elif kind == "done":
                result.done = message.done
            else:
                result.tokens += message.delta.token_ids
                result.logprobs += message.delta.logprobs
                result.text += message.delta.text
                result.pieces.append(message.delta.text)
        assert kinds[0] == "started" and kinds[-1] == "done" and set(kinds[1:-1]) <= {"delta"}
        return result

    async def idle(self) -> None:
        """Waits until no engine holds a ticket, sends or generates."""
        for engine in self.engines:
            await engine.until(lambda e=engine: not (e.tickets or e.sending or e.generating))  # type: ignore[misc]
