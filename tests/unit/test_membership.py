"""Membership, MeshWatch and SharedSettings against real registries that come and go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from kvmesh.errors import Aborted, DeadlineExceeded, InvalidArgument, Unavailable
from kvmesh.grpcx import channel
from kvmesh.membership import Backoff, Membership, MeshWatch, SharedSettings
from kvmesh.v1 import common_pb2
from kvmesh.v1 import registry_pb2 as pb
from services.registry.memory import MemoryBackend
from services.registry.server import serving


def member(name: str = "e0", incarnation: str = "a" * 32) -> pb.Member:
    endpoint = common_pb2.Endpoint(name=name, address="127.0.0.1:7000", incarnation=incarnation)
    return pb.Member(endpoint=endpoint, kind=pb.MEMBER_KIND_ENGINE)


def names(*wanted: str) -> Callable[[dict[str, pb.Member]], bool]:
    return lambda members: set(members) == set(wanted)


class Registry:
    """An embedded registry that a test stops and starts on one address."""

    def __init__(self) -> None:
        self.address = "127.0.0.1:0"
        self.backend = MemoryBackend()
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        self.backend = MemoryBackend()
        self.address = (await self._stack.enter_async_context(serving(self.backend, self.address))).address

    async def stop(self) -> None:
        await self._stack.aclose()


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    process = Registry()
    await process.start()
    yield process
    await process.stop()


async def until(condition: Callable[[], bool], timeout: float = 8) -> None:
    for _ in range(int(timeout / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise TimeoutError


async def test_a_member_comes_and_leaves(registry):
    changes: list[list[str]] = []
    watch = MeshWatch(registry.address, lambda members: changes.append(sorted(members)))
    one, two = Membership(registry.address, member("e0")), Membership(registry.address, member("e1"))
    watch.start()
    await one.start(timeout=5)
    assert one.connected
    await watch.wait_for(names("e0"), 5)
    before = watch.members
    await two.start(timeout=5)
    await watch.wait_for(names("e0", "e1"), 5)
    assert list(before) == ["e0"]
    await one.stop()
    assert not one.connected
    await watch.wait_for(names("e1"), 5)
    await two.stop()
    await watch.wait_for(names(), 5)
    assert changes == [["e0"], ["e0", "e1"], ["e1"], []] and watch.connected
    await watch.close()
    assert not watch.connected
    assert not registry.backend._held


async def test_a_member_outlives_its_lease_many_times_over(registry):
    membership, changes = Membership(registry.address, member(), ttl_ms=1000), []
    watch = MeshWatch(registry.address, lambda members: changes.append(set(members)))
    watch.start()
    await membership.start(timeout=5)
    with pytest.raises(DeadlineExceeded, match="members: e0"):
        await watch.wait_for(lambda members: len(changes) > 1, 2.5)
    await membership.stop()
    await watch.close()


async def test_everything_comes_back_after_the_registry_restarted(registry):
    seen: list[str] = []

    def on_change(members: dict[str, pb.Member]) -> None:
        seen.append(",".join(members))
        raise ValueError("a bug of the caller's")

    watch, membership = MeshWatch(registry.address, on_change), Membership(registry.address, member(), ttl_ms=1000)
    watch.start()
    await membership.start(timeout=5)
    await watch.wait_for(names("e0"), 5)
    await registry.stop()
    await until(lambda: not membership.connected and not watch.connected)
    assert set(watch.members) == {"e0"} and seen == ["e0"]
    await registry.start()
    await until(lambda: membership.connected and watch.connected)
    await watch.wait_for(names("e0"), 5)
    assert set(registry.backend._lease_of) == {"e0"}
    await membership.stop()
    await watch.wait_for(names(), 5)
    await watch.close()


async def test_a_snapshot_replaces_what_was_known(registry):
    watch, membership = MeshWatch(registry.address), Membership(registry.address, member("gone"))
    watch.start()
    await membership.start(timeout=5)
    await watch.wait_for(names("gone"), 5)
    await registry.stop()
    await membership.stop()
    assert set(watch.members) == {"gone"}
    await registry.start()
    await registry.backend.register(member("new"), 60000)
    await watch.wait_for(names("new"), 8)
    await watch.close()


async def test_who_is_missing_after_a_restart_is_waited_for(registry):
    seen: list[set[str]] = []
    watch = MeshWatch(registry.address, lambda members: seen.append(set(members)), patience=3.0)
    lives, gone = (Membership(registry.address, member(name, name * 32), ttl_ms=1000) for name in "ab")
    watch.start()
    for membership in (lives, gone):
        await membership.start(timeout=5)
    await watch.wait_for(names("a", "b"), 5)
    await registry.stop()
    await gone.stop()
    await until(lambda: not watch.connected)
    await registry.start()
    await until(lambda: watch.connected)
    await watch.wait_for(names("a"), 10)
    # Nobody was forgotten who lives.
    assert all("a" in members for members in seen)
    assert set(registry.backend._lease_of) == {"a"}
    await lives.stop()
    await watch.wait_for(names(), 5)
    await watch.close()


async def test_start_waits_for_the_registry_and_gives_up_in_time(registry):
    address = registry.address
    await registry.stop()
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"not registered within 0\.5 s"):
        await Membership(address, member()).start(timeout=0.5)
    assert time.monotonic() - began < 3
    membership = Membership(address, member())
    starting = asyncio.create_task(membership.start(timeout=20))
    await asyncio.sleep(0.3)
    await registry.start()
    await starting
    assert membership.connected
    await membership.stop()


async def test_a_member_that_is_refused_is_not_tried_again(registry):
    began = time.monotonic()
    with pytest.raises(InvalidArgument, match=r"member\.endpoint\.name = 'a b'"):
        await Membership(registry.address, member("a b")).start(timeout=20)
    assert time.monotonic() - began < 5


async def test_stop_does_not_mind_a_dead_registry(registry):
    membership = Membership(registry.address, member())
    await membership.start(timeout=5)
    await registry.stop()
    began = time.monotonic()
    await membership.stop()
    await membership.stop()
    assert time.monotonic() - began < 2.5


async def test_a_lost_lease_is_replaced(registry):
    membership = Membership(registry.address, member(), ttl_ms=1000)
    await membership.start(timeout=5)
    (lease,) = registry.backend._held
    await registry.backend.deregister(lease)
    await until(lambda: bool(registry.backend._held))
    assert lease not in registry.backend._held
    await membership.stop()


async def test_a_shared_channel_stays_open(registry):
    async with channel(registry.address) as ch:
        membership = Membership(registry.address, member(), channel=ch)
        watch, settings = MeshWatch(registry.address, channel=ch), SharedSettings(registry.address, channel=ch)
        watch.start()
        await membership.start(timeout=5)
        await watch.wait_for(names("e0"), 5)
        await membership.stop()
        await watch.close()
        assert await settings.get("k") is None
        await settings.close()
        assert await settings.get("k") is None


async def test_settings(registry):
    settings = SharedSettings(registry.address)
    first = await settings.put("k", "one", if_revision=0)
    assert await settings.get("k") == first
    with pytest.raises(Aborted, match="if_revision = 0"):
        await settings.put("k", "two", if_revision=0)
    with pytest.raises(InvalidArgument, match="key = 'K'"):
        await settings.get("K")
    with pytest.raises(InvalidArgument, match="key = 'K'"):
        await asyncio.wait_for(anext(settings.watch("K")), 5)
    await registry.stop()
    with pytest.raises(Unavailable, match=registry.address):
        await settings.get("k")
    await settings.close()


async def test_watching_a_setting_goes_on_after_a_restart(registry):
    settings = SharedSettings(registry.address)
    values = settings.watch("k")
    waiting = asyncio.ensure_future(anext(values))
    first = await settings.put("k", "one")
    assert await asyncio.wait_for(waiting, 5) == first
    waiting = asyncio.ensure_future(anext(values))
    await registry.stop()
    await registry.start()
    # The same value at the same revision is no news.
    await registry.backend.put_setting("k", "one", None)
    await registry.backend.put_setting("k", "two", None)
    assert (await asyncio.wait_for(waiting, 8)).value == "two"
    await values.aclose()
    await settings.close()
    await until(lambda: not registry.backend._mirror._followers())


def test_backoff_grows_to_its_limit_and_begins_anew():
    backoff = Backoff(first=0.1, most=1.0)
    delays = [backoff.delay() for _ in range(20)]
    assert 0.05 <= delays[0] <= 0.1 and all(0.5 <= d <= 1 for d in delays[5:])
    backoff.reset()
    assert backoff.delay() <= 0.1
