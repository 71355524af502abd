"""A process with a pool on the GPU (or, dry, on the CPU) that others write into: one JSON line for each request."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvmesh.dataplane.base import Pool, Transport
from kvmesh.dataplane.checksum import checksum
from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.pair import PairTransport, Patience
from kvmesh.v1.kv_pb2 import KvPool, Meeting

HOST = "127.0.0.1"
# As of a model of 8 billion parameters: 128 KiB a token.
LAYOUT = Layout("0" * 32, "float16", layers=32, heads=8, k_dim=128, v_dim=128, page_size=1)
ROWS = 4097
PATIENCE = Patience(join=30.0, stall=10.0)


def make(name: str, dry: bool, seed: int, sends: bool) -> tuple[Pool, Transport]:
    """A pool of random numbers and its transport. Dry: shm for cuda_ipc, gloo for nccl.

    "save" and "restore" are cuda_ipc with a KV store's pool, in pinned shared memory, on the receiving or sending side.
    """
    host = name == ("restore" if sends else "save")
    shape, device = (ROWS, LAYOUT.heads, LAYOUT.k_dim), "cpu" if dry or host else "cuda"
    draw = torch.Generator(device=device).manual_seed(seed)

    def parts() -> list[torch.Tensor]:
        return [
            torch.randint(-99, 99, shape, generator=draw, device=device, dtype=torch.int16).to(torch.float16)
            for _ in range(LAYOUT.layers)
        ]

    if host or (dry and name != "nccl"):
        from kvmesh.dataplane.cuda_ipc import CudaIpcTransport
        from kvmesh.dataplane.shm import ShmTransport, create_pool

        memory, shared = create_pool(LAYOUT, ROWS, "kvmesh-gpu")
        for part, made in zip(shared.keys + shared.values, parts() + parts(), strict=True):
            part.copy_(made)
        return shared, ShmTransport(memory, shared) if dry else CudaIpcTransport(shared, shared=memory)
    pool = Pool(LAYOUT, parts(), parts())
    if dry:
        from kvmesh.dataplane.gloo import GlooLinks

        return pool, PairTransport(pool, GlooLinks(HOST), HOST, PATIENCE)
    if name != "nccl":
        from kvmesh.dataplane.cuda_ipc import CudaIpcTransport

        return pool, CudaIpcTransport(pool)
    from kvmesh.dataplane.nccl import NcclLinks

    return pool, PairTransport(pool, NcclLinks("cuda"), HOST, PATIENCE, device="cuda")


class Holder:
    """The test's side of such a process."""

    def __init__(self, name: str, dry: bool, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), name, str(int(dry))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            text=True,
        )
        self._number = 0

    def ask(self, what: str, **fields: Any) -> Any:
        """One request, and its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"what": what, **fields}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the holder has died"
        return json.loads(line)

    def peer(self) -> KvPool:
        """Its pool, for one more write over the same connection."""
        pool = KvPool.FromString(bytes.fromhex(self.ask("describe")))
        if pool.HasField("meeting"):
            pool.meeting.pair += "/1"
            pool.meeting.fresh = self._number == 0
            self._number += 1
        return pool

    def kill(self) -> None:
        """Ends it, as a crash would."""
        self._process.kill()
        # Closes its pipes too.
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


def serve() -> None:
    """The process."""
    pool, transport = make(sys.argv[1], sys.argv[2] == "1", seed=2, sends=False)
    over, errors = threading.Event(), [""]

    def done(error: str) -> None:
        errors[0] = error
        over.set()

    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = None
        if request["what"] == "describe":
            answer = transport.describe().SerializeToString().hex()
        elif request["what"] == "accept":
            over.clear()
            meeting = Meeting.FromString(bytes.fromhex(request["meeting"]))
            transport.accept(meeting, np.asarray(request["slots"]), 60, done)
        elif request["what"] == "arrived":
            answer = errors[0] if over.wait(60) else "nothing came"
        elif request["what"] == "sum":
            answer = checksum(pool, np.asarray(request["slots"]))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
