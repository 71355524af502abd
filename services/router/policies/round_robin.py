"""Round robin: one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from kvmesh.strategy import Engine, Policy, Request

REMEMBERED = 4096


class RoundRobin(Policy):
    """Whoever's last turn is longest ago: right for any subset of the engines, and when some come and go."""

    def __init__(self) -> None:
        self._turns = 0
        # Number of each engine's last turn, oldest first.
        self._last: dict[str, int] = {}

    def pick(self, request: Request, engines: Sequence[Engine]) -> Engine:
        """The one whose turn it is."""
        engine = min(engines, key=lambda e: self._last.get(e.name, 0))
        self._turns += 1
        self._last.pop(engine.name, None)
        self._last[engine.name] = self._turns
        if len(self._last) > REMEMBERED:
            del self._last[next(iter(self._last))]
        return engine
