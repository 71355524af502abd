"""What both backends promise, seen through a real gRPC server."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from kvmesh.v1 import common_pb2
from kvmesh.v1 import registry_pb2 as pb

A, B = "a" * 32, "b" * 32


def member(name: str, incarnation: str = A, **labels: str) -> pb.Member:
    endpoint = common_pb2.Endpoint(name=name, address="127.0.0.1:7000", incarnation=incarnation)
    return pb.Member(
        endpoint=endpoint, kind=pb.MEMBER_KIND_ENGINE, host_id="h", labels=labels, started_unix_ms=1, pid=2
    )


async def register(registry, name: str, incarnation: str = A, ttl_ms: int = 10000, **labels: str) -> str:
    request = pb.RegisterRequest(member=member(name, incarnation, **labels), ttl_ms=ttl_ms)
    return (await registry.Register(request, timeout=5)).lease_id


async def read(call):
    async with asyncio.timeout(8):
        return await call.read()


async def watching(registry, *names: str):
    """A watch whose snapshot has just `names`: with etcd, what was registered shows a little later."""
    async with asyncio.timeout(8):
        while True:
            call = registry.Watch(pb.WatchRequest())
            first = await call.read()
            assert first.snapshot
            if {m.endpoint.name for m in first.present} == set(names):
                return call, first
            call.cancel()


async def code_of(awaitable) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value.code()


async def test_watch_gives_a_snapshot_then_each_change(registry):
    await register(registry, "e0", role="prefill")
    call, first = await watching(registry, "e0")
    assert list(first.present) == [member("e0", role="prefill")]
    lease = await register(registry, "e1")
    came = await read(call)
    assert not came.snapshot and list(came.present) == [member("e1")] and not came.left
    await registry.Deregister(pb.DeregisterRequest(lease_id=lease), timeout=5)
    left = await read(call)
    assert not left.snapshot and not left.present and list(left.left) == [member("e1").endpoint]
    await registry.Deregister(pb.DeregisterRequest(lease_id=lease), timeout=5)


async def test_a_lease_lasts_while_it_is_kept_alive_and_no_longer(registry):
    call, _ = await watching(registry)
    kept, left_alone = await register(registry, "kept", ttl_ms=2000), await register(registry, "silent", ttl_ms=2000)
    arrived: set[str] = set()
    while len(arrived) < 2:
        arrived |= {m.endpoint.name for m in (await read(call)).present}
    gone = asyncio.create_task(read(call))
    began = time.monotonic()
    while not gone.done():
        reply = await registry.KeepAlive(pb.KeepAliveRequest(lease_id=kept), timeout=5)
        assert reply.ttl_ms == 2000
        await asyncio.wait([gone], timeout=0.2)
    assert [e.name for e in gone.result().left] == ["silent"]
    assert time.monotonic() - began > 1.5
    missing = registry.KeepAlive(pb.KeepAliveRequest(lease_id=left_alone), timeout=5)
    assert await code_of(missing) is grpc.StatusCode.NOT_FOUND


async def test_another_incarnation_takes_the_place(registry):
    old = await register(registry, "e0", A, ttl_ms=1000)
    call, _ = await watching(registry, "e0")
    new = await register(registry, "e0", B)
    assert new != old
    change = await read(call)
    assert [m.endpoint.incarnation for m in change.present] == [B] and not change.left
    kept_alive = registry.KeepAlive(pb.KeepAliveRequest(lease_id=old), timeout=5)
    assert await code_of(kept_alive) is grpc.StatusCode.NOT_FOUND
    # Neither ending the old lease nor its running out takes the new member away.
    await registry.Deregister(pb.DeregisterRequest(lease_id=old), timeout=5)
    ahead = asyncio.ensure_future(read(call))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(ahead), 1.8)
    await register(registry, "marker")
    assert [m.endpoint.name for m in (await ahead).present] == ["marker"]
    await registry.KeepAlive(pb.KeepAliveRequest(lease_id=new), timeout=5)


async def test_the_same_incarnation_renews(registry):
    lease = await register(registry, "e0")
    call, _ = await watching(registry, "e0")
    assert await register(registry, "e0") == lease
    assert await register(registry, "e0", role="decode") == lease
    change = await read(call)
    assert list(change.present) == [member("e0", role="decode")]
    await registry.KeepAlive(pb.KeepAliveRequest(lease_id=lease), timeout=5)


async def test_a_snapshot_after_everybody_left_is_empty(registry):
    lease = await register(registry, "e0")
    await watching(registry, "e0")
    await registry.Deregister(pb.DeregisterRequest(lease_id=lease), timeout=5)
    await watching(registry)


@pytest.mark.parametrize("lease_id", ["", "junk", "0", "-1", "7fffffffffffffff", "f" * 40])
async def test_a_lease_that_never_was(registry, lease_id):
    kept_alive = registry.KeepAlive(pb.KeepAliveRequest(lease_id=lease_id), timeout=5)
    assert await code_of(kept_alive) is grpc.StatusCode.NOT_FOUND
    await registry.Deregister(pb.DeregisterRequest(lease_id=lease_id), timeout=5)


async def put(registry, key: str, value: str, if_revision: int | None = None) -> pb.Setting:
    request = pb.PutSettingRequest(key=key, value=value, if_revision=if_revision)
    return (await registry.PutSetting(request, timeout=5)).setting


async def get(registry, key: str) -> pb.Setting:
    return (await registry.GetSetting(pb.GetSettingRequest(key=key), timeout=5)).setting


async def test_settings_compare_and_swap(registry):
    assert await code_of(get(registry, "strategy")) is grpc.StatusCode.NOT_FOUND
    assert await code_of(put(registry, "strategy", "x", if_revision=5)) is grpc.StatusCode.ABORTED
    first = await put(registry, "strategy", "one", if_revision=0)
    assert first.revision >= 1 and await get(registry, "strategy") == first
    for wrong in (0, first.revision + 1, 2**64 - 1):
        assert await code_of(put(registry, "strategy", "x", if_revision=wrong)) is grpc.StatusCode.ABORTED
    second = await put(registry, "strategy", "two", if_revision=first.revision)
    third = await put(registry, "strategy", "three")
    assert first.revision < second.revision < third.revision
    assert await get(registry, "strategy") == third


async def test_of_many_swaps_one_wins(registry):
    base = await put(registry, "k", "base")
    results = await asyncio.gather(
        *(put(registry, "k", f"v{i}", if_revision=base.revision) for i in range(8)), return_exceptions=True
    )
    won = [r for r in results if isinstance(r, pb.Setting)]
    assert len(won) == 1 and await get(registry, "k") == won[0]
    lost = [r.code() for r in results if isinstance(r, grpc.aio.AioRpcError)]
    assert lost == [grpc.StatusCode.ABORTED] * 7


async def test_watch_setting(registry):
    early = registry.WatchSetting(pb.WatchSettingRequest(key="a/b"))
    await put(registry, "a/bc", "another key")
    first = await put(registry, "a/b", "one")
    assert (await read(early)).setting == first
    late = registry.WatchSetting(pb.WatchSettingRequest(key="a/b"))
    assert (await read(late)).setting == first
    changes = [await put(registry, "a/b", f"{i}") for i in range(5)]
    for call in (early, late):
        assert [(await read(call)).setting for _ in changes] == changes
