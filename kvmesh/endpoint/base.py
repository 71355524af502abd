"""What the endpoint's protocol (tickets, receiver, sender) asks of whoever holds the KV."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.slots import Slots
from kvmesh.errors import FailedPrecondition
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
    # One for each rank (kvmesh.dataplane.checksum); empty unless they were asked for.
    sums: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Arrival:
    """The receiver's part of one write through a two-sided transport.

    `task` returns when all has arrived; it raises Unavailable when that is not to be. Once it has ended, however that
    came, nothing is written any more; cancelling it therefore takes a moment.
    """

    # For the grant.
    pools: list[KvPool]
    task: asyncio.Task[None]


@dataclass(frozen=True, slots=True)
class Destination:
    """Where KV is to be sent: `slots` of the receiver's pools, one pool a rank, as its grant says."""

    transport: str
    pools: Sequence[KvPool]
    slots: Slots
    # Whether the receiver is to be told checksums.
    checksum: bool = False


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
    async def send(self, token_ids: Sequence[int], begin: int, end: int, to: Destination) -> SendReport:
        """Has the KV of token_ids[begin:end) and writes it there.

        However it ends, nothing is being written any more when it returns or raises; cancelling therefore takes a
        moment. Raises Aborted; CannotConnect when another transport should be tried.
        """

    def two_sided(self, transport: str) -> bool:
        """Whether writes through this transport need `accept`."""
        return False

    def accept(self, transport: str, sender: str, slots: Slots, seconds: float, fresh: bool) -> Arrival:
        """Takes part in a write of `sender` (its incarnation) into `slots`, for at most `seconds`.

        `fresh`: not over a connection of an earlier write.
        """
        raise FailedPrecondition(f"transport {transport} needs nothing of the receiver")

    async def verify(self, slots: Slots, sums: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Compares what is in `slots` with (tokens, a checksum for each rank) of each piece. Raises DataLoss."""
        raise FailedPrecondition("this endpoint cannot verify checksums")

    @abc.abstractmethod
    def forget(self, peers: Sequence[KvPool]) -> None:
        """These pools are gone: lets go of them."""
