"""How fast an engine works, as a line over tokens or requests: what cost models reckon with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """`fixed + each * x`, in seconds."""

    fixed: float
    each: float

    def at(self, x: float) -> float:
        """Seconds for `x`; 0 for nothing."""
        return self.fixed + self.each * x if x > 0 else 0.0


# A guess.
PROMPT = 1000.0


@dataclass(frozen=True, slots=True)
class Pace:
    """What an engine's work takes. Guesses until `measured` (finished generations and sends) is above 0."""

    # Over tokens prefilled.
    prefill: Line = Line(0.01, 0.0002)
    # Over tokens sent from here.
    send: Line = Line(0.005, 0.00002)
    # One decode step, over requests running, were nothing prefilled meanwhile.
    step: Line = Line(0.02, 0.001)
    # Share of the last seconds that went into prefilling, 0 to 0.9: decode steps take so much longer.
    busy: float = 0.0
    measured: int = 0
    # Tokens that are prefilled for one request, of that request which a token belongs to, on average.
    prompt: float = PROMPT
