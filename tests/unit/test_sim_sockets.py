"""Simulated KV between processes and hosts: the way there, who may write, and what a broken write leaves."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from sim_harness import SimHarness, reference

from kvmesh.dataplane.base import CannotConnect
from kvmesh.errors import Aborted
from kvmesh.grpcx import split_address
from kvmesh.sim.links import Link
from kvmesh.sim.peers import Inbox
from kvmesh.sim.profile import load_profile
from kvmesh.sim.sockets import HELLO, SocketPeers
from kvmesh.v1 import engine_pb2, kv_pb2
from kvmesh.v1.kv_pb2 import KvPool
from services.engine.sim.kv import KvCache

WAYS = ("sim", "sim_tcp")


@asynccontextmanager
async def both(
    rate: float = 1e9, host: str = "127.0.0.1"
) -> AsyncIterator[tuple[KvCache, dict[str, KvPool], SocketPeers]]:
    """(a receiver's cache of 10 slots, its pool by each way, a sender)."""
    cache, receiver, sender = KvCache(10), SocketPeers(host), SocketPeers()
    pools = await receiver.open(Inbox(cache, Link(rate, time.monotonic)), load_profile("tiny-cpu").layout, 11)
    try:
        yield cache, {name: pool[0] for name, pool in pools.items()}, sender
    finally:
        await sender.close()
        await receiver.close()


def values(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


@pytest.mark.parametrize("way", WAYS)
def test_kv_crosses_under_uvloop(way: str) -> None:
    """What engines run under; it connects to sockets without a file in its own way."""
    uvloop = pytest.importorskip("uvloop")

    async def main() -> list[int]:
        async with both() as (cache, pools, sender):
            for chunk in (values(7, 8), values(9, 10)):
                await sender.write(pools[way], np.array([3, 5]), chunk, 1000)
            assert [len(streams) for streams in sender._idle.values()] == [1]
            return cache.values[[3, 4, 5]].tolist()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == [9, 0, 10]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("secret", ["", "0" * 32, "0" * 31, "0" * 4000])
async def test_who_does_not_know_the_secret_writes_nothing(way: str, secret: str) -> None:
    async with both() as (cache, pools, sender):
        pool, wrong = pools[way], KvPool()
        wrong.CopyFrom(pool)
        wrong.meeting.pair = secret
        with patch("kvmesh.sim.sockets.CONNECT_S", 0.3), pytest.raises(CannotConnect):
            await sender.write(wrong, np.array([3]), values(7), 10)
        assert not cache.values.any()
        # Whoever knows it still can.
        await sender.write(pool, np.array([3]), values(7), 10)
        assert cache.values[3] == 7


async def test_nothing_is_taken_before_the_greeting() -> None:
    async with both() as (cache, pools, _):
        for greeting in (b"", b"x" * len(HELLO), HELLO):
            reader, writer = await asyncio.open_connection(*split_address(pools["sim_tcp"].meeting.address))
            writer.write(greeting + b"\0" * 4096)
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                async with asyncio.timeout(10):
                    await reader.readexactly(1)
            writer.close()
        assert not cache.values.any()


@pytest.mark.parametrize("way", WAYS)
async def test_a_chunk_that_does_not_fit_is_refused(way: str) -> None:
    async with both() as (cache, pools, sender):
        for slots in ([0], [11], [-1], list(range(11))):
            with pytest.raises(Aborted):
                await sender.write(pools[way], np.array(slots), values(*range(1, len(slots) + 1)), 10)
        assert not cache.values.any()


@pytest.mark.parametrize("way", WAYS)
async def test_what_is_given_up_does_not_arrive(way: str) -> None:
    # 1,000 bytes take a second.
    async with both(rate=1e3) as (cache, pools, sender):
        writing = asyncio.ensure_future(sender.write(pools[way], np.array([3]), values(7), 1000))
        await asyncio.sleep(0.1)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        # The receiver's part is over by now: its link is free for the next, which takes as long as it takes alone.
        assert not cache.values.any()
        await sender.write(pools[way], np.array([4]), values(8), 1)
        assert cache.values[[3, 4]].tolist() == [0, 8]


@pytest.mark.parametrize("way", WAYS)
async def test_a_receiver_that_is_gone_is_told_by_name_and_its_connections_are_let_go(way: str) -> None:
    sender = SocketPeers()
    for _ in range(3):
        async with both() as (_cache, pools, _sender):
            await sender.write(pools[way], np.array([3]), values(7), 10)
        with pytest.raises((CannotConnect, Aborted), match="receiver"):
            await sender.write(pools[way], np.array([3]), values(7), 10)
    with pytest.raises(CannotConnect, match="cannot be reached"):
        await sender.write(pools[way], np.array([3]), values(7), 10)
    assert not any(sender._idle.values())
    await sender.close()


async def test_closing_leaves_no_task_behind() -> None:
    async with both() as (_, pools, sender):
        for way in WAYS:
            await sender.write(pools[way], np.array([3]), values(7), 10)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_without_an_address_of_this_machine_there_is_no_tcp() -> None:
    # TEST-NET-1: nobody's.
    for host in ("192.0.2.1", ""):
        async with both(host=host) as (_, pools, _sender):
            assert list(pools) == ["sim"]


async def disaggregated(h: SimHarness, prompt: list[int]) -> tuple[list[int], str]:
    """(tokens, transport) of a prefill on engine 0 and a decode on engine 1, without the router."""
    (sender, _), (receiver, engine) = h.stubs
    prepare = kv_pb2.PrepRecvRequest(token_ids=prompt, end=-1)
    ticket = (await receiver.PrepRecv(prepare, timeout=10)).ticket
    send = kv_pb2.RemoteSendRequest(token_ids=prompt, begin=0, end=-1, ticket=ticket)
    sent = await sender.RemoteSend(send, timeout=10)
    request = engine_pb2.StartGenerateRequest(token_ids=prompt, begin=len(prompt) - 1, ticket=ticket)
    request.sampling.max_new_tokens, request.sampling.temperature = 5, 0
    tokens: list[int] = []
    async for message in engine.StartGenerate(request, timeout=10):
        tokens += message.chunk.token_ids
    return tokens, sent.transport


async def test_engines_of_different_hosts_take_tcp(tmp_path: Path) -> None:
    prompt = list(range(20, 120))
    hosts = itertools.cycle(["a"] * 3 + ["b"] * 3)
    with patch("services.engine.main.host_id", lambda: next(hosts)):
        async with SimHarness(2, tmp=tmp_path) as h:
            assert await disaggregated(h, prompt) == (reference(prompt, 5), "sim_tcp")


async def test_a_shared_dev_shm_without_a_shared_network_takes_tcp_in_the_end(tmp_path: Path) -> None:
    """As in containers with one /dev/shm: the Unix socket cannot be reached, and the sender asks for another way."""
    prompt = list(range(20, 120))

    async def nobody(name: str) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    with patch("kvmesh.sim.sockets._near", nobody):
        async with SimHarness(2, tmp=tmp_path) as h:
            assert await disaggregated(h, prompt) == (reference(prompt, 5), "sim_tcp")


async def test_engines_of_one_host_take_the_socket(tmp_path: Path) -> None:
    async with SimHarness(2, tmp=tmp_path) as h:
        assert (await disaggregated(h, list(range(20, 120))))[1] == "sim"
