"""The store as a KV endpoint: reservations in its memory, and sends out of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvmesh.dataplane.slots import Slots
from kvmesh.endpoint.base import Arrival, Destination, KvHolder, Reservation, SendReport
from kvmesh.errors import Aborted, NotFound, Unavailable
from kvmesh.process import ProcessRef
from kvmesh.v1.kv_pb2 import KvPool
from services.kvstore.carrier import Carrier
from services.kvstore.index import Entry
from services.kvstore.prompt import Prompt
from services.kvstore.store import Store


@dataclass(slots=True)
class _Held:
    """Blocks of one ticket: `entries` are there and locked, `blocks` wait for the KV of `keys`."""

    entries: list[Entry]
    keys: list[bytes]
    blocks: list[int] = field(default_factory=list)


class StoreHolder(KvHolder):
    """A KvHolder over `store`, which owns `carrier`. Prompts that come without a salt have the empty one."""

    def __init__(self, store: Store, carrier: Carrier) -> None:
        self._store = store
        self._pool = store.pool
        self._carrier = carrier
        self.layout = store.pool.layout
        self.pools = carrier.pools
        self.writers = [ProcessRef.current()]
        self._held: dict[int, _Held] = {}
        self._ids = itertools.count(1)
        self._closed = False
        # Sends under way.
        self.sending = 0

    @property
    def block_tokens(self) -> int:
        """Tokens in a block of the store."""
        return self._pool.tokens

    def prompt(self, token_ids: Sequence[int], salt: str) -> Prompt:
        """With the keys that it has in this store."""
        return Prompt(token_ids, self.layout.fingerprint, salt, self._pool.tokens)

    def _keys(self, token_ids: Sequence[int], end: int) -> list[bytes]:
        prompt = token_ids if isinstance(token_ids, Prompt) else self.prompt(token_ids, "")
        return prompt.keys[: end // self._pool.tokens]

    async def reserve(self, token_ids: Sequence[int], end: int, wait: float) -> Reservation:
        """Locks the blocks that are here, and takes memory for the rest."""
        self._check_open()
        keys = self._keys(token_ids, end)
        entries = self._store.find(keys)
        try:
            blocks = await self._store.take(len(keys) - len(entries), wait) if len(entries) < len(keys) else []
        except BaseException:
            self._store.unlock(entries)
            raise
        number = next(self._ids)
        self._held[number] = _Held(entries, keys[len(entries) :], blocks)
        return Reservation(number, len(entries) * self._pool.tokens, self._pool.rows(blocks))

    async def publish(self, reservation: int, upto: int) -> None:
        """The whole blocks up to there can be found from now on."""
        held = self._held.get(reservation)
        if held is None:
            raise NotFound(f"reservation {reservation} is not there")
        count = upto // self._pool.tokens - len(held.entries)
        if count > 0:
            held.entries += self._store.put(held.keys[:count], held.blocks[:count])
            held.keys, held.blocks = held.keys[count:], held.blocks[count:]

    async def free(self, reservation: int) -> None:
        """Unlocks what is here, gives back what is not filled."""
        held = self._held.pop(reservation, None)
        if held is not None:
            self._store.give(held.blocks)
            self._store.unlock(held.entries)

    async def send(self, token_ids: Sequence[int], begin: int, end: int, to: Destination) -> SendReport:
        """Copies blocks that the caller holds in memory."""
        self._check_open()
        size = self._pool.tokens
        entries = self._store.index.chain(self._keys(token_ids, -(-end // size) * size))
        blocks = [entry.block for entry in entries if entry.block is not None]
        if len(blocks) * size < end:
            raise Aborted(f"only {len(blocks) * size} of {end} tokens are in memory")
        began = time.monotonic_ns()
        first = begin // size
        rows = self._pool.rows(blocks[first : -(-end // size)])[begin - first * size : end - first * size]
        self.sending += 1
        try:
            pieces = await self._carrier.copy(np.ascontiguousarray(rows), to)
        finally:
            self.sending -= 1
        return SendReport(cached=end, computed=0, began_ns=began, prefilled_ns=began, pieces=pieces)

    def two_sided(self, transport: str) -> bool:
        """As the base says."""
        return self._carrier.two_sided(transport)

    def accept(self, transport: str, sender: str, slots: Slots, seconds: float, fresh: bool) -> Arrival:
        """As the base says."""
        self._check_open()
        return self._carrier.accept(transport, sender, slots, seconds, fresh)

    async def verify(self, slots: Slots, sums: Sequence[tuple[int, Sequence[int]]]) -> None:
        """As the base says."""
        await self._carrier.verify(slots, sums)

    def forget(self, peers: Sequence[KvPool]) -> None:
        """Closes the ways into these pools."""
        self._carrier.forget(peers)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the store is stopping")

    def stop(self) -> None:
        """No new reservations and sends."""
        self._closed = True

    async def close(self) -> None:
        """Lets go of the peers' pools, and listens no more."""
        self.stop()
        await self._carrier.close()
