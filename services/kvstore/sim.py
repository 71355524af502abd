"""The store for simulated engines: its memory has what theirs has, one number a token, and stands for their KV."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.slots import Slots
from kvmesh.endpoint.base import Destination, Piece
from kvmesh.sim.carry import carry
from kvmesh.sim.links import Link
from kvmesh.sim.peers import Inbox, Peers, Values
from kvmesh.sim.profile import Profile
from kvmesh.v1.kv_pb2 import KvPool
from services.kvstore.carrier import PIECE_BYTES, Carrier
from services.kvstore.disk import Served
from services.kvstore.memory import BlockMemory, block_tokens, enough


def served(profile: Profile, name: str = "") -> Served:
    """The model of a profile's engines; `name` is what requests call it."""
    m = profile.model
    return Served(profile.layout, name or m.name, "", m.vocab_size, m.context_length, simulated=True)


class SimMemory(BlockMemory):
    """As many blocks as `memory` bytes of real KV would be; it takes 8 bytes a token. Raises InvalidArgument."""

    def __init__(self, layout: Layout, memory: int) -> None:
        tokens = block_tokens(layout)
        size = layout.bytes_per_token * layout.ranks * tokens
        super().__init__(layout, enough(memory // size - 1, memory, size), size)
        # calloc'ed: takes memory only where it was used.
        self.values: Values = np.zeros((self.blocks + 1) * tokens, np.uint64)

    @property
    def total(self) -> int:
        """Slots, without row 0."""
        return len(self.values) - 1

    @property
    def bytes(self) -> int:
        """That it stands for."""
        return (self.blocks + 1) * self.block_bytes

    def views(self, block: int) -> list[memoryview]:
        """One, of 8 bytes a token."""
        first = block * self.tokens
        return [self.values[first : first + self.tokens].view(np.uint8).data]

    def close(self) -> None:
        """Nothing is held."""


class SimCarrier(Carrier):
    """Sends and receives at the pace of the profile's links, which all of the store's transfers share.

    `now` is the event loop's clock, in seconds.
    """

    def __init__(
        self, memory: SimMemory, profile: Profile, peers: Peers, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.pools = {}
        self._memory = memory
        self._token_bytes = profile.bytes_per_token
        self._latency = profile.transfer.latency
        self._out, into = (Link(profile.transfer.bytes_per_second, now) for _ in range(2))
        self._inbox = Inbox(memory, into)
        self._peers = peers
        self._now = now

    async def start(self) -> None:
        """Lets others write here."""
        self.pools = await self._peers.open(self._inbox, self._memory.layout, self._memory.total + 1)

    async def copy(self, source: Slots, to: Destination) -> list[Piece]:
        """As the base says."""
        step = max(64, PIECE_BYTES // self._token_bytes)
        pieces: list[Piece] = []
        for at in range(0, len(source), step):
            began, values = self._now(), self._memory.values[source[at : at + step]]
            size, target = len(values) * self._token_bytes, to.slots[at : at + step]
            latency = self._latency if at + step >= len(source) else 0.0
            await carry(self._out, self._peers, to.pools[0], target, values, size, latency=latency)
            pieces.append(Piece(int(began * 1e9), int(self._now() * 1e9), len(values), size))
        return pieces

    def forget(self, peers: Sequence[KvPool]) -> None:
        """Hangs up."""
        for pool in peers:
            self._peers.forget(pool)

    async def close(self) -> None:
        """As the base says."""
        await self._peers.close()
