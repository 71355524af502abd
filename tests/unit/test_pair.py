"""Two-sided transports over real gloo: two pools, threads, sockets of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from kvmesh.dataplane.base import CannotConnect, Pool
from kvmesh.dataplane.checksum import checksum
from kvmesh.dataplane.gloo import GlooLinks
from kvmesh.dataplane.layout import ITEM_BYTES, Layout
from kvmesh.dataplane.link import IdleLinks, Link
from kvmesh.dataplane.pair import PairConnection, PairTransport, Patience
from kvmesh.dataplane.staging import Frame, FramePool, frame_rows
from kvmesh.errors import InvalidArgument, Unavailable
from kvmesh.v1.kv_pb2 import KvPool

HOST = "127.0.0.1"
LAYOUT = Layout("d" * 32, "float32", layers=3, heads=2, k_dim=4, v_dim=6, page_size=1)
ROWS = 400


def pool(layout: Layout, seed: int, rows: int = ROWS) -> Pool:
    """Random numbers everywhere."""
    draw = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, layout.dtype)

    def part(dim: int) -> torch.Tensor:
        return torch.randint(-99, 99, (rows, layout.heads, dim), generator=draw).to(dtype)

    return Pool(
        layout,
        [part(layout.k_dim) for _ in range(layout.layers)],
        [part(layout.v_dim) for _ in range(layout.layers)],
    )


def some(seed: int, count: int, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(seed).permutation(rows - 1)[:count] + 1


@dataclass
class Arriving:
    """One accepted write."""

    over: threading.Event = field(default_factory=threading.Event)
    errors: list[str] = field(default_factory=list)

    def done(self, error: str) -> None:
        self.errors.append(error)
        self.over.set()

    def result(self, timeout: float = 10.0) -> str:
        assert self.over.wait(timeout), "it did not end"
        assert len(self.errors) == 1
        return self.errors[0]


class Ends:
    """A receiver and a sender in this process. Frames of 16 rows, so that a piece has several."""

    def __init__(self, layout: Layout = LAYOUT, stall: float = 1.0) -> None:
        self.ours, self.theirs = pool(layout, 1), pool(layout, 2)
        self.sender, self.receiver = (
            PairTransport(p, GlooLinks(HOST), HOST, Patience(2.0, stall)) for p in (self.ours, self.theirs)
        )
        for t in (self.sender, self.receiver):
            t._frames_in, t._frames_out = FramePool(layout, 16, 2), FramePool(layout, 16, 2)
        self.number = 0

    def peer(self, fresh: bool = True) -> KvPool:
        """The receiver's pool for the next write, or for another one over the last connection."""
        self.number += fresh
        peer = self.receiver.describe()
        peer.meeting.pair += f"/{self.number}"
        peer.meeting.fresh = fresh
        return peer

    def accept(self, peer: KvPool, slots: np.ndarray, seconds: float = 10.0):
        arriving = Arriving()
        return arriving, self.receiver.accept(peer.meeting, slots, seconds, arriving.done)

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()

    def check(self, before: Pool, source: np.ndarray, target: np.ndarray) -> None:
        """The rows are there, and no other has changed."""
        parts = zip(
            self.ours.keys + self.ours.values,
            self.theirs.keys + self.theirs.values,
            before.keys + before.values,
            strict=True,
        )
        for ours, theirs, old in parts:
            expected = old.clone()
            expected[target] = ours[source]
            assert torch.equal(theirs, expected)


def copy_of(p: Pool) -> Pool:
    return Pool(p.layout, [t.clone() for t in p.keys], [t.clone() for t in p.values])


