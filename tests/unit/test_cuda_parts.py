"""What of cuda_ipc and nccl needs no GPU: tables, indices, handles, life cycles, over FAKE drivers and CPU memory.

The code itself has NEVER RUN on a GPU.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import importlib.util
import inspect
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pair import HOST, LAYOUT, Ends, copy_of, pool, some

from kvmesh.dataplane.base import CannotConnect
from kvmesh.dataplane.cuda import RowCopier, part_addresses, pointers, row_bytes, table
from kvmesh.dataplane.cuda_driver import CudaError
from kvmesh.dataplane.cuda_ipc import CudaIpcTransport
from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.link import RECEIVER, SENDER
from kvmesh.dataplane.nccl import IN_PROGRESS, SUCCESS, NcclLinks, config
from kvmesh.dataplane.pair import PairTransport, Patience
from kvmesh.dataplane.shm import create_pool
from kvmesh.dataplane.staging import Frame
from kvmesh.errors import InvalidArgument, Unavailable
from kvmesh.v1.kv_pb2 import KvPool

EVEN = Layout("d" * 32, "float32", layers=3, heads=2, k_dim=4, v_dim=4, page_size=1)


class FakeKernels:
    """SGLang's kernels by memmove: the same arguments, the same meaning."""

    def __init__(self) -> None:
        self.launches = 0

    def transfer_kv_all_layer_mla(self, src_layers, dst_layers, src_indices, dst_indices, item_size, num_layers):
        self.launches += 1
        assert src_layers.dtype == dst_layers.dtype == torch.uint64 and len(src_layers) == len(dst_layers) == num_layers
        assert src_indices.dtype == dst_indices.dtype == torch.int64 and item_size % 8 == 0
        for source, target in zip(src_layers.tolist(), dst_layers.tolist(), strict=True):
            for a, b in zip(src_indices.tolist(), dst_indices.tolist(), strict=True):
                ctypes.memmove(target + b * item_size, source + a * item_size, item_size)

    def transfer_kv_all_layer(
        self, src_k_layers, dst_k_layers, src_v_layers, dst_v_layers, src_indices, dst_indices, item_size, num_layers
    ):
        self.transfer_kv_all_layer_mla(src_k_layers, dst_k_layers, src_indices, dst_indices, item_size, num_layers)
        self.transfer_kv_all_layer_mla(src_v_layers, dst_v_layers, src_indices, dst_indices, item_size, num_layers)
        self.launches -= 1


class FakeMemory:
    """Handles name allocations of this process: what is "mapped" is the memory itself."""

    def __init__(self, *pools, slack: int = 0) -> None:
        # (base, size): each tensor lies in an allocation of its own, `slack` bytes behind its beginning.
        self.allocations = {
            t.data_ptr() - slack: t.numel() * t.element_size() + slack for p in pools for t in (*p.keys, *p.values)
        }
        self.open_now: list[int] = []
        self.exports = 0
        self.pinned: dict[int, int] = {}
        self.fail_open_at = -1
        self.shareable = True

    def allocation(self, address):
        base = max(b for b in self.allocations if b <= address)
        return base, self.allocations[base]

    def export(self, address):
        if not self.shareable:
            raise CudaError("cuIpcGetMemHandle: invalid argument (1)")
        self.exports += 1
        return self.allocation(address)[0].to_bytes(64, "little")

    def open(self, handle):
        if len(self.open_now) == self.fail_open_at:
            raise CudaError("cuIpcOpenMemHandle_v2: peer access is not supported (217)")
        base = int.from_bytes(handle, "little")
        self.open_now.append(base)
        return base

    def close(self, base):
        self.open_now.remove(base)

    def pin(self, address, size):
        if not self.shareable:
            raise CudaError("cuMemHostRegister_v2: out of memory (2)")
        # It is there.
        ctypes.string_at(address + size - 1, 1)
        self.pinned[address] = size

    def unpin(self, address):
        del self.pinned[address]


