"""Send jobs inside the scheduler, and the copier beside it: real pools, real copies, a little scheduler."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_runtime import kv
from sglang_parts import (
    ENGINE_VARIABLE,
    Copier,
    EvictParams,
    MiniScheduler,
    Stream,
    _request,
    io_struct,
    layout_of,
    m,
)

from kvmesh.dataplane import ways
from kvmesh.dataplane.base import Connection, Pool, Reception, Transport, TwoSidedTransport
from kvmesh.dataplane.layout import Layout
from kvmesh.errors import Unavailable
from kvmesh.v1.common_pb2 import SamplingParams
from kvmesh.v1.kv_pb2 import KvPool

PROMPT = [(i * 37) % 200 + 1 for i in range(112)]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv(ENGINE_VARIABLE, f"{'0' * 32}:test")
    io_struct.hook_custom_types(*m.ALL)


class Ends:
    """A scheduler that sends and one whose pool is written into."""

    def __init__(self, page: int = 1) -> None:
        self.p, self.d = MiniScheduler(page=page), MiniScheduler(page=page)
        self.last = 0

    @property
    def peer(self) -> bytes:
        return self.d.agent.describe()["pools"]["shm"]

    def reserve(self, ids: Sequence[int], end: int) -> Any:
        self.last += 1
        rid = f"{self.last:016d}"
        self.d.receive(m.MeshReserve(rid=rid, ids=array("q", ids).tobytes(), end=end, wait=False))
        reserved = self.d.answer(rid)
        assert not reserved.error
        return reserved

    def send(self, ids: Sequence[int], begin: int, end: int, slots: bytes, peer: bytes | None = None) -> str:
        self.last += 1
        rid = f"{self.last:016d}"
        self.p.receive(
            m.MeshSend(
                rid=rid,
                ids=array("q", ids).tobytes(),
                begin=begin,
                end=end,
                transport="shm",
                peer=self.peer if peer is None else peer,
                slots=slots,
            )
        )
        return rid

    def arrived(self, ids: Sequence[int], begin: int, end: int, slots: bytes) -> bool:
        rows = np.frombuffer(slots, np.int64).tolist()
        return all(
            torch.equal(self.d.pool.k_buffer[i][rows], k) and torch.equal(self.d.pool.v_buffer[i][rows], v)
            for i, (k, v) in enumerate(kv(layout_of(self.d.pool), ids, begin, end))
        )

    def warm(self, ids: Sequence[int]) -> None:
        """p computes ids as part of some other request."""
        self.p.handle_generate_request(_request("w", [*ids, 0], SamplingParams(), 1))
        self.p.until(lambda: not self.p.waiting_queue and self.p.chunked_req is None)

    def idle(self) -> None:
        assert self.p.agent._sends.count == 0
        self.p.step()
        self.p.all_free()

    def close(self) -> None:
        for s in (self.p, self.d):
            s.agent._copier.forget(self.peer)
        time.sleep(0.01)
        for s in (self.p, self.d):
            s.close()


@pytest.fixture(params=[1, 16], ids=["page 1", "page 16"])
def ends(request):
    made = Ends(request.param)
    yield made
    made.close()


def test_a_cold_send(ends):
    reserved = ends.reserve(PROMPT, 96)
    sent = ends.p.answer(ends.send(PROMPT, 0, 96, reserved.slots))
    assert (sent.error, sent.aborted, sent.cached, sent.computed) == ("", False, 0, 96)
    assert ends.arrived(PROMPT, 0, 96, reserved.slots) and ends.p.holds(PROMPT, 96)
    assert 0 < sent.began <= sent.prefilled
    pieces = np.array(sent.pieces).reshape(-1, 4)
    # Chunk by chunk.
    assert pieces[:, 2].tolist() == [32, 32, 32]
    assert (pieces[:, 1] >= pieces[:, 0]).all() and (pieces[1:, 0] >= pieces[:-1, 1]).all()
    assert pieces[:, 3].sum() == 96 * layout_of(ends.p.pool).bytes_per_token
    ends.idle()


def test_copies_overlap_with_computing(ends):
    """The first chunk has arrived before the last one is computed."""
    reserved = ends.reserve(PROMPT, 96)
    rid = ends.send(PROMPT, 0, 96, reserved.slots)
    ends.p.step()
    ends.p.step()
    assert ends.p.chunked_req is not None and not told(ends.p, rid)
    first = reserved.slots[: 32 * 8]
    deadline = time.monotonic() + 10
    while not ends.arrived(PROMPT, 0, 32, first):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    sent = ends.p.answer(rid)
    assert sent.pieces[0] < sent.prefilled
    ends.idle()


def test_a_send_of_what_is_cached_runs_no_model(ends):
    ends.warm(PROMPT[:96])
    reserved = ends.reserve(PROMPT, 96)
    rid = ends.send(PROMPT, 0, 96, reserved.slots)
    assert not ends.p.waiting_queue and ends.p.chunked_req is None
    sent = ends.p.answer(rid)
    assert (sent.error, sent.cached, sent.computed) == ("", 96, 0) and sent.began == sent.prefilled > 0
    assert len(sent.pieces) == 4 and ends.arrived(PROMPT, 0, 96, reserved.slots)
    ends.idle()


def test_a_send_waits_its_turn_where_memory_is_short(ends):
    """What it would lock is what a prompt in chunks will need: SGLang would end."""
    ends.warm(PROMPT[:96])
    ends.p.handle_generate_request(_request("long", [3] * 224, SamplingParams(), 1))
    ends.p.step()
    assert ends.p.chunked_req is not None
    reserved = ends.reserve(PROMPT, 96)
    rid = ends.send(PROMPT, 0, 96, reserved.slots)
    assert [r.rid for r in ends.p.waiting_queue] == [rid]
    sent = ends.p.answer(rid)
    assert sent.error == "" and ends.arrived(PROMPT, 0, 96, reserved.slots)
    assert sent.cached + sent.computed == 96 and sent.computed > 0
    ends.idle()


def test_a_send_of_which_part_is_cached(ends):
    ends.warm(PROMPT[:48])
    reserved = ends.reserve(PROMPT, 96)
    sent = ends.p.answer(ends.send(PROMPT, 0, 96, reserved.slots))
    assert (sent.error, sent.cached, sent.computed) == ("", 48, 48)
    assert ends.arrived(PROMPT, 0, 96, reserved.slots)
    ends.idle()


@pytest.mark.parametrize(("begin", "end"), [(32, 96), (80, 96), (0, 16), (96, 96), (0, 0), (48, 48)])
def test_only_the_range_is_sent(ends, begin, end):
    reserved = ends.reserve(PROMPT, 96)
    target = np.frombuffer(reserved.slots, np.int64)[begin:end]
    before = [b.clone() for b in (*ends.d.pool.k_buffer, *ends.d.pool.v_buffer)]
    sent = ends.p.answer(ends.send(PROMPT, begin, end, target.tobytes()))
    assert sent.error == "" and sum(sent.pieces[2::4]) == end - begin
    assert ends.arrived(PROMPT, begin, end, target.tobytes())
    others = [r for r in range(len(before[0])) if r not in set(target.tolist())]
    for after, was in zip((*ends.d.pool.k_buffer, *ends.d.pool.v_buffer), before, strict=True):
        assert torch.equal(after[others], was[others])
    ends.idle()


def test_what_arrived_is_found_once_published(ends):
    reserved = ends.reserve(PROMPT, 96)
    ends.p.answer(ends.send(PROMPT, 0, 96, reserved.slots))
    assert not ends.d.holds(PROMPT, 96)
    ends.d.receive(m.MeshPublish(rid="p", ticket=reserved.ticket, upto=96))
    assert ends.d.answer("p").error == "" and ends.d.holds(PROMPT, 96)
    ends.d.receive(m.MeshFree(rid="f", ticket=reserved.ticket))
    ends.d.step()
    ends.d.all_free()


def test_several_at_once(ends):
    prompts = [[k, *PROMPT[1:48]] for k in (1, 2, 3)]
    reserved = [ends.reserve(ids, 48) for ids in prompts]
    rids = [ends.send(ids, 0, 48, r.slots) for ids, r in zip(prompts, reserved, strict=True)]
    for ids, r, rid in zip(prompts, reserved, rids, strict=True):
        assert ends.p.answer(rid).error == "" and ends.arrived(ids, 0, 48, r.slots)
    ends.idle()


# Ends before the end


class Held:
    """Copies that wait for the test's word, one by one."""

    def __init__(self, ends: Ends, monkeypatch: Any) -> None:
        self.writing, self.go = threading.Semaphore(0), threading.Semaphore(0)
        from kvmesh.dataplane.shm import ShmConnection

        write = ShmConnection.write

        def held(connection: Any, source: Any, target: Any) -> int:
            self.writing.release()
            assert self.go.acquire(timeout=10)
            return write(connection, source, target)

        monkeypatch.setattr(ShmConnection, "write", held)
        self.ends = ends

    def reached(self) -> None:
        """Turns of the scheduler until a copy is under way."""
        self.ends.p.until(lambda: self.writing.acquire(blocking=False))

    def all(self) -> None:
        self.go.release(100)


