"""How fast an engine works, fitted to what its answers say, the newest counting most."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from kvmesh.pace import Line, Pace
from kvmesh.v1.common_pb2 import GenerateUsage
from kvmesh.v1.kv_pb2 import RemoteSendResponse

# What a measurement still counts after the next one: about the last 50 make the line.
KEEP = 0.98
# Below this spread (relative variance of x) the slope cannot be told from the fixed part.
SPREAD = 0.01
# Over how long the share of time that goes into prefilling is taken, and its bound.
RECENT_S, MOST_BUSY = 10.0, 0.9


class Fit:
    """A line through measurements of (x, seconds), neither part negative; `guess` until there is one."""

    def __init__(self, guess: Line) -> None:
        self.line = guess
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, seconds: float) -> None:
        """One measurement; one of nothing is passed over."""
        if x <= 0 or seconds < 0:
            return
        self._weight = self._weight * KEEP + 1
        self._x = self._x * KEEP + x
        self._y = self._y * KEEP + seconds
        self._xx = self._xx * KEEP + x * x
        self._xy = self._xy * KEEP + x * seconds
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x * mean_x
        if variance > SPREAD * mean_x * mean_x:
            each = (self._xy / self._weight - mean_x * mean_y) / variance
            each = min(max(each, 0.0), mean_y / mean_x)
        else:
            each = mean_y / mean_x
        self.line = Line(max(0.0, mean_y - each * mean_x), each)


class Meter:
    """Measures one engine; `pace` is the result. Times are of `clock`, seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._recent = 0.0
        self._since = clock()
        guess = Pace()
        self._prefill, self._send, self._step = Fit(guess.prefill), Fit(guess.send), Fit(guess.step)
        self._measured = 0

    @property
    def pace(self) -> Pace:
        """As measured up to now."""
        return Pace(self._prefill.line, self._send.line, self._step.line, self._busy(), self._measured)

    def prefilling(self, tokens: int) -> None:
        """So many tokens are to be prefilled there; less than 0: so many turned out to be cached."""
        now = self._clock()
        self._recent = max(0.0, self._recent * math.exp((self._since - now) / RECENT_S) + tokens)
        self._since = now

    def _busy(self) -> float:
        tokens = self._recent * math.exp((self._since - self._clock()) / RECENT_S)
        return min(MOST_BUSY, self._prefill.line.each * tokens / RECENT_S)

    def generated(self, usage: GenerateUsage, running: int) -> None:
        """A generation ended well; `running` requests ran there at the time."""
        self._prefill.add(usage.prompt_tokens - usage.cached_tokens, usage.prefill_seconds)
        if usage.completion_tokens > 1:
            step = usage.decode_seconds / (usage.completion_tokens - 1)
            self._step.add(max(1, running), step * (1 - self._busy()))
        self._measured += 1

    def sent(self, reply: RemoteSendResponse) -> None:
        """A send from this engine ended well."""
        self._prefill.add(reply.computed_tokens, reply.compute_seconds)
        self._send.add(reply.sent_tokens, reply.send_seconds)
        self._measured += 1