@pytest.fixture
def ends() -> Iterator[Ends]:
    both = Ends()
    yield both
    both.close()


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("shape", ["scattered", "runs"])
def test_rows_arrive_where_they_belong(dtype, shape):
    layout = Layout("d" * 32, dtype, layers=3, heads=2, k_dim=4, v_dim=6, page_size=1)
    both = Ends(layout)
    try:
        for i, count in enumerate((1, 15, 16, 17, 100)):
            if shape == "scattered":
                source, target = some(i, count), some(i + 50, count)
            else:
                source, target = np.arange(5, 5 + count), np.arange(200, 200 + count)
            before, peer = copy_of(both.theirs), both.peer()
            arriving, _ = both.accept(peer, target)
            connection = both.sender.connect(peer)
            # In two pieces, as chunks of a prefill come.
            half = count // 2
            sent = sum(connection.write(source[a:b], target[a:b]) for a, b in ((0, half), (half, count)) if b > a)
            connection.close()
            assert arriving.result() == ""
            assert sent == count * layout.bytes_per_token
            both.check(before, source, target)
            assert checksum(both.ours, source) == checksum(both.theirs, target)
    finally:
        both.close()


def test_a_connection_serves_write_after_write(ends):
    for i in range(5):
        peer, target = ends.peer(fresh=i == 0), some(i, 40)
        before = copy_of(ends.theirs)
        arriving, _ = ends.accept(peer, target)
        connection = ends.sender.connect(peer)
        connection.write(some(i + 9, 40), target)
        connection.close()
        assert arriving.result() == ""
        ends.check(before, some(i + 9, 40), target)
    assert len(ends.receiver._inbound) == len(ends.sender._outbound) == 1