class FakeStream:
    def __init__(self) -> None:
        self.fences: list[object] = []
        self.uses = 0

    def fence(self):
        return object()

    def wait_for(self, fence):
        self.fences.append(fence)

    @contextmanager
    def __call__(self):
        self.uses += 1
        yield


def transports(layout: Layout, slack: int = 0):
    ours, theirs = pool(layout, 1), pool(layout, 2)
    memory = FakeMemory(ours, theirs, slack=slack)
    made = [CudaIpcTransport(p, memory, FakeStream(), FakeKernels()) for p in (ours, theirs)]
    return ours, theirs, memory, *made


@pytest.mark.parametrize(("layout", "launches"), [(EVEN, 1), (LAYOUT, 2)], ids=["one size", "two sizes"])
@pytest.mark.parametrize("slack", [0, 256])
def test_rows_go_through_exported_memory(layout, launches, slack):
    ours, theirs, memory, sender, receiver = transports(layout, slack)
    connection = sender.connect(receiver.describe())
    source, target, before = some(1, 50), some(2, 50), copy_of(theirs)
    kernels = sender._copier._kernels
    assert connection.write(source, target) == 50 * layout.bytes_per_token
    assert kernels.launches == launches
    for a, b, old in zip(
        ours.keys + ours.values, theirs.keys + theirs.values, before.keys + before.values, strict=True
    ):
        old[target] = a[source]
        assert torch.equal(b, old)
    connection.close()
    assert memory.open_now == []
    connection.close()


def test_a_pool_is_exported_once():
    _, _, memory, sender, receiver = transports(EVEN)
    exports = memory.exports
    assert receiver.describe() is receiver.describe()
    for _ in range(3):
        sender.connect(receiver.describe()).close()
    assert memory.exports == exports


def test_parts_of_one_allocation_share_a_handle():
    whole = torch.zeros(6, 400, 2, 4)
    ours = pool(EVEN, 1)
    ours.keys, ours.values = list(whole[:3]), list(whole[3:])
    memory = FakeMemory()
    memory.allocations = {whole.data_ptr(): whole.numel() * 4}
    description = CudaIpcTransport(ours, memory, FakeStream(), FakeKernels()).describe().cuda
    assert len(description.allocations) == 1 and memory.exports == 1
    assert list(description.parts) == [0] * 6
    assert list(description.offsets) == [i * 400 * 2 * 4 * 4 for i in range(6)]


def test_writes_wait_for_what_was_computed():
    _, _, _, sender, receiver = transports(EVEN)
    connection, fence = sender.connect(receiver.describe()), sender.fence()
    connection.wait_for(fence)
    assert sender._stream.fences == [fence]


def test_memory_that_cannot_be_shared():
    ours = pool(EVEN, 1)
    memory = FakeMemory(ours)
    memory.shareable = False
    with pytest.raises(CannotConnect, match="cannot be shared: cuIpcGetMemHandle"):
        CudaIpcTransport(ours, memory, FakeStream(), FakeKernels())


def test_memory_that_cannot_be_mapped():
    _, _, memory, sender, receiver = transports(EVEN)
    memory.fail_open_at = 4
    with pytest.raises(CannotConnect, match=r"cannot be mapped: .*peer access"):
        sender.connect(receiver.describe())
    # What was mapped before the failure is closed.
    assert memory.open_now == []


def test_a_receiver_that_is_dead():
    _, _, memory, sender, receiver = transports(EVEN)
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    peer = receiver.describe()
    peer.process.pid, peer.process.start_ticks = child.pid, 1
    with pytest.raises(CannotConnect, match="is gone"):
        sender.connect(peer)
    assert memory.open_now == []


class WithStore:
    """A pool on a GPU, and a store's in shared memory, of another layout of numbers in memory."""

    def __init__(self, layout: Layout = EVEN) -> None:
        self.gpu = pool(layout, 1)
        self.shared, self.host = create_pool(layout, 300, "kvmesh-test-cuda")
        for i, part in enumerate((*self.host.keys, *self.host.values)):
            part.copy_(torch.arange(part.numel()).view(part.shape) + i)
        self.memory = FakeMemory(self.gpu)
        self.engine = CudaIpcTransport(self.gpu, self.memory, FakeStream(), FakeKernels())
        self.store = CudaIpcTransport(
            self.host, self.memory, FakeStream(), FakeKernels(), shared=self.shared, device="cpu"
        )


