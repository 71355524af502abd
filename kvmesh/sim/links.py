"""Network links of simulated engines: concurrent transfers share a link's bandwidth equally."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable


class Link:
    """`rate` in bytes a second. Each transfer ends when it has had its bytes' worth of its share."""

    def __init__(self, rate: float, now: Callable[[], float]) -> None:
        self.rate = rate
        self._now = now
        # Bytes that each transfer that was there all the time has had.
        self._served = 0.0
        self._at = now()
        self._numbers = itertools.count()
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._timer: asyncio.TimerHandle | None = None

    @property
    def busy(self) -> int:
        """Transfers under way."""
        return len(self._waiting)

    async def carry(self, size: int) -> None:
        """Returns when `size` bytes have passed. Cancelling takes the rest off the link."""
        self._advance()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (self._served + size, next(self._numbers), done)
        heapq.heappush(self._waiting, entry)
        self._plan()
        try:
            await done
        finally:
            if not done.done() or done.cancelled():
                self._advance()
                if entry in self._waiting:
                    self._waiting.remove(entry)
                    heapq.heapify(self._waiting)
                self._plan()

    def _advance(self) -> None:
        now = self._now()
        if self._waiting:
            self._served += (now - self._at) * self.rate / len(self._waiting)
        self._at = now

    def _plan(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            left = max(0.0, self._waiting[0][0] - self._served) * len(self._waiting) / self.rate
            self._timer = asyncio.get_running_loop().call_later(left, self._due, self._waiting[0][0])

    def _due(self, target: float) -> None:
        self._timer = None
        self._advance()
        # Timers come a little early or late: the one that it was set for is done.
        self._served = max(self._served, target) if self._waiting else self._served
        while self._waiting and self._waiting[0][0] <= self._served:
            done = heapq.heappop(self._waiting)[2]
            if not done.done():
                done.set_result(None)
        self._plan()
