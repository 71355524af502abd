"""The simulated runtime: the Runtime interface over the simulated scheduler, cache and links."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence

import numpy as np

from kvmesh.endpoint.base import Destination
from kvmesh.errors import FailedPrecondition, InvalidArgument, Unavailable
from kvmesh.process import ProcessRef
from kvmesh.sim.links import Link
from kvmesh.sim.peers import Inbox, Peers
from kvmesh.sim.profile import Profile
from kvmesh.v1.common_pb2 import SamplingParams
from kvmesh.v1.kv_pb2 import KvPool
from services.engine.base import Model, Outputs, Reservation, Runtime, RuntimeLoad, SendReport
from services.engine.sim.content import Arithmetic, Ids
from services.engine.sim.faults import Faults
from services.engine.sim.job import Job, seed_of
from services.engine.sim.kv import KvCache
from services.engine.sim.scheduler import Host, Scheduler
from services.engine.sim.sends import Sends


class SimRuntime(Runtime):
    """One simulated engine. `now` is the event loop's clock, in seconds; `seed` makes its jitter repeatable.

    `span`: decode steps that may be handed out together when nothing else happens; 1 is token by token. `faults` may
    be changed at any time; call `faults_changed` then. `host`: of the engines that share processors.
    """

    def __init__(
        self,
        profile: Profile,
        peers: Peers,
        *,
        faults: Faults | None = None,
        seed: int = 0,
        now: Callable[[], float] = time.monotonic,
        span: int = 1,
        arithmetic: Arithmetic | None = None,
        host: Host | None = None,
    ) -> None:
        m = profile.model
        self.profile = profile
        self.model = Model(m.vocab_size, m.context_length, m.eos_token_ids)
        self.layout = profile.layout
        self.total_slots = profile.batching.kv_tokens
        self.device = profile.device
        self.version = f"sim {profile.name}"
        self.pools = {}
        self.writers = [ProcessRef.current()]
        self.faults = faults or Faults()
        self.on_load = lambda: None
        self.on_cache = lambda stored, removed, snapshot: None
        self._peers = peers
        self._now = now
        self._rng = random.Random(seed)
        self._cache = KvCache(profile.batching.kv_tokens)
        self._scheduler = Scheduler(
            profile, self._cache, arithmetic or Arithmetic(m.context_length), self.faults, self._rng, now, span, host
        )
        link, into = (Link(profile.transfer.bytes_per_second, now) for _ in range(2))
        self._inbox = Inbox(self._cache, into)
        self._sends = Sends(profile, self._scheduler, self._cache, link, peers, self.faults, now)
        self._ended: asyncio.Future[str] | None = None
        self._stopping = False

    @property
    def load(self) -> RuntimeLoad:  # type: ignore[override]
        """The engine now."""
        return self._scheduler.load(self._sends.count)

    async def start(self) -> None:
        """Lets others write here."""
        self._ended = asyncio.get_running_loop().create_future()
        self.pools = await self._peers.open(self._inbox, self.layout, self.total_slots + 1)
        self._scheduler.on_load = lambda: self.on_load()
        self._scheduler.on_death = self._died

    def _died(self, why: str) -> None:
        self._stopping = True
        self._scheduler.reservations.close(Unavailable(why))
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(why)

    async def stop(self) -> None:
        """Ends everything."""
        self._stopping = True
        self._scheduler.stop("the engine is stopping")
        self._scheduler.reservations.close(Unavailable("the engine is stopping"))
        await self._peers.close()

    async def died(self) -> str:
        """Only by a fault on demand."""
        assert self._ended is not None, "not started"
        return await asyncio.shield(self._ended)

    def faults_changed(self) -> None:
        """`faults` were changed."""
        self._scheduler.wake()

    def _check(self) -> None:
        if self._stopping:
            raise Unavailable("the engine is stopping")

    async def reserve(self, token_ids: Sequence[int], end: int, wait: float) -> Reservation:
        """Reserves."""
        self._check()
        try:
            return await self._scheduler.reservations.reserve(_ids(token_ids)[:end], wait)
        finally:
            self.on_load()

    async def publish(self, reservation: int, upto: int) -> None:
        """Publishes what the slots hold, whatever that is."""
        self._check()
        self._scheduler.reservations.publish(reservation, upto)
        self._scheduler.wake()

    async def free(self, reservation: int) -> None:
        """Gives back."""
        self._scheduler.reservations.free(reservation)
        self._scheduler.wake()

    def generate(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        max_new: int,
        reservation: int | None,
        generated: int = 0,
    ) -> Outputs:
        """Generates. Of the sampling parameters those count that end it, temperature 0 or not, and the seed."""
        self._check()
        if form := sampling.WhichOneof("form"):
            raise InvalidArgument(f"sampling.{form}: a simulated engine has no grammar back end")
        ids = _ids(token_ids)
        outputs = Outputs(lambda: self._scheduler.abort(job))
        stops = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stops.update(self.model.eos_token_ids)
        job = Job(ids, len(ids), outputs, sampling, max_new, stops=frozenset(stops), seed=seed_of(sampling, self._rng))
        if reservation is not None:
            job.held = self._scheduler.reservations.take(reservation)
        self._scheduler.submit(job)
        return outputs

    async def send(self, token_ids: Sequence[int], begin: int, end: int, to: Destination) -> SendReport:
        """Prefills what is missing, and sends; there is nothing to make a checksum of."""
        self._check()
        return await self._sends.send(_ids(token_ids), begin, end, to.pools, to.slots)

    def forget(self, peers: Sequence[KvPool]) -> None:
        """Hangs up."""
        for pool in peers:
            self._peers.forget(pool)

    async def flush(self) -> None:
        """Empties the cache."""
        self._check()
        scheduler = self._scheduler
        if not scheduler.idle or scheduler.reservations.count or not self._cache.flush():
            raise FailedPrecondition("the cache is in use")

    def watch_cache(self) -> None:
        """Tells of blocks from now on."""
        blocks = self._cache.watch(lambda stored, removed: self.on_cache(stored, removed, False))
        self.on_cache(blocks, (), True)


def _ids(token_ids: Sequence[int]) -> Ids:
    return np.asarray(token_ids, np.uint32)
