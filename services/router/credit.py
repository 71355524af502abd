"""Credit: work that this router has just sent to an engine, counted as load until a report can have seen it."""

from __future__ import annotations

from dataclasses import dataclass

# A report that comes this long after something was sent has counted it.
SEEN_AFTER_S = 0.1


@dataclass(slots=True)
class _Entry:
    requests: int
    tokens: int
    sent: float


class Credits:
    """Open credits of one engine; `requests` and `tokens` are their sums. Times are of any one clock, seconds.

    `assigned`: tokens of all that was charged and has not begun to give tokens, whether reported or not.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self.assigned = 0
        self._last = 0
        # In order of sending.
        self._open: dict[int, _Entry] = {}
        self._assigned: dict[int, int] = {}

    def charge(self, requests: int, tokens: int, now: float) -> int:
        """Adds a credit; the number is for `settle`."""
        self._last += 1
        self._open[self._last] = _Entry(requests, tokens, now)
        self._assigned[self._last] = tokens
        self.requests += requests
        self.tokens += tokens
        self.assigned += tokens
        return self._last

    def begun(self, number: int) -> None:
        """All of it has been prefilled."""
        self.assigned -= self._assigned.pop(number, 0)

    def settle(self, number: int) -> None:
        """Takes a credit back, the work being over; nothing happens when a report has done so."""
        self.begun(number)
        self._reported(number)

    def _reported(self, number: int) -> None:
        if (entry := self._open.pop(number, None)) is not None:
            self.requests -= entry.requests
            self.tokens -= entry.tokens

    def reported(self, now: float) -> None:
        """A load report came: whatever it must have counted is credit no more."""
        seen = []
        for number, entry in self._open.items():
            if now - entry.sent < SEEN_AFTER_S:
                break
            seen.append(number)
        for number in seen:
            self._reported(number)
