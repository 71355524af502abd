"""Simulated engines behind real services, and what their tokens must be."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from router_harness import Harness

from kvmesh.grpcx import channel
from kvmesh.sim.profile import Profile, load_profile
from kvmesh.v1 import engine_pb2, engine_pb2_grpc, kv_pb2_grpc
from services.engine.cli import EngineConfig
from services.engine.main import start
from services.engine.sim.content import FIRST, Arithmetic, next_token
from services.engine.sim.runtime import SimRuntime

ARITHMETIC = Arithmetic(4096)


def reference(prompt: list[int], count: int, vocab_size: int = 384) -> list[int]:
    """Greedy tokens of a model that prefills everything anew for each."""
    ids = list(prompt)
    for _ in range(count):
        values = ARITHMETIC.prefill(np.array(ids, np.uint32), FIRST)
        ids.append(next_token(ARITHMETIC.digest(values), vocab_size))
    return ids[len(prompt) :]


def fast(**batching: Any) -> Profile:
    """tiny-cpu, a hundred times as fast."""
    text = load_profile("tiny-cpu").replace(**batching).dump()
    return profile_of(text.replace("base = 0.004", "base = 0.0002").replace("latency = 0.0005", "latency = 0.0"))


def slowed(factor: float) -> Profile:
    """tiny-cpu, so many times as slow: what the machine adds to it weighs less."""
    p = load_profile("tiny-cpu")
    times = {
        part: dataclasses.replace(
            getattr(p, part), **{k: factor * v for k, v in dataclasses.asdict(getattr(p, part)).items()}
        )
        for part in ("prefill", "decode")
    }
    return dataclasses.replace(p, **times)


def profile_of(text: str) -> Profile:
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(text)
        file.flush()
        return load_profile(file.name)


class SimHarness(Harness):
    """A real registry and router over simulated engines s0, s1 …, each with all of the engine service."""

    def __init__(
        self, engines: int, *, tmp: Path, profile: Profile | None = None, faults: tuple[str, ...] = ()
    ) -> None:
        super().__init__(0, tmp=tmp)
        self.tmp = tmp
        self.count = engines
        self.profile = tmp / "fast.toml"
        self.profile.write_text((profile or fast()).dump())
        self.faults = faults
        self.runtimes: list[SimRuntime] = []
        self.stubs: list[tuple[Any, Any]] = []
        self.stacks: list[AsyncExitStack] = []

    async def _start(self) -> None:
        # Simulated models have no tokenizer; importing the library takes seconds.
        self._stack.enter_context(patch("kvmesh.tokenizer._library", lambda: None))
        await self.start_registry("127.0.0.1:0")
        self._stack.push_async_callback(self.stop_registry)
        for i in range(self.count):
            stack = AsyncExitStack()
            self._stack.push_async_callback(stack.aclose)
            self.stacks.append(stack)
            address = self.tmp / f"s{i}"
            config = EngineConfig(
                sim=str(self.profile),
                name=f"s{i}",
                registry=self.registry.address,
                announce=str(address),
                trace_ratio=0,
                sim_faults=self.faults[i] if i < len(self.faults) else "",
            )
            runtime = await start(config, stack)
            assert isinstance(runtime, SimRuntime)
            self.runtimes.append(runtime)
            ch = channel(address.read_text().strip())
            self._stack.push_async_callback(ch.close, None)
            self.stubs.append((kv_pb2_grpc.KvEndpointStub(ch), engine_pb2_grpc.EngineStub(ch)))
        self.router = await self.start_router(wait_engines=self.count)

    async def settled(self) -> None:
        """Waits until every slot of every engine is free or cached."""
        async with asyncio.timeout(5):
            for runtime in self.runtimes:
                while (load := runtime.load).free + load.cached != runtime.total_slots or load.sending:
                    await asyncio.sleep(0.01)

    async def status(self, i: int) -> engine_pb2.EngineInfo:
        """What engine i says of itself."""
        call = self.stubs[i][1].WatchStatus(engine_pb2.WatchStatusRequest())
        async for message in call:
            call.cancel()
            return message.info
        raise AssertionError
