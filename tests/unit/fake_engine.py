"""A FAKE engine for router tests: the real gRPC contract over a real port, but no model, no memory, no KV.

Its tokens are a function of all tokens before them, so that an answer can be checked wherever parts of it came from.
Every call is recorded; faults and gates make a method fail or wait at the test's word.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from kvmesh.errors import FailedPrecondition, InvalidArgument, MeshError, NotFound
from kvmesh.grpcx import Server, rpc
from kvmesh.membership import Membership
from kvmesh.ranges import check_range
from kvmesh.v1 import common_pb2, engine_pb2, engine_pb2_grpc, kv_pb2, kv_pb2_grpc
from kvmesh.v1.registry_pb2 import MEMBER_KIND_ENGINE, Member, MemberKind

VOCAB, CONTEXT, EOS = 320, 4096, 257
BYTES_PER_TOKEN = 64


def next_token(seq: list[int]) -> int:
    """A printable ASCII byte that depends on what came before."""
    return (7 * seq[-1] + 13 * len(seq) + sum(seq[-3:])) % 95 + 32


def answer(prompt: list[int], count: int, step: Callable[[list[int]], int] = next_token) -> list[int]:
    """What every fake engine generates after `prompt`."""
    seq = list(prompt)
    for _ in range(count):
        seq.append(step(seq))
    return seq[len(prompt) :]


@dataclass
class FakeTicket:
    tokens: list[int]
    matched: int
    end: int
    filled: int
    writing: bool = False


class FakeEngine(kv_pb2_grpc.KvEndpointServicer, engine_pb2_grpc.EngineServicer):
    """One fake engine; `mesh` is where fake engines find each other instead of a data plane."""

    def __init__(self, name: str, mesh: dict[str, FakeEngine], labels: dict[str, str], path: str = "") -> None:
        self.name, self.mesh, self.labels, self.path = name, mesh, labels, path
        mesh[name] = self
        self.calls: list[tuple[str, Any]] = []
        self.metadata: list[tuple[str, dict[str, str]]] = []
        self.tickets: dict[int, FakeTicket] = {}
        self.cached: list[int] = []
        self.faults: dict[str, MeshError] = {}
        self.gates: dict[str, asyncio.Event] = {}
        # Calls that were cancelled while they waited at a gate.
        self.cancelled: list[str] = []
        self.generating = 0
        self.sending = 0
        self.step = next_token
        self.chunk = 1
        self.die_after: int | None = None
        self.pause_after: tuple[int, asyncio.Event] | None = None
        self.stop_after: tuple[int, str] | None = None
        self.model = "fake"
        # What Hottest tells.
        self.contexts: list[list[int]] = []
        self.layout: common_pb2.KvLayout | None = None
        self.load = engine_pb2.LoadReport(free_slots=1000)
        # What the prefix cache is told to hold, in blocks.
        self.blocks: list[int] = []
        self.cache_changes: list[engine_pb2.CacheChange] = []
        self.watches: list[bool] = []
        self._changed = asyncio.Condition()
        self._last = 0
        self._revision = 0

    async def start(self, registry: str) -> None:
        def register(server: Any) -> None:
            kv_pb2_grpc.add_KvEndpointServicer_to_server(self, server)
            engine_pb2_grpc.add_EngineServicer_to_server(self, server)

        await self._join(registry, register, "kvmesh.v1.Engine", MEMBER_KIND_ENGINE)

    async def _join(
        self, registry: str, register: Callable[[Any], None], service: str, kind: MemberKind.ValueType
    ) -> None:
        self.server = Server("127.0.0.1:0", register, ["kvmesh.v1.KvEndpoint", service])
        self.endpoint = common_pb2.Endpoint(
            name=self.name, address=self.server.address, incarnation=secrets.token_hex(16)
        )
        await self.server.start()
        member = Member(endpoint=self.endpoint, kind=kind, labels=self.labels)
        self.membership = Membership(registry, member)
        await self.membership.start(5)

    async def stop(self) -> None:
        await self.membership.stop()
        await self.server.stop(0)

    async def kill(self) -> None:
        """Drops every connection, and forgets all it held; the registry is not told."""
        await self.server.stop(0)
        self.tickets.clear()
        await self.changed()

    async def until(self, predicate: Callable[[], bool], timeout: float = 5.0) -> None:
        """Waits until `predicate` holds; it is looked at after every progress of a call."""
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(predicate)

    async def changed(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def methods(self) -> list[str]:
        return [method for method, _ in self.calls]

    def requests(self, method: str) -> list[Any]:
        return [request for name, request in self.calls if name == method]

    async def report(self, load: engine_pb2.LoadReport) -> None:
        """Streams a load report."""
        self.load = load
        self._revision += 1
        await self.changed()

    async def cache(self, stored: list[int], removed: list[int] | None = None) -> None:
        """Streams a cache change to those who want it."""
        change = engine_pb2.CacheChange(stored=stored, removed=removed or [])
        self.blocks = [b for b in [*self.blocks, *stored] if b not in change.removed]
        self.cache_changes.append(change)
        await self.changed()

    async def _enter(self, method: str, request: Any, context: Any) -> None:
        self.calls.append((method, request))
        self.metadata.append((method, dict(context.invocation_metadata())))
        await self.changed()
        if (gate := self.gates.get(method)) is not None:
            try:
                await gate.wait()
            except asyncio.CancelledError:
                self.cancelled.append(method)
                raise
            finally:
                await self.changed()
        if (fault := self.faults.get(method)) is not None:
            raise fault

    def _ticket(self, ticket: common_pb2.Ticket) -> FakeTicket:
        if ticket.receiver.incarnation != self.endpoint.incarnation:
            raise FailedPrecondition("ticket of another incarnation")
        if ticket.id not in self.tickets:
            raise NotFound(f"ticket {ticket.id} is unknown")
        return self.tickets[ticket.id]

    @rpc
    async def PrepRecv(self, request: kv_pb2.PrepRecvRequest, context: Any) -> kv_pb2.PrepRecvResponse:
        await self._enter("PrepRecv", request, context)
        tokens = list(request.token_ids)
        _, end = check_range(0, request.end, len(tokens))
        matched = next((i for i in range(end) if self.cached[i : i + 1] != tokens[i : i + 1]), end)
        self._last += 1
        self.tickets[self._last] = FakeTicket(tokens, matched, end, matched)
        await self.changed()
        ticket = common_pb2.Ticket(receiver=self.endpoint, id=self._last, matched=matched, end=end)
        return kv_pb2.PrepRecvResponse(ticket=ticket)

    @rpc
    async def RemoteSend(self, request: kv_pb2.RemoteSendRequest, context: Any) -> kv_pb2.RemoteSendResponse:
        self.sending += 1
        try:
            held = self.mesh[request.ticket.receiver.name]._ticket(request.ticket)
            begin, end = check_range(request.begin, request.end, len(request.token_ids))
            if begin != held.filled or end > held.end:
                raise InvalidArgument(f"begin = {begin}, end = {end}: the ticket holds {held.filled} of {held.end}")
            await self._enter("RemoteSend", request, context)
            held.filled = end
            count = end - begin
            return kv_pb2.RemoteSendResponse(
                computed_tokens=end, sent_tokens=count, sent_bytes=count * BYTES_PER_TOKEN, transport="fake"
            )
        finally:
            self.sending -= 1
            await self.changed()

    @rpc
    async def Release(self, request: kv_pb2.ReleaseRequest, context: Any) -> kv_pb2.ReleaseResponse:
        await self._enter("Release", request, context)
        released = self.tickets.pop(request.ticket.id, None) is not None
        await self.changed()
        return kv_pb2.ReleaseResponse(released=released)

    @rpc
    async def StartGenerate(self, request: engine_pb2.StartGenerateRequest, context: Any) -> None:  # type: ignore[override]
        self.generating += 1
        try:
            await self._enter("StartGenerate", request, context)
            await self._generate(request, context)
        finally:
            self.generating -= 1
            await self.changed()

    def _take(self, request: engine_pb2.StartGenerateRequest) -> int:
        """Uses up the ticket, if any; where prefill begins."""
        if not request.HasField("ticket"):
            if request.begin != 0:
                raise InvalidArgument(f"begin = {request.begin} without a ticket")
            return 0
        held = self._ticket(request.ticket)
        if held.writing:
            raise FailedPrecondition("ticket is being written into")
        if request.begin != held.filled:
            raise InvalidArgument(f"begin = {request.begin}: the ticket holds {held.filled}")
        del self.tickets[request.ticket.id]
        return held.filled

    async def _generate(self, request: engine_pb2.StartGenerateRequest, context: Any) -> None:
        begin = self._take(request)
        seq, done = list(request.token_ids), 0
        end = engine_pb2.GenerateFinished(reason=common_pb2.FINISH_REASON_LENGTH)
        while done < request.sampling.max_new_tokens:
            await self._die(done, context)
            if self.pause_after is not None and done == self.pause_after[0]:
                await self.pause_after[1].wait()
            new = answer(seq, min(self.chunk, request.sampling.max_new_tokens - done), self.step)
            seq += new
            done += len(new)
            chunk = common_pb2.TokenChunk(token_ids=new)
            if request.sampling.logprobs:
                chunk.logprobs.extend([-0.5] * len(new))
            await context.write(engine_pb2.StartGenerateResponse(chunk=chunk))
            if self.stop_after is not None and done >= self.stop_after[0]:
                end.reason, end.stop_string = common_pb2.FINISH_REASON_STOP_STRING, self.stop_after[1]
                break
            if new[-1] == EOS:
                end.reason, end.stop_token_id = common_pb2.FINISH_REASON_STOP_TOKEN, EOS
                break
        await self._die(done, context)
        end.usage.prompt_tokens = len(request.token_ids)
        end.usage.cached_tokens = begin
        end.usage.completion_tokens = done
        await context.write(engine_pb2.StartGenerateResponse(finished=end))

    async def _die(self, done: int, context: Any) -> None:
        if done == self.die_after:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the fake engine was told to die")

    @rpc
    async def Hottest(self, request: engine_pb2.HottestRequest, context: Any) -> engine_pb2.HottestResponse:
        await self._enter("Hottest", request, context)
        found = [engine_pb2.HotContext(token_ids=tokens) for tokens in self.contexts[: request.count]]
        return engine_pb2.HottestResponse(contexts=found)

    @rpc
    async def Leave(self, request: engine_pb2.LeaveRequest, context: Any) -> engine_pb2.LeaveResponse:
        await self._enter("Leave", request, context)
        await self.membership.stop()
        return engine_pb2.LeaveResponse()

    @rpc
    async def WatchStatus(self, request: engine_pb2.WatchStatusRequest, context: Any) -> None:  # type: ignore[override]
        info = engine_pb2.EngineInfo(
            endpoint=self.endpoint,
            model=engine_pb2.ModelInfo(
                name=self.model, path=self.path, vocab_size=VOCAB, context_length=CONTEXT, eos_token_ids=[EOS]
            ),
            layout=self.layout,
            total_slots=1000,
            device="cpu",
            runtime="fake",
        )
        await context.write(engine_pb2.EngineStatus(sequence=1, info=info))
        sequence, seen, told = 1, -1, len(self.cache_changes)
        self.watches.append(request.cache)
        if request.cache:
            snapshot = engine_pb2.CacheChange(snapshot=True, stored=self.blocks)
            await context.write(engine_pb2.EngineStatus(sequence=1, cache=snapshot))
        await self.changed()
        while True:
            try:
                async with asyncio.timeout(request.interval_ms / 1000), self._changed:
                    await self._changed.wait_for(
                        lambda seen=seen, told=told: (  # type: ignore[misc]
                            self._revision != seen or (request.cache and len(self.cache_changes) > told)
                        )
                    )
            except TimeoutError:
                pass
            sequence, seen = sequence + 1, self._revision
            for change in self.cache_changes[told:] if request.cache else ():
                await context.write(engine_pb2.EngineStatus(sequence=sequence, cache=change))
            told = len(self.cache_changes)
            await context.write(engine_pb2.EngineStatus(sequence=sequence, load=self.load))
