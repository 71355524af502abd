"""What one request was like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Record:
    """Times in seconds of one clock; `tokens` are (when, how many) of each message with tokens.

    `due`: when it was to be sent; `sent`: when it was. `error` is empty when it ended well.
    """

    number: int
    prompt_tokens: int
    due: float
    sent: float = 0.0
    ended: float = 0.0
    tokens: list[tuple[float, int]] = field(default_factory=list)
    # Of the prompt, found in a cache; -1: not told.
    cached_tokens: int = -1
    error: str = ""

    @property
    def completion_tokens(self) -> int:
        """Tokens generated."""
        return sum(count for _, count in self.tokens)

    @property
    def ttft(self) -> float:
        """From when it was due to the first token."""
        return self.tokens[0][0] - self.due if self.tokens else 0.0

    @property
    def tpot(self) -> float:
        """Mean time of a token after the first; 0 for fewer than two."""
        rest = self.completion_tokens - 1
        return (self.tokens[-1][0] - self.tokens[0][0]) / rest if rest > 0 else 0.0

    @property
    def jct(self) -> float:
        """From when it was due to its end."""
        return self.ended - self.due

    @property
    def gaps(self) -> tuple[list[float], list[int]]:
        """Between tokens, and how many such: those of a message are spread evenly over the time since the last one."""
        later = self.tokens[1:]
        between = [(at - before) / count for (before, _), (at, count) in zip(self.tokens, later, strict=False)]
        return between, [count for _, count in later]


def good(records: Sequence[Record]) -> list[Record]:
    """Those that ended well."""
    return [r for r in records if not r.error]
