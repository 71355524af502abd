"""Simulated engines that are processes, to be killed and stopped, on a real registry and router in this process."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

from router_harness import Harness

from kvmesh.grpcx import channel, wait_serving
from kvmesh.v1 import engine_pb2, engine_pb2_grpc, router_pb2
from services.engine.cli import EngineConfig
from services.kvstore.cli import KvStoreConfig
from services.registry.cli import RegistryConfig
from services.router.cli import RouterConfig

PR_SET_PDEATHSIG = 1
START_S = 60.0
# A server that has loaded everything, and forks: an engine is there in a moment.
FORKS = multiprocessing.get_context("forkserver")


def run_service(kind: str, fields: dict[str, Any], log: str) -> None:
    """A process of the mesh."""
    from kvmesh.aio import run, setup_logging

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(out, number)
    setup_logging(fields.get("name", kind))
    # Simulated models have no tokenizer; importing the library takes seconds.
    with patch("kvmesh.tokenizer._library", lambda: None):
        run(_serve(kind, fields))


def _serve(kind: str, fields: dict[str, Any]) -> Coroutine[Any, Any, None]:
    if kind == "engine":
        from services.engine.main import serve as engine

        return engine(EngineConfig(**fields))
    if kind == "kvstore":
        from services.kvstore.main import serve as kvstore

        return kvstore(KvStoreConfig(**fields))
    if kind == "routers":
        from services.router.workers import serve as routers

        return routers(RouterConfig(**fields))
    if kind == "router":
        from services.router.main import serve as router

        return router(RouterConfig(**fields))
    from services.registry.cli import serve as registry

    return registry(RegistryConfig(**fields))


class SimProcesses(Harness):
    """Engines s0, s1 …, each a process; a router in this one, and a registry: in this one too, or a process."""

    def __init__(self, engines: int, *, tmp: Path, registry: dict[str, Any] | None = None, **config: Any) -> None:
        super().__init__(0, tmp=tmp)
        self.tmp = tmp
        self.names = [f"s{i}" for i in range(engines)]
        self.config: dict[str, Any] = {"sim": "tiny-cpu", **config}
        self.processes: dict[str, Any] = {}
        self.router_settings: dict[str, Any] = {"trace_ratio": 0.0}
        # Settings of a registry that is a process.
        self._registry_config = registry

    async def _start(self) -> None:
        modules = ("engine.main", "engine.sim.launch", "kvstore.main", "kvstore.sim", "router.main", "registry.etcd")
        FORKS.set_forkserver_preload([f"services.{module}" for module in modules])
        self._stack.enter_context(patch("kvmesh.tokenizer._library", lambda: None))
        self._stack.push_async_callback(self._stop_processes)
        if self._registry_config is None:
            await self.start_registry("127.0.0.1:0")
            self._stack.push_async_callback(self.stop_registry)
            self.registry_address = self.registry.address
        else:
            await self.start_registry_process("127.0.0.1:0")
        await asyncio.gather(*(self.start_engine(name) for name in self.names))
        self.router = await self.start_router(
            **{"registry": self.registry_address, "wait_engines": len(self.names), **self.router_settings}
        )

    async def start_registry_process(self, listen: str) -> None:
        """A registry that is a process, called registry."""
        fields = {"listen": listen, **(self._registry_config or {})}
        self.registry_address = await self.spawn("registry", "registry", asdict(RegistryConfig(**fields)))

    async def start_engine(self, name: str) -> None:
        """Starts it; returns when it has announced."""
        fields = {"name": name, "registry": self.registry_address, "trace_ratio": 0.0, **self.config}
        await self.spawn("engine", name, asdict(EngineConfig(**fields)))

    async def start_store(self, name: str, **settings: Any) -> None:
        """Starts a KV store for the engines; returns when the router has it up."""
        fields = {"name": name, "registry": self.registry_address, "trace_ratio": 0.0, "sim": self.config["sim"]}
        await self.spawn("kvstore", name, asdict(KvStoreConfig(**{**fields, **settings})))
        async with asyncio.timeout(START_S):
            while not (store := (await self.stores()).get(name)) or store.member.endpoint.address != self.address(name):
                await asyncio.sleep(0.02)

    async def stores(self) -> dict[str, router_pb2.MeshStore]:
        """Those that the router has up."""
        mesh = await self.router.GetMesh(router_pb2.GetMeshRequest(), timeout=5)
        return {store.member.endpoint.name: store for store in mesh.stores if store.connected}

    async def start_router_process(self, name: str, **settings: Any) -> str:
        """A router that is a process; its address, once it is ready."""
        fields = {"name": name, "registry": self.registry_address, "listen": "127.0.0.1:0", "trace_ratio": 0.0}
        config = RouterConfig(**{**fields, **settings})
        address = await self.spawn("routers" if config.workers > 1 else "router", name, asdict(config))
        await wait_serving(address, START_S)
        return address

    async def spawn(self, kind: str, name: str, fields: dict[str, Any]) -> str:
        """Starts a process; the address that it announces."""
        announced = self.tmp / f"{name}.address"
        announced.unlink(missing_ok=True)
        fields["announce"] = str(announced)
        process = FORKS.Process(target=run_service, args=(kind, fields, str(self.tmp / f"{name}.log")))
        await asyncio.to_thread(process.start)
        self.processes[name] = process
        async with asyncio.timeout(START_S):
            while not announced.exists():
                assert process.is_alive(), (self.tmp / f"{name}.log").read_text()
                await asyncio.sleep(0.01)
        return announced.read_text().strip()

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self.processes[name].pid, number)

    async def kill(self, name: str) -> None:
        """SIGKILL; returns when it is gone."""
        process = self.processes.pop(name)
        process.kill()
        await asyncio.to_thread(process.join, START_S)
        assert not process.is_alive()

    async def _stop_processes(self) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
            process.terminate()
        for process in self.processes.values():
            await asyncio.to_thread(process.join, START_S)
            if process.is_alive():
                process.kill()

    def address(self, name: str) -> str:
        return (self.tmp / f"{name}.address").read_text().strip()

    async def connected(self, name: str) -> None:
        """Waits until the router has this life of the engine up."""
        async with asyncio.timeout(START_S):
            while True:
                mesh = await self.router.GetMesh(router_pb2.GetMeshRequest(), timeout=5)
                up = {e.member.endpoint.name: e.member.endpoint.address for e in mesh.engines if e.connected}
                if up.get(name) == self.address(name):
                    return
                await asyncio.sleep(0.01)

    async def load(self, name: str) -> tuple[engine_pb2.LoadReport, int]:
        """(load, slots in all) as the engine says now."""
        async with channel(self.address(name)) as ch:
            call = engine_pb2_grpc.EngineStub(ch).WatchStatus(engine_pb2.WatchStatusRequest(), timeout=5)
            total = 0
            async for status in call:
                if status.HasField("info"):
                    total = status.info.total_slots
                if status.HasField("load"):
                    call.cancel()
                    return status.load, total
        raise AssertionError

    async def at_rest(self, names: list[str], timeout: float = 20.0) -> None:
        """Waits until every slot of these engines is free or cached, and nothing runs."""
        for name in names:
            async with asyncio.timeout(timeout):
                while True:
                    load, total = await self.load(name)
                    busy = load.running_requests or load.waiting_requests or load.tickets or load.sending
                    if not busy and load.free_slots + load.cached_slots == total:
                        break
                    await asyncio.sleep(0.02)
