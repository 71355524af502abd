"""The store's content as this process knows it, and everyone who follows it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Generic, TypeVar

from kvmesh.errors import Unavailable
from kvmesh.v1 import registry_pb2 as pb
from kvmesh.v1.common_pb2 import Endpoint

T = TypeVar("T")

# Changes kept for one follower; one that is further behind starts again from the whole.
FOLLOWER_LIMIT = 256
# How long a new watch waits for a store that is away.
SYNC_SECONDS = 3.0


class Follower(Generic[T]):
    """The changes that one watcher has yet to see, at most FOLLOWER_LIMIT of them."""

    def __init__(self) -> None:
        self._changes: list[T] = []
        self._restart = True
        self._closed = False
        self._wake = asyncio.Event()
        self._wake.set()

    def push(self, change: T) -> None:
        """Adds a change, unless the follower starts again from the whole anyway."""
        if self._restart:
            return
        self._changes.append(change)
        self._wake.set()
        if len(self._changes) > FOLLOWER_LIMIT:
            self.restart()

    def restart(self) -> None:
        """Makes the follower start again from the whole."""
        self._changes.clear()
        self._restart = True
        self._wake.set()

    def close(self) -> None:
        """Makes `take` raise Unavailable."""
        self._closed = True
        self._wake.set()

    async def take(self) -> list[T] | None:
        """Waits for changes and takes all of them, oldest first; None: start from the whole, as it is right now."""
        await self._wake.wait()
        if self._closed:
            raise Unavailable("the registry is stopping")
        self._wake.clear()
        if self._restart:
            self._restart = False
            return None
        changes, self._changes = self._changes, []
        return changes


class Mirror:
    """Members and settings, kept by a backend; `follow_*` are the watches that the service gives to clients."""

    def __init__(self) -> None:
        self.members: dict[str, pb.Member] = {}
        self.settings: dict[str, pb.Setting] = {}
        self.synced = asyncio.Event()
        self._member_followers: set[Follower[pb.Member | Endpoint]] = set()
        self._setting_followers: dict[str, set[Follower[pb.Setting]]] = {}
        self._closed = False

    def put_member(self, member: pb.Member) -> None:
        """A member came, or changed."""
        self.members[member.endpoint.name] = member
        for follower in self._member_followers:
            follower.push(member)

    def drop_member(self, name: str) -> None:
        """A member left; nothing happens when it was not known."""
        member = self.members.pop(name, None)
        if member is not None:
            for follower in self._member_followers:
                follower.push(member.endpoint)

    def put_setting(self, setting: pb.Setting) -> None:
        """A setting changed."""
        self.settings[setting.key] = setting
        for follower in self._setting_followers.get(setting.key, ()):
            follower.push(setting)

    def drop_setting(self, key: str) -> None:
        """A setting was deleted behind the registry's back; followers are told when there is one again."""
        self.settings.pop(key, None)

    def replace(self, members: dict[str, pb.Member], settings: dict[str, pb.Setting]) -> None:
        """Everything anew; followers start again from it."""
        self.members, self.settings = members, settings
        for follower in self._followers():
            follower.restart()
        self.synced.set()

    def lost(self) -> None:
        """The store is away: watches under way wait, new ones are refused after SYNC_SECONDS."""
        self.synced.clear()

    def close(self) -> None:
        """Ends every watch with Unavailable, and every later one."""
        self._closed = True
        for follower in self._followers():
            follower.close()

    async def follow_members(self) -> AsyncGenerator[pb.WatchResponse, None]:
        """A snapshot, then changes, those that queue up together in one message. Raises Unavailable."""
        await self._wait_synced()
        follower: Follower[pb.Member | Endpoint] = Follower()
        self._member_followers.add(follower)
        try:
            while True:
                changes = await follower.take()
                if changes is None:
                    yield pb.WatchResponse(snapshot=True, present=self.members.values())
                else:
                    yield _merge(changes)
        finally:
            self._member_followers.discard(follower)

    async def follow_setting(self, key: str) -> AsyncGenerator[pb.Setting, None]:
        """The setting, then every change of it. Raises Unavailable."""
        await self._wait_synced()
        follower: Follower[pb.Setting] = Follower()
        self._setting_followers.setdefault(key, set()).add(follower)
        seen: pb.Setting | None = None
        try:
            while True:
                changes = await follower.take()
                if changes is None:
                    changes = [self.settings[key]] if key in self.settings else []
                for setting in changes:
                    if setting != seen:
                        seen = setting
                        yield setting
        finally:
            followers = self._setting_followers[key]
            followers.discard(follower)
            if not followers:
                del self._setting_followers[key]

    def _followers(self) -> list[Follower[pb.Member | Endpoint] | Follower[pb.Setting]]:
        return [*self._member_followers, *(f for group in self._setting_followers.values() for f in group)]

    async def _wait_synced(self) -> None:
        try:
            await asyncio.wait_for(self.synced.wait(), SYNC_SECONDS)
        except TimeoutError:
            raise Unavailable("the store behind the registry cannot be reached") from None
        if self._closed:
            raise Unavailable("the registry is stopping")


def _merge(changes: list[pb.Member | Endpoint]) -> pb.WatchResponse:
    """One message with the last change of each name."""
    latest: dict[str, pb.Member | Endpoint] = {}
    for change in changes:
        latest[change.endpoint.name if isinstance(change, pb.Member) else change.name] = change
    return pb.WatchResponse(
        present=[c for c in latest.values() if isinstance(c, pb.Member)],
        left=[c for c in latest.values() if isinstance(c, Endpoint)],
    )