@pytest.fixture
def with_store():
    made = WithStore()
    yield made
    made.store.close()
    made.shared.close()


@pytest.mark.parametrize("to_store", [True, False], ids=["save", "restore"])
def test_rows_go_between_a_gpu_and_a_stores_pinned_memory(with_store, to_store):
    w = with_store
    sender, receiver = (w.engine, w.store) if to_store else (w.store, w.engine)
    ours, theirs = (w.gpu, w.host) if to_store else (w.host, w.gpu)
    connection = sender.connect(receiver.describe())
    # Ours, and of a store its mapping at the engine too.
    assert len(w.memory.pinned) == 1 + to_store
    assert set(w.memory.pinned.values()) == {w.shared.size}
    source, target = np.array([7, 3, 299, 4, 5]), np.array([1, 298, 2, 12, 11])
    before = copy_of(theirs)
    assert connection.write(source, target) == 5 * EVEN.bytes_per_token
    for a, b, old in zip(
        ours.keys + ours.values, theirs.keys + theirs.values, before.keys + before.values, strict=True
    ):
        old[target] = a[source]
        assert torch.equal(b, old)
    connection.close()
    assert w.memory.open_now == [] and list(w.memory.pinned) == [w.host.keys[0].data_ptr()]
    w.store.close()
    assert w.memory.pinned == {}


def test_a_stores_memory_that_cannot_be_pinned(with_store):
    w = with_store
    w.memory.shareable = False
    with pytest.raises(CannotConnect, match="cannot be mapped: cuMemHostRegister"):
        w.engine.connect(w.store.describe())
    with pytest.raises(CannotConnect, match="cannot be shared: cuMemHostRegister"):
        CudaIpcTransport(w.host, w.memory, FakeStream(), FakeKernels(), shared=w.shared, device="cpu")
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(CannotConnect):
        w.engine.connect(w.store.describe())
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_a_store_that_lies_is_refused(with_store):
    w = with_store
    for field in ("rows", "bytes"):
        peer = KvPool.FromString(w.store.describe().SerializeToString())
        setattr(peer, field, getattr(peer, field) + 1000)
        with pytest.raises(InvalidArgument, match="has not"):
            w.engine.connect(peer)
    assert list(w.memory.pinned) == [w.host.keys[0].data_ptr()]


def change_parts(peer):
    del peer.cuda.parts[:]


def change_offset(peer):
    peer.cuda.offsets[2] += 8


def change_part(peer):
    peer.cuda.parts[5] = 99


def change_rows(peer):
    peer.rows += 1


@pytest.mark.parametrize("change", [change_parts, change_offset, change_part, change_rows])
def test_descriptions_that_lie_are_refused(change):
    _, _, memory, sender, receiver = transports(EVEN)
    peer = receiver.describe()
    change(peer)
    with pytest.raises(InvalidArgument, match="peer's pool"):
        sender.connect(peer)
    assert memory.open_now == []


@pytest.mark.parametrize(
    ("source", "target", "kind"), [([1], [400], IndexError), ([-1], [1], IndexError), ([1, 2], [1], ValueError)]
)
def test_rows_that_are_not_there(source, target, kind):
    _, theirs, _, sender, receiver = transports(EVEN)
    before = copy_of(theirs)
    with pytest.raises(kind):
        sender.connect(receiver.describe()).write(np.array(source), np.array(target))
    assert all(torch.equal(a, b) for a, b in zip(theirs.keys, before.keys, strict=True))


def test_no_driver_here():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(CannotConnect):
        CudaIpcTransport(pool(EVEN, 1))