def told(s: MiniScheduler, rid: str) -> bool:
    return any(getattr(t, "rid", None) == rid and type(t) is m.MeshSent for t in s.told)


def test_cancelled_while_it_waits(ends):
    reserved = ends.reserve(PROMPT, 96)
    rid = ends.send(PROMPT, 0, 96, reserved.slots)
    ends.p.receive(m.MeshCancelSend(rid=rid))
    ends.p.until(lambda: told(ends.p, rid))
    (sent,) = [t for t in ends.p.told if type(t) is m.MeshSent]
    assert sent.aborted and sent.error == "cancelled" and sent.pieces == []
    ends.idle()


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_cancelled_between_chunks(ends, turns, drop):
    ends.p.drop_aborted = drop
    reserved = ends.reserve(PROMPT, 96)
    rid = ends.send(PROMPT, 0, 96, reserved.slots)
    for _ in range(turns):
        ends.p.step()
    ends.p.receive(m.MeshCancelSend(rid=rid))
    ends.p.until(lambda: told(ends.p, rid))
    sent = [t for t in ends.p.told if type(t) is m.MeshSent]
    assert len(sent) == 1 and (sent[0].aborted or turns == 3)
    ends.idle()


@pytest.mark.parametrize("drop", [False, True])
def test_cancelled_during_a_copy_it_is_answered_after_it(ends, monkeypatch, drop):
    """Who hears the answer gives the slots to others: nothing may be written any more."""
    ends.p.drop_aborted = drop
    held = Held(ends, monkeypatch)
    reserved = ends.reserve(PROMPT, 96)
    rid = ends.send(PROMPT, 0, 96, reserved.slots)
    held.reached()
    ends.p.receive(m.MeshCancelSend(rid=rid))
    for _ in range(10):
        ends.p.step()
    assert not told(ends.p, rid) and ends.p.agent.busy
    held.all()
    ends.p.until(lambda: told(ends.p, rid))
    (sent,) = [t for t in ends.p.told if type(t) is m.MeshSent]
    assert sent.aborted and sent.error == "cancelled"
    # What was handed over and not begun was never copied.
    assert sum(sent.pieces[2::4]) < 96
    ends.idle()


