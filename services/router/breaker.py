"""Circuit breaker: an engine that fails several times running is passed over for a while."""

from __future__ import annotations

# Failures in a row that open it, and for how long, seconds: doubled each time that it fails again at once.
FAILURES = 3
PAUSE_S = (1.0, 30.0)


class Breaker:
    """Counts what is the engine's own fault. Times are of any one clock, seconds."""

    def __init__(self) -> None:
        self._failures = 0
        self._pause = PAUSE_S[0]
        self._until = 0.0

    def good(self) -> None:
        """It has done a whole piece of work: all is forgotten."""
        self._failures, self._pause, self._until = 0, PAUSE_S[0], 0.0

    def bad(self, now: float) -> None:
        """It failed."""
        if now < self._until:
            # Work that was begun before.
            return
        self._failures += 1
        if self._failures >= FAILURES:
            self._until = now + self._pause
            self._pause = min(self._pause * 2, PAUSE_S[1])
            # After the pause the first failure opens it again.
            self._failures = FAILURES - 1

    def open(self, now: float) -> bool:
        """Whether others are to go first."""
        return now < self._until
