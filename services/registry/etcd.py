"""The backend on etcd: any number of registry processes can share one."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from kvmesh.aio import Tasks
from kvmesh.errors import Aborted, MeshError, NotFound, Unavailable
from kvmesh.tls import Tls
from kvmesh.v1 import registry_pb2 as pb
from services.registry.base import Backend, Lease
from services.registry.mirror import Mirror
from services.registry.store import CALL_SECONDS, EtcdStore

log = logging.getLogger(__name__)
M = TypeVar("M", pb.Member, pb.Setting)
RETRY_SECONDS = 0.2
SWAP_TRIES = 5
DELETE = 1
MAX_REVISION = (1 << 63) - 1


class EtcdBackend(Backend):
    """Members at PREFIX/members/NAME (a Member) under etcd leases, settings at PREFIX/settings/KEY (a Setting).

    One watch on the prefix feeds all followers. It does not survive a restart of etcd; then everything is read anew,
    which also holds when revisions were compacted or the store is another one.
    """

    def __init__(self, address: str, prefix: str = "/kvmesh/v1", tls: Tls | None = None) -> None:
        root = prefix.rstrip("/").encode() + b"/"
        self._root, self._members, self._settings = root, root + b"members/", root + b"settings/"
        self._store = EtcdStore(address, tls)
        self._mirror = Mirror()
        self._lease_of: dict[str, int] = {}
        self._tasks = Tasks()

    async def start(self) -> None:
        """Begins to follow etcd."""
        self._tasks.start(self._follow(), "registry-follow-etcd")

    async def wait_ready(self) -> None:
        """Returns once etcd's content was read."""
        await self._mirror.synced.wait()

    def end_watches(self) -> None:
        """Ends every watch with Unavailable."""
        self._mirror.close()

    async def close(self) -> None:
        """Ends the watches and the connection."""
        self._mirror.close()
        await self._tasks.close()
        await self._store.close()

    async def register(self, member: pb.Member, ttl_ms: int) -> Lease:
        """Adds or renews `member`; the lease is in whole seconds, and no shorter than etcd allows."""
        key, value = self._members + member.endpoint.name.encode(), member.SerializeToString(deterministic=True)
        ttl_s = math.ceil(ttl_ms / 1000)
        fresh: tuple[int, int] | None = None
        for _ in range(SWAP_TRIES):
            before = await self._store.get(key)
            if before is not None and await self._same_life(before, member, ttl_s):
                lease, granted = before.lease, ttl_s
            else:
                lease, granted = fresh = fresh or await self._store.grant(ttl_s)
            done = before is not None and before.lease == lease and before.value == value
            if not done:
                try:
                    done, _ = await self._store.swap(key, before.mod_revision if before else 0, value, lease)
                except NotFound:
                    fresh = None
            if done:
                if before is not None and before.lease != lease:
                    await self._revoke(before.lease)
                return Lease(f"{lease:x}", granted * 1000)
        raise Unavailable(f"member {member.endpoint.name!r} is being registered by several others; try again")

    async def keep_alive(self, lease_id: str) -> int:
        """Renews a lease. Raises NotFound."""
        lease = _lease_number(lease_id)
        ttl_s = await self._store.renew(lease) if lease else 0
        # A lease can outlive its key: another incarnation took it, or somebody deleted it.
        known = lease in self._lease_of.values() and self._mirror.synced.is_set()
        if ttl_s <= 0 or not (known or await self._store.holds_keys(lease)):
            raise NotFound(f"lease_id = {lease_id!r} has run out; register again")
        return ttl_s * 1000

    async def deregister(self, lease_id: str) -> None:
        """Ends a lease."""
        if lease := _lease_number(lease_id):
            with suppress(NotFound):
                await self._store.revoke(lease)

    async def get_setting(self, key: str) -> pb.Setting:
        """The setting. Raises NotFound."""
        name = self._settings + key.encode()
        kv = await self._store.get(name)
        if kv is None:
            raise NotFound(f"there is no setting {key!r}")
        setting = self._setting(kv)
        if setting is None:
            raise NotFound(f"{name!r} in etcd is not a setting")
        return setting

    async def put_setting(self, key: str, value: str, if_revision: int | None) -> pb.Setting:
        """Sets it. Raises Aborted."""
        name, stored = self._settings + key.encode(), pb.Setting(key=key, value=value).SerializeToString()
        if if_revision is None:
            revision = await self._store.put(name, stored)
        else:
            done, revision = await self._store.swap(name, min(if_revision, MAX_REVISION), stored)
            if not done:
                raise Aborted(f"if_revision = {if_revision}, but setting {key!r} is at revision {revision}")
        return pb.Setting(key=key, value=value, revision=revision)

    def watch_members(self) -> AsyncGenerator[pb.WatchResponse, None]:
        """Members, for ever."""
        return self._mirror.follow_members()

    def watch_setting(self, key: str) -> AsyncGenerator[pb.Setting, None]:
        """One setting, for ever."""
        return self._mirror.follow_setting(key)

    async def _same_life(self, kv: Any, member: pb.Member, ttl_s: int) -> bool:
        """Whether `kv` is the same incarnation under a living lease of `ttl_s`; then the lease is renewed."""
        known = _decode(pb.Member, kv)
        if known is None or not kv.lease or known.endpoint.incarnation != member.endpoint.incarnation:
            return False
        return await self._store.renew(kv.lease) == ttl_s

    async def _revoke(self, lease: int) -> None:
        """Ends a lease that has lost its key; if that fails it runs out by itself."""
        if lease:
            with suppress(MeshError):
                await self._store.revoke(lease)

    async def _follow(self) -> None:
        told = False
        while True:
            try:
                await self._sync()
                log.info("the watch on etcd at %s ended; reading everything anew", self._store.address)
            except MeshError as error:
                if self._mirror.synced.is_set() or not told:
                    log.warning("%s; trying again", error)
                told = True
            except Exception:
                log.exception("following etcd at %s failed; trying again", self._store.address)
            finally:
                self._mirror.lost()
            await asyncio.sleep(RETRY_SECONDS)

    async def _sync(self) -> None:
        """Reads everything, then applies events until the watch ends. Raises Unavailable."""
        contents = await self._store.read(self._root)
        async with aclosing(self._store.watch(self._root, contents)) as batches:
            try:
                async with asyncio.timeout(CALL_SECONDS):
                    if await anext(batches, None) is None:
                        return
            except TimeoutError:
                raise Unavailable(f"etcd at {self._store.address} does not set up a watch") from None
            self._replace(contents.kvs)
            async for events in batches:
                for event in events:
                    if event.type == DELETE:
                        self._drop(event.kv.key)
                    else:
                        self._put(event.kv)

    def _replace(self, kvs: list[Any]) -> None:
        self._lease_of = {}
        members: dict[str, pb.Member] = {}
        settings: dict[str, pb.Setting] = {}
        for kv in kvs:
            if (member := self._member(kv)) is not None:
                members[member.endpoint.name] = member
            elif (setting := self._setting(kv)) is not None:
                settings[setting.key] = setting
        self._mirror.replace(members, settings)
        log.info("etcd at %s: %d members, %d settings", self._store.address, len(members), len(settings))

    def _put(self, kv: Any) -> None:
        if (member := self._member(kv)) is not None:
            self._mirror.put_member(member)
        elif (setting := self._setting(kv)) is not None:
            self._mirror.put_setting(setting)

    def _drop(self, key: bytes) -> None:
        if key.startswith(self._members):
            name = key.removeprefix(self._members).decode(errors="replace")
            self._lease_of.pop(name, None)
            self._mirror.drop_member(name)
        elif key.startswith(self._settings):
            self._mirror.drop_setting(key.removeprefix(self._settings).decode(errors="replace"))

    def _member(self, kv: Any) -> pb.Member | None:
        """The member stored in `kv`, its lease noted; None when that is something else."""
        member = _decode(pb.Member, kv) if kv.key.startswith(self._members) else None
        if member is None or kv.key != self._members + member.endpoint.name.encode():
            return None
        self._lease_of[member.endpoint.name] = kv.lease
        return member

    def _setting(self, kv: Any) -> pb.Setting | None:
        """The setting stored in `kv`; None when that is something else."""
        setting = _decode(pb.Setting, kv) if kv.key.startswith(self._settings) else None
        if setting is None or kv.key != self._settings + setting.key.encode():
            return None
        setting.revision = kv.mod_revision
        return setting


def _decode(kind: type[M], kv: Any) -> M | None:
    """The message in an etcd entry; None, logged, when it is not one."""
    try:
        return kind.FromString(kv.value)
    except DecodeError:
        log.warning("%r in etcd is not a %s: passed over", kv.key, kind.__name__)
        return None


def _lease_number(lease_id: str) -> int:
    """The etcd lease of `lease_id`; 0 when it never was one."""
    try:
        number = int(lease_id, 16)
    except ValueError:
        return 0
    return number if 0 < number < 1 << 63 else 0
