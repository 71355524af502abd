"""Stores on different hosts: the same protocol over gloo; checksums; cancels that do not wait for a dead peer."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
from store_harness import BLOCK, LAYOUT, KvNode, kv_node, prompt, until

from kvmesh.dataplane.base import CannotConnect
from kvmesh.dataplane.pair import PairReception
from kvmesh.errors import DataLoss, FailedPrecondition, InvalidArgument
from services.kvstore.cli import KvStoreConfig

# 2 MiB a block: far more than sockets hold.
BIG = dataclasses.replace(LAYOUT, layers=8, heads=8, k_dim=64, v_dim=64)


async def moved(a: KvNode, b: KvNode, tokens: list[int], value: int) -> Any:
    await a.fill(tokens, value)
    ticket = await b.prepare(tokens)
    reply = await a.send(tokens, ticket)
    assert b.content(tokens) == [value + i for i in range(len(tokens) // BLOCK)]
    assert await b.release(ticket)
    await until(lambda: b.stats.locked == 0)
    return reply


async def test_stores_on_different_hosts_use_gloo() -> None:
    async with kv_node("a", host="one") as a, kv_node("b", host="two") as b:
        assert a.status.info.transports == ["shm", "gloo"]
        for key in range(3):
            reply = await moved(a, b, prompt(2, key), 10 * key)
            assert (reply.transport, reply.sent_tokens) == ("gloo", 2 * BLOCK)
            assert reply.sent_bytes == 2 * BLOCK * LAYOUT.bytes_per_token
        # And the other way.
        assert (await moved(b, a, prompt(2, 7), 90)).transport == "gloo"
        # One connection served all of one direction.
        assert [len(node.holder._carrier._transports["gloo"]._inbound) for node in (a, b)] == [1, 1]  # type: ignore[attr-defined]


async def test_one_host_prefers_shared_memory_unless_told_otherwise() -> None:
    async with kv_node("a") as a, kv_node("b") as b:
        assert (await moved(a, b, prompt(2), 5)).transport == "shm"
    async with kv_node("a", transport="gloo") as a, kv_node("b") as b:
        assert (await moved(a, b, prompt(2), 5)).transport == "gloo"


async def test_memory_that_cannot_be_mapped_is_reached_by_gloo(caplog: pytest.LogCaptureFixture) -> None:
    async with kv_node("a") as a, kv_node("b") as b:

        def refuse(peer: object) -> Any:
            raise CannotConnect("no /proc here")

        a.holder._carrier._transports["shm"].connect = refuse  # type: ignore[method-assign]
        assert (await moved(a, b, prompt(2), 5)).transport == "gloo"
        assert "b is not reached through shm: no /proc here; asking for another way" in caplog.text


async def test_no_common_transport_is_refused_by_name() -> None:
    async with kv_node("a", host="one", transport="shm") as a, kv_node("b", host="two") as b:
        tokens = prompt(2)
        await a.fill(tokens, 1)
        with pytest.raises(FailedPrecondition, match="shm: sender and receiver are on different hosts"):
            await a.send(tokens, await b.prepare(tokens))


def test_settings_that_are_wrong() -> None:
    with pytest.raises(InvalidArgument, match="transport = 'tcp'"):
        KvStoreConfig(registry="127.0.0.1:1", transport="tcp")


@pytest.mark.parametrize("host", ["one", "two"], ids=["shm", "gloo"])
async def test_checksums(host: str) -> None:
    async with kv_node("a", host="one") as a, kv_node("b", host=host, checksum=True) as b:
        await moved(a, b, prompt(3), 40)
        # A transport that changes rows on the way.
        way = a.holder._carrier._transports["shm" if host == "one" else "gloo"]
        connect = way.connect

        def corrupting(peer: Any) -> Any:
            connection = connect(peer)
            write = connection.write
            connection.write = lambda source, target: write(np.roll(source, 1), target)  # type: ignore[method-assign]
            return connection

        way.connect = corrupting  # type: ignore[method-assign]
        a.holder.forget(b.holder.pools["shm"])
        tokens = prompt(2, 9)
        await a.fill(tokens, 70)
        ticket = await b.prepare(tokens)
        with pytest.raises(DataLoss, match="is not what was sent"):
            await a.send(tokens, ticket)
        # Nobody finds what is wrong.
        assert await b.match(tokens) == (0, 0)
        assert await b.release(ticket)
        await until(lambda: b.stats.locked == 0 and b.stats.memory_reserved == 0)


async def test_a_cancelled_send_does_not_wait_for_a_peer_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, reached = threading.Event(), threading.Event()

    def hang(self: PairReception, link: Any, at: int) -> int:
        reached.set()
        stuck.wait(20)
        raise RuntimeError("it hung")

    monkeypatch.setattr(PairReception, "_piece", hang)
    async with kv_node("a", layout=BIG, host="one") as a, kv_node("b", layout=BIG, host="two") as b:
        tokens = prompt(8)
        await a.fill(tokens, 1)
        ticket = await b.prepare(tokens)
        sending = asyncio.ensure_future(a.send(tokens, ticket))
        try:
            await until(reached.is_set)
            assert a.stats.sending == 1 and a.stats.locked == 8
            sending.cancel()
            # A frame may take 15 s: this does not.
            await until(lambda: a.stats.sending == 0 and a.stats.locked == 0)
        finally:
            stuck.set()
        await until(lambda: b.stats.locked == 0 and b.stats.memory_reserved == 0 and not b.stats.tickets)
        monkeypatch.undo()
        await moved(a, b, prompt(4, 3), 30)