def test_cancelled_when_all_is_computed_but_not_copied(ends, monkeypatch):
    ends.warm(PROMPT[:96])
    held = Held(ends, monkeypatch)
    reserved = ends.reserve(PROMPT, 96)
    rid = ends.send(PROMPT, 0, 96, reserved.slots)
    held.reached()
    # Its source cannot go meanwhile.
    ends.p.tree_cache.evict(EvictParams(num_tokens=256))
    assert ends.p.holds(PROMPT, 96)
    ends.p.receive(m.MeshCancelSend(rid=rid))
    ends.p.receive(m.MeshCancelSend(rid=rid))
    assert not told(ends.p, rid)
    held.all()
    ends.p.until(lambda: told(ends.p, rid))
    assert len([t for t in ends.p.told if type(t) is m.MeshSent]) == 1
    ends.idle()


def test_a_cancel_that_comes_late_is_no_matter(ends):
    reserved = ends.reserve(PROMPT, 96)
    rid = ends.send(PROMPT, 0, 96, reserved.slots)
    ends.p.answer(rid)
    ends.p.receive(m.MeshCancelSend(rid=rid))
    ends.p.receive(m.MeshCancelSend(rid="nobody"))
    assert len([t for t in ends.p.told if type(t) is m.MeshSent]) == 1
    ends.idle()


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2])
def test_sglang_aborts_the_prefill(ends, turns, drop):
    """It may do so for its own reasons, and may drop the request without a result: the job is answered all the same."""
    ends.p.drop_aborted = drop
    reserved = ends.reserve(PROMPT, 96)
    rid = ends.send(PROMPT, 0, 96, reserved.slots)
    for _ in range(turns):
        ends.p.step()
    ends.p.abort_request(io_struct.AbortReq(rid=rid))
    ends.p.until(lambda: told(ends.p, rid))
    (sent,) = [t for t in ends.p.told if type(t) is m.MeshSent]
    assert sent.aborted and "bort" in sent.error
    ends.idle()


