"""Two processes on one GPU: what arrives is what was sent, how fast, and what happens when one dies.

NCCL refuses two ranks on one device of one host: each process is given a NCCL_HOSTID of its own.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from holder import LAYOUT, ROWS, Holder, make

from kvmesh.dataplane.base import Connection, Pool, Transport, TwoSidedTransport
from kvmesh.dataplane.checksum import checksum
from kvmesh.errors import Unavailable
from kvmesh.v1.kv_pb2 import KvPool

NCCL = {"NCCL_HOSTID": "there", "NCCL_SHM_DISABLE": "1", "NCCL_P2P_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo"}


class Ends:
    """A sender here and a receiver in another process."""

    def __init__(self, name: str, dry: bool) -> None:
        self.name, self.dry = name, dry
        self.holder = Holder(name, dry, **NCCL)
        os.environ.update({**NCCL, "NCCL_HOSTID": "here"})
        self.pool: Pool
        self.transport: Transport
        self.pool, self.transport = make(name, dry, seed=1, sends=True)

    def begin(self, target: np.ndarray) -> tuple[KvPool, Connection]:
        """A connection for one write into these rows."""
        peer = self.holder.peer()
        if isinstance(self.transport, TwoSidedTransport):
            self.holder.ask("accept", meeting=peer.meeting.SerializeToString().hex(), slots=target.tolist())
        return peer, self.transport.connect(peer)

    def end(self, connection: Connection) -> str:
        """Lets go; what went wrong at the receiver."""
        connection.close()
        return self.holder.ask("arrived") if isinstance(self.transport, TwoSidedTransport) else ""


@pytest.fixture(params=["cuda_ipc", "save", "restore", "nccl"])
def ends(request: pytest.FixtureRequest, dry: bool) -> Iterator[Ends]:
    made = Ends(request.param, dry)
    yield made
    made.transport.close()
    made.holder.kill()


def slots(shape: str, count: int, seed: int) -> np.ndarray:
    if shape == "runs":
        return np.arange(1, count + 1)
    return np.random.default_rng(seed).permutation(ROWS - 1)[:count] + 1


@pytest.mark.parametrize("shape", ["runs", "scattered"])
def test_what_arrives_is_what_was_sent(ends: Ends, shape: str) -> None:
    for turn, count in enumerate((1, 17, 500, 2048)):
        source, target = slots(shape, count, turn), slots(shape, count, turn + 9)
        others = np.setdiff1d(np.arange(1, ROWS), target)
        before = ends.holder.ask("sum", slots=others.tolist())
        _, connection = ends.begin(target)
        # In pieces, as a prefill hands them over; behind what the pool's own stream does.
        for at in range(0, count, 300):
            connection.wait_for(ends.transport.fence())
            connection.write(source[at : at + 300], target[at : at + 300])
        assert ends.end(connection) == ""
        assert ends.holder.ask("sum", slots=target.tolist()) == checksum(ends.pool, source)
        assert ends.holder.ask("sum", slots=others.tolist()) == before


def test_bandwidth(ends: Ends, dry: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside a plain copy of the same bytes on the device."""

    def rate(work: Callable[[], object], size: int, settle: bool = False) -> float:
        times = []
        for _ in range(6):
            began = time.perf_counter()
            work()
            if settle and not dry:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return size / statistics.median(times[1:]) / 1e9

    lines = []
    for count in (128, 512, 2048):
        rows, size = slots("scattered", count, count), count * LAYOUT.bytes_per_token

        def send(rows: np.ndarray = rows) -> None:
            _, connection = ends.begin(rows)
            connection.write(rows, rows)
            assert ends.end(connection) == ""

        device = "cpu" if dry else "cuda"
        plain = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        got, best = rate(send, size), rate(lambda p=plain: p[0].copy_(p[1]), size, settle=True)  # type: ignore[misc]
        name = f"{ends.name} (dry: a CPU)" if dry else ends.name
        lines.append(f"{name}, {count} tokens, {size / 1e6:.0f} MB: {got:.2f} GB/s; copy {best:.2f} GB/s")
        assert got > 0
    with capsys.disabled():
        print("", *lines, sep="\n")


def test_a_receiver_that_dies(ends: Ends) -> None:
    """The write fails, or goes nowhere; this process goes on, and reaches another receiver."""
    target = slots("runs", 2048, 0)
    peer, connection = ends.begin(target)
    connection.write(target[:300], target[:300])
    ends.holder.kill()
    if isinstance(ends.transport, TwoSidedTransport):
        with pytest.raises(Unavailable):
            for at in range(300, 2048, 300):
                connection.write(target[at : at + 300], target[at : at + 300])
    connection.abort()
    connection.close()
    with pytest.raises(Unavailable):
        ends.transport.connect(peer)
    ends.holder = Holder(ends.name, ends.dry, **NCCL)
    _, connection = ends.begin(target)
    connection.write(target, target)
    assert ends.end(connection) == ""
    assert ends.holder.ask("sum", slots=target.tolist()) == checksum(ends.pool, target)
