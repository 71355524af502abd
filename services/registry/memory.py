"""The embedded backend: members and settings in this process, gone with it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from kvmesh.errors import Aborted, NotFound
from kvmesh.v1 import registry_pb2 as pb
from services.registry.base import Backend, Lease
from services.registry.mirror import Mirror


@dataclass
class _Held:
    name: str
    ttl_ms: int
    timer: asyncio.TimerHandle


class MemoryBackend(Backend):
    """For tests and meshes of one machine. Leases run on the monotonic clock."""

    def __init__(self) -> None:
        self._mirror = Mirror()
        self._held: dict[str, _Held] = {}
        self._lease_of: dict[str, str] = {}
        self._revision = 0

    async def start(self) -> None:
        """Nothing to reach."""
        self._mirror.replace({}, {})

    async def wait_ready(self) -> None:
        """Ready from `start` on."""
        await self._mirror.synced.wait()

    def end_watches(self) -> None:
        """Ends every watch with Unavailable."""
        self._mirror.close()

    async def close(self) -> None:
        """Ends the watches and forgets everything."""
        self._mirror.close()
        for held in self._held.values():
            held.timer.cancel()
        self._held.clear()

    async def register(self, member: pb.Member, ttl_ms: int) -> Lease:
        """Adds or renews `member`."""
        name = member.endpoint.name
        before, lease_id = self._mirror.members.get(name), self._lease_of.get(name)
        if before is None or lease_id is None or before.endpoint.incarnation != member.endpoint.incarnation:
            if lease_id is not None:
                self._held.pop(lease_id).timer.cancel()
            lease_id = self._lease_of[name] = secrets.token_hex(8)
        else:
            self._held[lease_id].timer.cancel()
        self._held[lease_id] = _Held(name, ttl_ms, self._timer(lease_id, ttl_ms))
        if before != member:
            self._mirror.put_member(member)
        return Lease(lease_id, ttl_ms)

    async def keep_alive(self, lease_id: str) -> int:
        """Renews a lease. Raises NotFound."""
        held = self._held.get(lease_id)
        if held is None:
            raise NotFound(f"lease_id = {lease_id!r} has run out; register again")
        held.timer.cancel()
        held.timer = self._timer(lease_id, held.ttl_ms)
        return held.ttl_ms

    async def deregister(self, lease_id: str) -> None:
        """Ends a lease."""
        self._end(lease_id)

    async def get_setting(self, key: str) -> pb.Setting:
        """The setting. Raises NotFound."""
        setting = self._mirror.settings.get(key)
        if setting is None:
            raise NotFound(f"there is no setting {key!r}")
        return setting

    async def put_setting(self, key: str, value: str, if_revision: int | None) -> pb.Setting:
        """Sets it. Raises Aborted."""
        before = self._mirror.settings.get(key)
        now = before.revision if before is not None else 0
        if if_revision is not None and if_revision != now:
            raise Aborted(f"if_revision = {if_revision}, but setting {key!r} is at revision {now}")
        self._revision += 1
        setting = pb.Setting(key=key, value=value, revision=self._revision)
        self._mirror.put_setting(setting)
        return setting

    def watch_members(self) -> AsyncGenerator[pb.WatchResponse, None]:
        """Members, for ever."""
        return self._mirror.follow_members()

    def watch_setting(self, key: str) -> AsyncGenerator[pb.Setting, None]:
        """One setting, for ever."""
        return self._mirror.follow_setting(key)

    def _timer(self, lease_id: str, ttl_ms: int) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(ttl_ms / 1000, self._end, lease_id)

    def _end(self, lease_id: str) -> None:
        held = self._held.pop(lease_id, None)
        if held is not None:
            held.timer.cancel()
            del self._lease_of[held.name]
            self._mirror.drop_member(held.name)
