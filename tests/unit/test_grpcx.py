"""Servers, channels, health, reflection, and how failures travel; all over real ports."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvmesh import errors
from kvmesh.errors import DeadlineExceeded, InvalidArgument, MeshError, Unavailable, Unimplemented
from kvmesh.grpcx import (
    STATUS_CHARS,
    Server,
    announce,
    blocking_channel,
    channel,
    join_address,
    rpc,
    split_address,
    time_left,
    wait_serving,
)
from kvmesh.v1 import registry_pb2 as pb
from kvmesh.v1 import registry_pb2_grpc as pbg

NAME = "kvmesh.v1.Registry"
REQUEST = pb.GetSettingRequest(key="k")
Handler = Callable[[Any, Any], Awaitable[Any]]


class Service(pbg.RegistryServicer):
    """Does what the test says; `ended` tells how each handler ended."""

    def __init__(self) -> None:
        self.unary: Handler = self._answer
        self.stream: Handler = self._answer
        self.ended: asyncio.Queue[str] = asyncio.Queue()

    async def _answer(self, request: Any, context: Any) -> Any:
        return pb.GetSettingResponse(setting=pb.Setting(key=request.key))

    async def _noting(self, work: Awaitable[Any]) -> Any:
        try:
            answer = await work
        except BaseException as error:
            self.ended.put_nowait(type(error).__name__)
            raise
        self.ended.put_nowait("")
        return answer

    @rpc
    async def GetSetting(self, request: Any, context: Any) -> Any:
        return await self._noting(self.unary(request, context))

    @rpc
    async def WatchSetting(self, request: Any, context: Any) -> Any:
        await self._noting(self.stream(request, context))

    @rpc
    async def Watch(self, request: Any, context: Any) -> Any:
        try:
            for i in range(3):
                yield pb.WatchResponse(snapshot=i == 0)
            await self.stream(request, context)
        finally:
            self.ended.put_nowait("closed")


@asynccontextmanager
async def served(service: Service, listen: str = "127.0.0.1:0") -> AsyncIterator[tuple[Server, pbg.RegistryStub]]:
    server = Server(listen, lambda s: pbg.add_RegistryServicer_to_server(service, s), [NAME])
    try:
        await server.start()
        async with channel(server.address) as ch:
            yield server, pbg.RegistryStub(ch)
    finally:
        await server.stop(0)


async def status_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(10):
            await call
    return caught.value.code(), caught.value.details() or ""


def raising(error: Exception) -> Handler:
    async def handler(request: Any, context: Any) -> Any:
        raise error

    return handler


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MeshError)]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_mesh_error_becomes_its_status_in_every_style_of_method(kind):
    service = Service()
    service.unary = service.stream = raising(kind("field = 7 is odd"))
    async with served(service) as (_, stub):
        expected = (grpc.StatusCode[kind.status], "field = 7 is odd")
        assert await status_of(stub.GetSetting(REQUEST, timeout=5)) == expected
        assert await status_of(stub.WatchSetting(pb.WatchSettingRequest(), timeout=5).read()) == expected
        watch = stub.Watch(pb.WatchRequest(), timeout=5)
        assert [(await watch.read()).snapshot for _ in range(3)] == [True, False, False]
        assert await status_of(watch.read()) == expected


async def test_what_is_unexpected_is_logged_and_not_shown(caplog):
    service = Service()
    service.unary = service.stream = raising(ValueError("secret 4711"))
    async with served(service) as (_, stub):
        for call in (
            stub.GetSetting(REQUEST, timeout=5),
            stub.WatchSetting(pb.WatchSettingRequest(), timeout=5).read(),
        ):
            code, text = await status_of(call)
            assert code is grpc.StatusCode.INTERNAL
            assert re.fullmatch(r"(Get|Watch)Setting failed unexpectedly; see the log of the service", text)
    logged = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert [r.name for r in logged] == ["kvmesh.grpcx"] * 2
    assert all("secret 4711" in caplog.handler.format(r) for r in logged)


async def test_a_long_message_is_cut_and_one_in_any_language_travels():
    service = Service()
    async with served(service) as (_, stub):
        for text in ("ä" * 100_000, "x" * STATUS_CHARS, "zwölf\nBoxkämpfer 🥊"):
            service.unary = raising(InvalidArgument(text))
            code, got = await status_of(stub.GetSetting(REQUEST, timeout=5))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert got == (text if len(text) <= STATUS_CHARS else text[: STATUS_CHARS - 1] + "…")


async def test_an_abort_of_the_method_s_own_passes():
    async def aborts(request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.DATA_LOSS, "gone")

    service = Service()
    service.unary = service.stream = aborts
    async with served(service) as (_, stub):
        assert await status_of(stub.GetSetting(REQUEST, timeout=5)) == (grpc.StatusCode.DATA_LOSS, "gone")
        watch = stub.WatchSetting(pb.WatchSettingRequest(), timeout=5)
        assert await status_of(watch.read()) == (grpc.StatusCode.DATA_LOSS, "gone")


async def test_cancelling_the_call_cancels_the_method(caplog):
    entered = asyncio.Queue[None]()

    async def waits(request: Any, context: Any) -> None:
        entered.put_nowait(None)
        await asyncio.Event().wait()

    service = Service()
    service.unary = service.stream = waits
    async with served(service) as (_, stub):
        calls = [stub.GetSetting(REQUEST), stub.WatchSetting(pb.WatchSettingRequest()), stub.Watch(pb.WatchRequest())]
        async with asyncio.timeout(10):
            # The generator's answers are read first: it waits after them.
            for _ in range(3):
                await calls[2].read()
            for _ in calls:
                await entered.get()
            for call in calls:
                call.cancel()
            assert sorted([await service.ended.get() for _ in calls]) == ["CancelledError", "CancelledError", "closed"]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


async def test_a_generator_whose_caller_left_between_two_answers_is_closed(caplog):
    gate = asyncio.Event()

    async def waits(request: Any, context: Any) -> None:
        await gate.wait()
        # By now the caller is gone.
        await context.write(pb.WatchResponse())

    service = Service()
    service.stream = waits
    async with served(service) as (_, stub):
        watch = stub.Watch(pb.WatchRequest())
        async with asyncio.timeout(10):
            assert (await watch.read()).snapshot
            watch.cancel()
            gate.set()
            assert await service.ended.get() == "closed"
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


async def test_time_left_is_the_caller_s_deadline_or_the_default():
    seen: list[float] = []

    async def notes(request: Any, context: Any) -> Any:
        seen.append(time_left(context, 300.0))
        return pb.GetSettingResponse()

    service = Service()
    service.unary = notes
    async with served(service) as (_, stub):
        await stub.GetSetting(REQUEST, timeout=7)
        await stub.GetSetting(REQUEST)
    # gRPC rounds a deadline up a little.
    assert 5 < seen[0] < 7.5 and seen[1] == 300.0


async def test_health_says_serving_from_ready_to_stop():
    server = Server("127.0.0.1:0", lambda s: pbg.add_RegistryServicer_to_server(Service(), s), [NAME])
    await server.start()
    kinds = health_pb2.HealthCheckResponse
    async with channel(server.address) as ch, asyncio.timeout(10):
        stub = health_pb2_grpc.HealthStub(ch)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(service=NAME)) for _ in range(3)]
        for watch in watches:
            assert (await watch.read()).status == kinds.NOT_SERVING
        # One that leaves does not make the others deaf.
        watches.pop(1).cancel()
        waiting = asyncio.create_task(wait_serving(server.address, 5, NAME))
        await server.ready()
        await waiting
        for service in ("", NAME):
            assert (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status == kinds.SERVING
        code, text = await status_of(stub.Check(health_pb2.HealthCheckRequest(service="none")))
        assert code is grpc.StatusCode.NOT_FOUND and "'none'" in text
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="none"))
        assert (await unknown.read()).status == kinds.SERVICE_UNKNOWN
        for watch in watches:
            assert (await watch.read()).status == kinds.SERVING
        began = time.monotonic()
        await server.stop(5)
        # Watches end by themselves: nothing has to be waited out.
        assert time.monotonic() - began < 2
        for watch in watches:
            assert (await watch.read()).status == kinds.NOT_SERVING
    await server.ready()


async def test_reflection_lists_the_services():
    async with served(Service()) as (server, _), channel(server.address) as ch:
        stub = reflection_pb2_grpc.ServerReflectionStub(ch)
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=NAME),
        ]
        answers = [a async for a in stub.ServerReflectionInfo(asked, timeout=5)]
    names = {s.name for s in answers[0].list_services_response.service}
    assert names == {NAME, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert len(answers[1].file_descriptor_response.file_descriptor_proto) >= 1


async def test_the_port_is_known_at_once_taken_alone_and_given_back():
    first = Server("127.0.0.1:0", lambda s: None, [])
    with pytest.raises(Unavailable, match=re.escape(first.address)):
        Server(first.address, lambda s: None, [])
    # Stopping without a start lets go of the port too.
    await first.stop()
    await first.stop()
    second = Server(first.address, lambda s: None, [])
    assert second.address == first.address
    await second.start()
    with pytest.raises(Unavailable):
        Server(first.address, lambda s: None, [])
    await second.stop()


async def test_a_new_channel_does_not_wait_with_one_that_found_nobody():
    async with served(Service()) as (server, _):
        address = server.address
    async with channel(address) as early:
        code, _ = await status_of(pbg.RegistryStub(early).GetSetting(REQUEST, timeout=5))
        assert code is grpc.StatusCode.UNAVAILABLE
        async with served(Service(), address) as (_, stub):
            assert (await stub.GetSetting(REQUEST, timeout=5)).setting.key == "k"


async def test_a_running_call_has_its_grace_when_the_server_stops():
    gate, entered = asyncio.Event(), asyncio.Event()

    async def waits(request: Any, context: Any) -> Any:
        entered.set()
        await gate.wait()
        return pb.GetSettingResponse()

    service = Service()
    service.unary = waits
    async with served(service) as (server, stub), asyncio.timeout(10):
        running = asyncio.ensure_future(stub.GetSetting(REQUEST))
        await entered.wait()
        stopping = asyncio.create_task(server.stop(5))
        await asyncio.sleep(0.05)
        gate.set()
        await running
        await stopping


async def test_waiting_for_what_never_serves():
    async with served(Service()) as (server, _):
        with pytest.raises(DeadlineExceeded, match=r"does not serve after 0\.3 s"):
            await wait_serving(server.address, 0.3)
        nowhere = server.address
    with pytest.raises(DeadlineExceeded, match=f"{NAME} at {re.escape(nowhere)} does not serve"):
        await wait_serving(nowhere, 0.3, NAME)


async def test_waiting_outlasts_a_restart():
    async with served(Service()) as (server, _):
        address = server.address
        waiting = asyncio.create_task(wait_serving(address, 10))
        await asyncio.sleep(0.1)
    assert not waiting.done()
    async with served(Service(), address) as (server, _):
        await server.ready()
        await waiting


async def test_what_listens_is_no_service_of_ours():
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        with pytest.raises(Unimplemented):
            await wait_serving(f"127.0.0.1:{port}", 5)
    finally:
        await server.stop(None)


async def test_a_blocking_channel_and_64_mib():
    async def echoes(request: Any, context: Any) -> Any:
        return pb.GetSettingResponse(setting=pb.Setting(value=request.key))

    service = Service()
    service.unary = echoes
    async with served(service) as (server, stub):
        text = "x" * (40 << 20)
        assert len((await stub.GetSetting(pb.GetSettingRequest(key=text), timeout=20)).setting.value) == len(text)
        code, _ = await status_of(stub.GetSetting(pb.GetSettingRequest(key=text + text), timeout=20))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED

        def call() -> str:
            with blocking_channel(server.address) as ch:
                answer: Any = pbg.RegistryStub(ch).GetSetting(REQUEST, timeout=5)
                return str(answer.setting.value)

        assert await asyncio.to_thread(call) == "k"


async def test_a_channel_goes_around_a_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:1")
    async with served(Service()) as (_, stub):
        await stub.GetSetting(REQUEST, timeout=5)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("host-1.example.com:65535", ("host-1.example.com", 65535)),
        ("engine_1:80", ("engine_1", 80)),
        ("[::1]:7000", ("::1", 7000)),
        ("[fe80::1%eth0]:7000", ("fe80::1%eth0", 7000)),
    ],
)
def test_split_address(address, parts):
    assert split_address(address) == parts
    assert join_address(*parts) == address


@pytest.mark.parametrize(
    "address",
    [
        *("", "nowhere", ":80", "host:", "host:x", "host:-1", "host:65536", "host:1 ", "h:1\n", "::1:80", "[::1]"),
        *("[x]:1", "a b:1", "http://a:1", "host:\u0661", "hóst:1"),
    ],
)
def test_split_address_refuses(address):
    with pytest.raises(InvalidArgument, match=re.escape(f"address {address!r} is not HOST:PORT")):
        split_address(address)


async def test_a_server_on_ipv6():
    try:
        server = Server("[::1]:0", lambda s: None, [])
    except Unavailable:
        pytest.skip("no IPv6 here")
    await server.start()
    await server.ready()
    host, port = split_address(server.address)
    assert host == "::1" and port > 0
    await wait_serving(server.address, 5)
    await server.stop()


def test_announce_replaces_the_file_in_one_step(tmp_path, monkeypatch):
    file = tmp_path / "address"
    announce(str(file), "127.0.0.1:1")
    before = file.stat().st_ino
    announce(file, "127.0.0.1:22")
    assert file.read_text() == "127.0.0.1:22\n" and file.stat().st_ino != before
    monkeypatch.chdir(tmp_path)
    announce("", "127.0.0.1:3")
    assert os.listdir(tmp_path) == ["address"]
    with pytest.raises(FileNotFoundError):
        announce(tmp_path / "none" / "address", "127.0.0.1:3")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        announce(tmp_path / "folder", "127.0.0.1:3")
    assert sorted(os.listdir(tmp_path)) == ["address", "folder"]