def test_an_abort_of_somebody_else_does_not_end_the_job(ends):
    reserved = ends.reserve(PROMPT, 96)
    rid = ends.send(PROMPT, 0, 96, reserved.slots)
    ends.p.handle_generate_request(_request("z", [5] * 20, SamplingParams(), 1))
    ends.p.step()
    ends.p.abort_request(io_struct.AbortReq(rid="z"))
    assert ends.p.answer(rid).error == "" and ends.arrived(PROMPT, 0, 96, reserved.slots)
    ends.idle()


def test_a_peer_that_cannot_be_reached(ends):
    reserved = ends.reserve(PROMPT, 96)
    gone = KvPool.FromString(ends.peer)
    gone.fd = 9999
    sent = ends.p.answer(ends.send(PROMPT, 0, 96, reserved.slots, gone.SerializeToString(deterministic=True)))
    assert sent.error.startswith("CannotConnect: ") and sent.unconnected and not sent.aborted
    # The prefill was not for nothing.
    assert ends.p.holds(PROMPT, 96)
    ends.idle()


def test_a_transport_that_is_not_there(ends):
    reserved = ends.reserve(PROMPT, 96)
    rid = ends.send(PROMPT, 0, 96, reserved.slots)
    ends.p.agent._sends._jobs[rid].stream.transport = "nccl"
    assert "nccl" in ends.p.answer(rid).error
    ends.idle()


def test_the_job_keeps_the_cache_from_being_flushed(ends, monkeypatch):
    held = Held(ends, monkeypatch)
    reserved = ends.reserve(PROMPT, 96)
    rid = ends.send(PROMPT, 0, 96, reserved.slots)
    held.reached()
    ends.p.receive(m.MeshFlush(rid="f"))
    assert ends.p.answer("f").error
    held.all()
    assert ends.p.answer(rid).error == ""
    ends.p.receive(m.MeshFlush(rid="g"))
    assert ends.p.answer("g").error == ""
    ends.idle()


# The copier


class PlayedTransport(Transport):
    name = "played"

    def __init__(self) -> None:
        self.opened: list[int] = []
        self.closed: list[int] = []
        self.fail: set[int] = set()
        self.wrote: list[tuple[int, int]] = []
        self.connecting = threading.Event()
        self.connecting.set()

    def describe(self) -> KvPool:
        return KvPool()

    def connect(self, peer: KvPool) -> Connection:
        assert self.connecting.wait(10)
        if peer.fd in self.fail:
            raise Unavailable("not there")
        self.opened.append(peer.fd)
        return PlayedConnection(self, peer.fd)


class PlayedTwoSided(PlayedTransport, TwoSidedTransport):
    def accept(self, *_: Any) -> Reception:
        raise AssertionError("only sent through")


class PlayedConnection(Connection):
    def __init__(self, transport: PlayedTransport, fd: int) -> None:
        self.transport, self.fd = transport, fd

    def write(self, source: Any, target: Any) -> int:
        if self.fd in self.transport.fail:
            raise Unavailable("gone")
        self.transport.wrote.append((self.fd, len(source)))
        return len(source)

    def close(self) -> None:
        self.transport.closed.append(self.fd)


