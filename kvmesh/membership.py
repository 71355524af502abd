"""The mesh as a service sees it through the registry: being a member, watching members, shared settings.

Each class owns its channel, unless it is given one: that stays the giver's.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio

from kvmesh.aio import Tasks
from kvmesh.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    MeshError,
    NotFound,
    Unavailable,
    from_rpc,
)
from kvmesh.grpcx import channel as make_channel
from kvmesh.v1 import registry_pb2 as pb
from kvmesh.v1 import registry_pb2_grpc

log = logging.getLogger(__name__)
T = TypeVar("T")
# Makes a channel to an address.
Connect: TypeAlias = Callable[[str], grpc.aio.Channel]
CALL_SECONDS = 5.0
STOP_SECONDS = 1.0


class Backoff:
    """Delays between tries: from `first` seconds, doubled up to `most`, each shortened by up to half at random."""

    def __init__(self, first: float = 0.1, most: float = 2.0) -> None:
        self._first, self._most = first, most
        self._next = first

    def reset(self) -> None:
        """A try succeeded: begin anew."""
        self._next = self._first

    def delay(self) -> float:
        """Seconds to wait before the next try."""
        now, self._next = self._next, min(self._next * 2, self._most)
        return now * random.uniform(0.5, 1)


class RegistryLink:
    """A stub of the registry on a channel, with errors as MeshErrors."""

    def __init__(
        self, registry_address: str, channel: grpc.aio.Channel | None = None, connect: Connect = make_channel
    ) -> None:
        self._peer = f"registry {registry_address}"
        self._owned = channel is None
        self._channel = channel if channel is not None else connect(registry_address)
        self.stub: registry_pb2_grpc.RegistryAsyncStub = registry_pb2_grpc.RegistryStub(self._channel)

    async def call(self, method: Callable[..., Awaitable[T]], request: Any, timeout: float = CALL_SECONDS) -> T:
        """One unary call. Raises MeshError."""
        try:
            return await method(request, timeout=max(0.01, timeout))
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._peer) from error

    async def stream(self, method: Callable[..., Any], request: Any) -> AsyncGenerator[Any, None]:
        """The answers of a streaming call. Raises MeshError; Unavailable when the registry ends the stream."""
        call = method(request)
        try:
            async for answer in call:
                yield answer
            raise Unavailable(f"{self._peer} ended the stream")
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._peer) from error
        finally:
            call.cancel()

    async def close(self) -> None:
        """Closes the channel if it is ours."""
        if self._owned:
            await self._channel.close(None)


class Membership:
    """Keeps `member` registered from `start` to `stop`, also across restarts of the registry and its store.

    `connected` is whether the registry confirmed it last time. `ttl_ms` is how soon the mesh notices a death.
    """

    def __init__(
        self,
        registry_address: str,
        member: pb.Member,
        ttl_ms: int = 5000,
        *,
        channel: grpc.aio.Channel | None = None,
        connect: Connect = make_channel,
    ) -> None:
        self._link = RegistryLink(registry_address, channel, connect)
        self._request = pb.RegisterRequest(member=member, ttl_ms=ttl_ms)
        self._lease_id = ""
        self._ttl = ttl_ms / 1000 or 5.0
        self._tasks = Tasks()
        self.connected = False

    async def start(self, timeout: float = 30.0) -> None:
        """Registers, trying again for `timeout` seconds, then keeps alive in the background.

        Raises Unavailable when time is up, and at once what no other try would change, such as InvalidArgument. Then
        nothing is left to stop.
        """
        deadline, backoff = time.monotonic() + timeout, Backoff()
        try:
            while True:
                try:
                    await self._register(min(CALL_SECONDS, deadline - time.monotonic()))
                    break
                except (Unavailable, DeadlineExceeded) as error:
                    delay = backoff.delay()
                    if time.monotonic() + delay >= deadline:
                        raise Unavailable(f"not registered within {timeout:g} s: {error}") from error
                    await asyncio.sleep(delay)
        except BaseException:
            await self._link.close()
            raise
        self._tasks.start(self._keep(), f"membership-{self._request.member.endpoint.name}")

    async def stop(self) -> None:
        """Leaves the mesh. Never raises because of the registry; without it the lease runs out by itself."""
        await self._tasks.close()
        lease_id, self._lease_id = self._lease_id, ""
        self.connected = False
        if lease_id:
            with suppress(MeshError):
                await self._link.call(self._link.stub.Deregister, pb.DeregisterRequest(lease_id=lease_id), STOP_SECONDS)
        await self._link.close()

    async def _keep(self) -> None:
        name, backoff = self._request.member.endpoint.name, Backoff(most=1.0)
        # Both tries that a lease has room for end before it does.
        patience = max(0.5, min(CALL_SECONDS, self._ttl / 3))
        delay = self._ttl / 3
        while True:
            await asyncio.sleep(delay)
            try:
                if self._lease_id:
                    await self._renew(patience)
                else:
                    await self._register(CALL_SECONDS)
                    log.info("%s is registered again", name)
                backoff.reset()
                delay = self._ttl / 3
            except NotFound:
                log.warning("%s has lost its lease; registering again", name)
                self._lease_id, self.connected = "", False
                delay = backoff.delay()
            except MeshError as error:
                if self.connected:
                    log.warning("%s; %s goes on trying", error, name)
                self.connected = False
                delay = backoff.delay()

    async def _register(self, timeout: float) -> None:
        reply = await self._link.call(self._link.stub.Register, self._request, timeout)
        self._lease_id, self._ttl, self.connected = reply.lease_id, reply.ttl_ms / 1000, True

    async def _renew(self, timeout: float) -> None:
        request = pb.KeepAliveRequest(lease_id=self._lease_id)
        await self._link.call(self._link.stub.KeepAlive, request, timeout)
        self.connected = True


class MeshWatch:
    """The members of the mesh, by name: the newest that is known, also while the registry is away.

    `on_change` is called with the new `members` after each change, in the event loop; it must not block.
    A change makes a new dict: one that was handed out stays as it was. A registry that comes back may have forgotten
    everybody: who is missing then is known for `patience` seconds more, in which to register again.
    """

    def __init__(
        self,
        registry_address: str,
        on_change: Callable[[dict[str, pb.Member]], None] | None = None,
        *,
        channel: grpc.aio.Channel | None = None,
        patience: float = 0.0,
        connect: Connect = make_channel,
    ) -> None:
        self._link = RegistryLink(registry_address, channel, connect)
        self._on_change = on_change
        self._patience = patience
        # Incarnations of those that the registry, being back, has not heard of yet.
        self._missing: set[str] = set()
        self._changed = asyncio.Condition()
        self._tasks = Tasks()
        self.members: dict[str, pb.Member] = {}
        self.connected = False

    def start(self) -> None:
        """Begins to watch; does not wait for the registry."""
        self._tasks.start(self._run(), "mesh-watch")

    async def close(self) -> None:
        """Stops watching. `members` stays as it is."""
        await self._tasks.close()
        await self._link.close()
        self.connected = False

    async def wait_for(self, predicate: Callable[[dict[str, pb.Member]], bool], timeout: float) -> dict[str, pb.Member]:
        """Waits until `predicate(members)` holds; the members then. Raises DeadlineExceeded after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout), self._changed:
                await self._changed.wait_for(lambda: predicate(self.members))
                return self.members
        except TimeoutError:
            known = ", ".join(sorted(self.members)) or "none"
            raise DeadlineExceeded(f"the mesh is not as awaited after {timeout:g} s; members: {known}") from None

    async def _run(self) -> None:
        backoff = Backoff()
        while True:
            try:
                async for change in self._link.stream(self._link.stub.Watch, pb.WatchRequest()):
                    backoff.reset()
                    self.connected = True
                    await self._apply(change)
            except MeshError as error:
                if self.connected:
                    log.warning("%s; going on with the members known", error)
            self.connected = False
            await asyncio.sleep(backoff.delay())

    async def _apply(self, change: pb.WatchResponse) -> None:
        members = self._waited_for(change) if change.snapshot else dict(self.members)
        for endpoint in change.left:
            known = members.get(endpoint.name)
            if known is not None and known.endpoint.incarnation == endpoint.incarnation:
                del members[endpoint.name]
        members.update((m.endpoint.name, m) for m in change.present)
        self._missing.difference_update(m.endpoint.incarnation for m in change.present)
        await self._set(members)

    def _waited_for(self, snapshot: pb.WatchResponse) -> dict[str, pb.Member]:
        """The members known that are not in the snapshot, if they are to be waited for."""
        present = {m.endpoint.name for m in snapshot.present}
        missing = {name: m for name, m in self.members.items() if name not in present}
        if not missing or not self._patience:
            return {}
        incarnations = {m.endpoint.incarnation for m in missing.values()}
        self._missing |= incarnations
        self._tasks.start(self._give_up(incarnations), "wait for members to register again")
        return missing

    async def _give_up(self, incarnations: set[str]) -> None:
        await asyncio.sleep(self._patience)
        gone = self._missing & incarnations
        self._missing -= gone
        await self._set({name: m for name, m in self.members.items() if m.endpoint.incarnation not in gone})

    async def _set(self, members: dict[str, pb.Member]) -> None:
        if members == self.members:
            return
        self.members = members
        if self._on_change is not None:
            try:
                self._on_change(members)
            except Exception:
                log.exception("on_change failed")
        async with self._changed:
            self._changed.notify_all()


