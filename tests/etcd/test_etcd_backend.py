"""What only a registry on etcd can meet: other writers, lost keys, compaction, restarts and a store that is away."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time

import grpc
import pytest
from aetcd import rpc

from kvmesh.grpcx import channel
from kvmesh.membership import Membership, MeshWatch, SharedSettings
from kvmesh.v1 import common_pb2
from kvmesh.v1 import registry_pb2 as pb
from kvmesh.v1 import registry_pb2_grpc as pbg
from services.registry.etcd import EtcdBackend
from services.registry.server import serving
from services.registry.store import EtcdStore


def member(name: str, incarnation: str = "a" * 32) -> pb.Member:
    endpoint = common_pb2.Endpoint(name=name, address="127.0.0.1:7000", incarnation=incarnation)
    return pb.Member(endpoint=endpoint, kind=pb.MEMBER_KIND_ENGINE)


def register(stub: pbg.RegistryStub, name: str, ttl_ms: int = 10000):
    return stub.Register(pb.RegisterRequest(member=member(name), ttl_ms=ttl_ms), timeout=5)


async def read(call):
    async with asyncio.timeout(15):
        return await call.read()


async def read_until(call, wanted: set[str]) -> set[str]:
    """Follows a new watch until its members are `wanted`."""
    known: set[str] = set()
    while known != wanted:
        change = await read(call)
        assert isinstance(change, pb.WatchResponse), "the stream ended"
        known = set() if change.snapshot else known
        known = (known - {e.name for e in change.left}) | {m.endpoint.name for m in change.present}
    return known


async def until(condition, timeout: float = 8) -> None:
    for _ in range(int(timeout / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise TimeoutError


def names(*wanted: str):
    return lambda members: set(members) == set(wanted)


async def test_registries_on_one_etcd_see_the_same(etcd, prefixes):
    prefix = next(prefixes)
    backends = [EtcdBackend(etcd.address, prefix) for _ in range(2)]
    async with (
        serving(backends[0], "127.0.0.1:0") as first,
        serving(backends[1], "127.0.0.1:0") as second,
        channel(first.address) as to_first,
        channel(second.address) as to_second,
    ):
        one, two = pbg.RegistryStub(to_first), pbg.RegistryStub(to_second)
        watch = two.Watch(pb.WatchRequest())
        lease = (await register(one, "e0")).lease_id
        await read_until(watch, {"e0"})
        await two.KeepAlive(pb.KeepAliveRequest(lease_id=lease), timeout=5)
        # Another mesh, whose name begins the same, is not seen.
        other = EtcdBackend(etcd.address, prefix + "0")
        async with serving(other, "127.0.0.1:0") as third, channel(third.address) as to_third:
            await register(pbg.RegistryStub(to_third), "stranger")
        await register(one, "e1")
        assert [m.endpoint.name for m in (await read(watch)).present] == ["e1"]


async def test_foreign_entries_are_passed_over_and_a_deleted_member_must_register_again(etcd, prefixes):
    prefix, store = next(prefixes), EtcdStore(etcd.address)
    await store.put(f"{prefix}/members/junk".encode(), b"\xff\xff\xff")
    await store.put(f"{prefix}/members/liar".encode(), member("somebody-else").SerializeToString())
    async with serving(EtcdBackend(etcd.address, prefix), "127.0.0.1:0") as server, channel(server.address) as ch:
        stub = pbg.RegistryStub(ch)
        watch = stub.Watch(pb.WatchRequest())
        first = await read(watch)
        assert first.snapshot and not first.present
        await store.put(f"{prefix}/settings/junk".encode(), b"\xff\xff\xff")
        lease = (await register(stub, "e0")).lease_id
        await read_until(watch, {"e0"})
        etcd_kv = rpc.KVStub(store._channel)
        await etcd_kv.DeleteRange(rpc.DeleteRangeRequest(key=f"{prefix}/members/e0".encode()), timeout=5)
        assert [e.name for e in (await read(watch)).left] == ["e0"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.KeepAlive(pb.KeepAliveRequest(lease_id=lease), timeout=5)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    await store.close()


async def test_a_watch_over_a_compacted_revision_ends_instead_of_missing_events(etcd, prefixes):
    prefix, store = next(prefixes).encode() + b"/", EtcdStore(etcd.address)
    before = await store.read(prefix)
    for i in range(3):
        revision = await store.put(prefix + b"k", b"%d" % i)
    await rpc.KVStub(store._channel).Compact(rpc.CompactionRequest(revision=revision, physical=True), timeout=5)
    async with asyncio.timeout(5):
        assert [batch async for batch in store.watch(prefix, before) if batch] == []
    # A store that is behind what we read is another store.
    from_the_future = type(before)([], revision + 1000, before.cluster)
    async with asyncio.timeout(5):
        assert [batch async for batch in store.watch(prefix, from_the_future)] == []
    await store.close()


async def test_watches_and_leases_survive_a_crash_of_etcd(own_etcd, own_registry):
    _, ch = own_registry
    stub = pbg.RegistryStub(ch)
    watch, setting = stub.Watch(pb.WatchRequest()), stub.WatchSetting(pb.WatchSettingRequest(key="strategy"))
    lease = (await register(stub, "e0")).lease_id
    await stub.PutSetting(pb.PutSettingRequest(key="strategy", value="one"), timeout=5)
    await read_until(watch, {"e0"})
    assert (await read(setting)).setting.value == "one"

    await own_etcd.kill()
    await own_etcd.restart()

    again = await read(watch)
    assert again.snapshot and [m.endpoint.name for m in again.present] == ["e0"]
    await stub.KeepAlive(pb.KeepAliveRequest(lease_id=lease), timeout=5)
    await register(stub, "e1")
    change = await read(watch)
    assert not change.snapshot and [m.endpoint.name for m in change.present] == ["e1"]
    await stub.PutSetting(pb.PutSettingRequest(key="strategy", value="two"), timeout=5)
    assert (await read(setting)).setting.value == "two"


async def test_without_etcd_every_call_is_unavailable_soon(own_etcd, own_registry):
    _, ch = own_registry
    stub = pbg.RegistryStub(ch)
    # A lease that outlasts the test, however slow the machine.
    lease = (await register(stub, "e0", ttl_ms=120000)).lease_id
    watch = stub.Watch(pb.WatchRequest())
    await read_until(watch, {"e0"})
    calls = {
        "Register": lambda: register(stub, "e1"),
        "KeepAlive": lambda: stub.KeepAlive(pb.KeepAliveRequest(lease_id=lease)),
        "Deregister": lambda: stub.Deregister(pb.DeregisterRequest(lease_id=lease)),
        "GetSetting": lambda: stub.GetSetting(pb.GetSettingRequest(key="k")),
        "PutSetting": lambda: stub.PutSetting(pb.PutSettingRequest(key="k", value="v")),
        "PutSetting if": lambda: stub.PutSetting(pb.PutSettingRequest(key="k", value="v", if_revision=1)),
        "Watch": lambda: stub.Watch(pb.WatchRequest()).read(),
        "WatchSetting": lambda: stub.WatchSetting(pb.WatchSettingRequest(key="k")).read(),
    }

    async def status(call) -> tuple[grpc.StatusCode, float]:
        began = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call()
        return caught.value.code(), time.monotonic() - began

    async def all_unavailable(names: list[str]) -> None:
        results = await asyncio.gather(*(status(calls[n]) for n in names))
        for name, (code, seconds) in zip(names, results, strict=True):
            assert code is grpc.StatusCode.UNAVAILABLE, name
            assert seconds < 5, name

    pid = own_etcd.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        # The watch has not noticed a silent etcd yet: only calls that ask it are refused.
        await all_unavailable([n for n in calls if "Watch" not in n])
    finally:
        os.kill(pid, signal.SIGCONT)
    await own_etcd.kill()
    await all_unavailable(list(calls))
    await own_etcd.restart()
    assert (await read(watch)).snapshot
    await register(stub, "e2")


async def test_everything_comes_back_after_etcd_lost_its_data(own_etcd, own_registry):
    address, ch = own_registry
    watch, settings = MeshWatch(address), SharedSettings(address)
    membership = Membership(address, member("e0"), ttl_ms=1000)
    values = settings.watch("k")
    try:
        watch.start()
        await membership.start(timeout=5)
        await watch.wait_for(names("e0"), 5)
        await settings.put("k", "before")
        assert (await asyncio.wait_for(anext(values), 5)).value == "before"

        await own_etcd.kill()
        await watch.wait_for(names("e0"), 0.1)
        shutil.rmtree(own_etcd.data_dir / "data")
        await own_etcd.restart()

        stub = pbg.RegistryStub(ch)
        snapshot = stub.Watch(pb.WatchRequest())
        await read_until(snapshot, {"e0"})
        await watch.wait_for(names("e0"), 5)
        await until(lambda: membership.connected)
        assert await settings.get("k") is None
        await settings.put("k", "after", if_revision=0)
        assert (await asyncio.wait_for(anext(values), 5)).value == "after"
    finally:
        await membership.stop()
        await values.aclose()
        await settings.close()
        await watch.wait_for(names(), 5)
        await watch.close()


async def test_membership_keeps_its_lease_through_a_crash_of_etcd(own_etcd, own_registry):
    address, _ = own_registry
    seen: list[set[str]] = []
    watch = MeshWatch(address, lambda members: seen.append(set(members)))
    membership = Membership(address, member("e0"), ttl_ms=2000)
    try:
        watch.start()
        await membership.start(timeout=5)
        await watch.wait_for(names("e0"), 5)
        lease = membership._lease_id
        await own_etcd.kill()
        await until(lambda: not membership.connected)
        await own_etcd.restart()
        await until(lambda: membership.connected)
        assert membership._lease_id == lease
        assert seen == [{"e0"}] and watch.connected
    finally:
        await membership.stop()
        await watch.close()
