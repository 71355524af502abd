"""How fast an engine works, fitted to what its answers say, the newest counting most."""

from __future__ import annotations

import math
import time

from kvmesh.pace import PROMPT, Line, Pace
from kvmesh.v1.common_pb2 import GenerateUsage
from kvmesh.v1.kv_pb2 import RemoteSendResponse

# What a measurement still counts after the next one: about the last 50 make the line.
KEEP = 0.98
# Below this spread (relative variance of x) the slope cannot be told from the fixed part.
SPREAD = 0.01
# Over how long the share of time that goes into prefilling is taken, and its bound.
RECENT_S, MOST_BUSY = 10.0, 0.9


# Measurements of an engine before they count alone.
ENOUGH = 10
# What was measured longer ago is forgotten: an engine that was slow once gets another chance.
FORGET_S = 60.0


class Fit:
    """A line through measurements of (x, seconds), neither part negative; `guess` until there is one."""

    def __init__(self, guess: Line, flat: bool = False) -> None:
        """`flat`: where slope and fixed part cannot be told apart, it is all fixed; else it is all slope."""
        self.line = guess
        self.count = 0
        # Of the measurement that a unit of x belongs to, on average.
        self.size = PROMPT
        self.at = -math.inf
        self._flat = flat
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, seconds: float) -> None:
        """One measurement; one of nothing is passed over."""
        if x <= 0 or seconds < 0:
            return
        self.at = time.monotonic()
        self.count += 1
        self._weight = self._weight * KEEP + 1
        self._x = self._x * KEEP + x
        self._y = self._y * KEEP + seconds
        self._xx = self._xx * KEEP + x * x
        self._xy = self._xy * KEEP + x * seconds
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        self.size = self._xx / self._x
        variance = self._xx / self._weight - mean_x * mean_x
        if variance > SPREAD * mean_x * mean_x:
            each = (self._xy / self._weight - mean_x * mean_y) / variance
            each = min(max(each, 0.0), mean_y / mean_x)
        else:
            each = 0.0 if self._flat else mean_y / mean_x
        self.line = Line(max(0.0, mean_y - each * mean_x), each)


class Paces:
    """The three lines of an engine, or of many together."""

    def __init__(self) -> None:
        guess = Pace()
        self.prefill, self.send, self.step = Fit(guess.prefill), Fit(guess.send), Fit(guess.step, flat=True)


class Meter:
    """Measures one engine; `pace` is the result. What is not known of it is taken from `together`: all of its kind."""

    def __init__(self, together: Paces | None = None) -> None:
        self._recent = 0.0
        self._since = time.monotonic()
        self._own, self.together = Paces(), together or Paces()
        self._measured = 0

    @property
    def pace(self) -> Pace:
        """As measured up to now."""
        own, all_ = self._own, self.together
        return Pace(
            _line(own.prefill, all_.prefill),
            _line(own.send, all_.send),
            _line(own.step, all_.step),
            self._busy(),
            self._measured,
            all_.prefill.size,
        )

    def prefilling(self, tokens: int) -> None:
        """So many tokens are to be prefilled there; less than 0: so many turned out to be cached."""
        now = time.monotonic()
        self._recent = max(0.0, self._recent * math.exp((self._since - now) / RECENT_S) + tokens)
        self._since = now

    def _busy(self) -> float:
        tokens = self._recent * math.exp((self._since - time.monotonic()) / RECENT_S)
        return min(MOST_BUSY, _line(self._own.prefill, self.together.prefill).each * tokens / RECENT_S)

    def generated(self, usage: GenerateUsage, running: int) -> None:
        """A generation ended well; `running` requests ran there at the time."""
        for paces in (self._own, self.together):
            paces.prefill.add(usage.prompt_tokens - usage.cached_tokens, usage.prefill_seconds)
        if usage.completion_tokens > 1:
            step = usage.decode_seconds / (usage.completion_tokens - 1)
            for paces in (self._own, self.together):
                paces.step.add(max(1, running), step * (1 - self._busy()))
        self._measured += 1

    def sent(self, reply: RemoteSendResponse, seconds: float) -> None:
        """A send from this engine ended well, `seconds` after it was asked for; that is queue, prefill and sending."""
        sending = max(0.0, seconds - reply.queue_seconds - reply.compute_seconds)
        for paces in (self._own, self.together):
            paces.prefill.add(reply.computed_tokens, reply.compute_seconds)
            paces.send.add(reply.sent_tokens, sending)
        self._measured += 1


def _line(own: Fit, together: Fit) -> Line:
    known = own.count >= ENOUGH and time.monotonic() - own.at < FORGET_S
    return own.line if known else together.line
