"""Requests that are no message: refused as INVALID_ARGUMENT, where gRPC says UNKNOWN and logs a stack trace."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from kvmesh.errors import InvalidArgument


@dataclass(frozen=True)
class _Unparsed:
    """In place of a request."""

    error: InvalidArgument


class Careful:
    """Stands for `server` when services are added to it: their requests are parsed with care."""

    def __init__(self, server: Any, refuse: Callable[[Any, Any, Exception], Awaitable[None]]) -> None:
        self._server = server
        self._refuse = refuse

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The same handlers come with the call below."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Adds the methods of a service."""
        careful = {name: self._careful(f"{service}/{name}", handler) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, careful),))

    def _careful(self, name: str, handler: Any) -> Any:
        kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
        kind = next(k for k in kinds if getattr(handler, k) is not None)
        behaviour, parse = getattr(handler, kind), handler.request_deserializer
        one = not kind.startswith("stream")

        def deserialize(content: bytes) -> Any:
            try:
                return parse(content)
            except DecodeError:
                error = InvalidArgument(f"{name}: the request is no such message")
            if one:
                return _Unparsed(error)
            # Raised where the method reads it.
            raise error

        async def call(request: Any, context: Any) -> Any:
            if isinstance(request, _Unparsed):
                return await self._refuse(behaviour, context, request.error)
            return await behaviour(request, context)

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(call if one else behaviour, deserialize, handler.response_serializer)
