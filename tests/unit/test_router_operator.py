"""Migrate and Drain over fake engines and stores, and their commands."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result
from fake_engine import FakeEngine, answer
from fake_store import BLOCK
from router_harness import Harness
from test_router_stores import prompt, with_stores

from kvmesh.aio import Tasks
from kvmesh.dataplane.layout import Layout
from kvmesh.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    from_rpc,
)
from kvmesh.grpcx import channel
from kvmesh.local.operate import drain, migrate
from kvmesh.membership import SharedSettings
from kvmesh.v1 import engine_pb2, router_pb2
from kvmesh.v1 import operator_pb2 as pb
from kvmesh.v1.operator_pb2_grpc import OperatorStub
from services.router.draining import KEY, Draining


def tokens_of(ids: list[int]) -> router_pb2.TokenIds:
    return router_pb2.TokenIds(ids=ids)


async def move(h: Harness, timeout: float = 10, **fields: Any) -> list[pb.Migrated]:
    async with channel(h.servers[0].address) as ch:
        stub: Any = OperatorStub(ch)
        try:
            return list((await stub.Migrate(pb.MigrateRequest(**fields), timeout=timeout)).contexts)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from error


async def drained(h: Harness, timeout: float = 20, **fields: Any) -> list[pb.DrainResponse]:
    async with channel(h.servers[0].address) as ch:
        stub: Any = OperatorStub(ch)
        try:
            return [event async for event in stub.Drain(pb.DrainRequest(**fields), timeout=timeout)]
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from error


async def test_a_context_goes_from_engine_to_engine(tmp_path: Path) -> None:
    async with Harness(2, tmp=tmp_path) as h:
        one, two = h.engines
        tokens = prompt(300)
        two.cached = tokens[:100]
        (moved,) = await move(h, source="e0", target="e1", tokens=tokens_of(tokens))
        assert (moved.tokens, moved.matched, moved.sent, moved.target, moved.error) == (300, 100, 200, "e1", "")
        assert moved.bytes == 200 * 64 and moved.computed == 300 and moved.seconds > 0
        assert two.methods() == ["PrepRecv", "Release"] and one.methods() == ["RemoteSend"]
        # It is all there: nothing is sent.
        two.cached = tokens
        (moved,) = await move(h, source="e0", target="e1", tokens=tokens_of(tokens))
        assert (moved.matched, moved.sent) == (300, 0) and one.methods() == ["RemoteSend"]
        await h.idle()


async def test_the_hottest_go_and_one_that_fails_stops_no_other(tmp_path: Path) -> None:
    async with Harness(2, tmp=tmp_path) as h:
        h.engines[0].contexts = [prompt(100, key) for key in range(5)]
        moved = await move(h, source="e0", target="e1", hottest=3)
        assert [(m.tokens, m.sent, m.error) for m in moved] == [(100, 100, "")] * 3
        h.engines[0].faults["RemoteSend"] = Unavailable("told to fail")
        moved = await move(h, source="e0", target="e1", hottest=9)
        assert len(moved) == 5 and all("told to fail" in m.error and not m.sent for m in moved)
        await h.idle()
        assert await move(h, source="e1", target="e0", hottest=3) == []


async def test_contexts_go_to_stores_and_back(tmp_path: Path) -> None:
    async with Harness(1, tmp=tmp_path) as h, with_stores(h) as [store]:
        tokens = prompt(200)
        (moved,) = await move(h, source="e0", target="s0", tokens=tokens_of(tokens), salt="t")
        assert (moved.sent, moved.error) == (3 * BLOCK, "") and store.kept == [("t", tokens[: 3 * BLOCK])]
        (moved,) = await move(h, source="s0", target="e0", tokens=tokens_of(tokens), salt="t")
        assert (moved.sent, moved.computed) == (3 * BLOCK, 0)
        with pytest.raises(FailedPrecondition, match="s0 is a store"):
            await move(h, source="s0", target="e0", hottest=1)
        await h.idle()


async def test_what_cannot_be_moved_is_refused_by_name(tmp_path: Path) -> None:
    async with Harness(2, tmp=tmp_path) as h:
        what = {"tokens": tokens_of(prompt(10))}
        with pytest.raises(NotFound, match=r"source = 'x' is no member of the mesh; there is: e0, e1"):
            await move(h, source="x", target="e1", **what)
        with pytest.raises(InvalidArgument, match="both e0"):
            await move(h, source="e0", target="e0", **what)
        with pytest.raises(InvalidArgument, match="give text, tokens or hottest"):
            await move(h, source="e0", target="e1")
        with pytest.raises(InvalidArgument, match="token_ids is empty"):
            await move(h, source="e0", target="e1", tokens=tokens_of([]))
        with pytest.raises(InvalidArgument, match="hottest = 1001"):
            await move(h, source="e0", target="e1", hottest=1001)
        with pytest.raises(InvalidArgument, match="no tokenizer"):
            await move(h, source="e0", target="e1", text="hello")
        for name, model, layout in (("e2", "other", None), ("e3", "fake", Layout("0" * 32, "float32", 1, 1, 1, 1, 1))):
            engine = FakeEngine(name, h.mesh, {})
            engine.model, engine.layout = model, None if layout is None else layout.message()
            await engine.start(h.registry.address)
            h._stack.push_async_callback(engine.stop)
        async with asyncio.timeout(5):
            while sum(e.connected for e in (await h.router.GetMesh(router_pb2.GetMeshRequest())).engines) < 4:
                await asyncio.sleep(0.02)
        with pytest.raises(NotFound, match="e0 has fake, and e2 has other"):
            await move(h, source="e0", target="e2", **what)
        with pytest.raises(FailedPrecondition, match="another layout than e3: model_digest is"):
            await move(h, source="e0", target="e3", **what)
        await h.engines[1].kill()
        async with asyncio.timeout(5):
            while True:
                try:
                    await move(h, source="e0", target="e1", **what)
                except Unavailable:
                    break


async def test_drain_waits_moves_and_leaves(tmp_path: Path) -> None:
    async with Harness(2, tmp=tmp_path) as h:
        one, two = h.engines
        second = await h.start_router()
        one.contexts = [prompt(100, key) for key in range(3)]
        await one.report(engine_pb2.LoadReport(running_requests=2))
        await two.report(engine_pb2.LoadReport(running_requests=9))
        async with asyncio.timeout(5):
            for router in (h.router, second):
                while not all(
                    e.load.running_requests for e in (await router.GetMesh(router_pb2.GetMeshRequest())).engines
                ):
                    await asyncio.sleep(0.02)
        async with channel(h.servers[0].address) as ch:
            stub: Any = OperatorStub(ch)
            call = aiter(stub.Drain(pb.DrainRequest(engine="e0", hottest=2, stop=True), timeout=20))
            assert (await anext(call)).running == 2
            # Neither router gives it new requests, although the other one has more to do.
            h.router, first = second, h.router
            for router in (first, second):
                h.router = router
                result = await h.generate(prompt(20), strategy="data_parallel")
                assert result.tokens == answer(prompt(20), 8) and result.done.shares[0].engine == "e1"
            assert one.methods() == []
            await one.report(engine_pb2.LoadReport())
            events = [event async for event in call]
        assert [event.WhichOneof("event") for event in events] == ["running", "moved", "moved", "left"]
        assert [(e.moved.target, e.moved.sent) for e in events[1:3]] == [("e1", 100)] * 2
        assert one.methods() == ["Hottest", "RemoteSend", "RemoteSend", "Leave"]
        assert one.requests("Leave")[0].stop
        async with asyncio.timeout(5):
            while len((await h.router.GetMesh(router_pb2.GetMeshRequest())).engines) > 1:
                await asyncio.sleep(0.02)
        assert two.methods().count("Release") == 2


async def test_drain_prefers_the_stores(tmp_path: Path) -> None:
    async with Harness(2, tmp=tmp_path) as h, with_stores(h) as [store]:
        h.engines[0].contexts = [prompt(200, 1), prompt(20, 2)]
        events = await drained(h, engine="e0", hottest=5)
        # Less than a block is nothing for a store.
        assert [e.moved.target for e in events if e.HasField("moved")] == ["s0", "e1"]
        assert store.kept == [("", prompt(200, 1)[: 3 * BLOCK])] and events[-1].left


async def test_a_drain_that_fails_gives_the_engine_back(tmp_path: Path) -> None:
    async with Harness(1, tmp=tmp_path) as h:
        engine = h.engines[0]
        await engine.report(engine_pb2.LoadReport(running_requests=1))
        async with asyncio.timeout(5):
            while not (await h.router.GetMesh(router_pb2.GetMeshRequest())).engines[0].load.running_requests:
                await asyncio.sleep(0.02)
        async with channel(h.servers[0].address) as ch:
            stub: Any = OperatorStub(ch)
            call = stub.Drain(pb.DrainRequest(engine="e0"), timeout=20)
            assert (await call.read()).running == 1
            with pytest.raises(Unavailable):
                await refused(h)
            # Whoever drains gives up.
            call.cancel()
        async with asyncio.timeout(5):
            while True:
                try:
                    assert (await h.generate(prompt(20))).tokens == answer(prompt(20), 8)
                    break
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.02)
        with pytest.raises(DeadlineExceeded):
            await drained(h, engine="e0", timeout=0.5)
        await engine.report(engine_pb2.LoadReport())
        engine.faults["Leave"] = FailedPrecondition("told to stay")
        with pytest.raises(FailedPrecondition, match="told to stay"):
            await drained(h, engine="e0")
        assert (await h.generate(prompt(20))).tokens == answer(prompt(20), 8)
        with pytest.raises(NotFound, match="engine = 'x'"):
            await drained(h, engine="x")


async def refused(h: Harness) -> None:
    try:
        await h.generate(prompt(20))
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error) from error


async def test_marks_run_out_and_survive_each_other(tmp_path: Path) -> None:
    now = 1000.0
    async with Harness(0, tmp=tmp_path) as h:
        settings = SharedSettings(h.registry.address)
        one, two = Draining(settings, lambda: now), Draining(settings, lambda: now)
        tasks = Tasks()
        try:
            two.start()
            await asyncio.gather(one.mark("a", 50), two.mark("b", 100), one.mark("c", 100))
            async with asyncio.timeout(5):
                while not all(name in two for name in "abc"):
                    await asyncio.sleep(0.02)
            now += 60
            assert "a" not in two and "b" in two
            await one.unmark("b")
            assert "b" not in one
            async with asyncio.timeout(5):
                while "b" in two:
                    await asyncio.sleep(0.02)
            assert "c" in two
            # Nonsense from elsewhere drains nobody.
            await settings.put(KEY, "[1]")
            async with asyncio.timeout(5):
                while "c" in two:
                    await asyncio.sleep(0.02)
        finally:
            await tasks.close()
            await two.close()
            await settings.close()


async def run(command: Any, *words: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, command, words)


async def test_the_commands(tmp_path: Path) -> None:
    async with Harness(2, tmp=tmp_path) as h:
        router = ("--router", h.servers[0].address)
        h.engines[0].contexts = [prompt(100)]
        done = await run(migrate, "--from", "e0", "--to", "e1", "--hottest", "4", *router)
        assert done.exit_code == 0 and "100 of 100 tokens to e1" in done.output and "prefilled for it" in done.output
        done = await run(migrate, "--from", "e0", "--to", "e1", "--tokens", "1,2,3", *router)
        assert done.exit_code == 0 and "3 of 3 tokens to e1" in done.output
        h.engines[0].faults["RemoteSend"] = Unavailable("told to fail")
        done = await run(migrate, "--from", "e0", "--to", "e1", "--tokens", "1,2,3", *router)
        assert done.exit_code == 1 and "3 tokens not moved to e1" in done.output
        done = await run(migrate, "--from", "e0", "--to", "e1", *router)
        assert done.exit_code == 2 and "give one of --text, --tokens and --hottest" in done.output
        done = await run(migrate, "--from", "e0", "--to", "e1", "--tokens", "-1", *router)
        assert isinstance(done.exception, InvalidArgument)
        done = await run(drain, "x", *router)
        assert isinstance(done.exception, NotFound)
        del h.engines[0].faults["RemoteSend"]
        done = await run(drain, "e0", *router)
        assert done.exit_code == 0 and done.output.splitlines()[-1] == "e0 has left the mesh"
        assert "e0 gets no new requests; 0 still run there" in done.output
