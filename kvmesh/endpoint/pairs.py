"""Which connections there are between this receiver and its senders: kept where writes are granted."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from kvmesh.v1.kv_pb2 import KvPool

# As many as the transport keeps.
IDLE = 32


@dataclass(frozen=True, slots=True)
class Pair:
    """A connection that one write uses. `fresh`: it is yet to be made."""

    sender: str
    number: int
    fresh: bool


class Pairs:
    """Connections of one two-sided transport; `pools` are those of its ranks."""

    def __init__(self, pools: Sequence[KvPool]) -> None:
        self._pools = pools
        self._numbers = itertools.count(1)
        # Those that no write uses, latest used last.
        self._idle: list[Pair] = []

    def take(self, sender: str, fresh: bool) -> Pair:
        """For a write of `sender`: the one that it used last, if it may be an old one."""
        if not fresh:
            for pair in reversed(self._idle):
                if pair.sender == sender:
                    self._idle.remove(pair)
                    return pair
        return Pair(sender, next(self._numbers), True)

    def put(self, pair: Pair) -> None:
        """A write over it went well."""
        self._idle.append(Pair(pair.sender, pair.number, False))
        del self._idle[:-IDLE]

    def grant(self, pair: Pair) -> list[KvPool]:
        """The pools as the sender is to reach them for this write."""
        pools: list[KvPool] = []
        for ours in self._pools:
            pool = KvPool()
            pool.CopyFrom(ours)
            # Each rank's pool has a number that no other has had, or will have.
            pool.meeting.pair = f"{ours.meeting.pair}/{pair.number}"
            pool.meeting.fresh = pair.fresh
            pools.append(pool)
        return pools
