"""Saves: what engines have computed goes to the stores after the answer, in the background."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence

from opentelemetry.trace import Span, Tracer

from kvmesh.aio import Tasks
from kvmesh.blocks import BLOCK_TOKENS, block_hashes
from kvmesh.errors import MeshError
from kvmesh.stores import Store
from kvmesh.telemetry import fail
from services.router.attempt import Attempt
from services.router.handles import EngineHandle
from services.router.ledger import Ledger
from services.router.link import EngineLink
from services.router.seen import Seen
from services.router.storehandle import StoreEndpoint, StoreHandle
from services.router.storelink import StoreLink

log = logging.getLogger(__name__)

# Saves side by side, and those that wait besides; what comes on top is left out.
RUNNING, WAITING = 4, 64
# How long a save may wait for room at the store.
ROOM_S = 5.0


class Saver:
    """Owner of all saves of one router. Releases run in `background`."""

    def __init__(self, tracer: Tracer, background: Tasks) -> None:
        self._tracer = tracer
        self._background = background
        self._tasks = Tasks()
        self._slots = asyncio.Semaphore(RUNNING)
        self._seen = Seen()
        # Saves that were left out.
        self.dropped = 0

    def handles(self, attempt: Attempt, stores: Sequence[StoreLink], engines: Mapping[str, EngineLink]) -> list[Store]:
        """The stores for one attempt."""
        return [StoreHandle(attempt, link, engines, self) for link in stores]

    def save(
        self,
        attempt: Attempt,
        engine: EngineLink,
        store: StoreLink,
        token_ids: tuple[int, ...],
        *,
        when: str,
        timeout: float,
        salt: str,
    ) -> None:
        """Begins a save, unless `when` (WriteBack) forbids it or too many wait."""
        blocks = len(token_ids) // BLOCK_TOKENS
        if when == "never" or not blocks:
            return
        if when == "second":
            blocks = self._seen.add(block_hashes(token_ids))
        if not blocks:
            return
        if len(self._tasks) >= RUNNING + WAITING:
            self.dropped += 1
            log.warning("%s is not saved: %d saves wait already", attempt.request.request_id, len(self._tasks))
            return
        request = dataclasses.replace(
            attempt.request, token_ids=token_ids[: blocks * BLOCK_TOKENS], deadline=time.monotonic() + timeout
        )
        span = attempt.child("save", store, tokens=len(request.token_ids), sender=engine.name, when=when)
        # The request's own span is not the save's to end.
        own = span if span is not attempt.span else None
        saving = Attempt(
            request, Ledger(len(request.token_ids), time.monotonic()), self._tracer, span, self._background
        )
        for link in (engine, store):
            link.acquire()
        task = self._tasks.start(self._save(saving, engine, store, salt, own), f"save {request.request_id}")
        task.add_done_callback(lambda _: self._over(saving, own, (engine, store)))

    async def _save(self, attempt: Attempt, engine: EngineLink, store: StoreLink, salt: str, span: Span | None) -> None:
        token_ids = attempt.request.token_ids
        try:
            async with asyncio.timeout(attempt.budget()), self._slots:
                target = StoreEndpoint(attempt, store).under(salt)
                ticket = await target.prep_recv(token_ids, len(token_ids), wait=ROOM_S)
                if ticket.missing:
                    await EngineHandle(attempt, engine).remote_send(token_ids, ticket, timeout=attempt.budget())
        except (MeshError, TimeoutError) as error:
            log.info("%s is not saved to %s: %s", attempt.request.request_id, store.name, error)
            if span is not None:
                fail(span, error)

    def _over(self, attempt: Attempt, span: Span | None, links: Sequence[EngineLink]) -> None:
        attempt.close()
        for link in links:
            link.release()
        if span is not None:
            span.end()

    async def drain(self, timeout: float) -> bool:
        """Waits for the saves under way, so many seconds at most; whether none is left."""
        return await self._tasks.drain(timeout)

    async def close(self) -> None:
        """Ends every save."""
        await self._tasks.close()
