"""How fast gloo moves KV between two processes of this machine, beside plain gloo and plain TCP for the same bytes.

Chunks are the pieces that a prefill hands over. `python -m benchmarks gloo`.
"""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from multiprocessing.connection import Connection as Pipe

import numpy as np
import torch

from kvmesh.dataplane.base import Pool
from kvmesh.dataplane.gloo import GlooLinks
from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.meet import MeetingPoint, call, pair_store
from kvmesh.dataplane.pair import PairTransport
from kvmesh.v1.kv_pb2 import KvPool, Meeting

HOST, ROUNDS, MIB = "127.0.0.1", 5, 128
# As of a model of 8 billion parameters, 16 of its layers.
LAYOUT = Layout("0" * 32, "bfloat16", layers=16, heads=8, k_dim=128, v_dim=128, page_size=1)
CHUNKS = (128, 512, 2048)


def pool(rows: int) -> Pool:
    parts = [[torch.ones(rows, 8, 128, dtype=torch.bfloat16) for _ in range(16)] for _ in range(2)]
    return Pool(LAYOUT, *parts)


def receiver(pipe: Pipe, rows: int) -> None:
    """Takes what the other process asks for."""
    torch.set_num_threads(1)
    transport = PairTransport(pool(rows), GlooLinks(HOST), HOST)
    point, flat = MeetingPoint(HOST), torch.empty((rows - 1) * LAYOUT.bytes_per_token, dtype=torch.uint8)
    pipe.send((transport.describe().SerializeToString(), point.address))
    while (what := pipe.recv())[0] != "end":
        if what[0] == "kv":
            over = threading.Event()
            transport.accept(Meeting.FromString(what[1]), what[2], 60, lambda error: over.set())  # noqa: B023
            pipe.send("ready")
            over.wait()
        elif what[0] == "gloo":
            with point.meet("plain", time.monotonic() + 10, lambda: False) as where:
                link = GlooLinks(HOST).join(pair_store(where, 10), 0, 10)
            for _ in range(ROUNDS):
                link.recv(flat).wait(time.monotonic() + 60)
                pipe.send("have it")
            continue
        else:
            with point.meet("tcp", time.monotonic() + 10, lambda: False) as where:
                where.settimeout(60)
                view = memoryview(flat.numpy())
                for _ in range(ROUNDS):
                    at = 0
                    while at < len(view):
                        at += where.recv_into(view[at:])
                    pipe.send("have it")
            continue
        pipe.send("have it")


def main() -> None:
    """Prints a line for each way."""
    torch.set_num_threads(1)
    count = MIB * (1 << 20) // LAYOUT.bytes_per_token
    rows, size = count + 1, count * LAYOUT.bytes_per_token
    pipe, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=receiver, args=(other, rows), daemon=True)
    process.start()
    described, address = pipe.recv()
    transport, peer = PairTransport(pool(rows), GlooLinks(HOST), HOST), KvPool.FromString(described)

    def show(name: str, times: list[float]) -> None:
        rates = sorted(size / t / 1e9 for t in times[1:])
        print(f"{name:28} {statistics.median(rates):5.2f} GB/s  ({rates[0]:.2f} to {rates[-1]:.2f})", flush=True)

    print(f"{size / 1e6:.0f} MB, {ROUNDS - 1} rounds after one of warm-up, median (least to most)")
    in_order = np.arange(1, rows)
    scattered = np.random.default_rng(0).permutation(in_order)
    fresh = True
    for shape, slots in (("runs", in_order), ("scattered", scattered)):
        for chunk in CHUNKS:
            times = []
            for _ in range(ROUNDS):
                peer.meeting.pair, peer.meeting.fresh, fresh = (
                    KvPool.FromString(described).meeting.pair + "/1",
                    fresh,
                    False,
                )
                pipe.send(("kv", peer.meeting.SerializeToString(), slots))
                pipe.recv()
                began = time.perf_counter()
                connection = transport.connect(peer)
                for at in range(0, count, chunk):
                    connection.write(slots[at : at + chunk], slots[at : at + chunk])
                connection.close()
                pipe.recv()
                times.append(time.perf_counter() - began)
            show(f"kvmesh, {shape}, chunk {chunk}", times)
    flat = torch.ones(size, dtype=torch.uint8)
    pipe.send(("gloo",))
    with call(address, "plain", time.monotonic() + 10) as where:
        link = GlooLinks(HOST).join(pair_store(where, 10), 1, 10)
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        link.send(flat).wait(time.monotonic() + 60)
        pipe.recv()
        times.append(time.perf_counter() - began)
    show("plain gloo send", times)
    pipe.send(("tcp",))
    times = []
    with call(address, "tcp", time.monotonic() + 10) as where:
        where.settimeout(60)
        for _ in range(ROUNDS):
            began = time.perf_counter()
            where.sendall(memoryview(flat.numpy()))
            pipe.recv()
            times.append(time.perf_counter() - began)
    show("plain TCP send", times)
    pipe.send(("end",))
    process.join(10)


if __name__ == "__main__":
    main()
