"""Moving contexts from one holder of KV to another, outside of any request."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence

import grpc.aio
from opentelemetry.trace import Tracer

from kvmesh.aio import Tasks
from kvmesh.dataplane.layout import difference
from kvmesh.errors import FailedPrecondition, InvalidArgument, MeshError, NotFound, Unavailable, from_rpc
from kvmesh.stores import rendezvous
from kvmesh.strategy import Request
from kvmesh.telemetry import fail
from kvmesh.v1.common_pb2 import SamplingParams
from kvmesh.v1.engine_pb2 import HottestRequest
from kvmesh.v1.operator_pb2 import Migrated
from services.router.attempt import Attempt
from services.router.handles import EngineHandle
from services.router.ledger import Ledger
from services.router.link import EngineLink
from services.router.storehandle import StoreEndpoint
from services.router.storelink import StoreLink
from services.router.view import MeshView

# What one context may take, also when its source has to prefill it; and its wait for room at the target.
CONTEXT_S, ROOM_S = 60.0, 5.0
LIST_S = 10.0
MAX_HOTTEST = 1000


class ContextMover:
    """Moves contexts between the members of `view`. Releases run in `background`."""

    def __init__(self, view: MeshView, tracer: Tracer, background: Tasks) -> None:
        self._view = view
        self._tracer = tracer
        self._background = background

    def link(self, field: str, name: str) -> EngineLink:
        """The engine or store of that name. Raises NotFound, Unavailable."""
        link = self._view.links.get(name) or self._view.stores.links.get(name)
        if link is None:
            known = sorted({*self._view.links, *self._view.stores.links})
            raise NotFound(f"{field} = {name!r} is no member of the mesh; there is: {', '.join(known) or 'nobody'}")
        if not link.connected or link.info is None:
            raise Unavailable(f"{field} = {name!r} is not reached")
        return link

    def check_pair(self, source: EngineLink, target: EngineLink) -> None:
        """Raises InvalidArgument, NotFound, FailedPrecondition unless KV can go from one to the other."""
        if source.name == target.name:
            raise InvalidArgument(f"source and target are both {source.name}")
        assert source.info is not None and target.info is not None
        models = source.info.model.name, target.info.model.name
        if models[0] != models[1]:
            raise NotFound(f"{source.name} has {models[0]}, and {target.name} has {models[1]}")
        ours, theirs = target.info.layout, source.info.layout
        if ours.fingerprint != theirs.fingerprint:
            what = difference(ours, theirs)
            raise FailedPrecondition(f"{source.name} has KV of another layout than {target.name}: {what}")

    async def hottest(self, source: EngineLink, count: int) -> list[tuple[int, ...]]:
        """The contexts that the engine used last. Raises MeshError."""
        if isinstance(source, StoreLink):
            raise FailedPrecondition(f"{source.name} is a store, and does not know contexts; give text or tokens")
        if not 1 <= count <= MAX_HOTTEST:
            raise InvalidArgument(f"hottest = {count} is not between 1 and {MAX_HOTTEST}")
        try:
            reply = await source.engine.Hottest(HottestRequest(count=count), timeout=LIST_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, source.name) from error
        return [tuple(context.token_ids) for context in reply.contexts]

    def targets(self, source: EngineLink, token_ids: Sequence[int]) -> EngineLink:
        """Who should have a context when `source` goes: its store, else the least loaded other engine.

        Raises Unavailable when there is nobody.
        """
        stores = {link.name: link for link in self._view.stores.candidates([source])}
        if (name := rendezvous(stores, token_ids)) is not None:
            return stores[name]
        assert source.info is not None
        others = [
            link
            for link in self._view.candidates(source.info.model.name, {source.name})
            if link.info is not None and link.info.layout.fingerprint == source.info.layout.fingerprint
        ]
        if not others:
            raise Unavailable(f"nobody else can have the KV of {source.name}")
        return min(others, key=lambda link: link.load.work)

    async def move(
        self, source: EngineLink, target: EngineLink, token_ids: tuple[int, ...], salt: str, timeout: float
    ) -> Migrated:
        """Moves one context; what goes wrong is in the answer's `error`."""
        began = time.monotonic()
        moved = Migrated(tokens=len(token_ids), target=target.name)
        assert source.info is not None
        request = Request(
            f"migrate-{uuid.uuid4().hex[:16]}",
            token_ids,
            SamplingParams(),
            source.info.model.name,
            began + min(timeout, CONTEXT_S),
        )
        ledger = Ledger(len(token_ids), began)
        span = self._tracer.start_span("migrate")
        if span.is_recording():
            attributes = {"request_id": request.request_id, "sender": source.name, "receiver": target.name}
            span.set_attributes({f"kvmesh.{key}": value for key, value in attributes.items()})
        attempt = Attempt(request, ledger, self._tracer, span, self._background)
        try:
            async with asyncio.timeout(attempt.budget()):
                ticket = await _endpoint(attempt, target, salt).prep_recv(token_ids, len(token_ids), wait=ROOM_S)
                moved.matched = ticket.matched
                if ticket.missing:
                    sender = _endpoint(attempt, source, salt)
                    await sender.remote_send(token_ids, ticket, timeout=attempt.budget())
                moved.sent = ticket.filled - ticket.matched
                # What has arrived stays, as cache.
                await attempt.release(ticket)
        except (MeshError, TimeoutError) as error:
            moved.error = str(error) or "it took too long"
            fail(span, error)
        finally:
            attempt.close()
            share = ledger.share(source.name)
            moved.bytes, moved.computed = share.sent_bytes, share.prefilled_tokens
            moved.seconds = time.monotonic() - began
            span.end()
        return moved


def _endpoint(attempt: Attempt, link: EngineLink, salt: str) -> EngineHandle:
    return StoreEndpoint(attempt, link).under(salt) if isinstance(link, StoreLink) else EngineHandle(attempt, link)
