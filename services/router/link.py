"""One engine as the router sees it: a channel, the status stream that tells its life and load, and credit."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc.aio import EOF  # type: ignore[attr-defined]

from kvmesh.aio import Tasks
from kvmesh.blocks import BLOCK_TOKENS
from kvmesh.grpcx import channel
from kvmesh.strategy import Load
from kvmesh.v1.engine_pb2 import EngineInfo, LoadReport, WatchStatusRequest
from kvmesh.v1.engine_pb2_grpc import EngineStub
from kvmesh.v1.kv_pb2_grpc import KvEndpointStub
from kvmesh.v1.registry_pb2 import Member
from services.router.breaker import Breaker
from services.router.credit import Credits
from services.router.hearing import BEAT_S, Hearing, cancelled
from services.router.kvindex import BlockMap, CacheIndex
from services.router.meter import Meter

log = logging.getLogger(__name__)

BACKOFF_S = (0.1, 2.0)
# Nobody has asked for the cache so long: the engine need not tell any more.
CACHE_IDLE_S = 300.0


class EngineLink:
    """One incarnation of one engine. `on_change` is called when it is first described, comes up or goes down.

    Up means: the status stream delivers, and the process that answers is the one registered. Users hold the link with
    `acquire` and `release`; after `retire` the channel closes with the last of them.
    """

    def __init__(
        self,
        member: Member,
        tasks: Tasks,
        on_change: Callable[[], None],
        connect: Callable[[str], grpc.aio.Channel] = channel,
    ) -> None:
        self.member = member
        self.name = member.endpoint.name
        self.labels = dict(member.labels)
        self.info: EngineInfo | None = None
        self.report = LoadReport()
        self.reported = time.monotonic()
        self.connected = False
        # Told of each change of `load`, and when it may have become suspect or suspended.
        self.on_load: Callable[[], None] = lambda: None
        self.on_doubt: Callable[[], None] = lambda: None
        # Where what its cache holds goes, beside what others' hold.
        self.blocks = BlockMap()
        self._suspect = False
        self._load: Load | None = None
        self._channel = connect(member.endpoint.address)
        self.kv = KvEndpointStub(self._channel)
        self.engine = EngineStub(self._channel)
        self.breaker = Breaker()
        self.meter = Meter()
        self.hearing = Hearing(self.name)
        self._cache: CacheIndex | None = None
        self._cache_asked = 0.0
        self._call: Any = None
        self._reopening = False
        self._credits = Credits()
        self._users = 0
        self._retired = False
        self._tasks = tasks
        self._on_change = on_change
        self._status = tasks.start(self._follow(), f"status of {self.name}")

    @property
    def load(self) -> Load:
        """The last report plus credit."""
        if self._load is None:
            self._load = self._reckon()
        return self._load

    def _reckon(self) -> Load:
        r = self.report
        return Load(
            running=r.running_requests,
            waiting=r.waiting_requests + r.waiting_reservations,
            waiting_tokens=r.waiting_tokens,
            tickets=r.tickets,
            sending=r.sending,
            free_slots=r.free_slots,
            cached_slots=r.cached_slots,
            credit_requests=self._credits.requests,
            credit_tokens=self._credits.tokens,
            assigned_tokens=self._credits.assigned,
        )

    def _load_changed(self) -> None:
        self._load = None
        self.on_load()

    @property
    def suspect(self) -> bool:
        """A call failed as calls to the dead do; until the status stream delivers again, others go first."""
        return self._suspect

    @suspect.setter
    def suspect(self, suspect: bool) -> None:
        self._suspect = suspect
        if suspect:
            self.on_doubt()

    @property
    def suspended(self) -> bool:
        """Whether it failed so often that others are to go first for a while."""
        return self.breaker.open(time.monotonic())

    def failed(self) -> None:
        """It failed, by its own fault."""
        self.breaker.bad(time.monotonic())
        self.on_doubt()

    @property
    def block_tokens(self) -> int:
        """Tokens of one block in `cached_blocks`."""
        return (self.info.cache_block_tokens if self.info is not None else 0) or BLOCK_TOKENS

    def cached_blocks(self, hashes: Sequence[int]) -> int:
        """How many of these blocks, from the first on, the engine has cached; 0 until it has told."""
        return self.listen().matched(hashes)

    def listen(self) -> CacheIndex:
        """What its cache holds, as far as it has told; it is told to tell."""
        self._cache_asked = time.monotonic()
        if self._cache is None:
            self._cache = CacheIndex(blocks=self.blocks)
            self._reopen()
        return self._cache

    def _forget_cache(self) -> None:
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def _reopen(self) -> None:
        """The status stream begins anew, with or without the cache."""
        if self._call is not None:
            self._reopening = True
            self._call.cancel()

    def charge(self, requests: int, tokens: int) -> int:
        """Counts work just sent as load until it is reported; the number is for `settle`."""
        number = self._credits.charge(requests, tokens, time.monotonic())
        self._load_changed()
        return number

    def begun(self, number: int) -> None:
        """The work of that number gives tokens now: its prompt waits no more."""
        self._credits.begun(number)
        self._load_changed()

    def settle(self, number: int) -> None:
        """The work of that number is over."""
        self._credits.settle(number)
        self._load_changed()

    def acquire(self) -> None:
        """Keeps the channel open until `release`."""
        self._users += 1

    def release(self) -> None:
        """The end of one `acquire`."""
        self._users -= 1
        self._close_if_unused()

    def retire(self) -> None:
        """The engine left the mesh, or has a new life: no new requests, running calls may end."""
        self._retired = True
        self._status.cancel()
        self._down()
        self._forget_cache()
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._retired and self._users <= 0:
            self._tasks.start(self._channel.close(None), f"close channel to {self.name}")

    async def close(self) -> None:
        """Ends the status stream and the channel at once."""
        self._status.cancel()
        await asyncio.gather(self._status, return_exceptions=True)
        await self._channel.close(None)

    async def _follow(self) -> None:
        backoff = BACKOFF_S[0]
        while True:
            try:
                if await self._read_statuses():
                    backoff = BACKOFF_S[0]
                if self._reopening:
                    self._reopening = False
                    continue
                reason = "is silent" if self.hearing.silent else "ended"
            except grpc.aio.AioRpcError as error:
                reason = f"broke ({error.code().name}: {error.details()})"
            if self.connected:
                log.warning("engine %s is down: its status stream %s", self.name, reason)
                backoff = BACKOFF_S[0]
            self._down()
            await asyncio.sleep(backoff * random.uniform(0.75, 1.25))
            backoff = min(backoff * 2, BACKOFF_S[1])

    async def _read_statuses(self) -> bool:
        """Reads one status stream until it ends, or is silent; whether it delivered anything."""
        delivered = False
        call = self._call = self._watch_status()
        try:
            with self.hearing.listening(call.cancel):
                while (status := await call.read()) is not EOF:
                    self.hearing.heard()
                    self._deliver(status)
                    delivered = True
                return delivered
        except asyncio.CancelledError:
            if cancelled() or not (self._reopening or self.hearing.silent):
                raise
            return delivered
        finally:
            self._call = None
            call.cancel()

    def _watch_status(self) -> Any:
        """Opens the status stream."""
        return self.engine.WatchStatus(
            WatchStatusRequest(interval_ms=int(BEAT_S * 1000), cache=self._cache is not None)
        )

    def _deliver(self, status: Any) -> None:
        """Takes one of its messages, an EngineStatus."""
        event = status.WhichOneof("event")
        if event == "info":
            self._describe(status.info)
        elif event == "load":
            self.report = status.load
            self.reported = time.monotonic()
            self._credits.reported(self.reported)
            self._load_changed()
            if self._cache is not None and self.reported - self._cache_asked > CACHE_IDLE_S:
                self._forget_cache()
                self._reopen()
        elif event == "cache" and self._cache is not None:
            self._cache.apply(status.cache)
        self.suspect = False

    def _describe(self, info: EngineInfo) -> None:
        if info.endpoint.incarnation != self.member.endpoint.incarnation:
            log.warning("%s is answered for by another incarnation of %s", self.name, info.endpoint.name)
            self._down()
            return
        self.info = info
        self.connected = True
        self._on_change()

    def _down(self) -> None:
        if self.connected:
            self.connected = False
            self._on_change()
