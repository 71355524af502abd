"""The registry over its embedded backend: validation, load, slow watchers, its command line."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import time
from collections.abc import AsyncIterator

import grpc
import pytest
from click.testing import CliRunner

from kvmesh.errors import Unavailable
from kvmesh.grpcx import channel, wait_serving
from kvmesh.v1 import common_pb2
from kvmesh.v1 import registry_pb2 as pb
from kvmesh.v1 import registry_pb2_grpc as pbg
from services.registry.cli import registry as registry_command
from services.registry.memory import MemoryBackend
from services.registry.mirror import FOLLOWER_LIMIT, Mirror
from services.registry.server import serving


def member(name: str = "e0", **fields) -> pb.Member:
    values = {"name": name, "address": "127.0.0.1:7000", "incarnation": "a" * 32}
    values |= {k: fields.pop(k) for k in list(fields) if k in values}
    return pb.Member(endpoint=common_pb2.Endpoint(**values), **{"kind": pb.MEMBER_KIND_ENGINE, **fields})


@pytest.fixture
async def registry() -> AsyncIterator[pbg.RegistryStub]:
    async with serving(MemoryBackend(), "127.0.0.1:0") as server, channel(server.address) as ch:
        yield pbg.RegistryStub(ch)


async def refused(awaitable) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return caught.value.details() or ""


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (pb.RegisterRequest(), "member.endpoint.name = ''"),
        (pb.RegisterRequest(member=member("a b")), "'a b'"),
        (pb.RegisterRequest(member=member("n" * 64)), "1 to 63"),
        (pb.RegisterRequest(member=member("e0\n")), "member.endpoint.name"),
        (pb.RegisterRequest(member=member(address="")), "member.endpoint.address ''"),
        (pb.RegisterRequest(member=member(address="host")), "member.endpoint.address 'host'"),
        (pb.RegisterRequest(member=member(address="host:0")), "'host:0'"),
        (pb.RegisterRequest(member=member(address="host:65536")), "'host:65536'"),
        (pb.RegisterRequest(member=member(incarnation="")), "member.endpoint.incarnation = ''"),
        (pb.RegisterRequest(member=member(incarnation="g" * 32)), "32 hexadecimal"),
        (pb.RegisterRequest(member=member(kind=pb.MEMBER_KIND_UNSPECIFIED)), "member.kind = 0"),
        (pb.RegisterRequest(member=member(kind=99)), "member.kind = 99"),
        (pb.RegisterRequest(member=member(labels={"x": "y" * 17000})), "labels"),
        (pb.RegisterRequest(member=member(), ttl_ms=999), "ttl_ms = 999"),
        (pb.RegisterRequest(member=member(), ttl_ms=600001), "ttl_ms = 600001"),
    ],
)
async def test_a_malformed_member_is_refused(registry, request_, says):
    assert says in await refused(registry.Register(request_, timeout=5))
    snapshot = await asyncio.wait_for(registry.Watch(pb.WatchRequest()).read(), 5)
    assert snapshot.snapshot and not snapshot.present


async def test_limits_of_a_member_and_the_default_lease(registry):
    reply = await registry.Register(pb.RegisterRequest(member=member("N" * 63, address="[::1]:65535")), timeout=5)
    assert reply.ttl_ms == 5000
    for ttl_ms in (1000, 600000):
        request = pb.RegisterRequest(member=member(incarnation="0" * 32), ttl_ms=ttl_ms)
        assert (await registry.Register(request, timeout=5)).ttl_ms == ttl_ms


@pytest.mark.parametrize("key", ["", "A", "a b", "k" * 129, "ä", "a\n"])
async def test_a_malformed_key_is_refused(registry, key):
    assert "key = " in await refused(registry.GetSetting(pb.GetSettingRequest(key=key), timeout=5))
    assert "key = " in await refused(registry.PutSetting(pb.PutSettingRequest(key=key, value="v"), timeout=5))
    assert "key = " in await refused(registry.WatchSetting(pb.WatchSettingRequest(key=key)).read())


async def test_a_value_may_have_64_kib(registry):
    fits = "ä" * (32 << 10)
    await registry.PutSetting(pb.PutSettingRequest(key="k" * 128, value=fits), timeout=5)
    too_long = pb.PutSettingRequest(key="k", value=fits + "x")
    assert "65537 bytes" in await refused(registry.PutSetting(too_long, timeout=5))


async def test_five_hundred_members(registry):
    watch = registry.Watch(pb.WatchRequest())
    began = time.monotonic()
    replies = await asyncio.gather(
        *(registry.Register(pb.RegisterRequest(member=member(f"e{i}")), timeout=20) for i in range(500))
    )
    await asyncio.gather(*(registry.KeepAlive(pb.KeepAliveRequest(lease_id=r.lease_id), timeout=20) for r in replies))
    known: set[str] = set()
    async with asyncio.timeout(20):
        while len(known) < 500:
            change = await watch.read()
            known = (set() if change.snapshot else known) | {m.endpoint.name for m in change.present}
        late = await registry.Watch(pb.WatchRequest()).read()
    assert late.snapshot and len(late.present) == 500
    assert time.monotonic() - began < 10


async def test_a_watcher_that_falls_behind_gets_a_snapshot():
    mirror = Mirror()
    mirror.replace({}, {})
    members, setting = mirror.follow_members(), mirror.follow_setting("k")
    assert (await anext(members)).snapshot
    mirror.put_setting(pb.Setting(key="k", value="first", revision=1))
    assert (await anext(setting)).value == "first"
    for i in range(FOLLOWER_LIMIT + 1):
        mirror.put_member(member(f"e{i}"))
        mirror.put_setting(pb.Setting(key="k", value=f"{i}", revision=i + 2))
    mirror.drop_member("e0")
    whole = await anext(members)
    assert whole.snapshot and len(whole.present) == FOLLOWER_LIMIT
    assert (await anext(setting)).revision == FOLLOWER_LIMIT + 2
    # What comes after it is changes again, those that queue up together in one message.
    mirror.drop_member("e1")
    mirror.put_member(member("e1", pid=7))
    mirror.drop_member("e2")
    change = await anext(members)
    assert not change.snapshot
    assert list(change.present) == [member("e1", pid=7)] and [e.name for e in change.left] == ["e2"]
    await members.aclose()
    await setting.aclose()
    assert not mirror._followers()


async def test_a_slow_client_costs_bounded_memory():
    backend = MemoryBackend()
    async with serving(backend, "127.0.0.1:0") as server, channel(server.address) as ch:
        stub = pbg.RegistryStub(ch)
        watch = stub.Watch(pb.WatchRequest())
        assert (await asyncio.wait_for(watch.read(), 5)).snapshot
        fat = {"x": "y" * 15000}
        for i in range(1200):
            await backend.register(member(f"e{i % 40}", incarnation=f"{i:032x}", labels=fat), 60000)
            if i % 20 == 0:
                await asyncio.sleep(0)
        (follower,) = backend._mirror._member_followers
        assert len(follower._changes) <= FOLLOWER_LIMIT
        latest: dict[str, str] = {}
        async with asyncio.timeout(20):
            while latest != {f"e{i % 40}": f"{i:032x}" for i in range(1160, 1200)}:
                change = await watch.read()
                latest = {} if change.snapshot else latest
                latest |= {m.endpoint.name: m.endpoint.incarnation for m in change.present}


async def test_closing_ends_watches_and_frees_followers():
    backend = MemoryBackend()
    async with serving(backend, "127.0.0.1:0") as server, channel(server.address) as ch:
        stub = pbg.RegistryStub(ch)
        cancelled, ended = stub.Watch(pb.WatchRequest()), stub.Watch(pb.WatchRequest())
        setting = stub.WatchSetting(pb.WatchSettingRequest(key="k"))
        for call in (cancelled, ended):
            await asyncio.wait_for(call.read(), 5)
        cancelled.cancel()
        backend.end_watches()
        for call in (ended, setting, stub.Watch(pb.WatchRequest())):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(call.read(), 5)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        began = time.monotonic()
    assert time.monotonic() - began < 1.5
    assert not backend._mirror._followers()


async def test_an_address_in_use_is_unavailable():
    async with serving(MemoryBackend(), "127.0.0.1:0") as server:
        with pytest.raises(Unavailable, match=re.escape(server.address)):
            async with serving(MemoryBackend(), server.address):
                pass


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "exactly one of --etcd"),
        (["--embedded", "--etcd", "127.0.0.1:2379"], "exactly one of --etcd"),
        (["--etcd", "nowhere"], "'nowhere' is not HOST:PORT"),
        (["--embedded", "--listen", "nowhere"], "'nowhere' is not HOST:PORT"),
        (["--etcd", "127.0.0.1:2379", "--etcd-prefix", "/"], "etcd_prefix = '/'"),
    ],
)
def test_usage_errors(arguments, says):
    result = CliRunner().invoke(registry_command, arguments)
    assert result.exit_code == 2
    assert says in result.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_command_serves_and_stops_on_a_signal(tmp_path, number):
    announced = tmp_path / "address"
    program = "from kvmesh.cli import main; main()"
    arguments = ["registry", "--embedded", "--listen", "127.0.0.1:0", "--announce", str(announced)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, *arguments, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        async with asyncio.timeout(30):
            line = b""
            while b"ready" not in line:
                line = await process.stderr.readline()
                assert line, "the process ended"
        address = announced.read_text().strip()
        await wait_serving(address, 5, "kvmesh.v1.Registry")
        async with channel(address) as ch:
            watch = pbg.RegistryStub(ch).Watch(pb.WatchRequest())
            assert (await asyncio.wait_for(watch.read(), 5)).snapshot
            process.send_signal(number)
            _, said = await asyncio.wait_for(process.communicate(), 5)
            with pytest.raises(grpc.aio.AioRpcError):
                await watch.read()
        assert process.returncode == 0
        assert b"Traceback" not in said
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
