"""A mesh with mutual TLS and API keys: registry, two simulated engines, a KV store and a router, on real ports."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc
from google.protobuf import descriptor_pool, message_factory
from sim_harness import fast

from kvmesh import apikeys
from kvmesh.certs import Authority
from kvmesh.client import AsyncClient, authorization
from kvmesh.grpcx import channel
from kvmesh.tls import Tls
from services.engine.cli import EngineConfig
from services.engine.main import start as start_engine
from services.engine.sim.runtime import SimRuntime
from services.kvstore.cli import KvStoreConfig
from services.kvstore.main import start as start_store
from services.registry.cli import RegistryConfig
from services.registry.memory import MemoryBackend
from services.registry.server import serving
from services.router.cli import RouterConfig
from services.router.main import start as start_router

# By server: what it serves.
SERVICES = {
    "registry": ["Registry"],
    "engine": ["KvEndpoint", "KvPeer", "Engine"],
    "kvstore": ["KvEndpoint", "KvPeer", "KvStore"],
    "router": ["Router", "Operator"],
}


def methods(service: str) -> Iterator[Any]:
    """Descriptors of the calls of `kvmesh.v1.SERVICE`."""
    yield from descriptor_pool.Default().FindServiceByName(f"kvmesh.v1.{service}").methods


def make_certificates(folder: Path) -> None:
    """ca, service and client; and `other`, a service's of another CA."""
    folder.mkdir(mode=0o700)
    authority = Authority.make()
    authority.keep(folder)
    authority.issue(folder, "service", "service")
    authority.issue(folder, "client", "client")
    (folder / "foreign").mkdir()
    foreign = Authority.make()
    foreign.keep(folder / "foreign")
    foreign.issue(folder / "foreign", "service", "service")


class SecureMesh:
    """`async with SecureMesh(tmp) as mesh`; `certs` has what make_certificates makes, `keys` API keys by scope."""

    def __init__(self, tmp: Path, **router: Any) -> None:
        self.tmp = tmp
        self.certs = tmp / "certs"
        make_certificates(self.certs)
        self.key_file = tmp / "keys.toml"
        self.keys = {scope: apikeys.add(self.key_file, scope, [scope]) for scope in apikeys.SCOPES}
        self.addresses: dict[str, str] = {}
        self.runtimes: list[SimRuntime] = []
        self._router = router
        self._stack = AsyncExitStack()

    def tls(self, name: str = "client") -> Tls:
        """What the holder of that certificate shows; "": nothing; "foreign": a certificate of another CA."""
        ca = str(self.certs / "ca.pem")
        if not name:
            return Tls.read(ca)
        folder, name = (self.certs / "foreign", "service") if name == "foreign" else (self.certs, name)
        return Tls.read(ca, str(folder / f"{name}.pem"), str(folder / f"{name}.key"))

    def client(self, scope: str = "admin") -> AsyncClient:
        """A client of the router."""
        return AsyncClient(self.addresses["router"], tls=self.tls(), api_key=self.keys[scope])

    async def __aenter__(self) -> SecureMesh:
        try:
            async with asyncio.timeout(60):
                await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        self._stack.enter_context(patch("kvmesh.tokenizer._library", lambda: None))
        own = {f"tls_{k}": str(self.certs / f) for k, f in (("ca", "ca.pem"), ("cert", "service.pem"))}
        own |= {"tls_key": str(self.certs / "service.key"), "trace_dir": str(self.tmp / "traces")}
        config = RegistryConfig(embedded=True, **own)
        registry = await self._stack.enter_async_context(serving(MemoryBackend(), "127.0.0.1:0", config.access()))
        await registry.ready()
        self.addresses["registry"] = registry.address
        profile = self.tmp / "fast.toml"
        profile.write_text(fast().dump())
        own["registry"] = registry.address
        for name in ("engine", "engine-1"):
            said = self.tmp / name
            engine = EngineConfig(sim=str(profile), name=name, announce=str(said), metrics="127.0.0.1:0", **own)
            runtime = await start_engine(engine, self._stack)
            assert isinstance(runtime, SimRuntime)
            self.runtimes.append(runtime)
            self.addresses[name] = said.read_text().strip()
        store = await start_store(KvStoreConfig(sim=str(profile), name="kvstore", memory="4MiB", **own), self._stack)
        self.addresses["kvstore"] = store.address
        said = self.tmp / "router"
        router = RouterConfig(
            listen="127.0.0.1:0",
            http="127.0.0.1:0",
            announce=str(said),
            metrics="127.0.0.1:0",
            wait_engines=2,
            api_keys=str(self.key_file),
            **own,
            **self._router,
        )
        self.addresses["router"] = (await start_router(router, self._stack)).address
        self.addresses["http"] = (self.tmp / "router.http").read_text().strip()
        self.addresses["metrics"] = (self.tmp / "engine.metrics").read_text().strip()

    async def refusal(self, server: str, method: Any, tls: Tls | None, key: str = "") -> tuple[grpc.StatusCode, str]:
        """Calls a method with an empty message: (status, details)."""
        async with channel(self.addresses[server], tls) as ch:
            return await refusal(ch, method, authorization(key))


async def refusal(ch: Any, method: Any, metadata: Any = None, request: Any = None) -> tuple[grpc.StatusCode, str]:
    """The status that a call of `method` ends with."""
    kind = "stream" if method.client_streaming else "unary", "stream" if method.server_streaming else "unary"
    make = getattr(ch, "_".join(kind))
    answer = message_factory.GetMessageClass(method.output_type)
    path = f"/{method.containing_service.full_name}/{method.name}"
    call = make(path, request_serializer=lambda m: m.SerializeToString(), response_deserializer=answer.FromString)
    message = request if request is not None else message_factory.GetMessageClass(method.input_type)()
    given = iter([message]) if method.client_streaming else message
    made = call(given, timeout=5, metadata=metadata)
    try:
        if not method.server_streaming:
            await made
        elif isinstance(await made.read(), answer):
            # It was let in, and goes on.
            made.cancel()
            return grpc.StatusCode.OK, ""
        return await made.code(), await made.details()
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
