"""A stub of an engine for measuring the router: it answers at the pace that it is asked for, and computes nothing.

    python -m benchmarks.stub NAME REGISTRY ANNOUNCE

`sampling.seed` is the milliseconds to wait before each token. With `sampling.logprobs`, a token's logprob is when it
was sent: seconds of the machine's monotonic clock, modulo CLOCK_S.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from typing import Any

from kvmesh.aio import run
from kvmesh.grpcx import Server, announce
from kvmesh.membership import Membership
from kvmesh.v1 import engine_pb2 as pb
from kvmesh.v1.common_pb2 import FINISH_REASON_LENGTH, Endpoint, GenerateUsage, TokenChunk
from kvmesh.v1.engine_pb2_grpc import EngineServicer, add_EngineServicer_to_server
from kvmesh.v1.registry_pb2 import MEMBER_KIND_ENGINE, Member

# A float has 24 bits: 8 µs of this.
CLOCK_S = 64.0
VOCAB, CONTEXT = 1000, 8192


def stamp() -> float:
    """Now."""
    return time.monotonic() % CLOCK_S


class Stub(EngineServicer):
    """One engine."""

    def __init__(self, endpoint: Endpoint) -> None:
        model = pb.ModelInfo(name="stub", vocab_size=VOCAB, context_length=CONTEXT)
        self._info = pb.EngineInfo(endpoint=endpoint, model=model, total_slots=1 << 30, device="none", runtime="stub")
        self._running = 0

    async def StartGenerate(self, request: pb.StartGenerateRequest, context: Any) -> None:  # type: ignore[override]
        """Token 1, as often as asked for."""
        pause, count = request.sampling.seed / 1000, request.sampling.max_new_tokens
        self._running += 1
        try:
            due = time.monotonic()
            for _ in range(count):
                due += pause
                if (left := due - time.monotonic()) > 0:
                    await asyncio.sleep(left)
                chunk = TokenChunk(token_ids=[1], logprobs=[stamp()] if request.sampling.logprobs else ())
                await context.write(pb.StartGenerateResponse(chunk=chunk))
        finally:
            self._running -= 1
        usage = GenerateUsage(prompt_tokens=len(request.token_ids), completion_tokens=count)
        end = pb.GenerateFinished(reason=FINISH_REASON_LENGTH, usage=usage)
        await context.write(pb.StartGenerateResponse(finished=end))

    async def WatchStatus(self, request: pb.WatchStatusRequest, context: Any) -> None:  # type: ignore[override]
        """The load, once an interval."""
        await context.write(pb.EngineStatus(sequence=1, info=self._info))
        sequence = 1
        while True:
            sequence += 1
            load = pb.LoadReport(running_requests=self._running, free_slots=1 << 30)
            await context.write(pb.EngineStatus(sequence=sequence, load=load))
            await asyncio.sleep(request.interval_ms / 1000)


async def serve(name: str, registry: str, announced: str) -> None:
    """Serves until cancelled."""
    endpoint = Endpoint(name=name, incarnation=secrets.token_hex(16))
    stub = Stub(endpoint)
    server = Server("127.0.0.1:0", lambda s: add_EngineServicer_to_server(stub, s), ["kvmesh.v1.Engine"])
    endpoint.address = server.address
    membership = Membership(registry, Member(endpoint=endpoint, kind=MEMBER_KIND_ENGINE))
    await server.start()
    await membership.start()
    try:
        await server.ready()
        announce(announced, server.address)
        await asyncio.Event().wait()
    finally:
        await membership.stop()
        await server.stop(0)


if __name__ == "__main__":
    run(serve(*sys.argv[1:4]))
