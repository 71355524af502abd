"""A FAKE KV store for router tests: the real gRPC contract over a real port, but no memory, no KV.

It finds fake engines, and they find it, in the same `mesh`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fake_engine import BYTES_PER_TOKEN, CONTEXT, VOCAB, FakeEngine, FakeTicket

from kvmesh.grpcx import rpc
from kvmesh.ranges import check_range
from kvmesh.v1 import common_pb2, engine_pb2, kv_pb2, kv_pb2_grpc, kvstore_pb2, kvstore_pb2_grpc
from kvmesh.v1.registry_pb2 import MEMBER_KIND_KVSTORE

BLOCK = 64


class FakeStore(FakeEngine, kvstore_pb2_grpc.KvStoreServicer):
    """One fake store; `kept` are the prefixes that it has, by salt."""

    def __init__(self, name: str, mesh: dict[str, FakeEngine]) -> None:
        super().__init__(name, mesh, {})
        self.kept: list[tuple[str, list[int]]] = []
        # Whether what it keeps is not in memory.
        self.on_disk = False

    async def start(self, registry: str) -> None:
        def register(server: Any) -> None:
            kv_pb2_grpc.add_KvEndpointServicer_to_server(self, server)
            kvstore_pb2_grpc.add_KvStoreServicer_to_server(self, server)

        await self._join(registry, register, "kvmesh.v1.KvStore", MEMBER_KIND_KVSTORE)

    def has(self, tokens: list[int], salt: str) -> int:
        """Tokens of this prompt that are kept, in whole blocks."""
        best = 0
        for owner, kept in self.kept:
            same = next((i for i, (a, b) in enumerate(zip(kept, tokens, strict=False)) if a != b), None)
            count = min(len(kept), len(tokens)) if same is None else same
            best = max(best, count if owner == salt else 0)
        return best // BLOCK * BLOCK

    @rpc
    async def PrepRecv(self, request: kv_pb2.PrepRecvRequest, context: Any) -> kv_pb2.PrepRecvResponse:
        await self._enter("PrepRecv", request, context)
        tokens = list(request.token_ids)
        _, end = check_range(0, request.end, len(tokens))
        end = end // BLOCK * BLOCK
        matched = min(end, self.has(tokens, request.salt))
        self._last += 1
        ticket = FakeTicket(tokens, matched, end, matched)
        self.tickets[self._last] = ticket
        self._salts = {**getattr(self, "_salts", {}), self._last: request.salt}
        await self.changed()
        message = common_pb2.Ticket(receiver=self.endpoint, id=self._last, matched=matched, end=end)
        return kv_pb2.PrepRecvResponse(ticket=message)

    @rpc
    async def RemoteSend(self, request: kv_pb2.RemoteSendRequest, context: Any) -> kv_pb2.RemoteSendResponse:
        self.sending += 1
        try:
            held = self.mesh[request.ticket.receiver.name]._ticket(request.ticket)
            begin, end = check_range(request.begin, request.end, len(request.token_ids))
            assert begin == held.filled and end <= held.end
            await self._enter("RemoteSend", request, context)
            upto = max(begin, min(end, self.has(list(request.token_ids), request.salt)))
            held.filled = upto
            return kv_pb2.RemoteSendResponse(
                cached_tokens=upto,
                sent_tokens=upto - begin,
                sent_bytes=(upto - begin) * BYTES_PER_TOKEN,
                transport="fake",
            )
        finally:
            self.sending -= 1
            await self.changed()

    @rpc
    async def Release(self, request: kv_pb2.ReleaseRequest, context: Any) -> kv_pb2.ReleaseResponse:
        await self._enter("Release", request, context)
        held = self.tickets.pop(request.ticket.id, None)
        if held is not None and held.filled:
            self.kept.append((self._salts[request.ticket.id], held.tokens[: held.filled]))
        await self.changed()
        return kv_pb2.ReleaseResponse(released=held is not None)

    @rpc
    async def Match(self, request: kvstore_pb2.MatchRequest, context: Any) -> kvstore_pb2.MatchResponse:
        await self._enter("Match", request, context)
        matched = self.has(list(request.token_ids), request.salt)
        return kvstore_pb2.MatchResponse(matched=matched, in_memory=0 if self.on_disk else matched)

    @rpc
    async def WatchStatus(self, request: kvstore_pb2.WatchStoreRequest, context: Any) -> None:  # type: ignore[override]
        info = kvstore_pb2.StoreInfo(
            endpoint=self.endpoint,
            model=engine_pb2.ModelInfo(name=self.model, vocab_size=VOCAB, context_length=CONTEXT),
            block_tokens=BLOCK,
        )
        await context.write(kvstore_pb2.StoreStatus(info=info))
        while True:
            await context.write(kvstore_pb2.StoreStatus(stats=kvstore_pb2.StoreStats(memory_free=9)))
            await asyncio.sleep(request.interval_ms / 1000)
