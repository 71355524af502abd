"""Connections into peers' pools that are kept from one copy to the next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from kvmesh.dataplane.base import Connection

# Kept open; the least recently used one goes first.
MOST = 64


class Ways:
    """Owner of one connection a peer, for one thread. A peer is its serialized KvPool."""

    def __init__(self) -> None:
        self._open: OrderedDict[bytes, Connection] = OrderedDict()

    def get(self, peer: bytes, connect: Callable[[], Connection]) -> Connection:
        """The way into `peer`; `connect` makes it if there is none. Raises what that raises."""
        connection = self._open.get(peer)
        if connection is None:
            connection = self._open[peer] = connect()
            if len(self._open) > MOST:
                self.close(next(iter(self._open)))
        self._open.move_to_end(peer)
        return connection

    def close(self, peer: bytes) -> None:
        """Closes the way into `peer`, if there is one."""
        if (connection := self._open.pop(peer, None)) is not None:
            connection.close()

    def close_all(self) -> None:
        """Closes all of them."""
        for peer in list(self._open):
            self.close(peer)
