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
    """Open credits of one engine; `requests` and `tokens` are their sums. Times are of any one clock, seconds."""

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self._last = 0
        # In order of sending.
        self._open: dict[int, _Entry] = {}

    def charge(self, requests: int, tokens: int, now: float) -> int:
        """Adds a credit; the number is for `settle`."""
        self._last += 1
        self._open[self._last] = _Entry(requests, tokens, now)
        self.requests += requests
        self.tokens += tokens
        return self._last

    def settle(self, number: int) -> None:
        """Takes a credit back, the work being over; nothing happens when a report has done so."""
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
            self.settle(number)
