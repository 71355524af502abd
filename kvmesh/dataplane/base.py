"""What a transport is: the way from a pool of this process into a pool of another one."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar

from kvmesh.dataplane.layout import Layout
from kvmesh.dataplane.slots import Slots
from kvmesh.v1.kv_pb2 import KvPool

if TYPE_CHECKING:
    import torch


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
    """The way into one peer's pool. Used by one thread at a time; opening and keeping it is the transport's matter."""

    @abc.abstractmethod
    def write(self, source: Slots, target: Slots) -> int:
        """Copies rows `source` of our pool to rows `target` of the peer's, all layers; bytes written.

        Returns when the peer can read them. Raises Unavailable when the peer is gone.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Lets go of the peer's memory. Only after the last write has returned."""


class Transport(abc.ABC):
    """A kind of connection. One instance a pool and process."""

    # As in WriteGrant.transport.
    name: ClassVar[str]

    @abc.abstractmethod
    def describe(self) -> KvPool:
        """What a peer needs to reach our pool."""

    @abc.abstractmethod
    def connect(self, peer: KvPool) -> Connection:
        """Opens the way into `peer`. Raises Unavailable when it is not there, InvalidArgument when it does not fit."""

    def accept(self, write_id: int, slots: Slots) -> None:  # noqa: B027
        """The receiver's part of one write, called when it is granted. One-sided transports have none."""
