"""Continuous batching on a clock: chunked prefill, decode steps, retraction when slots run out.

Steps follow one another without a gap while there is work, each as long as the profile says. Where nothing can change,
several decode steps are taken as one (`span`), and cut short when something comes.
"""

from __future__ import annotations

import asyncio
import logging
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvmesh.sim.profile import Profile
from services.engine.base import Ending, RuntimeLoad
from services.engine.sim.content import Arithmetic
from services.engine.sim.faults import Faults
from services.engine.sim.job import Job
from services.engine.sim.kv import KvCache
from services.engine.sim.reservations import Reservations

log = logging.getLogger(__name__)

# What an answer is counted with at most, as SGLang itself does.
ANSWER_TOKENS = 4096
# How far behind the clock the engine's own time may fall when the machine is too slow.
LAG_S = 0.25


@dataclass(slots=True)
class Host:
    """What engines of one simulation share: `busy` of them have a step under way."""

    busy: int = 0


@dataclass(slots=True)
class _Step:
    """Under way from `began` to `ends`: passes over `chunks`, and `count` decode steps of `decodes`."""

    began: float
    chunks: list[Job] = field(default_factory=list)
    decodes: list[Job] = field(default_factory=list)
    count: int = 1
    ends: float = 0.0
    timer: asyncio.TimerHandle | None = None
    # Ends of the single decode steps of a span.
    marks: list[float] = field(default_factory=list)


