"""Random and mutated messages on every gRPC method of every service: no crash, no INTERNAL, nothing left behind."""

from __future__ import annotations

import asyncio
import logging
from unittest.mock import patch

import pytest
from fuzz_calls import Fuzzer
from secure_harness import SERVICES, SecureMesh, methods

from kvmesh.errors import MeshError
from kvmesh.grpcx import channel
from kvmesh.v1 import kvstore_pb2, kvstore_pb2_grpc


async def answers(mesh: SecureMesh, name: str) -> None:
    """Waits until a request is served: members that were pushed out come back by themselves."""
    async with mesh.client() as client, asyncio.timeout(20):
        while True:
            try:
                await client.set_strategy(name)
                answer = client.generate([1, 2, 3, 4] * 10, max_new_tokens=3, ignore_eos=True, timeout=5)
                assert len((await answer.wait()).token_ids) == 3
                return
            except MeshError:
                await asyncio.sleep(0.2)


async def held(mesh: SecureMesh) -> dict[str, str]:
    """What is held: nothing, when all is well."""
    found = {}
    for i, runtime in enumerate(mesh.runtimes):
        if (load := runtime.load).free + load.cached != runtime.total_slots or load.sending:
            found[f"engine {i}"] = str(load)
    async with channel(mesh.addresses["kvstore"], mesh.tls("service")) as ch:
        stub = kvstore_pb2_grpc.KvStoreStub(ch)
        stats = (await stub.Stats(kvstore_pb2.StatsRequest(), timeout=2)).stats
        if stats.tickets or stats.locked or stats.sending or stats.waiting or stats.memory_reserved:
            found["kvstore"] = str(stats)
    async with mesh.client() as client:
        seen = await client.mesh()
        if seen.running_requests or seen.waiting_requests:
            found["router"] = f"{seen.running_requests} running, {seen.waiting_requests} waiting"
        tickets = {e.member.endpoint.name: e.load.tickets for e in seen.engines if e.load.tickets}
        if tickets:
            found["tickets"] = str(tickets)
    return found


async def at_rest(mesh: SecureMesh) -> None:
    """Waits until no slot, ticket or request is held any more."""
    until = asyncio.get_running_loop().time() + 20
    while left := await held(mesh):
        assert asyncio.get_running_loop().time() < until, left
        await asyncio.sleep(0.1)


# It has a limit of its own, by --fuzz-seconds.
@pytest.mark.timeout(0)
async def test_random_messages(tmp_path, pytestconfig, caplog, record_property):
    caplog.set_level(logging.WARNING)
    seconds, seed = pytestconfig.getoption("--fuzz-seconds"), pytestconfig.getoption("--fuzz-seed")
    ended: list[int] = []
    with patch("services.engine.main.os.kill", lambda pid, number: ended.append(number)):
        async with asyncio.timeout(seconds + 60), SecureMesh(tmp_path) as mesh, Fuzzer(mesh, seed) as fuzzer:
            await fuzzer.run(seconds * 0.9, leaving=False)
            await fuzzer.tidy()
            assert not fuzzer.bad, "\n".join(fuzzer.bad[:10])
            await answers(mesh, "prefill_decode")
            await at_rest(mesh)
            await fuzzer.run(seconds * 0.1, leaving=True)
            assert not fuzzer.bad, "\n".join(fuzzer.bad[:10])
            await at_rest(mesh)
    failed = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert not failed, [(r.name, r.getMessage(), r.exc_text) for r in failed[:5]]
    every = {m.full_name for services in SERVICES.values() for s in services for m in methods(s)}
    assert {name for name, _ in fuzzer.seen} == every
    # It got through: calls of most kinds succeeded too, or were left while they went on.
    good = {name for name, status in fuzzer.seen if status in ("OK", "left")}
    assert len(good) > 0.7 * len(every), every - good
    calls = sum(fuzzer.seen.values())
    record_property("calls", calls)
    print(f"{calls} calls of {len(every)} methods in {seconds:g} s, seed {seed}")
    for (name, status), count in sorted(fuzzer.seen.items()):
        print(f"  {name} {status} {count}")
