"""Admission: so many requests at once and no more; the rest wait in a bounded queue, or are told when to come again."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kvmesh.errors import ResourceExhausted
from kvmesh.v1.router_pb2 import PRIORITY_HIGH, PRIORITY_LOW, PRIORITY_NORMAL

# Seconds that a caller is told to wait: least, most, and when nothing is known yet.
RETRY_S = (0.1, 60.0, 1.0)
# Over how long the rate of work done is taken, and what there must be of it before it is believed, seconds.
RATE_S, BELIEVED_S = 10.0, 0.5
TENANTS = 4096
_CLASSES = (PRIORITY_LOW, PRIORITY_NORMAL, PRIORITY_HIGH)


@dataclass(order=True, slots=True)
class _Waiter:
    """In order of `tag`: the virtual time at which its tenant's share pays for it."""

    tag: float
    number: int
    cost: float = field(compare=False)
    turn: asyncio.Future[None] = field(compare=False)


class Rate:
    """Work done a second, while there was more to do than could be done."""

    def __init__(self) -> None:
        self._done = self._span = 0.0
        self._since: float | None = None

    def busy(self, busy: bool, now: float) -> None:
        """Whether requests wait, from `now` on."""
        if not busy:
            self._since = None
        elif self._since is None:
            self._since = now

    def did(self, cost: float, now: float) -> None:
        """A request is over."""
        if self._since is not None:
            took, self._since = now - self._since, now
            keep = math.exp(-took / RATE_S)
            self._done, self._span = self._done * keep + cost, self._span * keep + took

    def seconds(self, cost: float) -> float | None:
        """What this much work takes; None when it is not known."""
        if self._span < BELIEVED_S or not self._done:
            return None
        return cost * self._span / self._done


class Admission:
    """Cost is in tokens: of the prompt, and those asked for. 0: no limit.

    Who waits is let in by priority, and within one by tenant: each has the same share of the work.
    """

    def __init__(
        self, max_running: int, max_cost: int, max_waiting: int, clock: Callable[[], float] | None = None
    ) -> None:
        self._max_running = max_running or math.inf
        self._max_cost = max_cost or math.inf
        self._max_waiting = max_waiting
        # Looked up at each call: a simulation replaces it.
        self._clock = clock or (lambda: time.monotonic())
        self._running = 0
        self._cost = 0.0
        self._queues: dict[int, list[_Waiter]] = {priority: [] for priority in _CLASSES}
        self._numbers = itertools.count()
        self._virtual = 0.0
        # Tag of each tenant's last request.
        self._tags: dict[str, float] = {}
        self._most_tags = TENANTS
        self._rate = Rate()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(map(len, self._queues.values()))

    @asynccontextmanager
    async def entered(self, tenant: str, priority: int, cost: float, deadline: float) -> AsyncIterator[None]:
        """Around a request that runs; waits for its turn. Raises ResourceExhausted with `retry_after`, at once."""
        await self._enter(tenant, priority if priority in self._queues else PRIORITY_NORMAL, cost, deadline)
        try:
            yield
        finally:
            self._leave(cost)

    async def _enter(self, tenant: str, priority: int, cost: float, deadline: float) -> None:
        if not self.waiting and self._fits(cost):
            self._begin(cost)
            return
        self._check(priority, cost, deadline)
        tag = max(self._virtual, self._tags.get(tenant, 0.0)) + cost
        self._remember(tenant, tag)
        waiter = _Waiter(tag, next(self._numbers), cost, asyncio.get_running_loop().create_future())
        queue = self._queues[priority]
        bisect.insort(queue, waiter)
        self._rate.busy(True, self._clock())
        try:
            await waiter.turn
        except BaseException:
            if waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
                # Its turn came in the same moment.
                self._leave(cost)
            elif waiter in queue:
                self._forget(queue, waiter)
                self._let_in()
            raise

    def _check(self, priority: int, cost: float, deadline: float) -> None:
        """Raises ResourceExhausted when there is no use in waiting; makes room for the more important."""
        ahead = sum(w.cost for p, queue in self._queues.items() if p >= priority for w in queue)
        wait = self._rate.seconds(ahead + cost)
        left = deadline - self._clock()
        if wait is not None and wait > left:
            raise _refusal(f"it would begin in {wait:.1f} s, and has {left:.1f} s", wait)
        if self.waiting < self._max_waiting:
            return
        full = f"the router runs {self._running} requests, and {self.waiting} wait"
        lower = next((self._queues[p] for p in _CLASSES if p < priority and self._queues[p]), None)
        if lower is None:
            raise _refusal(full, wait)
        last = lower[-1]
        self._forget(lower, last)
        if not last.turn.done():
            last.turn.set_exception(_refusal(f"{full}; a more important request came", wait))

    def _fits(self, cost: float) -> bool:
        # A request that is larger than the limit runs alone.
        return self._running < self._max_running and (not self._running or self._cost + cost <= self._max_cost)

    def _begin(self, cost: float) -> None:
        self._running += 1
        self._cost += cost

    def _leave(self, cost: float) -> None:
        self._running -= 1
        self._cost -= cost
        self._rate.did(cost, self._clock())
        self._let_in()

    def _let_in(self) -> None:
        for priority in reversed(_CLASSES):
            queue = self._queues[priority]
            while queue and self._fits(queue[0].cost):
                waiter = queue[0]
                self._forget(queue, waiter)
                if waiter.turn.done():
                    # It has left, and has not come to say so yet.
                    continue
                self._virtual = max(self._virtual, waiter.tag - waiter.cost)
                self._begin(waiter.cost)
                waiter.turn.set_result(None)
            if queue:
                # What is less important must not go around it.
                break
        if not self.waiting:
            # Who waits from now on waits with those who come with it.
            self._virtual = 0.0
            self._tags.clear()
        self._rate.busy(bool(self.waiting), self._clock())

    def _forget(self, queue: list[_Waiter], waiter: _Waiter) -> None:
        del queue[bisect.bisect_left(queue, waiter)]

    def _remember(self, tenant: str, tag: float) -> None:
        self._tags[tenant] = tag
        if len(self._tags) > self._most_tags:
            self._tags = {t: tag for t, tag in self._tags.items() if tag > self._virtual}
            self._most_tags = max(TENANTS, 2 * len(self._tags))


def _refusal(reason: str, wait: float | None) -> ResourceExhausted:
    least, most, unknown = RETRY_S
    error = ResourceExhausted(f"no room: {reason}")
    error.retry_after = unknown if wait is None else min(most, max(least, wait))
    return error
