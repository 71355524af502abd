"""Some of the engines, in a fixed order, and the questions that strategies and policies ask about them."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from kvmesh.strategy import Engine


def by_name(name: str) -> list[tuple[int, int | str]]:
    """What names are sorted by: engine-2 before engine-10."""
    return [(0, int(p)) if p.isdigit() else (1, p) for p in re.split(r"(\d+)", name) if p]


class Pool(Sequence["Engine"]):
    """Engines as a sequence. Among equals the first in order is taken.

    This one looks at every engine to answer; a router's own has indexes, and gives the same answers.
    """

    def __init__(self, engines: Iterable[Engine]) -> None:
        self._engines = list(engines)
        # What policies remember about exactly these engines.
        self.memo: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self._engines)

    @overload
    def __getitem__(self, at: int) -> Engine: ...
    @overload
    def __getitem__(self, at: slice) -> list[Engine]: ...
    def __getitem__(self, at: int | slice) -> Engine | list[Engine]:
        return self._engines[at]

    def calmest(self, n: int = 1) -> list[Engine]:
        """The `n` with the least work, the least first."""
        return heapq.nsmallest(n, self, key=lambda e: e.load.work)

    def nearest(
        self, token_ids: Sequence[int], n: int = 1, worth: Callable[[int], int] = lambda cached: cached
    ) -> list[Engine]:
        """The `n` with the least work less the tokens that they have cached, by what the engines tell.

        `worth(cached)` is what having so many counts, at most that number.
        """
        return self.cheapest(n, lambda e: worth(e.cached(token_ids)), ())

    def cheapest(
        self, n: int, gain: Callable[[Engine], int], likely: Iterable[tuple[int, str]], unit: int = 1
    ) -> list[Engine]:
        """The `n` with the least `work - unit * gain`, the least first.

        `likely`: (bound, name), falling, with all engines that have a gain, none of which is above its bound.
        """
        return heapq.nsmallest(n, self, key=lambda e: e.load.work - unit * gain(e))

    def fullest(self, token_ids: Sequence[int]) -> Engine:
        """The one that has most of the first tokens cached."""
        return max(self, key=lambda e: e.cached(token_ids))

    def split(self, n: int) -> tuple[Pool, Pool]:
        """Those that prefill and those that decode, as in Mesh.prefill."""
        if any("role" in e.labels for e in self):
            first = self.where({"role": "prefill"})
            rest = Pool(e for e in self if e not in first)
        else:
            n = min(n, len(self) - 1)
            first, rest = Pool(self[:n]), Pool(self[n:])
        return first or rest, rest or first

    def where(self, labels: Mapping[str, str]) -> Pool:
        """Those that have all these labels; may be none."""
        return Pool(e for e in self if labels.items() <= e.labels.items())
