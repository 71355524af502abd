"""What the gRPC services of every KV endpoint have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeAlias

import grpc.aio
from opentelemetry.trace import Span

from kvmesh.dataplane.layout import Layout, difference
from kvmesh.endpoint.receiver import DEFAULT_TTL_MS, MAX_TTL_MS, MAX_WAIT_MS, MIN_TTL_MS, Receiver
from kvmesh.errors import FailedPrecondition, InvalidArgument
from kvmesh.grpcx import rpc, time_left
from kvmesh.ranges import check_range
from kvmesh.v1 import kv_pb2, kv_pb2_grpc

OWNER_CHARS = 128
# What a call without a deadline may take.
REQUEST_S = 300.0

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class KvCalls(kv_pb2_grpc.KvEndpointServicer, kv_pb2_grpc.KvPeerServicer):
    """The calls that are the receiver's business. It stays its giver's."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    async def _prepare(
        self, request: kv_pb2.PrepRecvRequest, token_ids: Sequence[int], context: Context, span: Span
    ) -> kv_pb2.PrepRecvResponse:
        """PrepRecv, once the prompt is checked. Raises MeshError."""
        _, end = check_range(0, request.end, len(token_ids))
        ttl = request.ttl_ms or DEFAULT_TTL_MS
        if not MIN_TTL_MS <= ttl <= MAX_TTL_MS:
            raise InvalidArgument(f"ttl_ms = {ttl} is not 0 or between {MIN_TTL_MS} and {MAX_TTL_MS}")
        if request.wait_ms > MAX_WAIT_MS:
            raise InvalidArgument(f"wait_ms = {request.wait_ms} is more than {MAX_WAIT_MS}")
        # A little earlier than the caller's deadline: a clear answer beats none.
        wait = min(request.wait_ms / 1000, time_left(context, REQUEST_S) - 0.05)
        layout = request.sender_layout if request.HasField("sender_layout") else None
        ticket = await self._receiver.prepare(token_ids, end, ttl, wait, request.owner, layout)
        # A ticket of a caller that has gone already is nobody's.
        if context.cancelled() or context.done():
            self._receiver.release(ticket)
        if span.is_recording():
            span.set_attributes({"kvmesh.ticket": ticket.id, "kvmesh.matched": ticket.matched})
        return kv_pb2.PrepRecvResponse(ticket=ticket)

    @rpc
    async def Release(self, request: kv_pb2.ReleaseRequest, context: Context) -> kv_pb2.ReleaseResponse:
        """Takes a ticket back."""
        return kv_pb2.ReleaseResponse(released=self._receiver.release(request.ticket))

    @rpc
    async def Write(self, requests: AsyncIterator[kv_pb2.WriteRequest], context: Context) -> None:  # type: ignore[override]
        """A peer writes into a ticket."""
        await self._receiver.write(requests, context)

    @rpc
    async def Stopped(self, request: kv_pb2.StoppedRequest, context: Context) -> kv_pb2.StoppedResponse:
        """A peer has stopped writing."""
        self._receiver.stopped(request.sender_incarnation, request.write_id)
        return kv_pb2.StoppedResponse()


def check_owner(owner: str) -> None:
    """Raises InvalidArgument for one that is too long."""
    if len(owner) > OWNER_CHARS:
        raise InvalidArgument(f"owner has {len(owner)} characters, at most {OWNER_CHARS} are kept")


def check_send(request: kv_pb2.RemoteSendRequest, tokens: int, ours: Layout) -> tuple[int, int]:
    """(begin, end) of a send of a prompt of so many tokens. Raises InvalidArgument, FailedPrecondition."""
    ticket = request.ticket
    begin, end = check_range(request.begin, request.end, tokens)
    if not ticket.receiver.address:
        raise InvalidArgument("ticket.receiver.address is empty")
    if end > ticket.end or begin < ticket.matched:
        raise InvalidArgument(
            f"begin = {begin}, end = {end}: the ticket has slots for {ticket.matched} to {ticket.end}"
        )
    if ticket.layout_fingerprint != ours.fingerprint:
        raise FailedPrecondition(f"the receiver's KV has another layout: {difference(ours.message(), ticket.layout)}")
    if begin % ours.page_size or end % ours.page_size:
        raise InvalidArgument(f"begin = {begin}, end = {end} are no multiples of the page size {ours.page_size}")
    return begin, end