class SharedSettings:
    """The mesh's settings: strings under keys of [a-z0-9._/-]{1,128}."""

    def __init__(self, registry_address: str, *, channel: grpc.aio.Channel | None = None) -> None:
        self._link = RegistryLink(registry_address, channel)

    async def close(self) -> None:
        """Closes the channel if it is ours; running watches end."""
        await self._link.close()

    async def get(self, key: str, timeout: float = CALL_SECONDS) -> pb.Setting | None:
        """The setting, or None. Raises MeshError."""
        try:
            reply = await self._link.call(self._link.stub.GetSetting, pb.GetSettingRequest(key=key), timeout)
        except NotFound:
            return None
        return reply.setting

    async def put(
        self, key: str, value: str, if_revision: int | None = None, timeout: float = CALL_SECONDS
    ) -> pb.Setting:
        """Sets it; with `if_revision` only if it is at that revision (0: absent), else raises Aborted."""
        request = pb.PutSettingRequest(key=key, value=value, if_revision=if_revision)
        return (await self._link.call(self._link.stub.PutSetting, request, timeout)).setting

    async def watch(self, key: str) -> AsyncGenerator[pb.Setting, None]:
        """The setting, if there is one, then every change; reconnects for ever, and gives no value twice running.

        Raises InvalidArgument for a malformed key. Close it (contextlib.aclosing) or cancel the task that iterates.
        """
        seen: pb.Setting | None = None
        backoff = Backoff()
        while True:
            try:
                async for answer in self._link.stream(self._link.stub.WatchSetting, pb.WatchSettingRequest(key=key)):
                    backoff.reset()
                    if answer.setting != seen:
                        seen = answer.setting
                        yield answer.setting
            except (InvalidArgument, FailedPrecondition):
                raise
            except MeshError as error:
                log.debug("watching setting %s: %s", key, error)
            await asyncio.sleep(backoff.delay())
