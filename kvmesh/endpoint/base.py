"""What the endpoint's protocol (tickets, receiver, sender) asks of whoever holds the KV."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.slots import Slots
from kvmesh.process import ProcessRef
from kvmesh.v1.kv_pb2 import KvPool


@dataclass(frozen=True, slots=True)
class Reservation:
    """Slots for tokens [matched:end) of a prompt; the KV of [0:matched) is there, and locked."""

    id: int
    matched: int
    slots: Slots


@dataclass(frozen=True, slots=True)
class Piece:
    """One copy to a peer; monotonic nanoseconds."""

    begin_ns: int
    end_ns: int
    tokens: int
    bytes: int


@dataclass(slots=True)
class SendReport:
    """What a send did; monotonic nanoseconds, 0 when it did not get there."""

    cached: int
    computed: int
    began_ns: int
    prefilled_ns: int
    pieces: list[Piece] = field(default_factory=list)


class KvHolder(abc.ABC):
    """A KV pool with a prefix index. Token ids and ranges are checked before they get here.

    Every call raises Unavailable when the holder is stopping or dead.
    """

    layout: Layout
    # One for each transport that peers can write through, best first; each with one pool a rank.
    pools: dict[str, list[KvPool]]
    # Those that write into peers' pools.
    writers: list[ProcessRef]

    @property
    def block_tokens(self) -> int:
        """Reservations end at multiples of so many tokens."""
        return self.layout.page_size

    @abc.abstractmethod
    async def reserve(self, token_ids: Sequence[int], end: int, wait: float) -> Reservation:
        """Locks what is cached of token_ids[:end] and reserves slots for the rest; `end` is a multiple of a block.

        Waits `wait` seconds for room, first come first served. Raises ResourceExhausted. Cancelling leaves nothing.
        """

    @abc.abstractmethod
    async def publish(self, reservation: int, upto: int) -> None:
        """The slots up to token `upto` hold KV now: others may use it. Raises NotFound."""

    @abc.abstractmethod
    async def free(self, reservation: int) -> None:
        """Gives back what the reservation still holds. An unknown one is no error."""

    @abc.abstractmethod
    async def send(
        self, token_ids: Sequence[int], begin: int, end: int, transport: str, peers: Sequence[KvPool], slots: Slots
    ) -> SendReport:
        """Has the KV of token_ids[begin:end) and writes it to `slots` of the peers' pools.

        However it ends, nothing is being written any more when it returns or raises; cancelling therefore takes a
        moment. Raises Aborted.
        """

    @abc.abstractmethod
    def forget(self, peers: Sequence[KvPool]) -> None:
        """These pools are gone: lets go of them."""