def test_rows_that_the_kernel_cannot_copy():
    odd = Layout("d" * 32, "float16", layers=1, heads=1, k_dim=3, v_dim=4, page_size=1)
    with pytest.raises(ValueError, match="rows of 6 bytes"):
        row_bytes(odd)
    ours = pool(odd, 1)
    with pytest.raises(CannotConnect, match="no kernel for this pool"):
        CudaIpcTransport(ours, FakeMemory(ours), FakeStream(), FakeKernels())


def test_tables():
    tensors = [torch.zeros(4), torch.zeros(4)]
    assert table(tensors, "cpu").tolist() == [t.data_ptr() for t in tensors]
    assert pointers([0x7F00_0000_0000], "cpu").tolist() == [0x7F00_0000_0000]


def test_addresses_of_a_frame_are_those_of_its_parts():
    frame = Frame(LAYOUT, 16)
    keys, values = part_addresses(frame.bytes(1).data_ptr(), LAYOUT, 11)
    parts = frame.parts(11)
    assert keys == [part.data_ptr() for part in parts[::2]]
    assert values == [part.data_ptr() for part in parts[1::2]]


def test_the_kernels_are_called_as_the_installed_package_has_them():
    # Its package cannot be imported without a GPU: read it.
    spec = importlib.util.find_spec("sgl_kernel")
    assert spec is not None and spec.submodule_search_locations
    source = (Path(spec.submodule_search_locations[0]) / "kvcacheio.py").read_text()
    real = {f.name: [a.arg for a in f.args.args] for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}
    for name in ("transfer_kv_all_layer", "transfer_kv_all_layer_mla"):
        fake = list(inspect.signature(getattr(FakeKernels(), name)).parameters)
        assert real[name][: len(fake)] == fake
    assert RowCopier(EVEN, "cpu", FakeKernels()).index(np.array([3, 1])).tolist() == [3, 1]


# NCCL


