"""The Registry service: checks requests and hands them to a backend."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc.aio

from kvmesh.errors import InvalidArgument
from kvmesh.grpcx import rpc, split_address
from kvmesh.v1 import registry_pb2 as pb
from kvmesh.v1 import registry_pb2_grpc
from services.registry.base import Backend

NAME = "kvmesh.v1.Registry"
DEFAULT_TTL_MS, MIN_TTL_MS, MAX_TTL_MS = 5000, 1000, 600000
VALUE_BYTES = 64 << 10
MEMBER_BYTES = 16 << 10
_NAME = re.compile(r"[A-Za-z0-9._-]{1,63}")
_INCARNATION = re.compile(r"[0-9a-fA-F]{32}")
_KEY = re.compile(r"[a-z0-9._/-]{1,128}")

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class RegistryService(registry_pb2_grpc.RegistryServicer):
    """kvmesh.v1.Registry over `backend`, which stays its creator's."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @rpc
    async def Register(self, request: pb.RegisterRequest, context: Context) -> pb.RegisterResponse:
        """Adds a member under a lease."""
        check_member(request.member)
        ttl_ms = request.ttl_ms or DEFAULT_TTL_MS
        if not MIN_TTL_MS <= ttl_ms <= MAX_TTL_MS:
            raise InvalidArgument(f"ttl_ms = {ttl_ms} is not 0 or between {MIN_TTL_MS} and {MAX_TTL_MS}")
        lease = await self._backend.register(request.member, ttl_ms)
        return pb.RegisterResponse(lease_id=lease.id, ttl_ms=lease.ttl_ms)

    @rpc
    async def KeepAlive(self, request: pb.KeepAliveRequest, context: Context) -> pb.KeepAliveResponse:
        """Renews a lease."""
        return pb.KeepAliveResponse(ttl_ms=await self._backend.keep_alive(request.lease_id))

    @rpc
    async def Deregister(self, request: pb.DeregisterRequest, context: Context) -> pb.DeregisterResponse:
        """Ends a lease."""
        await self._backend.deregister(request.lease_id)
        return pb.DeregisterResponse()

    @rpc
    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchResponse]:
        """Members: a snapshot, then changes."""
        async with aclosing(self._backend.watch_members()) as answers:
            async for answer in answers:
                yield answer

    @rpc
    async def GetSetting(self, request: pb.GetSettingRequest, context: Context) -> pb.GetSettingResponse:
        """One setting."""
        check_key(request.key)
        return pb.GetSettingResponse(setting=await self._backend.get_setting(request.key))

    @rpc
    async def PutSetting(self, request: pb.PutSettingRequest, context: Context) -> pb.PutSettingResponse:
        """Sets one setting."""
        check_key(request.key)
        if (size := len(request.value.encode())) > VALUE_BYTES:
            raise InvalidArgument(f"value of {request.key!r} has {size} bytes, at most {VALUE_BYTES} are kept")
        expected = request.if_revision if request.HasField("if_revision") else None
        return pb.PutSettingResponse(setting=await self._backend.put_setting(request.key, request.value, expected))

    @rpc
    async def WatchSetting(
        self, request: pb.WatchSettingRequest, context: Context
    ) -> AsyncIterator[pb.WatchSettingResponse]:
        """One setting: as it is, then changes."""
        check_key(request.key)
        async with aclosing(self._backend.watch_setting(request.key)) as settings:
            async for setting in settings:
                yield pb.WatchSettingResponse(setting=setting)


def check_member(member: pb.Member) -> None:
    """Raises InvalidArgument, naming the field, unless `member` can be registered."""
    endpoint = member.endpoint
    if not _NAME.fullmatch(endpoint.name):
        raise InvalidArgument(f"member.endpoint.name = {endpoint.name!r} is not [A-Za-z0-9._-], 1 to 63 characters")
    if not _INCARNATION.fullmatch(endpoint.incarnation):
        raise InvalidArgument(f"member.endpoint.incarnation = {endpoint.incarnation!r} is not 32 hexadecimal digits")
    try:
        _, port = split_address(endpoint.address)
    except InvalidArgument as error:
        raise InvalidArgument(f"member.endpoint.{error}") from error
    if port == 0:
        raise InvalidArgument(f"member.endpoint.address = {endpoint.address!r} has no port that can be called")
    if member.kind == pb.MEMBER_KIND_UNSPECIFIED or member.kind not in pb.MemberKind.values():
        raise InvalidArgument(f"member.kind = {member.kind} is not a kind of member")
    if (size := member.ByteSize()) > MEMBER_BYTES:
        raise InvalidArgument(f"member has {size} bytes, at most {MEMBER_BYTES} are kept: shorten labels")


def check_key(key: str) -> None:
    """Raises InvalidArgument unless `key` can name a setting."""
    if not _KEY.fullmatch(key):
        raise InvalidArgument(f"key = {key[:200]!r} is not [a-z0-9._/-], 1 to 128 characters")
