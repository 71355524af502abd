"""Watches what a change of strategy does to the requests of this router, and says when it is to be taken back."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from services.router.lineup import WINDOW, Choice


@dataclass(frozen=True, slots=True)
class _Outcome:
    failed: bool
    # Of an answer that had a token.
    ttft: float


class Watchdog:
    """Keeps the last outcomes of each choice that has a guard, by revision."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[_Outcome]] = {}

    def keep(self, revisions: Collection[int]) -> None:
        """Forgets every other choice."""
        self._seen = {r: outcomes for r, outcomes in self._seen.items() if r in revisions}

    def see(self, choice: Choice, failed: bool, ttft: float) -> str:
        """One request that `choice` served is over: which bound is passed, in words; empty: none."""
        guard = choice.guard
        if guard is None:
            return ""
        outcomes = self._seen.setdefault(choice.revision, deque(maxlen=WINDOW))
        outcomes.append(_Outcome(failed, ttft))
        count = len(outcomes)
        if count < guard.min_requests:
            return ""
        rate = sum(o.failed for o in outcomes) / count
        if guard.max_error_rate and rate > guard.max_error_rate:
            return f"{rate:.1%} of {count} requests failed, over the bound of {guard.max_error_rate:.1%}"
        times = [o.ttft for o in outcomes if o.ttft]
        if guard.max_ttft_seconds and times and (mean := sum(times) / len(times)) > guard.max_ttft_seconds:
            return f"mean TTFT {mean:.3f} s of {len(times)} requests, over the bound of {guard.max_ttft_seconds:g} s"
        return ""
