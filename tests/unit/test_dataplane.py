"""Layouts, slots and the shm transport: what arrives, what is refused, and that nothing is left behind."""

from __future__ import annotations

import dataclasses
import gc
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kvmesh.dataplane.layout import ALIGN, ITEM_BYTES, Layout, refusal
from kvmesh.dataplane.shm import SHORT_RUN, SharedMemory, ShmTransport, create_pool
from kvmesh.dataplane.slots import from_runs, joint_runs, to_runs
from kvmesh.errors import InvalidArgument, Unavailable
from kvmesh.process import ProcessRef
from kvmesh.v1.common_pb2 import KvLayout
from kvmesh.v1.kv_pb2 import KvPool, Process, SlotRuns

LAYOUT = Layout("d" * 32, "float32", layers=3, heads=2, k_dim=4, v_dim=6, page_size=1)

# Layouts


@pytest.mark.parametrize(
    "change",
    [
        {"model_digest": "e" * 32},
        {"dtype": "bfloat16"},
        {"layers": 4},
        {"heads": 1},
        {"k_dim": 6},
        {"v_dim": 4},
        {"page_size": 16},
        {"ranks": 2},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_field_counts(change):
    other = dataclasses.replace(LAYOUT, **change)
    (name, value), ours = next(iter(change.items())), getattr(LAYOUT, next(iter(change)))
    assert other.fingerprint != LAYOUT.fingerprint
    assert refusal(LAYOUT, other) == f"{name} is {value} there and {ours} here"


def test_equal_layouts_are_exchangeable():
    same = dataclasses.replace(LAYOUT)
    assert same.fingerprint == LAYOUT.fingerprint and len(same.fingerprint) == 32
    assert refusal(LAYOUT, same) == ""
    both = refusal(LAYOUT, dataclasses.replace(LAYOUT, heads=1, dtype="float16"))
    assert both == "dtype is float16 there and float32 here, heads is 1 there and 2 here"


@pytest.mark.parametrize("dtype", list(ITEM_BYTES))
def test_a_layout_travels(dtype):
    layout = dataclasses.replace(LAYOUT, dtype=dtype)
    message = KvLayout.FromString(layout.message().SerializeToString())
    assert Layout.of(message) == layout
    assert message.bytes_per_token == 3 * 2 * (4 + 6) * ITEM_BYTES[dtype]
    message.fingerprint = "f" * 32
    assert Layout.of(message).fingerprint == layout.fingerprint


def test_parts_begin_on_pages_of_memory():
    sizes = LAYOUT.part_bytes(1000)
    assert len(sizes) == 2 * LAYOUT.layers
    assert all(size % ALIGN == 0 for size in sizes)
    assert sizes[0] >= 1000 * 2 * 4 * 4 > sizes[0] - ALIGN
    assert sizes[1] >= 1000 * 2 * 6 * 4 > sizes[1] - ALIGN


# Slots


def test_slots_as_runs():
    slots = np.array([5, 6, 7, 1, 2, 9, 8, 10, 11])
    runs = to_runs(slots)
    assert list(runs.starts) == [5, 1, 9, 8, 10] and list(runs.lengths) == [3, 2, 1, 1, 2]
    assert from_runs(runs, 12).tolist() == slots.tolist()
    assert to_runs(slots[:0]) == SlotRuns()
    assert from_runs(SlotRuns(), 10).tolist() == [] and from_runs(SlotRuns(), 10).dtype == np.int64


def test_any_slots_come_back_as_they_were():
    rng = random.Random(7)
    for _ in range(200):
        rows = rng.randrange(2, 60)
        slots = np.array(rng.sample(range(1, rows), rng.randrange(rows)), np.int64)
        if rng.random() < 0.5:
            slots.sort()
        assert from_runs(to_runs(slots), rows).tolist() == slots.tolist()


@pytest.mark.parametrize(
    ("starts", "lengths"),
    [([0], [1]), ([1], [10]), ([9], [2]), ([10], [1]), ([1, 2], [1]), ([], [1]), ([2**32 - 1], [2**32 - 1])],
)
def test_runs_outside_the_pool_are_refused(starts, lengths):
    with pytest.raises(InvalidArgument, match="rows 1 to 9"):
        from_runs(SlotRuns(starts=starts, lengths=lengths), 10)


def test_joint_runs_go_on_only_where_both_do():
    source, target = np.array([1, 2, 3, 4, 9, 10]), np.array([5, 6, 1, 2, 3, 4])
    assert joint_runs(source, target) == [(1, 5, 2), (3, 1, 2), (9, 3, 2)]
    assert joint_runs(source[:0], target[:0]) == []
    assert joint_runs(source[:1], target[:1]) == [(1, 5, 1)]
    rng = random.Random(3)
    for _ in range(100):
        count = rng.randrange(1, 30)
        source, target = (np.array(rng.sample(range(40), count)) for _ in range(2))
        pairs = [(s + i, t + i) for s, t, n in joint_runs(source, target) for i in range(n)]
        assert pairs == list(zip(source.tolist(), target.tolist(), strict=True))


# Copies


class Ends:
    """Two pools of one layout, filled at random, and the way from one into the other."""

    def __init__(self, layout: Layout, rows: int = 200) -> None:
        self.memories, self.pools = zip(*[create_pool(layout, rows, f"kvmesh-test-{i}") for i in range(2)], strict=True)
        self.ours, self.theirs = self.pools
        generator = torch.Generator().manual_seed(1)
        for pool in self.pools:
            for part in (*pool.keys, *pool.values):
                part.copy_(torch.randn(part.shape, generator=generator))
        self.connection = ShmTransport(self.memories[0], self.ours).connect(
            ShmTransport(self.memories[1], self.theirs).describe()
        )

    def parts(self):
        return zip((*self.ours.keys, *self.ours.values), (*self.theirs.keys, *self.theirs.values), strict=True)

    def close(self) -> None:
        self.connection.close()
        for pool in self.pools:
            pool.keys.clear()
            pool.values.clear()
        for memory in self.memories:
            memory.close()


@pytest.fixture
def ends(request):
    made = Ends(request.param)
    yield made
    made.close()


def slot_pairs():
    """(name, source, target) of 1 to 150 slots."""
    rng = np.random.default_rng(5)
    for count in (1, 3, SHORT_RUN, 17, 150):
        low, high = np.arange(1, count + 1), np.arange(200 - count, 200)
        scattered = [rng.permutation(np.arange(1, 200))[:count] for _ in range(2)]
        yield f"contiguous {count}", low, high
        yield f"scattered {count}", *scattered
        yield f"scattered to contiguous {count}", scattered[0], low
        yield f"contiguous to scattered {count}", high, scattered[1]
        yield f"descending {count}", low[::-1].copy(), high


LAYOUTS = [
    LAYOUT,
    dataclasses.replace(LAYOUT, dtype="bfloat16"),
    dataclasses.replace(LAYOUT, dtype="float16", layers=1, k_dim=5, v_dim=5),
]


@pytest.mark.parametrize("ends", LAYOUTS, ids=lambda layout: layout.dtype, indirect=True)
@pytest.mark.parametrize("pair", list(slot_pairs()), ids=lambda pair: pair[0])
def test_a_copy_is_what_the_naive_one_is(ends, pair):
    _, source, target = pair
    expected = [theirs.clone() for _, theirs in ends.parts()]
    for (ours, _), wanted in zip(ends.parts(), expected, strict=True):
        for s, t in zip(source.tolist(), target.tolist(), strict=True):
            wanted[t] = ours[s]
    assert ends.connection.write(source, target) == len(source) * ends.ours.layout.bytes_per_token
    for (_, theirs), wanted in zip(ends.parts(), expected, strict=True):
        assert torch.equal(theirs, wanted)


@pytest.mark.parametrize("ends", [LAYOUT], indirect=True, ids=["float32"])
def test_slots_that_nobody_may_write_to_are_taken_as_well(ends):
    """What comes out of a message is read-only memory."""
    rng = np.random.default_rng(5)
    slots = np.frombuffer(rng.permutation(np.arange(1, 200, dtype=np.int64))[:40].tobytes(), np.int64)
    ends.connection.write(slots, slots)
    for ours, theirs in ends.parts():
        assert torch.equal(ours[slots.tolist()], theirs[slots.tolist()])


@pytest.mark.parametrize("ends", [LAYOUT], indirect=True, ids=["float32"])
@pytest.mark.parametrize(
    ("source", "target"), [([1, 2], [1]), ([1], [200]), ([200], [1]), ([199, 200], [1, 2]), ([1, 2], [199, 200])]
)
def test_slots_that_do_not_fit_are_an_error(ends, source, target):
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        ends.connection.write(np.array(source), np.array(target))


@pytest.mark.parametrize("ends", [LAYOUT], indirect=True, ids=["float32"])
def test_nothing_to_copy(ends):
    assert ends.connection.write(np.empty(0, np.int64), np.empty(0, np.int64)) == 0


# What is refused


@pytest.fixture
def memory():
    made, pool = create_pool(LAYOUT, 50, "kvmesh-test")
    yield made, pool
    pool.keys.clear()
    pool.values.clear()
    made.close()


def described(memory, **changes) -> KvPool:
    message = ShmTransport(*memory).describe()
    for name, value in changes.items():
        if name == "layout":
            message.layout.CopyFrom(value.message())
        else:
            setattr(message, name, value)
    return message


@pytest.mark.parametrize("change", [{"heads": 1}, {"dtype": "bfloat16"}, {"page_size": 16}])
def test_a_pool_of_another_layout_is_refused(memory, change):
    name = next(iter(change))
    with pytest.raises(InvalidArgument, match=f"another layout: {name} is"):
        ShmTransport(*memory).connect(described(memory, layout=dataclasses.replace(LAYOUT, **change)))


def test_a_pool_of_another_size_is_refused(memory):
    with pytest.raises(InvalidArgument, match="500 rows has not"):
        ShmTransport(*memory).connect(described(memory, rows=500))
    # Of a size that fits the layout, but is not the memory's.
    rows = 5000
    with pytest.raises(InvalidArgument, match="has not the"):
        ShmTransport(*memory).connect(described(memory, rows=rows, bytes=sum(LAYOUT.part_bytes(rows))))


def test_a_descriptor_that_is_not_open_is_unavailable(memory):
    before = fds()
    with pytest.raises(Unavailable, match=f"process {os.getpid()} cannot be opened"):
        ShmTransport(*memory).connect(described(memory, fd=9999))
    assert fds() == before


def test_a_later_process_with_the_same_number_is_refused(memory):
    me, before = ProcessRef.current(), fds()
    other = described(memory)
    other.process.CopyFrom(Process(pid=me.pid, start_ticks=me.start_ticks + 1))
    with pytest.raises(Unavailable, match="is gone"):
        ShmTransport(*memory).connect(other)
    assert fds() == before


# Nothing is left


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def maps(name: str) -> int:
    return Path("/proc/self/maps").read_text().count(f"memfd:{name}")


def test_memory_has_no_name_in_the_file_system(memory):
    assert not [p for p in os.listdir("/dev/shm") if "kvmesh-test" in p]
    assert os.readlink(f"/proc/self/fd/{memory[0].fd}") == "/memfd:kvmesh-test (deleted)"


def test_connections_leave_no_descriptor_and_no_mapping(memory):
    transport, message = ShmTransport(*memory), described(memory)
    before, mapped = fds(), maps("kvmesh-test")
    slots = np.array([1, 7, 3, 9])
    for _ in range(200):
        connection = transport.connect(message)
        connection.write(slots, slots)
        assert fds() > before and maps("kvmesh-test") == mapped + 1
        connection.close()
        del connection
        assert fds() == before and maps("kvmesh-test") == mapped


def test_a_failed_write_keeps_no_mapping(memory):
    transport, mapped = ShmTransport(*memory), maps("kvmesh-test")
    connection = transport.connect(described(memory))
    try:
        connection.write(np.array([1]), np.array([1000]))
    except (RuntimeError, IndexError):
        # As in the copier: closed while the error, and so the frame of `write`, is still there.
        connection.close()
        del connection
    assert maps("kvmesh-test") == mapped


def test_a_pool_goes_with_its_last_view():
    # What other tests have left to the collector is not counted.
    gc.collect()
    mapped, before = maps("kvmesh-last"), fds()
    memory, pool = create_pool(LAYOUT, 50, "kvmesh-last")
    assert maps("kvmesh-last") == mapped + 1
    part = pool.keys[0]
    memory.close()
    # Somebody still looks at it: it stays readable.
    assert part[3].sum() == 0
    del pool, memory
    assert maps("kvmesh-last") == mapped + 1
    del part
    gc.collect()
    assert maps("kvmesh-last") == mapped and fds() == before


def test_memory_that_cannot_be_had_leaves_no_descriptor():
    before = fds()
    with pytest.raises((OSError, ValueError, OverflowError)):
        SharedMemory.create(2**62, "kvmesh-too-much")
    assert fds() == before


OWNER = """
import signal, sys
from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.shm import ShmTransport, create_pool
layout = Layout("d" * 32, "float32", layers=3, heads=2, k_dim=4, v_dim=6, page_size=1)
memory, pool = create_pool(layout, 50, "kvmesh-owner")
pool.keys[0][5] = 42
print(ShmTransport(memory, pool).describe().SerializeToString().hex(), flush=True)
signal.pause()
"""


def test_a_pool_whose_process_died(memory):
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            message = KvPool.FromString(bytes.fromhex(owner.stdout.readline()))
            transport = ShmTransport(*memory)
            connection = transport.connect(message)
            # Both see one memory.
            assert maps("kvmesh-owner") == 1
            assert connection._theirs.keys[0][5, 0, 0] == 42
            memory[1].keys[0][7] = 7
            connection.write(np.array([7]), np.array([5]))
            assert connection._theirs.keys[0][5, 0, 0] == 7
            owner.send_signal(signal.SIGKILL)
            deadline = time.monotonic() + 5
            while ProcessRef(message.process.pid, message.process.start_ticks).alive():
                assert time.monotonic() < deadline
                time.sleep(0.005)
            # A zombie, then nobody: neither can be opened. What is mapped stays writable.
            with pytest.raises(Unavailable):
                transport.connect(message)
            owner.wait()
            with pytest.raises(Unavailable, match="cannot be opened"):
                transport.connect(message)
            connection.write(np.array([7]), np.array([6]))
            assert connection._theirs.keys[0][6, 0, 0] == 7
            connection.close()
            assert maps("kvmesh-owner") == 0
            assert not [p for p in os.listdir("/dev/shm") if "kvmesh" in p]
        finally:
            owner.kill()
