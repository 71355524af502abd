"""Round robin: one after the other."""

from __future__ import annotations

import heapq

from kvmesh.strategy import Engine, Policy, Pool, Request

REMEMBERED = 4096


class RoundRobin(Policy):
    """Whoever's last turn is longest ago: right for any subset of the engines, and when some come and go."""

    def __init__(self) -> None:
        self._turns = 0
        # Number of each engine's last turn, oldest first.
        self._last: dict[str, int] = {}

    def pick(self, request: Request, engines: Pool) -> Engine:
        """The one whose turn it is."""
        queue: list[tuple[int, int]] | None = engines.memo.get(self)
        if queue is None:
            queue = engines.memo[self] = [(self._turn(e), place) for place, e in enumerate(engines)]
            heapq.heapify(queue)
        # Turns only grow: an entry that is behind, as the engine was picked among others, goes back where it belongs.
        while (turn := self._turn(engine := engines[queue[0][1]])) != queue[0][0]:
            heapq.heapreplace(queue, (turn, queue[0][1]))
        self._turns += 1
        self._last.pop(engine.name, None)
        self._last[engine.name] = self._turns
        if len(self._last) > REMEMBERED:
            del self._last[next(iter(self._last))]
        return engine

    def _turn(self, engine: Engine) -> int:
        return self._last.get(engine.name, 0)
