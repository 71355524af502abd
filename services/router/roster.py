"""Links to some engines with what finds the best of many of them without looking at each."""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from kvmesh.pool import by_name
from services.router.kvindex import PromptBlocks
from services.router.link import EngineLink

# Changes of load that are kept for who has not looked yet; who is further behind looks at all engines.
KEPT = 4096
# Rosters made of one roster that are kept.
PARTS = 32
# How often all engines are told that their caches are of interest.
LISTEN_S = 1.0


class Journal:
    """Which links' loads have changed, in order."""

    def __init__(self) -> None:
        self._gone = 0
        self._links: list[EngineLink] = []

    def add(self, link: EngineLink) -> None:
        """Its load has changed."""
        if len(self._links) >= KEPT:
            self._gone += len(self._links)
            self._links.clear()
        self._links.append(link)

    @property
    def end(self) -> int:
        """Where the next change will be."""
        return self._gone + len(self._links)

    def since(self, place: int) -> set[EngineLink] | None:
        """Those that have changed since `end` was `place`; None when that is not known any more."""
        return None if place < self._gone else set(self._links[place - self._gone :])


class Roster(Sequence[EngineLink]):
    """Links by name; who is in it never changes. In order of their work as of the last question, and made so then."""

    def __init__(self, links: Iterable[EngineLink], journal: Journal) -> None:
        self._links = sorted(links, key=lambda link: by_name(link.name))
        self.by_name: Mapping[str, EngineLink] = {link.name: link for link in self._links}
        self.place = {link: i for i, link in enumerate(self._links)}
        self.has_roles = any("role" in link.labels for link in self._links)
        # What policies remember about exactly these engines.
        self.memo: dict[Any, Any] = {}
        self._journal = journal
        self._seen = -1
        self._work: list[int] = []
        # (work, place), rising.
        self._order: list[tuple[int, int]] = []
        self._parts: dict[Hashable, Roster] = {}
        self._listened = 0.0
        # Of the engines in the map of blocks: all bits, and the place of each; by the tokens of a block.
        self._bits: dict[int, int] = {}
        self._at: dict[int, int] = {}
        self._bit_of: list[int] = []

    def __len__(self) -> int:
        return len(self._links)

    @overload
    def __getitem__(self, at: int) -> EngineLink: ...
    @overload
    def __getitem__(self, at: slice) -> list[EngineLink]: ...
    def __getitem__(self, at: int | slice) -> EngineLink | list[EngineLink]:
        return self._links[at]

    def __contains__(self, link: object) -> bool:
        return link in self.place

    def part(self, key: Hashable, links: Callable[[], Iterable[EngineLink]]) -> Roster:
        """Another roster made of some of these, kept under `key`: which are right may not change."""
        if (found := self._parts.get(key)) is None:
            if len(self._parts) >= PARTS:
                self._parts.clear()
            found = self._parts[key] = Roster(links(), self._journal)
        return found

    def order(self) -> Sequence[tuple[int, int]]:
        """(work, place) of each, rising: as it is now."""
        changed = self._journal.since(self._seen) if self._work else None
        self._seen = self._journal.end
        if changed is None:
            self._work = [link.load.work for link in self._links]
            self._order = sorted((work, i) for i, work in enumerate(self._work))
            return self._order
        for link in changed:
            if (i := self.place.get(link)) is not None and (work := link.load.work) != self._work[i]:
                del self._order[bisect_left(self._order, (self._work[i], i))]
                insort(self._order, (work, i))
                self._work[i] = work
        return self._order

    def cheapest(
        self, n: int, cost: Callable[[int], int], likely: Iterator[tuple[int, int]], unit: int = 1
    ) -> list[int]:
        """Places of the `n` that cost least, `work - unit * gain`; `cost` of a place.

        `likely`: (bound of gain, place), falling. Threshold algorithm (Fagin, Lotem, Naor 2001): looks at those with
        little work and those with much gain in turns, until nobody not looked at can be better.
        """
        best: list[tuple[int, int]] = []
        looked: set[int] = set()
        bound, place = next(likely, (0, -1))
        for work, i in self.order():
            if len(best) == n and best[-1] < (work - unit * bound, i):
                break
            for at in (i, place):
                if at >= 0 and at not in looked:
                    looked.add(at)
                    insort(best, (cost(at), at))
                    del best[n:]
            bound, place = next(likely, (0, -1))
        return [at for _, at in best]

    def holders(self, prompt: PromptBlocks, token_ids: Sequence[int]) -> Holders:
        """Who has how much of it cached."""
        if (now := time.monotonic()) - self._listened > LISTEN_S:
            self._listened = now
            self._bits, self._at, self._bit_of = {}, {}, []
            for i, link in enumerate(self._links):
                bit = link.listen().bit
                self._bits[link.block_tokens] = self._bits.get(link.block_tokens, 0) | bit
                self._at[bit] = i
                self._bit_of.append(bit)
        levels: list[tuple[int, int]] = []
        for size, bits in self._bits.items():
            found = self._links[0].blocks.levels(prompt.of(token_ids, size), bits)
            levels += [(blocks * size, held) for blocks, held in found]
        levels.sort(reverse=True)
        return Holders(levels, self._at, self._bit_of)


class Holders:
    """Engines by how much of a prompt they have cached. `levels`: (tokens, bits of those who have them), falling."""

    def __init__(self, levels: list[tuple[int, int]], places: Mapping[int, int], bits: Sequence[int]) -> None:
        self._levels = levels
        self._places = places
        self._bits = bits

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(tokens, place), falling; not those that have nothing."""
        told = 0
        for tokens, held in self._levels:
            rest, told = held & ~told, told | held
            while rest:
                bit = rest & -rest
                rest ^= bit
                yield tokens, self._places[bit]

    def tokens(self, place: int) -> int:
        """How much it has."""
        bit = self._bits[place]
        return next((tokens for tokens, held in self._levels if held & bit), 0)

    def fullest(self) -> int:
        """The place of who has most, the first among equals."""
        if not self._levels:
            return 0
        most, held = self._levels[0]
        for tokens, others in self._levels[1:]:
            if tokens == most:
                held |= others
        if held.bit_count() ** 2 > len(self._places):
            return next(place for bit, place in self._places.items() if held & bit)
        return min(self._places[1 << i] for i in range(held.bit_length()) if held >> i & 1)
