"""Slots reserved for KV that others send, and the reservations that wait for room."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvmesh.dataplane.slots import Slots
from kvmesh.errors import NotFound, ResourceExhausted
from services.engine.base import Reservation
from services.engine.sim.content import Ids
from services.engine.sim.kv import KvCache, Node

# This part of all slots stays out of reservations: who generates from them needs some more.
SPARE = 32


@dataclass(eq=False, slots=True)
class _Waiting:
    """One that waits for room."""

    ids: Ids
    future: asyncio.Future[Reservation]


@dataclass(eq=False, slots=True)
class _Held:
    """[0:filled) is in the tree, locked by `node`; `slots` are those of [filled:end)."""

    ids: Ids
    node: Node
    filled: int
    slots: Slots


class Reservations:
    """All of one engine. `headroom` is what running requests will still need."""

    def __init__(self, cache: KvCache, headroom: Callable[[], int]) -> None:
        self._cache = cache
        self._headroom = headroom
        self._held: dict[int, _Held] = {}
        self._waiting: deque[_Waiting] = deque()
        self._numbers = itertools.count(1)

    @property
    def waiting(self) -> int:
        """Reservations that wait for room."""
        return len(self._waiting)

    @property
    def slots(self) -> int:
        """Slots reserved and not published."""
        return sum(len(held.slots) for held in self._held.values())

    @property
    def count(self) -> int:
        """Reservations held."""
        return len(self._held)

    async def reserve(self, ids: Ids, wait: float) -> Reservation:
        """Reserves for all of `ids`. Raises ResourceExhausted after `wait` seconds."""
        if not self._waiting and (got := self._try(ids)) is not None:
            return got
        if wait > 0:
            entry = _Waiting(ids, asyncio.get_running_loop().create_future())
            self._waiting.append(entry)
            try:
                await asyncio.wait({entry.future}, timeout=wait)
            except asyncio.CancelledError:
                if entry.future.done() and entry.future.exception() is None:
                    self.free(entry.future.result().id)
                raise
            finally:
                if entry in self._waiting:
                    self._waiting.remove(entry)
            if entry.future.done():
                return entry.future.result()
        need, room = len(ids), self._cache.room
        raise ResourceExhausted(f"no room within the time given: up to {need} slots needed, {room} free or cached")

    def retry(self) -> None:
        """Serves those that wait, first come first served."""
        while self._waiting:
            first = self._waiting[0]
            got = self._try(first.ids)
            if got is None:
                return
            self._waiting.popleft()
            first.future.set_result(got)

    def _try(self, ids: Ids) -> Reservation | None:
        node, there = self._cache.match(ids)
        need = len(ids) - len(there)
        self._cache.lock(node)
        spare = self._cache.total // SPARE + self._headroom()
        slots = self._cache.alloc(need) if need + spare <= self._cache.room else None
        if slots is None and need:
            self._cache.unlock(node)
            return None
        number = next(self._numbers)
        slots = np.empty(0, np.int64) if slots is None else slots
        self._held[number] = _Held(ids, node, len(there), slots)
        return Reservation(number, len(there), slots)

    def publish(self, number: int, upto: int) -> None:
        """The slots up to `upto` are the tree's now. Raises NotFound."""
        held = self._held.get(number)
        if held is None or not held.filled <= upto <= held.filled + len(held.slots):
            raise NotFound(f"reservation {number} is not there")
        count = upto - held.filled
        if not count:
            return
        _, before = self._cache.match(held.ids[: held.filled])
        arrived, held.slots = held.slots[:count], held.slots[count:]
        node, known = self._cache.insert(held.ids[:upto], np.concatenate((before, arrived)))
        self._cache.lock(node)
        self._cache.unlock(held.node)
        if known > held.filled:
            # Somebody else had these meanwhile.
            self._cache.release(arrived[: known - held.filled])
        held.node, held.filled = node, upto

    def take(self, number: int) -> Node | None:
        """Ends a reservation: the locked node of what is filled, for the caller to unlock; None if it is not there."""
        held = self._held.pop(number, None)
        if held is None:
            return None
        self._cache.release(held.slots)
        return held.node

    def free(self, number: int) -> None:
        """Gives everything back; what is filled stays as cache."""
        if (node := self.take(number)) is not None:
            self._cache.unlock(node)

    def close(self, error: Exception) -> None:
        """Nobody gets anything any more."""
        for entry in self._waiting:
            entry.future.set_exception(error)
        self._waiting.clear()
