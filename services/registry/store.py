"""The few etcd calls that the registry needs, each with a deadline.

They go through aetcd's stubs, not its client: that one hides response headers and cancelled watches, and its watcher
awaits itself when the server goes away.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from aetcd import rpc
from grpc.aio import EOF  # type: ignore[attr-defined]

from kvmesh.errors import InvalidArgument, MeshError, NotFound, ResourceExhausted, Unavailable
from kvmesh.tls import Tls

CALL_SECONDS = 3.0
_OPTIONS: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", 10000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Also the time that one attempt to connect is given.
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A snapshot of everything under the prefix comes in one message.
    ("grpc.max_receive_message_length", -1),
]
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


@dataclass(frozen=True)
class Contents:
    """What lay under a prefix at `revision` of the store `cluster`."""

    kvs: list[Any]
    revision: int
    cluster: int


def prefix_end(prefix: bytes) -> bytes:
    """The key just after all keys that begin with `prefix` (which does not end in 0xff)."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


class EtcdStore:
    """One etcd endpoint. Calls raise Unavailable when it is away; a lease id is a positive int64."""

    def __init__(self, address: str, tls: Tls | None = None) -> None:
        self.address = address
        if tls is None:
            self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, tls.channel_credentials(), options=_OPTIONS)
        self._kv = rpc.KVStub(self._channel)
        self._leases = rpc.LeaseStub(self._channel)
        self._watch = rpc.WatchStub(self._channel)

    async def close(self) -> None:
        """Closes the channel; calls under way are cancelled."""
        await self._channel.close(None)

    async def read(self, prefix: bytes) -> Contents:
        """Everything under `prefix`."""
        reply = await self._call(self._kv.Range, rpc.RangeRequest(key=prefix, range_end=prefix_end(prefix)))
        return Contents(list(reply.kvs), reply.header.revision, reply.header.cluster_id)

    async def get(self, key: bytes) -> Any | None:
        """The KeyValue of `key`, or None."""
        reply = await self._call(self._kv.Range, rpc.RangeRequest(key=key))
        return reply.kvs[0] if reply.kvs else None

    async def put(self, key: bytes, value: bytes, lease: int = 0) -> int:
        """Puts it whatever is there; its new revision."""
        reply = await self._call(self._kv.Put, rpc.PutRequest(key=key, value=value, lease=lease))
        return int(reply.header.revision)

    async def swap(self, key: bytes, revision: int, value: bytes, lease: int = 0) -> tuple[bool, int]:
        """Puts it if `key` is at `revision` (0: absent); (done, the key's revision now). NotFound: no such lease."""
        compare = rpc.Compare(result=rpc.Compare.EQUAL, target=rpc.Compare.MOD, key=key, mod_revision=revision)
        put = rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=value, lease=lease))
        get = rpc.RequestOp(request_range=rpc.RangeRequest(key=key))
        reply = await self._call(self._kv.Txn, rpc.TxnRequest(compare=[compare], success=[put], failure=[get]))
        if reply.succeeded:
            return True, int(reply.header.revision)
        kvs = reply.responses[0].response_range.kvs
        return False, int(kvs[0].mod_revision) if kvs else 0

    async def grant(self, ttl_s: int) -> tuple[int, int]:
        """A new lease: its id, and its length in seconds, `ttl_s` or more."""
        reply = await self._call(self._leases.LeaseGrant, rpc.LeaseGrantRequest(TTL=ttl_s))
        return int(reply.ID), int(reply.TTL)

    async def renew(self, lease: int) -> int:
        """The lease's length in seconds from now; 0 when it is gone."""
        call = self._leases.LeaseKeepAlive([rpc.LeaseKeepAliveRequest(ID=lease)], timeout=CALL_SECONDS)
        try:
            reply = await call.read()
            if reply is EOF:
                raise Unavailable(f"etcd at {self.address} gave no answer")
            return int(reply.TTL)
        except grpc.aio.AioRpcError as error:
            raise self.error(error) from error
        finally:
            call.cancel()

    async def holds_keys(self, lease: int) -> bool:
        """Whether any key lives under the lease."""
        request = rpc.LeaseTimeToLiveRequest(ID=lease, keys=True)
        reply = await self._call(self._leases.LeaseTimeToLive, request)
        return reply.TTL > 0 and bool(reply.keys)

    async def revoke(self, lease: int) -> None:
        """Ends a lease with its keys. Raises NotFound."""
        await self._call(self._leases.LeaseRevoke, rpc.LeaseRevokeRequest(ID=lease))

    async def watch(self, prefix: bytes, after: Contents) -> AsyncGenerator[list[Any], None]:
        """First [] once the watch is set up, then the events after `after`, revision by revision.

        Ends when the watch cannot go on from there (compacted, or another store); raises Unavailable when etcd goes.
        """
        # hasleader: a node cut off from its cluster ends the watch instead of staying silent.
        call = self._watch.Watch(metadata=(("hasleader", "true"),))
        create = rpc.WatchCreateRequest(key=prefix, range_end=prefix_end(prefix), start_revision=after.revision + 1)
        try:
            await call.write(rpc.WatchRequest(create_request=create))
            created = await call.read()
            if created is EOF or created.canceled or not _continues(created.header, after):
                return
            yield []
            while True:
                reply = await call.read()
                if reply is EOF or reply.canceled:
                    return
                if reply.events:
                    yield list(reply.events)
        except grpc.aio.AioRpcError as error:
            raise self.error(error) from error
        except asyncio.InvalidStateError as error:
            raise Unavailable(f"etcd at {self.address} ended the call") from error
        finally:
            call.cancel()

    def error(self, error: grpc.aio.AioRpcError) -> MeshError:
        """The MeshError of a failed etcd call."""
        where = f"etcd at {self.address}"
        if error.code() in _AWAY:
            return Unavailable(f"{where} cannot be reached")
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return NotFound(f"{where}: {error.details()}")
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return ResourceExhausted(f"{where}: {error.details()}")
        if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidArgument(f"{where}: {error.details()}")
        return Unavailable(f"{where}: {error.code().name}: {error.details()}")

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise self.error(error) from error


def _continues(header: Any, after: Contents) -> bool:
    return bool(header.cluster_id == after.cluster and header.revision >= after.revision)
