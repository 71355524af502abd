"""Who may call a gRPC server, and how much they may send at once."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio

from kvmesh.apikeys import ADMIN, GENERATE, ApiKeys
from kvmesh.errors import MeshError, PermissionDenied
from kvmesh.sizes import MESSAGE_BYTES
from kvmesh.tls import SERVICE, Tls, holds

HEALTH, REFLECTION = "/grpc.health.v1.Health/", "/grpc.reflection."
# What a key with the scope `generate` may call; the rest takes `admin`.
GENERATING = frozenset(f"/kvmesh.v1.Router/{name}" for name in ("Generate", "ListStrategies", "GetStrategy"))


class Guard(Protocol):
    """Lets calls in, or refuses them."""

    def admitted(self, method: str, context: Any) -> AbstractContextManager[None]:
        """Entered for as long as the call of `method` ("/package.Service/Call") lasts. Raises MeshError."""


class ServicesOnly:
    """For callers whose certificate says that they are a service of the mesh; anybody may ask for health."""

    @contextlib.contextmanager
    def admitted(self, method: str, context: Any) -> Any:
        """Raises PermissionDenied."""
        if not method.startswith(HEALTH) and not holds(context, SERVICE):
            raise PermissionDenied(f"{method}: the caller's certificate is not that of a service of the mesh")
        yield


class KeyGuard:
    """For callers with an API key, by its scopes; health and reflection need none."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    @contextlib.contextmanager
    def admitted(self, method: str, context: Any) -> Any:
        """Raises Unauthenticated, PermissionDenied, ResourceExhausted."""
        if method.startswith((HEALTH, REFLECTION)):
            yield
            return
        metadata = dict(context.invocation_metadata() or ())
        key = self._keys.find(str(metadata.get("authorization", "")))
        key.check(GENERATE if method in GENERATING else ADMIN, method)
        with self._keys.running(key, 1) if method.endswith("/Generate") else contextlib.nullcontext():
            yield


@dataclass(frozen=True)
class Access:
    """How a server may be called."""

    tls: Tls | None = None
    # With `tls`: callers have to show a certificate of the CA.
    mutual: bool = True
    guard: Guard | None = None
    # Largest message taken.
    message_bytes: int = MESSAGE_BYTES


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Puts a guard before every method of a server."""

    def __init__(self, guard: Guard, refuse: Callable[[Any, Any, Exception], Awaitable[None]]) -> None:
        self._guard = guard
        self._refuse = refuse

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The handler of a call, guarded."""
        handler = await continuation(details)
        return None if handler is None else self._guarded(handler, details.method)

    def _guarded(self, handler: Any, method: str) -> Any:
        kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
        kind = next(k for k in kinds if getattr(handler, k) is not None)
        behaviour = getattr(handler, kind)

        async def call(request: Any, context: Any) -> Any:
            try:
                with self._guard.admitted(method, context):
                    answer = behaviour(request, context)
                    if not hasattr(answer, "__aiter__"):
                        return await answer
                    async for message in answer:
                        await context.write(message)
                    return None
            except MeshError as error:
                refusal = error
            await self._refuse(behaviour, context, refusal)

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(call, handler.request_deserializer, handler.response_serializer)
