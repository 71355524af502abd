"""What the registry service asks of the store behind it."""

from __future__ import annotations

import abc
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from kvmesh.v1 import registry_pb2 as pb


@dataclass(frozen=True)
class Lease:
    """The right to be a member for `ttl_ms` milliseconds after each renewal."""

    id: str
    ttl_ms: int


class Backend(abc.ABC):
    """Members under leases, and settings with revisions.

    Arguments are valid when they get here: the service checks them. Every call raises Unavailable, within a few
    seconds, when the store cannot be reached.
    """

    @abc.abstractmethod
    async def start(self) -> None:
        """Begins to follow the store; does not wait for it."""

    @abc.abstractmethod
    async def wait_ready(self) -> None:
        """Returns once the store has answered; the caller sets the deadline."""

    @abc.abstractmethod
    def end_watches(self) -> None:
        """Ends every watch with Unavailable, now and from now on."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Ends the watches and lets go of the store. Leases stay."""

    @abc.abstractmethod
    async def register(self, member: pb.Member, ttl_ms: int) -> Lease:
        """Adds `member`, in place of any other incarnation of its name; the same incarnation again renews its lease.

        The lease granted may be longer than `ttl_ms`.
        """

    @abc.abstractmethod
    async def keep_alive(self, lease_id: str) -> int:
        """Renews a lease; its length in milliseconds. Raises NotFound when it has run out or was replaced."""

    @abc.abstractmethod
    async def deregister(self, lease_id: str) -> None:
        """Ends a lease and its membership; nothing happens when it is gone."""

    @abc.abstractmethod
    async def get_setting(self, key: str) -> pb.Setting:
        """The setting as it is now. Raises NotFound."""

    @abc.abstractmethod
    async def put_setting(self, key: str, value: str, if_revision: int | None) -> pb.Setting:
        """Sets it. Raises Aborted unless `if_revision` is None or the key's revision now (0: there is no such key)."""

    @abc.abstractmethod
    def watch_members(self) -> AsyncGenerator[pb.WatchResponse, None]:
        """A snapshot, then changes; a snapshot again when the store was away or the watcher fell behind."""

    @abc.abstractmethod
    def watch_setting(self, key: str) -> AsyncGenerator[pb.Setting, None]:
        """The setting, if there is one, then every change; a watcher that falls behind is given the newest only."""