class Scheduler:
    """One engine's. `now` is the loop's clock in seconds; `span` the most decode steps taken as one.

    With contention the other engines of `host` count anew at each step.
    """

    def __init__(
        self,
        profile: Profile,
        cache: KvCache,
        arithmetic: Arithmetic,
        faults: Faults,
        rng: random.Random,
        now: Callable[[], float],
        span: int = 1,
        host: Host | None = None,
    ) -> None:
        self._profile = profile
        self._host = host or Host()
        self._cache = cache
        self._arithmetic = arithmetic
        self._faults = faults
        self._rng = rng
        self._now = now
        self._span = 1 if profile.contention else span
        self.reservations = Reservations(cache, self._headroom)
        self._waiting: deque[Job] = deque()
        # Begun, and not all prefilled: one at most is in the middle of its prompt.
        self._prefilling: list[Job] = []
        self._running: list[Job] = []
        self._step: _Step | None = None
        self._time = 0.0
        self._stopped = ""
        self._tokens = self._finished = 0
        self.on_load: Callable[[], None] = lambda: None
        self.on_death: Callable[[str], None] = lambda why: None

    def load(self, sending: int) -> RuntimeLoad:
        """The engine now."""
        ahead = sum(j.end for j in self._waiting) + sum(j.end - j.done for j in self._prefilling)
        reserved = self.reservations.slots
        return RuntimeLoad(
            running=len(self._running) + len(self._prefilling),
            waiting=len(self._waiting),
            waiting_reservations=self.reservations.waiting,
            waiting_tokens=ahead,
            sending=sending,
            free=self._cache.free,
            cached=self._cache.cached,
            in_use=self._cache.total - self._cache.free - self._cache.cached - reserved,
            reserved=reserved,
        )

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._prefilling or self._running)

    def submit(self, job: Job) -> None:
        """A new job. One that can never fit fails."""
        if self._stopped:
            job.leave(self._cache, keep=False)
            job.finish(Ending("failed", message=self._stopped))
            return
        if job.end + 1 > self._cache.total:
            job.leave(self._cache, keep=False)
            job.finish(Ending("failed", message=f"out of memory: {job.end} tokens, {self._cache.total} slots"))
            return
        self._waiting.append(job)
        self.wake()

    def abort(self, job: Job) -> None:
        """Ends a job; its owner has been told."""
        if job.over:
            return
        job.over = True
        for jobs in (self._waiting, self._prefilling, self._running):
            if job in jobs:
                jobs.remove(job)
        if not job.busy:
            job.leave(self._cache, keep=False)
        self.wake()

    def stop(self, why: str) -> None:
        """Ends everything, now."""
        self._stopped = self._stopped or why
        if self._step is not None and self._step.timer is not None:
            self._step.timer.cancel()
        self._over()
        for job in (*self._waiting, *self._prefilling, *self._running):
            job.leave(self._cache, keep=False)
            job.finish(Ending("failed", message=why))
        self._waiting.clear()
        self._prefilling.clear()
        self._running.clear()

    def wake(self) -> None:
        """Something has changed."""
        if self._stopped:
            return
        if self._step is None:
            self._time = max(self._time, self._now())
            self._begin()
        else:
            self._cut()
            self.on_load()

    def _cut(self) -> None:
        """Ends a span with the single step that is under way."""
        step = self._step
        if step is None or step.count == 1 or step.timer is None:
            return
        now = self._now()
        count = min(bisect_left(step.marks, now) + 1, step.count)
        if count < step.count:
            step.timer.cancel()
            step.count, step.ends = count, step.marks[count - 1]
            step.timer = asyncio.get_running_loop().call_later(max(0.0, step.ends - now), self._end)

    def _begin(self) -> None:
        """The next step, if there is anything to do."""
        self.reservations.retry()
        self._over()
        if self._faults.hang:
            self.on_load()
            return
        step = _Step(self._time)
        self._choose_chunks(step)
        if self._running and (self._profile.batching.mixed or not step.chunks):
            self._choose_decodes(step)
        if not (step.chunks or step.decodes) and self._waiting and not self._running:
            # The last that ran made room for others.
            self._choose_chunks(step)
        if step.chunks or step.decodes:
            self._set_end(step)
            self._step = step
            self._host.busy += 1
            for job in (*step.chunks, *step.decodes):
                job.busy = True
            now = self._now()
            step.timer = asyncio.get_running_loop().call_later(max(0.0, step.ends - now), self._end)
        self.on_load()

    def _over(self) -> None:
        """No step is under way."""
        if self._step is not None:
            self._step = None
            self._host.busy -= 1

    def _choose_chunks(self, step: _Step) -> None:
        budget = self._profile.batching.chunk_tokens
        for job in self._prefilling:
            budget -= self._chunk(step, job, budget)
        while budget > 0 and self._waiting and not any(j.taken < j.end for j in self._prefilling):
            if (begun := self._admissible()) is None:
                return
            job = begun
            self._waiting.remove(job)
            if job.done == job.end:
                # All of it is cached: only a send can have that.
                self._sent(job)
                continue
            self._prefilling.append(job)
            budget -= self._chunk(step, job, budget)

    def _chunk(self, step: _Step, job: Job, budget: int) -> int:
        count = min(budget, job.end - job.taken)
        slots = self._cache.alloc(count) if count > 0 else None
        if slots is None:
            return 0
        job.take(slots)
        step.chunks.append(job)
        return count

    def _admissible(self) -> Job | None:
        """The first that waits, begun; if there is no room for it, the first with KV from a ticket.

        Those hold slots while they wait: behind one that waits for these very slots they would wait for ever.
        """
        first = self._waiting[0]
        if self._admit(first):
            return first
        return next(
            (job for job in self._waiting if job.held is not None and job is not first and self._admit(job)), None
        )

    def _admit(self, job: Job) -> bool:
        """Begins a job if it has room; what it finds in the cache is locked then."""
        generates = job.outputs is not None
        if generates and len(self._running) + len(self._prefilling) >= self._profile.batching.max_running:
            return False
        # A generation computes its last token in any case: its answer comes from there.
        node, there = self._cache.match(job.ids[: job.end - generates])
        self._cache.lock(node)
        need = job.end - len(there)
        if self._running or self._prefilling:
            need += self._headroom() + sum(j.end - j.taken for j in self._prefilling)
            need += self._expected(job) if generates else 0
        if need > self._cache.room:
            self._cache.unlock(node)
            return False
        job.begin(self._cache, node, there, self._time)
        return True

    def _expected(self, job: Job) -> int:
        left = min(job.max_new - job.produced, ANSWER_TOKENS)
        return int(left * self._profile.batching.reserve) + 1

    def _headroom(self) -> int:
        """What running requests will probably still need."""
        return sum(self._expected(j) for j in (*self._running, *self._prefilling) if j.outputs is not None)

    def _choose_decodes(self, step: _Step) -> None:
        while (short := len(self._running) > self._cache.room) and len(self._running) > 1:
            self._retract(min(self._running, key=lambda j: (len(j.answer), -j.context)))
        if short:
            if any(job.held is not None for job in self._waiting):
                # They have what it lacks, and lack what it has.
                self._retract(self._running[0], last=True)
            elif not (step.chunks or self._prefilling or self.reservations.count):
                job = self._running.pop()
                job.leave(self._cache, keep=True)
                job.finish(Ending("failed", message=f"out of memory after {job.context} tokens"))
            return
        batch = self._running
        step.decodes = list(batch)
        ahead = step.chunks or self._waiting or self._prefilling or self.reservations.waiting
        if self._span > 1 and not ahead and not any(j.stops for j in batch):
            step.count = min(self._span, min(j.max_new - j.produced for j in batch), self._cache.room // len(batch))

    def _retract(self, job: Job, last: bool = False) -> None:
        log.debug("a request of %d tokens is retracted", job.context)
        self._running.remove(job)
        job.retract(self._cache)
        if last:
            self._waiting.append(job)
        else:
            self._waiting.appendleft(job)

    def _set_end(self, step: _Step) -> None:
        p = self._profile
        factor = self._faults.slow * (1 + p.contention * self._host.busy)
        if p.jitter:
            factor *= max(0.5, 1 + p.jitter * self._rng.gauss(0, 1))
        at, batch = step.began, len(step.decodes)
        prefill = p.prefill_seconds([(j.done, j.taken) for j in step.chunks]) if step.chunks else 0.0
        resident = sum(j.context for j in step.decodes)
        decode = p.decode_seconds(batch, resident) if batch else 0.0
        # With each step the contexts grow by a token.
        growth = p.decode.per_kv_token * batch
        for _ in range(step.count):
            at += factor * (p.mixed_seconds(prefill, decode) if prefill else decode)
            decode += growth
            step.marks.append(at)
        step.ends = at

    def _end(self) -> None:
        """A step is over."""
        step = self._step
        assert step is not None
        self._time = max(step.ends, self._now() - LAG_S)
        for job in (*step.chunks, *step.decodes):
            job.busy = False
            if job.over:
                job.leave(self._cache, keep=False)
        for job in step.chunks:
            if not job.over:
                job.compute(self._cache, self._arithmetic)
                if job.done == job.end:
                    self._prefilling.remove(job)
                if job.outputs is None:
                    self._sent(job)
                elif job.done == job.end:
                    self._running.append(job)
                    self._hand_out(job, job.first_token(self._cache, self._arithmetic, self._profile.model.vocab_size))
        for job in step.decodes:
            if not job.over:
                self._decoded(job, step.count)
        if self._stopped:
            return
        self._begin()

    def _sent(self, job: Job) -> None:
        """A pass of a send is over, or it needs none. Whoever copies keeps a lock of its own on what it copies."""
        if job.on_ready is not None:
            job.on_ready()
        if job.done == job.end:
            job.over = True
            job.leave(self._cache, keep=True)

    def _decoded(self, job: Job, count: int) -> None:
        slots = self._cache.alloc(count)
        if slots is None:
            # A reservation was faster; the step counts for nothing here.
            return
        job.take(slots)
        self._hand_out(job, job.next_tokens(self._cache, self._arithmetic, self._profile.model.vocab_size))

    def _hand_out(self, job: Job, tokens: list[int]) -> None:
        job.put(tokens)
        self._tokens += len(tokens)
        if (ending := job.ending) is not None:
            self._running.remove(job)
            job.leave(self._cache, keep=True)
            job.finish(ending)
            self._finished += 1
        f = self._faults
        if 0 < f.die_after_tokens <= self._tokens or 0 < f.die_after_requests <= self._finished:
            why = f"fault on demand: died after {self._tokens} tokens and {self._finished} requests"
            self.stop(why)
            self.on_death(why)
