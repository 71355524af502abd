"""Session sticky: a session stays on its engine, on every router alike, by consistent hashing."""

from __future__ import annotations

from bisect import bisect
from hashlib import blake2b

from kvmesh.strategy import Engine, Policy, Pool, Request

# Places on the ring that a session looks from; with so many no engine gets a tenth more than its share.
PROBES = 24
_ROUND = 1 << 64


def places(text: str, count: int) -> list[int]:
    """Numbers of 64 bits that depend on nothing but `text`."""
    found: list[int] = []
    while len(found) < count:
        raw = blake2b(f"{len(found)}\0{text}".encode()).digest()
        found += [int.from_bytes(raw[i : i + 8], "big") for i in range(0, len(raw), 8)]
    return found[:count]


class SessionSticky(Policy):
    """A request without session goes where the load is least.

    Multi-probe consistent hashing (Appleton, O'Reilly 2015): each engine has one place on a ring, and a session goes to
    the engine that comes soonest after one of its own. One that joins takes only its share, one that goes leaves only
    its own to others.
    """

    def pick(self, request: Request, engines: Pool) -> Engine:
        """The session's engine among these."""
        if not request.session:
            return engines.calmest()[0]
        ring: list[tuple[int, int]] | None = engines.memo.get(self)
        if ring is None:
            ring = engines.memo[self] = sorted((places(e.name, 1)[0], i) for i, e in enumerate(engines))
        after = ((ring[bisect(ring, (probe,)) % len(ring)], probe) for probe in places(request.session, PROBES))
        return engines[min(((place - probe) % _ROUND, i) for (place, i), probe in after)[1]]
