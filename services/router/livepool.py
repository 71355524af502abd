"""The engines of one attempt: a Pool that answers out of the indexes of a roster."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import overload

from kvmesh.pool import Pool
from kvmesh.strategy import Engine
from services.router.handles import Handles
from services.router.link import EngineLink
from services.router.roster import Roster


class LivePool(Pool):
    """Handles are made for those only that somebody takes."""

    def __init__(self, roster: Roster, handles: Handles) -> None:
        self._roster = roster
        self._handles = handles
        self.memo = roster.memo

    def __len__(self) -> int:
        return len(self._roster)

    @overload
    def __getitem__(self, at: int) -> Engine: ...
    @overload
    def __getitem__(self, at: slice) -> list[Engine]: ...
    def __getitem__(self, at: int | slice) -> Engine | list[Engine]:
        if isinstance(at, slice):
            return [self._handles.of(link) for link in self._roster[at]]
        return self._handles.of(self._roster[at])

    def __contains__(self, engine: object) -> bool:
        link = self._roster.by_name.get(getattr(engine, "name", ""))
        return link is not None and self._handles.of(link) is engine

    def calmest(self, n: int = 1) -> list[Engine]:
        """By the order of work."""
        return [self[place] for _, place in self._roster.order()[:n]]

    def nearest(
        self, token_ids: Sequence[int], n: int = 1, worth: Callable[[int], int] = lambda cached: cached
    ) -> list[Engine]:
        """By the order of work and the map of blocks."""
        roster = self._roster
        holders = roster.holders(self._handles.attempt.blocks, token_ids)
        found = roster.cheapest(n, lambda at: roster[at].load.work - worth(holders.tokens(at)), iter(holders))
        return [self[place] for place in found]

    def cheapest(
        self, n: int, gain: Callable[[Engine], int], likely: Iterable[tuple[int, str]], unit: int = 1
    ) -> list[Engine]:
        """By the order of work, and by who is likely."""
        roster = self._roster
        places = ((bound, self._place(name)) for bound, name in likely)
        found = roster.cheapest(n, lambda at: roster[at].load.work - unit * gain(self[at]), places, unit)
        return [self[place] for place in found]

    def _place(self, name: str) -> int:
        link = self._roster.by_name.get(name)
        return -1 if link is None else self._roster.place[link]

    def fullest(self, token_ids: Sequence[int]) -> Engine:
        """By the map of blocks."""
        return self[self._roster.holders(self._handles.attempt.blocks, token_ids).fullest()]

    def split(self, n: int) -> tuple[Pool, Pool]:
        """Made once for each `n`."""
        roster = self._roster
        if roster.has_roles:
            first = self.where({"role": "prefill"})
            rest = self._part("no prefill", lambda: (k for k in roster if k.labels.get("role") != "prefill"))
        else:
            n = min(n, len(self) - 1)
            first = self._part(("first", n), lambda: roster[:n])
            rest = self._part(("after", n), lambda: roster[n:])
        return first or rest, rest or first

    def where(self, labels: Mapping[str, str]) -> Pool:
        """Made once for the same labels."""
        key = tuple(sorted(labels.items()))
        return self._part(key, lambda: (link for link in self._roster if labels.items() <= link.labels.items()))

    def _part(self, key: Hashable, links: Callable[[], Iterable[EngineLink]]) -> LivePool:
        return LivePool(self._roster.part(key, links), self._handles)
