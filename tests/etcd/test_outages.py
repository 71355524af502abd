"""etcd, registry and routers die under a mesh of simulated engines that serves: no request fails for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sim_harness import reference
from sim_processes import SimProcesses

from kvmesh.client import AsyncClient, Result
from kvmesh.errors import Unavailable
from kvmesh.local.etcd import EtcdProcess
from kvmesh.v1 import router_pb2

STRATEGIES = ["data_parallel", "prefill_decode", "balanced_prefill_decode"]
AT_ONCE, NEW = 6, 12
ETCD_AWAY_S = 10.0
PROMPTS = [[(i * 37 + k * 11) % 200 + 1 for i in range(40 + 60 * k)] for k in range(8)]


async def ask(client: AsyncClient, turn: int, strategy: str = "") -> Result:
    prompt = PROMPTS[turn % len(PROMPTS)]
    answer = client.generate(prompt, strategy=strategy, max_new_tokens=NEW, temperature=0, ignore_eos=True, timeout=20)
    result = await answer.wait()
    assert result.token_ids == reference(prompt, NEW)
    return result


@asynccontextmanager
async def load(client: AsyncClient, strategies: list[str]) -> AsyncIterator[list[Result]]:
    """AT_ONCE requests at any time; all that ended are in the list. Raises what one of them raises."""
    results: list[Result] = []

    async def worker(number: int) -> None:
        turn = number
        while True:
            results.append(await ask(client, turn, strategies[turn % len(strategies)]))
            turn += 1

    workers = [asyncio.create_task(worker(i)) for i in range(AT_ONCE)]
    try:
        yield results
        for w in workers:
            assert not w.done() or w.result()
    finally:
        for w in workers:
            w.cancel()
        ended = await asyncio.gather(*workers, return_exceptions=True)
    assert [e for e in ended if not isinstance(e, asyncio.CancelledError)] == []


async def registry_is(h: SimProcesses, connected: bool) -> None:
    async with asyncio.timeout(20):
        while True:
            mesh = await h.router.GetMesh(router_pb2.GetMeshRequest(), timeout=5)
            if mesh.registry_connected is connected and (not connected or len(mesh.engines) == len(h.names)):
                return
            await asyncio.sleep(0.05)


async def test_etcd_is_away_for_ten_seconds(tmp_path: Path, own_etcd: EtcdProcess) -> None:
    async with SimProcesses(3, tmp=tmp_path, registry={"etcd": own_etcd.address}) as h:
        async with AsyncClient(h.servers[0].address) as client:
            before = await client.set_strategy("prefill_decode", {"min_remote": 4})
            async with load(client, ["", *STRATEGIES]) as results:
                await asyncio.sleep(0.5)
                await own_etcd.kill()
                at_kill = len(results)
                with pytest.raises(Unavailable):
                    await client.set_strategy("data_parallel")
                await asyncio.sleep(ETCD_AWAY_S)
                meanwhile = len(results) - at_kill
                await own_etcd.restart()
                async with asyncio.timeout(20):
                    while True:
                        try:
                            after = await client.set_strategy("balanced_prefill_decode")
                            break
                        except Unavailable:
                            await asyncio.sleep(0.2)
                async with asyncio.timeout(30):
                    while not any(r.strategy_revision == after.revision for r in results):
                        await asyncio.sleep(0.05)
            assert meanwhile > 2 * AT_ONCE and after.revision > before.revision
            in_force = {r.strategy for r in results if r.strategy_revision == before.revision}
            assert in_force == {"prefill_decode"}
        await registry_is(h, True)
        await h.at_rest(h.names)


@pytest.mark.parametrize("kind", ["embedded", "etcd"])
async def test_the_registry_is_killed_and_comes_back(tmp_path: Path, etcd: EtcdProcess, prefixes, kind: str) -> None:
    settings = {"embedded": True} if kind == "embedded" else {"etcd": etcd.address, "etcd_prefix": next(prefixes)}
    async with SimProcesses(2, tmp=tmp_path, registry=settings) as h:
        async with AsyncClient(h.servers[0].address) as client, load(client, STRATEGIES) as results:
            await asyncio.sleep(0.3)
            await h.kill("registry")
            await registry_is(h, False)
            count = len(results)
            while len(results) < count + AT_ONCE:
                await asyncio.sleep(0.05)
            await h.start_registry_process(h.registry_address)
            # Nobody had to tell the engines: the registry, which may know nothing any more, has them again.
            late = await h.start_router_process("late", wait_engines=2)
            async with AsyncClient(late) as second:
                engines = (await second.mesh()).engines
                assert [e.member.endpoint.name for e in engines if e.connected] == h.names
                await ask(second, 1)
            await registry_is(h, True)
        await h.at_rest(h.names)


async def test_a_router_that_dies_loses_its_own_streams_and_nothing_else(tmp_path: Path) -> None:
    async with SimProcesses(2, tmp=tmp_path) as h:
        first, second = [await h.start_router_process(f"r{i}", wait_engines=2) for i in range(2)]

        async def long(client: AsyncClient, i: int) -> Result:
            answer = client.generate(
                PROMPTS[i],
                strategy=STRATEGIES[i % 3],
                max_new_tokens=200,
                temperature=0,
                ignore_eos=True,
                timeout=15,
            )
            return await answer.wait()

        async with AsyncClient(first) as a, AsyncClient(second) as b:
            lost = [asyncio.create_task(long(a, i)) for i in range(6)]
            kept = [asyncio.create_task(long(b, i)) for i in range(6)]
            async with asyncio.timeout(20):
                while (await a.mesh()).running_requests < 6 or (await b.mesh()).running_requests < 6:
                    await asyncio.sleep(0.02)
            await asyncio.sleep(0.2)
            await h.kill("r0")
            ended = await asyncio.gather(*lost, return_exceptions=True)
            assert {type(e) for e in ended} == {Unavailable}
            for i, result in enumerate(await asyncio.gather(*kept)):
                assert result.token_ids == reference(PROMPTS[i], 200) and result.attempts == 1
        # What the dead one held at the engines is given back.
        await h.at_rest(h.names, 30)
