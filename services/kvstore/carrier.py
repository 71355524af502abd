"""How KV gets from the store's memory into peers' pools, and from theirs into ours."""

from __future__ import annotations

import abc
from collections.abc import Sequence

from kvmesh.dataplane.slots import Slots
from kvmesh.endpoint.base import Arrival, Destination, Piece
from kvmesh.errors import FailedPrecondition
from kvmesh.v1.kv_pb2 import KvPool

# A copy takes so many bytes at a time: a cancel waits for one piece.
PIECE_BYTES = 16 << 20


class Carrier(abc.ABC):
    """One store's ways. What has no comment is as in KvHolder."""

    # As KvHolder.pools.
    pools: dict[str, list[KvPool]]

    @abc.abstractmethod
    async def copy(self, source: Slots, to: Destination) -> list[Piece]:
        """Copies rows `source` of our memory to the peer's. Raises Unavailable.

        Nothing is being written any more when it returns or raises.
        """

    def two_sided(self, transport: str) -> bool:
        """As in KvHolder."""
        return False

    def accept(self, transport: str, sender: str, slots: Slots, seconds: float, fresh: bool) -> Arrival:
        """As in KvHolder."""
        raise FailedPrecondition(f"transport {transport} needs nothing of the receiver")

    async def verify(self, slots: Slots, sums: Sequence[tuple[int, Sequence[int]]]) -> None:
        """As in KvHolder."""
        raise FailedPrecondition("this store cannot verify checksums")

    @abc.abstractmethod
    def forget(self, peers: Sequence[KvPool]) -> None:
        """Closes the ways into these pools."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Closes all of them, and listens no more."""