class Bench:
    """A copier and its scheduler's side."""

    def __init__(self, transport: PlayedTransport | None = None) -> None:
        self.transport, self.awake = transport or PlayedTransport(), threading.Event()
        pool = Pool(Layout("0" * 32, "float32", 1, 1, 1, 1, 1), [], [])
        self.copier = Copier({"played": self.transport}, pool, self.awake.set)

    def stream(self, fd: int) -> Stream:
        return Stream("played", KvPool(fd=fd).SerializeToString(deterministic=True))

    def submit(self, stream: Stream, count: int = 3) -> None:
        rows = np.arange(count)
        self.copier.submit(stream, rows, rows)

    def wait(self, *streams: Stream) -> None:
        deadline = time.monotonic() + 10
        while not all(s.idle for s in streams):
            assert time.monotonic() < deadline
            self.awake.wait(0.1)
            self.awake.clear()
            self.copier.finished()


def test_copies_are_done_in_order_and_counted():
    bench = Bench()
    one, two = bench.stream(1), bench.stream(2)
    for stream, count in ((one, 3), (two, 5), (one, 7)):
        bench.submit(stream, count)
    assert not one.idle
    bench.wait(one, two)
    assert bench.transport.wrote == [(1, 3), (2, 5), (1, 7)] and bench.transport.opened == [1, 2]
    assert one.pieces[2::4] == [3, 7] and one.pieces[3::4] == [3, 7] and not one.error


def test_a_failure_is_the_streams_own_and_the_next_one_connects_anew():
    bench = Bench()
    bad, good = bench.stream(1), bench.stream(2)
    bench.submit(bad)
    bench.wait(bad)
    bench.transport.fail.add(1)
    for stream in (bad, bad, good):
        bench.submit(stream)
    bench.wait(bad, good)
    assert bad.error == "Unavailable: gone" and not good.error
    assert bench.transport.closed == [1]
    bench.transport.fail.clear()
    again = bench.stream(1)
    bench.submit(again)
    bench.wait(again)
    assert not again.error and bench.transport.opened == [1, 2, 1]


def test_what_is_cancelled_is_not_copied():
    bench = Bench()
    stream = bench.stream(1)
    stream.cancelled = True
    bench.submit(stream)
    bench.wait(stream)
    assert bench.transport.wrote == [] and bench.transport.opened == [] and not stream.error


def test_a_cancel_does_not_wait_for_a_peer_that_cannot_be_reached():
    """Connecting to a dead host takes its time; nothing is being written meanwhile."""
    bench = Bench(PlayedTwoSided())
    bench.transport.connecting.clear()
    stream = bench.stream(1)
    bench.copier.open(stream)
    bench.submit(stream)
    bench.copier.cancel(stream)
    bench.submit(stream)
    bench.wait(stream)
    bench.copier.close(stream)
    bench.transport.connecting.set()
    # The connection is let go of once it is there.
    deadline = time.monotonic() + 10
    while bench.transport.closed != [1]:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert bench.transport.wrote == [] and bench.transport.opened == [1] and not stream.error


def test_a_peer_is_forgotten_after_what_was_submitted():
    bench = Bench()
    stream = bench.stream(1)
    bench.submit(stream)
    bench.copier.forget(stream.peer)
    bench.copier.forget(stream.peer)
    other = bench.stream(2)
    bench.submit(other)
    bench.wait(stream, other)
    assert bench.transport.wrote == [(1, 3), (2, 3)] and bench.transport.closed == [1]


def test_only_so_many_ways_are_kept_open(monkeypatch):
    monkeypatch.setattr(ways, "MOST", 3)
    bench = Bench()
    streams = [bench.stream(fd) for fd in (1, 2, 3, 1, 4, 5)]
    for stream in streams:
        bench.submit(stream)
    bench.wait(*streams)
    assert bench.transport.opened == [1, 2, 3, 4, 5]
    # Those least lately used.
    assert bench.transport.closed == [2, 3]


def test_real_mappings_come_and_go(ends):
    def maps() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:kvmesh-")

    before = maps()
    reserved = ends.reserve(PROMPT, 96)
    ends.p.answer(ends.send(PROMPT, 0, 96, reserved.slots))
    assert maps() == before + 1
    ends.p.receive(m.MeshForgetPeer(rid="x", peer=ends.peer))
    deadline = time.monotonic() + 5
    while maps() != before:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    # It is opened again when needed.
    other = ends.reserve([9, *PROMPT], 96)
    assert ends.p.answer(ends.send([9, *PROMPT], 0, 96, other.slots)).error == ""
    assert maps() == before + 1
