"""Sub-request calls straight to one engine, as a router makes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from kvmesh.grpcx import channel
from kvmesh.v1 import engine_pb2, kv_pb2
from kvmesh.v1.common_pb2 import SamplingParams, Ticket
from kvmesh.v1.engine_pb2_grpc import EngineStub
from kvmesh.v1.kv_pb2_grpc import KvEndpointStub, KvPeerStub

CALL_S = 60.0
Load = engine_pb2.LoadReport


@dataclass
class Generated:
    """A whole StartGenerate."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: engine_pb2.GenerateFinished = field(default_factory=engine_pb2.GenerateFinished)


class DirectEngine:
    """One engine at `address`."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self.channel = channel(address)
        self.kv: Any = KvEndpointStub(self.channel)
        self.peer: Any = KvPeerStub(self.channel)
        self.engine: Any = EngineStub(self.channel)
        self.info = engine_pb2.EngineInfo()

    async def __aenter__(self) -> DirectEngine:
        async for status in self.statuses():
            self.info = status.info
            break
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.channel.close(None)

    async def statuses(self) -> AsyncIterator[engine_pb2.EngineStatus]:
        """The status stream."""
        call = self.engine.WatchStatus(engine_pb2.WatchStatusRequest(interval_ms=200), timeout=CALL_S)
        try:
            async for status in call:
                yield status
        finally:
            call.cancel()

    async def until(self, holds: Callable[[Load], bool], timeout: float = 20.0) -> Load:
        """The first load report that `holds`; fails with the last one when none comes in time."""
        last = Load()
        try:
            async with asyncio.timeout(timeout):
                async for status in self.statuses():
                    if status.HasField("load"):
                        last = status.load
                        if holds(last):
                            return last
        except TimeoutError:
            pass
        raise AssertionError(f"{self.name} is not as awaited after {timeout:g} s; its last report:\n{last}")

    async def at_rest(self, timeout: float = 20.0) -> Load:
        """The load once nothing runs, waits or is held, and every slot is free or cached; fails if it does not come."""
        return await self.until(lambda load: idle(load) and spare(load) == self.info.total_slots, timeout)

    async def flush(self) -> None:
        """Empties the cache, once the engine is at rest."""
        await self.at_rest()
        async with asyncio.timeout(10):
            while True:
                # SGLang drops a request a moment after its last token.
                with suppress(grpc.aio.AioRpcError):
                    await self.engine.Flush(engine_pb2.FlushRequest(), timeout=CALL_S)
                    break
                await asyncio.sleep(0.02)
        await self.until(lambda load: load.free_slots == self.info.total_slots)

    async def prepare(self, tokens: Sequence[int], end: int = -1, timeout: float = CALL_S, **fields: Any) -> Ticket:
        """PrepRecv."""
        request = kv_pb2.PrepRecvRequest(token_ids=tokens, end=end, **fields)
        return (await self.kv.PrepRecv(request, timeout=timeout)).ticket

    def send(self, tokens: Sequence[int], ticket: Ticket, begin: int | None = None, end: int | None = None) -> Any:
        """RemoteSend: by default of all that the ticket misses. A call to be awaited."""
        request = kv_pb2.RemoteSendRequest(
            token_ids=tokens,
            begin=ticket.matched if begin is None else begin,
            end=ticket.end if end is None else end,
            ticket=ticket,
        )
        return self.kv.RemoteSend(request, timeout=CALL_S)

    async def release(self, ticket: Ticket) -> bool:
        """Release."""
        return (await self.kv.Release(kv_pb2.ReleaseRequest(ticket=ticket), timeout=CALL_S)).released

    def start(
        self,
        tokens: Sequence[int],
        ticket: Ticket | None = None,
        begin: int | None = None,
        request_id: str = "",
        model: str = "",
        generated: int = 0,
        **sampling: Any,
    ) -> Any:
        """StartGenerate: greedy, and past the end of the sequence, unless told otherwise. The call."""
        chosen = {"temperature": 0.0, "ignore_eos": True, **sampling}
        request = engine_pb2.StartGenerateRequest(
            request_id=request_id,
            token_ids=tokens,
            begin=(0 if ticket is None else ticket.end) if begin is None else begin,
            ticket=ticket,
            model=model,
            generated=generated,
            sampling=SamplingParams(**{k: v for k, v in chosen.items() if v is not None}),
        )
        return self.engine.StartGenerate(request, timeout=CALL_S)

    async def generate(self, tokens: Sequence[int], ticket: Ticket | None = None, **fields: Any) -> Generated:
        """All of a StartGenerate."""
        result = Generated()
        async for message in self.start(tokens, ticket, **fields):
            result.token_ids += message.chunk.token_ids
            result.logprobs += message.chunk.logprobs
            if message.HasField("finished"):
                result.finished = message.finished
        return result


def idle(load: Load) -> bool:
    """Nobody runs, waits or holds anything."""
    return not (
        load.running_requests
        or load.waiting_requests
        or load.waiting_reservations
        or load.tickets
        or load.sending
        or load.running_slots
        or load.reserved_slots
        or load.quarantined_slots
    )


def spare(load: Load) -> int:
    """Slots that anybody could have."""
    return load.free_slots + load.cached_slots
