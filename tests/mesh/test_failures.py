"""What dies is done without: engines, etcd, the registry. The mesh of these tests is theirs alone."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import grpc.aio
import pytest
from direct import DirectEngine, spare
from hf_reference import Comparison
from kill_campaign import STRATEGY_DIR, Plan, Tally, Waiting, one_kill
from kill_field import MeshField
from mesh_process import RunningMesh, running
from prompts import prompt

from kvmesh.client import AsyncClient, Result
from kvmesh.errors import Unavailable

# Several chunks of prefill: long enough to be met in the middle of it.
LONG = 3900
# Of a request, and by when it must have ended with an error at the latest.
DEADLINE_S, LATE_S = 30, 40


@pytest.fixture(scope="module")
def doomed(mesh_home: Path, model: Path) -> Iterator[RunningMesh]:
    """Three engines to begin with, without tracing."""
    arguments = ["--engines", "3", "--kv-tokens", "12288", "--trace-ratio", "0", "--strategy-dir", str(STRATEGY_DIR)]
    yield from running(RunningMesh(mesh_home, "doomed", model, arguments))


@pytest.fixture
def two(doomed: RunningMesh) -> list[str]:
    """Names of two engines or more that run; dead ones are started anew for it."""
    for name in ("engine-0", "engine-1"):
        if len(doomed.engines) < 2 and not doomed.alive(name):
            doomed.start_beside(name)
    return doomed.engines


@pytest.fixture
async def client(doomed: RunningMesh) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(doomed.address("router")) as connected:
        yield connected


async def seen(client: AsyncClient, names: list[str]) -> None:
    """Waits until just these engines are up, as the router sees it."""
    async with asyncio.timeout(60):
        while [e.member.endpoint.name for e in (await client.mesh()).engines if e.connected] != names:
            await asyncio.sleep(0.05)


@pytest.fixture
async def pair(doomed: RunningMesh, two: list[str], client: AsyncClient) -> AsyncIterator[list[DirectEngine]]:
    """The engines that prefill and that decode."""
    await seen(client, two)
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(DirectEngine(name, doomed.address(name))) for name in (two[0], two[-1])]


async def ask(client: AsyncClient, token_ids: list[int], count: int, **fields: object) -> Result:
    answer = client.generate(
        token_ids, temperature=0, ignore_eos=True, max_new_tokens=count, timeout=DEADLINE_S, **fields
    )
    return await answer.wait()


@pytest.mark.parametrize("stage", ["prep_recv", "first_token"])
async def test_an_engine_is_killed_at_a_stage(
    doomed: RunningMesh,
    two: list[str],
    client: AsyncClient,
    comparison: Comparison,
    tmp_path: Path,
    note: Callable[[str], None],
    stage: str,
) -> None:
    """The campaign of test_kills.py has all stages, and many seeds."""
    await seen(client, two)
    field, tally = MeshField(doomed, client, comparison, tmp_path), Tally()
    await one_kill(field, Plan.of(stage, 0, field), tally, Waiting(field))
    note(tally.line())


async def test_the_prefill_engine_is_killed(
    doomed: RunningMesh, client: AsyncClient, pair: list[DirectEngine], comparison: Comparison
) -> None:
    prefill = pair[0]
    comparison.reference.tokens(long := prompt(LONG, "prefill"), 8)
    # In the middle of a send; and with the next request right behind.
    caught = asyncio.create_task(ask(client, long, 8, strategy="prefill_decode"))
    await prefill.until(lambda load: load.sending == 1 and load.running_requests == 1)
    doomed.kill(prefill.name)
    token_ids = prompt(300, "after")
    words = ["generate", "--router", doomed.address("router"), "--strategy", "prefill_decode", "--json"]
    words += ["--tokens", ",".join(map(str, token_ids)), "--max-new-tokens", "8", "--temperature", "0"]
    words += ["--ignore-eos", "--timeout", str(DEADLINE_S)]
    begun = time.monotonic()
    behind, (code, out, errors) = await asyncio.gather(
        ask(client, prompt(301, "behind"), 8, strategy="prefill_decode"), doomed.run(*words, timeout=LATE_S)
    )
    assert time.monotonic() - begun < LATE_S
    # An answer by another way.
    assert code == 0, errors
    comparison.check("killed", "prefill engine, command", token_ids, json.loads(out)["token_ids"], 8)
    comparison.check("killed", "prefill engine, request behind", prompt(301, "behind"), behind.token_ids, 8)
    during = await caught
    comparison.check("killed", "prefill engine, during the send", long, during.token_ids, 8)
    assert sum(share.sent_bytes for share in during.shares) == 0
    for name in doomed.engines:
        async with DirectEngine(name, doomed.address(name)) as engine:
            assert spare(await engine.at_rest(40)) == engine.info.total_slots


async def test_the_decode_engine_is_killed_while_it_streams_and_comes_back(
    doomed: RunningMesh, client: AsyncClient, pair: list[DirectEngine], comparison: Comparison
) -> None:
    decode = pair[1]
    former = await decode.prepare(prompt(50, "former"))
    token_ids = prompt(300, "stream")
    comparison.reference.tokens(token_ids, 300)
    answer = client.generate(
        token_ids, strategy="prefill_decode", temperature=0, ignore_eos=True, max_new_tokens=300, timeout=DEADLINE_S
    )
    tokens: list[int] = []
    async for delta in answer:
        if len(tokens) < 20 <= len(tokens) + len(delta.token_ids):
            # The process that computes: the one that serves it notices, and ends.
            await asyncio.to_thread(doomed.kill, decode.name, "sglang::scheduler")
        tokens += delta.token_ids
    # Not one token is lost or told twice.
    assert tokens == answer.result.token_ids
    comparison.check("killed", "decode engine, streaming", token_ids, tokens, 300)
    assert answer.result.attempts == 2
    decoded = {share.engine: share.decoded_tokens for share in answer.result.shares}
    assert decoded[decode.name] >= 20 and sum(decoded.values()) == 300

    doomed.start_beside(decode.name)
    await seen(client, doomed.engines)
    async with DirectEngine(decode.name, doomed.address(decode.name)) as back:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await back.generate(prompt(50, "former"), former, begin=0)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert former.receiver.incarnation[:8] in (caught.value.details() or "")
    result = await ask(client, prompt(400, "back"), 8, strategy="prefill_decode")
    comparison.check("killed", "engine that is back", prompt(400, "back"), result.token_ids, 8)
    assert {share.engine for share in result.shares} >= {decode.name}
    assert sum(share.sent_bytes for share in result.shares) > 0


async def test_the_receiver_is_killed_during_a_send(
    doomed: RunningMesh, client: AsyncClient, pair: list[DirectEngine], comparison: Comparison
) -> None:
    sender, receiver = pair
    direct, routed = prompt(LONG, "direct"), prompt(LONG - 1, "routed")
    comparison.reference.tokens(routed, 8)
    ticket = await receiver.prepare(direct)
    send = asyncio.ensure_future(sender.send(direct, ticket))
    # Its receiver dies between PrepRecv and StartGenerate.
    caught = asyncio.create_task(ask(client, routed, 8, strategy="prefill_decode"))
    await sender.until(lambda load: load.sending == 2)
    await asyncio.to_thread(doomed.kill, receiver.name)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await send
    assert failed.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED)
    assert receiver.name in (failed.value.details() or "")
    result = await caught
    comparison.check("killed", "receiver, during the send", routed, result.token_ids, 8)
    assert result.attempts == 2
    assert spare(await sender.at_rest(40)) == sender.info.total_slots
    alone = await ask(client, prompt(200, "alone"), 8, strategy="balanced_prefill_decode")
    comparison.check("killed", "mesh of one engine", prompt(200, "alone"), alone.token_ids, 8)


async def test_etcd_and_registry_are_killed(doomed: RunningMesh, client: AsyncClient, comparison: Comparison) -> None:
    await seen(client, doomed.engines)
    before = await client.set_strategy("prefill_decode", {"min_remote": 2})
    for what in ("etcd", "registry"):
        doomed.kill(what)
        begun = time.monotonic()
        with pytest.raises(Unavailable):
            await client.set_strategy("data_parallel")
        assert time.monotonic() - begun < LATE_S
        for i in range(6):
            token_ids = prompt(150 + i, what)
            result = await ask(client, token_ids, 8)
            comparison.check("killed", what, token_ids, result.token_ids, 8)
            assert (result.strategy, result.strategy_revision) == (before.name, before.revision)
    async with asyncio.timeout(20):
        while (await client.mesh()).registry_connected:
            await asyncio.sleep(0.05)
    # Longer than a lease lasts.
    await asyncio.sleep(6)
    result = await ask(client, prompt(160, "later"), 8)
    comparison.check("killed", "registry, later", prompt(160, "later"), result.token_ids, 8)
    assert (await client.strategy()).name == before.name


async def test_all_engines_are_killed(doomed: RunningMesh, client: AsyncClient) -> None:
    for name in doomed.engines:
        doomed.kill(name)
    words = ["generate", "hello", "--router", doomed.address("router"), "--strategy", "prefill_decode"]
    begun = time.monotonic()
    code, out, errors = await doomed.run(*words, "--timeout", str(DEADLINE_S), timeout=LATE_S)
    assert time.monotonic() - begun < LATE_S
    assert code == 1 and not out.strip()
    assert "Error" in errors and "Traceback" not in errors
    with pytest.raises(Unavailable):
        await ask(client, prompt(20, "nobody"), 4)
