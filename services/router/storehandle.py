"""Stores as a strategy sees them: calls to the real ones, on account of an attempt."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import grpc.aio

from kvmesh.errors import InvalidArgument
from kvmesh.stores import Held, Store
from kvmesh.strategy import Engine, TicketHandle
from kvmesh.v1.kvstore_pb2 import MatchRequest
from services.router.attempt import Attempt
from services.router.handles import EngineHandle
from services.router.link import EngineLink
from services.router.storelink import StoreLink

if TYPE_CHECKING:
    from services.router.saver import Saver

MATCH_S = 2.0


class StoreEndpoint(EngineHandle):
    """The part of a store that is the same as of an engine."""

    send_span = "restore"

    def under(self, salt: str) -> StoreEndpoint:
        """The same, for the KV of this salt."""
        if salt == self.salt:
            return self
        salted = copy.copy(self)
        salted.salt = salt
        return salted


class StoreHandle(Store):
    """One store for one attempt. `engines`: the links behind the attempt's engines, by name."""

    def __init__(self, attempt: Attempt, link: StoreLink, engines: Mapping[str, EngineLink], saver: Saver) -> None:
        self.name = link.name
        self._attempt = attempt
        self._link = link
        self._engines = engines
        self._saver = saver
        self._endpoint = StoreEndpoint(attempt, link)

    async def held(self, token_ids: Sequence[int], *, salt: str = "") -> Held:
        """Match."""
        a, link = self._attempt, self._link
        request = MatchRequest(token_ids=token_ids, salt=salt, model=a.request.model)
        a.use(link)
        try:
            reply = await link.store.Match(request, timeout=a.budget(MATCH_S))
        except grpc.aio.AioRpcError as error:
            raise a.failure(link, error) from error
        return Held(reply.matched, reply.in_memory)

    async def prep_recv(
        self, token_ids: Sequence[int], end: int, *, wait: float = 10.0, salt: str = ""
    ) -> TicketHandle:
        """PrepRecv."""
        return await self._endpoint.under(salt).prep_recv(token_ids, end, wait=wait)

    async def remote_send(
        self, token_ids: Sequence[int], ticket: TicketHandle, *, timeout: float | None = None, salt: str = ""
    ) -> int:
        """RemoteSend."""
        before = ticket.filled
        await self._endpoint.under(salt).remote_send(token_ids, ticket, timeout=timeout)
        return ticket.filled - before

    async def release(self, ticket: TicketHandle) -> None:
        """Release."""
        await self._attempt.release(ticket)

    def save(
        self,
        engine: Engine,
        token_ids: Sequence[int],
        *,
        when: str = "always",
        timeout: float = 30.0,
        salt: str = "",
    ) -> None:
        """In the background."""
        if engine.name not in self._engines:
            raise InvalidArgument(f"engine {engine.name} is not of this request's mesh")
        self._saver.save(
            self._attempt,
            self._engines[engine.name],
            self._link,
            tuple(token_ids),
            when=when,
            timeout=timeout,
            salt=salt,
        )
