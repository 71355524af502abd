"""What a transport is: the way from a pool of this process into a pool of another one."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.slots import Slots
from kvmesh.errors import Unavailable
from kvmesh.v1.kv_pb2 import KvPool, Meeting

if TYPE_CHECKING:
    import torch


class CannotConnect(Unavailable):
    """The way to the peer cannot be set up; nothing was written. Another transport may do."""


class Pool:
    """One rank's KV pool: K and V of each layer, each of shape [rows, heads, dim]. Row 0 is padding."""

    def __init__(self, layout: Layout, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        self.layout = layout
        self.keys = keys
        self.values = values

    @property
    def rows(self) -> int:
        """Slots, and the padding before them."""
        return int(self.keys[0].shape[0])


class Connection(abc.ABC):
    """The way into one peer's pool. Used by one thread at a time, but for `abort`."""

    @abc.abstractmethod
    def write(self, source: Slots, target: Slots) -> int:
        """Copies rows `source` of our pool to rows `target` of the peer's, all layers; bytes written.

        Returns when the peer can read them, or, of a two-sided transport, when they are on their way. Raises
        Unavailable when the peer is gone.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Lets go of the peer's memory. Only after the last write has returned."""

    def wait_for(self, fence: object) -> None:  # noqa: B027
        """Writes from now on read our pool as it is behind the fence (Transport.fence)."""

    def abort(self) -> None:  # noqa: B027
        """Gives a write that waits for the peer up, from any thread. Those that never wait do nothing.

        The write may need its whole deadline to return. Of a two-sided transport nobody has to wait for that: what is
        written is the receiver's business, and what is still read of our pool goes nowhere.
        """


class Reception(abc.ABC):
    """The receiver's part of one write through a two-sided transport."""

    @abc.abstractmethod
    def cancel(self) -> None:
        """Ends it, from any thread: once this has returned, our slots are not written into any more."""


class Transport(abc.ABC):
    """A kind of connection. One instance a pool and process."""

    # As in WriteGrant.transport.
    name: ClassVar[str]

    @abc.abstractmethod
    def describe(self) -> KvPool:
        """What a peer needs to reach our pool."""

    @abc.abstractmethod
    def connect(self, peer: KvPool) -> Connection:
        """Opens the way into `peer`. Raises CannotConnect, InvalidArgument when its form does not fit."""

    def fence(self) -> object:
        """Stands for what the calling thread has had the device do so far; None where it is done already."""
        return None

    def close(self) -> None:  # noqa: B027
        """Ends what `accept` and `connect` have begun."""


class TwoSidedTransport(Transport):
    """The receiver takes part: each write has a connection of its own, and `accept` has to be called for it."""

    @abc.abstractmethod
    def accept(self, meeting: Meeting, slots: Slots, seconds: float, done: Callable[[str], None]) -> Reception:
        """Begins to take what a peer writes at `meeting` into our rows `slots`, for at most `seconds`.

        `done` is called once, from another thread, with what went wrong, or nothing when every row has arrived.
        """