def test_many_writes_at_once(ends):
    slots = np.arange(1, ROWS)
    np.random.default_rng(0).shuffle(slots)
    before, parts = copy_of(ends.theirs), np.split(slots[:384], 8)
    peers = [ends.peer() for _ in parts]
    arrivings = [ends.accept(peer, part)[0] for peer, part in zip(peers, parts, strict=True)]

    def send(peer: KvPool, part: np.ndarray) -> None:
        connection = ends.sender.connect(peer)
        connection.write(part, part)
        connection.close()

    threads = [threading.Thread(target=send, args=pair) for pair in zip(peers, parts, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    # More at once than there is staging memory: they took turns.
    assert [arriving.result() for arriving in arrivings] == [""] * 8
    ends.check(before, slots[:384], slots[:384])


def test_a_connection_that_the_sender_does_not_have(ends):
    peer = ends.peer()
    peer.meeting.fresh = False
    with pytest.raises(CannotConnect, match="earlier write is not there"):
        ends.sender.connect(peer)


def test_a_connection_that_the_receiver_does_not_have(ends):
    peer = ends.peer()
    peer.meeting.fresh = False
    assert "earlier write is not there" in ends.accept(peer, some(1, 3))[0].result()


def test_another_layout_is_refused(ends):
    other = Ends(Layout("d" * 32, "float32", layers=3, heads=1, k_dim=4, v_dim=6, page_size=1))
    try:
        with pytest.raises(InvalidArgument, match="another layout: heads is 1 there and 2 here"):
            ends.sender.connect(other.peer())
    finally:
        other.close()


def test_nobody_to_connect_to(ends):
    peer = ends.peer()
    # A receiver that does not accept.
    began = time.monotonic()
    with pytest.raises(CannotConnect, match=r"gloo to 127\.0\.0\.1:"):
        ends.sender.connect(peer)
    assert time.monotonic() - began < 10
    peer.meeting.address = "127.0.0.1:1"
    with pytest.raises(CannotConnect):
        ends.sender.connect(peer)


def test_an_address_that_is_not_ours():
    with pytest.raises(CannotConnect):
        GlooLinks("203.0.113.7")
    with pytest.raises(CannotConnect, match=r"203\.0\.113\.7"):
        PairTransport(pool(LAYOUT, 1), GlooLinks(HOST), "203.0.113.7")


def test_cancelled_before_the_sender_comes(ends):
    arriving, reception = ends.accept(ends.peer(), some(1, 5), seconds=60)
    reception.cancel()
    assert "cancelled" in arriving.result(3)


@pytest.mark.parametrize("when", ["between pieces", "within a frame"])
def test_cancelled_while_it_is_written(ends, when):
    target, peer = some(3, 100), ends.peer()
    arriving, reception = ends.accept(peer, target)
    connection = ends.sender.connect(peer)
    connection.write(target[:32], target[:32])
    if when == "within a frame":
        # A header whose frame does not follow.
        connection._link.send_header([0x6B766D657368, 16, 0]).wait(time.monotonic() + 5)
    reception.cancel()
    before = copy_of(ends.theirs)
    assert arriving.result(3) != ""
    with pytest.raises(Unavailable):
        connection.write(target[32:], target[32:])
    connection.close()
    for after, was in zip(ends.theirs.keys, before.keys, strict=True):
        assert torch.equal(after, was)
    assert len(ends.receiver._inbound) == len(ends.sender._outbound) == 0


def test_a_sender_that_stops_in_a_frame_ends_in_its_deadline(ends):
    peer = ends.peer()
    arriving, _ = ends.accept(peer, some(3, 100), seconds=60)
    connection = ends.sender.connect(peer)
    connection._link.send_header([0x6B766D657368, 16, 0]).wait(time.monotonic() + 5)
    began = time.monotonic()
    assert arriving.result(5) != ""
    assert 0.5 < time.monotonic() - began < 4


def test_a_sender_that_says_nothing_ends_with_the_ticket(ends):
    peer = ends.peer()
    arriving, _ = ends.accept(peer, some(3, 100), seconds=1.0)
    connection = ends.sender.connect(peer)
    assert arriving.result(4) != ""
    connection.close()


def test_a_stuck_one_does_not_hold_up_others(ends):
    stuck = [ends.peer() for _ in range(4)]
    held = [ends.accept(peer, some(3, 10), seconds=30)[1] for peer in stuck]
    connections = [ends.sender.connect(peer) for peer in stuck]
    began, peer = time.monotonic(), ends.peer()
    arriving, _ = ends.accept(peer, some(4, 50))
    connection = ends.sender.connect(peer)
    connection.write(some(5, 50), some(4, 50))
    connection.close()
    assert arriving.result() == "" and time.monotonic() - began < 5
    for reception, broken in zip(held, connections, strict=True):
        reception.cancel()
        broken.abort()


@pytest.mark.parametrize("rows", [0, 17, -1, 1 << 40])
def test_a_frame_that_cannot_be(ends, rows):
    peer = ends.peer()
    arriving, _ = ends.accept(peer, some(3, 100))
    connection = ends.sender.connect(peer)
    connection._link.send_header([0x6B766D657368, rows, 0]).wait(time.monotonic() + 5)
    assert "a frame of" in arriving.result()


def test_a_receiver_that_does_not_read(ends):
    """The send ends in its deadline: far more than the sockets' buffers hold."""
    big = Layout("d" * 32, "float32", layers=8, heads=8, k_dim=64, v_dim=64, page_size=1)
    sender = PairTransport(pool(big, 1, 2000), GlooLinks(HOST), HOST, Patience(2.0, 0.5))
    receiver = PairTransport(pool(big, 2, 4), GlooLinks(HOST), HOST, Patience(2.0, 0.5))
    peer = receiver.describe()
    peer.meeting.pair += "/1"
    peer.meeting.fresh = True
    link: list[Link] = []
    thread = threading.Thread(
        target=lambda: link.append(receiver.meet(peer.meeting.pair, time.monotonic() + 5, lambda: False))
    )
    thread.start()
    connection = sender.connect(peer)
    thread.join()
    began = time.monotonic()
    with pytest.raises(Unavailable):
        connection.write(np.arange(1, 2000), np.arange(1, 2000))
    assert time.monotonic() - began < 5
    # Aborted from elsewhere, a write fails at once as well.
    connection.close()
    sender.close()
    receiver.close()


SENDER = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[2])
from test_pair import HOST, LAYOUT, GlooLinks, KvPool, PairTransport, pool
sender = PairTransport(pool(LAYOUT, 1), GlooLinks(HOST), HOST)
connection = sender.connect(KvPool.FromString(bytes.fromhex(sys.argv[1])))
for at in range(1, 50, 7):
    connection.write(np.arange(at, at + 7), np.arange(at, at + 7))
print("half", flush=True)
sys.stdin.read()
"""


def test_a_sender_that_dies(ends):
    peer = ends.peer()
    arriving, _ = ends.accept(peer, np.arange(1, 100), seconds=60)
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", SENDER, peer.SerializeToString().hex(), here]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None and child.stdout.readline() == "half\n"
            assert not arriving.over.is_set()
            child.send_signal(signal.SIGKILL)
            assert arriving.result(5).startswith("Unavailable")
        finally:
            child.kill()


def test_nothing_is_left(ends):
    def once(fresh: bool) -> None:
        peer = ends.peer(fresh)
        arriving, _ = ends.accept(peer, some(1, 40))
        connection = ends.sender.connect(peer)
        connection.write(some(1, 40), some(1, 40))
        connection.abort()
        connection.close()
        arriving.result()
        ends.receiver._inbound.drop("")

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    for _ in range(3):
        once(True)
    before = held()
    for _ in range(30):
        once(True)
    deadline = time.monotonic() + 5
    while held() > (before[0] + 4, before[1] + 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    after = held()
    assert after[0] <= before[0] + 4 and after[1] <= before[1] + 2, (before, after)
    assert not ends.receiver._point._callers


# Staging


def test_frames_are_bounded():
    frames = FramePool(LAYOUT, 16, 1)
    with frames.borrow(time.monotonic() + 1) as (first, second):
        assert first is not second
        began = time.monotonic()
        with pytest.raises(Unavailable, match="no staging memory"), frames.borrow(began + 0.05):
            pass
        assert time.monotonic() - began < 1
    with frames.borrow(time.monotonic()) as again:
        assert again[0] is first


def test_frame_rows():
    assert frame_rows(LAYOUT, LAYOUT.bytes_per_token * 5 + 1) == 5
    assert frame_rows(LAYOUT, 1) == 1


def test_gather_and_scatter_are_one_another_undone():
    ours = pool(LAYOUT, 1)
    for slots in (some(1, 16), np.arange(30, 46), np.array([7])):
        frame, other = Frame(LAYOUT, 16), copy_of(ours)
        data = frame.gather(ours, slots)
        assert data.numel() == len(slots) * LAYOUT.bytes_per_token
        for part in other.keys + other.values:
            part[slots] = 0
        frame.scatter(other, slots)
        for a, b in zip(ours.keys + ours.values, other.keys + other.values, strict=True):
            assert torch.equal(a, b)


class FakeLink:
    def __init__(self) -> None:
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


def test_idle_links_are_bounded():
    idle, links = IdleLinks(2), [FakeLink() for _ in range(4)]
    for i, link in enumerate(links[:3]):
        idle.put(f"a/{i}", link)  # type: ignore[arg-type]
    assert [link.aborted for link in links[:3]] == [True, False, False]
    assert idle.take("a/0") is None and idle.take("a/1") is links[1] and len(idle) == 1
    idle.close()
    assert links[2].aborted
    idle.put("a/4", links[3])  # type: ignore[arg-type]
    assert links[3].aborted and len(idle) == 0


def test_a_broken_connection_is_not_kept():
    link = FakeLink()
    idle = IdleLinks()
    connection = PairConnection(pool(LAYOUT, 1), link, "x/1", idle, FramePool(LAYOUT, 4, 1), Patience())  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        connection.write(some(1, 3), some(1, 3))
    connection.close()
    assert link.aborted and len(idle) == 0
