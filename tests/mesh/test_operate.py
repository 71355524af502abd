"""`kvmesh migrate` and `kvmesh drain` on real engines, while requests run."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from direct import DirectEngine
from hf_reference import Comparison
from mesh_process import RunningMesh, running
from prompts import prompt

from kvmesh.client import AsyncClient
from kvmesh.v1.engine_pb2 import HottestRequest

NEW = 16


@pytest.fixture(scope="module")
def operated(mesh_home: Path, model: Path) -> Iterator[RunningMesh]:
    """Two engines, of which one will leave, and a store in memory."""
    arguments = ["--engines", "2", "--kv-tokens", "12288", "--stores", "1", "--store-memory", "32MiB"]
    yield from running(RunningMesh(mesh_home, "operate", model, arguments))


@pytest.fixture
async def both(operated: RunningMesh) -> AsyncIterator[list[DirectEngine]]:
    async with (
        DirectEngine("engine-0", operated.address("engine-0")) as one,
        DirectEngine("engine-1", operated.address("engine-1")) as two,
    ):
        yield [one, two]


async def kvmesh(mesh: RunningMesh, *words: str) -> str:
    """What the command prints; fails when it fails."""
    line = mesh.command(*words, "--name", mesh.name)

    def call() -> subprocess.CompletedProcess[str]:
        return subprocess.run(line, env=mesh.environment(), capture_output=True, text=True, timeout=120)

    done = await asyncio.to_thread(call)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


async def test_a_context_moves(operated: RunningMesh, both: list[DirectEngine], comparison: Comparison) -> None:
    one, two = both
    tokens = prompt(700, "migrate")
    before = await one.generate(tokens, max_new_tokens=NEW)
    comparison.check("migrate", "source", tokens, before.token_ids, NEW)
    said = await kvmesh(operated, "migrate", "--from", "engine-0", "--to", "engine-1",
                        "--tokens", ",".join(map(str, tokens)))  # fmt: skip
    assert said.startswith("700 of 700 tokens to engine-1") and "prefilled" not in said
    after = await two.generate(tokens, max_new_tokens=NEW)
    comparison.check("migrate", "target", tokens, after.token_ids, NEW)
    assert after.token_ids == before.token_ids and after.finished.usage.cached_tokens == 699
    for engine in both:
        await engine.at_rest()


async def test_the_hottest_move(operated: RunningMesh, both: list[DirectEngine]) -> None:
    one, two = both
    for engine in both:
        await engine.flush()
    contexts = [prompt(200, "hot", i) for i in range(4)]
    # The second is used again at last; what they have in common is of both.
    contexts.append([*contexts[0][:100], *prompt(100, "hot", "branch")])
    for tokens in [*contexts, contexts[1]]:
        await one.generate(tokens, max_new_tokens=4)
    reply = await one.engine.Hottest(HottestRequest(count=3), timeout=10)
    found = [list(context.token_ids)[:200] for context in reply.contexts]
    assert found == [contexts[1], contexts[4], contexts[3]]
    assert all(0 <= context.idle_seconds < 60 for context in reply.contexts)
    said = await kvmesh(operated, "migrate", "--from", "engine-0", "--to", "engine-1", "--hottest", "2")
    assert len(said.splitlines()) == 2 and "not moved" not in said and "prefilled" not in said
    for tokens, there in ((contexts[1], 199), (contexts[4], 199), (contexts[3], 0)):
        answer = await two.generate(tokens, max_new_tokens=1)
        assert answer.finished.usage.cached_tokens == there


async def test_drain_finishes_moves_and_leaves(
    operated: RunningMesh, both: list[DirectEngine], comparison: Comparison, note: Callable[[str], None]
) -> None:
    for engine in both:
        await engine.flush()
    hot = prompt(640, "drain")
    for engine in both:
        await engine.generate(hot, max_new_tokens=4)
    long = prompt(60, "drain", "running")
    async with AsyncClient(operated.address("router")) as client:
        stream = client.generate(long, strategy="data_parallel", temperature=0, ignore_eos=True, max_new_tokens=500)
        deltas = aiter(stream)
        assert (await anext(deltas)).token_ids
        loads = [await engine.until(lambda load: True) for engine in both]
        leaving, staying = both if loads[0].running_requests else reversed(both)
        draining = asyncio.ensure_future(kvmesh(operated, "drain", leaving.name, "--hottest", "8", "--stop"))
        async for _ in deltas:
            pass
        result = stream.result
        assert len(result.token_ids) == 500 and result.attempts == 1
        assert [s.engine for s in result.shares if s.decoded_tokens] == [leaving.name]
        comparison.check("drain", "while it is drained", long, result.token_ids[:NEW], NEW)
        said = await draining
        note("drain: " + "; ".join(said.splitlines()))
        assert "tokens to kvstore-0" in said and said.splitlines()[-1] == f"{leaving.name} has left the mesh"
        async with asyncio.timeout(30):
            while operated.alive(leaving.name):
                await asyncio.sleep(0.1)
        mesh = await client.mesh()
        assert [engine.member.endpoint.name for engine in mesh.engines] == [staying.name]
        # What was hot is where the others find it.
        await staying.flush()
        answer = client.generate(hot, strategy="store_backed", temperature=0, ignore_eos=True, max_new_tokens=NEW)
        again = await answer.wait()
        comparison.check("drain", "from the store", hot, again.token_ids, NEW)
        (share,) = [s for s in again.shares if s.engine == staying.name]
        assert share.received_tokens == 639 and share.prefilled_tokens == 1
        await staying.at_rest()
