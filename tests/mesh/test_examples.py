"""The strategies of examples/, and those that weigh, on a real mesh: they give the tokens of the reference."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hf_reference import Comparison
from mesh_process import RunningMesh, running
from prompts import prompt

from kvmesh.client import AsyncClient

EXAMPLES = Path(__file__).parents[2] / "examples" / "strategies"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
WEIGHING = ["adaptive", "context_migration"]
LENGTHS = (1, 17, 200, 700)
NEW = 12


@pytest.fixture(scope="module")
def own(mesh_home: Path, model: Path) -> Iterator[RunningMesh]:
    """Two engines, and a router with the folder of examples."""
    arguments = ["--engines", "2", "--kv-tokens", "12288", "--strategy-dir", str(EXAMPLES)]
    yield from running(RunningMesh(mesh_home, "examples", model, arguments))


@pytest.fixture
async def client(own: RunningMesh) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(own.address("router")) as connected:
        yield connected


async def answers(client: AsyncClient, name: str, token_ids: list[int], session: str = "") -> list[int]:
    call = client.generate(
        token_ids, strategy=name, session=session, max_new_tokens=NEW, temperature=0, timeout=60, ignore_eos=True
    )
    result = await call.wait()
    assert result.strategy == name and result.attempts == 1
    return result.token_ids


async def at_rest(client: AsyncClient) -> None:
    """Waits until no engine runs, sends, or holds anything."""
    async with asyncio.timeout(20):
        while True:
            loads = [engine.load for engine in (await client.mesh()).engines]
            busy = [(x.running_requests, x.sending, x.tickets, x.reserved_slots, x.quarantined_slots) for x in loads]
            if not any(map(any, busy)):
                return
            await asyncio.sleep(0.1)


async def test_all_of_them_are_loaded_without_a_complaint(client: AsyncClient) -> None:
    infos = {info.name: info for info in await client.strategies()}
    assert {name: infos[name].error for name in NAMES} == dict.fromkeys(NAMES, "")
    assert {name: infos[name].file for name in NAMES} == {name: f"{name}.py" for name in NAMES}


@pytest.mark.parametrize("name", [*NAMES, *WEIGHING])
async def test_the_answers_are_the_reference_s(client: AsyncClient, comparison: Comparison, name: str) -> None:
    prompts = [prompt(length, name) for length in LENGTHS]
    for state in ("cold", "warm"):
        for token_ids in prompts:
            found = await answers(client, name, token_ids, session=f"{name} {len(token_ids)}")
            comparison.check(name, state, token_ids, found, NEW)
    at_once = [prompt(length, name, i) for i, length in enumerate(2 * LENGTHS)]
    for token_ids, found in zip(
        at_once, await asyncio.gather(*(answers(client, name, p) for p in at_once)), strict=True
    ):
        comparison.check(name, "8 at once", token_ids, found, NEW)
    await at_rest(client)


async def test_a_policy_that_knows_the_caches_goes_where_the_prefix_is(client: AsyncClient) -> None:
    async def engine(token_ids: list[int], policy: str) -> str:
        params = {"policy": policy}
        call = client.generate(
            token_ids, strategy="data_parallel", strategy_params=params, max_new_tokens=1, temperature=0, timeout=60
        )
        (share,) = (await call.wait()).shares
        return share.engine

    # The first that asks makes the router listen.
    await engine(prompt(10, "listen"), "kv_aware")
    homes = {}
    for i in range(4):
        token_ids = prompt(600, "kv-aware", i)
        homes[i] = await engine(token_ids, "round_robin")
    assert set(homes.values()) == {"engine-0", "engine-1"}
    await at_rest(client)
    async with asyncio.timeout(30):
        while {i: await engine(prompt(600, "kv-aware", i), "kv_aware") for i in homes} != homes:
            await asyncio.sleep(0.2)