class FakeNccl:
    """Two ends in one process: sends are bytes in a queue; a stuck one never moves them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.comms: dict[int, tuple[bytes, int]] = {}
        self.sent: dict[tuple[bytes, int], list[bytes]] = {}
        self.wanted: dict[int, list[tuple[int, int]]] = {}
        self.failed: dict[int, int] = {}
        self.aborted: list[int] = []
        self.stuck = False
        self.looks = 0

    def unique_id(self):
        return len(self.sent).to_bytes(1, "big") * 128

    def init(self, unique, rank):
        with self.lock:
            comm = len(self.comms) + 1
            self.comms[comm] = (unique, rank)
            self.sent.setdefault((unique, rank), [])
            self.wanted[comm] = []
        return IN_PROGRESS, comm

    def state(self, comm):
        with self.lock:
            self.looks += 1
            unique, _ = self.comms[comm]
            if comm in self.failed:
                return self.failed[comm]
            if sum(u == unique for u, _ in self.comms.values()) < 2:
                return IN_PROGRESS
            self.move(comm)
            return SUCCESS

    def move(self, comm):
        unique, rank = self.comms[comm]
        there, wanted = self.sent.get((unique, 1 - rank), []), self.wanted[comm]
        while there and wanted and not self.stuck:
            (address, count), data = wanted.pop(0), there.pop(0)
            assert len(data) == count
            ctypes.memmove(address, data, count)

    def send(self, address, count, peer, comm, stream):
        with self.lock:
            self.sent[self.comms[comm]].append(ctypes.string_at(address, count))
        return SUCCESS

    def recv(self, address, count, peer, comm, stream):
        with self.lock:
            self.wanted[comm].append((address, count))
            self.move(comm)
        return SUCCESS

    def abort(self, comm):
        with self.lock:
            self.aborted.append(comm)
            unique, _ = self.comms[comm]
            for other, (u, _) in self.comms.items():
                if u == unique:
                    self.failed.setdefault(other, 6)

    def text(self, code):
        return f"error {code}"


class FakeDevice:
    """A stream on which an operation is over when the receives before it are."""

    stream = 5

    def __init__(self, nccl: FakeNccl) -> None:
        self.nccl = nccl
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def use(self):
        return contextlib.nullcontext()

    def mark(self):
        def over() -> bool:
            with self.nccl.lock:
                for comm in self.nccl.comms:
                    self.nccl.move(comm)
                done = not any(self.nccl.wanted.values())
            if done:
                for host, header in self.copies:
                    host.copy_(header)
            return done

        return over

    def wait_for(self, fence):
        pass

    def header(self, numbers):
        return torch.tensor(numbers, dtype=torch.int64)

    def bring(self, header):
        host = torch.empty_like(header)
        self.copies = [(host, header)]
        return host


class NcclEnds(Ends):
    """As Ends, over the fake."""

    def __init__(self) -> None:
        super().__init__()
        super().close()
        self.nccl = FakeNccl()
        self.sender, self.receiver = (
            PairTransport(p, NcclLinks("cpu", self.nccl, lambda: FakeDevice(self.nccl)), HOST, Patience(2.0, 0.5))
            for p in (self.ours, self.theirs)
        )


@pytest.fixture
def nccl():
    ends = NcclEnds()
    yield ends
    ends.close()


def test_nccl_moves_rows(nccl):
    for i in range(3):
        peer, target, source = nccl.peer(fresh=i == 0), some(i, 20), some(i + 5, 20)
        before = copy_of(nccl.theirs)
        arriving, _ = nccl.accept(peer, target)
        connection = nccl.sender.connect(peer)
        connection.write(source, target)
        connection.close()
        assert arriving.result() == ""
        nccl.check(before, source, target)
    # One communicator for all three, on each side.
    assert len(nccl.nccl.comms) == 2 and nccl.nccl.aborted == []


def test_a_stuck_nccl_transfer_is_aborted_in_its_deadline(nccl):
    peer = nccl.peer()
    arriving, _ = nccl.accept(peer, some(1, 20), seconds=1.0)
    connection = nccl.sender.connect(peer)
    nccl.nccl.stuck = True
    began = time.monotonic()
    # Whether the fake's sender waits as well depends on who comes first.
    with contextlib.suppress(Unavailable):
        connection.write(some(1, 20), some(1, 20))
    assert arriving.result(5) != "" and time.monotonic() - began < 4
    with pytest.raises(Unavailable):
        connection.write(some(1, 20), some(1, 20))
    connection.close()
    # Each communicator once.
    assert sorted(nccl.nccl.aborted) == [1, 2]
    # Others do not mind.
    nccl.nccl.stuck = False
    for comm in (1, 2):
        nccl.nccl.wanted[comm].clear()
    peer = nccl.peer()
    arriving, _ = nccl.accept(peer, some(2, 20))
    connection = nccl.sender.connect(peer)
    connection.write(some(2, 20), some(2, 20))
    connection.close()
    assert arriving.result() == ""


def test_a_failed_communicator_is_aborted(nccl):
    peer = nccl.peer()
    arriving, _ = nccl.accept(peer, some(1, 20))
    connection = nccl.sender.connect(peer)
    nccl.nccl.failed |= {1: 2, 2: 2}
    with pytest.raises(Unavailable, match="NCCL: error 2"):
        connection.write(some(1, 20), some(1, 20))
    assert "error 2" in arriving.result()
    connection.close()


def test_a_partner_that_does_not_come(nccl):
    links = NcclLinks("cpu", nccl.nccl, lambda: FakeDevice(nccl.nccl))

    class Values(dict):
        def set(self, key, value):
            self[key] = value

    began = time.monotonic()
    with pytest.raises(Unavailable, match="timed out"):
        links.join(Values(), RECEIVER, 0.2)
    assert time.monotonic() - began < 2 and nccl.nccl.aborted == [1]
    with pytest.raises(Unavailable, match="timed out"):
        links.join(Values(nccl=b"\7" * 128), SENDER, 0.2)


def test_the_configuration_is_one_that_nccl_takes():
    made = config()
    assert made.size == ctypes.sizeof(made) >= 48
    assert (made.magic, made.version, made.blocking) == (0xCAFEBEEF, 21800, 0)
    assert {made.cgaClusterSize, made.minCTAs, made.maxCTAs, made.splitShare} == {-(2**31)} and made.netName is None
