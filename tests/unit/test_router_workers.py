"""A router of several processes on one port."""

from __future__ import annotations

import asyncio
import os
import signal
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
import pytest
from sim_harness import reference
from sim_processes import SimProcesses

from kvmesh.errors import InvalidArgument
from kvmesh.v1 import common_pb2, router_pb2, router_pb2_grpc
from services.router.cli import RouterConfig
from services.router.tally import Tally
from services.router.workers import held

CLIENTS, LONG = 16, 400
PROMPT = list(range(1, 80))


class Door:
    """Two workers, and connections to them, each its own."""

    def __init__(self, mesh: SimProcesses, address: str, stubs: list[Any]) -> None:
        self.mesh, self.address, self.stubs = mesh, address, stubs

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.mesh.processes["door"].pid)

    async def names(self) -> list[str]:
        """Who answers each connection."""
        replies = await asyncio.gather(*(s.GetMesh(router_pb2.GetMeshRequest(), timeout=5) for s in self.stubs))
        return [reply.router.name for reply in replies]

    async def ask(self, stub: Any, count: int, **fields: Any) -> list[int]:
        sampling = common_pb2.SamplingParams(max_new_tokens=count, temperature=0, ignore_eos=True)
        request = router_pb2.GenerateRequest(tokens=router_pb2.TokenIds(ids=PROMPT), sampling=sampling, **fields)
        return [t async for m in stub.Generate(request, timeout=30) for t in m.delta.token_ids]

    async def running(self, count: int) -> None:
        """Waits until every worker tells of so many requests."""
        async with asyncio.timeout(10):
            while True:
                asked = (s.GetMesh(router_pb2.GetMeshRequest(), timeout=5) for s in self.stubs)
                if {reply.running_requests for reply in await asyncio.gather(*asked)} == {count}:
                    return
                await asyncio.sleep(0.02)


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    async with SimProcesses(2, tmp=tmp_path) as mesh, AsyncExitStack() as stack:
        settings = {"workers": 2, "http": "127.0.0.1:0", "metrics": "127.0.0.1:0", "wait_engines": 2}
        address = await mesh.start_router_process("door", **settings)
        stubs = []
        for _ in range(CLIENTS):
            ch = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
            stack.push_async_callback(ch.close, None)
            stubs.append(router_pb2_grpc.RouterStub(ch))
        yield Door(mesh, address, stubs)


@pytest.mark.timeout(120)
async def test_two_workers_are_one_router(door: Door, tmp_path: Path) -> None:
    names = await door.names()
    assert set(names) == {"door-0", "door-1"}
    tokens = await asyncio.gather(*(door.ask(stub, 8) for stub in door.stubs))
    assert tokens == [reference(PROMPT, 8)] * CLIENTS

    # A change reaches both.
    reply = await door.stubs[0].SetStrategy(router_pb2.SetStrategyRequest(name="prefill_decode"), timeout=10)
    async with asyncio.timeout(10):
        for stub in door.stubs:
            while (await stub.GetStrategy(router_pb2.GetStrategyRequest(), timeout=5)).strategy != reply.strategy:
                await asyncio.sleep(0.02)

    # Each tells the numbers of both.
    running = [asyncio.create_task(door.ask(stub, LONG)) for stub in door.stubs[:6]]
    await door.running(6)
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    await door.running(0)

    http = (tmp_path / "door.address.http").read_text().strip()
    with await asyncio.to_thread(urllib.request.urlopen, f"http://{http}/health", None, 5) as answer:
        assert answer.status == 200
    pages = []
    for number in (0, 1):
        page = (tmp_path / f"door.address.{number}.metrics").read_text().strip()
        with await asyncio.to_thread(urllib.request.urlopen, f"http://{page}/metrics", None, 5) as answer:
            pages.append(answer.read().decode())
    counted = [line for page in pages for line in page.splitlines() if line.startswith("kvmesh_router_requests_total{")]
    assert sum(float(line.split()[-1]) for line in counted) == CLIENTS + 6


@pytest.mark.timeout(120)
async def test_a_worker_that_dies_is_replaced(door: Door) -> None:
    names = await door.names()
    workers = door.process.children()
    assert len(workers) == 2
    victim = workers[0]
    running = [asyncio.create_task(door.ask(stub, LONG)) for stub in door.stubs]
    await door.running(CLIENTS)
    os.kill(victim.pid, signal.SIGKILL)
    ended = await asyncio.gather(*running, return_exceptions=True)
    lost = {names[i] for i, tokens in enumerate(ended) if isinstance(tokens, grpc.aio.AioRpcError)}
    assert len(lost) == 1
    for name, tokens in zip(names, ended, strict=True):
        if name not in lost:
            assert tokens == reference(PROMPT, LONG)
        else:
            assert isinstance(tokens, grpc.aio.AioRpcError) and tokens.code() is grpc.StatusCode.UNAVAILABLE
    async with asyncio.timeout(30):
        while len(now := door.process.children()) < 2 or victim.pid in [w.pid for w in now]:
            await asyncio.sleep(0.05)
    # What the dead one ran is not counted any more.
    await door.running(0)
    assert await asyncio.gather(*(door.ask(stub, 8) for stub in door.stubs)) == [reference(PROMPT, 8)] * CLIENTS
    await door.mesh.at_rest(door.mesh.names, 30)


async def test_they_end_with_their_parent(door: Door) -> None:
    workers = door.process.children()
    door.process.terminate()
    process = door.mesh.processes.pop("door")
    await asyncio.to_thread(process.join, 40)
    assert process.exitcode == 0
    gone, alive = await asyncio.to_thread(psutil.wait_procs, workers, 20)
    assert len(gone) == 2 and alive == []


async def test_a_port_that_is_taken_or_a_worker_that_cannot_start(tmp_path: Path) -> None:
    async with SimProcesses(1, tmp=tmp_path) as mesh:
        with pytest.raises(AssertionError, match="is not a folder"):
            await mesh.start_router_process("bad", workers=2, strategy_dir=str(tmp_path / "none"))
        with pytest.raises(AssertionError, match="cannot listen on"):
            await mesh.start_router_process("taken", workers=2, listen=mesh.address("s0"))


def test_the_port_is_held_and_the_tally_is_shared() -> None:
    with held("127.0.0.1:0") as address, held(address) as again:
        assert address == again
    fd = Tally.create(3)
    try:
        lines = [Tally(fd, 3, i) for i in range(3)]
        for i, line in enumerate(lines):
            line.put(i + 1, 10 * i)
        assert {line.sums for line in lines} == {(6, 30)}
        lines[0].clear(2)
        assert lines[1].sums == (3, 10)
        for line in lines:
            line.close()
    finally:
        os.close(fd)


@pytest.mark.parametrize("workers", [0, 257])
def test_how_many(workers: int) -> None:
    with pytest.raises(InvalidArgument, match=f"workers = {workers}"):
        RouterConfig(workers=workers)
